r"""The steps of a sampler, as coefficients that are computed before the first step.

.. math::
    x_{t-1} = A_t\, x_t + B_t\, \hat x_0(x_t) + E_t\, \hat x_0(x_{t+1}) + C_t\, z, \qquad z \sim N(0, I) .

Where the estimate is linear in a network's output :math:`o`, :math:`\hat x_0 = p_t\, o + q_t\, x_t`, the step
is written in terms of :math:`o`: one call of the network, a normal draw and a few additions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_diffusion.checks import check_count, check_finite, described, require
from pyro_diffusion.denoisers import Denoiser, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.networks import network_dtype
from pyro_diffusion.processes.base import pad
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.walk import ReverseWalk


class Update(NamedTuple):
    r"""Coefficients of the steps to :math:`x_{t-1}`, :math:`t = T … 2`, a row for each; float64.

    Shapes are ``(T − 1,)`` + the schedule's event shape. ``None`` leaves a term out.
    """

    of_x_t: Tensor  #: :math:`A_t`
    of_x_0: Tensor  #: :math:`B_t`, of :math:`\hat x_0(x_t)`
    noise: Tensor | None = None  #: :math:`C_t`
    of_previous: Tensor | None = None  #: :math:`E_t`, of :math:`\hat x_0(x_{t+1})`


def is_plain(denoiser: Denoiser) -> bool:
    """Whether a denoiser computes estimate and kernel as :class:`NeuralDenoiser` itself does."""
    decisive = ("process", "denoise", "reverse_kernel")
    return isinstance(denoiser, NeuralDenoiser) and all(
        getattr(type(denoiser), name) is getattr(NeuralDenoiser, name) for name in decisive
    )


class Linear(NamedTuple):
    r""":math:`\hat x_0 = p\, o + q\, x_t` for a network's output :math:`o`; float64, ``(T − 1,)`` each."""

    of_output: Tensor  #: :math:`p`
    of_x_t: Tensor  #: :math:`q`
    scale: Tensor  #: divisor of the state before it enters the network


def linear_map(denoiser: Any) -> Linear | None:
    """Coefficients of the estimate, if it is linear in the network's output, one number for each entry."""
    if (
        not is_plain(denoiser)
        or denoiser.schedule.event_dim
        or denoiser.prediction.num_outputs > 1
        or denoiser.variance.num_outputs
    ):
        return None
    schedule, prediction = denoiser.schedule, denoiser.prediction
    signal, noise = schedule.scales(schedule.log_snr(downwards(schedule)))
    scale = (signal**2 + noise**2).sqrt()

    def x_0_hat(output: float, state: float) -> Tensor:
        numbers = torch.full_like(scale, output), torch.full_like(scale, state)
        return prediction.estimate(*numbers, signal / scale, noise / scale)[0]

    p, q = x_0_hat(1.0, 0.0), x_0_hat(0.0, 1.0)
    # A user's own parameterization may clip, or be nonlinear in another way.
    if all(torch.allclose(x_0_hat(o, x), o * p + x * q) for o, x in ((-9.0, 4.0), (99.0, -40.0))):
        return Linear(p, q / scale, scale)
    return None


class Row(NamedTuple):
    """The coefficients of one step; tensors, so that one compiled function serves all steps."""

    log_snr: Tensor
    scale: Tensor | None
    of_x_t: Tensor
    of_output: Tensor
    noise: Tensor | None
    of_previous: Tensor | None
    estimate_of_x_t: Tensor
    estimate_of_output: Tensor


def rows_of(update: Update, denoiser: Any, linear: Linear | None) -> list[Row]:
    """The steps in terms of the network's output, or of the estimate if it is not linear in it."""
    one = torch.ones_like(update.of_x_t)
    p, q, scale = linear or (one, 0 * one, one)
    log_snr = denoiser.schedule.log_snr(downwards(denoiser.schedule))
    columns: list[Tensor | None] = [
        None if torch.allclose(scale, one, rtol=1e-12) else scale,
        update.of_x_t + update.of_x_0 * q,
        update.of_x_0 * p,
        update.noise,
        update.of_previous,
        q,
        p,
    ]
    cast = [
        [None] * len(one) if c is None else pad(c, denoiser.missing_dim, denoiser.dtype).unbind()
        for c in columns
    ]
    levels = log_snr if linear is None else log_snr.to(network_dtype(denoiser.network))
    return [Row(*row) for row in zip(levels.unbind(), *cast, strict=True)]


def fused_step(
    network: Callable[..., Tensor],
    x_t: Tensor,
    previous: Tensor | None,
    z: Tensor | None,
    row: Row,
    context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """The network's call and the update, compiled as one function."""
    state = x_t if row.scale is None else x_t / row.scale
    level, extra = row.log_snr.expand(len(x_t)), () if context is None else (context,)
    output = network(state.to(row.log_snr.dtype), level, *extra).to(x_t.dtype)
    if output.shape != x_t.shape:
        raise ValueError(
            f"argument 'network': got an output of shape {tuple(output.shape)}; expected the shape of the "
            f"states, {tuple(x_t.shape)}. Keep the batch axis in front, and return one number for each entry."
        )
    return combine(output, x_t, previous, z, row)


def combine(
    output: Tensor, x_t: Tensor, previous: Tensor | None, z: Tensor | None, row: Row
) -> tuple[Tensor, Tensor | None]:
    r""":math:`x_{t-1}`, and :math:`\hat x_0(x_t)` where the next step uses it."""
    x_s = (row.of_x_t * x_t).addcmul_(row.of_output, output)
    if row.noise is not None and z is not None:
        x_s.addcmul_(row.noise, z)
    if row.of_previous is None or previous is None:
        return x_s, None
    x_s.addcmul_(row.of_previous, previous)
    return x_s, (row.estimate_of_x_t * x_t).addcmul_(row.estimate_of_output, output)


def downwards(schedule: NoiseSchedule) -> Tensor:
    """Timesteps ``T … 2``, from each of which a step leads to another state."""
    return torch.arange(schedule.num_timesteps, 1, -1, device=schedule.device)


def start_states(model: DiffusionModel, num_samples: int, x_T: Tensor | None) -> Tensor:
    """States to start from: the given ones, after a check, or draws from the prior."""
    num_samples = check_count("num_samples", num_samples, 1, "Pass the number of data to draw.")
    if x_T is None:
        return ReverseWalk(model).start().sample((num_samples,))
    expected = (num_samples, *model.event_shape)
    fit = getattr(x_T, "shape", None) == expected and getattr(x_T, "device", None) == model.device
    require(
        fit and check_finite("argument 'x_T'", x_T, "Draw new ones.") is x_T,
        "argument 'x_T'",
        f"states of shape {tuple(x_T.shape)} on {x_T.device}"
        if isinstance(x_T, Tensor)
        else described(x_T),
        f"{expected} on {model.device}, one for each of {num_samples} data",
        "Draw them from diffusion.prior().",
    )
    return x_T.to(model.dtype)
