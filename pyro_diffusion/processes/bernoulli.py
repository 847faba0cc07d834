r"""Binomial noise: a bit is kept, or drawn anew.

Each step keeps a bit with probability :math:`\alpha_t` and draws it anew, at a given rate, otherwise:

.. math::
    q(x_t \mid x_{t-1}) &= \mathrm{Bernoulli}\big(\alpha_t x_{t-1} + (1 - \alpha_t)\, r\big)
        && \text{(E1)} \\
    q(x_t \mid x_0) &= \mathrm{Bernoulli}\big(\bar\alpha_t x_0 + (1 - \bar\alpha_t)\, r\big)
        && \text{(E2)} \\
    p(x_T) &= \mathrm{Bernoulli}(r) && \text{(E5)}

So :math:`\bar\alpha_t` is the share of bits that were never drawn anew. A reverse kernel that acts bit by bit
follows from :math:`\pi_i(x_t)`, the probability that :math:`x_{0,i}` is one,

.. math::
    p(x_{t-1,i} \mid x_t) = \sum_{b \in \{0, 1\}} \pi_i(x_t)^b\, (1 - \pi_i(x_t))^{1-b}\;
        q(x_{t-1,i} \mid x_{t,i}, x_{0,i} = b) .

The code computes the probability that a bit *changes* in a step. This number is small, and it is computed
without a subtraction. As :math:`T \to \infty` it becomes a rate, and the KL of a step becomes the KL of two
Poisson counts.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), table 1 and
    appendix B.2. https://arxiv.org/abs/1503.03585
    A Continuous Time Framework for Discrete Denoising Models (Campbell et al., 2022), section 3.
    https://arxiv.org/abs/2205.14987
"""

from typing import ClassVar

import torch
from torch import Tensor

from pyro_diffusion.distributions import Changes, Noise
from pyro_diffusion.processes.base import Denoised, ForwardProcess, pad
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class BernoulliProcess(ForwardProcess):
    r"""Bits that are drawn anew at a rate.

    Args:
        schedule: Noise schedule; :math:`\bar\alpha_t` is the share of bits that were never drawn anew.
        event_shape: Shape of one state.
        rate: :math:`r` in (0, 1), the rate of ones among bits that are all noise.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), table 1.
        https://arxiv.org/abs/1503.03585
    """

    states: ClassVar[str] = "bits"

    def __init__(self, schedule: NoiseSchedule, event_shape: torch.Size, rate: float = 0.5) -> None:
        super().__init__(schedule, event_shape)
        self.rate = rate

    def prior(self, dtype: torch.dtype) -> TorchDistribution:
        """Independent bits at the rate (E5)."""
        probs = torch.full(self.event_shape, self.rate, dtype=dtype, device=self.schedule.device)
        return Noise(probs=probs).to_event(self.event_dim)

    def transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        """Each bit is kept or drawn anew (E1)."""
        drawn = self.schedule.beta(self.schedule.check_timestep(t, at_least=1))
        return self._noise(self._pad(drawn, x_prev) * self.rates(x_prev)[1], x_prev)

    def noised(self, x_0: Tensor, log_snr: Tensor) -> TorchDistribution:
        """The bits of a datum, each kept or drawn anew; at the log-SNR of a timestep this is E2."""
        return self._noise(self._pad((-log_snr).sigmoid(), x_0) * self.rates(x_0)[1], x_0)

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        """The bits before a step, given the datum (E3)."""
        self.schedule.check_timestep(t, at_least=2)
        return self._noise(torch.where(x_0 == x_t, *self.change(t, x_t)), x_t)

    def reverse(self, x_t: Tensor, denoised: Denoised, t: int | Tensor) -> TorchDistribution:
        """The posterior, averaged over the two bits that the datum may have."""
        return self._noise(_expected(self.change(t, x_t), x_t, denoised), x_t)

    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        """The number of changes of each bit per unit of time under :math:`q`, a Poisson count."""
        return self._changes(torch.where(x_0 == x_u, *self.change_rate(u, x_u)))

    def reverse_increment(self, x_u: Tensor, denoised: Denoised, u: Tensor) -> TorchDistribution:
        """The same count, with its rate averaged over the two bits that the datum may have."""
        return self._changes(_expected(self.change_rate(u, x_u), x_u, denoised))

    def change(self, t: int | Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`q(x_{t-1,i} \ne x_{t,i} \mid x_t, x_0)` if :math:`x_{0,i}` is the same bit, and if not."""
        t = self.schedule.check_timestep(t, at_least=1)
        levels = self.schedule.log_snr(t - 1), self.schedule.log_snr(t)
        return self._change(self.schedule.beta(t), *levels, x_t)

    def change_rate(self, u: Tensor, x_u: Tensor) -> tuple[Tensor, Tensor]:
        """The same two numbers in the continuous chain: rates per unit of its time."""
        log_snr = self.schedule.log_snr_at(u)
        drawn = -self.schedule.slope_at(u) * (-log_snr).sigmoid()
        return self._change(drawn, log_snr, log_snr, x_u)

    def _change(
        self, drawn: Tensor, log_snr_before: Tensor, log_snr: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bayes' rule for a bit that had the other value before it was drawn anew, without a subtraction."""
        levels = (log_snr_before, -log_snr_before, log_snr, -log_snr)
        drawn, kept_before, lost_before, kept, lost = (
            self._pad(c, x) for c in (drawn, *(level.sigmoid() for level in levels))
        )
        one, other = self.rates(x)
        same = drawn * one * lost_before * other / (kept + lost * one)
        if_other = drawn * (kept_before + lost_before * other) / lost
        return same, if_other

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The probability that noise equals the bits of ``x``, and that it does not."""
        one = torch.where(x == 1, torch.full_like(x, self.rate), 1 - self.rate)
        return one, 1 - one

    def log_noise_ratio(self, x_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log q(x_{t,i} \mid x_{0,i})` if the two bits are the same, and if not."""
        kept, noise = (self._pad(level.sigmoid(), x_t) for level in (log_snr, -log_snr))
        one, _ = self.rates(x_t)
        return (kept + noise * one).log(), (noise * one).log()

    def _pad(self, coefficient: Tensor, x: Tensor) -> Tensor:
        return pad(coefficient, self.event_dim, x.dtype)

    def _noise(self, changed: Tensor, x: Tensor) -> TorchDistribution:
        return Noise(logits=signed_logits(changed, x)).to_event(self.event_dim)

    def _changes(self, rate: Tensor) -> TorchDistribution:
        return Changes(rate).to_event(self.event_dim)


def _expected(of_same: tuple[Tensor, Tensor], x_t: Tensor, denoised: Denoised) -> Tensor:
    """The mean, over the datum's bit, of a number that depends on whether it equals the state's bit."""
    assert denoised.logits is not None
    signed = denoised.logits * (2 * x_t - 1)
    return signed.sigmoid() * of_same[0] + (-signed).sigmoid() * of_same[1]


def signed_logits(changed: Tensor, x: Tensor) -> Tensor:
    """Logits of a one if bits ``x`` change with a given probability, which may be very small."""
    info = torch.finfo(changed.dtype)
    changed = changed.clamp(min=info.tiny, max=1 - info.eps)
    return (1 - 2 * x) * (changed.log() - torch.log1p(-changed))
