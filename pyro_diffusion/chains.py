r"""The Pyro programs. Every sample site of the package is in this file.

=============== ================= ======================================================= ============
program         sites, in order   takes                                                   is
=============== ================= ======================================================= ============
GenerativeChain :math:`x_T → x_0` ``prior()``, ``transition(x_t, t)``, ``likelihood``     E7
BottomUpGuide   :math:`x_1 → x_T` ``transition(x_{t-1}, t)``                              E4, left
TopDownGuide    :math:`x_T → x_1` ``encode(x_0)``, ``initial(c)``, ``transition``         E4, right
TimestepPlate   t, x_t, x_{t-1}   the kernels and a law of timesteps                      a draw of E8
=============== ================= ======================================================= ============

The kernels are callables that return Pyro distributions: fixed linear-Gaussian ones make a diffusion
model, learned ones a hierarchical VAE. Site ``x_t`` exists for t = 0 … T in every chain; ``x_0`` is
the datum. Programs own the plate ``"data"`` at dim −1 and scale it by ``num_data / N``; particles
stand to its left. The term :math:`L_t` of the bound lives at site ``x_t``, and the *order* of the
guide decides what it is: the forward order gives log-ratios (E11), the posterior order KLs (E10).

Under a ``mask`` of observed entries a program is the chain of the observed part: unobserved entries
of ``x_0`` are not looked at, sites carry the terms of observed entries only, and a kernel of the model
sees zero where a state is unobserved.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), sections 3 and 4.
    https://arxiv.org/abs/2208.11970
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_diffusion.checks import check_count, check_data, check_event_shape, check_observed
from pyro_diffusion.distributions import BottomUpSite, CarriedSite
from pyro_diffusion.observations import as_real, observed_part, zeroed
from pyro_diffusion.params import ParamScope, free_name, snake_case
from pyro_diffusion.timesteps import StratifiedTimesteps, Timesteps

__all__ = ["BottomUpGuide", "GenerativeChain", "TimestepPlate", "TopDownGuide"]

Kernel = Callable[..., TorchDistribution]

_COUNTS = "num_samples is how many data to draw, num_data how many the whole data set has."


class Program(nn.Module):
    """What the programs share: parameters under their owner's name, the data plate, named errors.

    Args:
        num_timesteps: Number of latent states :math:`T`; ``math.inf`` for the continuous chain.
        parts: The callables that the program is made of, by attribute name.
        state_mask: ``state_mask(mask)`` is the mask of a state, where latents are the data's entries
            with noise; ``None`` leaves latents whole, and a mask to the site ``x_0``.
        owner: The model whose parameters the parts use; ``None`` makes the program stand alone, with
            its parts' parameters under a name of its own.
        below: Path below the owner to the parameters that this program trains.
    """

    state_mask: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        num_timesteps: Any,
        parts: dict[str, Any],
        owner: ParamScope | None,
        below: str = "",
        state_mask: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        self.owner = _stand_alone(type(self), parts) if owner is None else owner
        self.below = below
        # Not as submodules: their parameters are the owner's, and are listed there once.
        self.__dict__.update(parts, state_mask=state_mask)

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites by timestep: ``site_names[t]`` is where :math:`x_t` lives."""
        return tuple(f"x_{t}" for t in range(self.num_timesteps + 1))

    @contextmanager
    def data_plate(
        self, x_0: Tensor | None, num_data: int | None, num_samples: int = 1
    ) -> Iterator[None]:
        """The plate over data, scaled to ``num_data``, with all parameters stated outside of it."""
        size = check_count("num_samples", num_samples, 1, _COUNTS) if x_0 is None else len(x_0)
        with ExitStack() as stack:
            stack.enter_context(self.owner.param_statements(self.below))
            if num_data is not None and check_count("num_data", num_data, 1, _COUNTS):
                stack.enter_context(poutine.scale(scale=num_data / size))
            stack.enter_context(pyro.plate("data", size, dim=-1))
            yield

    def mask_of_states(self, mask: Tensor | None) -> Tensor | None:
        """The mask of a latent site, given that of the data; ``None`` if all of it is observed."""
        return None if mask is None or self.state_mask is None else self.state_mask(mask)


class GenerativeChain(Program):
    r"""The generative program, :math:`p(x_{0:T}) = p(x_T) \prod_{t=1}^T p(x_{t-1} \mid x_t)` (E7).

    Run without data it is the reference sampler.

    Args:
        prior: ``prior()`` gives :math:`p(x_T)`, batch shape empty.
        transition: ``transition(x_t, t)`` gives :math:`p(x_{t-1} \mid x_t)` for ``t = T … 2``.
        likelihood: ``likelihood(x_1)`` gives :math:`p(x_0 \mid x_1)`.
        num_timesteps: Number of latent states :math:`T`.
        owner: Model that owns the parameters; ``None`` for a program that stands alone.
        state_mask: Mask of a state, given that of the data; see :class:`Program`.
    """

    prior: Kernel
    transition: Kernel
    likelihood: Kernel

    def __init__(
        self,
        prior: Kernel,
        transition: Kernel,
        likelihood: Kernel,
        *,
        num_timesteps: int,
        owner: ParamScope | None = None,
        state_mask: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = {"prior": prior, "transition": transition, "likelihood": likelihood}
        super().__init__(num_timesteps, parts, owner, state_mask=state_mask)

    def forward(
        self,
        x_0: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_data: int | None = None,
        num_samples: int = 1,
    ) -> Tensor:
        """Sample sites ``x_T … x_1`` and observe (or sample) ``x_0``.

        Args:
            x_0: Data, shape ``(N,) + event_shape``; ``None`` draws ``num_samples`` of them.
            mask: Observed entries, boolean, of the data's shape; ``None`` if all are.
            num_data: Size of the data set of which ``x_0`` is a batch; scales the program.
            num_samples: Number of data to draw when there are none.

        Returns:
            ``x_0``, given or drawn.
        """
        x_0, states = check_observed(x_0, mask), self.mask_of_states(mask)
        with self.data_plate(x_0, num_data, num_samples):
            x_t = pyro.sample(f"x_{self.num_timesteps}", observed_part(self.prior(), states))
            for t in range(self.num_timesteps, 1, -1):
                with naming(f"x_{t - 1}"):
                    kernel = observed_part(self.transition(zeroed(x_t, states), t), states)
                x_t = pyro.sample(f"x_{t - 1}", kernel)
            with naming("x_0"):
                kernel = check_event_shape(self.likelihood(zeroed(x_t, states)), x_0)
                kernel = observed_part(kernel, mask)
            return pyro.sample("x_0", kernel, obs=as_real(x_0))

    def from_state(self, x_t: Tensor, t: int) -> "GenerativeChain":
        r"""The rest of the chain, :math:`p(x_{0:t-1} \mid x_t)`: a program of ``t`` steps.

        Args:
            x_t: States, ``(n,)`` + the shape of one; run it with ``num_samples=n``.
            t: Their timestep in ``{1, …, T}``.
        """
        start = dist.Delta(x_t).to_event(x_t.dim() - 1)
        return GenerativeChain(
            lambda: start,
            self.transition,
            self.likelihood,
            num_timesteps=t,
            owner=self.owner,
            state_mask=self.state_mask,
        )

    def of_state(self, t: int) -> "GenerativeChain":
        r"""The chain that ends in a state, :math:`p(x_{t:T})`: its datum, at site ``x_0``, is :math:`x_t`.

        Args:
            t: Timestep of the state in ``{1, …, T − 1}``.
        """
        return GenerativeChain(
            self.prior,
            lambda x_s, s: self.transition(x_s, s + t),
            lambda x_next: self.transition(x_next, t + 1),
            num_timesteps=self.num_timesteps - t,
            owner=self.owner,
        )


class BottomUpGuide(Program):
    r"""The encoder from data to noise, :math:`q(x_{1:T} \mid x_0) = \prod_t q(x_t \mid x_{t-1})` (E4).

    Its sites run against the model's, so that a site's parent in the model is its descendant here:
    ``TraceMeanField_ELBO`` would add up numbers that are no KLs, and is refused.

    Args:
        transition: ``transition(x_{t-1}, t)`` gives :math:`q(x_t \mid x_{t-1})` for ``t = 1 … T``.
        num_timesteps: Number of latent states :math:`T`.
        embed: ``embed(x_0)``, under a mask ``embed(x_0, mask=mask)``, is the state where the chain
            starts; the data itself by default.
        owner: Model that owns the parameters; ``None`` for a program that stands alone.
        below: Path below the owner to the guide's own parameters.
        state_mask: Mask of a state, given that of the data; see :class:`Program`.
    """

    transition: Kernel
    embed: Callable[..., Tensor]

    def __init__(
        self,
        transition: Kernel,
        *,
        num_timesteps: int,
        embed: Callable[..., Tensor] | None = None,
        owner: ParamScope | None = None,
        below: str = "",
        state_mask: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = {"transition": transition, "embed": _identity if embed is None else embed}
        super().__init__(num_timesteps, parts, owner, below, state_mask)

    def forward(
        self, x_0: Tensor, *, mask: Tensor | None = None, num_data: int | None = None
    ) -> None:
        """Sample sites ``x_1 … x_T`` for data, and their mask, of shape ``(N,) + event_shape``."""
        x_0, states = check_data(x_0, mask), self.mask_of_states(mask)
        with self.data_plate(x_0, num_data):
            x_t = _enter(self.embed, x_0, mask)
            for t in range(1, self.num_timesteps + 1):
                with naming(f"x_{t}"):
                    kernel = observed_part(self.transition(x_t, t), states)
                if self.num_timesteps > 1:  # a single site has no order
                    kernel = BottomUpSite(kernel)
                x_t = pyro.sample(f"x_{t}", kernel)

    def of_state(self, t: int) -> "BottomUpGuide":
        r"""The guide that starts from a state, :math:`q(x_{t+1:T} \mid x_t)`, as its datum.

        Args:
            t: Timestep of the state in ``{1, …, T − 1}``.
        """
        return BottomUpGuide(
            lambda x_s, s: self.transition(x_s, s + t),
            num_timesteps=self.num_timesteps - t,
            owner=self.owner,
            below=self.below,
        )


class TopDownGuide(Program):
    r"""The encoder in the model's order, :math:`q(x_T \mid x_0) \prod_t q(x_{t-1} \mid x_t, x_0)` (E4).

    Args:
        encode: ``encode(x_0)``, under a mask ``encode(x_0, mask=mask)``, gives the context ``c``,
            computed once.
        initial: ``initial(c)`` gives :math:`q(x_T \mid x_0)`.
        transition: ``transition(x_t, c, t)`` gives :math:`q(x_{t-1} \mid x_t, x_0)`, ``t = T … 2``.
        num_timesteps: Number of latent states :math:`T`.
        owner: Model that owns the parameters; ``None`` for a program that stands alone.
        below: Path below the owner to the guide's own parameters.
        state_mask: Mask of a state, given that of the data; see :class:`Program`.
    """

    encode: Callable[..., Any]
    initial: Kernel
    transition: Kernel

    def __init__(
        self,
        encode: Callable[..., Any],
        initial: Kernel,
        transition: Kernel,
        *,
        num_timesteps: int,
        owner: ParamScope | None = None,
        below: str = "",
        state_mask: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = {"encode": encode, "initial": initial, "transition": transition}
        super().__init__(num_timesteps, parts, owner, below, state_mask)

    def forward(
        self, x_0: Tensor, *, mask: Tensor | None = None, num_data: int | None = None
    ) -> None:
        """Sample sites ``x_T … x_1`` for data, and their mask, of shape ``(N,) + event_shape``."""
        x_0, states = check_data(x_0, mask), self.mask_of_states(mask)
        with self.data_plate(x_0, num_data):
            context = _enter(self.encode, x_0, mask)
            with naming(f"x_{self.num_timesteps}"):
                kernel = observed_part(self.initial(context), states)
            x_t = pyro.sample(f"x_{self.num_timesteps}", kernel)
            for t in range(self.num_timesteps, 1, -1):
                with naming(f"x_{t - 1}"):
                    kernel = observed_part(self.transition(x_t, context, t), states)
                x_t = pyro.sample(f"x_{t - 1}", kernel)


class TimestepPlate:
    r"""The bound at ``k`` random timesteps a datum: a (model, guide) pair of constant cost.

    .. math::
        \widehat{\mathrm{ELBO}} = -L_T + \frac1k \sum_{i=1}^k \frac{1}{\pi(t_i)}
        \begin{cases}
            \log p(x_0 \mid x_1) & t_i = 1 \\
            -L_{t_i - 1} & t_i \ge 2
        \end{cases}
        \qquad t_i \sim \pi,

    which is unbiased for E10, one row of the network for each ``(i, datum)``. In the plate
    ``"timesteps"`` (size ``k``, dim −2) the sites ``t`` and ``x_t`` only carry the draw from guide to
    model and have no term; ``x_{t-1}`` and ``x_0`` are masked where the other one is the term, and
    scaled by :math:`1 / (k \pi(t))`. The prior term at ``x_T`` costs no network row and is in every
    draw.

    Args:
        encode: ``encode(x_0)`` gives the context ``c`` (the datum in the chain's space).
        marginal: ``marginal(c, t)`` gives :math:`q(x_t \mid x_0)`.
        posterior: ``posterior(x_t, c, t)`` gives :math:`q(x_{t-1} \mid x_t, x_0)`, ``t ≥ 2``.
        prior: ``prior()`` gives :math:`p(x_T)`.
        reverse: ``reverse(x_t, t)`` gives the pair :math:`p(x_{t-1} \mid x_t)` and
            :math:`p(x_0 \mid x_1)`, the latter used where ``t = 1``; calls the network once.
        log_volume: ``log_volume(x_0, mask)`` gives the part of :math:`\log p(x_0 \mid x_1)` that does
            not depend on :math:`x_1`, a transform's log-Jacobian. All of it is in every draw, by a
            factor of expectation zero, and adds no variance.
        num_timesteps: Number of draws ``k`` for each datum.
        chain_length: Number of latent states :math:`T \ge 2`. ``math.inf`` for the continuous chain: ``t``
            is then a time :math:`u`, uniform in (0, 1] or 0 for the reconstruction, and the site ``dx_t``, in
            place of ``x_{t-1}``, has the two kernels of a step in units of time.
        timesteps: Law of the timesteps.
        owner: Model that owns the parameters; ``None`` for a pair that stands alone.
        below: Path below the owner to the guide's own parameters.
        state_mask: Mask of a state, given that of the data; see :class:`Program`.
    """

    def __init__(
        self,
        encode: Callable[..., Tensor],
        marginal: Kernel,
        posterior: Kernel,
        prior: Kernel,
        reverse: Callable[[Tensor, Tensor], tuple[TorchDistribution, TorchDistribution]],
        *,
        num_timesteps: int,
        chain_length: float,
        timesteps: Timesteps | None = None,
        owner: ParamScope | None = None,
        below: str = "",
        state_mask: Callable[[Tensor], Tensor] | None = None,
        log_volume: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        continuous = chain_length == math.inf
        law = {
            "law": StratifiedTimesteps() if timesteps is None else timesteps,
            "num_draws": num_timesteps,
            "first": 0.0 if continuous else 1,
            "last": 1.0 if continuous else chain_length,
            "step_site": "dx_t" if continuous else "x_{t-1}",
        }
        model_parts = law | {"prior": prior, "reverse": reverse, "log_volume": log_volume}
        guide_parts = law | {"encode": encode, "marginal": marginal, "posterior": posterior}
        self.model: nn.Module = _SubsampledModel(
            chain_length, model_parts, owner, state_mask=state_mask
        )
        self.guide: nn.Module = _SubsampledGuide(
            chain_length, guide_parts, owner, below, state_mask
        )


class SubsampledProgram(Program):
    """A program whose sites are a random few of the chain's, weighted to stand for all of them."""

    law: Timesteps
    num_draws: int
    first: float  # the timestep that stands for the reconstruction
    last: float
    step_site: str

    def draw_timesteps(self, state: Tensor) -> tuple[Tensor, Tensor]:
        r"""Sample site ``t``; timesteps and weights :math:`1/(k \pi(t))`, shape ``(…, k, N)``.

        They are on the device, and the weights in the dtype, of ``state``.
        """
        law = self.law(self.num_timesteps, state.device)
        law = law.to(state.dtype)
        with poutine.mask(mask=False):
            t = pyro.sample("t", law)
        return t, (-law.log_prob(t)).exp() / self.num_draws


class _SubsampledModel(SubsampledProgram):
    log_volume: Callable[[Tensor, Tensor | None], Tensor] | None
    prior: Kernel
    reverse: Callable[[Tensor, Tensor], tuple[TorchDistribution, TorchDistribution]]

    def forward(
        self,
        x_0: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        num_data: int | None = None,
        num_samples: int = 1,
    ) -> None:
        x_0, states = check_observed(x_0, mask), self.mask_of_states(mask)
        prior = observed_part(self.prior(), states)
        with self.data_plate(x_0, num_data, num_samples):
            x_T = pyro.sample(f"x_{self.num_timesteps}", prior)
            with pyro.plate("timesteps", self.num_draws, dim=-2):
                t, weight = self.draw_timesteps(x_T)
                x_t = pyro.sample("x_t", CarriedSite(prior))
                with naming(self.step_site):
                    transition, likelihood = self.reverse(zeroed(x_t, states), t)
                    transition = observed_part(transition, states)
                with naming("x_0"):
                    likelihood = observed_part(check_event_shape(likelihood, x_0), mask)
                with poutine.scale(scale=weight):
                    with poutine.mask(mask=t != self.first):
                        pyro.sample(self.step_site, transition)
                    with poutine.mask(mask=t == self.first):
                        pyro.sample("x_0", likelihood, obs=as_real(x_0))
            if x_0 is not None and self.log_volume is not None:
                there = (weight * (t == self.first)).sum(-2, keepdim=True)
                pyro.factor("log_volume", (1 - there) * self.log_volume(x_0, mask))


class _SubsampledGuide(SubsampledProgram):
    encode: Callable[..., Tensor]
    marginal: Kernel
    posterior: Kernel

    def forward(
        self, x_0: Tensor, *, mask: Tensor | None = None, num_data: int | None = None
    ) -> None:
        x_0, states = check_data(x_0, mask), self.mask_of_states(mask)
        with self.data_plate(x_0, num_data):
            context = _enter(self.encode, x_0, mask)
            last = torch.as_tensor(self.last, device=context.device)
            marginal = observed_part(self.marginal(context, last), states)
            pyro.sample(f"x_{self.num_timesteps}", marginal)
            with pyro.plate("timesteps", self.num_draws, dim=-2):
                t, weight = self.draw_timesteps(context)
                x_t = pyro.sample("x_t", CarriedSite(self.marginal(context, t)))
                # Rows of the reconstruction carry no latent term; any kernel with a density will do there.
                there = torch.where(t == self.first, last, t)
                posterior = observed_part(self.posterior(x_t, context, there), states)
                with poutine.scale(scale=weight), poutine.mask(mask=t != self.first):
                    pyro.sample(self.step_site, posterior)


class ProgramPair(NamedTuple):
    """A model and the guide that goes with it."""

    model: nn.Module
    guide: nn.Module


@contextmanager
def naming(site: str) -> Iterator[None]:
    """Let an error from a kernel say at which site it happened."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"site {site!r}: {error}") from error


def _stand_alone(program: type, parts: dict[str, Any]) -> ParamScope:
    """An owner for a program without a model: it holds the modules that the parts are, or belong to."""
    owner = ParamScope(free_name(snake_case(program.__name__)))
    for name, part in parts.items():
        module = getattr(part, "__self__", part)
        if isinstance(module, nn.Module):
            owner.add_module(name, module)
    return owner


def _identity(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return x


def _enter(embed: Callable[..., Any], x_0: Tensor, mask: Tensor | None) -> Any:
    """Data on their way into a chain; an embedding hears of a mask only where there is one."""
    return embed(x_0) if mask is None else embed(x_0, mask=mask)
