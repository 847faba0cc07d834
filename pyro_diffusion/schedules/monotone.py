r"""A curve that is learned as a whole: one for all entries of a datum, or one for each.

The bound of the continuous chain depends on the ends of a curve alone, but the variance of its estimate
depends on the whole curve (Kingma et al., 2021, section 5). A learned curve must decrease for every value
of its parameters. :class:`MonotoneSchedule` therefore learns a positive density of time over the log-SNR
and inverts its integral.
"""

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_count, check_shape
from pyro_diffusion.schedules.curves import RangeSchedule


class MonotoneSchedule(RangeSchedule):
    r"""A learned curve with learned ends, which decreases for every value of its parameters.

    .. math::
        \lambda(u) = \lambda_{\min} + e^r \big(1 - s(u)\big), \qquad
        u = \int_0^{s(u)} f(s')\, ds' \Big/ \int_0^1 f(s')\, ds',

    where the density :math:`f > 0` is the share of time at each log-SNR. It is linear between its values
    :math:`f(k/K) = e^{\eta_k}`, :math:`k = 0 … K`. With ``event_shape`` every entry of a datum has a curve
    of its own.

    The bound of the continuous chain depends on the ends alone, and the ``SVI`` that trains the network
    trains them as well. The interior :math:`\eta` decides how noisy an estimate of the bound is, and
    ``MinimumVarianceELBO`` trains it for low variance::

        elbo = MinimumVarianceELBO(schedule.interior)
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), elbo)

    Args:
        num_timesteps: Number of steps :math:`T`.
        log_snr_max: :math:`\lambda(0)` to start from.
        log_snr_min: :math:`\lambda(1)` to start from.
        num_pieces: Number of pieces :math:`K`.
        event_shape: Shape of a datum whose entries have curves of their own; empty for a single curve.

    Raises:
        ValueError: ``num_timesteps`` or ``num_pieces`` is below one, or the ends do not decrease.

    Example:
        >>> schedule = MonotoneSchedule(1000, log_snr_max=10.0)
        >>> schedule.log_snr(torch.tensor([1, 1000]))
        tensor([10.0000, -8.0000], dtype=torch.float64, grad_fn=<WhereBackward0>)

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendix H. https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        *,
        log_snr_max: float | Tensor = 8.0,
        log_snr_min: float | Tensor = -8.0,
        num_pieces: int = 24,
        event_shape: tuple[int, ...] = (),
    ) -> None:
        event_shape = check_shape("event_shape", event_shape, "Pass (2,) for pairs of numbers.")
        super().__init__(
            num_timesteps, log_snr_max, log_snr_min, event_shape=event_shape, learnable=True
        )
        num_pieces = check_count("num_pieces", num_pieces, 1, "24 come close to the best curve.")
        #: :math:`\eta`, of ``event_shape + (K + 1,)``, which ``MinimumVarianceELBO`` trains
        self.interior = nn.Parameter(torch.zeros(*event_shape, num_pieces + 1, dtype=torch.float64))

    def _invert(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`s(u)` and the normalised :math:`f(s(u))`, each of ``u``'s shape + ``event_shape``."""
        f, pieces = (self.interior - self.interior.amax(-1, keepdim=True)).exp(), self.num_pieces
        shares = (f[..., 1:] + f[..., :-1]) / (2 * pieces)
        total = shares.sum(-1, keepdim=True)
        f, shares = f / total, shares / total
        edges = torch.cat((torch.zeros_like(shares[..., :1]), shares.cumsum(-1)), -1)
        flat = u.double().flatten().expand(*self.event_shape, -1).contiguous()
        piece = torch.searchsorted(edges.detach()[..., 1:-1].contiguous(), flat, right=True)
        start, left, right = (
            x.gather(-1, piece) for x in (edges[..., :-1], f[..., :-1], f[..., 1:])
        )
        # u − u_k = (f_k τ + (f_{k+1} − f_k) τ²/2) / K, solved for τ in [0, 1]
        ahead = ((flat - start) * pieces).clamp(min=0)
        here = (left.square() + 2 * (right - left) * ahead).clamp(min=0).sqrt()
        tau = (2 * ahead / (left + here)).clamp(max=1)
        shape = u.shape + self.event_shape
        return (
            ((piece + tau) / pieces).movedim(-1, 0).reshape(shape),
            here.movedim(-1, 0).reshape(shape),
        )

    @property
    def num_pieces(self) -> int:
        """Number :math:`K` of pieces into which the range of the log-SNR is cut."""
        return self.interior.shape[-1] - 1

    def log_snr_at(self, u: Tensor) -> Tensor:
        return self.log_snr_min + self.log_range.exp() * (1 - self._invert(u)[0])

    def slope_at(self, u: Tensor) -> Tensor:
        return -self.log_range.exp() / self._invert(u)[1]

    def extra_repr(self) -> str:
        shape = f", event_shape={tuple(self.event_shape)}" if self.event_dim else ""
        return f"{super().extra_repr()}, num_pieces={self.num_pieces}{shape}"
