r"""Names in Pyro's param store: one owner, one prefix, one tensor.

Classic ``SVI`` finds what it trains through ``pyro.param`` statements, and ``pyro.param`` is a
dictionary look-up by name in a store that the whole process shares. Two models that use one name
share, or silently freeze, their parameters. A :class:`ParamScope` is a module that owns a prefix::

    <name>.<path of the parameter below the owner>      e.g.  diffusion_2.denoiser.network.0.weight

All programs of one model state the parameters of their one owner, so they agree on names. A copy
or an unpickled model takes a prefix of its own. A store entry that holds another tensor than the
module does raises: nothing is trained in its place.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import nn

__all__ = ["ParamScope", "free_name", "snake_case"]

_used_names: set[str] = set()


def _in_store(name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in pyro.get_param_store())


def snake_case(name: str) -> str:
    """A class's name as the name of a model."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def free_name(name: str) -> str:
    """``name`` itself if this process never used it, else ``name_2``, ``name_3``, …"""
    stem = re.sub(r"_\d+$", "", name)
    candidate, number = name, 1
    while candidate in _used_names or _in_store(candidate):
        number += 1
        candidate = f"{stem}_{number}"
    return candidate


class ParamScope(nn.Module):
    """A module whose parameters, and those of all it contains, live under one name in the store.

    Args:
        name: Prefix in Pyro's param store. ``None`` takes a free one, made from the class's name.

    Raises:
        ValueError: The store already holds parameters under ``name``.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        if name is None:
            name = free_name(snake_case(type(self).__name__))
        elif _in_store(name):
            raise ValueError(
                f"argument 'name': got {name!r}, under which Pyro's param store already holds "
                "parameters of another model; expected a name of its own. Leave name=None, choose "
                "another, or call pyro.clear_param_store() if the other model is done with."
            )
        _used_names.add(name)
        self.name = name

    @contextmanager
    def param_statements(self, below: str = "") -> Iterator[None]:
        """State every parameter to Pyro, then run the body of the ``with`` block.

        Parameters at paths that start with ``below`` are stated, so that ``SVI`` trains them.
        ``PyroParam`` and ``PyroSample`` attributes of Pyro modules anywhere inside are read here,
        outside of every plate, once; the body sees the values that were read.

        Raises:
            ValueError: The store holds another tensor under a parameter's name.
        """
        modules = [
            (path, module)
            for path, module in self.named_modules()
            if isinstance(module, PyroModule) and path.startswith(below)
        ]
        # A context of its own for each call: Pyro modules keep the values that they sample in it.
        context = PyroModule()._pyro_context
        for path, module in modules:
            module.__dict__.update(_pyro_name=f"{self.name}.{path}", _pyro_context=context)
        with context:
            self._state_parameters(below, skip_unconstrained=bool(modules))
            for _, module in modules:
                for attribute in (*module._pyro_params, *module._pyro_samples):
                    getattr(module, attribute)
            yield

    def _state_parameters(self, below: str, *, skip_unconstrained: bool) -> None:
        for path, parameter in self.named_parameters():
            if not parameter.requires_grad or not path.startswith(below):
                continue
            if skip_unconstrained and path.endswith("_unconstrained"):
                continue  # a PyroParam: the module states it with its constraint when it is read
            name = f"{self.name}.{path}"
            if pyro.get_param_store().setdefault(name, parameter) is not parameter:
                raise ValueError(
                    f"parameter {name!r}: Pyro's param store holds another tensor under this "
                    "name, or a copy of a tensor that is not contiguous, so that training would "
                    "not reach this model; expected the module's own tensor. Call "
                    "pyro.clear_param_store() after loading a param store or after replacing "
                    "parameters (load_state_dict(assign=True)), and make parameters contiguous."
                )
            pyro.param(name, parameter)

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():  # a weak reference that Pyro leaves behind; unpicklable
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name = free_name(self.name)
        _used_names.add(self.name)
