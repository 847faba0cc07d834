"""Sphinx: README with its table of equations, the examples, and the API from docstrings (``make docs``)."""

import re
from importlib import import_module
from pathlib import Path

import pyro_diffusion
from pyro_diffusion.display import Listing

ROOT = Path(__file__).parent.parent

project = "pyro_diffusion"
author = "the pyro_diffusion developers"
version = release = pyro_diffusion.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
]
html_theme = "furo"
html_title = "pyro_diffusion"
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
myst_heading_anchors = 3

# A reference to a name of this package must resolve. Other packages' pages are not linked, and private
# names have none.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!pyro_diffusion\.)\w+(\.\w+)+"),
    (r"py:.*", r"pyro_diffusion\.(\w+\.)*_\w+"),
    (r"py:.*", r"pyro_diffusion\.(\w+\.)*(Axes|Batches|Embedding|ModuleT|Sizes)"),  # names of types
    (r"py:class", r"Axes|ExpandedDistribution|Tensor"),
]


def page(target):
    """Where a file of the repository is in the docs, or ``None``."""
    path = Path(target)
    if path.parts[0] == "pyro_diffusion":
        return f"api/{Path(path.parts[1]).stem}.md"  # a folder has one page
    if path.parts[0] == "examples":
        return f"examples.md#{path.stem.replace('_', '-')}-py"
    if path.parts[0] == "docs":
        return target.removeprefix("docs/")
    return {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}.get(target)


def from_repository(name):
    """A file of the repository, with its links to other files turned into links to pages."""

    def link(match):
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match.group()
        return f"[{text}]({page(target)})" if page(target) else text

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, (ROOT / name).read_text())


def examples():
    """Every example with its source."""
    parts = ["# Examples\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```{{literalinclude}} ../examples/{path.name}\n```\n")
    return "\n".join(parts)


def read(app, docname, source):
    if docname == "index":
        source[0] = from_repository("README.md") + "\n" + source[0]
    elif docname in ("changelog", "contributing"):
        source[0] = from_repository(f"{docname.upper()}.md")
    elif docname == "examples":
        source[0] = examples()


SENTENCES = {}  # docstrings of attributes and properties, as they were written


def keep_sentence(app, what, name, obj, options, lines):
    if what in ("attribute", "data", "property"):
        SENTENCES[name] = list(lines)


def restore_sentence(app, what, name, obj, options, lines):
    """Undo what napoleon did: it takes the words before a colon as a type."""
    if what in ("attribute", "data", "property"):
        lines[:] = SENTENCES.pop(name)


def in_its_room(app, env, node, contnode):
    """Link a name of a folder's file that is on the page of the folder, or the other way round."""
    module, _, name = node["reftarget"].rpartition(".")
    module = module or node.get("py:module") or ""
    if not module.startswith("pyro_diffusion.") or node.get("refdomain") != "py":
        return None
    try:
        module = import_module(module)
    except ImportError:  # a class, say
        return None
    if not hasattr(module, "__file__"):  # a module that has moved
        return None
    room = ".".join(module.__name__.split(".")[:2])
    domain = env.get_domain("py")
    for place in (room, getattr(getattr(module, name, None), "__module__", room)):
        if f"{place}.{name}" in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], f"{place}.{name}", node, contnode
            )
    return None


def setup(app):
    Listing.__dir__ = type.__dir__  # the reference documents what dir() leaves out, too
    app.connect("source-read", read)
    app.connect("missing-reference", in_its_room)
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)  # napoleon is at 500
    app.connect("autodoc-process-docstring", restore_sentence, priority=600)
