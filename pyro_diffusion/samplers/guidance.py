r"""Classifier-free guidance: an estimate that is moved away from the unconditional one.

.. math::
    \hat x_0^w(x_t) = \hat x_0(x_t, c) + w\, \big(\hat x_0(x_t, c) - \hat x_0(x_t, \varnothing)\big),

which is the estimate that belongs to the score
:math:`(1 + w)\, \nabla \log q(x_t \mid c) - w\, \nabla \log q(x_t)`. At :math:`t = 0` that is the score of
the tilted law :math:`p(x_0)\, p(c \mid x_0)^{1 + w} / Z`. At other timesteps it is in general not the score
of the tilted law with noise, because adding noise and raising to a power do not commute. Unless :math:`w` is
0 or −1, a sampler with guidance therefore draws in general neither from :math:`p(x_0 \mid c)` nor from the
tilted law. Without guidance, samplers with and without noise have one law; with guidance they have two.

Gaussians show it. Let :math:`x_0 \sim N(0, 1)` and :math:`x_0 \mid c \sim N(m, v)`. For :math:`v = 1` all
draws follow the tilted law, :math:`N((1 + w)\, m, 1)`. For :math:`v < 1` and :math:`w > 0` the variances
differ. In the limit of small steps they are

.. math::
    v^{1 + w} \;\; (\eta = 0), \qquad \frac{v - v^{2 + 2 w}}{(1 - v)(1 + 2 w)} \;\; (\eta = 1), \qquad
    \frac{v}{1 + w - w v} \;\; \text{(the tilted law)} .

References:
    Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), algorithm 2. https://arxiv.org/abs/2207.12598
    Classifier-Free Guidance is a Predictor-Corrector (Bradley and Nakkiran, 2024): the laws with and without
    noise differ, and neither is the tilted one. https://arxiv.org/abs/2408.09000
    What does guidance do? A fine-grained analysis in a simple setting (Chidambaram et al., 2024): as
    :math:`w` grows, more draws come from the boundary of the conditional law's support. https://arxiv.org/abs/2409.13074
"""

import math
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.checks import require
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.given import Given, flattened, repeated, together
from pyro_diffusion.processes import Denoised, ForwardProcess
from pyro_diffusion.typed import TorchDistribution


class Guidance:
    r"""Guidance of a sampler by its own context; ``ODESampler(diffusion, guidance=Guidance(2.0))``.

    .. math::
        \hat x_0^w = \hat x_0(c) + w\, \big(\hat x_0(c) - \hat x_0(\varnothing)\big) .

    For :math:`w > 0` the draws are usually less diverse, and further from those without the context. **They
    follow no law of the model.** :math:`w = 0` is the conditional model :math:`p(x_0 \mid c)` itself, and
    :math:`w = -1` the unconditional one. For other :math:`w` the draws are in general neither from
    :math:`p(x_0 \mid c)` nor from the tilted law :math:`p(x_0)\, p(c \mid x_0)^{1 + w} / Z`, and their law
    depends on ``eta``. ``examples/guidance.py`` measures how far they are from the tilted law where both are
    known. Use no guidance for statistics: for posteriors, calibration, bounds and evidence.

    The network must have a null token and be trained with context dropout. Two rows of the network are
    computed for each draw, in one call. Where a network predicts levels, its logits are combined alike. A
    variance that a network learned is the one given the context, at every :math:`w`.

    Args:
        strength: :math:`w`, a finite number. The guidance scale of other code is often :math:`1 + w`.

    Raises:
        ValueError: A strength that is not a finite number. From a sampler: states without a score, or a
            network without a null token.

    Example:
        >>> means = torch.tensor([[-1.0], [1.0]])
        >>> diffusion = DiffusionModel(GaussianMixtureDenoiser([0.5, 0.5], means, 1.0, LogSNRSchedule(50)))
        >>> sampler = ODESampler(diffusion, timesteps=20, guidance=Guidance(2.0))
        >>> sampler(3, context=torch.tensor(1)).shape
        torch.Size([3, 1])

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), algorithm 2.
        https://arxiv.org/abs/2207.12598
    """

    def __init__(self, strength: float) -> None:
        proper = isinstance(strength, Real) and not isinstance(strength, bool)
        require(
            proper and math.isfinite(strength),
            "argument 'strength'",
            repr(strength),
            "a finite number, 0 for no guidance",
            "Pass Guidance(2.0), say.",
        )
        self.strength = float(strength)

    def __repr__(self) -> str:
        return f"Guidance({self.strength:g})"

    def of(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser with guided estimates; for a strength of zero the denoiser itself."""
        return GuidedDenoiser(denoiser, self.strength) if self.strength else denoiser


class GuidedDenoiser(Denoiser):
    """A denoiser whose estimates are guided by its context.

    Args:
        denoiser: The denoiser, of conditional and of unconditional data.
        strength: :math:`w`.
    """

    def __init__(self, denoiser: Any, strength: float) -> None:
        super().__init__(denoiser.schedule, denoiser.event_shape)
        self.denoiser: Any = denoiser
        self.strength = strength

    @property
    def process(self) -> ForwardProcess:
        process: ForwardProcess = self.denoiser.process
        return process

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    def denoise(self, x_t: Tensor, log_snr: Tensor, context: Any = None) -> Denoised:
        batch_shape = self.batch_shape(x_t)
        count = batch_shape.numel()
        rows = Given(context=flattened(context, batch_shape))
        states, both = together(
            partial(repeated, times=2), x_t.flatten(0, -1 - self.event_dim), rows
        )
        null = torch.arange(2 * count, device=x_t.device) >= count
        curves = self.schedule.event_shape
        if log_snr.dim() > len(curves):  # one for each state
            log_snr = (
                log_snr.expand(batch_shape + curves)
                .reshape(count, *curves)
                .repeat(2, *(1 for _ in curves))
            )
        try:
            said = self.denoiser.denoise(states, log_snr, context=both.context, null=null)
        except ValueError as error:
            raise ValueError(f"sampler with guidance: {error}") from error

        def guided(x: Tensor) -> Tensor:
            """The value in the guided direction, from those with and without the context."""
            given, without = x.unflatten(0, (2, *batch_shape))
            return given + self.strength * (given - without)

        # The logits of a mixture's components do not give a kernel of the guided estimate.
        levels = getattr(getattr(self.denoiser, "prediction", None), "num_outputs", 1) > 1
        logits = guided(said.logits) if levels and said.logits is not None else None
        variance = said.variance
        if variance is not None:
            variance = variance[:count].unflatten(0, batch_shape)
        return Denoised(guided(said.x_0_hat), logits, variance)

    def reverse_kernel(self, x_t: Tensor, t: int | Tensor, denoised: Denoised) -> TorchDistribution:
        return self.denoiser.reverse_kernel(x_t, t, denoised)
