r"""Missing entries of data, given the observed ones, under the joint model (E17)."""

import math
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from pyro_diffusion.checks import as_numbers, check_data, require
from pyro_diffusion.denoisers import Denoised
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.given import Given, as_real, observed_part, usable
from pyro_diffusion.inference.draws import PosteriorSamples
from pyro_diffusion.inference.runs import Runs
from pyro_diffusion.inference.targets import Basis, Local, Target, in_chains_units, of_columns
from pyro_diffusion.reading import reading
from pyro_diffusion.scoring import log_density
from pyro_diffusion.typed import TorchDistribution
from pyro_diffusion.walk import check_weights

__all__ = ["impute"]


def impute(
    diffusion: DiffusionModel,
    x_0: Tensor,
    mask: Tensor,
    num_samples: int,
    *,
    num_particles: int = 256,
    num_runs: int = 16,
    context: Any = None,
    common_noise: bool = False,
    progress: bool = True,
) -> PosteriorSamples:
    r"""Draw missing entries given observed ones, :math:`x_{\text{mis}} \sim p_\theta(\cdot \mid
    x_{\text{obs}})`, for ``N`` data at once.

    The draws are those of the joint model, by twisted sequential Monte Carlo as in
    :func:`~pyro_diffusion.inference.posterior_samples`. The last weight is the decoder's own
    :math:`p(x_{0, \text{obs}} \mid x_1)`. The weights are exact for every likelihood that acts entry by
    entry, and for the kernels of the exact denoisers. The evidence is the log-density (or log-mass) of the
    observed entries under the joint model,

    .. math::
        \log Z = \log p_\theta(x_{\text{obs}}) = \log \int p_\theta(x_0)\, dx_{\text{mis}}, \qquad
        \log p_\theta(x_a \mid x_b) = \log p_\theta(x_a, x_b) - \log p_\theta(x_b) .

    A reader's ``mask=`` gives another number, the evidence of the chain of the observed part. It is another
    model for each pattern of gaps, and the difference of two such numbers is not a conditional density. The
    two agree if the entries are independent, or if a network that was trained under masks has learned every
    marginal exactly.

    Args:
        diffusion: The model. Its parameters are read.
        x_0: Data, ``(N,)`` + the shape of one datum; missing entries may be NaN.
        mask: True where an entry is observed, boolean, of the data's shape; at least one a row.
        num_samples: Number of draws for each datum.
        num_particles: Particles of a run; see :func:`~pyro_diffusion.inference.posterior_samples`.
        num_runs: Independent runs.
        context: Context of conditional data, a row for each datum, or one row for all.
        common_noise: Whether all data share their random numbers.
        progress: Show a progress bar if it takes more than five seconds.

    Returns:
        :class:`~pyro_diffusion.inference.PosteriorSamples` with ``samples`` of ``(num_samples, N) +
        event_shape``, in which observed entries are those of ``x_0``, and numbers of ``(N,)``. A run takes
        :math:`K T` network rows a datum, and as many vector-Jacobian products for each observed entry.

    Raises:
        ValueError: A mask that does not fit or has an empty row; data that the model does not take; a
            transform or a likelihood that mixes entries.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(20))
        >>> x_0, mask = torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]])
        >>> draws = impute(DiffusionModel(denoiser), x_0, mask, 100, num_particles=50)
        >>> draws.log_evidence  # N(1; 0, 1)
        tensor([-1.4189], dtype=torch.float64)

    References:
        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023), section
        3.3. https://arxiv.org/abs/2306.17775
    """
    diffusion = check_weights(check_diffusion(diffusion))
    mask, given = as_numbers("mask", mask), Given.of(context=context)
    mask = mask.to(x_0.device) if isinstance(x_0, Tensor) else mask
    with torch.inference_mode(False), reading(diffusion, data=(x_0, given)):
        x_0 = check_data(usable(x_0) if isinstance(x_0, Tensor) else x_0, mask)
        given = given.with_rows(len(x_0), shared=True, device=diffusion.device)
        target = Observed(diffusion, x_0, mask, given)
        length = diffusion.schedule.num_timesteps
        runs = Runs(
            diffusion,
            target,
            num_samples,
            num_particles=num_particles,
            num_runs=num_runs,
            given=given,
            exponents=torch.ones(length + 1, dtype=torch.float64),
            common_noise=common_noise,
            progress=progress,
        )
        return runs.posterior(single=False)


class Observed(Target):
    """Exact values of some entries of each datum.

    Rows of the expansion are the observed entries of the states. Data with fewer of them than others have
    empty rows, of variance one.
    """

    argument = "x_0"
    remedy = ""
    is_exact = True
    is_divisible = True

    def __init__(
        self, diffusion: DiffusionModel, x_0: Tensor, mask: Tensor, given: Given = Given()
    ) -> None:
        super().__init__(diffusion)
        self.x_0, self.mask, self.num_data = x_0, mask, len(x_0)
        self.has_rows = diffusion.process.has_score
        if not self.has_rows:
            return
        states = diffusion.embed(x_0, mask=mask).double().flatten(1)
        of_state = diffusion.state_mask(mask).flatten(1)
        count = int(of_state.sum(1).max())
        # Observed entries first, in their order.
        index = (~of_state).to(torch.uint8).sort(dim=1, stable=True).indices[:, :count]
        real = of_state.gather(1, index)
        self.index, self.real = index, real
        self.values = states.gather(1, index)
        self.num_rows, schedule = count, diffusion.schedule
        self.offset = 0.5 * math.log(2 * math.pi) * (~real).sum(1).double()
        x_1 = diffusion.prior().sample((len(x_0),))
        if diffusion.transform is not None:
            _check_by_entry(diffusion.transform, x_0)
            self.offset = self.offset + diffusion.log_volume(x_0, mask).double()
        denoised = diffusion.denoiser.denoise(
            x_1, schedule.log_snr(1), **diffusion.denoiser.check_given(given.of_kernels())
        )
        law: Any = diffusion.decode_inside(x_1, denoised)
        coarse = law.support.is_discrete or not in_chains_units(diffusion, law, denoised)
        width = self._width().expand(diffusion.event_shape).flatten()[index]
        self.variance = torch.where(real, width if coarse else 0.0, 1.0)

    def _width(self) -> Tensor:
        """About the variance of an observed level, in the chain's units."""
        scale = getattr(self.diffusion.likelihood, "scale", None)
        schedule = self.diffusion.schedule
        width: Tensor = (-schedule.log_snr(1)).exp() if scale is None else scale.detach().square()
        return width.double()

    def part(self, rows: slice) -> Self:
        target = copy(self)
        names = ("x_0", "mask", "index", "real", "values", "offset", "variance")
        for name in names if self.has_rows else names[:2]:
            setattr(target, name, getattr(self, name)[rows])
        target.num_data = len(target.x_0)
        return target

    @property
    def has_basis(self) -> bool:
        return self.has_rows

    def basis(self) -> Basis:
        size = self.diffusion.event_shape.numel()
        rows = torch.nn.functional.one_hot(self.index, size).double() * self.real.unsqueeze(-1)
        return Basis(rows, self.values.where(self.real, 0.0), self.variance, self.offset)

    def local(self, x_0_hat: Tensor, exponent: float) -> Local:
        columns = x_0_hat.shape[1]
        index, real, values, offset, variance = (
            of_columns(x, columns)
            for x in (self.index, self.real, self.values, self.offset, self.variance)
        )
        estimate = x_0_hat.double().flatten(2)
        index_of = index.expand(*estimate.shape[:2], -1)
        residual = torch.where(real, values - estimate.gather(2, index_of), 0.0)
        rows = torch.nn.functional.one_hot(index, estimate.shape[-1]).double()
        rows = rows * real.unsqueeze(-1)
        return Local(rows, residual, variance, offset.expand(estimate.shape[:2]))

    def log_prob(self, x_0: Tensor) -> Tensor:
        raise NotImplementedError("a point mass has no density")

    def expected(self, law: TorchDistribution) -> Tensor:
        """The log-mass of the observed entries."""
        columns = law.batch_shape[1]
        x_0, mask = of_columns(self.x_0, columns), of_columns(self.mask, columns)
        observed = observed_part(law, mask)
        return log_density(observed, as_real(x_0))  # type: ignore[arg-type]

    def drawn(self, law: TorchDistribution) -> tuple[Tensor, Tensor]:
        return self.completed(law.sample()), self.expected(law)

    def completed(self, x_0: Tensor) -> Tensor:
        """Observed entries as they were, and the others as drawn."""
        columns = x_0.shape[1]
        return torch.where(
            of_columns(self.mask, columns), of_columns(self.x_0, columns).to(x_0.dtype), x_0
        )

    def known(self, denoised: Denoised, x_t: Tensor) -> Denoised:
        """An estimate in which observed bits and categories have their values."""
        assert denoised.logits is not None
        columns = x_t.shape[1]
        x_0, mask = of_columns(self.x_0, columns), of_columns(self.mask, columns)
        logits = denoised.logits
        if logits.shape == x_t.shape:
            certain = _CERTAIN * (2 * x_0.to(logits) - 1)
        else:
            x_0 = torch.where(mask, x_0, 0)
            certain = _CERTAIN * torch.nn.functional.one_hot(x_0.long(), logits.shape[-1]).to(
                logits
            )
            mask = mask.unsqueeze(-1)
        return denoised._replace(logits=torch.where(mask, certain, logits))


_CERTAIN = 8.0  # logit of an observed value in a proposal, which leaves room for other values


def _check_by_entry(transform: Any, x_0: Tensor) -> None:
    """Raise a ``ValueError`` for a transform that mixes entries, whose log-Jacobian is one for each datum."""
    shape = transform.log_abs_det_jacobian(x_0, transform(x_0)).shape
    require(
        shape == x_0.shape,
        "argument 'diffusion'",
        f"a model whose transform, {transform}, mixes the entries of a datum",
        "a transform that acts entry by entry, because missing entries are left out",
        "Use Standardize or Logit, or posterior_samples with LinearGaussian(…, linearize=True).",
    )
