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
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.bernoulli import BernoulliDiffusion
from pyro_diffusion.bounds import ROWS, log_density, measure_of
from pyro_diffusion.checks import check_data
from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import Evidence, at_the_end, check_state, fingerprint, tail
from pyro_diffusion.kernels import (
    ChainStep,
    chain_step,
    forward_posterior,
    noised,
    posterior_mean,
    posterior_variance,
)
from pyro_diffusion.networks import evaluating
from pyro_diffusion.observations import as_real

__all__ = ["smc_evidence"]


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
    for name, number, least in (
        ("num_particles", num_particles, 2),
        ("num_runs", num_runs, 2),
        ("num_pilot", num_pilot, 25),
    ):
        if not isinstance(number, int) or number < least:
            raise ValueError(
                f"argument {name!r}: got {number!r}; expected a whole number of at least {least}. Leave out "
                "what you do not need, and pass num_particles=1024, say."
            )
    check_state(state, diffusion.schedule.num_timesteps)
    if isinstance(diffusion, BernoulliDiffusion):
        raise ValueError(
            "argument 'diffusion': got a BernoulliDiffusion; expected Gaussian kernels, by whose means the "
            "targets look ahead. Use importance_evidence."
        )
    if state == diffusion.schedule.num_timesteps:
        return at_the_end(diffusion.prior(), x_0, num_particles)
    target = _Target(diffusion, state)
    chunks = check_data(x_0).split(max(ROWS // max(num_particles, num_pilot), 1))
    steps = len(chunks) * (num_runs + 1) * target.schedule.num_timesteps
    parts: list[list[_Run]] = []
    least_ess: list[Tensor] = []
    with (
        torch.no_grad(), evaluating(diffusion),
        tqdm(total=steps, desc="evidence", unit="step", delay=5, disable=not progress, leave=False) as bar,
    ):  # fmt: skip
        for data in chunks:
            pilot = _run(target, data, num_pilot, None, bar)
            look_ahead = pilot.fitted()
            runs = [_run(target, data, num_particles, look_ahead, bar) for _ in range(num_runs)]
            parts.append(runs)
            on_the_way = torch.stack([run.ess for run in runs]).mean(0).min(0).values
            at_end = torch.stack([run.ess_at_end for run in runs]).mean(0)
            least_ess.append(torch.where(look_ahead.resampled, on_the_way.minimum(at_end), at_end))
    log_z = torch.cat([torch.stack([run.log_z for run in runs]) for runs in parts], dim=1)
    ess = torch.cat([torch.stack([run.ess for run in runs]).mean(0) for runs in parts], dim=1)
    mean = log_z.logsumexp(0) - math.log(num_runs)
    return Evidence(
        log_evidence=mean,
        standard_error=((log_z - mean).exp().var(0) / num_runs).sqrt(),
        ess=torch.cat(least_ess),
        pareto_k=torch.cat([torch.stack([run.k for run in runs]).amax(0) for runs in parts]),
        ess_by_timestep=ess,
        estimator="sequential Monte Carlo",
        num_particles=num_particles,
        data=fingerprint(x_0),
        measure=pilot.measure,
    )


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


class _Target:
    """What a run ends at: data, or states at a timestep, to which the chain from there is one of its own."""

    def __init__(self, diffusion: DiffusionModel, state: int) -> None:
        self.diffusion, self.state = diffusion, state
        self.denoiser, self.event_dim = diffusion.denoiser, diffusion.denoiser.event_dim
        self.schedule = diffusion.schedule.tail(state) if state else diffusion.schedule

    def embed(self, x: Tensor) -> Tensor:
        """The target as a point of the chain."""
        return x.to(self.diffusion.dtype) if self.state else self.diffusion.embed(x)

    def start(self, x: Tensor) -> TorchDistribution:
        """:math:`q(x_T)` given the target."""
        log_snr = self.schedule.log_snr(self.schedule.num_timesteps)
        return noised(x, log_snr, self.schedule, event_dim=self.event_dim)

    def posterior(self, x_t: Tensor, x: Tensor, t: int) -> TorchDistribution:
        r""":math:`q(x_{t-1} \mid x_t)` given the target."""
        return forward_posterior(x_t, x, t, self.schedule, event_dim=self.event_dim)

    def denoise(self, x_t: Tensor, t: int) -> Denoised:
        """What the denoiser says of the datum, ``t`` steps from the target."""
        return self.denoiser.denoise(x_t, self.diffusion.schedule.log_snr(t + self.state))

    def kernel(self, x_t: Tensor, t: int, denoised: Denoised) -> TorchDistribution:
        """The model's kernel there."""
        return self.denoiser.reverse_kernel(x_t, t + self.state, denoised)

    def decoder(self, x_t: Tensor, denoised: Denoised) -> TorchDistribution:
        """The model's kernel into the target."""
        if self.state:
            return self.kernel(x_t, 1, denoised)
        return self.diffusion.decode_denoised(x_t, denoised)

    def estimate(self, x_t: Tensor, t: int, denoised: Denoised) -> Tensor:
        """The mean of the target given :math:`x_t`: of the state through the estimate of its datum."""
        if not self.state:
            return denoised.x_0_hat
        schedule, ends = self.diffusion.schedule, torch.tensor([self.state, t + self.state])
        log_snr = schedule.log_snr(ends.to(x_t.device))
        (signal, signal_t), (noise, noise_t) = (c.unbind() for c in schedule.scales(log_snr))
        share = -torch.expm1(log_snr[1] - log_snr[0])
        step = ChainStep(signal, noise, signal_t, noise_t, share)
        return posterior_mean(x_t, denoised.x_0_hat, step, missing_dim=self.event_dim)


def _run(
    target: _Target,
    x_0: Tensor,
    num_particles: int,
    look_ahead: _LookAhead | None,
    bar: tqdm,
) -> _Run:
    """One pass from x_T to x_0; without a look-ahead no particle is resampled, and the paths are kept."""
    embedded = target.embed(x_0)
    data: Any = as_real(x_0)
    q: TorchDistribution = target.start(embedded)
    x_t = q.sample((num_particles,))
    log_weight = _log_ratio(target.diffusion.prior(), q, x_t)
    log_psi = torch.zeros_like(log_weight)
    log_z = torch.zeros_like(log_weight[0])
    k = torch.full_like(log_z, -math.inf)
    ess, seen, weights = [], [], []
    for t in range(target.schedule.num_timesteps, 0, -1):
        denoised = target.denoise(x_t, t)
        features = _features(target, x_t, t, denoised, embedded)
        if look_ahead is None:
            seen.append(features)
            weights.append(log_weight)
        else:
            ahead = -(look_ahead.strength[t - 1] * features).sum(-1)
            log_weight = log_weight + ahead - log_psi
            share = log_weight.softmax(0)
            ess.append(1 / share.square().sum(0))
            uneven = (ess[-1] < num_particles / 2) & look_ahead.resampled
            if uneven.any():
                log_z = log_z + torch.where(uneven, _log_mean(log_weight), 0.0)
                k = torch.where(uneven, k.maximum(tail(log_weight)), k)
                log_weight = torch.where(uneven, 0.0, log_weight)
                rows = torch.where(uneven, _systematic(share), _in_place(share))
                x_t, ahead = _take(x_t, rows), _take(ahead, rows)
                denoised = _take_denoised(denoised, rows)
            log_psi = ahead
        if t > 1:
            p = target.kernel(x_t, t, denoised)
            q = target.posterior(x_t, embedded, t)
            x_t = q.sample()
            log_weight = log_weight + _log_ratio(p, q, x_t)
        else:
            decoder = target.decoder(x_t, denoised)
            log_weight = log_weight + log_density(decoder, data)
            log_weight = log_weight - log_psi
        bar.update()
    empty = log_weight.new_zeros(0)
    share = log_weight.softmax(0)
    return _Run(
        log_z=log_z + _log_mean(log_weight),
        ess=torch.stack(ess[::-1]) if ess else empty,
        features=torch.stack(seen[::-1]) if seen else empty,
        log_weight=torch.stack(weights[::-1]) if weights else empty,
        log_weight_at_end=log_weight,
        ess_at_end=1 / share.square().sum(0),
        k=k.maximum(tail(log_weight)),
        measure=measure_of(decoder),
    )


def _features(target: _Target, x_t: Tensor, t: int, denoised: Denoised, embedded: Tensor) -> Tensor:
    r""":math:`f_t(x_t)`, shape ``(K, N, 3)``.

    The kernel's variance is :math:`\tilde\beta_t + b_t^2 v_t`, :math:`b_t` the weight of
    :math:`\hat x_0` in its mean. Where a kernel leaves nothing beside :math:`\tilde\beta_t`,
    :math:`v_t` is that of data of unit variance.
    """
    step = chain_step(t, target.schedule).padded(target.event_dim - target.schedule.event_dim)
    kernel = target.kernel(x_t, t, denoised)
    of_x_0_hat = step.signal_prev * step.share
    implied = (kernel.variance.double() - posterior_variance(step)) / of_x_0_hat**2
    unit = step.noise**2 / (step.signal**2 + step.noise**2)
    variance = torch.where(implied > 1e-6 * unit, implied, unit)
    x_0, state = embedded.double(), x_t.double()
    squares = (
        (x_0 - target.estimate(x_t, t, denoised).double()).square() / variance,
        (state - step.signal * x_0).square() / step.noise**2,
        state.square() / (step.signal**2 + step.noise**2),
    )
    return torch.stack([x.reshape(*x.shape[:2], -1).sum(-1) for x in squares], dim=-1)


def _log_ratio(p: TorchDistribution, q: TorchDistribution, x: Tensor) -> Tensor:
    """log p − log q in float64."""
    return log_density(p, x) - log_density(q, x)


def _log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def _systematic(share: Tensor) -> Tensor:
    """Rows to keep, with as many copies of each as its share of the weight is worth; ``(K, N)``."""
    count = len(share)
    points = torch.rand(1, share.shape[1], dtype=share.dtype, device=share.device)
    points = (points + torch.arange(count, device=share.device)[:, None]) / count
    edges = share.cumsum(0)
    edges = edges / edges[-1:]
    return torch.searchsorted(edges.T.contiguous(), points.T.contiguous()).T.clamp(max=count - 1)


def _in_place(share: Tensor) -> Tensor:
    return torch.arange(len(share), device=share.device)[:, None].expand_as(share)


def _take_denoised(denoised: Denoised, rows: Tensor) -> Denoised:
    logits, variance = (None if x is None else _take(x, rows) for x in denoised[1:])
    return Denoised(_take(denoised.x_0_hat, rows), logits, variance)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Particles of each datum, by row."""
    index = rows.reshape(rows.shape + (1,) * (x.dim() - 2))
    return x.gather(0, index.expand_as(x))
