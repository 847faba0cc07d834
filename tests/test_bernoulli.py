"""Binomial kernels, against enumeration of every path of a few bits."""

import itertools
import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import kl_divergence

from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    BernoulliDiffusion,
    EnumeratedDenoiser,
    LinearDecaySchedule,
    MinimumVarianceELBO,
    MonotoneSchedule,
    NeuralBernoulliDenoiser,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
    ode_log_likelihood,
)
from pyro_diffusion.chains import Steps

ALPHA = torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64)
STATES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=torch.float64)
DATA = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def transition_matrix(alpha, rate):
    """q(b | a) of one bit, row a."""
    noise = torch.tensor([1 - rate, rate], dtype=torch.float64)
    return alpha * torch.eye(2, dtype=torch.float64) + (1 - alpha) * noise


def matrices(rate):
    """q(x_t | x_{t-1}) of every step, and q(x_t | x_0) from t = 0 on."""
    steps = [transition_matrix(a, rate) for a in ALPHA]
    upto = [torch.eye(2, dtype=torch.float64)]
    for step in steps:
        upto.append(upto[-1] @ step)
    return steps, upto


def exact(rate=0.5):
    return BernoulliDiffusion(EnumeratedDenoiser(DATA, AlphaSchedule(ALPHA), WEIGHTS, rate=rate))


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_kernels_against_bayes_rule_on_matrices(rate):
    diffusion = exact(rate)
    assert diffusion.process.rates(DATA)[0].unique().tolist() == sorted(
        {rate, 1 - rate}
    )  # in float64
    steps, upto = matrices(rate)
    for t in range(1, 4):
        for a, b in itertools.product((0, 1), repeat=2):
            x_a, x_b = (torch.full((1, 2), float(x), dtype=torch.float64) for x in (a, b))
            log_q = diffusion.process.transition(x_a, t).log_prob(x_b)
            torch.testing.assert_close(log_q.exp(), steps[t - 1][a, b].square()[None])
            log_q = diffusion.process.marginal(x_a, t).log_prob(x_b)
            torch.testing.assert_close(log_q.exp(), upto[t][a, b].square()[None])
            if t == 1:
                continue
            joint = upto[t - 1][a] * steps[t - 1][:, b]  # over x_{t-1}, given x_0 = a and x_t = b
            posterior = diffusion.process.posterior(x_b, x_a, t)
            torch.testing.assert_close(posterior.mean[0, 0], joint[1] / joint.sum())


@pytest.mark.parametrize("rate", [0.5, 0.2])
def test_enumerated_kernel_is_the_product_of_the_true_marginals(rate):
    diffusion = exact(rate)
    steps, upto = matrices(rate)
    data, states = DATA.long(), STATES.long()
    for t in range(1, 4):
        # q(x_{t-1}, x_t) by summing over the data
        before = upto[t - 1][data[:, None, :], states[None]].prod(-1)
        joint = (WEIGHTS[:, None] * before).sum(0)[:, None] * steps[t - 1][
            states[:, None], states[None]
        ].prod(-1)
        kernel = diffusion.denoiser(STATES, t)
        for i in range(2):
            truth = joint[states[:, i] == 1].sum(0) / joint.sum(0)
            torch.testing.assert_close(kernel.mean[:, i], truth)


def all_paths(diffusion, x_0):
    """log p(x_{0:3}) and log q(x_{1:3} | x_0) of every path, and its terms by KL and by log-ratio."""
    paths = torch.stack([torch.stack(p) for p in itertools.product(STATES, repeat=3)])  # (64, 3, 2)
    x_1, x_2, x_3 = paths.unbind(1)
    x_0 = x_0.expand(64, 2)
    log_p = diffusion.prior().log_prob(x_3) + diffusion.denoiser(x_3, 3).log_prob(x_2)
    log_p = log_p + diffusion.denoiser(x_2, 2).log_prob(x_1) + diffusion.decode(x_1).log_prob(x_0)
    log_q = sum(
        diffusion.process.transition(a, t).log_prob(b)
        for t, a, b in ((1, x_0, x_1), (2, x_1, x_2), (3, x_2, x_3))
    )
    return log_p, log_q


def test_bound_and_evidence_against_every_path():
    """Both guides, both forms: the mean over all paths is the enumerated bound, log Σ p the evidence."""
    pyro.set_rng_seed(0)
    diffusion = exact(0.3)
    for x_0 in DATA:
        log_p, log_q = all_paths(diffusion, x_0)
        torch.testing.assert_close(log_q.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
        bound, evidence = (log_q.exp() * (log_p - log_q)).sum(), log_p.logsumexp(0)
        batch = x_0.expand(100, 2)
        for guide in (diffusion.guide, diffusion.posterior_guide):
            mean = elbo_terms(diffusion.model, guide, batch, num_particles=100).mean()
            assert abs(mean.value - bound.item()) < 4 * mean.monte_carlo_error
        estimate = importance_evidence(
            diffusion.model, diffusion.guide, batch, num_particles=100
        ).mean()
        assert abs(estimate.value - evidence.item()) < 5 * estimate.monte_carlo_error + 1e-3
        assert bound < evidence


def test_orders_agree_path_by_path():
    diffusion = exact(0.3)
    x_3, x_2, x_1 = torch.randint(2, (3, 50, 2)).double()
    x_0 = DATA[torch.randint(3, (50,))]
    forward = sum(
        diffusion.process.transition(a, t).log_prob(b)
        for t, a, b in ((1, x_0, x_1), (2, x_1, x_2), (3, x_2, x_3))
    )
    backward = diffusion.process.marginal(x_0, diffusion.schedule.num_timesteps).log_prob(x_3)
    backward = backward + diffusion.process.posterior(x_3, x_0, 3).log_prob(x_2)
    backward = backward + diffusion.process.posterior(x_2, x_0, 2).log_prob(x_1)
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-12)


def enumerated_bound(diffusion, copies):
    """Of a heartbeat: bins of a phase are exchangeable, so that counts of ones stand for all states."""
    counts = torch.tensor(list(itertools.product(range(copies + 1), repeat=5)))
    states = (torch.arange(copies)[:, None] < counts[:, None]).flatten(1).double()
    ways = torch.tensor([float(math.comb(copies, k)) for k in range(copies + 1)])
    ways = ways[counts].prod(1).double()
    x_0 = torch.eye(5, dtype=torch.float64).repeat(1, copies)[0]
    bound = -kl_divergence(
        diffusion.process.marginal(x_0, diffusion.schedule.num_timesteps), diffusion.prior()
    ).item()
    for t in range(1, diffusion.schedule.num_timesteps + 1):
        share = ways * diffusion.process.marginal(x_0, t).log_prob(states).exp()
        torch.testing.assert_close(share.sum().item(), 1.0)
        kernel, likelihood = Steps(diffusion.schedule.num_timesteps).pair(
            diffusion, states, torch.tensor(t)
        )
        posterior = diffusion.process.posterior(states, x_0, max(t, 2))
        terms = likelihood.log_prob(x_0) if t == 1 else -kl_divergence(posterior, kernel)
        bound += (share * terms).sum().item()
    return bound


def test_best_bound_of_the_heartbeat():
    """ᾱ_t = 1 − t/T, T = 200: −2.3466 bits. (Facts, 23, say −2.342.)"""
    pyro.set_rng_seed(0)
    alpha = [1 - 1 / (200 - t + 1) for t in range(1, 200)] + [1e-9]
    heartbeats = torch.eye(5, dtype=torch.float64).repeat(1, 4)
    diffusion = BernoulliDiffusion(EnumeratedDenoiser(heartbeats, AlphaSchedule(alpha)))
    bound = enumerated_bound(diffusion, 4)
    assert abs(bound / math.log(2) + 2.3466) < 1e-4
    result = evaluate_bound(diffusion, heartbeats.repeat(40, 1), standard_error=0.02)
    assert abs(result.mean().value - bound) < 4 * result.monte_carlo_error


def test_zeros_are_exact_for_fair_bits_and_a_step_trains():
    class Zeros(torch.nn.Module):
        def forward(self, x_t, log_snr):
            return torch.zeros_like(x_t)

    schedule = LinearDecaySchedule(20)
    fair = BernoulliDiffusion(NeuralBernoulliDenoiser(Zeros(), schedule, (6,)))
    x_0 = torch.randint(2, (10, 6))
    terms = elbo_terms(fair.model, fair.guide, x_0, num_particles=2)
    torch.testing.assert_close(
        terms.elbo, torch.full((10,), -6 * math.log(2)).double(), atol=1e-5, rtol=0
    )
    assert set(fair.sample(20).unique().tolist()) == {0.0, 1.0}

    network = MLP((6,), hidden_size=16)
    learned = BernoulliDiffusion(NeuralBernoulliDenoiser(network, schedule, (6,)))
    for pair, elbo in (
        (learned.subsampled(), TraceMeanField_ELBO()),
        (learned.continuous(), TraceMeanField_ELBO()),
        (learned, Trace_ELBO()),
    ):
        before = list(network.parameters())[-1].clone()
        SVI(pair.model, pair.guide, Adam({"lr": 0.1}), elbo).step(x_0)
        assert not torch.equal(before, list(network.parameters())[-1])


def test_float32_keeps_small_changes():
    """Steps of 1e-4: KLs of the kernels within 1e-4 of those in float64."""
    diffusions = {
        dtype: BernoulliDiffusion(
            EnumeratedDenoiser(DATA.to(dtype), LinearDecaySchedule(10_000), WEIGHTS)
        )
        for dtype in (torch.float32, torch.float64)
    }
    t, x_t, x_0 = (
        torch.randint(2, 10_000, (200,)),
        torch.randint(2, (200, 2)),
        DATA[torch.randint(3, (200,))],
    )
    single, double = (
        kl_divergence(
            d.process.posterior(x_t.to(k), x_0.to(k), t), d.denoiser(x_t.to(k), t)
        ).double()
        for k, d in diffusions.items()
    )
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-8)


def test_what_it_cannot_take_is_refused_in_words():
    schedule = LinearDecaySchedule(5)
    diffusion = BernoulliDiffusion(NeuralBernoulliDenoiser(MLP((4,)), schedule, (4,)))
    for x_0 in (torch.full((2, 4), 0.5), torch.full((2, 4), 2)):
        with pytest.raises(ValueError, match="expected bits"):
            Trace_ELBO().loss(diffusion.model, diffusion.guide, x_0)
    with pytest.raises(ValueError, match="argument 'rate'"):
        NeuralBernoulliDenoiser(MLP((4,)), schedule, (4,), rate=1.0)
    with pytest.raises(ValueError, match="argument 'schedule'"):
        NeuralBernoulliDenoiser(MLP((4,)), MonotoneSchedule(5, event_shape=(4,)), (4,))
    with pytest.raises(ValueError, match="arguments 'data' and 'weights'"):
        EnumeratedDenoiser(torch.eye(3), schedule, torch.ones(2))
    with pytest.raises(ValueError, match="arguments 'data' and 'weights'"):
        EnumeratedDenoiser(torch.ones(3), schedule)
    for program in (diffusion.guide, diffusion.model, diffusion.subsampled().guide):
        with pytest.raises(
            ValueError, match="'mask': got one for states that have no value for a gap"
        ):
            program(torch.zeros(2, 4), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="chain of bits, which has no score"):
        ode_log_likelihood(diffusion, torch.zeros(2, 4), state=2)
    with pytest.raises(ValueError, match="no score"):
        diffusion.denoiser.score(torch.zeros(1, 4), torch.tensor(0.0))
    with pytest.raises(ValueError, match="argument 'network'"):
        BernoulliDiffusion(
            NeuralBernoulliDenoiser(MLP((4,), num_outputs=2), schedule, (4,))
        ).denoiser(torch.zeros(1, 4), 2)
    with pytest.raises(ValueError, match="alpha_bar_min"):
        LinearDecaySchedule(5, alpha_bar_max=0.1, alpha_bar_min=0.2)


def test_learned_schedules_are_refused_and_never_claimed_to_be_reparameterised():
    schedule = MonotoneSchedule(5)
    with pytest.raises(ValueError, match="argument 'schedule'"):
        NeuralBernoulliDenoiser(MLP((4,)), schedule, (4,))
    schedule.requires_grad_(False)
    diffusion = BernoulliDiffusion(NeuralBernoulliDenoiser(MLP((4,)), schedule, (4,)))
    schedule.requires_grad_(True)
    assert not diffusion.process.marginal(torch.zeros(1, 4), 3).has_rsample
    pair = diffusion.continuous()
    with pytest.raises(ValueError, match="not reparameterised"):
        MinimumVarianceELBO([schedule.interior]).loss_and_grads(
            pair.model, pair.guide, torch.zeros(2, 4)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_leave_the_chain_as_exact_as_it_is(dtype):
    class Zeros(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(20, dtype=dtype))

        def forward(self, x_t, log_snr):
            assert x_t.dtype == log_snr.dtype == dtype
            return self.bias.expand(len(x_t), 20)

    denoiser = NeuralBernoulliDenoiser(Zeros(), LinearDecaySchedule(50_000), (20,))
    assert denoiser.dtype == torch.float32
    pyro.set_rng_seed(0)  # rows with rare large terms: another seed may want ten times as many
    x_0 = torch.randint(2, (50, 20)).float()
    result = evaluate_bound(BernoulliDiffusion(denoiser), x_0, standard_error=0.02)
    assert abs(result.mean().value + 20 * math.log(2)) < 4 * result.monte_carlo_error + 1e-3
