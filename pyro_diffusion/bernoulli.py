r"""Binomial kernels: diffusion of bits, by the same chains.

Each step keeps a bit with probability :math:`\alpha_t` and draws it anew, at a given rate, otherwise:

.. math::
    q(x_t \mid x_{t-1}) = \mathrm{Bernoulli}\big(\alpha_t x_{t-1} + (1 - \alpha_t)\, r\big), \qquad
    q(x_t \mid x_0) = \mathrm{Bernoulli}\big(\bar\alpha_t x_0 + (1 - \bar\alpha_t)\, r\big).

A schedule's :math:`\bar\alpha_t` means that share here. A reverse kernel that acts bit by bit follows from
:math:`\pi_i(x_t)`, the probability that :math:`x_{0,i}` is one,

.. math::
    p(x_{t-1,i} \mid x_t) = \sum_{b \in \{0, 1\}} \pi_i(x_t)^b\, (1 - \pi_i(x_t))^{1-b}\;
        q(x_{t-1,i} \mid x_{t,i}, x_{0,i} = b),

and is the best of its kind where :math:`\pi_i` is exact: :class:`EnumeratedDenoiser` has it from all the data
there are. Kernels are written in the probability that a bit *changes* in a step, a small number that nothing
is subtracted to get. As :math:`T \to \infty` it becomes a rate, and a step's KL that of two Poisson counts.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), table 1 and
    appendix B.2. https://arxiv.org/abs/1503.03585
    A Continuous Time Framework for Discrete Denoising Models (Campbell et al., 2022), section 3.
    https://arxiv.org/abs/2205.14987
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.checks import check_argument, holds
from pyro_diffusion.denoisers import Denoised, Denoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.distributions import Changes, Noise
from pyro_diffusion.kernels import pad
from pyro_diffusion.networks import network_dtype
from pyro_diffusion.schedules import NoiseSchedule

__all__ = [
    "BernoulliDenoiser",
    "BernoulliDiffusion",
    "EnumeratedDenoiser",
    "NeuralBernoulliDenoiser",
]


class BernoulliDenoiser(Denoiser, ABC):
    r"""Reverse kernels of bits from :math:`\pi(x_t)`; ``x_0_hat`` is that probability.

    Args:
        schedule: Noise schedule, :math:`\bar\alpha_t` the share of bits that were never drawn anew.
        event_shape: Shape of one datum.
        rate: :math:`r` in (0, 1), the rate that bits decay to.

    Raises:
        ValueError: A rate outside (0, 1), a schedule that is learned or by dimension, or data other than 0
            and 1.
    """

    states: ClassVar[str] = "bits"

    def __init__(
        self, schedule: NoiseSchedule, event_shape: tuple[int, ...], rate: float = 0.5
    ) -> None:
        super().__init__(schedule, event_shape)
        if not isinstance(rate, int | float) or not 0 < rate < 1:
            raise ValueError(
                f"argument 'rate': got {rate!r}; expected a number in (0, 1), the probability of a one among "
                "bits that are all noise. The mean of the data, or 0.5."
            )
        if schedule.event_dim or any(p.requires_grad for p in schedule.parameters()):
            raise ValueError(
                f"argument 'schedule': got {schedule}, learned or with a curve for each entry; expected "
                "a single fixed curve, because draws of bits have no gradient. Use LinearDecaySchedule(1000) "
                "or schedule.requires_grad_(False)."
            )
        self.rate = float(rate)

    @abstractmethod
    def logits(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        r""":math:`\log \pi / (1 - \pi)`, ``batch_shape + event_shape``, for bits ``x_t``."""

    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        self._batch_shape(x_t)
        logits = self.logits(x_t, log_snr)
        return Denoised(logits.sigmoid(), logits)

    def reverse_kernel(
        self, x_t: Tensor, t: int | Tensor, denoised: Denoised
    ) -> dist.TorchDistribution:
        changed = self.expected(self.change(t, x_t), x_t, denoised)
        return Noise(logits=signed_logits(changed, x_t)).to_event(self.event_dim)

    def expected(self, of_same: tuple[Tensor, Tensor], x_t: Tensor, denoised: Denoised) -> Tensor:
        """The mean over the datum's bit of a number given whether it is the state's bit or not."""
        assert denoised.logits is not None
        is_same = (denoised.logits * (2 * x_t - 1)).sigmoid()
        is_other = (-denoised.logits * (2 * x_t - 1)).sigmoid()
        return is_same * of_same[0] + is_other * of_same[1]

    def decode(self, x_1: Tensor, denoised: Denoised) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=denoised.logits).to_event(self.event_dim)

    def embed(self, x_0: Tensor) -> Tensor:
        bits = x_0 if x_0.is_floating_point() else x_0.to(self.dtype)
        proper = (bits == 0) | (bits == 1)
        if not holds(proper):
            raise ValueError(
                f"site 'x_0': got the value {bits[~proper][0].item():g}; expected bits, 0 and 1. Map spins "
                "of ±1 by (s + 1) / 2."
            )
        return bits

    def score(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        """Refused: bits have no gradient.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"argument 'x_t': got states of a {type(self).__name__}; expected real numbers, because bits "
            "have no score. Take x_0_hat, the probability of a one."
        )

    def change(self, t: int | Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`q(x_{t-1,i} \ne x_{t,i} \mid x_t, x_0)` if :math:`x_{0,i}` is the same bit, and if not."""
        t = self.schedule.check_timestep(t, at_least=1)
        return self._change(
            self.schedule.beta(t), self.schedule.log_snr(t - 1), self.schedule.log_snr(t), x_t
        )

    def change_rate(self, u: Tensor, x_u: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the continuous chain, a rate in units of its time."""
        log_snr = self.schedule.log_snr_at(u)
        drawn = -self.schedule.slope_at(u) * (-log_snr).sigmoid()
        return self._change(drawn, log_snr, log_snr, x_u)

    def _change(
        self, drawn: Tensor, log_snr_before: Tensor, log_snr: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bayes' rule for a bit that was drawn anew, and was the other before; sums of positive numbers."""
        levels = (log_snr_before, -log_snr_before, log_snr, -log_snr)
        drawn, kept_before, lost_before, kept, lost = (
            pad(c, self.event_dim, x.dtype) for c in (drawn, *(level.sigmoid() for level in levels))
        )
        one, other = self.rates(x)
        same = drawn * one * lost_before * other / (kept + lost * one)
        if_other = drawn * (kept_before + lost_before * other) / lost
        return same, if_other

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How often noise has the bits of ``x``, and how often the others."""
        one = torch.where(x == 1, self.rate, 1 - self.rate).to(x.dtype)
        return one, 1 - one

    def log_noise_ratio(self, x_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log q(x_{t,i} \mid x_{0,i})` where the two are the same bit, and where not."""
        kept, noise = (
            pad(f, self.event_dim, x_t.dtype) for f in (log_snr.sigmoid(), (-log_snr).sigmoid())
        )
        one, _ = self.rates(x_t)
        return (kept + noise * one).log(), (noise * one).log()

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, rate={self.rate}"


class NeuralBernoulliDenoiser(BernoulliDenoiser):
    r""":math:`\pi` from a network, which predicts each bit given all others.

    With the known law of :math:`x_{t,i}` its logits :math:`\ell_i` become the posterior's,

    .. math::
        \log \frac{\pi_i}{1 - \pi_i} = \ell_i
            + \log \frac{q(x_{t,i} \mid x_{0,i} = 1)}{q(x_{t,i} \mid x_{0,i} = 0)},

    so that a network of zeros is exact for independent fair bits.

    Args:
        network: Called as ``network(x_t, log_snr)`` with bits as −1 and 1, shape ``(B,) + event_shape``, and
            ``log_snr`` of shape ``(B,)``; its output has the shape of ``x_t``.
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum.
        rate: :math:`r`, the rate that bits decay to.

    Raises:
        ValueError: As :class:`BernoulliDenoiser`; a network with an output of another shape, or one that is
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
        self.network = check_argument("network", network, nn.Module, "MLP((20,))")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's first parameter; float32 for a network of half precision."""
        return torch.promote_types(network_dtype(self.network), torch.float32)

    def logits(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        batch_shape = self._batch_shape(x_t)
        spins = 2 * x_t - 1
        flat, dtype = spins.reshape(-1, *self.event_shape), network_dtype(self.network)
        output = self.network(flat.to(dtype), log_snr.expand(batch_shape).reshape(-1).to(dtype))
        if output.shape != flat.shape or not holds(output.isfinite()):
            raise ValueError(
                f"argument 'network': got an output of shape {tuple(output.shape)}, or one with NaN or "
                f"infinite values; expected finite numbers of shape {tuple(flat.shape)}, one for each bit. "
                "Lower the learning rate, and keep the batch axis in front."
            )
        same, other = self.log_noise_ratio(x_t, log_snr)
        return output.reshape(x_t.shape).to(x_t.dtype) + spins * (same - other)


class EnumeratedDenoiser(BernoulliDenoiser):
    r"""The best reverse kernel that acts bit by bit, from all data there are: an oracle.

    .. math::
        \pi_i(x_t) = \sum_k P(k \mid x_t)\, x^{(k)}_i, \qquad
        P(k \mid x_t) \propto w_k \prod_i q\big(x_{t,i} \mid x_0 = x^{(k)}_i\big).

    Its bound is the largest that any network can have under this chain: below :math:`\log p`, because bits
    that change together in one step change independently under the kernel.

    Args:
        data: All values of the data, bits, shape ``(K,) + event_shape``.
        schedule: Noise schedule of the chain.
        weights: Their probabilities, ``(K,)``, normalised here; equal ones by default.
        rate: :math:`r`, the rate that bits decay to.

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
        super().__init__(schedule, tuple(data.shape[1:]), rate)
        data = data if data.is_floating_point() else data.to(torch.get_default_dtype())
        weights = torch.ones(len(data)) if weights is None else weights
        fit = data.dim() > 1 and weights.shape == data.shape[:1]
        if not fit or not (weights > 0).all():
            raise ValueError(
                f"arguments 'data' and 'weights': got shapes {tuple(data.shape)} and {tuple(weights.shape)}; "
                "expected (K,) + event_shape, every value once, and K positive weights. Leave out values of "
                "probability zero."
            )
        self.register_buffer("values", data.clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(data))
        self.embed(data)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the data."""
        return self.values.dtype

    def logits(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        same, other = self.log_noise_ratio(x_t, log_snr)
        values, spins = self.values.flatten(1), (2 * self.values - 1).flatten(1)
        # log q(x_t | x_0) of every value: Σ_i of one number where the bits agree, another where not
        flat_spins, flat_difference = (
            (2 * x_t - 1).flatten(-self.event_dim),
            (same - other).flatten(-self.event_dim),
        )
        log_share = self.log_weights + 0.5 * (flat_spins * flat_difference) @ spins.mT
        log_share = log_share.log_softmax(-1).unsqueeze(-1)
        ones = torch.where(values == 1, log_share, -torch.inf).logsumexp(-2)
        zeros = torch.where(values == 0, log_share, -torch.inf).logsumexp(-2)
        # A bit that is the same in all data is beyond any doubt, and finite.
        limit = -(torch.finfo(x_t.dtype).max ** 0.25)
        return (ones.clamp(min=limit) - zeros.clamp(min=limit)).reshape(x_t.shape)


class BernoulliDiffusion(DiffusionModel):
    r"""A diffusion model of bits: the same chains, with binomial kernels.

    ``model``, ``guide``, ``posterior_guide``, ``subsampled()``, ``continuous()`` and ``sample()`` are those
    of any :class:`~pyro_diffusion.diffusion.DiffusionModel`, and so are the functions that take them. Sites
    of the guides have no parameters and count as reparameterised: a schedule cannot be learned through them.

    Args:
        denoiser: The reverse kernels, which bring schedule, rate and event shape.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.

    Raises:
        ValueError: Another denoiser; from a program: data other than bits, of another shape, or with gaps.

    Example:
        >>> denoiser = NeuralBernoulliDenoiser(MLP((20,)), LinearDecaySchedule(200), event_shape=(20,))
        >>> diffusion = BernoulliDiffusion(denoiser)
        >>> pair = diffusion.subsampled()
        >>> svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> loss = svi.step(torch.eye(5).repeat(1, 4))

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), table 1.
        https://arxiv.org/abs/1503.03585
    """

    states: ClassVar[str] = "bits"
    denoiser: BernoulliDenoiser

    def __init__(self, denoiser: BernoulliDenoiser, *, name: str | None = None) -> None:
        check_argument("denoiser", denoiser, BernoulliDenoiser, "NeuralBernoulliDenoiser(…)")
        super().__init__(denoiser, name=name)

    def embed(self, x_0: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise ValueError(
                "argument 'mask': got one for a BernoulliDiffusion; expected none, because the zero that "
                "stands for a gap is a bit as well. Leave out data with gaps, or use a DiffusionModel with "
                "LevelPrediction(2)."
            )
        return super(DiffusionModel, self).embed(x_0)  # bits are not rounded

    def prior(self) -> TorchDistribution:
        """:math:`p(x_T)`: independent bits at the rate."""
        rate = torch.full(
            self.event_shape, self.denoiser.rate, dtype=self.dtype, device=self.device
        )
        return Noise(probs=rate).to_event(len(self.event_shape))

    def forward_transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_{t-1})`: a bit is kept, or drawn anew."""
        t = self.schedule.check_timestep(t, at_least=1)
        _, other = self.denoiser.rates(x_prev)
        changed = pad(self.schedule.beta(t), len(self.event_shape), x_prev.dtype) * other
        return self._noise(changed, x_prev)

    def forward_marginal(self, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_0)` for bits ``x_0``."""
        return self._noised(x_0, self.schedule.log_snr(self.schedule.check_timestep(t, at_least=1)))

    def marginal_at(self, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r""":math:`q(x_u \mid x_0)` at a time of the continuous chain."""
        return self._noised(x_0, self.schedule.log_snr_at(u))

    def forward_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_{t-1} \mid x_t, x_0)`, ``t ≥ 2``."""
        self.schedule.check_timestep(t, at_least=2)
        return self._noise(torch.where(x_0 == x_t, *self.denoiser.change(t, x_t)), x_t)

    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r"""Changes of each bit in a unit of time under :math:`q`, a Poisson count."""
        return self._changes(torch.where(x_0 == x_u, *self.denoiser.change_rate(u, x_u)))

    def reverse_increment(
        self, x_u: Tensor, u: Tensor
    ) -> tuple[TorchDistribution, TorchDistribution]:
        r"""The same under :math:`p_\theta`, and :math:`p_\theta(x_0 \mid x_1)`; one network call."""
        denoised = self.denoiser.denoise(x_u, self.schedule.log_snr_at(u))
        rate = self.denoiser.expected(self.denoiser.change_rate(u, x_u), x_u, denoised)
        return self._changes(rate), self.decode_denoised(x_u, denoised)

    def _noised(self, x_0: Tensor, log_snr: Tensor) -> TorchDistribution:
        _, other = self.denoiser.rates(x_0)
        changed = pad((-log_snr).sigmoid(), len(self.event_shape), x_0.dtype) * other
        return self._noise(changed, x_0)

    def _noise(self, changed: Tensor, x: Tensor) -> TorchDistribution:
        return Noise(logits=signed_logits(changed, x)).to_event(len(self.event_shape))

    def _changes(self, rate: Tensor) -> TorchDistribution:
        return Changes(rate).to_event(len(self.event_shape))


def signed_logits(changed: Tensor, x: Tensor) -> Tensor:
    """Logits of a one where bits ``x`` change with a given probability, however small."""
    info = torch.finfo(changed.dtype)
    changed = changed.clamp(min=info.tiny, max=1 - info.eps)
    return (1 - 2 * x) * (changed.log() - torch.log1p(-changed))
