r"""The denoiser of categories: reverse kernels that act entry by entry, from a network's logits.

The kernel follows from :math:`\pi_k(x_t)`, the probability that an entry of :math:`x_0` is category
:math:`k`; see :class:`~pyro_diffusion.processes.CategoricalProcess`.
"""

from typing import Any

from pyro.distributions import Categorical
from torch import Tensor, nn

from pyro_diffusion.checks import check_count, check_values, widened
from pyro_diffusion.denoisers.base import Denoiser, Networked, check_network
from pyro_diffusion.processes import CategoricalProcess, Denoised, check_fixed_curve
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.typed import TorchDistribution


class NeuralCategoricalDenoiser(Networked, Denoiser):
    r""":math:`\pi` from a network, which predicts each entry given all others.

    The known law of an entry of :math:`x_t` turns the network's logits :math:`\ell_k` into the posterior's,

    .. math::
        \log \pi_k = \ell_k + \log q(x_t \mid x_0 = k) + \text{const},

    so that a network whose output is zero is exact for independent entries with equally likely categories.
    The estimate ``x_0_hat`` is the most probable category, a state of ``batch_shape + event_shape``. It has
    no gradient. Categories have no order, and so no mean; the kernels use ``logits``, the :math:`\log \pi_k`
    up to a constant, ``batch_shape + event_shape + (K,)``.

    Args:
        network: Called as ``network(one_hot, log_snr)``, and with a context as ``network(one_hot, log_snr,
            context)``. ``one_hot`` has shape ``(B,) + event_shape + (K,)``: 1 at the entry's category and
            −1 at the others. One number for each entry would give the categories an order.
            ``log_snr`` has shape ``(B,)``. The output has the shape of ``one_hot``.
        schedule: Noise schedule of the chain, :math:`\bar\alpha_t` the share of entries that were never drawn
            anew.
        event_shape: Shape of one datum.
        num_categories: :math:`K \ge 2`; data are whole numbers in ``0 … K − 1``, of any dtype.

    Raises:
        ValueError: Fewer than two categories, or a schedule that is learned or has a curve for each entry.
            From a call: an output of another shape, or one that is not finite. From a program: data that are
            not whole numbers in ``0 … K − 1``.

    Example:
        >>> schedule = LinearDecaySchedule(200)
        >>> denoiser = NeuralCategoricalDenoiser(MLP((20, 4)), schedule, (20,), num_categories=4)
        >>> diffusion = DiffusionModel(denoiser)
        >>> diffusion.sample(3).shape
        torch.Size([3, 20])

    References:
        Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), sections 3.1 and
        3.3. https://arxiv.org/abs/2107.03006
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        event_shape: tuple[int, ...],
        *,
        num_categories: int,
    ) -> None:
        super().__init__(schedule, event_shape)
        self.num_categories = check_count(
            "num_categories", num_categories, 2, "Nucleotides have 4, bits 2.", "of an entry"
        )
        check_fixed_curve(schedule, "categories")
        self.network = check_network(network, "MLP((20, 4))")

    @property
    def process(self) -> CategoricalProcess:
        """Uniform noise on the schedule; made on demand."""
        return CategoricalProcess(self.schedule, self.event_shape, self.num_categories)

    def denoise(
        self, x_t: Tensor, log_snr: Tensor, context: Any = None, null: Tensor | None = None
    ) -> Denoised:
        process = self.process
        output = self.call_network(
            2 * process.is_category(x_t).to(x_t.dtype) - 1,
            log_snr,
            self.batch_shape(x_t),
            needed_by=("a chain of categories, whose network gets them one-hot",),
            context=context,
            null=null,
        )
        logits = output + process.log_likelihood(x_t, log_snr)
        return Denoised(logits.argmax(-1).to(x_t.dtype), logits)

    def embed(self, x_0: Tensor) -> Tensor:
        numbers = widened(x_0 if x_0.is_floating_point() else x_0.to(self.dtype))
        largest = self.num_categories - 1
        proper = (numbers >= 0) & (numbers <= largest) & (numbers == numbers.round())
        expected = f"whole numbers in 0 … {largest}, the categories of this model"
        remedy = "Number the categories from 0, and give the model as many as the data have."
        return check_values("site 'x_0'", numbers, proper, expected, remedy)

    def decode(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        return Categorical(logits=denoised.logits).to_event(self.event_dim)

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}, num_categories={self.num_categories}"
