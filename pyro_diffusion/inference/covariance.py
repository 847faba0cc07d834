r"""How far the Jacobian of a learned estimate is a covariance, and what stands in for it where it is not.

For the exact estimate, :math:`C_t(x_t) = \operatorname{Cov}[x_0 \mid x_t]` is the Jacobian of
:math:`\hat x_0` times :math:`\sigma_t^2 / a_t`. A network learns :math:`\hat x_0` and not its Jacobian.
At large :math:`t` the factor :math:`1 / a_t` magnifies what is wrong with it. Draws :math:`x_{0:T}` of the
model show both how wrong it is and what the covariance is on average,

.. math::
    \bar C_t = E\big[(x_0 - \hat x_0(x_t)) (x_0 - \hat x_0(x_t))^\top\big],

which is the covariance itself where it does not depend on the state, as for :math:`t \to T`. The mixture

.. math::
    \beta_t\, C_t(x_t) + (1 - \beta_t)\, \bar C_t

stands in for :math:`C_t(x_t)`. Its :math:`\beta_t \in [0, 1]` is the least-squares coefficient for
predicting the squares :math:`s = (z^\top (x_0 - \hat x_0))^2` of the draws, for random directions :math:`z`,
from :math:`q = z^\top C_t z` and :math:`\bar s = E s`:

.. math::
    \beta_t = \frac{\sum (s - \bar s)(q - \bar s)}{\sum (q - \bar s)^2},

with sums over draws, directions and neighbouring timesteps, of numbers divided by the :math:`\bar s` of their
timestep. It takes up to 256 draws of the model, with two vector-Jacobian products a step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.given import Given, together
from pyro_diffusion.inference.conjugate import ridge
from pyro_diffusion.processes import pad
from pyro_diffusion.processes.gaussian import chain_step
from pyro_diffusion.reading import BUDGET
from pyro_diffusion.walk import ReverseWalk

__all__ = ["Covariances"]

_DRAWS = 256  # of the model, at most
_DIRECTIONS = 2
_LEAST = 0.02  # of the mean covariance, along a direction


class Covariances:
    r"""The covariance of the datum given a state.

    Attributes:
        errors: :math:`x_0 - \hat x_0(x_t)` of draws in row ``t``, ``(T + 1, n, D)``, float32.
        trust: :math:`\beta_t`, ``(T + 1,)``.
        least: The variance of the last kernel, ``(D,)``, which no covariance of the chain can be below.
    """

    def __init__(self, errors: Tensor, trust: Tensor, least: Tensor) -> None:
        self.errors, self.trust, self.least = errors, trust, least

    @classmethod
    def of_draws(cls, diffusion: DiffusionModel, given: Given, num_data: int) -> "Covariances":
        """From draws of the model, with the contexts of ``num_data`` data in turn."""
        length, size = diffusion.schedule.num_timesteps, diffusion.event_shape.numel()
        count = int(min(_DRAWS, max(16, BUDGET / 4 / (4 * length * size))))
        numbers = torch.arange(count, device=diffusion.device) % num_data
        _, given = together(lambda x: x[numbers], numbers, given)
        walk = ReverseWalk(diffusion, given=given)
        x_t, estimates, forms = walk.start().sample((1, count)), [], []
        z = torch.randint(2, (_DIRECTIONS, 1, count, *diffusion.event_shape)).to(x_t) * 2 - 1

        def pull(denoised: Denoised, vjp: Callable[[Tensor], Tensor], part: slice) -> list[Tensor]:
            """:math:`z^\\top \\partial \\hat x_0 / \\partial x_t`."""
            return [vjp(direction.reshape(denoised.x_0_hat.shape)) for direction in z]

        for t in walk.timesteps:
            denoised, pulled = walk.pulled(x_t, t, pull)
            tweedie = chain_step(t, diffusion.schedule).tweedie
            tweedie = pad(tweedie, diffusion.process.missing_dim, torch.float64)
            products = (torch.stack(pulled).double() * tweedie * z).flatten(3).sum(-1)
            forms.append(products[:, 0])
            estimates.append(denoised.x_0_hat[0].flatten(1))
            if t > 1:
                x_t = walk.kernel(x_t, t, denoised).sample()
        kernel: Any = diffusion.decode_inside(walk.seen(x_t), denoised)
        x_0, least = denoised.x_0_hat, torch.zeros_like(x_t)
        if not kernel.support.is_discrete:
            x_0, least = kernel.sample(), kernel.variance
        x_0 = x_0.reshape(count, -1)
        least = least.expand(x_t.shape).double().flatten(2).mean((0, 1))
        errors = torch.stack([x_0 - estimate for estimate in estimates[::-1]])
        realised = torch.einsum("tnd,knd->tkn", errors.double(), z[:, 0].flatten(2).double())
        trust = _trust(realised.square(), torch.stack(forms[::-1]))
        zero = torch.zeros_like(errors[:1])
        return cls(torch.cat((zero, errors)).float(), torch.cat((trust[:1], trust)), least)

    def exactly(self) -> "Covariances":
        """The same for a denoiser whose Jacobian is exact."""
        return type(self)(self.errors, torch.ones_like(self.trust), self.least)

    def mean(self, rows: Tensor, t: int) -> Tensor:
        r""":math:`J \bar C_t` for rows ``(…, m, D)``, of the same shape."""
        errors = self.errors[t].double()
        return (rows @ errors.mT) @ errors / len(errors)

    def mixed(self, rows: Tensor, pulled: Tensor, t: int) -> Tensor:
        r""":math:`J C_t` from rows :math:`J` and the Jacobian's :math:`J C_t`, ``(K, M, m, D)``.

        What :math:`J C_t J^\top` has beyond the last kernel's variance is at least a fiftieth of
        :math:`J \bar C_t J^\top` in every direction. Where it is negative, it gets its absolute value.
        """
        mean, least = self.mean(rows, t), rows * self.least
        pulled = self.trust[t] * pulled + (1 - self.trust[t]) * mean
        half = _scale(mean @ rows.mT)
        relative = torch.linalg.solve_triangular(half, (pulled - least) @ rows.mT, upper=False)
        relative = torch.linalg.solve_triangular(half, relative.mT, upper=False)
        gram = rows @ rows.mT
        empty = gram.diagonal(dim1=-2, dim2=-1) == 0  # rows that only fill up
        relative = 0.5 * (relative + relative.mT) + torch.diag_embed(empty.double())
        unit = torch.eye(gram.shape[-1]).to(gram)
        failed = torch.linalg.cholesky_ex(relative - _LEAST * unit)[1] > 0
        if not failed.any():
            return pulled
        values, vectors = torch.linalg.eigh(relative[failed])
        lifted = torch.where(values < _LEAST, values.abs().clamp(min=_LEAST) - values, 0.0)
        half, rows, gram = (
            x.expand(*failed.shape, *x.shape[-2:])[failed] for x in (half, rows, gram)
        )
        change = half @ (vectors * lifted.unsqueeze(-2)) @ vectors.mT @ half.mT
        onto = torch.linalg.solve(gram + ridge(gram, 1e-10), rows)
        pulled = pulled.clone()
        pulled[failed] += change @ onto
        return pulled


def _scale(inner: Tensor) -> Tensor:
    """A root of a covariance that draws gave, a tenth of which is spread over all directions."""
    return torch.linalg.cholesky(0.9 * inner + ridge(inner, 0.1))


def _trust(realised: Tensor, forms: Tensor) -> Tensor:
    r""":math:`\beta_t` from squares and quadratic forms ``(T, k, n)``, shape ``(T,)``."""
    typical = realised.mean((1, 2), keepdim=True).clamp(min=1e-300)
    s, q = realised / typical - 1, forms / typical - 1
    above, below = (s * q).mean((1, 2)), q.square().mean((1, 2))
    width = 2 * (len(above) // 20) + 1  # neighbours on both sides

    def smooth(x: Tensor) -> Tensor:
        """Mean over neighbouring timesteps."""
        padded = torch.nn.functional.pad(x[None, None], (width // 2, width // 2), mode="replicate")
        return torch.nn.functional.avg_pool1d(padded, width, 1)[0, 0]

    return (smooth(above) / smooth(below).clamp(min=1e-300)).clamp(0, 1)
