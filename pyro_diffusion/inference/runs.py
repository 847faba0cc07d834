"""Independent runs of particles for all data, in chunks that fit into memory, and their joint result."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.checks import check_count
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence.evidence import log_mean
from pyro_diffusion.given import Given, repeated, together
from pyro_diffusion.inference.conjugate import Noise, as_gaussians
from pyro_diffusion.inference.covariance import Covariances
from pyro_diffusion.inference.draws import FEW, PosteriorSamples, drawn
from pyro_diffusion.inference.iterative import MANY, ManyRows
from pyro_diffusion.inference.targets import Target
from pyro_diffusion.inference.twisted import Path, Run
from pyro_diffusion.reading import BUDGET, footprint, rows_within
from pyro_diffusion.walk import ROWS, ReverseWalk

__all__ = ["Runs"]


class Runs:
    """Runs of particles for all data, in chunks that fit into the budget of memory.

    Args:
        diffusion: The model.
        target: The likelihood, bound to the model.
        num_samples: Draws of each posterior; with a single particle a run, also the number of runs.
        num_particles: Particles of a run.
        num_runs: Independent runs.
        given: What goes with the data, ``N`` rows.
        exponents: The power of the likelihood by timestep, ``(T + 1,)``.
        common_noise: Whether all data share their random numbers.
        progress: Show a progress bar.

    Raises:
        ValueError: Numbers below one.
    """

    def __init__(
        self,
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
    ) -> None:
        self.samples = check_count("num_samples", num_samples, 1, "Pass the number of draws.")
        remedy = "Leave it out, or pass 1024, say."
        self.particles = check_count("num_particles", num_particles, 1, remedy)
        remedy = "Leave it out: 16 runs have a spread."
        self.runs = check_count("num_runs", num_runs, 1, remedy)
        self.biased = self.particles == 1
        self.runs = self.samples if self.biased else self.runs
        self.diffusion, self.target, self.given = diffusion, target, given
        self.exponents, self.common, self.progress = exponents, common_noise, progress
        self.columns = 1
        self.has_many = self._has_many()
        exact = diffusion.denoiser.is_exact
        self.covariances: Covariances | None = None
        if target.has_rows and (self.has_many or not exact):
            found = Covariances.of_draws(diffusion, given, target.num_data)
            self.covariances = found.exactly() if exact else found

    def posterior(self, *, single: bool) -> PosteriorSamples:
        """The posteriors of all data; ``single`` leaves out their axis."""
        result = _joined(self.all(), self.target, self.samples, self.biased)
        result = _squeezed(result) if single else result
        _warn_of_few(result, self.target)
        return result

    def all(self) -> Run:
        """All runs of all data; ``M`` columns have become axes of ``R`` runs and ``N`` data."""
        columns = self._columns()
        data = max(1, columns // self.runs) if self.target.is_divisible else self.target.num_data
        data = min(data, self.target.num_data)
        runs = max(1, min(self.runs, columns // data))
        self.columns = runs * data
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
                    lambda: self._run(few, slice(0, few.num_data), count // few.num_data, bar, True)
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
        self, target: Target, rows: slice, runs: int, bar: Any, rehearsal: bool = False
    ) -> Run:
        shape = (self.particles, runs * target.num_data)
        _, given = together(
            lambda x: repeated(x[rows], runs), torch.empty(self.target.num_data), self.given
        )
        columns = max(self.columns, shape[1])
        walk = ReverseWalk(self.diffusion, rows=max(ROWS, columns), given=given)
        noise = Noise(target.num_data, common=self.common)
        kind = ManyRows if self.has_many else Path
        path = kind(walk, target, shape, self.exponents, noise, self.covariances)
        path.columns = columns  # slices of a small chunk are those of a large one, for common noise
        return path.run(bar, rehearsal=rehearsal)

    def _has_many(self) -> bool:
        """Whether a system is solved for the measured numbers; kernels must have independent entries."""
        target = self.target
        held = 8 * self.particles * target.num_rows * self.diffusion.event_shape.numel()
        few = target.num_rows <= MANY and held <= BUDGET / 4
        if not target.has_rows or few or not target.has_basis:
            return False
        _, first = together(lambda x: x[:1], torch.empty(target.num_data), self.given)
        walk = ReverseWalk(self.diffusion, given=first)
        x_t, t = walk.start().sample((1, 1)), walk.timesteps[0]
        kernel = as_gaussians(walk.kernel(x_t, t, walk.look(x_t, t)), x_t.shape[:2])
        return kernel is not None and kernel.diagonal and kernel.means.shape[-2] == 1


@contextmanager
def _same_numbers(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _catted(parts: list[Run], dims: tuple[int, ...]) -> Run:
    return Run(*(torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), dims, strict=True)))


def _joined(runs: Run, target: Target, num_samples: int, biased: bool) -> PosteriorSamples:
    """The particles of all runs with common weights, and the numbers that they give."""
    count = len(runs.log_z)
    dead = int((runs.log_z.amax(0) == -math.inf).sum())
    if dead and not biased:
        raise ValueError(
            f"argument {target.argument!r}: got -inf for every particle of every run, for {dead} "
            "posterior(s); expected a datum of positive likelihood among the particles. Take more particles"
            f"{target.remedy}."
        )
    log_evidence = log_mean(runs.log_z)
    relative = (runs.log_z - log_evidence).exp()
    share = (runs.log_z - runs.log_z.logsumexp(0)).unsqueeze(1)
    log_weights = (runs.log_weight.log_softmax(1) + share).nan_to_num(
        nan=-math.inf, neginf=-math.inf
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


def _warn_of_few(result: PosteriorSamples, target: Target) -> None:
    """Warn of fewer than ten effective particles."""
    few = result.ess_by_timestep < FEW
    if not result.is_biased and few.any():
        least = result.ess_by_timestep.min().item()
        steps = few.reshape(len(few), -1).any(1).nonzero().flatten() + 1
        posteriors = int(few.any(0).sum())
        warnings.warn(
            f"argument {target.argument!r}: got {least:.1f} effective particles of a run at t = "
            f"{int(steps[0])} … {int(steps[-1])}, for {posteriors} posterior(s); expected at least ten, "
            "below which draws and evidence are not reliable. Take more particles or more timesteps"
            f"{target.remedy}.",
            stacklevel=4,
        )
