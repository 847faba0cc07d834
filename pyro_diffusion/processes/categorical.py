r"""Uniform noise: a category is kept, or drawn anew from all :math:`K`.

States are whole numbers :math:`0 … K - 1`, floating tensors in the chain's dtype. Each step keeps a category
with probability :math:`\alpha_t` and draws it anew otherwise:

.. math::
    q(x_t = j \mid x_{t-1} = i) &= \alpha_t\, \delta_{ij} + (1 - \alpha_t) / K && \text{(E1)} \\
    q(x_t = j \mid x_0 = k) &= \bar\alpha_t\, \delta_{jk} + (1 - \bar\alpha_t) / K && \text{(E2)} \\
    q(x_{t-1} = j \mid x_t = i, x_0 = k) &= \frac{q(x_t = i \mid x_{t-1} = j)\; q(x_{t-1} = j \mid x_0 = k)}
        {q(x_t = i \mid x_0 = k)} && \text{(E3)} \\
    p(x_T = j) &= 1 / K && \text{(E5)}

A reverse kernel that acts entry by entry follows from :math:`\pi_k`, the probability that the entry of
:math:`x_0` is :math:`k`. It is the mean of E3 over :math:`k`. With
:math:`w_k = \pi_k / q(x_t = i \mid x_0 = k)`,

.. math::
    p(x_{t-1} = j \mid x_t = i) = \big(\alpha_t\, \delta_{ij} + \tfrac{1 - \alpha_t}{K}\big)
        \Big(\bar\alpha_{t-1}\, w_j + \tfrac{1 - \bar\alpha_{t-1}}{K} \sum_k w_k\Big) .

The code computes log-probabilities, and the largest one from the sum of the others, so that a small
probability of change keeps all its digits. As :math:`T \to \infty` the probability of a change becomes a
rate, and the KL of a step becomes the KL of independent Poisson counts, one for each of the other
:math:`K - 1` categories.

References:
    Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), section 3.1 and
    appendix A.2.1. https://arxiv.org/abs/2107.03006
    A Continuous Time Framework for Discrete Denoising Models (Campbell et al., 2022), section 3.
    https://arxiv.org/abs/2205.14987
"""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from pyro_diffusion.distributions import Changes, Unscored
from pyro_diffusion.processes.base import Denoised, ForwardProcess, pad
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class CategoricalNoise(Unscored, dist.TorchDistribution):
    r"""Categories of a chain, from log-probabilities that are normalised already.

    A draw is a whole number in the dtype of the log-probabilities. If these are not learned, a draw needs no
    score-function term, and counts as reparameterised. torch's ``Categorical`` would normalise again, and
    rounding would then lose a probability of change that is much smaller than one.

    Args:
        log_probs: :math:`\log p_j`, shape ``batch_shape + (K,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "log_probs": constraints.real_vector
    }
    has_enumerate_support = True

    def __init__(self, log_probs: Tensor, *, validate_args: bool | None = None) -> None:
        self.log_probs = log_probs
        super().__init__(log_probs.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.log_probs.shape[-1] - 1)

    @property
    def mean(self) -> Tensor:
        """NaN, as in torch's ``Categorical``, because categories have no order."""
        return self.log_probs.new_full(self.batch_shape, math.nan)

    @property
    def variance(self) -> Tensor:
        """NaN, like the mean."""
        return self.mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CategoricalNoise":
        shape = (*batch_shape, self.log_probs.shape[-1])
        return CategoricalNoise(self.log_probs.expand(shape), validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The category of the smallest of ``K`` exponential times, whose rates are the probabilities."""
        with torch.no_grad():
            shape = (*self._extended_shape(sample_shape), self.log_probs.shape[-1])
            times = torch.empty(shape, dtype=self.log_probs.dtype, device=self.log_probs.device)
            first = (self.log_probs.exp() / times.exponential_()).argmax(-1)
            return first.to(self.log_probs.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        index, log_probs = torch.broadcast_tensors(value.long().unsqueeze(-1), self.log_probs)
        return log_probs.gather(-1, index[..., :1]).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        categories = torch.arange(self.log_probs.shape[-1]).to(self.log_probs)
        categories = categories.reshape((-1,) + (1,) * len(self.batch_shape))
        return categories.expand((-1, *self.batch_shape)) if expand else categories


@register_kl(CategoricalNoise, CategoricalNoise)
def _kl_of_categories(q: CategoricalNoise, p: CategoricalNoise) -> Tensor:
    r""":math:`\sum_j q_j (\log q_j - \log p_j)`, without the categories that :math:`q` never has."""
    never = q.log_probs == -math.inf
    ratio = q.log_probs.masked_fill(never, 0.0) - p.log_probs
    return (q.log_probs.exp() * ratio).masked_fill(never, 0.0).sum(-1)


class CategoricalProcess(ForwardProcess):
    r"""Categories that are drawn anew, each with the same probability.

    Args:
        schedule: Noise schedule; :math:`\bar\alpha_t` is the share of entries that were never drawn anew.
        event_shape: Shape of one state.
        num_categories: :math:`K`; an entry is a whole number in ``0 … K − 1``.

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), appendix A.2.1.
        https://arxiv.org/abs/2107.03006
    """

    states: ClassVar[str] = "categories"

    def __init__(
        self, schedule: NoiseSchedule, event_shape: torch.Size, num_categories: int
    ) -> None:
        super().__init__(schedule, event_shape)
        self.num_categories = num_categories

    @property
    def state_size(self) -> int:
        """Numbers in the largest tensor of a step: one for each category of each entry."""
        return self.event_shape.numel() * self.num_categories

    def prior(self, dtype: torch.dtype) -> TorchDistribution:
        """Independent entries, uniform over the categories (E5)."""
        shape = (*self.event_shape, self.num_categories)
        log_probs = torch.full(
            shape, -math.log(self.num_categories), dtype=dtype, device=self.schedule.device
        )
        return self._noise(log_probs)

    def transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        """Each category is kept or drawn anew (E1)."""
        drawn = self.schedule.beta(self.schedule.check_timestep(t, at_least=1))
        return self._noise(self._log_law(drawn, x_prev))

    def noised(self, x_0: Tensor, log_snr: Tensor) -> TorchDistribution:
        """The entries of a datum, each kept or drawn anew; at the log-SNR of a timestep this is E2."""
        return self._noise(self.log_likelihood(x_0, log_snr))

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        """Bayes' rule for an entry (E3)."""
        return self._before(x_t, self._certain(x_0), self.schedule.check_timestep(t, at_least=2))

    def reverse(self, x_t: Tensor, denoised: Denoised, t: int | Tensor) -> TorchDistribution:
        """The posterior, averaged over the categories that the datum may have."""
        return self._before(x_t, _log_pi(denoised), self.schedule.check_timestep(t, at_least=1))

    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        """The number of changes to each category per unit of time under :math:`q`, ``event_shape + (K,)``.

        They are Poisson counts. The present category has a count as well, although it is no change: its rate
        is one under :math:`q` and :math:`p`, so that its KL is zero.
        """
        return self._changes(x_u, self._certain(x_0), u)

    def reverse_increment(self, x_u: Tensor, denoised: Denoised, u: Tensor) -> TorchDistribution:
        """The same counts, with rates averaged over the categories that the datum may have."""
        return self._changes(x_u, _log_pi(denoised), u)

    def log_likelihood(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        r""":math:`\log q(x_t \mid x_0 = k)` of each entry, for every :math:`k`.

        Args:
            x_t: States, ``batch_shape + event_shape``.
            log_snr: Their log-SNR, broadcastable to ``batch_shape``.

        Returns:
            ``batch_shape + event_shape + (K,)``. The law is symmetric, so that this is also the
            log-probability of every category of a state, given ``x_t`` as the datum.
        """
        return self._log_law((-log_snr).sigmoid(), x_t)

    def is_category(self, x: Tensor) -> Tensor:
        """Whether an entry is category ``k``, for every ``k``: boolean, one more axis of ``K``."""
        categories = torch.arange(self.num_categories, dtype=x.dtype, device=x.device)
        return x.unsqueeze(-1) == categories

    def _log_law(self, drawn: Tensor, x: Tensor) -> Tensor:
        """Log-probabilities of all categories, for entries ``x`` that are drawn anew with a probability."""
        others = drawn * ((self.num_categories - 1) / self.num_categories)
        same, other = torch.log1p(-others), drawn.log() - math.log(self.num_categories)
        return torch.where(self.is_category(x), self._pad(same, x), self._pad(other, x))

    def _before(self, x_t: Tensor, log_pi: Tensor, t: Tensor) -> TorchDistribution:
        """The kernel from ``t`` to ``t − 1``, given the law π of the datum."""
        levels = self.schedule.log_snr(t - 1), self.schedule.log_snr(t)
        kept_or_drawn = self._log_law(self.schedule.beta(t), x_t)
        return self._noise(_normalised(kept_or_drawn + self._log_mean(x_t, log_pi, *levels)))

    def _changes(self, x_u: Tensor, log_pi: Tensor, u: Tensor) -> TorchDistribution:
        """The kernel of the continuous chain, given the law π of the datum: rates per unit of its time."""
        log_snr = self.schedule.log_snr_at(u)
        drawn = -self.schedule.slope_at(u) * (-log_snr).sigmoid()
        to_each = self._pad(drawn.log() - math.log(self.num_categories), x_u)
        rate = (to_each + self._log_mean(x_u, log_pi, log_snr, log_snr)).exp()
        return Changes(rate.masked_fill(self.is_category(x_u), 1.0)).to_event(self.event_dim + 1)

    def _log_mean(
        self, x: Tensor, log_pi: Tensor, log_snr_before: Tensor, log_snr: Tensor
    ) -> Tensor:
        r"""The logarithm of the following mean, for every category :math:`j` of a state before.

        .. math::
            \sum_k \pi_k\, \frac{q(x_{\text{before}} = j \mid x_0 = k)}{q(x \mid x_0 = k)} .
        """
        log_w = log_pi - self.log_likelihood(x, log_snr)
        kept, lost = (self._pad(logsigmoid(s * log_snr_before), x) for s in (1, -1))
        from_any = lost - math.log(self.num_categories) + log_w.logsumexp(-1, keepdim=True)
        return torch.logaddexp(kept + log_w, from_any)

    def _certain(self, x_0: Tensor) -> Tensor:
        """log π for a datum that is known."""
        never = torch.full((), -math.inf, dtype=x_0.dtype, device=x_0.device)
        return torch.where(self.is_category(x_0), 0.0, never)

    def _pad(self, coefficient: Tensor, x: Tensor) -> Tensor:
        return pad(coefficient, self.event_dim + 1, x.dtype)

    def _noise(self, log_probs: Tensor) -> TorchDistribution:
        return CategoricalNoise(log_probs).to_event(self.event_dim)


def _log_pi(denoised: Denoised) -> Tensor:
    assert denoised.logits is not None
    return denoised.logits.log_softmax(-1)


def _normalised(log_probs: Tensor) -> Tensor:
    """Log-probabilities whose sum is one up to rounding; the largest follows from the others."""
    largest = torch.arange(log_probs.shape[-1], device=log_probs.device)
    largest = largest == log_probs.argmax(-1, keepdim=True)
    others = log_probs.masked_fill(largest, -math.inf).exp().sum(-1, keepdim=True)
    return torch.where(largest, torch.log1p(-others), log_probs)
