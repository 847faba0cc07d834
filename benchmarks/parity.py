r"""Numbers from all parts of the package under fixed seeds, compared with those of an earlier commit.

Every quantity is small: a bound with its terms, an estimate of the evidence, twenty losses of a training
run, moments of samples. A model is built under one seed, and the numbers are drawn under another. A
quantity has ``values``, which agree to rounding as long as the random numbers come in the same order,
and a ``summary`` of a few numbers, each with an error. If only the order of the random numbers has changed,
the summary agrees within its errors. The error is the Monte Carlo error of the number. For a training run it
is the spread of the mean loss under other seeds, which is measured when there is no ``--reference``.

    python benchmarks/parity.py [--seed 0] [--device cuda] [--smoke] [--output benchmarks/results]
    python benchmarks/parity.py --reference benchmarks/results/parity.json --output outputs/parity

With ``--reference`` the verdict on a quantity is ``same`` (1e-10 relative to max(1, \|value\|)),
``within 3 errors`` or ``DIFFERENT``, and the script exits with 1 if any is different. One number in 370 is
beyond three errors by chance: look at such a quantity again with another ``--seed``.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

import pyro_diffusion
from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    AncestralSampler,
    BernoulliDiffusion,
    BernoulliLikelihood,
    CategoricalLikelihood,
    CosineSchedule,
    DataPrediction,
    DDIMSampler,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    FreeBitsELBO,
    GaussianDenoiser,
    GaussianLikelihood,
    GaussianMixtureDenoiser,
    HierarchicalVAE,
    ImportanceTimesteps,
    KLWarmup,
    LearnedVariance,
    LevelPrediction,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MinimumVarianceELBO,
    MonotoneSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    NoisePrediction,
    ODESampler,
    OptimalVariance,
    PoissonLikelihood,
    PosteriorVariance,
    ScorePrediction,
    Standardize,
    UniformTimesteps,
    VarianceExploding,
    VelocityPrediction,
    bound_by_datum,
    compile_elbo,
    elbo_terms,
    evaluate_bound,
    forward_marginal,
    forward_posterior,
    forward_transition,
    importance_evidence,
    ode_log_likelihood,
    smc_evidence,
    summary,
    terminal_prior,
    to_arviz,
)

BUILD_SEED = 12345  # of networks and data, which are the same in every run
NUM_DATA, SIZE, NUM_STEPS, NUM_LEVELS = 24, 3, 20, 5
ROUNDING, NUM_ERRORS, NUM_REPEATS = 1e-10, 3.0, 8
STUDENT = 1.5  # three errors are 99.7 % for a spread that is known from eight numbers as well


def find(name: str, *rooms: str) -> Any:
    """A name at the top of the package, or in the first of its modules that has it."""
    if hasattr(pyro_diffusion, name):
        return getattr(pyro_diffusion, name)
    for room in rooms:
        try:
            return getattr(importlib.import_module(f"pyro_diffusion.{room}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name} is neither in pyro_diffusion nor in its modules {rooms}")


EnumeratedDenoiser = find("EnumeratedDenoiser", "denoisers", "bernoulli")
LadderEncoder = find("LadderEncoder", "hvae")


class Numbers(NamedTuple):
    """The values of a quantity, and their summary."""

    values: list[float]  #: equal to rounding, if the random numbers come in the same order
    summary: list[float]  #: few numbers, for another order
    errors: list[float] | None  #: of the summary; ``None`` if they are measured by other seeds
    note: str = ""  #: what was chosen on the way


class Case(NamedTuple):
    """A model and data, and the quantities that are computed from them."""

    build: Callable[[], Any]
    compute: Callable[..., Numbers]
    again: Callable[..., Numbers] | None = None  #: the same, cheaper, for other seeds


# What is computed.


def terms_of(num_particles: int = 64, guide: str = "posterior_guide") -> Callable[..., Numbers]:
    """``elbo_terms``: mean bound, reconstruction, first transition and prior, each with its error."""

    def compute(family: Any, x_0: torch.Tensor, mask: torch.Tensor | None = None) -> Numbers:
        terms = elbo_terms(
            family.model, getattr(family, guide), x_0, num_particles=num_particles, mask=mask
        )
        means = terms.term_means()
        few = [terms.mean(), *dict.fromkeys((means[0], means[1], means[-1]))]
        every = [terms.elbo, terms.standard_error, terms.reconstruction, terms.prior]
        every += [terms.transition.flatten(), terms.term_standard_error.mean(1)]
        return Numbers(
            [*torch.cat(every).tolist(), *terms.bits_per_dim()],
            [estimate.value for estimate in few],
            [estimate.monte_carlo_error for estimate in few],
            " ".join(dict.fromkeys(terms.kinds)),
        )

    return compute


def evidence(run: Callable[..., Any], solver_error: float = 0.0) -> Callable[..., Numbers]:
    """An ``Evidence``: its mean with the error. A solver's tolerance is an error, too."""

    def compute(diffusion: Any, x_0: torch.Tensor, mask: torch.Tensor | None = None) -> Numbers:
        result = run(diffusion, x_0, **({} if mask is None else {"mask": mask}))
        mean = result.mean()
        values = [*result.log_evidence.tolist(), *result.standard_error.tolist()]
        error = math.hypot(mean.monte_carlo_error, solver_error)
        return Numbers(values, [mean.value], [error], f"{int(result.reliable.sum())} reliable")

    return compute


def by_weights(diffusion: Any, x_0: torch.Tensor, **given: Any) -> Any:
    return importance_evidence(diffusion.model, diffusion.guide, x_0, num_particles=512, **given)


def by_particles(diffusion: Any, x_0: torch.Tensor, **given: Any) -> Any:
    return smc_evidence(diffusion, x_0, num_particles=128, num_pilot=64, num_runs=4, **given)


def bound(standard_error: float, num_timesteps: float | None = None) -> Callable[..., Numbers]:
    """``evaluate_bound``."""

    def compute(diffusion: Any, x_0: torch.Tensor) -> Numbers:
        result = evaluate_bound(
            diffusion, x_0, standard_error=standard_error, num_timesteps=num_timesteps
        )
        values = [*result.elbo.tolist(), *result.standard_error.tolist(), float(result.rows)]
        return Numbers(
            values, [result.mean().value], [result.monte_carlo_error], f"by {result.estimator}"
        )

    return compute


def by_other_seeds(compute: Callable[..., Numbers]) -> Callable[..., Numbers]:
    """The same numbers, with errors that are measured from other seeds."""
    return lambda *given: compute(*given)._replace(errors=None)


def moments(draw: Callable[[Any, int], torch.Tensor], num_samples: int = 2000) -> Any:
    """Means and standard deviations of independent samples, and the first of them."""

    def compute(family: Any, *_: Any) -> Numbers:
        x = draw(family, num_samples).double().reshape(num_samples, -1)
        mean, std = x.mean(0), x.std(0)
        kurtosis = ((x - mean) / std).pow(4).mean(0)
        errors = torch.cat([std, std * (kurtosis - 1).clamp(min=0).sqrt() / 2]) / num_samples**0.5
        few = torch.cat([mean, std])
        return Numbers([*x[:4].flatten().tolist(), *few.tolist()], few.tolist(), errors.tolist())

    return compute


def losses(
    pair: Callable[[Any], Any] = lambda family: family,
    elbo: Callable[[Any], Any] = lambda _: TraceMeanField_ELBO(),
    guide: str = "guide",
    around: Callable[[int], Any] = lambda _: torch.enable_grad(),
) -> Callable[..., Numbers]:
    """Losses of twenty steps of ``SVI``, per datum."""

    def compute(family: Any, x_0: torch.Tensor, mask: torch.Tensor | None = None) -> Numbers:
        family.train()
        programs, given = pair(family), {} if mask is None else {"mask": mask}
        svi = SVI(programs.model, getattr(programs, guide), Adam({"lr": 3e-3}), elbo(family))
        steps = []
        for step in range(NUM_STEPS):
            with around(step):
                steps.append(svi.step(x_0, **given) / len(x_0))
        return Numbers(steps, [statistics.fmean(steps)], None)

    return compute


def by_importance(family: Any, x_0: torch.Tensor) -> Numbers:
    """The same, with a distribution of timesteps that adapts during training."""
    law = ImportanceTimesteps()
    pair = family.subsampled(2, timesteps=law)
    svi = SVI(pair.model, pair.guide, Adam({"lr": 3e-3}), TraceMeanField_ELBO())
    steps = []
    for step in range(NUM_STEPS):
        if step % 5 == 0:
            law.observe(pair.model, pair.guide, x_0)
        steps.append(svi.step(x_0) / len(x_0))
    return Numbers(steps, [statistics.fmean(steps)], None)


def compiled(pair: Callable[[Any], Any]) -> Callable[..., Numbers]:
    """Losses of a step that is traced into a graph, and run without a compiler."""

    def compute(family: Any, x_0: torch.Tensor) -> Numbers:
        programs = pair(family)
        loss_of = compile_elbo(programs.model, programs.guide, TraceMeanField_ELBO(), backend=None)
        adam, steps = torch.optim.Adam(family.parameters(), lr=3e-3), []
        for _ in range(NUM_STEPS):
            adam.zero_grad()
            loss = loss_of(x_0)
            loss.backward()
            adam.step()
            steps.append(loss.item() / len(x_0))
        return Numbers(steps, [statistics.fmean(steps)], None)

    return compute


@torch.no_grad()
def by_datum(family: Any, x_0: torch.Tensor) -> Numbers:
    """``bound_by_datum``, once and a hundred times."""
    pair = family.subsampled(2)
    draws = torch.stack([bound_by_datum(pair.model, pair.guide, x_0) for _ in range(100)])
    means = draws.mean(1)
    return Numbers(draws[0].tolist(), [means.mean().item()], [means.std().item() / 10])


def summarised(diffusion: Any, x_0: torch.Tensor) -> Numbers:
    """``summary``: every estimate of one model's log-density."""
    rows = summary(diffusion, x_0, num_particles=128).rows
    values = [row.value.value for row in rows]
    errors = [
        math.hypot(row.value.monte_carlo_error, 1e-4 if "flow" in row.model else 0.0)
        for row in rows
    ]
    names = "; ".join(f"{row.model} {row.estimator.split(',')[0]}" for row in rows)
    return Numbers(values + errors, values, errors, names)


def optimal_variance(diffusion: Any, x_0: torch.Tensor) -> Numbers:
    """The bound of a model with ``OptimalVariance.from_data``."""
    variance = OptimalVariance.from_data(diffusion, x_0)
    denoiser = diffusion.denoiser
    best = NeuralDenoiser(denoiser.network, denoiser.schedule, (SIZE,), variance=variance)
    return terms_of()(DiffusionModel(best), x_0)._replace(errors=None)


def posterior_means(family: Any, x_0: torch.Tensor) -> Numbers:
    """``to_arviz``: means of the states, over draws and data."""
    num_draws = 100
    draws = to_arviz(family, x_0, num_draws=num_draws)["posterior"]["x"].values[0]
    states = torch.as_tensor(draws).cpu().mean(1).flatten(1)  # (draw, timestep × entry)
    mean, error = states.mean(0), states.std(0) / num_draws**0.5
    return Numbers(states[0].tolist() + mean.tolist(), mean.tolist()[:6], error.tolist()[:6])


def exactly(compute: Callable[..., torch.Tensor]) -> Callable[..., Numbers]:
    """Numbers that do not depend on random numbers."""

    def numbers(*given: Any) -> Numbers:
        with torch.no_grad():
            values = compute(*given).double().flatten().tolist()
        return Numbers(values, values, [0.0] * len(values))

    return numbers


def curves(schedules: list[Any]) -> torch.Tensor:
    t, u = torch.arange(1, 7), torch.linspace(0.1, 0.9, 5)
    by_step = [f(t) for s in schedules for f in (s.alpha, s.alpha_bar, s.log_snr, s.signal)]
    return torch.cat(by_step + [s.log_snr_at(u) for s in schedules])


def fixed_kernels(schedule: Any, x: torch.Tensor) -> torch.Tensor:
    """Means, variances and log-densities of q's kernels, and of the prior."""
    kernels = [
        forward_transition(x, 3, schedule, event_dim=1),
        forward_marginal(x, 3, schedule, event_dim=1),
        forward_posterior(x, x.flip(0), 3, schedule, event_dim=1),
        terminal_prior(schedule, x.shape[1:], dtype=x.dtype).expand(x.shape[:1]),
    ]
    numbers = [(k.mean, k.variance, k.log_prob(x)[:, None].expand_as(x)) for k in kernels]
    return torch.stack([part for parts in numbers for part in parts])


def reverse_kernels(diffusions: list[Any], x: torch.Tensor) -> torch.Tensor:
    kernels = [d.denoiser(x, t) for d in diffusions for t in (2, 5)]
    return torch.stack([part for k in kernels for part in (k.mean, k.variance)])


# What it is computed from.


def network(size: int = SIZE, num_outputs: int = 1) -> nn.Module:
    """A small perceptron whose output, zero by default, is filled with small random numbers."""
    result = MLP((size,), hidden_size=16, num_blocks=1, num_outputs=num_outputs)
    nn.init.normal_(result.decode.weight, std=0.1)
    nn.init.normal_(result.decode.bias, std=0.1)
    return result


def curve(num_timesteps: int = 6, **settings: Any) -> Any:
    ends = {"log_snr_max": 5.0, "log_snr_min": -6.0}
    return LogSNRSchedule(num_timesteps, **ends | settings)


def neural(
    schedule: Any = None, likelihood: Any = None, transform: Any = None, **parts: Any
) -> Any:
    """A diffusion model with a network that was not trained."""
    prediction, variance = parts.get("prediction"), parts.get("variance")
    count = getattr(prediction, "num_outputs", 1) + getattr(variance, "num_outputs", 0)
    schedule = curve() if schedule is None else schedule
    denoiser = NeuralDenoiser(network(num_outputs=count), schedule, (SIZE,), **parts)
    return DiffusionModel(denoiser, likelihood, transform)


def velocity(schedule: Any = None) -> Any:
    return neural(schedule, prediction=VelocityPrediction())


class Scaled(nn.Module):
    """An exact denoiser's estimate of the datum, two per cent too large."""

    def __init__(self, exact: Any) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x_t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return 1.02 * self.exact.x_0_hat(x_t, log_snr)


def nearly_exact(num_timesteps: int = 6) -> Any:
    schedule = curve(num_timesteps)
    exact = GaussianDenoiser(
        torch.tensor([0.2, 0.0, -0.3]), torch.tensor([0.8, 1.0, 1.3]), schedule
    )
    denoiser = NeuralDenoiser(Scaled(exact), schedule, (SIZE,), prediction=DataPrediction())
    return DiffusionModel(denoiser)


def mixture() -> Any:
    means = torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.5, 0.0]])
    weights, stds = torch.tensor([0.3, 0.7]), torch.tensor([[0.3], [0.6]])
    return DiffusionModel(GaussianMixtureDenoiser(weights, means, stds, curve()))


def bits(num_timesteps: int = 6, **settings: Any) -> Any:
    schedule = curve(num_timesteps, **settings)
    return BernoulliDiffusion(NeuralBernoulliDenoiser(network(), schedule, (SIZE,)))


def enumerated() -> Any:
    return BernoulliDiffusion(EnumeratedDenoiser(torch.eye(SIZE), curve()))


def noisy_bits() -> tuple[Any, torch.Tensor]:
    """Bits with much noise at x_1: with rare flips, an error from sixteen replicates would be too small."""
    return bits(30, log_snr_max=2.0), levels(count=2)


def hierarchy(ladder: bool, likelihood: Any = None) -> Any:
    sizes, settings = (4, 2), {"hidden_size": 8}
    encoder = LadderEncoder((SIZE,), sizes, **settings) if ladder else None
    return HierarchicalVAE((SIZE,), sizes, likelihood, encoder=encoder, **settings)


def real(n: int = NUM_DATA) -> torch.Tensor:
    return 0.5 + torch.randn(n, SIZE)


def levels(n: int = NUM_DATA, count: int = NUM_LEVELS) -> torch.Tensor:
    return torch.randint(count, (n, SIZE)).to(torch.get_default_dtype())


def masked(family: Any, x_0: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model, and data of which a third is not observed; each datum has at least one observed entry."""
    mask = torch.rand(x_0.shape) < 0.67
    mask[:, 0] = True
    return family, x_0, mask


def shifted() -> tuple[Any, torch.Tensor]:
    x_0 = 3 + 2 * real()
    return neural(transform=Standardize.from_data(x_0)), x_0


def learned_curve(num_timesteps: int = 6) -> tuple[Any, torch.Tensor]:
    schedule = MonotoneSchedule(num_timesteps, log_snr_max=5.0, log_snr_min=-6.0, num_pieces=4)
    return neural(schedule), real()


def all_schedules() -> list[Any]:
    return [
        LinearSchedule(6), CosineSchedule(6), curve(), LinearDecaySchedule(6), MonotoneSchedule(6),
        VarianceExploding(curve()),
    ]  # fmt: skip


def subsampled(family: Any) -> Any:
    return family.subsampled(2)


def continuous(family: Any) -> Any:
    return family.continuous(2)


def half_way(step: int) -> Any:
    return KLWarmup(min(1.0, (step + 1) / 10))


def cases() -> dict[str, Case]:
    """Every quantity by name."""
    every = {
        "kernels of q": Case(lambda: (curve(), real()), exactly(fixed_kernels)),
        "kernels of p": Case(
            lambda: (
                [neural(), neural(variance=LearnedVariance()), nearly_exact(), mixture(), bits()],
                levels(count=2),
            ),
            exactly(reverse_kernels),
        ),
        "schedules": Case(lambda: (all_schedules(),), exactly(curves)),
    }  # fmt: skip
    plain = {
        "noise": lambda: (neural(prediction=NoisePrediction()), real()),
        "data": lambda: (neural(prediction=DataPrediction()), real()),
        "velocity": lambda: (velocity(), real()),
        "score": lambda: (neural(prediction=ScorePrediction()), real()),
        "levels": lambda: (neural(prediction=LevelPrediction(NUM_LEVELS)), levels()),
        "posterior variance": lambda: (neural(variance=PosteriorVariance()), real()),
        "learned variance": lambda: (neural(variance=LearnedVariance()), real()),
        "linear": lambda: (velocity(LinearSchedule(6)), real()),
        "cosine": lambda: (velocity(CosineSchedule(6)), real()),
        "alpha": lambda: (neural(AlphaSchedule([0.99, 0.8, 0.5, 0.2])), real()),
        "variance exploding": lambda: (neural(VarianceExploding(curve())), real()),
        "monotone": learned_curve,
        "one step": lambda: (neural(curve(1)), real()),
        "strided": lambda: (neural(curve(20)).strided(4), real()),
        "mixture": lambda: (mixture(), real()),
        "standardize": shifted,
        "standardize, mask": lambda: masked(*shifted()),
        "mask": lambda: masked(neural(), real()),
        "discretized": lambda: (neural(None, DiscretizedGaussianLikelihood(NUM_LEVELS)), levels()),
        "Gaussian": lambda: (neural(None, GaussianLikelihood(0.5)), real()),
        "Bernoulli": lambda: (neural(None, BernoulliLikelihood()), levels(count=2)),
        "Poisson": lambda: (neural(None, PoissonLikelihood(20.0)), levels()),
        "bits": lambda: (bits(), levels(count=2)),
        "bits, enumerated": lambda: (enumerated(), torch.eye(SIZE)),
        "ladder": lambda: (hierarchy(True), real()),
    }
    for name, build in plain.items():
        every[f"terms: {name}"] = Case(build, terms_of())
    for name in ("noise", "mask", "bits", "bits, enumerated", "variance exploding"):
        every[f"terms, forward guide: {name}"] = Case(plain[name], terms_of(256, "guide"))
    every |= {
        "terms: categories": Case(categories, terms_of()),
        "terms: bottom-up": Case(lambda: (hierarchy(False), real()), terms_of(256, "guide")),
        "terms: optimal variance": Case(plain["noise"], optimal_variance),
        "importance": Case(lambda: (nearly_exact(), real()), evidence(by_weights)),
        "importance, mask": Case(lambda: masked(nearly_exact(), real()), evidence(by_weights)),
        "importance, state 3": Case(
            lambda: (nearly_exact(), real()), evidence(lambda d, x: by_weights(d, x, state=3))
        ),
        "importance, bits": Case(lambda: (bits(), levels(count=2)), evidence(by_weights)),
        "sequential": Case(lambda: (nearly_exact(), real()), evidence(by_particles)),
        "sequential, neural": Case(lambda: (neural(), real()), evidence(by_particles)),
        "sequential, levels": Case(plain["levels"], evidence(by_particles)),
        "sequential, state 3": Case(
            lambda: (nearly_exact(), real()), evidence(lambda d, x: by_particles(d, x, state=3))
        ),
        "flow, exact": Case(lambda: (neural(), real()), evidence(ode_log_likelihood, 1e-4)),
        "flow, probes": Case(
            lambda: (neural(), real()),
            evidence(lambda d, x: ode_log_likelihood(d, x, num_probes=8), 1e-4),
        ),
        "flow, state 3": Case(
            lambda: (neural(), real()), evidence(lambda d, x: ode_log_likelihood(d, x, state=3), 1e-4)
        ),
        "bound by timesteps": Case(lambda: (neural(curve(50)), real()), bound(0.2)),
        "bound by paths": Case(lambda: (nearly_exact(), real()), bound(0.002)),
        "bound, continuous": Case(lambda: (neural(), real()), bound(0.2, math.inf)),
        "bound, another T": Case(shifted, bound(0.2, 30)),
        "bound, bits": Case(noisy_bits, by_other_seeds(bound(0.02))),
        "bound, bits, continuous": Case(noisy_bits, by_other_seeds(bound(0.02, math.inf))),
        "bound by datum": Case(lambda: (neural(), real()), by_datum),
        "summary": Case(lambda: (nearly_exact(), real(4)), summarised),
        "ArviZ": Case(lambda: (neural(), real(4)), posterior_means),
    }  # fmt: skip
    samplers = {
        "program": lambda d, n: d.sample(n),
        "ancestral": lambda d, n: AncestralSampler(d)(n),
        "ancestral, 3 steps": lambda d, n: AncestralSampler(d, 3)(n),
        "DDIM, η = 0": lambda d, n: DDIMSampler(d)(n),
        "DDIM, η = 1": lambda d, n: DDIMSampler(d, eta=1.0)(n),
        "ODE, η = 0": lambda d, n: ODESampler(d)(n),
        "ODE, η = 1": lambda d, n: ODESampler(d, eta=1.0)(n),
    }
    for name, draw in samplers.items():
        every[f"samples: {name}"] = Case(lambda: (neural(),), moments(draw))
    every |= {
        "samples: bits": Case(lambda: (bits(),), moments(lambda d, n: AncestralSampler(d)(n))),
        "samples: levels": Case(plain["levels"], moments(lambda d, n: AncestralSampler(d)(n))),
        "samples: mixture": Case(plain["mixture"], moments(lambda d, n: DDIMSampler(d)(n))),
        "samples: exploding": Case(
            plain["variance exploding"], moments(lambda d, n: ODESampler(d, eta=0.5)(n))
        ),
        "samples: ladder": Case(plain["ladder"], moments(lambda d, n: d.sample(n))),
    }
    stock, in_order = (lambda _: Trace_ELBO()), "posterior_guide"
    every |= {
        "losses: forward guide": Case(plain["noise"], losses(elbo=stock)),
        "losses: posterior guide": Case(plain["noise"], losses(guide=in_order)),
        "losses: subsampled": Case(plain["noise"], losses(subsampled)),
        "losses: subsampled, Trace_ELBO": Case(plain["noise"], losses(subsampled, stock)),
        "losses: uniform timesteps": Case(
            plain["noise"], losses(lambda f: f.subsampled(2, timesteps=UniformTimesteps()))
        ),
        "losses: importance timesteps": Case(plain["noise"], by_importance),
        "losses: continuous": Case(plain["noise"], losses(continuous)),
        "losses: standardize": Case(shifted, losses(subsampled)),
        "losses: mask": Case(plain["mask"], losses(elbo=stock)),
        "losses: mask, posterior guide": Case(plain["mask"], losses(guide=in_order)),
        "losses: mask, subsampled": Case(plain["mask"], losses(subsampled)),
        "losses: mask, continuous": Case(plain["standardize, mask"], losses(continuous)),
        "losses: bits": Case(plain["bits"], losses(guide=in_order)),
        "losses: bits, subsampled": Case(plain["bits"], losses(subsampled)),
        "losses: bits, continuous": Case(plain["bits"], losses(continuous)),
        "losses: bottom-up": Case(lambda: (hierarchy(False), real()), losses(elbo=stock)),
        "losses: ladder": Case(plain["ladder"], losses()),
        "losses: ladder, warm-up": Case(plain["ladder"], losses(around=half_way)),
        "losses: ladder, free bits": Case(plain["ladder"], losses(elbo=lambda _: FreeBitsELBO(0.5))),
        "losses: levels": Case(plain["levels"], losses(subsampled)),
        "losses: discretized": Case(
            lambda: (neural(None, DiscretizedGaussianLikelihood(NUM_LEVELS, learnable=True)), levels()),
            losses(subsampled),
        ),
        "losses: learned ends": Case(lambda: (neural(curve(learnable=True)), real()), losses(elbo=stock)),
        "losses: learned ends, subsampled": Case(
            lambda: (neural(curve(learnable=True)), real()), losses(subsampled)
        ),
        "losses: learned variance": Case(plain["learned variance"], losses(subsampled)),
        "losses: least variance": Case(
            learned_curve, losses(continuous, lambda f: MinimumVarianceELBO([f.schedule.interior]))
        ),
        "losses: compiled": Case(plain["noise"], compiled(subsampled), losses(subsampled)),
        "losses: compiled, continuous": Case(
            plain["learned variance"], compiled(continuous), losses(continuous)
        ),
        "losses: compiled, bits": Case(plain["bits"], compiled(subsampled), losses(subsampled)),
    }  # fmt: skip
    return every


def categories() -> tuple[Any, torch.Tensor]:
    shape = (SIZE, 4)
    flat = MLP(shape, hidden_size=16, num_blocks=1)
    nn.init.normal_(flat.decode.weight, std=0.1)
    denoiser = NeuralDenoiser(flat, curve(), shape)
    return DiffusionModel(denoiser, CategoricalLikelihood(4)), levels(count=4)


# Running and comparing.


def main() -> None:
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    start, quantities, failures = time.perf_counter(), {}, 0
    reference = None
    if args.reference is not None:
        reference = json.loads(args.reference.read_text())["quantities"]
    print(HEADS[reference is not None])
    for name, case in cases().items():
        began = time.perf_counter()
        try:
            quantities[name] = measure(case, args)
        except Exception as error:
            if reference is None:
                raise
            traceback.print_exc(file=sys.stderr)
            quantities[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        quantities[name]["seconds"] = round(time.perf_counter() - began, 3)
        if reference is None:
            print(markdown(name, quantities[name]), flush=True)
        else:
            line, verdict = compare(name, quantities[name], reference.get(name))
            failures += verdict == "DIFFERENT"
            print(line, flush=True)
    if reference is not None:
        print(f"\n{failures} of {len(quantities)} quantities are DIFFERENT")
    write(quantities, time.perf_counter() - start, args)
    sys.exit(1 if failures else 0)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a quantity; errors that it does not report itself are measured from other seeds."""
    numbers = run(case, args.seed)
    errors = numbers.errors
    if errors is None and args.num_repeats:
        again = case if case.again is None else case._replace(compute=case.again)
        others = [run(again, args.seed + 1000 + i).summary for i in range(args.num_repeats)]
        errors = [STUDENT * statistics.stdev(column) for column in zip(*others, strict=True)]
    return {
        "values": numbers.values,
        "summary": numbers.summary,
        "errors": errors,
        "note": numbers.note,
    }


def run(case: Case, seed: int) -> Numbers:
    pyro.clear_param_store()
    pyro.set_rng_seed(BUILD_SEED)
    built = case.build()
    pyro.set_rng_seed(seed)
    return case.compute(*built)


HEADS = {
    False: "| quantity | values | first of the summary | its error | note | seconds |\n"
    "|---|---|---|---|---|---|",
    True: "| quantity | largest difference | in errors | verdict | seconds |\n|---|---|---|---|---|",
}


def markdown(name: str, q: dict[str, Any]) -> str:
    error = "" if q["errors"] is None else f"{q['errors'][0]:.2g}"
    return (
        f"| {name} | {len(q['values'])} | {q['summary'][0]:.6g} | {error} | {q['note']} | "
        f"{q['seconds']:.2f} |"
    )


def compare(name: str, new: dict[str, Any], old: dict[str, Any] | None) -> tuple[str, str]:
    """A line of the table, and the verdict."""
    seconds, difference, in_errors, words = f"{new['seconds']:.2f}", math.nan, math.nan, ""
    if "failed" in new:
        verdict, words = "DIFFERENT", new["failed"].replace("|", "/")
    elif old is None:
        verdict, words = "new", "not in the reference"
    else:
        difference, in_rounding = distance(new["values"], old["values"])
        in_errors = most_errors(new, old)
        if in_rounding <= ROUNDING:
            verdict = "same"
        else:
            verdict = "within 3 errors" if in_errors <= NUM_ERRORS else "DIFFERENT"
        if new["note"] != old["note"]:
            words = f"was “{old['note']}”, is “{new['note']}”"
    line = f"| {name} | {difference:.2g} | {in_errors:.2g} | {verdict}{words and ': '}{words} | {seconds} |"
    return line, verdict


def distance(new: list[float], old: list[float]) -> tuple[float, float]:
    """Largest difference, and the largest relative to max(1, \\|value\\|); NaN is equal to NaN."""
    if len(new) != len(old):
        return math.inf, math.inf
    pairs = [(a, b) for a, b in zip(new, old, strict=True) if not both_alike(a, b)]
    gaps = [math.inf if not math.isfinite(a - b) else abs(a - b) for a, b in pairs]
    scaled = [gap / max(1.0, abs(b)) for gap, (_, b) in zip(gaps, pairs, strict=True)]
    return max(gaps, default=0.0), max(scaled, default=0.0)


def both_alike(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def most_errors(new: dict[str, Any], old: dict[str, Any]) -> float:
    """Largest difference of the summaries in joint errors; without an error, zero or infinity."""
    if len(new["summary"]) != len(old["summary"]) or old["errors"] is None:
        return math.inf
    theirs = old["errors"]
    ours = theirs if new["errors"] is None else new["errors"]
    worst = 0.0
    for a, b, p, q in zip(new["summary"], old["summary"], ours, theirs, strict=True):
        if both_alike(a, b) or abs(a - b) <= ROUNDING * max(1.0, abs(b)):
            continue
        error = math.hypot(p, q)
        worst = max(worst, abs(a - b) / error if error > 0 and math.isfinite(a) else math.inf)
    return worst


def commit() -> str:
    """The last commit that changed the package, if it is in a repository."""
    folder = Path(pyro_diffusion.__file__).parent
    done = subprocess.run(
        ["git", "-C", str(folder), "log", "-1", "--format=%h", "--", "."],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


def write(quantities: dict[str, Any], seconds: float, args: argparse.Namespace) -> None:
    numbers = {
        "commit": commit(),
        "seconds": round(seconds, 1),
        "num_repeats": args.num_repeats,
        "seed": args.seed,
        "smoke": args.smoke,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
        "quantities": quantities,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".parity.json.part"
    aside.write_text(json.dumps(numbers) + "\n")
    os.replace(aside, args.output / "parity.json")
    print(f"\nwrote {args.output / 'parity.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="without the other seeds")
    parser.add_argument("--reference", type=Path, help="a parity.json to compare with")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_repeats = 0 if args.smoke or args.reference else NUM_REPEATS
    return args


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
