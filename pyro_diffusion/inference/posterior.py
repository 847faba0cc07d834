r"""Draws of :math:`p(x_0)` times a likelihood, with the evidence, by independent runs of particles (E17)."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from pyro_diffusion.checks import as_numbers, check_count, check_values, described, require
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.evidence.evidence import log_mean
from pyro_diffusion.given import Given, repeated, together
from pyro_diffusion.inference.conjugate import Noise
from pyro_diffusion.inference.draws import PosteriorSamples, drawn
from pyro_diffusion.inference.measurements import LinearGaussian
from pyro_diffusion.inference.targets import Function, Linear, Target
from pyro_diffusion.inference.twisted import Run, run
from pyro_diffusion.reading import BUDGET, footprint, reading, rows_within
from pyro_diffusion.walk import ROWS, ReverseWalk, check_weights

__all__ = ["draw_posterior", "posterior_samples"]


def posterior_samples(
    diffusion: DiffusionModel,
    log_likelihood: Callable[[Tensor], Tensor] | LinearGaussian,
    num_samples: int,
    *,
    num_particles: int = 256,
    num_runs: int = 16,
    context: Any = None,
    tempering: Sequence[float] | Tensor | None = None,
    directions: int = 1,
    common_noise: bool = False,
    progress: bool = True,
) -> PosteriorSamples:
    r"""Draw from :math:`p(x_0 \mid y) \propto p_\theta(x_0)\, r(x_0)` by twisted sequential Monte Carlo.

    .. math::
        \log Z = \log \int p_\theta(x_0)\, r(x_0)\, dx_0, \qquad
        \log Z = \log p(y) \text{ for } r(x_0) = p(y \mid x_0) .

    Particles go from :math:`x_T` to :math:`x_0`. They are weighted and resampled by :math:`\psi_t(x_t)`, what
    the likelihood is expected to be at :math:`x_t`. :math:`\hat Z` is unbiased for every model;
    :math:`\log \hat Z` is low in expectation, by half its variance to first order. What :math:`\psi_t` knows
    decides how few particles suffice:

    - :class:`~pyro_diffusion.inference.LinearGaussian` measurements of real numbers, or of levels: the
      Gaussian closed form with the covariance :math:`\operatorname{Cov}[x_0 \mid x_t]`, for one
      vector-Jacobian product of the network a measured number.
    - A function of real numbers: the same for its expansion to second order along its gradient at
      :math:`\hat x_0(x_t)`, and further ``directions`` if asked for.
    - A function of levels, counts, categories or bits: the mean of :math:`\log r` over 8 draws of independent
      entries of :math:`x_0` given :math:`x_t`; the reverse kernels are the proposals.

    Args:
        diffusion: The model. Its parameters are read.
        log_likelihood: :math:`\log r`, a :class:`~pyro_diffusion.inference.LinearGaussian` or a function that
            maps data in the user's units, ``batch + event_shape``, to nats, ``batch``. If it holds ``N``
            observations it broadcasts: data of ``(K, 1) + event_shape`` give ``(K, N)``, and data of
            ``(K, N) + event_shape`` one number for each pair. Then there are ``N`` posteriors.
        num_samples: Number of draws, resampled from the particles of all runs by weight.
        num_particles: Particles :math:`K` of a run. With 1 nothing is corrected: the draws are those of
            guidance, one a run and ``num_samples`` runs, and the result calls itself biased.
        num_runs: Independent runs; their spread gives the errors. Two are enough for an error, 16 for one
            that is known itself.
        context: Context of conditional data: one row for all posteriors, or a row for each.
        tempering: Exponents of the likelihood by timestep, ``T`` numbers in (0, 1], entry ``t − 1`` for
            :math:`\psi_t`; small ones at large ``t`` keep a sharp likelihood from deciding too early.
            The last weight is exact in any case.
        directions: Number of directions of the expansion of a function: the gradient, and the Krylov
            directions of its Hessian. Each costs a vector-Jacobian product of the network a step.
        common_noise: Whether all posteriors share their random numbers, so that differences of their evidence
            have small errors. Draws of levels, counts, categories and bits do not share them.
        progress: Show a progress bar if it takes more than five seconds.

    Returns:
        :class:`~pyro_diffusion.inference.PosteriorSamples`, with an axis of ``N`` after the draws if there
        are several observations or rows of context. A run takes :math:`K T` network rows a posterior, and as
        many vector-Jacobian products for each row of the expansion.

    Raises:
        ValueError: A log-likelihood that is NaN, flat, without a gradient, of another shape, or impossible
            for every particle; numbers below one; exponents outside (0, 1]; a context that does not fit.

    Warns:
        UserWarning: Fewer than ten effective particles at some timestep, for some posterior.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(1), torch.ones(1), LogSNRSchedule(20))
        >>> measured = LinearGaussian(torch.ones(1, 1), y=torch.ones(1), noise=1.0)
        >>> draws = posterior_samples(DiffusionModel(denoiser), measured, 100, num_particles=50)
        >>> draws.log_evidence  # N(1; 0, 2)
        tensor(-1.5155, dtype=torch.float64)

    References:
        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023).
        https://arxiv.org/abs/2306.17775
        Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024).
        https://arxiv.org/abs/2310.06721
    """
    diffusion = check_weights(check_diffusion(diffusion))
    directions = check_count("directions", directions, 1, "One is the gradient.")
    given = Given.of(context=context)
    with reading(diffusion, data=given):
        target = _target(diffusion, log_likelihood, directions)
        rows = _rows(given, target.num_data)
        return draw_posterior(
            diffusion,
            target.expanded(rows),
            num_samples,
            num_particles=num_particles,
            num_runs=num_runs,
            given=given.with_rows(rows, shared=True, device=diffusion.device),
            exponents=_exponents(diffusion, tempering),
            common_noise=common_noise,
            progress=progress,
            single=rows == 1,
        )


def draw_posterior(
    diffusion: DiffusionModel,
    target: Target,
    num_samples: int,
    *,
    num_particles: int,
    num_runs: int,
    given: Given,
    exponents: Tensor,
    common_noise: bool,
    progress: bool,
    single: bool,
) -> PosteriorSamples:
    """Runs of particles for a bound target, put together; ``single`` leaves out the axis of posteriors."""
    num_samples = check_count("num_samples", num_samples, 1, "Pass the number of draws.")
    num_particles = check_count(
        "num_particles", num_particles, 1, "Leave it out, or pass 1024, say."
    )
    num_runs = check_count("num_runs", num_runs, 1, "Leave it out: 16 runs have a spread.")
    biased = num_particles == 1
    num_runs = num_samples if biased else num_runs
    runs = _Runs(
        diffusion, target, num_particles, num_runs, given, exponents, common_noise, progress
    )
    result = _joined(runs.all(), num_samples, biased)
    if single:
        result = _squeezed(result)
    _warn_of_few(result)
    return result


class _Runs:
    """Runs of particles for all data, in chunks that fit into the budget of memory."""

    def __init__(
        self,
        diffusion: DiffusionModel,
        target: Target,
        num_particles: int,
        num_runs: int,
        given: Given,
        exponents: Tensor,
        common_noise: bool,
        progress: bool,
    ) -> None:
        self.diffusion, self.target, self.given, self.exponents = (
            diffusion,
            target,
            given,
            exponents,
        )
        self.particles, self.runs, self.common, self.progress = (
            num_particles, num_runs, common_noise, progress,
        )  # fmt: skip

    def all(self) -> Run:
        """All runs of all data; ``M`` columns have become axes of ``R`` runs and ``N`` data."""
        columns = self._columns()
        data = max(1, columns // self.runs) if self.target.is_divisible else self.target.num_data
        runs = max(1, min(self.runs, columns // data))
        length = self.diffusion.schedule.num_timesteps
        chunks = math.ceil(self.target.num_data / data) * math.ceil(self.runs / runs)
        seed = int(torch.randint(2**62, ()))
        parts = []
        with tqdm(
            total=chunks * length, desc="posterior", unit="step", delay=5,
            disable=not self.progress, leave=False,
        ) as bar:  # fmt: skip
            for start in range(0, self.target.num_data, data):
                rows = slice(start, start + data)
                with self._seeded(seed):
                    of_rows = [
                        self._chunk(rows, min(runs, self.runs - done), bar)
                        for done in range(0, self.runs, runs)
                    ]
                parts.append(_catted(of_rows, (0, 0, 0, 1, 0)))
        return _catted(parts, (2, 2, 1, 2, 1))

    def _seeded(self, seed: int) -> Any:
        """Random numbers that begin anew for each chunk of data, if data share them."""
        return _same_numbers(seed, self.diffusion.device) if self.common else nullcontext()

    def _columns(self) -> int:
        """Columns of particles (runs times data) at a time."""
        target = self.target
        most = self.runs * target.num_data

        def cost(count: int) -> float:
            """Bytes of two steps with so many columns."""
            few = target if not target.is_divisible else target.part(slice(0, 1))
            count = math.ceil(count / few.num_data) * few.num_data
            with tqdm(disable=True) as bar:
                return footprint(
                    lambda: self._run(few, slice(0, few.num_data), count // few.num_data, bar, 2)
                ).peak

        return rows_within(cost, most, BUDGET / 2)

    def _chunk(self, rows: slice, runs: int, bar: Any) -> Run:
        """Some runs of some data, with runs and data on axes of their own."""
        target = self.target.part(rows) if self.target.is_divisible else self.target
        found = self._run(target, rows, runs, bar)
        apart = [
            x.unflatten(dim, (runs, target.num_data))
            for x, dim in zip(found, (1, 1, 0, 1, 0), strict=True)
        ]
        x_0, log_weight, *others = apart
        return Run(x_0.transpose(0, 1), log_weight.transpose(0, 1), *others)

    def _run(
        self, target: Target, rows: slice, runs: int, bar: Any, steps: int | None = None
    ) -> Run:
        columns = runs * target.num_data
        _, given = together(
            lambda x: repeated(x[rows], runs), torch.empty(self.target.num_data), self.given
        )
        walk = ReverseWalk(self.diffusion, rows=max(ROWS, columns), given=given)
        noise = Noise(target.num_data, common=self.common)
        return run(walk, target, self.particles, columns, self.exponents, noise, bar, steps=steps)


@contextmanager
def _same_numbers(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _catted(parts: list[Run], dims: tuple[int, ...]) -> Run:
    return Run(*(torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), dims, strict=True)))


def _joined(runs: Run, num_samples: int, biased: bool) -> PosteriorSamples:
    """The particles of all runs with common weights, and the numbers that they give."""
    count = len(runs.log_z)
    log_evidence = log_mean(runs.log_z)
    relative = (runs.log_z - log_evidence).exp()
    log_weights = runs.log_weight.log_softmax(1) + (runs.log_z - runs.log_z.logsumexp(0)).unsqueeze(
        1
    )
    if biased:
        log_weights = torch.full_like(log_weights, -math.log(count))
    nan = torch.full_like(log_evidence, math.nan)
    flat = log_weights.flatten(0, 1)
    ess = runs.ess.mean(1)
    return PosteriorSamples(
        samples=drawn(runs.x_0, log_weights, num_samples),
        log_evidence=nan if biased else log_evidence,
        standard_error=(relative.var(0) / count).sqrt() if count > 1 and not biased else nan,
        ess=nan if biased else 1 / flat.exp().square().sum(0),
        ess_by_timestep=torch.full_like(ess, math.nan) if biased else ess,
        pareto_k=nan if biased else runs.k.amax(0),
        particles=runs.x_0,
        log_weights=log_weights,
        is_biased=biased,
    )


def _squeezed(result: PosteriorSamples) -> PosteriorSamples:
    """The result of a single posterior, without the axis of posteriors."""
    return PosteriorSamples(
        samples=result.samples[:, 0],
        log_evidence=result.log_evidence[0],
        standard_error=result.standard_error[0],
        ess=result.ess[0],
        ess_by_timestep=result.ess_by_timestep[:, 0],
        pareto_k=result.pareto_k[0],
        particles=result.particles[:, :, 0],
        log_weights=result.log_weights[:, :, 0],
        is_biased=result.is_biased,
    )


def _warn_of_few(result: PosteriorSamples) -> None:
    """Warn of fewer than ten effective particles."""
    few = result.ess_by_timestep < 10
    if not result.is_biased and few.any():
        least = result.ess_by_timestep.min().item()
        steps = few.reshape(len(few), -1).any(1).nonzero().flatten() + 1
        posteriors = int(few.any(0).sum())
        warnings.warn(
            f"argument 'log_likelihood': got {least:.1f} effective particles of a run at t = "
            f"{int(steps[0])} … {int(steps[-1])}, for {posteriors} posterior(s); expected at least ten, "
            "below which draws and evidence are not reliable. Take more particles or more timesteps, or temper a "
            "sharp likelihood: tempering=torch.linspace(1, 0.1, T).",
            stacklevel=4,
        )


def _target(diffusion: DiffusionModel, log_likelihood: Any, directions: int) -> Target:
    if isinstance(log_likelihood, LinearGaussian):
        diffusion.process.check_has_score("log_likelihood", "Pass a function of the datum.")
        return Linear(diffusion, log_likelihood)
    require(
        callable(log_likelihood),
        "argument 'log_likelihood'",
        described(log_likelihood),
        "a function of x_0, or a LinearGaussian",
        "Pass lambda x_0: Normal(A(x_0), 0.1).log_prob(y).sum(-1), say.",
    )
    return Function(diffusion, log_likelihood, directions)


def _rows(given: Given, num_data: int) -> int:
    """The number of posteriors: of observations, or of rows of a context."""
    if given.context is None:
        return num_data
    leaves = [x for x in tree_leaves(given.context) if isinstance(x, Tensor) and x.dim()]
    rows = max([len(x) for x in leaves], default=1)
    return rows if num_data == 1 else num_data


def _exponents(diffusion: DiffusionModel, tempering: Any) -> Tensor:
    """The power of the likelihood by timestep, ``(T + 1,)``."""
    length = diffusion.schedule.num_timesteps
    if tempering is None:
        return torch.ones(length + 1, dtype=torch.float64)
    exponents = as_numbers("tempering", tempering).double().cpu()
    require(
        exponents.shape == (length,),
        "argument 'tempering'",
        described(exponents),
        f"a number for each of {length} timesteps",
        "Pass torch.linspace(1, 0.1, T).",
    )
    valid = (exponents > 0) & (exponents <= 1)
    check_values(
        "argument 'tempering'", exponents, valid, "exponents in (0, 1]", "One is no tempering."
    )
    return torch.cat((torch.ones(1, dtype=torch.float64), exponents))
