r"""Particles that look ahead to a likelihood: twisted sequential Monte Carlo along the reverse chain.

The targets on the way are :math:`p(x_{t:T})\, \psi_t(x_t)`, and at the end :math:`p(x_{0:T})\, r(x_0)`. Near
the estimate :math:`\hat x_0(x_t)` the likelihood is linear-Gaussian, with rows :math:`J` and residual
:math:`e` (:mod:`~pyro_diffusion.inference.targets`). What is left to know of the datum is its covariance,
by Tweedie's second-order formula

.. math::
    C_t = \operatorname{Cov}[x_0 \mid x_t] = \frac{\partial \hat x_0}{\partial x_t} \frac{\sigma_t^2}{a_t},

so that :math:`J C_t` takes one vector-Jacobian product of the network for each row. (How far the Jacobian of
a network is to be trusted: :mod:`~pyro_diffusion.inference.covariance`.) One step later

.. math::
    \frac{a_{t-1}}{\sigma_{t-1}^2} J C_{t-1}
        &\approx M (M + N)^{-1} J C_t \frac{a_{t-1}}{\sigma_{t-1}^2} =: B, \qquad M = J C_t J^\top, \\
    J C_{t-1} J^\top &\lesssim M - M (M + P)^{-1} M =: U, \\
    N &= J C_t\, \Delta_t\, C_t J^\top, \qquad P = J \Delta_t^{-1} J^\top, \qquad
        \Delta_t = \mathrm{SNR}_{t-1} - \mathrm{SNR}_t,

because Bayes' rule for a Gaussian is :math:`C_{t-1}^{-1} = C_t^{-1} + \Delta_t`. Both are equalities if all
entries have one :math:`\Delta_t` and the rows of :math:`J` span an invariant subspace of :math:`C_t`.
Otherwise their error is proportional to the step. For a Gaussian :math:`U` is an upper bound, which keeps
:math:`\phi` from being too narrow. The likelihood of :math:`x_{t-1}` is about

.. math::
    \phi(x_{t-1}) = e^c N\big(e;\; B (x_{t-1} - E[x_{t-1} \mid x_t]),\; \Sigma_y + U\big).

The proposal is :math:`p(x_{t-1} \mid x_t)\, \phi(x_{t-1}) / \psi_t(x_t)`, in closed form
(:mod:`~pyro_diffusion.inference.conjugate`), and its normaliser is the twisting function,

.. math::
    \psi_t(x_t) = \int p(x_{t-1} \mid x_t)\, \phi(x_{t-1})\, dx_{t-1}
        \;\; \big( = e^c N(e;\, 0,\, \Sigma_y + J C_t J^\top)
        \ \text{for Gaussian data and their exact kernel} \big).

The weight of a step is :math:`\psi_{t-1}(x_{t-1}) / \phi(x_{t-1})`, that of the last one :math:`r(x_0) /
\phi(x_0)`. They are exact for every model and every approximation above.

References:
    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023).
    https://arxiv.org/abs/2306.17775
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.distributions import Bernoulli
from torch import Tensor
from torch.distributions import Independent

from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.evidence.evidence import effective, log_mean, rows_to_keep, tail_of
from pyro_diffusion.inference.conjugate import (
    Conjugate,
    Factor,
    Gaussians,
    Noise,
    as_gaussians,
    log_normal,
    positive,
    ridge,
    root_of,
)
from pyro_diffusion.inference.covariance import Covariances
from pyro_diffusion.inference.draws import FEW
from pyro_diffusion.inference.targets import Local, Target, in_chains_units, in_users_units
from pyro_diffusion.processes import pad
from pyro_diffusion.processes.gaussian import chain_step, posterior_mean
from pyro_diffusion.scoring import score
from pyro_diffusion.typed import TorchDistribution
from pyro_diffusion.walk import ReverseWalk, in_slices, taken

__all__ = ["Ahead", "Path", "Run"]

_EVEN = 0.9  # share of effective particles above which weights are nearly equal
_LEAST = 600.0  # nats below the largest weight: smaller weights count as this one


class Run(NamedTuple):
    """The particles of one or several runs at the end; ``M`` columns, one for each run and datum."""

    x_0: Tensor  #: data in the user's units, ``(K, M) + event``
    log_weight: Tensor  #: ``(K, M)``
    log_z: Tensor  #: ``(M,)``
    ess: Tensor  #: ``(T, M)``
    k: Tensor  #: the largest Pareto k of weights that were averaged, ``(M,)``


class Ahead(NamedTuple):
    r"""What is known at :math:`x_t`."""

    denoised: Denoised
    factor: Factor | None  #: :math:`\phi`; ``None`` where the proposal does not come from it
    log_psi: Tensor  #: ``(K, M)``
    push: Tensor | None = None  #: added to the kernel's mean if there is no factor, ``(K, M, D)``


class Path:
    """Particles on their way; the weights are those of the target, with ψ taken out after each step.

    Args:
        walk: The reverse walk, with a context for each column.
        target: The likelihood.
        shape: ``(K, M)``: particles, and runs times data. A single particle is not resampled.
        exponents: The power of the likelihood by timestep, ``(T + 1,)``; it is one at the datum.
        noise: Where random numbers come from.
        covariances: What stands in for the Jacobian of a learned estimate; ``None`` if it is exact.
    """

    def __init__(
        self,
        walk: ReverseWalk,
        target: Target,
        shape: tuple[int, int],
        exponents: Tensor,
        noise: Noise,
        covariances: Covariances | None = None,
    ) -> None:
        self.walk, self.target, self.shape, self.noise = walk, target, shape, noise
        self.rows_at_a_time, self.covariances = walk.rows, covariances
        self.columns = shape[1]  # by which slices are measured
        self.exponents: list[float] = exponents.tolist()
        self.diffusion, self.event_shape = walk.diffusion, walk.diffusion.event_shape
        self.guided = target.has_rows and self.diffusion.process.has_score
        self.log_weight = torch.zeros(shape, dtype=torch.float64, device=self.diffusion.device)
        self.log_z = torch.zeros_like(self.log_weight[0])
        self.k = torch.full_like(self.log_z, -math.inf)
        self.ess: list[Tensor] = []

    def run(self, bar: Any, *, rehearsal: bool = False) -> Run:
        """From :math:`x_T` to data; a rehearsal takes the first step and the last one, for their memory."""
        timesteps = self.walk.timesteps
        x_t = self.start()
        for t in timesteps[:: max(len(timesteps) - 1, 1)] if rehearsal else timesteps:
            x_t, ahead = self.resampled(x_t, self.look(x_t, t))
            x_t = self.step(x_t, t, ahead) if t > 1 else self.end(x_t, ahead)
            bar.update()
        self.average(torch.ones_like(self.log_z, dtype=torch.bool))
        return Run(x_t, self.log_weight, self.log_z, torch.stack(self.ess[::-1]), self.k)

    # From x_T to x_0.

    def start(self) -> Tensor:
        r""":math:`x_T`, from the prior times its factor, which is expanded at the prior's mean."""
        last, prior = self.walk.timesteps[0], self.walk.start()
        if not self.guided:
            return prior.sample(self.shape)
        origin = prior.mean.expand(1, self.shape[1], *self.event_shape)
        _, local, pulled = self._pulled(origin, last, self.exponents[last])
        inner = positive(pulled @ local.rows.mT)
        step = chain_step(last, self.diffusion.schedule)
        factor = Factor.at(
            local,
            pulled * self._entries(step.signal / step.noise**2),
            origin,
            root_of(inner + ridge(inner, 1e-12)),
        )
        factor = Factor(*(x.expand(self.shape[0], *x.shape[1:]) for x in factor))
        kernel = as_gaussians(prior, torch.Size(self.shape))
        assert kernel is not None  # the prior of a process with a score
        proposal = Conjugate(kernel, factor)
        x_T = self._states(proposal.draw(self.noise))
        self.log_weight = proposal.log_z - factor.log_prob(x_T.flatten(2))
        return x_T

    def look(self, x_t: Tensor, t: int) -> Ahead:
        """What is known at the states, in slices of as many rows as the walk allows."""
        look = partial(self._look if self.guided else self._look_without_rows, t=t)
        return self._in_slices(look, x_t)

    def resampled(self, x_t: Tensor, ahead: Ahead) -> tuple[Tensor, Ahead]:
        """States, resampled by weight and look-ahead where these are uneven."""
        self.log_weight = self.log_weight + ahead.log_psi
        self.ess.append(effective(self.log_weight).nan_to_num(0.0))  # none if all are impossible
        uneven = (self.ess[-1] < self.shape[0] / 2) & (self.ess[-1] > 0)
        if self.shape[0] == 1 or not uneven.any():
            return x_t, ahead
        rows = rows_to_keep(self.log_weight, uneven, self.noise.uniform(self.log_weight[:1]))
        self.average(uneven)
        self.log_weight = torch.where(uneven, 0.0, self.log_weight)
        x_t, ahead = taken((x_t, ahead), rows)
        return x_t, ahead

    def average(self, where: Tensor) -> None:
        """Multiply Z by the mean of the weights, for some of the columns."""
        largest = self.log_weight.amax(0)
        self.log_z = self.log_z + torch.where(where, log_mean(self.log_weight), 0.0)
        # An impossible datum has no logarithm.
        bounded = self.log_weight.maximum(largest - _LEAST).nan_to_num(neginf=0.0)
        # Weights that are nearly equal have no tail that matters, whatever its shape is.
        ess = effective(self.log_weight)
        k = tail_of(bounded, where & (ess < _EVEN * self.shape[0]))
        # Infinite if fewer than five weights lie above a quantile, as when the largest are all equal.
        self.k = self.k.maximum(torch.where((k == math.inf) & (ess > FEW), -math.inf, k))

    def step(self, x_t: Tensor, t: int, ahead: Ahead) -> Tensor:
        r""":math:`x_{t-1}`, ``t ≥ 2``, and the weights of the step."""
        x_t, lost = self._in_slices(partial(self._next, t), x_t, ahead)
        self.log_weight = self.log_weight - lost
        return x_t

    def _next(self, t: int, x_t: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
        """The next states, and what their weights lose."""
        kernel = self.walk.kernel(x_t, t, ahead.denoised)
        gaussians = as_gaussians(kernel, x_t.shape[:2])
        if ahead.factor is None or gaussians is None:
            known = self.target.known(ahead.denoised, x_t)
            if known is ahead.denoised:
                return kernel.sample(), ahead.log_psi
            site = score(self.walk.kernel(x_t, t, known), kernel)
            return site.x, ahead.log_psi + site.log_ratio
        x = self._conjugate_draw(gaussians, ahead.factor)
        return x, ahead.factor.log_prob(x.flatten(2))

    def end(self, x_1: Tensor, ahead: Ahead) -> Tensor:
        r""":math:`x_0` in the user's units, and the last weights."""

        def draw(x_1: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
            """Data of a slice, and what their weights gain."""
            kernel = self._last_kernel(x_1, ahead.denoised)
            if kernel is None or not self.guided:
                x_0, log_r = self.target.drawn(self._law(x_1, ahead.denoised))
                return x_0, log_r - ahead.log_psi
            inside = self._drawn_at_the_end(kernel, ahead.denoised)
            x_0 = self.target.completed(in_users_units(self.diffusion, inside))
            if self.target.is_exact:
                return x_0, torch.zeros_like(ahead.log_psi)
            factor = self._last_factor(ahead.denoised)
            return x_0, self.target.log_prob(x_0) - factor.log_prob(inside.flatten(2))

        x_0, gained = self._in_slices(draw, x_1, ahead)
        self.log_weight = self.log_weight + gained
        return x_0

    def _drawn_at_the_end(self, kernel: Gaussians, denoised: Denoised) -> Tensor:
        """Data in the chain's units, from the last kernel times its factor."""
        return self._conjugate_draw(kernel, self._last_factor(denoised))

    # What is known at a state.

    def _look(self, x_t: Tensor, t: int) -> Ahead:
        if t == 1:
            denoised = self.walk.look(x_t, 1)
            kernel = self._last_kernel(x_t, denoised)
            if kernel is None:
                return self._look_without_factor(x_t)
            # The rows of the last factor may be many. They are made again for the draws.
            return Ahead(denoised, None, Conjugate(kernel, self._last_factor(denoised)).log_z)
        denoised, local, pulled = self._pulled(x_t, t, self.exponents[t - 1])
        kernel = as_gaussians(self.walk.kernel(x_t, t, denoised), x_t.shape[:2])
        if kernel is None:
            return self._without_factor(denoised, local, pulled)
        factor = self._between(x_t, t, denoised, local, pulled)
        return Ahead(denoised, factor, Conjugate(kernel, factor).log_z)

    def _last_factor(self, denoised: Denoised) -> Factor:
        """The likelihood of the datum itself, near the estimate."""
        local = self.target.local(denoised.x_0_hat, 1.0)
        size = local.residual.shape[-1]
        none = torch.zeros(*local.residual.shape, size).to(local.residual)
        return Factor.at(local, local.rows, denoised.x_0_hat, none)

    def _between(
        self, x_t: Tensor, t: int, denoised: Denoised, local: Local, pulled: Tensor
    ) -> Factor:
        r""":math:`\phi` as a function of :math:`x_{t-1}`; see the module."""
        step = chain_step(t, self.diffusion.schedule)
        rise = self._entries(step.rise)
        inner = positive(pulled @ local.rows.mT)
        least = ridge(inner, 1e-12)
        solved = torch.cholesky_solve(pulled, root_of(inner + (pulled * rise) @ pulled.mT + least))
        rows = inner @ solved * self._entries(step.signal_prev / step.noise_prev**2)
        rise = rise.clamp(min=1e-8 * rise.amax())  # of entries whose log-SNR stays
        channel = (local.rows / rise) @ local.rows.mT
        half = torch.linalg.solve_triangular(root_of(inner + channel + least), inner, upper=False)
        root = root_of(inner - half.mT @ half + least)
        missing_dim = self.diffusion.process.missing_dim
        centre = posterior_mean(
            x_t.double(), denoised.x_0_hat.double(), step, missing_dim=missing_dim
        )
        return self._rounded(Factor.at(local, rows, centre, root))

    def _rounded(self, factor: Factor) -> Factor:
        """The factor, no narrower than what rounding of a state to the chain's dtype leaves."""
        eps = 4 * torch.finfo(self.diffusion.dtype).eps
        size = (eps * (1 + factor.centre.abs())).square()
        rounding = (factor.rows.square() @ size.unsqueeze(-1)).squeeze(-1)
        return factor._replace(variance=factor.variance + rounding)

    def _look_without_factor(self, x_1: Tensor) -> Ahead:
        """The look at :math:`x_1` where the data are levels, or the last kernel is not Gaussian."""
        return self._without_factor(*self._pulled(x_1, 1, 1.0))

    def _without_factor(self, denoised: Denoised, local: Local, pulled: Tensor) -> Ahead:
        r""":math:`\psi_t` alone, :math:`e^c N(e; 0, \Sigma_y + J C_t J^\top)`; the kernel is the proposal."""
        inner = positive(pulled @ local.rows.mT)
        covariance = inner + torch.diag_embed(local.variance.expand(local.residual.shape))
        log_psi = local.offset + log_normal(local.residual, root_of(covariance))
        return Ahead(denoised, None, log_psi)

    def _look_without_rows(self, x_t: Tensor, t: int) -> Ahead:
        denoised = self.walk.look(x_t, t)
        law = self._law(x_t, denoised)
        return Ahead(denoised, None, self.exponents[t] * self.target.expected(law))

    def _pulled(self, x_t: Tensor, t: int, exponent: float) -> tuple[Denoised, Local, Tensor]:
        r"""The denoiser's output, the expansion of :math:`r` there, and :math:`J C_t`, ``(K, M, m, D)``."""
        batch_shape, found = x_t.shape[:2], []

        def pull(denoised: Denoised, vjp: Callable[[Tensor], Tensor], part: slice) -> list[Tensor]:
            r""":math:`J_i \, \partial \hat x_0 / \partial x_t` for each row."""
            x_0_hat = denoised.x_0_hat
            local = self.target.local(
                x_0_hat.detach().reshape(*batch_shape, *self.event_shape), exponent
            )
            found.append(local)
            rows = local.rows.to(x_0_hat).expand(*batch_shape, *local.rows.shape[-2:])
            return [vjp(row.reshape(x_0_hat.shape)) for row in rows.unbind(-2)]

        denoised, products = self.walk.pulled(x_t, t, pull)
        step = chain_step(t, self.diffusion.schedule)
        pulled = torch.stack([x.flatten(2).double() for x in products], dim=-2)
        pulled = pulled * self._entries(step.tweedie)
        if self.covariances is not None:
            pulled = self.covariances.mixed(found[0].rows, pulled, t)
        return denoised, found[0], pulled

    def _last_kernel(self, x_1: Tensor, denoised: Denoised) -> Gaussians | None:
        """The kernel into the data in the chain's units, if it is Gaussian."""
        kernel: Any = self.diffusion.decode_inside(self.walk.seen(x_1), denoised)
        if not in_chains_units(self.diffusion, kernel, denoised):
            return None
        if not kernel.event_shape and self.event_shape:
            kernel = Independent(kernel, len(self.event_shape), validate_args=False)
        return as_gaussians(kernel, x_1.shape[:2])

    def _law(self, x_t: Tensor, denoised: Denoised) -> TorchDistribution:
        """Independent entries of the datum given a state, in the user's units."""
        if denoised.logits is not None and denoised.logits.shape == x_t.shape:  # bits
            law: TorchDistribution = Bernoulli(logits=denoised.logits)
            return law.to_event(len(self.event_shape))
        return self.walk.end(x_t, denoised)

    # Small parts.

    def _conjugate_draw(self, kernel: Gaussians, factor: Factor) -> Tensor:
        return self._states(Conjugate(kernel, factor).draw(self.noise))

    def _states(self, x: Tensor) -> Tensor:
        """Flattened float64 states ``(K, M, D)`` as states of the chain."""
        return x.to(self.diffusion.dtype).reshape(*x.shape[:2], *self.event_shape)

    def _in_slices(self, function: Callable[..., Any], *particles: Any) -> Any:
        """Apply a function to the particles, in slices of as many rows as the walk allows."""
        return in_slices(function, max(self.rows_at_a_time // self.columns, 1), *particles)

    def _entries(self, coefficient: Tensor) -> Tensor:
        """A coefficient of a step for each entry of a flattened state, ``(D,)``."""
        padded = pad(coefficient, self.diffusion.process.missing_dim, torch.float64)
        return padded.expand(self.event_shape).reshape(-1)
