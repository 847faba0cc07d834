r"""The loss of a run of :func:`~pyro_diffusion.training.fit`: programs, weights, warm-up, and a graph.

.. math::
    \mathcal L = -\sum_n w_n \Big( E \log p(x_0 \mid x_1) - \beta \sum_t L_t \Big)_n ,

with the weights :math:`w_n` of the data and the share :math:`\beta` of the latent sites, which rises from
zero to one during a warm-up of the KLs. Both are scales of sites in the programs. Static programs are traced
into a graph (:func:`~pyro_diffusion.training.compile_elbo`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_diffusion.bounds.checks import is_of_latent
from pyro_diffusion.checks import require
from pyro_diffusion.reading import reading
from pyro_diffusion.scoring import replayed
from pyro_diffusion.training.columns import Columns
from pyro_diffusion.training.compilation import compile_elbo, cpp_compiler

if TYPE_CHECKING:
    from pyro_diffusion.training.fitting import Recipe

_GRAPH = 300, 10.0  # steps, or seconds, that repay about a second of tracing
_CODE = 20_000, 600.0  # and about ten seconds of compilation


def loss_of(
    model: nn.Module,
    guide: nn.Module,
    recipe: "Recipe",
    given: Columns,
    limits: tuple[int | None, float | None],
    kl_share: Tensor,
) -> Callable[..., nn.Module]:
    """What makes a loss of a model and a guide: programs, or a graph of them where they are static.

    Args:
        model: Program for :math:`p`.
        guide: Program for :math:`q`.
        recipe: How to train.
        given: A batch, with the names of the programs' arguments.
        limits: Steps and seconds of the run.
        kl_share: Weight of the latent sites, a number that changes in place.
    """

    def wrapped(program: nn.Module) -> nn.Module:
        """The program, with the data's weights if they have any, and with its warm-up."""
        program = Weighted(program) if "weights" in given else program
        return WarmedUp(program, kl_share) if recipe.kl_warmup else program

    found = _elbo(wrapped(model), wrapped(guide), dict(given))
    elbo = found if recipe.elbo is None else recipe.elbo

    def loss(model: nn.Module, guide: nn.Module) -> nn.Module:
        """What ``SVIModule`` calls to make its loss."""
        plain: nn.Module = elbo(wrapped(model), wrapped(guide))
        if not _repays(_GRAPH, limits) and not recipe.compiled:
            return plain
        backend = "inductor" if _is_compiled(recipe, limits) else None
        try:
            traced = compile_elbo(wrapped(model), wrapped(guide), elbo, backend=backend)
            traced(given.pop("x_0"), **given)
        except ValueError:  # not static, or bad data, of which the programs will say so
            if recipe.compiled:
                raise
            return plain
        return traced

    return loss


def _repays(least: tuple[int, float], limits: tuple[int | None, float | None]) -> bool:
    """Whether a run is so long that it repays some work in advance."""
    return any(
        limit is not None and limit >= enough for limit, enough in zip(limits, least, strict=True)
    )


def _is_compiled(recipe: "Recipe", limits: tuple[int | None, float | None]) -> bool:
    """Machine code if it is asked for, or for a long run where there is a compiler."""
    if recipe.compiled is not None:
        return recipe.compiled
    return _repays(_CODE, limits) and cpp_compiler() is not None


def _elbo(model: nn.Module, guide: nn.Module, given: dict[str, Any]) -> ELBO:
    """Analytic KLs where the guide draws its sites in the model's order."""
    with reading(model, guide), poutine.mask(mask=False):
        guide_trace, model_trace = replayed(model, guide, given.pop("x_0"), **given)
    _check_trained(model, guide, guide_trace, model_trace)
    orders = [
        [name for name in trace.stochastic_nodes if name in guide_trace.stochastic_nodes]
        for trace in (guide_trace, model_trace)
    ]
    return TraceMeanField_ELBO() if orders[0] == orders[1] else Trace_ELBO()


def _check_trained(model: nn.Module, guide: nn.Module, *traces: poutine.Trace) -> None:
    """Raise a ``ValueError`` for a ``pyro.param`` that no step would train."""
    trained = {id(p) for program in (model, guide) for p in program.parameters()}
    for site in (trace.nodes[name] for trace in traces for name in trace.param_nodes):
        stated = "$$$" in site["name"]  # by pyro.module, for a module that computes with its own
        require(
            stated or id(site["value"].unconstrained()) in trained,
            f"param {site['name']!r}",
            "a pyro.param statement whose tensor is no parameter of the modules",
            "parameters of the modules, which are the ones that fit trains",
            "Make it a PyroParam or an nn.Parameter of the program. If it is one, another program has its "
            "name in Pyro's store: call pyro.clear_param_store() before.",
        )


class Weighted(nn.Module):
    """A program whose terms count as much as the weights of their data say.

    Args:
        program: A model or a guide with all sites in a data plate at dim −1.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x_0: Tensor, *context: Any, weights: Tensor, **given: Any) -> Any:
        """Run the program, with the log-probability of row n scaled by its weight."""
        with _Scaled(weights):
            return self.program(x_0, *context, **given)


class WarmedUp(nn.Module):
    """A program whose latent sites have a weight that changes during the run.

    Args:
        program: A model or a guide.
        share: The weight, a tensor without axes that changes in place, so that a graph reads it anew.
    """

    share: Tensor

    def __init__(self, program: nn.Module, share: Tensor) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("share", share, persistent=False)

    def forward(self, *args: Any, **given: Any) -> Any:
        """Run the program, with the log-probability of every latent site scaled."""
        with _Scaled(self.share, latents_only=True):
            return self.program(*args, **given)


class _Scaled(Messenger):
    """``poutine.scale``, with weights that may be zero."""

    def __init__(self, weights: Tensor, latents_only: bool = False) -> None:
        super().__init__()
        self.weights, self.latents_only = weights, latents_only

    def _pyro_sample(self, msg: Any) -> None:
        concerns = is_of_latent(msg) if self.latents_only else not site_is_subsample(msg)
        if concerns:
            msg["scale"] = msg["scale"] * self.weights
