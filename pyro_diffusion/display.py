r"""How an object is displayed: lines in a terminal, a table in a notebook, and the names that it lists.

A model has more parts than fit on a line, and torch would print all of them as a tree. :func:`as_lines` and
:func:`as_table` show a title and a few named rows instead. :class:`Listing` decides which names ``dir`` and
``help`` list.
"""

from abc import ABCMeta
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, ClassVar

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["Listing", "as_lines", "as_table", "on_one_line", "size_in_words"]


def as_lines(title: str, rows: Mapping[str, str]) -> str:
    """The title, and below it a line for each row: its name, its content."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:{width}}  {content}" for name, content in rows.items())])


def as_table(title: str, rows: Mapping[str, str]) -> str:
    """The same as an HTML table for a notebook. It has no colours of its own, so that it suits dark pages."""
    left = 'style="text-align: left"'
    body = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(content)}</td></tr>"
        for name, content in rows.items()
    )
    head = f'<thead><tr><th colspan="2" {left}>{escape(title)}</th></tr></thead>'
    return f"<table>{head}<tbody>{body}</tbody></table>"


def on_one_line(part: Any) -> str:
    """The ``repr`` of a part, or the name of its class if the ``repr`` has several lines."""
    words = repr(part)
    return type(part).__name__ if "\n" in words else words


def size_in_words(modules: Iterable[nn.Module]) -> str:
    """The classes of modules, each once, and how many parameters they have together."""
    modules = list(modules)
    names = " and ".join(dict.fromkeys(type(module).__name__ for module in modules))
    parameters = {p for module in modules for p in module.parameters()}
    count = sum(p.numel() for p in parameters if not is_lazy(p))  # a lazy one has no shape yet
    return f"{names} of {count:,} parameters"


class Listing(ABCMeta):
    """A metaclass of modules. ``dir`` and ``help`` of its classes list the names that a user needs.

    Listed are the public names of the class and of its bases, except for those that every torch module has
    and those in ``_internal``. A name that is not listed works as before.
    """

    _internal: ClassVar[frozenset[str]] = frozenset()

    def __dir__(cls) -> list[str]:
        own = (base for base in cls.__mro__ if base not in nn.Module.__mro__)
        return sorted({name for base in own for name in cls.listed(vars(base))})

    def listed(cls, names: Iterable[str]) -> set[str]:
        """Those of some names that are neither private nor internal."""
        internal: set[str] = set()
        for base in cls.__mro__:
            internal |= vars(base).get("_internal", frozenset())
        return {name for name in names if not name.startswith("_")} - internal
