r"""The base of all families of models: how a user's data enter and leave a chain of states.

Diffusion models (:mod:`~pyro_diffusion.diffusion`) and hierarchical VAEs (:mod:`~pyro_diffusion.hvae`)
differ only in the kernels of their chains. In both, a datum enters the chain through the transform and
the likelihood's ``embed``, and leaves it through

.. math::
    p(x_0 \mid x_1) = \mathrm{likelihood}(f(x_0) \mid \hat x_0(x_1))
        \left| \det \frac{\partial f}{\partial x_0} \right|,

where :math:`f` is the transform from the user's units to the model's. Two families with the same
likelihood and the same transform therefore have bounds in the same units, which can be compared.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Transform

from pyro_diffusion.chains import BottomUpGuide, GenerativeChain, TopDownGuide
from pyro_diffusion.checks import require, shape_remedy
from pyro_diffusion.display import Listing, as_lines, as_table, on_one_line
from pyro_diffusion.given import seen
from pyro_diffusion.params import ParamScope
from pyro_diffusion.reading import reading
from pyro_diffusion.transforms import (
    check_codomain,
    check_transform,
    describe,
    forget,
    parts,
    transformed,
)
from pyro_diffusion.typed import EmbedsData, TorchDistribution

__all__ = ["Family", "Pair", "programs", "unpacked"]


#: Names that every torch module has, and that a user of a family needs.
_OF_TORCH = ("eval", "load_state_dict", "parameters", "state_dict", "to", "train", "training")


class Family(ParamScope, metaclass=Listing):
    r"""A chain of latent states over data: its programs, its sampler, and what its numbers mean.

    Args:
        event_shape: Shape of a datum after embedding.
        likelihood: :math:`p(x_0 \mid x_1)` given an estimate in embedded space, and the embedding;
            ``None`` where the chain's last kernel is over the data themselves.
        transform: Torch transform from the user's units to the model's, or ``None``.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.
    """

    #: Names that programs, readers and torch use, and a user does not. ``dir`` and ``help`` omit them.
    _internal: ClassVar[frozenset[str]] = frozenset({
        "data_kernel", "decode", "decode_inside", "description", "embed", "embed_mask", "entrance", "forward",
        "gap", "get_extra_state", "load_state_dict", "log_volume", "param_statements", "prior",
        "set_extra_state", "state_mask", "transform_modules", "transition", "with_both_ends",
    })  # fmt: skip

    def __init__(
        self,
        event_shape: tuple[int, ...],
        likelihood: EmbedsData | None,
        transform: Transform | None,
        name: str | None,
    ) -> None:
        super().__init__(name)
        self.event_shape = torch.Size(event_shape)
        self.transform = check_transform(transform)
        if not isinstance(transform, nn.Module):  # torch finds no module inside of such a transform
            self.transform_modules = nn.ModuleList(
                part for part in parts(transform) if isinstance(part, nn.Module)
            )
        usable = hasattr(likelihood, "embed") and callable(likelihood)
        require(
            likelihood is None or (usable and not isinstance(likelihood, type)),
            "argument 'likelihood'",
            getattr(likelihood, "__name__", type(likelihood).__name__),
            "an object with embed(x_0) that can be called with x_0_hat, or None",
            "Pass an object, such as DiscretizedGaussianLikelihood(num_levels=17).",
        )
        self.likelihood = likelihood

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device that the model is on."""

    @property
    @abstractmethod
    def model(self) -> GenerativeChain:
        r""":math:`p_\theta(x_{0:T})` as a Pyro program (E7); sites ``x_T … x_0``."""

    @property
    @abstractmethod
    def guide(self) -> BottomUpGuide | TopDownGuide:
        r""":math:`q(x_{1:T} \mid x_0)` as a Pyro program."""

    def sample(self, num_samples: int = 1, context: Any = None) -> Tensor:
        """Draw data by running the model without data. Layers such as dropout are switched off.

        Args:
            num_samples: Number of data ``n``.
            context: Context of conditional data: a row for each datum, or one row (or number) for all.

        Returns:
            Data in the user's units, shape ``(n,)`` + the datum's shape.
        """
        with reading(self, data=context):
            return self.model(context=context, num_samples=num_samples)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise a ``ValueError``: a family is not a program, but has programs."""
        raise ValueError(
            f"argument 'model' or 'guide': got a {type(self).__name__}; expected one of its programs. Pass "
            "its .model and its .guide, as in SVI(family.model, family.guide, …)."
        )

    def _rows(self) -> dict[str, str]:
        """What the model is made of, by part."""
        own = "none: the last kernel is over the data"
        unit = "none: the data's own units"
        return {
            "likelihood": own if self.likelihood is None else on_one_line(self.likelihood),
            "transform": unit if self.transform is None else describe(self.transform),
        }

    @property
    def _title(self) -> str:
        return f"{type(self).__name__} {self.name!r}, event shape {tuple(self.event_shape)}"

    def __repr__(self) -> str:
        return as_lines(self._title, self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._title, self._rows())

    def __dir__(self) -> list[str]:
        """The names that a user needs; the others that a torch module has work as they do there."""
        own = (*vars(self), *self._parameters, *self._buffers, *self._modules)
        listed = type(self).listed([*dir(type(self)), *own])
        return sorted(listed.union(_OF_TORCH))

    def __getstate__(self) -> dict[str, Any]:
        forget(self.transform)
        return super().__getstate__()

    @property
    def description(self) -> dict[str, str]:
        """What a ``state_dict`` must have in common with the model, except for the networks."""
        return super().description | {
            "likelihood": describe_part(self.likelihood),
            "transform": describe(self.transform),
        }

    gap: float | None = 0.0  #: the value that a kernel gets in an unobserved entry

    def state_mask(self, mask: Tensor) -> Tensor | None:
        """Observed entries of a latent state, given those of the data; ``None`` if latents are whole."""
        return None

    @property
    def entrance(self) -> Any:
        """The object whose ``embed`` converts data to states; ``None`` if data are states already."""
        return self.likelihood

    def embed(self, x_0: Tensor, mask: Tensor | None = None) -> Tensor:
        """Data as states, ``(N,) + event_shape``, in the chain's dtype; unobserved entries are the gap."""
        if x_0.device != self.device:
            raise ValueError(
                f"argument 'x_0': got data on {x_0.device}; expected {self.device}, where "
                f"the model is. Call x_0.to({str(self.device)!r}), or move the model."
            )
        inside = x_0 if self.transform is None else transformed(self.transform, x_0)
        embedded = inside if self.entrance is None else self.entrance.embed(inside)
        if embedded.shape[1:] != self.event_shape:
            raise ValueError(
                f"argument 'x_0': got data of shape {tuple(x_0.shape)}, which are states of shape "
                f"{tuple(embedded.shape)} in the chain; expected (N,) + {tuple(self.event_shape)}. "
                f"{shape_remedy(embedded.shape, self.event_shape)}"
            )
        if not embedded.is_floating_point() or (self.transform and not x_0.is_floating_point()):
            raise ValueError(
                f"argument 'x_0': got data of {x_0.dtype} for a model that has a density; expected "
                f"real numbers. {_likelihood_for(x_0)}"
            )
        embedded = embedded.to(self.dtype)
        return embedded if mask is None else seen(embedded, self.embed_mask(mask), self.gap)

    def embed_mask(self, mask: Tensor) -> Tensor:
        """Observed entries of a state, ``(N,) + event_shape``: those that observed entries of data become.

        With :attr:`~pyro_diffusion.likelihoods.Likelihood.widths`, an entry may become several.
        """
        of_state = getattr(self.entrance, "embed_mask", None)
        mask = mask if of_state is None else of_state(mask)
        if mask.shape[1:] != self.event_shape[: mask.dim() - 1]:
            raise ValueError(
                f"argument 'mask': got shape {tuple(mask.shape)} for states of shape (N,) + "
                f"{tuple(self.event_shape)}; expected every entry of the state to come from one entry of the "
                "data, because unobserved entries are left out of both. Use a transform that acts entry by "
                "entry, and a likelihood whose widths say how many entries of the state each becomes."
            )
        mask = mask.reshape(mask.shape + (1,) * (1 + len(self.event_shape) - mask.dim()))
        return mask.expand(len(mask), *self.event_shape)

    def log_volume(self, x_0: Tensor, mask: Tensor | None = None) -> Tensor:
        r""":math:`\log |\det \partial f / \partial x_0|` of the transform, for observed entries, ``(N,)``."""
        assert self.transform is not None
        log_jacobian = self.transform.log_abs_det_jacobian(x_0, self.transform(x_0))
        if mask is not None:
            log_jacobian = torch.where(mask, log_jacobian, 0.0)
        return log_jacobian.reshape(len(x_0), -1).sum(1)

    def data_kernel(self, kernel: TorchDistribution, batch_shape: torch.Size) -> TorchDistribution:
        """The last kernel in the user's units, with all dimensions except the batch as event dimensions."""
        if isinstance(kernel, Independent):
            kernel = kernel.base_dist
        if self.transform is not None:
            if kernel.support.is_discrete:
                raise ValueError(
                    f"argument 'transform': got {self.transform} with a likelihood over whole numbers; "
                    "expected a density, because a mass has no Jacobian. Leave the rescaling to the "
                    "likelihood's embed."
                )
            check_codomain(self.transform, kernel.support)
            kernel = dist.TransformedDistribution(kernel, self.transform.inv)
        batch_dim = len(batch_shape)
        if kernel.batch_shape[:batch_dim] != batch_shape:
            raise ValueError(
                f"argument 'likelihood': got a distribution of batch shape {tuple(kernel.batch_shape)} for "
                f"states of batch shape {tuple(batch_shape)}; expected batch dimensions that begin with "
                "those. Let the likelihood act entry by entry on x̂_0."
            )
        return dist.Independent(kernel, len(kernel.batch_shape) - batch_dim)


def _likelihood_for(x_0: Tensor) -> str:
    """What to do about whole numbers and bits in a model of real numbers."""
    if x_0.dtype == torch.bool:
        return (
            "Pass likelihood=BernoulliLikelihood(), use a NeuralBernoulliDenoiser, or take x_0.float() if "
            "the bits are measurements."
        )
    return (
        "Pass likelihood=DiscretizedGaussianLikelihood(K) for levels 0 … K − 1, CategoricalLikelihood(K) for "
        "categories, PoissonLikelihood(x_0.max()) for counts, in a hierarchical VAE LevelLikelihood(K), or "
        "x_0.float() if the numbers are measurements."
    )


def describe_part(part: Any) -> str:
    """The class of a part, and a module's ``extra_repr``: its arguments, but no learned numbers."""
    arguments = part.extra_repr() if isinstance(part, nn.Module) else ""
    return type(part).__name__ + (f"({arguments})" if arguments else "")


Pair = Family | tuple[Callable[..., Any], Callable[..., Any]]


def programs(family: Pair | list[Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide. A family's guide is the one in the model's order, if it has one."""
    if isinstance(family, Family):
        return family.model, getattr(family, "posterior_guide", family.guide)
    if isinstance(family, tuple | list) and len(family) == 2 and all(map(callable, family)):
        return family[0], family[1]
    raise ValueError(
        f"argument 'family': got a {type(family).__name__}; expected a DiffusionModel, a HierarchicalVAE or "
        "a pair of programs. Pass (model, guide)."
    )


def unpacked(model: Any, guide: Any, x_0: Any) -> tuple[Any, Any, Any]:
    """Model, guide and data, from the arguments of a reader: these three, or a family and data.

    A family is a :class:`Family`, or a pair of programs as a tuple.
    """
    given = not callable(guide) and (guide is None or x_0 is None)
    if given and isinstance(model, Family | tuple | list):
        return (*programs(model), guide if x_0 is None else x_0)
    return model, guide, x_0
