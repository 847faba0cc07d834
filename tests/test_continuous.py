"""The chain without end: the limit of finite ones, whatever the curve, and learned curves on it."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    BernoulliDiffusion,
    CosineSchedule,
    DiffusionModel,
    EnumeratedDenoiser,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    ImportanceTimesteps,
    LearnedVariance,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MinimumVarianceELBO,
    MonotoneSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    StratifiedTimesteps,
    UniformTimesteps,
    VarianceExploding,
    bound_by_datum,
    elbo_terms,
    evaluate_bound,
    ode_log_likelihood,
    plot_denoised,
    plot_trajectory,
    snr_weight,
    summary,
    to_arviz,
)
from pyro_diffusion.processes import forward_increment

MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
STD = torch.tensor([0.5, 2.0], dtype=torch.float64)


def curve(num_timesteps=10):
    return LogSNRSchedule(num_timesteps, log_snr_max=12.0, log_snr_min=-14.0)


def monotone(num_timesteps=10, event_shape=()):
    schedule = MonotoneSchedule(
        num_timesteps, log_snr_max=12.0, log_snr_min=-14.0, num_pieces=5, event_shape=event_shape
    )
    with torch.no_grad():
        schedule.interior.copy_(
            torch.linspace(-0.5, 1, schedule.interior.numel()).reshape_as(schedule.interior)
        )
    return schedule


def draws_of_bound(pair, x_0, elbo, repeats=40):
    """Mean bound a datum and its standard error."""
    with torch.no_grad():
        draws = torch.tensor(
            [-elbo.loss(pair.model, pair.guide, x_0) / len(x_0) for _ in range(repeats)]
        )
    return draws.mean().item(), (draws.std() / math.sqrt(repeats)).item()


@pytest.mark.parametrize(
    "schedule", [curve(), monotone(), monotone(event_shape=(2,)), VarianceExploding(curve())]
)
@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_exact_denoiser_has_the_evidence_as_its_bound(schedule, elbo):
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(GaussianDenoiser(MEAN, STD, schedule))
    x_0 = diffusion.denoiser.data_distribution.sample((500,))
    value, error = draws_of_bound(diffusion.continuous(4), x_0, elbo)
    truth = diffusion.denoiser.data_distribution.log_prob(x_0).mean().item()
    assert error < 0.3
    assert abs(value - truth) < 4 * error


def test_mixture_has_it_too():
    """The reverse kernels of a mixture are no Gaussians; in the limit their means alone matter."""
    pyro.set_rng_seed(0)
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser([0.3, 0.7], means, torch.tensor([[0.2], [0.5]]), curve())
    x_0 = denoiser.data_distribution.sample((500,))
    value, error = draws_of_bound(
        DiffusionModel(denoiser).continuous(4), x_0, TraceMeanField_ELBO()
    )
    assert abs(value - denoiser.data_distribution.log_prob(x_0).mean().item()) < 4 * error


def test_site_has_the_rate_of_the_bound():
    """KL of the increments against −½ dSNR/du ‖x_0 − x̂_0‖², the limit of T · L_t (E12)."""
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)
    x_0, x_0_hat = torch.randn(2, 2, 3, dtype=torch.float64)
    for schedule in (
        curve(),
        LinearSchedule(7),
        CosineSchedule(),
        monotone(),
        LinearDecaySchedule(5),
    ):
        q, p = (forward_increment(x, u, schedule, event_dim=1) for x in (x_0, x_0_hat))
        rate = torch.distributions.kl_divergence(q, p)
        fine = schedule.with_num_timesteps(10**6 + 1)
        t = 1 + (u * 10**6).round().long()
        expected = 10**6 * snr_weight(fine, t) * (x_0 - x_0_hat).square().sum(-1)
        torch.testing.assert_close(rate, expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("variance", [ForwardVariance(), PosteriorVariance(), LearnedVariance()])
def test_finite_chains_tend_to_it_for_every_variance(variance):
    pyro.set_rng_seed(0)
    network = MLP((2,), num_outputs=1 + variance.num_outputs, hidden_size=16).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    schedule = LogSNRSchedule(100, log_snr_max=5.0, log_snr_min=-5.0)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, (2,), variance=variance))
    x_0 = torch.randn(50, 2, dtype=torch.float64)
    limit, *fine = (
        evaluate_bound(diffusion, x_0, standard_error=0.1, num_timesteps=t)
        for t in (math.inf, 400, 10)
    )
    gaps = [float(limit.mean()) - float(result.mean()) for result in fine]
    assert abs(gaps[0]) < 4 * 0.14
    assert abs(gaps[1]) > abs(gaps[0])


def test_a_chain_of_one_step_has_the_same_limit():
    pyro.set_rng_seed(0)
    diffusion = DiffusionModel(GaussianDenoiser(MEAN, STD, curve(1)))
    x_0 = diffusion.denoiser.data_distribution.sample((500,))
    truth = diffusion.denoiser.data_distribution.log_prob(x_0).mean().item()
    value, error = draws_of_bound(diffusion.continuous(4), x_0, TraceMeanField_ELBO())
    assert abs(value - truth) < 4 * error
    result = evaluate_bound(diffusion, x_0, standard_error=0.1, num_timesteps=math.inf)
    assert abs(result.mean().value - truth) < 4 * result.monte_carlo_error


def test_what_reads_a_schedule_reads_one_for_every_dimension():
    pyro.set_rng_seed(0)
    schedule = monotone(6, event_shape=(2,))
    diffusion = DiffusionModel(GaussianDenoiser(MEAN, STD, schedule))
    x_0 = diffusion.denoiser.data_distribution.sample((30,))
    data = to_arviz(diffusion, x_0, num_draws=25, timesteps=[1, 6])
    assert data.constant_data["log_snr"].dims == ("timestep",)
    plot_trajectory(diffusion, x_0)
    plot_denoised(diffusion, x_0)
    plt.close("all")
    with pytest.raises(ValueError, match="a curve for each entry"):
        ode_log_likelihood(diffusion, x_0)
    result = summary(diffusion, x_0, standard_error=0.5, num_particles=16)
    assert list(result.groups()) == ["chain, T = 6", "chain, T → ∞"]


def test_with_num_timesteps_shares_parameters_and_names():
    network = MLP((2,), hidden_size=8)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(100), (2,)))
    other = diffusion.with_num_timesteps(7)
    assert (other.schedule.num_timesteps, diffusion.schedule.num_timesteps) == (7, 100)
    assert other.denoiser.network is network
    assert other.name == diffusion.name
    svi = SVI(other.model, other.guide, ClippedAdam({"lr": 0.1}), Trace_ELBO())
    before = [p.clone() for p in network.parameters()]
    svi.step(torch.randn(4, 2))
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    diffusion.to(torch.float64)
    assert len(diffusion.model.site_names) == 101


def test_what_has_no_limit_is_refused():
    x_0 = torch.zeros(3, 2, dtype=torch.float64)
    diffusion = DiffusionModel(GaussianDenoiser(MEAN, STD, AlphaSchedule([0.9, 0.5])))
    pair = diffusion.continuous()
    with pytest.raises(ValueError, match="AlphaSchedule"):
        Trace_ELBO().loss(pair.model, pair.guide, x_0)
    for law in (UniformTimesteps(), ImportanceTimesteps()):
        pair = DiffusionModel(GaussianDenoiser(MEAN, STD, curve())).continuous(timesteps=law)
        with pytest.raises(ValueError, match="argument 'timesteps'"):
            Trace_ELBO().loss(pair.model, pair.guide, x_0)
    with pytest.raises(ValueError, match="argument 'num_timesteps'"):
        diffusion.continuous(0)


def test_share_of_the_reconstruction():
    law = StratifiedTimesteps(0.25).continuous(torch.device("cpu")).expand([4000])
    u = law.sample()
    assert (u == 0).sum() in range(999, 1002)
    assert ((u >= 0) & (u <= 1)).all()
    torch.testing.assert_close(
        law.log_prob(u).exp().unique(), torch.tensor([0.25, 0.75], dtype=torch.float64)
    )


# Bits.


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_bits_without_end_lose_nothing(elbo, rate):
    """Two bits never change at once in continuous time, so that acting bit by bit is exact: −log 5."""
    pyro.set_rng_seed(0)
    heartbeats = torch.eye(5, dtype=torch.float64).repeat(1, 4)
    schedule = LinearDecaySchedule(10, alpha_bar_max=0.9999, alpha_bar_min=1e-4)
    diffusion = BernoulliDiffusion(EnumeratedDenoiser(heartbeats, schedule, rate=rate))
    value, error = draws_of_bound(diffusion.continuous(10), heartbeats.repeat(100, 1), elbo)
    assert abs(value + math.log(5)) < 4 * error + 2e-3
    assert error < 0.02


# Learned curves.


def second_moments(log_snr):
    """E ℓ and E ℓ² of a 64-D Gaussian at log-SNRs, ℓ = ½ SNR ‖x_0 − x̂_0‖²; and the standard deviations."""
    std = np.logspace(-1, 0.5, 64)
    snr = np.exp(log_snr)[:, None]
    variance = std**2 / (1 + snr * std**2)  # of x_0 given x_t
    mean = 0.5 * (snr * variance).sum(1)
    return mean, mean**2 + 0.5 * (snr**2 * variance**2).sum(1), std


def test_variance_of_a_learned_curve_comes_close_to_the_floor():
    """64-D Gaussian, against (∫√E ℓ²)² − (∫E ℓ)² by quadrature (facts: 26 times below a straight line)."""
    pyro.set_rng_seed(0)
    grid = np.linspace(12, -12, 2001)
    mean, square, std = second_moments(grid)
    floor = np.trapezoid(np.sqrt(square), -grid) ** 2 - np.trapezoid(mean, -grid) ** 2
    schedule = MonotoneSchedule(1000, log_snr_max=12.0, log_snr_min=-12.0)
    schedule.log_snr_min.requires_grad_(False)
    schedule.log_range.requires_grad_(False)

    def variance():
        u = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
        log_snr, slope = (
            schedule.log_snr_at(u).detach().numpy(),
            -schedule.slope_at(u).detach().numpy(),
        )
        mean, square, _ = second_moments(log_snr)
        return (square * slope**2).mean() - (mean * slope).mean() ** 2

    before = variance()
    denoiser = GaussianDenoiser(
        torch.zeros(64, dtype=torch.float64), torch.as_tensor(std), schedule
    )
    diffusion = DiffusionModel(denoiser)
    pair = diffusion.continuous()
    optim = ClippedAdam({"lr": 0.3, "betas": (0.9, 0.99), "lrd": 0.03 ** (1 / 300)})
    svi = SVI(pair.model, pair.guide, optim, MinimumVarianceELBO([schedule.interior]))
    for _ in range(300):
        svi.step(denoiser.data_distribution.sample((200,)))
    assert before > 20 * floor
    assert floor < variance() < 1.15 * floor


def test_minimum_variance_moves_the_ends_by_the_bound_and_the_interior_by_the_squares():
    pyro.set_rng_seed(0)
    schedule = monotone()
    diffusion = DiffusionModel(GaussianDenoiser(MEAN, STD, schedule))
    pair, x_0 = diffusion.continuous(2), torch.randn(50, 2, dtype=torch.float64)

    def gradients(elbo):
        for parameter in schedule.parameters():
            parameter.grad = None
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(pair.model, pair.guide, x_0)
        return loss, schedule.log_snr_min.grad, schedule.log_range.grad, schedule.interior.grad

    plain = gradients(TraceMeanField_ELBO())
    minimum = gradients(MinimumVarianceELBO([schedule.interior]))
    for ours, theirs in zip(minimum[:3], plain[:3], strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert not torch.allclose(minimum[3], plain[3])

    def mean_square(interior):
        pyro.set_rng_seed(1)
        with torch.no_grad():
            schedule.interior.copy_(interior)
        return bound_by_datum(pair.model, pair.guide, x_0).square().mean().log().item() / 2

    start, step = schedule.interior.detach().clone(), 1e-6
    for k in range(len(start)):
        shift = step * torch.eye(len(start), dtype=torch.float64)[k]
        slope = (mean_square(start + shift) - mean_square(start - shift)) / (2 * step)
        torch.testing.assert_close(minimum[3][k].item(), slope, rtol=1e-4, atol=1e-6)


def test_minimum_variance_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match="argument 'parameters'"):
        MinimumVarianceELBO([])
    for wrong in (torch.zeros(3), monotone(), [monotone()]):
        with pytest.raises(ValueError, match="argument 'parameters'"):
            MinimumVarianceELBO(wrong)
    with pytest.raises(ValueError, match="argument 'event_shape'"):
        MonotoneSchedule(10, event_shape=2)
    assert "log_snr_max=12, log_snr_min=-14" in repr(monotone())
    diffusion = DiffusionModel(GaussianDenoiser(MEAN, STD, monotone()))
    pair, stranger = diffusion.continuous(), monotone().interior
    with pytest.raises(ValueError, match="does not depend on"):
        MinimumVarianceELBO([stranger]).loss_and_grads(
            pair.model, pair.guide, torch.randn(4, 2, dtype=torch.float64)
        )


# A curve for every dimension.


def test_zero_variance_with_a_curve_for_every_dimension():
    schedule = monotone(6, event_shape=(2,))
    with torch.no_grad():
        schedule.log_snr_min.sub_(40.0)
        schedule.interior.copy_(torch.randn(2, 6))
    for schedule_ in (schedule, VarianceExploding(schedule)):
        gaussian = GaussianDenoiser(MEAN, STD, schedule_)
        means = torch.stack((MEAN, -MEAN))
        mixture = GaussianMixtureDenoiser([0.3, 0.7], means, STD.expand(2, 2), schedule_)
        for denoiser in (gaussian, mixture):
            diffusion = DiffusionModel(denoiser)
            x_0 = denoiser.data_distribution.sample((5,))
            for guide in (diffusion.guide, diffusion.posterior_guide):
                terms = elbo_terms(diffusion.model, guide, x_0, num_particles=2, analytic_kl=False)
                truth = denoiser.data_distribution.log_prob(x_0)
                torch.testing.assert_close(terms.elbo, truth, atol=1e-7, rtol=0)


def test_a_network_sees_the_mean_log_snr_of_its_dimensions():
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, x_t, log_snr):
            seen.append(log_snr)
            return torch.zeros_like(x_t)

    schedule = monotone(6, event_shape=(2,))
    denoiser = NeuralDenoiser(Recorder(), schedule, (2,))
    denoiser(torch.zeros(4, 2), torch.tensor([1, 2, 3, 6]))
    expected = schedule.log_snr(torch.tensor([1, 2, 3, 6])).mean(-1)
    torch.testing.assert_close(seen[0], expected.float())
    with pytest.raises(ValueError, match="argument 'schedule'"):
        NeuralDenoiser(Recorder(), schedule, (3,))
    with pytest.raises(ValueError, match="argument 'schedule'"):
        GaussianDenoiser.from_covariance(MEAN, torch.eye(2, dtype=torch.float64), schedule)
