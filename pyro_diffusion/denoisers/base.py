r"""Denoisers: modules whose forward *returns* :math:`p_\theta(x_{t-1} \mid x_t)` (E6).

A denoiser estimates the datum, :math:`\hat x_0(x_t, \lambda_t)`. Its reverse kernel is the posterior
:math:`q(x_{t-1} \mid x_t, x_0)` of the forward process at that estimate; for bits and categories it is the
mean of the posterior over the possible data. For Gaussian noise the mean is
:math:`\tilde\mu_t(x_t, \hat x_0)`, which is exact for the true :math:`E[x_0 \mid x_t]` because
:math:`\tilde\mu_t` is linear in :math:`x_0`. Tweedie's formula gives the score,

.. math::
    \nabla \log q(x_t) = \frac{a_t\, \hat x_0 - x_t}{\sigma_t^2} .

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), section 3.2.
    https://arxiv.org/abs/2006.11239
"""

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pyro_diffusion.checks import check_argument, check_finite, check_shape, require
from pyro_diffusion.display import size_in_words
from pyro_diffusion.given import beside, flattened, takes
from pyro_diffusion.networks import network_dtype
from pyro_diffusion.params import shared_copy
from pyro_diffusion.processes import Denoised, ForwardProcess, GaussianProcess, pad
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class Denoiser(nn.Module, ABC):
    r"""A family of reverse kernels :math:`p_\theta(x_{t-1} \mid x_t)`, :math:`t = 1 … T`.

    Args:
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum, in the chain's space.
    """

    def __init__(self, schedule: NoiseSchedule, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.schedule: NoiseSchedule = check_argument(
            "schedule", schedule, NoiseSchedule, "LinearSchedule(1000)"
        )
        remedy = "Pass (64,) for vectors of 64 numbers, () for single numbers."
        self.event_shape = check_shape("event_shape", event_shape, remedy)
        require(
            schedule.event_shape in (torch.Size(), self.event_shape),
            "argument 'schedule'",
            f"curves for data of shape {tuple(schedule.event_shape)}",
            f"{event_shape}, one for each entry, or a single curve",
            "Build the schedule with the event shape of your data.",
        )

    @property
    def process(self) -> ForwardProcess:
        """The forward process whose posterior the kernels estimate; made on demand."""
        return GaussianProcess(self.schedule, self.event_shape)

    @property
    def event_dim(self) -> int:
        """Number of rightmost dimensions that form one datum."""
        return len(self.event_shape)

    @property
    def missing_dim(self) -> int:
        """Event dimensions that coefficients lack: all of them, or none if each entry has its own curve."""
        return self.event_dim - self.schedule.event_dim

    #: Whether the estimate is :math:`E[x_0 \mid x_t]` of the chain itself, so that its Jacobian times
    #: :math:`\sigma_t^2 / a_t` is a covariance; a network learns the estimate, and not its Jacobian.
    is_exact: ClassVar[bool] = False

    def with_schedule(self, schedule: NoiseSchedule) -> Self:
        """The same denoiser, parameters included, for a chain of another schedule."""
        denoiser = shared_copy(self)
        denoiser.schedule = schedule
        return denoiser

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs."""

    @abstractmethod
    def denoise(self, x_t: Tensor, log_snr: Tensor) -> Denoised:
        r"""The estimate of :math:`x_0`, with logits and a variance where the denoiser has them.

        The arguments are those of :meth:`~pyro_diffusion.denoisers.Denoiser.x_0_hat`. A denoiser of
        conditional data also takes ``context=`` and ``null=``.
        """

    def reverse_kernel(self, x_t: Tensor, t: int | Tensor, denoised: Denoised) -> TorchDistribution:
        r""":math:`p_\theta(x_{t-1} \mid x_t)` from the denoiser's output."""
        return self.process.reverse(x_t, denoised, t)

    def x_0_hat(self, x_t: Tensor, log_snr: Tensor, **given: Any) -> Tensor:
        r"""Estimate of :math:`x_0` from a state, both ``batch_shape + event_shape``.

        Args:
            x_t: State, shape ``batch_shape + event_shape``.
            log_snr: Its log-SNR, shape broadcastable to ``batch_shape`` (+ the schedule's event shape).
            given: ``context=`` of conditional data.
        """
        return self.denoise(x_t, log_snr, **given).x_0_hat

    def embed(self, x_0: Tensor) -> Tensor:
        """Data as states of a chain without a likelihood: unchanged, unless a subclass converts them."""
        return x_0

    def decode(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        r"""The denoiser's own :math:`p(x_0 \mid x_1)`, for models without a likelihood."""
        return self.reverse_kernel(x_1, 1, denoised)

    if TYPE_CHECKING:

        def __call__(self, x_t: Tensor, t: int | Tensor, **given: Any) -> TorchDistribution: ...

    def forward(self, x_t: Tensor, t: int | Tensor, **given: Any) -> TorchDistribution:
        r"""The reverse kernel :math:`p_\theta(x_{t-1} \mid x_t)`.

        Args:
            x_t: State at time ``t``, shape ``batch_shape + event_shape``.
            t: Timestep in ``{1, …, T}``; an integer, or a LongTensor broadcastable to
                ``batch_shape``.
            given: ``context=`` of conditional data.

        Returns:
            A distribution over :math:`x_{t-1}` with batch shape ``batch_shape`` and event shape
            ``event_shape``, in the chain's space. From :math:`x_1` to data use :meth:`decode`.

        Raises:
            ValueError: A state of another event shape, a timestep outside ``{1, …, T}``, an estimate that
                is not finite, or a context for a denoiser that takes none.
        """
        self.schedule.check_timestep(t, at_least=1)
        denoised = self.denoise(x_t, self.schedule.log_snr(t), **self.check_given(given))
        return self.reverse_kernel(x_t, t, denoised)

    def score(self, x_t: Tensor, log_snr: Tensor, **given: Any) -> Tensor:
        r"""Tweedie's :math:`\nabla \log q(x_t) = (a\, \hat x_0 - x_t) / \sigma^2`.

        Args:
            x_t: State, shape ``batch_shape + event_shape``.
            log_snr: Its log-SNR, shape broadcastable to ``batch_shape``.
            given: ``context=`` of conditional data.

        Returns:
            The score, of ``x_t``'s shape.

        Raises:
            ValueError: States without a score, such as bits.

        References:
            Tweedie's Formula and Selection Bias (Efron, 2011).
            https://doi.org/10.1198/jasa.2011.tm11181
        """
        self.process.check_has_score(
            "x_t", "Use denoise(x_t, log_snr), the denoiser's estimate of the datum."
        )
        signal, noise = (pad(c, self.missing_dim, x_t.dtype) for c in self.schedule.scales(log_snr))
        return (signal * self.x_0_hat(x_t, log_snr, **given) - x_t) / noise**2

    @property
    def is_conditional(self) -> bool:
        """Whether it estimates conditional data."""
        return takes(self.denoise, "context")

    def check_given(self, given: dict[str, Any]) -> dict[str, Any]:
        """``given``, if it is empty or the denoiser takes a context."""
        if given and not self.is_conditional:
            network = getattr(self, "network", None)
            whose = (
                "" if network is None else f" whose network, {type(network).__name__}, takes none"
            )
            raise ValueError(
                f"argument 'context': got one for a {type(self).__name__}{whose or ', which takes none'}; "
                "expected data alone. Leave it out, or use a NeuralDenoiser whose network takes a context, "
                "such as MLP(event_shape, context_shape=(8,)) or MLP(event_shape, num_classes=10)."
            )
        return given

    def batch_shape(self, x_t: Tensor) -> torch.Size:
        """The batch shape of states, if they have the event shape."""
        batch_dim = x_t.dim() - self.event_dim
        if batch_dim < 0 or x_t.shape[batch_dim:] != self.event_shape:
            raise ValueError(
                f"argument 'x_t': got shape {tuple(x_t.shape)}; expected batch_shape + event_shape "
                f"with event_shape {tuple(self.event_shape)}. Reshape the states, or build "
                f"{type(self).__name__} with the event shape of your data."
            )
        return x_t.shape[:batch_dim]


def denoiser_in_words(denoiser: Denoiser) -> str:
    """Its class, its network and parameters, and its other arguments without the event shape, in a line."""
    of_shape = f"event_shape={tuple(denoiser.event_shape)}"
    arguments = denoiser.extra_repr().replace(of_shape, "").strip(", ")
    network = getattr(denoiser, "network", None)
    context = " with a context" if network is not None and denoiser.is_conditional else ""
    parts = [size_in_words([network]) + context] if network else []
    parts += [arguments] if arguments else []
    return ": ".join([type(denoiser).__name__, *([", ".join(parts)] if parts else [])])


class Networked:
    """A denoiser with a network: the dtype of its states, and the call of the network."""

    network: nn.Module

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes a context, as its third argument."""
        known = getattr(self.network, "takes_context", None)
        fits = (_misfit(self.network, _ARGUMENTS[:count]) is None for count in (3, 4))
        return any(fits) if known is None else bool(known)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's first parameter; float32 for a network of half precision."""
        return torch.promote_types(network_dtype(self.network), torch.float32)

    def call_network(
        self,
        state: Tensor,
        log_snr: Tensor,
        batch_shape: torch.Size,
        *,
        needed_by: tuple[Any, ...],
        count: int = 1,
        context: Any = None,
        null: Tensor | None = None,
    ) -> Tensor:
        """The network's output for states with any batch shape; the network gets one flat batch axis.

        It is called as ``network(state, log_snr)``, with a context as ``network(state, log_snr, context)``,
        and with dropped contexts as ``network(state, log_snr, context, null)``.

        Args:
            state: The network's input, ``batch_shape`` + its shape.
            log_snr: Log-SNR, broadcastable to ``batch_shape``.
            batch_shape: Batch shape of the states.
            needed_by: What needs the output. It is converted to words for the error message only.
            count: Numbers for each entry of a state. If there are several, the output has one more axis.
            context: Tensors of ``(N, …)``, ``N`` the last batch dimension.
            null: Rows without a context, ``(N,)``.

        Returns:
            The output in the state's dtype, of the state's shape, ``+ (count,)`` if ``count > 1``.

        Raises:
            ValueError: A network that does not take these arguments; an output of another shape, or one that
                is not finite.
        """
        network, dtype = self.network, network_dtype(self.network)
        flat = state.reshape(-1, *state.shape[len(batch_shape) :]).to(dtype)
        extra = [beside(flat, flattened(c, batch_shape)) for c in (context, null) if c is not None]
        level = log_snr.expand(batch_shape).reshape(-1).to(dtype)
        try:
            output = network(flat, level, *extra)
        except TypeError:
            check_signature(network, 2 + len(extra))
            raise
        per_entry = (count,) if count > 1 else ()
        check_argument("network", output, Tensor, "the output alone from its forward")
        if output.shape != flat.shape + per_entry:
            raise ValueError(
                f"argument 'network': got an output of shape {tuple(output.shape)}; expected "
                f"{tuple(flat.shape + per_entry)}, {count} number(s) for each entry of the network's input, "
                f"for {' with '.join(map(str, needed_by))}. Keep the batch axis in front; MLP takes "
                f"num_outputs={count}."
            )
        remedy = "Lower the learning rate or clip gradients, and check the data's scale."
        check_finite("argument 'network'", output, remedy)
        return output.reshape(state.shape + per_entry).to(state.dtype)


#: What a network is called with: a state, its log-SNR, a context, and the rows without one.
_ARGUMENTS = ("x_t", "log_snr", "context", "null")


def check_network(network: Any, example: str) -> nn.Module:
    """``network``, if it is a module whose ``forward`` takes a state and a log-SNR."""
    check_argument("network", network, nn.Module, example)
    if not any(_misfit(network, _ARGUMENTS[:count]) is None for count in (2, 3, 4)):
        raise ValueError(
            f"argument 'network': got {type(network).__name__}, whose forward does not take (x_t, log_snr): "
            f"{_misfit(network, _ARGUMENTS[:2])}; expected one that does, because the estimate depends on "
            "how noisy the state is. Wrap it in a module with forward(self, x_t, log_snr), or use MLP."
        )
    return network


def check_signature(network: nn.Module, count: int) -> None:
    """Raise a ``ValueError`` if a network cannot be called with so many arguments."""
    arguments = _ARGUMENTS[:count]
    misfit = _misfit(network, arguments)
    if misfit is not None:
        raise ValueError(
            f"argument 'network': got {type(network).__name__}, whose forward does not take "
            f"({', '.join(arguments)}): {misfit}; expected one that does. Pass context= if the network takes "
            "one, and null= if it has a null token as well; leave out what it does not take."
        ) from misfit


def _misfit(network: nn.Module, arguments: tuple[str, ...]) -> TypeError | None:
    """Why a network cannot be called with these arguments; ``None`` if it can, or if this is unknown."""
    try:
        signature = inspect.signature(network.forward)
    except ValueError:  # of a compiled extension
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return error
    return None
