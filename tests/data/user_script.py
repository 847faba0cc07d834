"""What a user writes, after README: ``mypy --strict`` reads it, and it runs (tests/test_types.py).

``assert_type`` is an error to a type checker unless it finds exactly that type. It does nothing when it runs.
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import assert_type

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import xarray
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_diffusion
from pyro_diffusion import (
    MLP,
    AncestralSampler,
    BernoulliDiffusion,
    CosineSchedule,
    DDIMSampler,
    DiffusionModel,
    ELBOTerms,
    EnumeratedDenoiser,
    Estimate,
    Evidence,
    Fit,
    FreeBitsELBO,
    GaussianDenoiser,
    GaussianLikelihood,
    GaussianMixtureDenoiser,
    Guidance,
    HierarchicalVAE,
    KLWarmup,
    LadderEncoder,
    LevelPrediction,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MinimumVarianceELBO,
    MonotoneSchedule,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    NeuralDenoiser,
    ODESampler,
    OptimalVariance,
    PoissonLikelihood,
    PosteriorVariance,
    Recipe,
    ShuffledBatches,
    Standardize,
    VarianceExploding,
    VelocityPrediction,
    active_units,
    compare,
    compile_elbo,
    elbo_terms,
    evaluate_bound,
    fit,
    forward_marginal,
    importance_evidence,
    ode_log_likelihood,
    over_ranks,
    plot_bound,
    plot_khat,
    plot_pit,
    plot_samples,
    plot_schedule,
    plot_training,
    randomized_pit,
    simulation_based_calibration,
    smc_evidence,
    snr_weight,
    summary,
    terminal_prior,
    to_arviz,
)
from pyro_diffusion.bounds import BoundEvaluation
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.evidence import Summary
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.training import SVIModule
from pyro_diffusion.typed import TorchDistribution


def ring(num_data: int) -> Tensor:
    """Points near a circle."""
    angle = 2 * math.pi * torch.rand(num_data)
    return torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(num_data, 2)


class Network(nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """The noise, from a state and its log-SNR."""
        output: Tensor = self.layer(torch.cat([x_t, log_snr[:, None]], 1))
        return output


class Angles:
    """A likelihood of the user's own, which is a plain object."""

    def embed(self, x_0: Tensor) -> Tensor:
        """Angles as states of the chain."""
        return x_0 / math.pi

    def __call__(self, x_0_hat: Tensor) -> TorchDistribution:
        """A von Mises law around the estimate."""
        law: TorchDistribution = dist.VonMises(math.pi * x_0_hat, 10.0)
        return law


def build(schedule: NoiseSchedule) -> DiffusionModel:
    """A diffusion model of two numbers."""
    network = MLP((2,), hidden_size=8, num_blocks=1)
    return DiffusionModel(NeuralDenoiser(network, schedule, event_shape=(2,)))


def train(diffusion: DiffusionModel, x_0: Tensor, steps: int) -> float:
    """Plain SVI."""
    fast = diffusion.subsampled(num_timesteps=1)
    svi = SVI(fast.model, fast.guide, pyro.optim.Adam({"lr": 3e-3}), TraceMeanField_ELBO())
    loss = math.nan
    for _ in range(steps):
        loss = float(svi.step(x_0[torch.randint(len(x_0), (16,))], num_data=len(x_0)))
    return loss


def train_in_one_call(diffusion: DiffusionModel, x_0: Tensor) -> Estimate:
    """``fit``, with a mask, weights and settings, on a family and on a pair of programs."""
    seen, weights = torch.ones_like(x_0, dtype=torch.bool), torch.ones(len(x_0))
    recipe = Recipe(learning_rate=1e-3, weight_decay=0.1)
    result = fit(
        diffusion, x_0, mask=seen, weights=weights, max_steps=5, recipe=recipe, progress=False
    )
    assert_type(result, Fit)
    assert_type(result.history, xarray.Dataset)
    assert_type(result.seconds, float)
    pair = diffusion.subsampled()
    fit((pair.model, pair.guide), x_0.numpy(), validation=x_0, max_steps=5, progress=False)
    return result.best.bound


def read(diffusion: DiffusionModel, x_0: Tensor) -> dict[str, float]:
    """The bound and what is above it."""
    terms = elbo_terms(diffusion, x_0)
    assert_type(terms, ELBOTerms)
    assert_type(terms.transition, Tensor)
    assert_type(terms.mean(), Estimate)
    assert_type(terms.bits_per_dim().value, float)
    assert_type(terms.to_dataset(), xarray.Dataset)
    print(terms, terms.table(), terms.transition.mean(1), terms.term_means()[0])
    quiet = elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, analytic_kl=False)
    result = evaluate_bound(diffusion, x_0, standard_error=1.0, num_timesteps=math.inf)
    assert_type(result, BoundEvaluation)
    kept: BoundEvaluation = result
    evidence = importance_evidence(diffusion, x_0, num_particles=50)
    assert_type(evidence, Evidence)
    assert_type(evidence.log_evidence, Tensor)
    particles = smc_evidence(diffusion, x_0[:2], num_particles=16, num_runs=2, num_pilot=25)
    assert_type(particles, Evidence)
    flow = ode_log_likelihood(diffusion, x_0[:2])
    assert_type(flow, Evidence)
    report: Summary = summary(diffusion, x_0[:2], num_particles=16)
    print(report.table())
    return {
        "elbo": quiet.mean().value,
        "error": kept.mean().monte_carlo_error,
        "evidence": float(evidence.mean()),
        "particles": float(particles.reliable.sum()),
        "flow": flow.log_evidence.mean().item(),
        "weight": float(snr_weight(diffusion.schedule, 2)),
    }


def draw(diffusion: DiffusionModel) -> Tensor:
    """Samples, in every way there is."""
    samples = diffusion.sample(4)
    assert_type(samples, Tensor)
    assert_type(diffusion.model(num_samples=2), Tensor)
    ancestral = AncestralSampler(diffusion, timesteps=3)(4, progress=False)
    assert_type(ancestral, Tensor)
    ddim = DDIMSampler(diffusion, timesteps=[1, 3, 5])
    assert_type(ddim(4), Tensor)
    second = ODESampler(diffusion, timesteps=3, eta=1.0)(4)
    network = MLP((2,), num_classes=3, null_token=True)
    labelled = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(5), (2,)))
    guided = ODESampler(labelled, guidance=Guidance(2.0))
    assert_type(guided(4, context=torch.tensor(1)), Tensor)
    assert_type(labelled.sample(2, context=torch.tensor([0, 2])), Tensor)
    fewer = diffusion.strided(3)
    assert_type(fewer, DiffusionModel)
    return torch.cat([samples, ancestral, second, over_ranks(fewer.sample, 4)])


def kernels(diffusion: DiffusionModel, x_0: Tensor) -> Tensor:
    """Distributions of the model."""
    denoiser: Denoiser = diffusion.denoiser
    x_t = torch.zeros(3, 2)
    kernel = denoiser(x_t, 2)
    assert_type(kernel, TorchDistribution)
    assert_type(kernel.mean, Tensor)
    assert_type(kernel.log_prob(x_t), Tensor)
    assert_type(kernel.expand((4, 3)).sample(), Tensor)
    estimate = denoiser.x_0_hat(x_t, diffusion.schedule.log_snr(2))
    assert_type(estimate, Tensor)
    score = denoiser.score(x_t, diffusion.schedule.log_snr(2))
    q = forward_marginal(x_0, 2, diffusion.schedule, event_dim=1)
    assert_type(q, TorchDistribution)
    assert_type(diffusion.process.transition(x_0, 1), TorchDistribution)
    assert_type(diffusion.decode(x_t), TorchDistribution)
    assert_type(diffusion.embed(x_0), Tensor)
    prior = terminal_prior(diffusion.schedule, (2,), dtype=x_0.dtype)
    return kernel.sample() + estimate + score + prior.sample((3,)) + q.sample().mean(0)


def oracles(x_0: Tensor) -> Tensor:
    """Exact denoisers and their data."""
    schedule = CosineSchedule(5)
    normal = GaussianDenoiser(torch.zeros(2), torch.ones(2), schedule)
    means, variances = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.ones(2, 2)
    mixture = GaussianMixtureDenoiser(torch.full((2,), 0.5), means, variances, schedule)
    assert_type(mixture.data_distribution, TorchDistribution)
    return normal.data_distribution.log_prob(x_0) + mixture.data_distribution.log_prob(x_0)


def other_data() -> None:
    """Levels, counts, bits, categories, gaps and another unit."""
    levels = DiffusionModel(
        NeuralDenoiser(
            MLP((4,), num_outputs=5),
            LogSNRSchedule(5, log_snr_max=4.0),
            (4,),
            prediction=LevelPrediction(5),
            variance=PosteriorVariance(),
        )
    )
    print(elbo_terms(levels, torch.randint(5, (3, 4))).bits_per_dim())
    counts = DiffusionModel(
        NeuralDenoiser(Network(), LinearSchedule(5), (2,), prediction=VelocityPrediction()),
        likelihood=PoissonLikelihood(max_count=6),
    )
    print(elbo_terms(counts, torch.randint(6, (3, 2))).mean())
    circle = DiffusionModel(NeuralDenoiser(MLP((1,)), LogSNRSchedule(5), (1,)), Angles())
    print(elbo_terms(circle, torch.rand(3, 1)).mean())
    bits = torch.eye(4)
    decay = LinearDecaySchedule(5)
    bernoulli = BernoulliDiffusion(NeuralBernoulliDenoiser(MLP((4,)), decay, event_shape=(4,)))
    best = BernoulliDiffusion(EnumeratedDenoiser(bits, decay))
    print(elbo_terms(bernoulli, bits).mean(), elbo_terms(best, bits).mean())
    categories = DiffusionModel(
        NeuralCategoricalDenoiser(MLP((4, 3)), decay, (4,), num_categories=3)
    )
    print(elbo_terms(categories, torch.randint(3, (5, 4))).mean())

    volts = 1e-6 * (3 + torch.randn(50, 2))
    seen = torch.rand(50, 2) < 0.8
    seen[:, 0] = True
    volts[~seen] = torch.nan
    sensors = DiffusionModel(
        NeuralDenoiser(MLP((2,)), VarianceExploding(LogSNRSchedule(5)), (2,)),
        likelihood=GaussianLikelihood(0.1, learnable=True),
        transform=Standardize.from_data(volts, mask=seen),
    )
    print(elbo_terms(sensors, volts, mask=seen).mean())


def hierarchical(x_0: Tensor) -> None:
    """Hierarchical VAEs, ranked."""
    sizes = (4, 2)
    bottom_up = HierarchicalVAE((2,), latent_sizes=sizes, hidden_size=8)
    encoder = LadderEncoder((2,), sizes, hidden_size=8)
    ladder = HierarchicalVAE((2,), sizes, encoder=encoder, hidden_size=8)
    for vae, elbo in ((bottom_up, Trace_ELBO()), (ladder, FreeBitsELBO(free_nats=0.1))):
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), elbo)
        for step in range(2):
            with KLWarmup(min(1.0, step / 2)):
                svi.step(x_0, num_data=len(x_0))
        assert_type(vae.sample(2), Tensor)
    print({site: int(units.sum()) for site, units in active_units(ladder.guide, x_0).items()})
    found = {
        name: importance_evidence(vae, x_0, num_particles=50)
        for name, vae in {"bottom-up": bottom_up, "ladder": ladder}.items()
    }
    print(compare(found)["elpd_diff"])


def learned(x_0: Tensor) -> None:
    """A learned schedule, a compiled loss, the best variances."""
    schedule = MonotoneSchedule(5, log_snr_max=6.0)
    diffusion = build(schedule)
    pair = diffusion.continuous()
    elbo = MinimumVarianceELBO([schedule.interior])
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x_0)
    fast = build(LogSNRSchedule(5)).subsampled()
    loss = compile_elbo(fast.model, fast.guide, TraceMeanField_ELBO(), backend=None)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for batch in ShuffledBatches(x_0, 16):
        optimizer.zero_grad()
        nats = loss(batch, num_data=len(x_0))
        assert_type(nats, Tensor)
        nats.backward()
        optimizer.step()
    variance = OptimalVariance.from_data(diffusion, x_0)
    assert_type(variance, OptimalVariance)
    better = NeuralDenoiser(MLP((2,)), LogSNRSchedule(5), (2,), variance=variance)
    print(elbo_terms(DiffusionModel(better), x_0[:4]).mean())


def look(diffusion: DiffusionModel, x_0: Tensor, folder: Path) -> None:
    """Figures, ArviZ, and files."""
    axes = plot_bound(elbo_terms(diffusion, x_0))
    axes.set_title("bound")
    plot_schedule(diffusion.schedule)
    plt.savefig(folder / "schedule.png")
    plot_khat(importance_evidence(diffusion, x_0, num_particles=50))
    plot_samples(torch.rand(4, 8, 8))
    pit = simulation_based_calibration(
        diffusion, lambda states: states["x_3"][:, 0], num_simulations=20
    )
    assert_type(pit, Tensor)
    plot_pit(pit)
    draws = diffusion.sample(19 * len(x_0))[:, 0].reshape(19, -1)
    plot_pit(randomized_pit(x_0[:, 0], draws))
    plt.close("all")
    to_arviz(diffusion, x_0[:3], num_draws=25, timesteps=[1, 5]).to_netcdf(folder / "draws.nc")
    diffusion.save(folder / "model.pt")
    loaded = diffusion.load(folder / "model.pt")
    assert_type(loaded, DiffusionModel)


def lightning_module(diffusion: DiffusionModel) -> SVIModule:
    """The adapter to Lightning."""
    pair = diffusion.subsampled()
    adam = partial(torch.optim.Adam, lr=1e-3)
    module = SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), adam)
    if module.history:
        plot_training(module.history)
    return module


def main() -> None:
    """Everything once, with very little work."""
    pyro.set_rng_seed(0)
    x_0 = ring(40)
    diffusion = build(LogSNRSchedule(num_timesteps=5, log_snr_max=6.0))
    print(pyro_diffusion.__version__, train(diffusion, x_0, steps=3))
    print(train_in_one_call(diffusion, x_0))
    print(read(diffusion, x_0[:5]))
    print(draw(diffusion).shape, kernels(diffusion, x_0).shape, oracles(x_0).shape)
    other_data()
    hierarchical(x_0)
    learned(x_0)
    with tempfile.TemporaryDirectory() as folder:
        look(diffusion, x_0[:5], Path(folder))
    lightning_module(diffusion)


if __name__ == "__main__":
    main()
