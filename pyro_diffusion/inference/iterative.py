r"""Measurements of many numbers: conjugate gradients in place of a vector-Jacobian product for each number.

For orthonormal rows :math:`V` and a measurement :math:`y = V x_0 + n` of :math:`m` numbers, the mean of
:math:`x_{t-1}` given :math:`x_t` and :math:`y` needs one solution of a linear system,

.. math::
    S_t w = y - V \hat x_0(x_t), \qquad S_t = \Sigma_y + V C_t V^\top, \qquad
    E[x_{t-1} \mid x_t, y] \approx E[x_{t-1} \mid x_t] + b_t\, C_t V^\top w,

with :math:`C_t = \operatorname{Cov}[x_0 \mid x_t]` and :math:`b_t` the weight of :math:`x_0` in
:math:`\tilde\mu_t`. Each step of the method of conjugate gradients takes one vector-Jacobian product of the
network. The determinant of :math:`S_t`, and the shrinkage of the kernel's covariance along the rows, would
need all of it. They take its diagonal instead, with the mean variances :math:`c_{t,i}` of :math:`V_i x_0`
given :math:`x_t`, which draws of the model show (:mod:`~pyro_diffusion.inference.covariance`):

.. math::
    \log \psi_t &= -\tfrac12 (y - V \hat x_0)^\top w - \tfrac12 \sum_i \log 2 \pi (\Sigma_{y,i} + c_{t,i}), \\
    x_{t-1} &= E[x_{t-1} \mid x_t] + b_t C_t V^\top w
        + \Sigma_t^{1/2} \big(I - V^\top (I - \operatorname{diag} (1 - \rho_t)^{1/2}) V\big) z .

The weights are exact whatever the solution is. The last step, into the data, is the conjugate one of
:mod:`~pyro_diffusion.inference.twisted`.

References:
    Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024), section 4.
    https://arxiv.org/abs/2405.13712
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.inference.conjugate import Gaussians, as_gaussians
from pyro_diffusion.inference.covariance import Covariances
from pyro_diffusion.inference.targets import Basis, log_independent, of_columns
from pyro_diffusion.inference.twisted import Ahead, Path
from pyro_diffusion.processes.gaussian import chain_step, mean_coefficients
from pyro_diffusion.reading import BUDGET

__all__ = ["MANY", "ManyRows", "solve"]

MANY = 64  #: measured numbers above which a system is solved by conjugate gradients
_STEPS = 8  # of conjugate gradients, at most
_TOLERANCE = 1e-3  # relative size of the residuals at which they end


class ManyRows(Path):
    """Particles on their way, with many measured numbers: :class:`~pyro_diffusion.inference.twisted.Path`."""

    covariances: Covariances

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        basis, columns = self.target.basis(), self.shape[1]
        self.basis = Basis(*(of_columns(x, columns) if len(x) > 1 else x for x in basis))
        self.of_entries = bool((self.basis.rows.abs().sum(-1) < 1 + 1e-9).all())

    def start(self) -> Tensor:
        kernel = as_gaussians(self.walk.start(), torch.Size(self.shape))
        assert kernel is not None  # the prior of a process with a score
        return self._states(kernel.draw(self.noise))

    def _variance(self, t: int) -> Tensor:
        """:math:`c_{t,i}`, ``(1, M, m)`` or ``(1, 1, m)``."""
        errors = self.covariances.errors[t].double().unsqueeze(1)
        if len(self.basis.rows) > 1:
            errors = errors.expand(-1, len(self.basis.rows), -1)
        return self.basis.project(errors).square().mean(0, keepdim=True)

    def look(self, x_t: Tensor, t: int) -> Ahead:
        if t == 1:  # the rows of all measured numbers for each particle, if they do not decouple
            self.rows_at_a_time = max(1, int(BUDGET / 256 / self.basis.rows.shape[-2:].numel()))
        return super().look(x_t, t)

    def _look(self, x_t: Tensor, t: int) -> Ahead:
        if t == 1:
            return self._last_look(x_t)
        step, found = chain_step(t, self.diffusion.schedule), []
        tweedie = self._entries(step.tweedie)
        weight = self._entries(mean_coefficients(step)[0])
        noise = self.basis.variance / self.exponents[t - 1]
        diagonal, trust = noise + self._variance(t), self.covariances.trust[t]

        def pull(denoised: Denoised, vjp: Callable[[Tensor], Tensor], part: slice) -> list[Tensor]:
            """:math:`b_t C_t V^\\top w`."""
            x_0_hat = denoised.x_0_hat.detach()

            def covariance(rows: Tensor) -> Tensor:
                """:math:`C_t V^\\top p`."""
                e = self.basis.lift(rows)
                product = vjp(e.to(x_0_hat).reshape(x_0_hat.shape)).double()
                mean = self.covariances.mean(e, t)
                return trust * tweedie * product.reshape(e.shape) + (1 - trust) * mean

            miss = self.basis.values - self.basis.project(
                x_0_hat.double().reshape(*x_t.shape[:2], -1)
            )
            solution = solve(
                lambda p: noise * p + self.basis.project(covariance(p)), miss, diagonal
            )
            found.append((miss * solution).sum(-1))
            return [(weight * covariance(solution)).reshape(x_0_hat.shape)]

        denoised, (push,) = self.walk.pulled(x_t, t, pull)
        log_psi = -0.5 * found[0] - 0.5 * (2 * math.pi * diagonal).log().sum(-1)
        return Ahead(denoised, None, log_psi, push.flatten(2))

    def _last_look(self, x_1: Tensor) -> Ahead:
        denoised = self.walk.look(x_1, 1)
        kernel = self._last_kernel(x_1, denoised)
        spread = self._decoupled(kernel)
        if kernel is None or spread is None:
            return super()._look(x_1, 1)
        miss = self.basis.values - self.basis.project(kernel.means[..., 0, :])
        log_z = log_independent(miss, spread + self.basis.variance)
        return Ahead(denoised, None, log_z + self.basis.offset)

    def _look_without_factor(self, x_1: Tensor) -> Ahead:
        denoised = self.walk.look(x_1, 1)
        miss = self.basis.values - self.basis.project(denoised.x_0_hat.double().flatten(2))
        log_psi = log_independent(miss, self.basis.variance + self._variance(1))
        return Ahead(denoised, None, log_psi)

    def _next(self, t: int, x_t: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
        kernel = as_gaussians(self.walk.kernel(x_t, t, ahead.denoised), x_t.shape[:2])
        assert kernel is not None  # checked before the runs
        assert ahead.push is not None
        mean, scale = kernel.means[..., 0, :], kernel.scale[..., 0, :]
        step = chain_step(t, self.diffusion.schedule)
        rise = self.basis.along(self._entries(step.rise))
        gain = self.basis.along(self._entries(step.signal_prev / step.noise_prev**2))
        later = self._variance(t)
        later = later / (1 + rise * later)
        noise = self.basis.variance / self.exponents[t - 1] + later
        kept = noise / (noise + (gain * later).square() * self.basis.along(scale.square()))
        z = self.noise.normal(mean)
        shrunk = z + self.basis.lift((kept.sqrt() - 1) * self.basis.project(z))
        x = mean + ahead.push + scale * shrunk
        log_q = -0.5 * z.square().sum(-1) - 0.5 * kept.log().sum(-1)
        log_p = -0.5 * ((x - mean) / scale).square().sum(-1)
        return self._states(x), ahead.log_psi + log_q - log_p

    def _decoupled(self, kernel: Gaussians | None) -> Tensor | None:
        r"""The diagonal of :math:`V \Sigma V^\top` of a kernel into the data, if it is all of it."""
        if kernel is None or not kernel.diagonal or kernel.means.shape[-2] > 1:
            return None
        if not self.target.is_exact:
            return None
        scale = kernel.scale[..., 0, :]
        same = self.of_entries or bool((scale == scale[..., :1]).all())
        return self.basis.along(scale.square()) if same else None

    def _drawn_at_the_end(self, kernel: Gaussians, denoised: Denoised) -> Tensor:
        spread = self._decoupled(kernel)
        if spread is None:
            return super()._drawn_at_the_end(kernel, denoised)
        x, variance = kernel.draw(self.noise), self.basis.variance
        n = variance.sqrt() * self.noise.normal(spread)
        gain = spread / (spread + variance)
        moved = x + self.basis.lift(gain * (self.basis.values - self.basis.project(x) - n))
        return self._states(moved)


def solve(times: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Conjugate gradients for systems ``S w = e`` of all particles, with a diagonal preconditioner.

    Args:
        times: The product with :math:`S`.
        right: :math:`e`, ``(K, M, m)``.
        diagonal: About the diagonal of :math:`S`, positive.

    Returns:
        ``w``, after at most 8 steps. A particle stops where a learned :math:`S` is not positive.
    """
    w, residual = torch.zeros_like(right), right
    z = residual / diagonal
    direction, size = z, (residual * z).sum(-1, keepdim=True)
    enough = _TOLERANCE**2 * size
    for _ in range(_STEPS):
        product = times(direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        going = (curvature > 0) & (size > enough)
        if not going.any():
            break
        length = torch.where(going, size / curvature.clamp(min=1e-300), 0.0)
        w, residual = w + length * direction, residual - length * product
        z = residual / diagonal
        new = (residual * z).sum(-1, keepdim=True)
        direction = z + new / size.clamp(min=1e-300) * direction
        size = torch.where(going, new, 0.0)
    return w
