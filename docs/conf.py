"""Sphinx: the tutorial, the guides, the gallery, the benchmarks and the API from docstrings (``make docs``).

Code pages are executed by myst-nb and cached for as long as the package stays as it is. Mathematics is
rendered by a MathJax from the package index, so that the site needs neither a server nor a network.
"""

import hashlib
import os
import shutil
import sys
from importlib import import_module, resources
from pathlib import Path

import pyro_diffusion
from pyro_diffusion.display import Listing

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import pages  # noqa: E402  which stands beside this file
import tables  # noqa: E402

project = "pyro_diffusion"
author = "the pyro_diffusion developers"
version = release = pyro_diffusion.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
]
exclude_patterns = ["_build", "gallery/*.txt"]

html_theme = "furo"
html_title = "pyro_diffusion"
html_show_copyright = False  # LICENSE says it
mathjax_path = "tex-svg-full.js"  # fonts and extensions in one file
html_static_path = [
    "_static",
    str(resources.files("mathjax") / "static/mathjax/es5" / mathjax_path),
]
html_show_search_summary = False  # it is fetched, which a browser refuses on files
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"font-stack--monospace": "ui-monospace, 'DejaVu Sans Mono', monospace"}
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True


def _digest():
    """A number of the package as it is: what was executed with another one is executed anew."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pyro_diffusion").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


EXECUTED = HERE / "_build/executed"
#: What is no fault of a page: tqdm without widgets, and what libraries deprecate in one another.
QUIET = "ignore:IProgress not found,ignore::FutureWarning,ignore::DeprecationWarning"
nb_execution_mode = "cache"
nb_execution_cache_path = str(EXECUTED / _digest())
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # a warning on a page fails the build
nb_render_markdown_format = "myst"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
maximum_signature_line_length = 90

# A reference to a name of this package must resolve. Other packages' pages are not linked, and private
# names have none.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!pyro_diffusion\.)\w+(\.\w+)+"),
    (r"py:.*", r"pyro_diffusion\.(\w+\.)*_\w+"),
    # Names of types
    (r"py:.*", r"pyro_diffusion\.(\w+\.)*(Axes|Batches|Columns|Embedding|ModuleT|P|R|Sizes)"),
    (r"py:class", r"Axes|ExpandedDistribution|P|Tensor"),
]

#: Pages that are made from other files, and how.
GENERATED = {
    "gallery": pages.gallery,
    "benchmarks": tables.benchmarks,
    "development/changelog": lambda: pages.from_repository("CHANGELOG.md", "development"),
    "development/contributing": lambda: pages.from_repository("CONTRIBUTING.md", "development"),
}


def read(app, docname, source):
    if docname in GENERATED:
        source[0] = GENERATED[docname]()
    kernel = (
        "kernelspec:\n  name: python3\n"  # whose language is asked for where nothing is executed
    )
    source[0] = source[0].replace(kernel, "kernelspec: {name: python3,\n  language: python}\n", 1)


def outdated(app, env, added, changed, removed):
    """Generated pages are read anew at every build."""
    return list(GENERATED)


def prepare_executions(app):
    """Settings of the kernels, and no more of what was executed with another state of the package."""
    if app.config.nb_execution_mode == "cache":
        profile = HERE / "_build/ipython/profile_default"  # not the reader's own
        profile.mkdir(parents=True, exist_ok=True)
        (profile / "ipython_kernel_config.py").write_text(
            "c = get_config()\nc.IPKernelApp.log_level = 40\nc.InlineBackend.figure_formats = {'svg'}\n"
        )
        os.environ |= {
            "IPYTHONDIR": str(profile.parent),
            "PYTHONWARNINGS": QUIET,
            "TQDM_DISABLE": "1",
        }
        for folder in set(EXECUTED.glob("*")) - {Path(nb_execution_cache_path)}:
            shutil.rmtree(folder)


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
    app.connect("builder-inited", prepare_executions)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", read)
    app.connect("missing-reference", in_its_room)
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)  # napoleon is at 500
    app.connect("autodoc-process-docstring", restore_sentence, priority=600)
