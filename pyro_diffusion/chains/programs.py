r"""The chain as Pyro programs, each of which implements one equation.

=============== ================= ======================================================= ============
program         sites, in order   takes                                                   is
=============== ================= ======================================================= ============
GenerativeChain :math:`x_T → x_0` ``prior()``, ``transition(x_t, t)``, ``likelihood``     E7
BottomUpGuide   :math:`x_1 → x_T` ``transition(x_{t-1}, t)``                              E4, left
TopDownGuide    :math:`x_T → x_1` ``encode(x_0)``, ``initial(code)``, ``transition``      E4, right
=============== ================= ======================================================= ============

The kernels return Pyro distributions. Fixed linear-Gaussian kernels make a diffusion model, learned ones a
hierarchical VAE. The term :math:`L_t` of the bound is at site ``x_t``, t = 0 … T. The *order* of the guide
decides its form: the forward order gives log-ratios (E11), the posterior order KLs (E10).

All programs take data, a context if the kernels take one, ``mask=`` and ``num_data=``. Under ``SVI`` pass the
context by position, ``svi.step(x_0, c)``, because Pyro's handlers have an argument ``context`` of their own.
A program owns the plate ``"data"`` at dim −1. For a chain inside a bigger program,
``plate=False, prefix="prior"`` states the sites as ``prior.x_t`` in the caller's plate, unscaled.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), sections 3 and 4.
    https://arxiv.org/abs/2208.11970
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_diffusion.chains.base import GenerativeProgram, GuideProgram, Kernel, later
from pyro_diffusion.checks import check_event_shape
from pyro_diffusion.distributions import BottomUpSite
from pyro_diffusion.given import STATE, Given, as_real
from pyro_diffusion.params import ParamScope

Function = Callable[..., Any]


class GenerativeChain(GenerativeProgram):
    r"""The generative program, :math:`p(x_{0:T}) = p(x_T) \prod_{t=1}^T p(x_{t-1} \mid x_t)` (E7).

    A run without data is the reference sampler.

    Args:
        prior: ``prior()`` gives :math:`p(x_T)`, batch shape empty.
        transition: ``transition(x_t, t)`` gives :math:`p(x_{t-1} \mid x_t)` for ``t = T … 2``.
        likelihood: ``likelihood(x_1)`` gives :math:`p(x_0 \mid x_1)`.
        num_timesteps: Number of latent states :math:`T`.
        owner: Model that owns the parameters; ``None`` for a program that stands alone.
    """

    __call__: Callable[..., Tensor]  # of forward

    def __init__(
        self, prior: Function, transition: Function, likelihood: Function, *, num_timesteps: int,
        owner: ParamScope | None = None,
    ) -> None:  # fmt: skip
        parts = {"prior": prior, "transition": transition, "likelihood": likelihood}
        super().__init__(num_timesteps, parts, owner)
        self.prior = Kernel(prior, f"x_{num_timesteps}")
        self.transition, self.likelihood = Kernel(transition, "x_", -1), Kernel(likelihood, "x_0")

    def forward(
        self, x_0: Tensor | None = None, context: Any = None, *, num_data: int | None = None,
        num_samples: int = 1, plate: bool = True, prefix: str = "", **given: Any,
    ) -> Tensor:  # fmt: skip
        """Sample sites ``x_T … x_1`` and observe ``x_0``, or draw ``num_samples`` of it; returns ``x_0``."""
        with self.over_data(
            x_0, Given.of(context=context, **given), num_data=num_data, num_samples=num_samples,
            plate=plate, prefix=prefix,
        ) as run:  # fmt: skip
            x_t = pyro.sample(f"x_{self.num_timesteps}", self.prior(), infer=STATE)
            for t in range(self.num_timesteps, 1, -1):
                kernel = self.transition(run.seen(x_t), t, **run.context)
                x_t = pyro.sample(f"x_{t - 1}", kernel, infer=STATE)
            kernel = check_event_shape(self.likelihood(run.seen(x_t), **run.context), run.x_0)
            return pyro.sample("x_0", kernel, obs=run.x_0, infer=STATE)

    def from_state(self, x_t: Tensor, t: int) -> "GenerativeChain":
        r"""The rest of the chain, :math:`p(x_{0:t-1} \mid x_t)`: a program of ``t`` steps.

        Args:
            x_t: States, ``(n,)`` + the shape of one; run it with ``num_samples=n``.
            t: Their timestep in ``{1, …, T}``.
        """
        start = dist.Delta(x_t).to_event(x_t.dim() - 1)
        rest = self.transition.function, self.likelihood.function
        return GenerativeChain(lambda: start, *rest, num_timesteps=t, owner=self.owner)

    def of_state(self, t: int) -> "GenerativeChain":
        r"""The chain that ends in a state, :math:`p(x_{t:T})`: its datum, at site ``x_0``, is :math:`x_t`.

        Args:
            t: Timestep of the state in ``{1, …, T − 1}``.
        """
        kernel, steps = self.transition.function, self.num_timesteps - t
        reverse, last = later(kernel, t), later(kernel, t, 1)
        return GenerativeChain(
            self.prior.function, reverse, last, num_timesteps=steps, owner=self.owner
        )


class BottomUpGuide(GuideProgram):
    r"""The encoder from data to noise, :math:`q(x_{1:T} \mid x_0) = \prod_t q(x_t \mid x_{t-1})` (E4).

    The order is opposite to the model's: a site's parent in the model is its descendant here. The numbers
    that ``TraceMeanField_ELBO`` would add up are therefore not KLs, and it raises a ``ValueError``.

    Args:
        transition: ``transition(x_{t-1}, t)`` gives :math:`q(x_t \mid x_{t-1})` for ``t = 1 … T``.
        num_timesteps: Number of latent states :math:`T`.
        embed: ``embed(x_0)``, under a mask ``embed(x_0, mask=mask)``, is the state where the chain
            starts; the data itself by default.
        owner: Model that owns the parameters; ``None`` for a program that stands alone.
        below: Path below the owner to the guide's own parameters.
    """

    def __init__(
        self, transition: Function, *, num_timesteps: int, embed: Function | None = None,
        owner: ParamScope | None = None, below: str = "",
    ) -> None:  # fmt: skip
        embed = _identity if embed is None else embed
        super().__init__(num_timesteps, {"transition": transition, "embed": embed}, owner, below)
        self.transition, self.embed = Kernel(transition, "x_", 0), Kernel(embed)

    def forward(
        self, x_0: Tensor, context: Any = None, *, num_data: int | None = None, plate: bool = True,
        prefix: str = "", **given: Any,
    ) -> None:  # fmt: skip
        """Sample sites ``x_1 … x_T`` for data of shape ``(N,) + event_shape``."""
        # A single site has no order.
        site = BottomUpSite if self.num_timesteps > 1 else _identity
        with self.over_data(
            x_0, Given.of(context=context, **given), num_data=num_data, plate=plate, prefix=prefix
        ) as run:
            x_t = self.embed(run.x_0, **run.given)
            for t in range(1, self.num_timesteps + 1):
                kernel = site(self.transition(x_t, t, **run.context))
                x_t = pyro.sample(f"x_{t}", kernel, infer=STATE)

    def of_state(self, t: int) -> "BottomUpGuide":
        r"""The guide that starts from a state, :math:`q(x_{t+1:T} \mid x_t)`, as its datum.

        Args:
            t: Timestep of the state in ``{1, …, T − 1}``.
        """
        kernel, steps = later(self.transition.function, t), self.num_timesteps - t
        return BottomUpGuide(
            kernel, num_timesteps=steps, embed=lambda x, mask=None: as_real(x), owner=self.owner,
            below=self.below,
        )  # fmt: skip


class TopDownGuide(GuideProgram):
    r"""The encoder in the model's order, :math:`q(x_T \mid x_0) \prod_t q(x_{t-1} \mid x_t, x_0)` (E4).

    Args:
        encode: ``encode(x_0)``, under a mask ``encode(x_0, mask=mask)``, gives the code,
            computed once.
        initial: ``initial(code)`` gives :math:`q(x_T \mid x_0)`.
        transition: ``transition(x_t, code, t)`` gives :math:`q(x_{t-1} \mid x_t, x_0)`, ``t = T … 2``.
        num_timesteps: Number of latent states :math:`T`.
        owner: Model that owns the parameters; ``None`` for a program that stands alone.
        below: Path below the owner to the guide's own parameters.
    """

    def __init__(
        self, encode: Function, initial: Function, transition: Function, *, num_timesteps: int,
        owner: ParamScope | None = None, below: str = "",
    ) -> None:  # fmt: skip
        parts = {"encode": encode, "initial": initial, "transition": transition}
        super().__init__(num_timesteps, parts, owner, below)
        self.encode = Kernel(encode)
        self.initial = Kernel(initial, f"x_{num_timesteps}")
        self.transition = Kernel(transition, "x_", -1)

    def forward(
        self, x_0: Tensor, context: Any = None, *, num_data: int | None = None, plate: bool = True,
        prefix: str = "", **given: Any,
    ) -> None:  # fmt: skip
        """Sample sites ``x_T … x_1`` for data of shape ``(N,) + event_shape``."""
        with self.over_data(
            x_0, Given.of(context=context, **given), num_data=num_data, plate=plate, prefix=prefix
        ) as run:
            code = self.encode(run.x_0, **run.given)
            x_t = pyro.sample(
                f"x_{self.num_timesteps}", self.initial(code, **run.context), infer=STATE
            )
            for t in range(self.num_timesteps, 1, -1):
                kernel = self.transition(x_t, code, t, **run.context)
                x_t = pyro.sample(f"x_{t - 1}", kernel, infer=STATE)


def _identity(x: Any, mask: Tensor | None = None) -> Any:
    return x
