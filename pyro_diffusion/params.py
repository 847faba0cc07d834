r"""Names in Pyro's param store: one owner, one prefix, one tensor.

Classic ``SVI`` finds the parameters to train through ``pyro.param`` statements, and ``pyro.param`` looks
them up by name in a store that the whole process shares. If two models use one name, they share parameters,
or one model's parameters are not trained. A :class:`ParamScope` is a module that owns a prefix::

    <name>.<path of the parameter below the owner>      e.g.  diffusion_2.denoiser.network.0.weight

All programs of one model state the parameters of the same owner, so their names agree. A copied or
unpickled model takes a prefix of its own. If the store holds another tensor than the module under a
parameter's name, an error is raised, because ``SVI`` would train the wrong tensor.

A scope is also the unit of saving and loading. Its ``state_dict`` contains a description of the model, and
is loaded completely or not at all.

:func:`shared_copy` makes the other kind of copy, with the same parameters under the same names. A model
on another grid is such a copy.
"""

import copyreg
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_diffusion.checks import described, require

__all__ = ["ParamScope", "check_state_dict", "free_name", "shared_copy", "snake_case"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_used_names: set[str] = set()
#: Where torch keeps what is assigned to a module and is not a plain attribute.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def in_store(name: str) -> bool:
    """Whether Pyro's param store holds parameters with a prefix."""
    return any(key.startswith(f"{name}.") for key in pyro.get_param_store())


def snake_case(name: str) -> str:
    """The default name of a model, from the name of its class."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def free_name(name: str) -> str:
    """The first of ``name``, ``name_2``, ``name_3``, … that this process has never used."""
    stem = re.sub(r"_\d+$", "", name)
    names = chain([name], (f"{stem}_{number}" for number in count(2)))
    return next(free for free in names if free not in _used_names and not in_store(free))


def shared_copy(module: ModuleT) -> ModuleT:
    """A shallow copy of a module, which shares every parameter, buffer and submodule with it.

    Training the copy trains the module, and a :class:`ParamScope` keeps its name: both state the same
    tensors to Pyro under the same names. What is *assigned* to one of them later (an attribute, a
    parameter, a buffer or a submodule) leaves the other as it is. The constructor is not called, so
    that a subclass may have any constructor.

    Two things follow from how torch works. Moving the copy to another device moves the shared
    parameters, but replaces the buffers that belong to the copy itself. Hooks are shared as well.
    ``copy.deepcopy`` gives the other kind of copy, with tensors and a name of its own.
    """
    shared = copyreg.__newobj__(type(module))  # type: ignore[attr-defined]  # copy.copy would rename a scope
    own = {registry: getattr(module, registry).copy() for registry in _REGISTRIES}
    vars(shared).update(vars(module) | own)
    return shared


def check_state_dict(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Raise a ``ValueError`` if names or shapes in ``state_dict`` differ from those of the module."""
    own = module.state_dict()
    missing = [  # a part knows what it means if weights of an older version say nothing about it
        f"no {key!r}"
        for key in own
        if strict and key not in state_dict and not key.endswith("._extra_state")
    ]
    surplus = [
        f"{key!r}, which this model does not have"
        for key in state_dict
        if strict and key not in own
    ]
    reshaped = [
        f"{key!r} of shape {tuple(getattr(state_dict[key], 'shape', ()))} and not {tuple(value.shape)}"
        for key, value in own.items()
        if isinstance(value, Tensor) and key in state_dict and not key.endswith("_extra_state")
        and getattr(state_dict[key], "shape", None) != value.shape
    ]  # fmt: skip
    wrong = missing + surplus + reshaped
    if wrong:
        raise ValueError(
            f"argument 'state_dict': got {wrong[0]}"
            + (f", and {len(wrong) - 1} more that differ" if len(wrong) > 1 else "")
            + f"; expected the {len(own)} entries of this model. Build the model, its network "
            "included, with the arguments that it was saved with."
        )


class _OnePlace(Messenger):
    """Raise if weights are drawn inside a plate: they would get its axis, which no network expects."""

    def _pyro_post_sample(self, msg: Any) -> None:
        plates = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
        if plates:
            raise ValueError(
                f"site {msg['name']!r}: got weights inside the plate {plates[0].name!r}, which would draw "
                f"{plates[0].size} of them; expected one draw in each run of the program. Use "
                "vectorize_particles=False, or run the program outside of the plate."
            )


class _Parts(NamedTuple):
    """What a module is made of, by path."""

    places: list[Any]  #: of :func:`_places`; the lists below hold as long as they do not change
    modules: list[tuple[str, nn.Module]]  #: all; kept here, so that no other object gets their ids
    pyro_modules: list[tuple[str, PyroModule]]
    parameters: list[tuple[str, nn.Parameter]]


def _places(module: nn.Module) -> list[Any]:
    """Name, identity and class of every module and parameter below a module. Their paths take longer."""
    places: list[Any] = []
    due = [module]
    seen = {module}
    for module in due:  # which grows
        places.append(type(module))  # which to_pyro_module_ changes in place
        for registry in (module._parameters, module._modules):
            if registry:
                places += registry
                places += map(id, registry.values())
        new = [m for m in module._modules.values() if m is not None and m not in seen]
        seen.update(new)
        due += new
    return places


class ParamScope(nn.Module):
    """A module whose parameters, with those of its submodules, have one prefix in Pyro's param store.

    Args:
        name: The prefix. ``None`` takes a free one, made from the name of the class.

    Raises:
        ValueError: The store already holds parameters under ``name``.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        if name is None:
            name = free_name(snake_case(type(self).__name__))
        require(
            not in_store(name),
            "argument 'name'",
            f"{name!r}, under which Pyro's param store already holds parameters of another model",
            "a name of its own",
            "Leave name=None, choose another, or call pyro.clear_param_store() if you no longer need the "
            "other model.",
        )
        _used_names.add(name)
        self.name = name

    @contextmanager
    def param_statements(self, below: str = "") -> Iterator[None]:
        """State every parameter to Pyro, then run the body of the ``with`` block.

        Parameters at paths that start with ``below`` are stated, so that ``SVI`` trains them. Each
        ``PyroParam`` and ``PyroSample`` attribute of Pyro modules at those paths is read once, here,
        outside of every plate. The body uses the values that were read. Pyro modules at other paths are
        named as well, because the body may call them.

        Raises:
            ValueError: The store holds another tensor under a parameter's name.
        """
        parts = self._parts()
        modules = parts.pyro_modules
        # Each call has its own context, in which Pyro modules keep the values that they sample.
        context = PyroModule()._pyro_context if modules else nullcontext()
        for path, module in modules:
            module.__dict__.update(_pyro_name=f"{self.name}.{path}", _pyro_context=context)
        with context:
            self._state_parameters(parts.parameters, below, skip_unconstrained=bool(modules))
            for _, module in (pair for pair in modules if pair[0].startswith(below)):
                with _OnePlace():
                    for attribute in (*module._pyro_params, *module._pyro_samples):
                        getattr(module, attribute)
            yield

    def _state_parameters(
        self, parameters: list[tuple[str, nn.Parameter]], below: str, *, skip_unconstrained: bool
    ) -> None:
        store = pyro.get_param_store()
        held = store.keys().mapping
        for path, parameter in parameters:
            # A Pyro module states the tensor of a PyroParam itself, with its constraint, when it is read.
            constrained = skip_unconstrained and path.endswith("_unconstrained")
            if not parameter.requires_grad or not path.startswith(below) or constrained:
                continue
            name = f"{self.name}.{path}"
            found = held.get(name)
            if found is None and not parameter.is_contiguous():
                # The store copies a tensor that is assigned by name, if it is not contiguous.
                own: Any = {"params": {name: parameter}, "constraints": {name: constraints.real}}
                store.set_state(own)
            if found is None:
                found = store.setdefault(name, parameter)
            if found is not parameter:
                raise ValueError(
                    f"parameter {name!r}: Pyro's param store holds another tensor under this name, so that "
                    "training would not reach this model; expected the module's own tensor. Call "
                    "pyro.clear_param_store() after loading a param store or after replacing parameters "
                    "(load_state_dict(assign=True))."
                )
            pyro.param(name, parameter)

    def _parts(self) -> "_Parts":
        """Pyro modules and parameters by their paths. They are found again when any of them has moved."""
        parts = self.__dict__.get("_parts_found")
        places = _places(self)
        if parts is None or parts.places != places:
            modules = list(self.named_modules())
            pyro_modules = [pair for pair in modules if isinstance(pair[1], PyroModule)]
            parts = _Parts(places, modules, pyro_modules, list(self.named_parameters()))
            self.__dict__["_parts_found"] = parts
        return parts

    @property
    def description(self) -> dict[str, str]:
        """What a ``state_dict`` must have in common with the model, besides names and shapes of tensors."""
        return {"model": type(self).__name__}

    def get_extra_state(self) -> Tensor:
        """The description as a tensor of bytes, so that a ``state_dict`` holds nothing but tensors."""
        return torch.tensor(list(json.dumps(self.description).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise if ``state`` describes another model. No number has been copied at that point."""
        try:
            theirs = dict(json.loads(bytes(state.tolist())))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "argument 'state_dict': got an '_extra_state' that does not describe a model; expected the "
                "one that state_dict() returns. Use another copy of the file."
            ) from error
        for part, ours in self.description.items():
            if theirs.get(part) != ours:
                raise ValueError(
                    f"argument 'state_dict': got the numbers of a model with {part} {theirs.get(part)}; "
                    f"expected {ours}. Build the model with the arguments that it was saved with, and "
                    "change them after loading."
                )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as ``torch.nn.Module`` does, but only if everything fits.

        Raises:
            ValueError: Numbers of a model with other arguments, names or shapes. Nothing is copied.
        """
        if "_extra_state" in state_dict:
            self.set_extra_state(state_dict["_extra_state"])
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ``state_dict`` to a file. An older file is replaced only when the new one is complete.

        The file holds every parameter and buffer, including those of a learned schedule and of
        ``Standardize``, and a description of the model. ``torch.load(path, weights_only=True)`` reads it.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.part")
        torch.save(self.state_dict(), aside)
        os.replace(aside, path)

    def load(self, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote for a model with the same arguments; return this model, on its device.

        Raises:
            ValueError: A file that is incomplete, is not a checkpoint, or belongs to another model. The
                model is not changed.
            OSError: There is no such file, or it cannot be opened.
        """
        device = next((tensor.device for tensor in self.parameters()), None)
        content = io.BytesIO(Path(path).read_bytes())
        try:
            state = torch.load(content, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds, depending on where the file is broken
            raise ValueError(
                f"argument 'path': got {str(path)!r}, which cannot be read ({type(error).__name__}); "
                "expected a whole file written by save() or torch.save(model.state_dict()). The file was "
                "cut short, or has other contents: use another copy."
            ) from error
        is_dict = isinstance(state, dict)
        keys = ", ".join(map(repr, list(state)[:4])) if is_dict else ""
        held = f"a dictionary of {keys or 'nothing'}" if is_dict else described(state)
        require(
            is_dict and all(isinstance(value, Tensor) for value in state.values()),
            "argument 'path'",
            f"{str(path)!r}, which holds {held}",
            "the numbers of a model, by name",
            "Load a checkpoint of Lightning into an SVIModule around this model: "
            "module.load_state_dict(torch.load(path)['state_dict']).",
        )
        self.load_state_dict(state)
        return self

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():  # Pyro leaves a weak reference, which cannot be pickled
            parameter.__dict__.pop("unconstrained", None)
        return {name: value for name, value in self.__dict__.items() if name != "_parts_found"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name = free_name(self.name)
        _used_names.add(self.name)
