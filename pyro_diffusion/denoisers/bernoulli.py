r"""Denoisers of bits: reverse kernels that act bit by bit, from the probability of a one.

The kernel follows from :math:`\pi_i(x_t)`, the probability that :math:`x_{0,i}` is one; see
:class:`~pyro_diffusion.processes.BernoulliProcess`. It is the best kernel that acts bit by bit if
:math:`\pi_i` is exact. :class:`EnumeratedDenoiser` computes the exact one from a list of all values of the
data.
"""

from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_diffusion.checks import as_numbers, check_between, check_values, require, widened
from pyro_diffusion.denoisers.base import Denoiser, Networked, check_network
from pyro_diffusion.processes import BernoulliProcess, Denoised, check_fixed_curve
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class BernoulliDenoiser(Denoiser, ABC):
    r"""Reverse kernels of bits from :math:`\pi(x_t)`; ``x_0_hat`` is that probability.

    Args:
        schedule: Noise schedule, :math:`\bar\alpha_t` the share of bits that were never drawn anew.
        event_shape: Shape of one datum.
        rate: :math:`r` in (0, 1), the rate of ones among bits that are all noise.

    Raises:
        ValueError: A rate outside (0, 1), a schedule that is learned or has a curve for each entry, or data
            other than 0 and 1.
    """

    def __init__(
        self, schedule: NoiseSchedule, event_shape: tuple[int, ...], rate: float = 0.5
    ) -> None:
        super().__init__(schedule, event_shape)
        meaning = "the probability of a one among bits that are all noise"
        self.rate = check_between("rate", rate, 0, 1, meaning, "Take the mean of the data, or 0.5.")
        check_fixed_curve(schedule, "bits")

    @abstractmethod
    def logits(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        r""":math:`\log \pi / (1 - \pi)`, ``batch_shape + event_shape``, for bits ``x_t``."""

    @property
    def process(self) -> BernoulliProcess:
        return BernoulliProcess(self.schedule, self.event_shape, self.rate)

    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        self.batch_shape(x_t)
        logits = self.logits(x_t, log_snr)
        return Denoised(logits.sigmoid(), logits)

    def decode(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        return dist.Bernoulli(logits=denoised.logits).to_event(self.event_dim)

    def embed(self, x_0: Tensor) -> Tensor:
        bits = widened(x_0 if x_0.is_floating_point() else x_0.to(self.dtype))
        proper, remedy = (bits == 0) | (bits == 1), "Map spins of ±1 by (s + 1) / 2."
        return check_values("site 'x_0'", bits, proper, "bits, 0 and 1", remedy)

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, rate={self.rate}"


class NeuralBernoulliDenoiser(Networked, BernoulliDenoiser):
    r""":math:`\pi` from a network, which predicts each bit given all others.

    The known law of :math:`x_{t,i}` turns the network's logits :math:`\ell_i` into those of the posterior,

    .. math::
        \log \frac{\pi_i}{1 - \pi_i} = \ell_i
            + \log \frac{q(x_{t,i} \mid x_{0,i} = 1)}{q(x_{t,i} \mid x_{0,i} = 0)},

    so that a network whose output is zero is exact for independent fair bits.

    Args:
        network: Called as ``network(x_t, log_snr)`` with bits as −1 and 1, shape ``(B,) + event_shape``, and
            ``log_snr`` of shape ``(B,)``; its output has the shape of ``x_t``.
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum.
        rate: :math:`r`, the rate of ones among bits that are all noise.

    Raises:
        ValueError: As for :class:`BernoulliDenoiser`; an output of the network that has another shape or is
            not finite.

    Example:
        >>> denoiser = NeuralBernoulliDenoiser(MLP((20,)), LinearDecaySchedule(200), event_shape=(20,))
        >>> denoiser.x_0_hat(torch.ones(3, 20), torch.tensor(0.0)).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        event_shape: tuple[int, ...],
        *,
        rate: float = 0.5,
    ) -> None:
        super().__init__(schedule, event_shape, rate)
        self.network = check_network(network, "MLP((20,))")

    def denoise(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Denoised:
        logits = self.logits(x_t, log_snr, context, null)
        return Denoised(logits.sigmoid(), logits)

    def logits(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Tensor:
        spins = 2 * x_t - 1
        output = self.call_network(
            spins,
            log_snr,
            self.batch_shape(x_t),
            needed_by=("a chain of bits",),
            context=context,
            null=null,
        )
        same, other = self.process.log_noise_ratio(x_t, log_snr)
        return output + spins * (same - other)


class EnumeratedDenoiser(BernoulliDenoiser):
    r"""The best reverse kernel that acts bit by bit, from a list of all values of the data: an oracle.

    .. math::
        \pi_i(x_t) = \sum_k P(k \mid x_t)\, x^{(k)}_i, \qquad
        P(k \mid x_t) \propto w_k \prod_i q\big(x_{t,i} \mid x_0 = x^{(k)}_i\big).

    Its bound is the largest that any network can have under this chain. The bound is below :math:`\log p`,
    because the kernel changes bits independently, and in the true chain they may change together.

    Args:
        data: All values of the data, bits, shape ``(K,) + event_shape``.
        schedule: Noise schedule of the chain.
        weights: Their probabilities, ``(K,)``. They are normalised, and equal by default.
        rate: :math:`r`, the rate of ones among bits that are all noise.

    Raises:
        ValueError: Data that are not bits, or weights that do not fit.

    Example:
        >>> heartbeats = torch.eye(5).repeat(1, 4)
        >>> denoiser = EnumeratedDenoiser(heartbeats, LinearDecaySchedule(200))
        >>> denoiser.x_0_hat(heartbeats[:1], torch.tensor(6.0))[0, :5].round()
        tensor([1., 0., 0., 0., 0.])
    """

    values: Tensor
    log_weights: Tensor

    def __init__(
        self,
        data: Tensor,
        schedule: NoiseSchedule,
        weights: Tensor | None = None,
        *,
        rate: float = 0.5,
    ) -> None:
        data = as_numbers("data", data)
        super().__init__(schedule, tuple(data.shape[1:]), rate)
        data = data if data.is_floating_point() else data.to(torch.get_default_dtype())
        count = len(data) if data.dim() else 0
        weights = torch.ones(count) if weights is None else as_numbers("weights", weights)
        fit = data.dim() > 1 and weights.shape == data.shape[:1]
        require(
            fit and bool((weights > 0).all()),
            "arguments 'data' and 'weights'",
            f"shapes {tuple(data.shape)} and {tuple(weights.shape)}",
            "(K,) + event_shape, every value once, and K positive weights",
            "Leave out values of probability zero.",
        )
        self.register_buffer("values", data.clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(data))
        self.embed(data)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the data."""
        return self.values.dtype

    def logits(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        same, other = self.process.log_noise_ratio(x_t, log_snr)
        values, spins = self.values.flatten(1), (2 * self.values - 1).flatten(1)
        # log q(x_t | x_0) of every value: a sum over bits, of one number if they agree and another if not
        flat_spins, flat_difference = (
            (2 * x_t - 1).flatten(-self.event_dim),
            (same - other).flatten(-self.event_dim),
        )
        with torch.autocast(
            x_t.device.type, enabled=False
        ):  # a sum of thousands, in half precision
            log_share = self.log_weights + 0.5 * (flat_spins * flat_difference) @ spins.mT
        log_share = log_share.log_softmax(-1).unsqueeze(-1)
        ones = torch.where(values == 1, log_share, -torch.inf).logsumexp(-2)
        zeros = torch.where(values == 0, log_share, -torch.inf).logsumexp(-2)
        # If a bit is the same in all data, its logit is large and finite.
        limit = -(torch.finfo(x_t.dtype).max ** 0.25)
        return (ones.clamp(min=limit) - zeros.clamp(min=limit)).reshape(x_t.shape)
