r"""Names of version 0.1 that have moved. They work for one more version, and warn that they moved.

:func:`keep_modules` keeps the old modules importable: each forwards its names. :func:`keep_names` forwards
the names that have left a package. A type checker sees neither, and so it reports the old names as errors.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["keep_modules", "keep_names"]

PACKAGE = "pyro_diffusion"

#: Modules of version 0.1, and the rooms where their names are now.
MODULES: Mapping[str, Sequence[str]] = {
    "batches": ("training.batches",),
    "bernoulli": ("denoisers", "diffusion", "distributions", "processes.bernoulli"),
    "compilation": ("training.compilation",),
    "draws": ("family", "diagnostics.draws", "diagnostics.recording"),
    "evaluation": ("bounds",),
    "families": ("family",),
    "flow": ("evidence",),
    "kernels": ("processes.base", "processes.gaussian", "distributions"),
    "objectives": ("training.objectives",),
    "observations": ("checks", "given"),
    "parallel": ("training.parallel",),
    "parameterizations": ("denoisers", "checks", "likelihoods"),
    "report": ("evidence",),
    "sequential": ("evidence",),
    "store": ("params", "networks"),
    "timesteps": ("chains", "distributions"),
    "variances": ("denoisers", "denoisers.variances"),
}

#: Names that were changed as well.
RENAMED = {("store", "check_state"): "check_state_dict", ("observations", "zeroed"): "seen"}


class _Moved(ModuleType):
    """An old module, whose names are looked up in the rooms where they are now."""

    def __init__(self, name: str, rooms: Sequence[str]) -> None:
        super().__init__(f"{PACKAGE}.{name}", f"Moved in version 0.2 to {', '.join(rooms)}.")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.__dict__["_rooms"] = rooms

    def __getattr__(self, name: str) -> Any:
        return _found(self.__name__, name, self.__dict__["_rooms"])


def keep_modules() -> None:
    """Let ``import pyro_diffusion.kernels`` and similar imports find a module that forwards its names."""
    for name, rooms in MODULES.items():
        sys.modules.setdefault(f"{PACKAGE}.{name}", _Moved(name, rooms))


def keep_names(module: str, names: Mapping[str, str]) -> None:
    """Give a package, which is being imported, a ``__getattr__`` for names that have left it.

    Args:
        module: The package's name.
        names: The room of each name.
    """

    def get(name: str) -> Any:
        """The object that the name has now in its new place."""
        if name not in names:
            if module == PACKAGE and name in MODULES:
                return sys.modules[f"{PACKAGE}.{name}"]
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _found(module, name, (names[name],))

    vars(sys.modules[module])["__getattr__"] = get


def _found(module: str, name: str, rooms: Sequence[str]) -> Any:
    if not name.startswith("__"):
        for room in rooms:
            new = RENAMED.get((module.removeprefix(f"{PACKAGE}."), name), name)
            value = getattr(import_module(f"{PACKAGE}.{room}"), new, None)
            if value is not None:
                warnings.warn(
                    f"{module}.{name} has moved to {PACKAGE}.{room}.{new}; "
                    "the old name will be removed in version 0.3",
                    DeprecationWarning,
                    stacklevel=3,  # the user's line: this function and a module's __getattr__ are between
                )
                return value
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
