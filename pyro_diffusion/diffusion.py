r"""Diffusion models: the chains of :mod:`~pyro_diffusion.chains` with linear-Gaussian kernels.

A diffusion model is a Markovian hierarchical VAE with three restrictions: latents of the data's
size, the fixed encoder :math:`q(x_t \mid x_{t-1}) = N(\sqrt{\alpha_t} x_{t-1}, (1 - \alpha_t) I)`, and
a standard normal end. What is learned is the reverse chain,
:math:`p_\theta(x_{0:T}) = p(x_T) \prod_t p_\theta(x_{t-1} \mid x_t)`.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015).
    https://arxiv.org/abs/1503.03585
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), section 4.
    https://arxiv.org/abs/2208.11970
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, Transform

from pyro_diffusion.chains import (
    BottomUpGuide,
    GenerativeChain,
    ProgramPair,
    TimestepPlate,
    TopDownGuide,
    evaluating,
)
from pyro_diffusion.denoisers import Denoised, Denoiser, check_argument
from pyro_diffusion.kernels import (
    forward_marginal,
    forward_posterior,
    forward_transition,
    terminal_prior,
)
from pyro_diffusion.schedules import NoiseSchedule
from pyro_diffusion.store import ParamScope
from pyro_diffusion.timesteps import Timesteps
from pyro_diffusion.transforms import check_transform, describe, forget, parts, transformed

__all__ = ["DiffusionModel"]


class DiffusionModel(ParamScope):
    r"""One model, its programs and its reference sampler.

    ``model`` with ``guide`` under ``Trace_ELBO`` is the hierarchical bound (E8), term by term the
    consistency form (E11); ``model`` with ``posterior_guide``, the same joint distribution in the
    model's order, is the matching form (E10) and has analytic KLs under ``TraceMeanField_ELBO``;
    ``subsampled()`` is the pair one trains with. All of them share the parameters of this object.

    Args:
        denoiser: The reverse kernels, which bring schedule and event shape.
        likelihood: :math:`p(x_0 \mid x_1)` given :math:`\hat x_0(x_1)`, and the embedding of the
            data; ``None`` takes the denoiser's own: its kernel at ``t = 1`` and the data as they are,
            or its levels if it predicts levels.
        transform: Torch transform from the user's units to the model's, such as
            ``Standardize.from_data(x_0)``; its log-Jacobian enters at site ``x_0``, and the bound is in
            the user's units.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.

    Raises:
        ValueError: From a program: data of another shape or on another device than the model,
            empty, not finite, outside the likelihood's range or the transform's domain; a mask that
            does not fit; a network that misbehaves.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LogSNRSchedule(20), event_shape=(2,))
        >>> diffusion = DiffusionModel(denoiser)
        >>> svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-3}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(16, 2))
        >>> diffusion.sample(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Any = None,
        transform: Transform | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.transform = check_transform(transform)
        if not isinstance(transform, nn.Module):  # modules inside one that is none, to be found
            modules = [part for part in parts(transform) if isinstance(part, nn.Module)]
            self.transform_modules = nn.ModuleList(modules)
        self.denoiser = check_argument("denoiser", denoiser, Denoiser, "NeuralDenoiser(…)")
        proper = hasattr(likelihood, "embed") and callable(likelihood)
        if likelihood is not None and (isinstance(likelihood, type) or not proper):
            got = getattr(likelihood, "__name__", type(likelihood).__name__)
            raise ValueError(
                f"argument 'likelihood': got {got}; expected an object with embed(x_0) "
                "that can be called with x_0_hat, or None. Pass an object, such as "
                "DiscretizedGaussianLikelihood(num_levels=17)."
            )
        self.likelihood = likelihood

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's noise schedule."""
        return self.denoiser.schedule

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a state, and of a datum after embedding."""
        return self.denoiser.event_shape

    def __getstate__(self) -> dict[str, Any]:
        forget(self.transform)
        return super().__getstate__()

    @property
    def description(self) -> dict[str, str]:
        """What the numbers of a ``state_dict`` mean: everything but the network."""
        return super().description | {
            "schedule": _describe(self.schedule),
            "denoiser": _describe(self.denoiser),
            "likelihood": _describe(self.likelihood),
            "transform": describe(self.transform),
        }

    @property
    def model(self) -> GenerativeChain:
        r""":math:`p_\theta(x_{0:T})` as a Pyro program (E7); sites ``x_T … x_0``."""
        return GenerativeChain(
            self.prior,
            self.denoiser,
            self.decode,
            num_timesteps=self.schedule.num_timesteps,
            owner=self,
            state_mask=self.embed_mask,
        )

    @property
    def guide(self) -> BottomUpGuide:
        r""":math:`\prod_t q(x_t \mid x_{t-1})` as a Pyro program (E4); sites ``x_1 … x_T``."""
        return BottomUpGuide(
            self.forward_transition,
            num_timesteps=self.schedule.num_timesteps,
            embed=self.embed,
            owner=self,
            below="denoiser.schedule",
            state_mask=self.embed_mask,
        )

    @property
    def posterior_guide(self) -> TopDownGuide:
        r""":math:`q(x_T \mid x_0) \prod_t q(x_{t-1} \mid x_t, x_0)` as a Pyro program (E4)."""
        return TopDownGuide(
            self.embed,
            self.terminal_marginal,
            self.forward_posterior,
            num_timesteps=self.schedule.num_timesteps,
            owner=self,
            below="denoiser.schedule",
            state_mask=self.embed_mask,
        )

    def subsampled(
        self, num_timesteps: int = 1, *, timesteps: Timesteps | None = None
    ) -> TimestepPlate | ProgramPair:
        """The pair to train with: the bound at ``num_timesteps`` random timesteps for each datum.

        Args:
            num_timesteps: Draws ``k`` for each datum, and rows of the network that a step costs.
            timesteps: Law of the timesteps; stratified over the batch by default.

        Returns:
            An object with ``model`` and ``guide``. A chain of one step has one timestep to draw: its
            pair is ``model`` and ``posterior_guide`` themselves.

        Raises:
            ValueError: ``num_timesteps`` below one.
        """
        if not isinstance(num_timesteps, int) or num_timesteps < 1:
            raise ValueError(
                f"argument 'num_timesteps': got {num_timesteps!r}; expected a whole number of at "
                "least 1, the timesteps drawn for each datum. One is enough: the bound stays unbiased."
            )
        if self.schedule.num_timesteps == 1:
            return ProgramPair(self.model, self.posterior_guide)
        return TimestepPlate(
            self.embed,
            self.forward_marginal,
            self.forward_posterior,
            self.prior,
            self.reverse,
            num_timesteps=num_timesteps,
            chain_length=self.schedule.num_timesteps,
            timesteps=timesteps,
            owner=self,
            below="denoiser.schedule",
            state_mask=self.embed_mask,
            log_volume=None if self.transform is None else self.log_volume,
        )

    @torch.no_grad()
    def sample(self, num_samples: int = 1) -> Tensor:
        """Draw data by running the model without any; layers such as dropout are switched off.

        Args:
            num_samples: Number of data ``n``.

        Returns:
            Data in the user's units, shape ``(n,)`` + the datum's shape.
        """
        with evaluating(self):
            return self.model(num_samples=num_samples)

    # The kernels that the programs are made of.

    def embed(self, x_0: Tensor) -> Tensor:
        """Data as states of the chain, ``(N,) + event_shape``, in the chain's dtype."""
        if x_0.device != self.schedule.device:
            raise ValueError(
                f"argument 'x_0': got data on {x_0.device}; expected {self.schedule.device}, where "
                f"the model is. Call x_0.to({str(self.schedule.device)!r}), or move the model."
            )
        entrance = self.denoiser if self.likelihood is None else self.likelihood
        embedded = entrance.embed(
            x_0 if self.transform is None else transformed(self.transform, x_0)
        )
        if embedded.shape[1:] != self.event_shape:
            raise ValueError(
                f"argument 'x_0': got data of shape {tuple(x_0.shape)}, which are states of shape "
                f"{tuple(embedded.shape)} in the chain; expected (N,) + {tuple(self.event_shape)}. Reshape "
                f"the data, or build network and denoiser with event_shape {tuple(embedded.shape[1:])}."
            )
        if not embedded.is_floating_point() or (self.transform and not x_0.is_floating_point()):
            raise ValueError(
                f"argument 'x_0': got data of {x_0.dtype}, for which this model has a density; expected "
                "real numbers. Pass likelihood=DiscretizedGaussianLikelihood(num_levels=…) for whole "
                "numbers, or x_0.float() if they are measurements."
            )
        return embedded.to(self.denoiser.dtype)

    def embed_mask(self, mask: Tensor) -> Tensor:
        """Observed entries of a state, ``(N,) + event_shape``: all axes of an observed datum's entry."""
        if mask.shape[1:] != self.event_shape[: mask.dim() - 1]:
            raise ValueError(
                f"argument 'mask': got shape {tuple(mask.shape)} for states of shape (N,) + "
                f"{tuple(self.event_shape)}; expected an entry of the data to be an entry of the state, "
                "because unobserved ones are left out of both. Use a transform that acts entry by entry."
            )
        mask = mask.reshape(mask.shape + (1,) * (1 + self.denoiser.event_dim - mask.dim()))
        return mask.expand(len(mask), *self.event_shape)

    def log_volume(self, x_0: Tensor, mask: Tensor | None = None) -> Tensor:
        r""":math:`\log |\det \partial f / \partial x_0|` of the transform, for observed entries, ``(N,)``."""
        assert self.transform is not None
        log_jacobian = self.transform.log_abs_det_jacobian(x_0, self.transform(x_0))
        if mask is not None:
            log_jacobian = torch.where(mask, log_jacobian, 0.0)
        return log_jacobian.reshape(len(x_0), -1).sum(1)

    def prior(self) -> TorchDistribution:
        """:math:`p(x_T)` (E5)."""
        return terminal_prior(self.schedule, self.event_shape, dtype=self.denoiser.dtype)

    def decode(self, x_1: Tensor) -> TorchDistribution:
        r""":math:`p_\theta(x_0 \mid x_1)`, the term that a VAE calls its decoder."""
        return self._data_kernel(x_1, self.denoiser.denoise(x_1, self.schedule.log_snr(1)))

    def reverse(self, x_t: Tensor, t: Tensor) -> tuple[TorchDistribution, TorchDistribution]:
        r""":math:`p_\theta(x_{t-1} \mid x_t)` and :math:`p_\theta(x_0 \mid x_1)` from one network call."""
        denoised = self.denoiser.denoise(x_t, self.schedule.log_snr(t))
        return self.denoiser.reverse_kernel(x_t, t, denoised), self._data_kernel(x_t, denoised)

    def forward_transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_{t-1})` (E1)."""
        return forward_transition(x_prev, t, self.schedule, event_dim=self.denoiser.event_dim)

    def forward_marginal(self, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_0)` (E2) for an embedded ``x_0``."""
        return forward_marginal(x_0, t, self.schedule, event_dim=self.denoiser.event_dim)

    def terminal_marginal(self, x_0: Tensor) -> TorchDistribution:
        r""":math:`q(x_T \mid x_0)` for an embedded ``x_0``."""
        return self.forward_marginal(x_0, self.schedule.num_timesteps)

    def forward_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_{t-1} \mid x_t, x_0)` (E3) for an embedded ``x_0``."""
        return forward_posterior(x_t, x_0, t, self.schedule, event_dim=self.denoiser.event_dim)

    def _data_kernel(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        """Likelihood and transform, with everything but the batch dimensions as event dimensions."""
        if self.likelihood is None:
            kernel = self.denoiser.decode(x_1, denoised)
        else:
            kernel = self.likelihood(denoised.x_0_hat)
        if isinstance(kernel, Independent):
            kernel = kernel.base_dist
        if self.transform is not None:
            if kernel.support.is_discrete:
                raise ValueError(
                    f"argument 'transform': got {self.transform} with a likelihood over whole numbers; "
                    "expected a density, because a mass has no Jacobian. Leave the rescaling to the "
                    "likelihood's embed."
                )
            kernel = dist.TransformedDistribution(kernel, self.transform.inv)
        batch_dim = x_1.dim() - self.denoiser.event_dim
        if kernel.batch_shape[:batch_dim] != x_1.shape[:batch_dim]:
            raise ValueError(
                f"argument 'likelihood': got a distribution of batch shape {tuple(kernel.batch_shape)} for "
                f"x̂_0 of shape {tuple(x_1.shape)}; expected batch dimensions that begin with "
                f"{tuple(x_1.shape[:batch_dim])}. Let the likelihood act entry by entry on x̂_0."
            )
        return dist.Independent(kernel, len(kernel.batch_shape) - batch_dim)


def _describe(part: Any) -> str:
    """A part's class, with what a module says of its arguments (and not of learned numbers)."""
    arguments = part.extra_repr() if isinstance(part, nn.Module) else ""
    return type(part).__name__ + (f"({arguments})" if arguments else "")
