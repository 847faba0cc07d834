r"""The bound at a few random timesteps of each datum: a pair of programs for training, at constant cost.

.. math::
    \widehat{\mathrm{ELBO}} = -L_T + \frac1k \sum_{i=1}^k \frac{1}{\pi(t_i)}
    \begin{cases}
        \log p(x_0 \mid x_1) & t_i = 1 \\
        -L_{t_i - 1} & t_i \ge 2
    \end{cases}
    \qquad t_i \sim \pi,

which is unbiased for E10 and costs one row of the network for each ``(i, datum)``. The continuous chain has
the same programs with another time (:mod:`~pyro_diffusion.chains.time`).

References:
    Variational Diffusion Models (Kingma et al., 2021), sections 4 and 5. https://arxiv.org/abs/2107.00630
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_diffusion.chains.base import GenerativeProgram, Kernel, Program, joined
from pyro_diffusion.chains.time import Time
from pyro_diffusion.chains.timesteps import StratifiedTimesteps, Timesteps
from pyro_diffusion.checks import check_event_shape
from pyro_diffusion.distributions import CarriedSite, HandedOver
from pyro_diffusion.given import STATE, Given


class TimestepPlate:
    r"""A (model, guide) pair that draws ``k`` timesteps for each datum.

    The plate ``"timesteps"`` has size ``k`` and dim −2. In it the sites ``t`` and ``x_t`` carry the draw from
    guide to model and have no term; the model draws no timesteps itself. A draw has its term either at the
    step's site or at ``x_0``. The other one is masked, and both are scaled by :math:`1 / (k \pi(t))`. The
    prior term at ``x_T`` needs no network and is stated once for each datum. A factor of expectation zero
    adds the part of a transform's log-Jacobian that the draws lack, so that it causes no variance.

    Args:
        diffusion: The model, whose kernels the pair uses and whose parameters it states.
        time: The chain's time, ``Steps(T)`` with :math:`T \ge 2` or ``Continuum()``.
        num_timesteps: Number of draws ``k`` for each datum.
        timesteps: Law of the timesteps; stratified over the batch by default.
    """

    def __init__(
        self,
        diffusion: Any,
        time: Time,
        *,
        num_timesteps: int = 1,
        timesteps: Timesteps | None = None,
    ) -> None:
        law = StratifiedTimesteps() if timesteps is None else timesteps
        self.model: nn.Module = _SubsampledModel(diffusion, time, law, num_timesteps)
        self.guide: nn.Module = _SubsampledGuide(diffusion, time, law, num_timesteps)

    def __repr__(self) -> str:
        return f"TimestepPlate, a model and a guide {self.model.about}"


class Drawn(NamedTuple):
    """Random timesteps, ``(…, k, N)`` each."""

    t: Tensor
    weight: Tensor  #: :math:`1 / (k\, \pi(t))`
    is_first: Tensor  #: whether the term is the reconstruction


class SubsampledProgram(Program):
    """A program with the sites of a few random timesteps, weighted to represent the whole chain."""

    def __init__(
        self, diffusion: Any, time: Time, law: Timesteps, num_draws: int, below: str = ""
    ) -> None:
        super().__init__(time.num_timesteps, {}, diffusion, below)
        self.time, self.law, self.num_draws = time, law, num_draws

    @property
    def about(self) -> str:
        """The name of the owner, and the timesteps that the program draws."""
        count, length = self.num_draws, self.num_timesteps
        drawn = f"{count} random timestep{'s' * (count > 1)} a datum"
        chain = "T → ∞" if length == math.inf else f"T = {length}"
        return f"of {self.owner.name!r}, {chain}: {drawn}, {self.law!r}"

    def __repr__(self) -> str:
        kind = "model" if isinstance(self, GenerativeProgram) else "guide"
        return f"{kind} of a TimestepPlate {self.about}"

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites, in the model's order."""
        return (f"x_{self.num_timesteps}", "t", "x_t", self.time.step_site, "x_0")

    @contextmanager
    def over_timesteps(
        self, state: Tensor, prefix: str, site: Callable[[Any], Any]
    ) -> Iterator[Drawn]:
        """Open the plate of the draws and sample site ``t``, on the device of ``state`` and in its dtype.

        ``site`` makes the distribution of the site from the law of the timesteps.
        """
        with pyro.plate(joined(prefix, "timesteps"), self.num_draws, dim=-2):
            law = self.time.law(self.law, state.device).to(state.dtype)
            with poutine.mask(mask=False):
                t = pyro.sample("t", site(law))
            weight = (-law.log_prob(t)).exp() / self.num_draws
            yield Drawn(t, weight, t == self.time.first)


class _SubsampledModel(SubsampledProgram, GenerativeProgram):
    def __init__(self, diffusion: Any, time: Time, law: Timesteps, num_draws: int) -> None:
        super().__init__(diffusion, time, law, num_draws)
        self.prior = Kernel(diffusion.prior)
        self.reverse = Kernel(partial(time.pair, diffusion), time.step_site)

    def forward(
        self, x_0: Tensor | None = None, context: Any = None, *, num_data: int | None = None,
        num_samples: int = 1, plate: bool = True, prefix: str = "", **given: Any,
    ) -> None:  # fmt: skip
        with self.over_data(
            x_0, Given.of(context=context, **given), num_data=num_data, num_samples=num_samples,
            plate=plate, prefix=prefix,
        ) as run:  # fmt: skip
            x_T = pyro.sample(f"x_{self.num_timesteps}", prior := self.prior(), infer=STATE)
            with self.over_timesteps(x_T, prefix, HandedOver) as drawn:
                x_t = pyro.sample("x_t", CarriedSite(prior))
                step, likelihood = self.reverse(run.seen(x_t), drawn.t, **run.context)
                with poutine.scale(scale=drawn.weight):
                    with poutine.mask(mask=~drawn.is_first):
                        pyro.sample(self.time.step_site, step, infer=STATE)
                    with poutine.mask(mask=drawn.is_first):
                        fitting = check_event_shape(likelihood, run.x_0)
                        pyro.sample("x_0", fitting, obs=run.x_0, infer=STATE)
            self._complete_volume(run.x_0, run.given.get("mask"), drawn)

    def _complete_volume(self, x_0: Tensor | None, mask: Tensor | None, drawn: Drawn) -> None:
        """State the part of a transform's log-Jacobian that is missing at the drawn timesteps."""
        if x_0 is not None and self.owner.transform is not None:
            there = (drawn.weight * drawn.is_first).sum(-2, keepdim=True)
            pyro.factor("log_volume", (1 - there) * self.owner.log_volume(x_0, mask))


class _SubsampledGuide(SubsampledProgram):
    def __init__(self, diffusion: Any, time: Time, law: Timesteps, num_draws: int) -> None:
        super().__init__(diffusion, time, law, num_draws, below="denoiser.schedule")
        self.embed = Kernel(diffusion.embed)

    def forward(
        self, x_0: Tensor, context: Any = None, *, num_data: int | None = None, plate: bool = True,
        prefix: str = "", **given: Any,
    ) -> None:  # fmt: skip
        time, process = self.time, self.owner.process
        with self.over_data(
            x_0, Given.of(context=context, **given), num_data=num_data, plate=plate, prefix=prefix
        ) as run:
            embedded = self.embed(run.x_0, **run.given)
            last = torch.as_tensor(time.last, device=embedded.device)
            x_T = time.marginal(process, embedded, last)
            pyro.sample(f"x_{self.num_timesteps}", x_T, infer=STATE)
            with self.over_timesteps(embedded, prefix, lambda law: law) as drawn:
                x_t = pyro.sample("x_t", CarriedSite(time.marginal(process, embedded, drawn.t)))
                # Rows of the reconstruction are masked, and may have any kernel with a density.
                t = torch.where(drawn.is_first, last, drawn.t)
                step = time.posterior(process, x_t, embedded, t)
                with poutine.scale(scale=drawn.weight), poutine.mask(mask=~drawn.is_first):
                    pyro.sample(time.step_site, step, infer=STATE)
