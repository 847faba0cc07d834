r"""The reverse kernels of a guide: Gaussian steps with a drift from a network and from the target's score.

The chain ends in coordinates in which the guide's base is standard normal. Without a drift the kernels are
the exact reversal of the forward chain of :math:`N(0, I)`. With a drift :math:`u` the estimate of the datum
in the forward posterior (E3) is

.. math::
    \hat x_0(x_t) = \frac{a_t\, x_t + \sigma_t\, u(x_t, t)}{a_t^2 + \sigma_t^2}, \qquad
    u(x_t, t) = f_\phi(x_t, \lambda_t) + g_t \odot s(x_t),

with a network :math:`f_\phi` and gates :math:`g_t`. The vector :math:`s` is the clipped score of the target,
relative to the base, at the noisy state:

.. math::
    r(x) = \nabla_x \big[\log p(y, z(x)) + \log \lvert \det \partial z / \partial x \rvert
        - \log N(x; 0, I)\big], \qquad
    s = \frac{r}{1 + \lVert r \rVert / (c \sqrt d)} .

It is zero where the base is the posterior.

References:
    Denoising Diffusion Samplers (Vargas et al., 2023), section 4. https://arxiv.org/abs/2302.13834
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import require
from pyro_diffusion.denoisers import ForwardVariance
from pyro_diffusion.params import ParamScope, in_store
from pyro_diffusion.processes import ChainStep, Denoised, GaussianProcess
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution

CLIP = 3.0  #: c, the largest root mean square of the score's entries, in units of the base
_LOG_SCALES = -3.0, 1.0  # limits of the logarithm of a step's noise over that of the reversal


class Drift(ParamScope):
    r"""Reverse kernels :math:`p_\phi(x_{t-1} \mid x_t)` that begin as the exact reversal for :math:`N(0, I)`.

    The parameters are the network's, the gates :math:`g_t`, and the logarithms of factors of the steps'
    standard deviations, ``(T, d)`` each.

    Args:
        network: :math:`f_\phi`, called as ``network(x_t, log_snr)`` with one batch axis.
        schedule: Noise schedule of the chain.
        dim: Number of latents :math:`d`.
        pulled: Whether the gates begin at :math:`a_t \sigma_t` and not at zero.
        name: Prefix of the parameters in Pyro's param store.
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, dim: int, *, pulled: bool, name: str
    ) -> None:
        require(
            not in_store(name),
            "param store of Pyro",
            f"parameters under {name!r} already, which are of another guide",
            "none, because a guide states its own",
            "Call the guide once and load its state_dict, or call pyro.clear_param_store() first.",
        )
        super().__init__(name)
        self.network, self.schedule = network, schedule
        t = torch.arange(1, schedule.num_timesteps + 1, device=schedule.device)
        start = schedule.signal(t) * schedule.noise(t) if pulled else torch.zeros(len(t))
        self.gate = nn.Parameter(start[:, None].float().repeat(1, dim))
        self.log_scale = nn.Parameter(torch.zeros(len(t), dim))

    @property
    def process(self) -> GaussianProcess:
        """The forward process, whose chain the kernels reverse."""
        return GaussianProcess(self.schedule, self.gate.shape[1:])

    def prior(self) -> TorchDistribution:
        r""":math:`p(x_T)`, the law of the last state of the forward chain of :math:`N(0, I)`."""
        return self.process.prior(self.gate.dtype)

    def transition(
        self, x_t: Tensor, t: int, score: Callable[[Tensor], Tensor] | None
    ) -> TorchDistribution:
        r""":math:`p_\phi(x_{t-1} \mid x_t)`, t = T … 1.

        Args:
            x_t: State, ``batch_shape + (d,)``.
            t: Its timestep.
            score: :math:`r(x)`; ``None`` leaves it out.
        """
        log_snr = self.schedule.log_snr(t)
        signal, noise = (c.to(x_t.dtype) for c in self.schedule.scales(log_snr))
        rows = x_t.reshape(-1, x_t.shape[-1])
        output = self.network(rows, log_snr.to(x_t.dtype).expand(len(rows)))
        if output.shape not in (rows.shape, (*rows.shape, 2)):
            raise ValueError(
                f"argument 'network': got an output of shape {tuple(output.shape)} for states of shape "
                f"{tuple(rows.shape)}; expected that shape, or one more axis of two numbers. Pass "
                f"MLP(({rows.shape[1]},), num_outputs=2)."
            )
        output = output.reshape(*x_t.shape, *output.shape[2:])
        drift, log_scale = output.unbind(-1) if output.dim() > x_t.dim() else (output, 0.0)
        if score is not None:
            drift = drift + self.gate[t - 1] * clipped(score(x_t))
        x_0_hat = (signal * x_t + noise * drift) / (signal.square() + noise.square())
        log_scale = self.log_scale[t - 1] + log_scale
        factor = (2 * log_scale.clamp(*_LOG_SCALES)).exp()

        def variance(step: ChainStep) -> Tensor:
            """The variance of the reversal times the learned factors."""
            return ForwardVariance()(step) * factor

        return self.process.reverse(x_t, Denoised(x_0_hat), t, variance)

    def log_forward(self, path: list[Tensor]) -> Tensor:
        r""":math:`\sum_{t=1}^T \log q(x_t \mid x_{t-1})`, ``batch_shape``.

        Args:
            path: The states :math:`x_T, …, x_0`.
        """
        states = torch.stack(path[::-1])
        t = torch.arange(1, len(path), device=states.device)
        kernels = self.process.transition(states[:-1], t.reshape(-1, *[1] * (states.dim() - 2)))
        return kernels.log_prob(states[1:]).sum(0)


def clipped(score: Tensor) -> Tensor:
    r""":math:`r / (1 + \lVert r \rVert / (c \sqrt d))`, shape ``batch_shape + (d,)``."""
    size = score.square().mean(-1, keepdim=True).sqrt()
    return score / (1 + size / CLIP)
