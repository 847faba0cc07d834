r"""The base of all programs: parameters under their owner's name, the data plate, masks, named errors.

A program is an equation over kernels. :class:`Program` opens the context of the equation: the statements of
the owner's parameters, the scale and the plate of the data, and the handlers of a mask and of a prefix.
:class:`Kernel` adds the name of the site to an error from a kernel.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_diffusion.checks import check_count, check_data, check_observed, require
from pyro_diffusion.display import as_lines
from pyro_diffusion.given import Given, ObservedEntries, as_real, heard, seen, takes
from pyro_diffusion.params import ParamScope, free_name, snake_case


class ProgramPair(NamedTuple):
    """A model and the guide that goes with it."""

    model: nn.Module
    guide: nn.Module

    def __repr__(self) -> str:
        return as_lines("ProgramPair", {"model": repr(self.model), "guide": repr(self.guide)})


class Kernel:
    """A function that returns the distribution of a site, and whose errors name the site.

    Args:
        function: Called with states, and with ``context=`` if there is a context and the function takes one.
        site: Name of the site; ``None`` for a function of data, which has no site.
        shift: For a site ``x_s``: ``s`` is the timestep, which is the last argument, plus this number.
    """

    def __init__(
        self, function: Callable[..., Any], site: str | None = None, shift: int | None = None
    ) -> None:
        self.function, self.site, self.shift = function, site, shift
        self._hears: dict[str, bool] = {}

    def __call__(self, *states: Any, **given: Any) -> Any:
        """The distribution of the site, given the states before it."""
        given = heard(given, self.function, self.hears)
        try:
            return self.function(*states, **given)
        except ValueError as error:
            if self.site is None:
                raise
            number = "" if self.shift is None else given.get("t", states[-1]) + self.shift
            raise ValueError(f"site '{self.site}{number}': {error}") from error

    def hears(self, argument: str) -> bool:
        """Whether the function gets an argument: a mask always, a context if the function takes one."""
        if argument not in self._hears:
            self._hears[argument] = argument == "mask" or takes(self.function, argument)
        return self._hears[argument]


def later(kernel: Callable[..., Any], steps: int, *s: int) -> Callable[..., Any]:
    """A kernel some timesteps later: at ``s``, its last argument, it is the kernel at ``s + steps``."""

    def shifted(*states: Any, **given: Any) -> Any:
        """The kernel, at a later timestep."""
        arguments: list[Any] = [*states, *s]
        return kernel(*arguments[:-1], arguments[-1] + steps, **given)

    function = kernel.forward if isinstance(kernel, nn.Module) else kernel
    shifted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # what takes() reads
    return shifted


class Run(NamedTuple):
    """The values that an equation needs in one run of its program."""

    x_0: Tensor | None  #: data, checked; ``None`` where they are drawn
    given: dict[str, Any]  #: what goes with the data, by name
    context: dict[str, Any]  #: the part of it that kernels take
    of_state: Tensor | None  #: observed entries of a latent state
    gap: float | None  #: the value that kernels get in the other entries

    def seen(self, x_t: Tensor) -> Tensor:
        """A state as a kernel of the model gets it, with the gap's value in unobserved entries."""
        return seen(x_t, self.of_state, self.gap)


class _Prefix(Messenger):
    """Put a prefix in front of the names of a program's sites."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["name"].startswith(f"{self.prefix}."):  # a plate of the program has it already
            msg["name"] = f"{self.prefix}.{msg['name']}"


class Program(nn.Module):
    """A Pyro program of a chain.

    Args:
        num_timesteps: Number of latent states :math:`T`; ``math.inf`` for the continuous chain.
        parts: The functions that the program is made of.
        owner: The model whose parameters the parts use; ``None`` makes the program stand alone, with
            its parts' parameters under a name of its own. The method ``state_mask(mask)`` of an owner gives
            the observed entries of a latent, and the attribute ``gap`` the value in the others. Without
            them latents are whole, and a mask concerns the site ``x_0`` only.
        below: Path below the owner to the parameters that this program trains.
    """

    owner: Any

    def __init__(
        self, num_timesteps: Any, parts: dict[str, Any], owner: ParamScope | None, below: str = ""
    ) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        if owner is None:  # make one, with the modules that are parts or whose methods are parts
            owner = ParamScope(free_name(snake_case(type(self).__name__)))
            for name, part in parts.items():
                module = getattr(part, "__self__", part)
                if isinstance(module, nn.Module):
                    owner.add_module(name, module)
        self.owner, self.below = owner, below

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites by timestep: ``site_names[t]`` is the site of :math:`x_t`."""
        return tuple(f"x_{t}" for t in range(self.num_timesteps + 1))

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.owner.name!r}: {self._in_words()}"

    def _in_words(self) -> str:
        return f"a Pyro program of T = {self.num_timesteps}"

    @contextmanager
    def over_data(
        self,
        x_0: Tensor | None,
        given: Given,
        *,
        num_data: int | None,
        num_samples: int = 1,
        plate: bool,
        prefix: str,
    ) -> Iterator[Run]:
        """Open the context of an equation: parameters, scale, plate, and the handlers of mask and prefix.

        Args:
            x_0: Data; ``None`` for a model that draws them.
            given: What goes with the data.
            num_data: Size of the data set of which the data are a batch.
            num_samples: Number of data to draw if none are given. Without a plate, the caller's sets it.
            plate: Whether the program has a plate of its own, scaled to ``num_data``.
            prefix: Put in front of the sites' names, with a dot.
        """
        x_0 = self._checked(x_0, given)
        state_mask = getattr(self.owner, "state_mask", None)
        of_state = state_mask(given.mask) if state_mask and given.mask is not None else None
        size = check_count("num_samples", num_samples, 1, _COUNTS) if x_0 is None else len(x_0)
        known = plate or x_0 is not None  # how many rows there are; else the caller's plate says
        device = getattr(self.owner, "device", None)
        given = given.with_rows(size if known else None, shared=x_0 is None, device=device)
        require(
            plate or num_data is None,
            "argument 'num_data'",
            f"{num_data!r} with plate=False",
            "None, because the caller's plate has a scale of its own",
            "Give num_data to the plate's program, or leave out plate=False.",
        )
        with ExitStack() as stack:
            stack.enter_context(self.owner.param_statements(self.below))
            if num_data is not None:
                meaning = "at least as many as the data given, which are a batch of them"
                num_data = check_count("num_data", num_data, size, _COUNTS, meaning)
                stack.enter_context(poutine.scale(scale=num_data / size))
            if plate:
                stack.enter_context(pyro.plate(joined(prefix, "data"), size, dim=-1))
            if prefix:
                stack.enter_context(_Prefix(prefix))
            if given.mask is not None:
                stack.enter_context(ObservedEntries(given.mask, of_state))
            gap = getattr(self.owner, "gap", None)
            yield Run(x_0, given.arguments(), given.of_kernels(), of_state, gap)

    def _checked(self, x_0: Tensor | None, given: Given) -> Tensor | None:
        """The data, if they and what goes with them fit the program."""
        return check_data(x_0, given.mask)


class GuideProgram(Program):
    """A program of a guide, which needs data."""

    #: The law of the state at any timestep, without a path to it; ``None`` if the guide has no formula.
    marginal: Callable[..., Any] | None = None

    def knows_marginals(self) -> bool:
        r"""Whether :math:`q(x_t \mid x_0)` has a formula, so that single terms need no whole path."""
        return self.marginal is not None

    def _in_words(self) -> str:
        others = f" … x_{self.num_timesteps}" if self.num_timesteps > 1 else ""
        return f"a Pyro guide with sites x_1{others}"

    def __call__(self, x_0: Any = None, *args: Any, **kwargs: Any) -> None:
        """Run the program.

        In its sleep phase Pyro's ``ReweightedWakeSleep`` gives a guide what the model drew, as
        ``observations={"x_0": …}``. It takes the place of the data.
        """
        observations = kwargs.pop("observations", None) or {}
        drawn = observations.get(joined(kwargs.get("prefix", ""), "x_0"), x_0)
        require(
            drawn is x_0 or drawn.shape == x_0.shape,
            "argument 'observations'",
            "several sleep-phase draws at once",
            "one at a time, because a guide takes one batch of data",
            "Use ReweightedWakeSleep(vectorize_particles=False).",
        )
        super().__call__(drawn, *args, **kwargs)


class GenerativeProgram(Program):
    """A program of a model, which can be run without data."""

    def __call__(self, *args: Any, observations: Any = None, **kwargs: Any) -> Any:
        """Run the program, without ``observations``, which ``ReweightedWakeSleep`` passes to a model too."""
        return super().__call__(*args, **kwargs)

    def _in_words(self) -> str:
        return f"a Pyro model with sites x_{self.num_timesteps} … x_0"

    def _checked(self, x_0: Tensor | None, given: Given) -> Tensor | None:
        kernels = [part for part in vars(self).values() if isinstance(part, Kernel)]
        require(
            given.context is None or any(kernel.hears("context") for kernel in kernels),
            "argument 'context'",
            "one for a model whose kernels take none",
            "data alone",
            "Leave it out, or build the model with a denoiser, or layers, that take a context.",
        )
        return as_real(check_observed(x_0, given.mask))


def joined(prefix: str, name: str) -> str:
    """A name with a prefix in front, if there is one."""
    return f"{prefix}.{name}" if prefix else name


_COUNTS = "num_samples is how many data to draw, num_data how many the whole data set has."
