r"""Sequential Monte Carlo along the reverse chain: evidence where the weights of whole paths are too uneven.

The importance weight of a trajectory is a product over the chain. Sequential Monte Carlo resamples its
particles on the way from :math:`x_T` to :math:`x_0`, so that there are more of them where weights are large.
Resampling by the weights so far would fail: a small weight in one step is followed by large weights in the
next ones, and the best particles would be removed. The intermediate targets therefore look ahead,

.. math::
    \pi_t(x_{t:T}) &\propto p(x_{t:T})\, \psi_t(x_t), \qquad
    \log \psi_t(x_t) = -c_t \cdot f_t(x_t) \approx \log p(x_0 \mid x_t) + \text{const}, \\
    f_t(x_t) &= \Big( \sum_i \frac{(x_{0,i} - \hat x_{0,i}(x_t))^2}{v_{t,i}},\;
        \frac{\lVert x_t - a_t x_0 \rVert^2}{\sigma_t^2},\;
        \frac{\lVert x_t \rVert^2}{a_t^2 + \sigma_t^2} \Big),

with :math:`v_t` the variance of :math:`x_0` given :math:`x_t` that the kernel's own variance implies. The
strengths :math:`c_t` are fitted by least squares, for each datum and timestep, to the weights that the rest
of the path had in a pilot run. For an exact denoiser of Gaussian data they are one half, zero and zero, and
all weights are constant. The second and the third feature correct for errors of a denoiser in the noise and
in the size of a state. The pilot run is independent of the other runs, so that :math:`\hat Z` is unbiased
for every :math:`\psi`; :math:`\log \hat Z` is low in expectation, by half its variance to first order.

References:
    Sequential Monte Carlo Samplers (Del Moral et al., 2006). https://doi.org/10.1111/j.1467-9868.2006.00553.x
    Twisted Particle Filters (Whiteley and Lee, 2014). https://arxiv.org/abs/1210.0220
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.checks import check_count, check_data, check_state
from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence.evidence import (
    Evidence,
    at_the_end,
    check_whole,
    effective,
    fingerprint,
    log_mean,
    rows_to_keep,
    tail_of,
)
from pyro_diffusion.given import Given, as_real, chunks, first_repeated
from pyro_diffusion.processes.gaussian import chain_step, posterior_variance
from pyro_diffusion.reading import BUDGET, footprint, reading, refuse_gradients, rows_within
from pyro_diffusion.scoring import log_density, measure_of, score
from pyro_diffusion.walk import ROWS, ReverseWalk, Walked, diffusion_of, in_slices, taken

_KEPT = (
    128  # bytes of a particle at a timestep: features and weights, and the copies that a fit makes
)


@overload
def smc_evidence(
    diffusion: Walked, /, x_0: Tensor, *, num_particles: int, state: int = ...,
    num_runs: int = ..., num_pilot: int = ..., progress: bool = ..., **given: Any,
) -> Evidence: ...  # fmt: skip


@overload
def smc_evidence(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *, num_particles: int,
    state: int = ..., num_runs: int = ..., num_pilot: int = ..., progress: bool = ...,
    **given: Any,
) -> Evidence: ...  # fmt: skip


def smc_evidence(  # type: ignore[misc]
    diffusion: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    num_particles: int,
    state: int = 0,
    num_runs: int = 4,
    num_pilot: int = 128,
    progress: bool = True,
    **given: Any,
) -> Evidence:
    r"""Sequential Monte Carlo: :math:`\log \hat p(x_0)` with a look-ahead through :math:`\hat x_0`.

    A datum whose whole paths have even weights in the pilot run is not resampled, and its estimate is an
    importance average. Resampling is systematic, and is done where the effective sample size falls below
    half of the particles.

    Args:
        diffusion: The model, with any schedule, prediction and likelihood; or its program
            ``diffusion.model``.
        guide: The program ``diffusion.guide`` if the first argument is ``diffusion.model``; else left out.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Particles :math:`K` for each datum and run.
        state: 0 if ``x_0`` are data; the timestep ``t`` if they are states, for :math:`\log p(x_t)`.
        num_runs: Independent runs, at least 2; their spread gives the standard error.
        num_pilot: Particles of the pilot run, at least 25.
        progress: Show a progress bar if it takes more than five seconds.
        given: What goes with the data: ``mask=``, true where an entry is observed, for the evidence of the
            observed part; ``context=``.

    Returns:
        :class:`~pyro_diffusion.evidence.Evidence`: the logarithm of the mean of :math:`\hat Z` over runs.
        ``ess_by_timestep`` has, in row ``t − 1``, the effective sample size of the particles at
        :math:`x_t` before resampling, the mean over runs. ``ess`` is the smallest of these values and of the
        value at the end (for a datum that is not resampled, the value at the end alone). ``pareto_k`` is the
        largest :math:`\hat k` of weights that were averaged, at a resampling or at the end. ``reliable``
        shows which estimates can be trusted. A run takes :math:`K T` network rows a datum.

    Raises:
        ValueError: Fewer particles, runs or pilot particles than the smallest numbers above; a state outside
            ``0 … T``, or one with a mask; a model of bits, or a state under a schedule with a curve for each
            entry; data that require a gradient, or that the programs do not take.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> smc_evidence(DiffusionModel(denoiser), torch.zeros(3, 2), num_particles=10).log_evidence
        tensor([-1.8379, -1.8379, -1.8379], dtype=torch.float64)
    """
    counts = _Counts.of(num_particles, num_runs, num_pilot)
    diffusion, x_0 = diffusion_of(diffusion, guide, x_0)
    state = check_state(state, diffusion.schedule.num_timesteps)
    diffusion.process.check_has_score("diffusion", "Use importance_evidence.")
    what = Given.of(**given)
    check_whole(state, what)
    refuse_gradients((x_0, what))
    raw, x_0 = x_0, check_data(x_0, what.mask)
    what = what.with_rows(len(x_0), device=x_0.device)
    if state == diffusion.schedule.num_timesteps:
        return at_the_end(diffusion.prior(), x_0, counts.particles)
    with reading(diffusion):
        parts = _parts(diffusion, state, x_0, what, counts, progress)
    *joined, measures = zip(*parts, strict=True)
    log_z, ess, k, least_ess = (torch.cat(x, dim=-1) for x in joined)
    mean = log_mean(log_z)
    return Evidence(
        log_evidence=mean,
        standard_error=((log_z - mean).exp().var(0) / counts.runs).sqrt(),
        ess=least_ess,
        pareto_k=k,
        ess_by_timestep=ess,
        estimator="sequential Monte Carlo",
        num_particles=counts.particles,
        data=fingerprint(raw, what.mask),
        measure=measures[-1],
    )


class _Counts(NamedTuple):
    particles: int
    runs: int
    pilot: int

    @classmethod
    def of(cls, num_particles: Any, num_runs: Any, num_pilot: Any) -> "_Counts":
        """The counts, if there are enough of each."""
        return cls(
            check_count("num_particles", num_particles, 2, "Pass num_particles=1024, say."),
            check_count(
                "num_runs", num_runs, 2, "Leave it out: the default of four runs has a spread."
            ),
            check_count("num_pilot", num_pilot, 25, "Leave it out."),
        )


def _parts(
    diffusion: DiffusionModel,
    state: int,
    x_0: Tensor,
    given: Given,
    counts: _Counts,
    progress: bool,
) -> list[Any]:
    """Results of the runs for all data, in chunks that fit into the budget of memory."""
    rows = ReverseWalk(diffusion, state, given=given).rows_within(x_0)
    walk, num_data = ReverseWalk(diffusion, state, rows=rows), len(x_0)
    size = _data_at_a_time(walk, x_0, given, counts)
    steps = math.ceil(num_data / size) * (counts.runs + 1) * len(walk.timesteps)
    parts = []
    with tqdm(
        total=steps, desc="evidence", unit="step", delay=5, disable=not progress, leave=False
    ) as bar:
        for _, data, own in chunks(x_0, given, size):
            walk = ReverseWalk(diffusion, state, rows=rows, given=own)
            parts.append(_chunk(walk, data, *counts, bar))
    return parts


def _data_at_a_time(walk: ReverseWalk, x_0: Tensor, given: Given, counts: _Counts) -> int:
    """Number of data whose particles fit into the budget of memory, and into a batch of the network."""
    particles, length = max(counts.particles, counts.pilot), len(walk.timesteps)

    def cost(count: int) -> float:
        """Bytes needed for two steps, and for what the pilot run keeps of all steps."""
        data, own = first_repeated(x_0, given, count)
        short = ReverseWalk(walk.diffusion, walk.state, rows=walk.rows, given=own)
        with tqdm(disable=True) as bar:
            step = footprint(lambda: _run(short, data, particles, None, bar, steps=2))
        return step.peak + length * particles * count * _KEPT

    most = min(len(x_0), max(ROWS // particles, 1))
    # Half of the budget: tensors of many sizes are allocated and freed, which leaves holes between them.
    return 1 if most == 1 else rows_within(cost, most, BUDGET / 2)


def _chunk(
    walk: ReverseWalk, x_0: Tensor, num_particles: int, num_runs: int, num_pilot: int, bar: tqdm
) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """A pilot run of some data, and the runs with the look-ahead that was fitted to it.

    Returns:
        The logarithms of Z by run, ``(R, N)``; effective sample sizes by timestep, the mean over runs,
        ``(T, N)``; the largest Pareto k, ``(N,)``; the least effective sample size, ``(N,)``; the measure.
    """
    look_ahead = _run(walk, x_0, num_pilot, None, bar).fitted()
    runs = [_run(walk, x_0, num_particles, look_ahead, bar) for _ in range(num_runs)]
    log_z, k = torch.stack([run.log_z for run in runs]), torch.stack([run.k for run in runs])
    ess = torch.stack([torch.stack(run.ess[::-1]) for run in runs]).mean(0)
    at_end = torch.stack([effective(run.log_weight) for run in runs]).mean(0)
    least_ess = torch.where(look_ahead.resampled, ess.amin(0).minimum(at_end), at_end)
    return log_z, ess, k.amax(0), least_ess, runs[-1].measure


class _LookAhead(NamedTuple):
    strength: Tensor  #: :math:`c_t` in row t − 1, shape ``(T, N, 3)``
    resampled: Tensor  #: whether a datum is resampled, ``(N,)``


class _Particles:
    """Particles at one timestep: their weights, and the look-ahead by which they are resampled."""

    measure = ""  #: "density" or "mass", of the data

    def __init__(self, log_weight: Tensor, look_ahead: _LookAhead | None) -> None:
        self.log_weight, self.look_ahead = log_weight, look_ahead
        self.log_psi, self.log_z = torch.zeros_like(log_weight), torch.zeros_like(log_weight[0])
        #: The largest Pareto k of weights that were averaged, on the way or at the end, ``(N,)``.
        self.k = torch.full_like(self.log_z, -math.inf)
        self.ess: list[Tensor] = []  #: by timestep from T downwards, ``(N,)`` each
        self.features: list[Tensor] = []  #: likewise :math:`f_t`, ``(K, N, 3)`` each
        self.weights: list[Tensor] = []  #: likewise of the path up to :math:`x_t`, ``(K, N)`` each

    def resampled(
        self, x_t: Tensor, t: int, denoised: Denoised, features: Tensor
    ) -> tuple[Tensor, Denoised]:
        """States and their estimates, resampled by weight and look-ahead where these are uneven.

        Without a look-ahead no particle is resampled, and features and weights are stored.
        """
        if self.look_ahead is None:
            self.features.append(features)
            self.weights.append(self.log_weight)
            return x_t, denoised
        ahead = -(self.look_ahead.strength[t - 1] * features).sum(-1)
        self.log_weight = self.log_weight + ahead - self.log_psi
        self.ess.append(effective(self.log_weight))
        uneven = (self.ess[-1] < len(ahead) / 2) & self.look_ahead.resampled
        if uneven.any():
            rows = rows_to_keep(self.log_weight, uneven)
            self.average(uneven)
            self.log_weight = torch.where(uneven, 0.0, self.log_weight)
            x_t, ahead, denoised = taken((x_t, ahead, denoised), rows)
        self.log_psi = ahead
        return x_t, denoised

    def average(self, where: Tensor) -> None:
        """Multiply Z by the mean of the weights, for some of the data."""
        self.log_z = self.log_z + torch.where(where, log_mean(self.log_weight), 0.0)
        self.k = self.k.maximum(tail_of(self.log_weight, where))

    def fitted(self) -> _LookAhead:
        """Regress the log-weight of the rest of the path on the features, for each timestep alone."""
        rest = (self.log_weight - torch.stack(self.weights[::-1]))[..., None]
        features = torch.stack(self.features[::-1])
        rest, features = (x - x.mean(1, keepdim=True) for x in (rest, features))
        rest, features = rest.transpose(1, 2), features.transpose(1, 2)  # (T, N, K, …)
        scale = features.square().sum(-2, keepdim=True).clamp(min=1e-300).sqrt()
        features = features / scale
        ridge = 1e-9 * torch.eye(3).to(scale)  # for features that are collinear
        strength = torch.linalg.solve(features.mT @ features + ridge, features.mT @ rest)
        return _LookAhead(
            strength=-(strength / scale.mT).squeeze(-1),
            resampled=effective(self.log_weight) < len(self.log_weight) / 2,
        )


def _run(
    walk: ReverseWalk,
    x_0: Tensor,
    num_particles: int,
    look_ahead: _LookAhead | None,
    bar: tqdm,
    steps: int | None = None,
) -> _Particles:
    """One pass from x_T to x_0 with particles of each datum; ``steps`` stops it early to measure memory."""
    x = walk.target(x_0)
    q = walk.start(x)
    site = score(q, walk.start(), q.sample((num_particles,)))
    particles, x_t = _Particles(-site.log_ratio, look_ahead), site.x
    size = max(walk.rows // x_t.shape[1], 1)  # particles at a time
    for t in walk.timesteps[:steps]:
        denoised = walk.look(x_t, t)
        features = in_slices(partial(_features, walk, t, x), size, x_t, denoised)
        x_t, denoised = particles.resampled(x_t, t, denoised, features)
        if t > 1:
            x_t, log_ratio = in_slices(partial(_step, walk, t, x), size, x_t, denoised)
            particles.log_weight = particles.log_weight - log_ratio
        bar.update()
    end = walk.end(x_t, denoised)
    log_p = log_density(end, as_real(x_0))  # type: ignore[arg-type]
    particles.log_weight = particles.log_weight + log_p - particles.log_psi
    particles.average(torch.ones_like(particles.log_z, dtype=torch.bool))
    particles.measure = measure_of(end)
    return particles


def _step(
    walk: ReverseWalk, t: int, x: Tensor, x_t: Tensor, denoised: Denoised
) -> tuple[Tensor, Tensor]:
    """The next states, and their log-ratios."""
    site = walk.step(x_t, x, t, denoised)
    return site.x, site.log_ratio


def _features(
    walk: ReverseWalk, t: int, embedded: Tensor, x_t: Tensor, denoised: Denoised
) -> Tensor:
    r""":math:`f_t(x_t)`, shape ``(K, N, 3)``.

    The kernel's variance is :math:`\tilde\beta_t + b_t^2 v_t`, :math:`b_t` the weight of
    :math:`\hat x_0` in its mean. Where the variance of a kernel is not larger than :math:`\tilde\beta_t`,
    :math:`v_t` is the value for data of unit variance.
    """
    process = walk.process
    step = chain_step(t, process.schedule).padded(process.missing_dim)
    kernel = walk.kernel(x_t, t, denoised)
    of_x_0_hat = step.signal_prev * step.share
    implied = (kernel.variance.double() - posterior_variance(step)) / of_x_0_hat**2
    unit = step.noise**2 / (step.signal**2 + step.noise**2)
    variance = torch.where(implied > 1e-6 * unit, implied, unit)
    x_0, state = embedded.double(), x_t.double()
    squares: tuple[Tensor, ...] = (
        (x_0 - walk.estimate(x_t, t, denoised).double()).square() / variance,
        (state - step.signal * x_0).square() / step.noise**2,
        state.square() / (step.signal**2 + step.noise**2),
    )
    if walk.of_state is not None:
        squares = tuple(x.where(walk.of_state, 0.0) for x in squares)
    return torch.stack([x.reshape(*x.shape[:2], -1).sum(-1) for x in squares], dim=-1)
