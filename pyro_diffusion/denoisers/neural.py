r"""The denoiser to train: reverse kernels from the output of a network."""

from typing import Any

from pyro.distributions import Categorical
from torch import Tensor, nn

from pyro_diffusion.checks import check_argument, holds
from pyro_diffusion.denoisers.base import Denoiser, Networked, check_network
from pyro_diffusion.denoisers.parameterizations import NoisePrediction, Parameterization
from pyro_diffusion.denoisers.variances import ForwardVariance, ReverseVariance
from pyro_diffusion.processes import ChainStep, Denoised, GaussianProcess, pad
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class NeuralDenoiser(Networked, Denoiser):
    r"""Reverse kernels from a network: :math:`N(\tilde\mu_t(x_t, \hat x_0), \Sigma_t)`.

    Args:
        network: Called as ``network(x_t, log_snr)`` with one flattened batch axis in front: ``x_t``
            of shape ``(B,) + event_shape``, in a variance-exploding chain divided by
            :math:`\sqrt{a_t^2 + \sigma_t^2}`; ``log_snr`` of shape ``(B,)``. Its output has the
            shape of ``x_t``, with one more axis at the end if prediction and variance need several
            numbers for each entry. With a context it is called as ``network(x_t, log_snr, context)``.
        schedule: Noise schedule of the chain.
        event_shape: Shape of one datum.
        prediction: What the output means: ``NoisePrediction()``, the default, ``DataPrediction()``,
            ``VelocityPrediction()``, ``ScorePrediction()`` (all for the state that the network gets),
            or ``LevelPrediction(num_levels)`` for data with finitely many values.
        variance: Variance of the kernels: ``ForwardVariance()``, the default,
            ``PosteriorVariance()``, ``LearnedVariance()`` or ``OptimalVariance.from_data(…)``.

    Raises:
        ValueError: An argument of another kind. From a call: an output of another shape, or one
            that is not finite.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LinearSchedule(1000), event_shape=(2,))
        >>> kernel = denoiser(torch.randn(5, 2), t=10)
        >>> kernel.batch_shape, kernel.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        event_shape: tuple[int, ...],
        *,
        prediction: Parameterization | None = None,
        variance: ReverseVariance | None = None,
    ) -> None:
        super().__init__(schedule, event_shape)
        self.network = check_network(network, "MLP((64,))")
        prediction = NoisePrediction() if prediction is None else prediction
        variance = ForwardVariance() if variance is None else variance
        self.prediction: Parameterization = check_argument(
            "prediction", prediction, Parameterization, "NoisePrediction()"
        )
        self.variance: ReverseVariance = check_argument(
            "variance", variance, ReverseVariance, "PosteriorVariance()"
        )

    @property
    def process(self) -> GaussianProcess:
        return GaussianProcess(self.schedule, self.event_shape)

    def denoise(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Denoised:
        batch_shape = self.batch_shape(x_t)
        # The network gets the state of the variance-preserving chain with the same log-SNR.
        signal, noise = self.schedule.scales(log_snr)
        scale = (signal**2 + noise**2).sqrt()
        signal, noise, scale = (
            pad(c, self.missing_dim, x_t.dtype) for c in (signal / scale, noise / scale, scale)
        )
        state, count = x_t / scale, self.prediction.num_outputs + self.variance.num_outputs
        # If each entry has a log-SNR of its own, the network takes their mean.
        dims = tuple(range(-self.schedule.event_dim, 0))
        output = self.call_network(
            state,
            log_snr.mean(dims) if dims else log_snr,
            batch_shape,
            needed_by=(self.prediction, self.variance),
            count=count,
            context=context,
            null=null,
        )
        variance = None
        if self.variance.num_outputs:
            output, variance = output[..., :-1], output[..., -1]
            output = output.squeeze(-1) if self.prediction.num_outputs == 1 else output
        return Denoised(*self.prediction.estimate(output, state, signal, noise), variance)

    def reverse_kernel(self, x_t: Tensor, t: int | Tensor, denoised: Denoised) -> TorchDistribution:
        def positive(step: ChainStep) -> Tensor:
            """The variance, if it is positive everywhere."""
            variance = self.variance(step, denoised.variance)
            if not holds(variance > 0):
                raise ValueError(
                    f"argument 'variance': got a smallest value of {variance.min().item():g} from "
                    f"{self.variance}; expected positive variances at every timestep. At t = 1, where β̃ is "
                    "zero, return β_1, as PosteriorVariance does."
                )
            return variance

        return self.process.reverse(x_t, denoised, t, positive)

    def embed(self, x_0: Tensor) -> Tensor:
        return self.prediction.embed(x_0)

    def decode(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        if denoised.logits is None:
            return super().decode(x_1, denoised)
        return Categorical(logits=denoised.logits).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return (
            f"event_shape={tuple(self.event_shape)}, prediction={self.prediction}, "
            f"variance={self.variance}"
        )
