r"""Sequential Monte Carlo along the reverse chain: evidence where whole paths' weights are too uneven.

Importance weights of whole trajectories multiply up over the chain. Sequential Monte Carlo spends its
particles where they matter, by resampling on the way from :math:`x_T` to :math:`x_0`. What it resamples by
decides everything: with the ratios so far it throws away just the particles that would have come out
best, for what a step loses the next ones give back. The intermediate targets must look ahead,

.. math::
    \pi_t(x_{t:T}) &\propto p(x_{t:T})\, \psi_t(x_t), \qquad
    \log \psi_t(x_t) = -c_t \cdot f_t(x_t) \approx \log p(x_0 \mid x_t) + \text{const}, \\
    f_t(x_t) &= \Big( \sum_i \frac{(x_{0,i} - \hat x_{0,i}(x_t))^2}{v_{t,i}},\;
        \frac{\lVert x_t - a_t x_0 \rVert^2}{\sigma_t^2},\;
        \frac{\lVert x_t \rVert^2}{a_t^2 + \sigma_t^2} \Big),

with :math:`v_t` the variance of :math:`x_0` given :math:`x_t` that the kernel's own variance implies. The
strengths :math:`c_t` are fitted by least squares, datum by datum and timestep by timestep, to the weights
that the rest of the path had in a pilot run: one half, nothing and nothing for an exact denoiser of Gaussian
data, whose targets then have constant weights; what a wrong one does to the noise and to the size of a state
is in the other two. The pilot is independent of the runs, so that :math:`\hat Z` is unbiased whatever
:math:`\psi` is; :math:`\log \hat Z` is low in expectation, by half its variance to first order.

References:
    Sequential Monte Carlo Samplers (Del Moral et al., 2006). https://doi.org/10.1111/j.1467-9868.2006.00553.x
    Twisted Particle Filters (Whiteley and Lee, 2014). https://arxiv.org/abs/1210.0220
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.checks import check_count, check_data, check_state
from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.evidence.evidence import Evidence, at_the_end, fingerprint, log_mean, tail
from pyro_diffusion.given import as_real
from pyro_diffusion.networks import evaluating
from pyro_diffusion.processes.gaussian import chain_step, posterior_variance
from pyro_diffusion.scoring import log_density, measure_of, score
from pyro_diffusion.walk import ROWS, ReverseWalk, taken


def smc_evidence(
    diffusion: DiffusionModel,
    x_0: Tensor,
    *,
    num_particles: int,
    state: int = 0,
    num_runs: int = 4,
    num_pilot: int = 128,
    progress: bool = True,
) -> Evidence:
    r"""Sequential Monte Carlo: :math:`\log \hat p(x_0)` with a look-ahead through :math:`\hat x_0`.

    A datum whose whole paths already have even weights in the pilot run is not resampled: it is an
    importance average then. Resampling is systematic, where the effective sample size falls below half of
    the particles.

    Args:
        diffusion: The model; its own kernels are used, any schedule, prediction and likelihood.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Particles :math:`K` for each datum and run.
        state: Timestep ``t`` of which ``x_0`` are states, for :math:`\log p(x_t)`; 0 for data.
        num_runs: Independent runs, whose spread is the standard error, at least 2.
        num_pilot: Particles of the pilot run, at least 25.
        progress: Show a progress bar if it takes more than five seconds.

    Returns:
        :class:`~pyro_diffusion.evidence.Evidence`: the logarithm of the mean of :math:`\hat Z` over runs.
        ``ess_by_timestep`` has, in row ``t − 1``, the effective sample size of the particles at
        :math:`x_t` before resampling, the mean over runs; ``ess`` is the least of them and of that at the
        end (which counts alone for a datum that is not resampled); ``pareto_k`` is the largest of the
        weights that were averaged, at a resampling or at the end. ``reliable`` says what can be trusted. A
        run takes :math:`K T` network rows a datum.

    Raises:
        ValueError: Fewer particles, runs or pilot particles than named; a state outside ``0 … T``; a model
            of bits, or a state under a curve for each entry; data as for the programs.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> smc_evidence(DiffusionModel(denoiser), torch.zeros(3, 2), num_particles=10).log_evidence
        tensor([-1.8379, -1.8379, -1.8379], dtype=torch.float64)
    """
    check_count("num_particles", num_particles, 2, "Pass num_particles=1024, say.")
    check_count("num_runs", num_runs, 2, "Leave it out: four runs have a spread.")
    check_count("num_pilot", num_pilot, 25, "Leave it out.")
    state = check_state(state, check_diffusion(diffusion).schedule.num_timesteps)
    diffusion.process.check_has_score("diffusion", "Use importance_evidence.")
    if state == diffusion.schedule.num_timesteps:
        return at_the_end(diffusion.prior(), x_0, num_particles)
    walk = ReverseWalk(diffusion, state)
    chunks = check_data(x_0).split(max(ROWS // max(num_particles, num_pilot), 1))
    steps = len(chunks) * (num_runs + 1) * len(walk.timesteps)
    with (
        torch.no_grad(), evaluating(diffusion),
        tqdm(total=steps, desc="evidence", unit="step", delay=5, disable=not progress, leave=False) as bar,
    ):  # fmt: skip
        parts = [_chunk(walk, data, num_particles, num_runs, num_pilot, bar) for data in chunks]
    log_z, ess, k, least_ess = (
        torch.cat(x, dim=-1) for x in zip(*(p[:4] for p in parts), strict=True)
    )
    mean = log_mean(log_z)
    return Evidence(
        log_evidence=mean,
        standard_error=((log_z - mean).exp().var(0) / num_runs).sqrt(),
        ess=least_ess,
        pareto_k=k,
        ess_by_timestep=ess,
        estimator="sequential Monte Carlo",
        num_particles=num_particles,
        data=fingerprint(x_0),
        measure=parts[-1].measure,
    )


class _Chunk(NamedTuple):
    """What the runs of some data came to."""

    log_z: Tensor  #: ``(R, N)``
    ess: Tensor  #: by timestep, the mean over runs, ``(T, N)``
    k: Tensor  #: ``(N,)``
    least_ess: Tensor  #: ``(N,)``
    measure: str


def _chunk(
    walk: ReverseWalk, x_0: Tensor, num_particles: int, num_runs: int, num_pilot: int, bar: tqdm
) -> _Chunk:
    """A pilot run of some data, and the runs with the look-ahead that was fitted to it."""
    look_ahead = _run(walk, x_0, num_pilot, None, bar).fitted()
    runs = [_run(walk, x_0, num_particles, look_ahead, bar) for _ in range(num_runs)]
    log_z, ess, at_end, k = (
        torch.stack([getattr(run, name) for run in runs])
        for name in ("log_z", "ess", "ess_at_end", "k")
    )
    ess, at_end = ess.mean(0), at_end.mean(0)
    least_ess = torch.where(look_ahead.resampled, ess.min(0).values.minimum(at_end), at_end)
    return _Chunk(log_z, ess, k.amax(0), least_ess, runs[-1].measure)


class _LookAhead(NamedTuple):
    strength: Tensor  #: :math:`c_t` in row t − 1, shape ``(T, N, 3)``
    resampled: Tensor  #: data that are resampled at all, ``(N,)``


class _Run(NamedTuple):
    log_z: Tensor  #: ``(N,)``
    ess: Tensor  #: by timestep, ``(T, N)``
    features: Tensor  #: :math:`f_t` by timestep and particle, ``(T, K, N, 3)``
    log_weight: Tensor  #: of the path up to :math:`x_t`, ``(T, K, N)``
    log_weight_at_end: Tensor  #: of the whole path, ``(K, N)``
    ess_at_end: Tensor  #: ``(N,)``
    measure: str  #: of the data
    k: Tensor  #: the largest Pareto k of weights that were averaged, on the way or at the end, ``(N,)``

    def fitted(self) -> _LookAhead:
        """Least squares of what the rest of the path weighs on the features, each timestep alone."""
        rest = (self.log_weight_at_end - self.log_weight)[..., None]
        rest, features = (x - x.mean(1, keepdim=True) for x in (rest, self.features))
        rest, features = rest.transpose(1, 2), features.transpose(1, 2)  # (T, N, K, …)
        scale = features.square().sum(-2, keepdim=True).clamp(min=1e-300).sqrt()
        features = features / scale
        ridge = 1e-9 * torch.eye(
            3, dtype=scale.dtype, device=scale.device
        )  # where two say the same
        strength = torch.linalg.solve(features.mT @ features + ridge, features.mT @ rest)
        strength = -(strength / scale.mT).squeeze(-1)
        weight = self.log_weight_at_end.softmax(0)
        return _LookAhead(strength, 1 / weight.square().sum(0) < len(weight) / 2)


class _Particles:
    """Particles on the way: weights, and what is resampled by."""

    def __init__(self, log_weight: Tensor, look_ahead: _LookAhead | None) -> None:
        self.log_weight, self.look_ahead = log_weight, look_ahead
        self.log_psi = torch.zeros_like(log_weight)
        self.log_z = torch.zeros_like(log_weight[0])
        self.k = torch.full_like(self.log_z, -math.inf)
        self.ess: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.weights: list[Tensor] = []

    def resampled(
        self, x_t: Tensor, t: int, denoised: Denoised, features: Tensor
    ) -> tuple[Tensor, Denoised]:
        """States and what was said of them, resampled by weight and look-ahead where they are uneven.

        Without a look-ahead no particle is resampled, and what the pilot has seen is kept.
        """
        if self.look_ahead is None:
            self.seen.append(features)
            self.weights.append(self.log_weight)
            return x_t, denoised
        ahead = -(self.look_ahead.strength[t - 1] * features).sum(-1)
        self.log_weight = self.log_weight + ahead - self.log_psi
        share = self.log_weight.softmax(0)
        self.ess.append(1 / share.square().sum(0))
        uneven = (self.ess[-1] < len(share) / 2) & self.look_ahead.resampled
        if uneven.any():
            self.log_z = self.log_z + torch.where(uneven, log_mean(self.log_weight), 0.0)
            self.k = torch.where(uneven, self.k.maximum(tail(self.log_weight)), self.k)
            self.log_weight = torch.where(uneven, 0.0, self.log_weight)
            in_place = torch.arange(len(share), device=share.device)[:, None]
            rows = torch.where(uneven, _systematic(share), in_place)
            x_t, ahead, denoised = taken(x_t, rows), taken(ahead, rows), taken(denoised, rows)
        self.log_psi = ahead
        return x_t, denoised

    def run(self, measure: str) -> _Run:
        """What it all came to, at the end."""
        log_weight = self.log_weight
        empty, share = log_weight.new_zeros(0), log_weight.softmax(0)
        return _Run(
            log_z=self.log_z + log_mean(log_weight),
            ess=torch.stack(self.ess[::-1]) if self.ess else empty,
            features=torch.stack(self.seen[::-1]) if self.seen else empty,
            log_weight=torch.stack(self.weights[::-1]) if self.weights else empty,
            log_weight_at_end=log_weight,
            ess_at_end=1 / share.square().sum(0),
            measure=measure,
            k=self.k.maximum(tail(log_weight)),
        )


def _run(
    walk: ReverseWalk, x_0: Tensor, num_particles: int, look_ahead: _LookAhead | None, bar: tqdm
) -> _Run:
    """One pass from x_T to x_0 with particles of each datum."""
    x = walk.target(x_0)
    q = walk.start(x)
    site = score(q, walk.start(), q.sample((num_particles,)))
    particles, x_t = _Particles(-site.log_ratio, look_ahead), site.x
    for t in walk.timesteps:
        denoised = walk.look(x_t, t)
        features = _features(walk, x_t, t, denoised, x)
        x_t, denoised = particles.resampled(x_t, t, denoised, features)
        if t > 1:
            site = walk.step(x_t, x, t, denoised)
            x_t, particles.log_weight = site.x, particles.log_weight - site.log_ratio
        bar.update()
    end = walk.end(x_t, denoised)
    log_p = log_density(end, as_real(x_0))  # type: ignore[arg-type]
    particles.log_weight = particles.log_weight + log_p - particles.log_psi
    return particles.run(measure_of(end))


def _features(
    walk: ReverseWalk, x_t: Tensor, t: int, denoised: Denoised, embedded: Tensor
) -> Tensor:
    r""":math:`f_t(x_t)`, shape ``(K, N, 3)``.

    The kernel's variance is :math:`\tilde\beta_t + b_t^2 v_t`, :math:`b_t` the weight of
    :math:`\hat x_0` in its mean. Where a kernel leaves nothing beside :math:`\tilde\beta_t`,
    :math:`v_t` is that of data of unit variance.
    """
    process = walk.process
    step = chain_step(t, process.schedule).padded(process.missing_dim)
    kernel = walk.kernel(x_t, t, denoised)
    of_x_0_hat = step.signal_prev * step.share
    implied = (kernel.variance.double() - posterior_variance(step)) / of_x_0_hat**2
    unit = step.noise**2 / (step.signal**2 + step.noise**2)
    variance = torch.where(implied > 1e-6 * unit, implied, unit)
    x_0, state = embedded.double(), x_t.double()
    squares = (
        (x_0 - walk.estimate(x_t, t, denoised).double()).square() / variance,
        (state - step.signal * x_0).square() / step.noise**2,
        state.square() / (step.signal**2 + step.noise**2),
    )
    return torch.stack([x.reshape(*x.shape[:2], -1).sum(-1) for x in squares], dim=-1)


def _systematic(share: Tensor) -> Tensor:
    """Rows to keep, with as many copies of each as its share of the weight is worth; ``(K, N)``."""
    count = len(share)
    points = torch.rand(1, share.shape[1], dtype=share.dtype, device=share.device)
    points = (points + torch.arange(count, device=share.device)[:, None]) / count
    edges = share.cumsum(0)
    edges = edges / edges[-1:]
    return torch.searchsorted(edges.T.contiguous(), points.T.contiguous()).T.clamp(max=count - 1)
