"""Sphinx: README with its table of equations, the examples, and the API from docstrings (``make docs``)."""

import re
from pathlib import Path

import pyro_diffusion

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


def page(target):
    """Where a file of the repository is in the docs, or ``None``."""
    path = Path(target)
    if path.parts[0] == "pyro_diffusion":
        return f"api/{Path(path.parts[1]).stem}.md"  # a folder has one page
    if path.parts[0] == "examples":
        return f"examples.md#{path.stem.replace('_', '-')}-py"
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


def setup(app):
    app.connect("source-read", read)
