"""The documentation: pages run, links resolve, every name is written about, the site builds."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import matplotlib.pyplot as plt
import pytest
import torch

import pyro_diffusion

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = sorted(
    path.relative_to(ROOT).with_suffix("") for path in (ROOT / "pyro_diffusion").rglob("[a-z]*.py")
)
#: Pages whose code blocks run, each in one namespace.
PAGES = [
    ROOT / "README.md", DOCS / "index.md",
    *sorted(DOCS.glob("guides/*.md")), *sorted(DOCS.glob("tutorial/*.md")),
]  # fmt: skip
BLOCK = re.compile(
    r"^(?P<fence>`{3,}|:{3,})(?P<kind>python|\{code-cell\}[^\n]*)\n(?P<text>.*?)^(?P=fence)\s*$",
    re.DOTALL | re.MULTILINE,
)
#: What a stranger types, and what must lead to a guide.
WORDS = [
    "log-likelihood", "missing values", "imputation", "classifier", "which estimator", "notebook", "GPU",
    "resume",
]  # fmt: skip


def blocks(page):
    """The code of a page: line, code, and whether it is there to raise."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        code, raises = match["text"], False
        if match["kind"] != "python":
            options = re.match(
                r"(?:---\n.*?^---\n|(?::[\w-]+:[^\n]*\n)*)", code, re.DOTALL | re.MULTILINE
            )
            raises = "raises-exception" in options[0]
            code = "\n" * options[0].count("\n") + code[options.end() :]
        yield text.count("\n", 0, match.start()) + 1, code, raises


# What runs.


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")  # of tensors in its plots
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """In one namespace, where warnings are errors, on one thread as the site is built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: plt.close("all"))
    monkeypatch.syspath_prepend(tmp_path)
    namespace = {"__name__": "__main__"}
    threads = torch.get_num_threads()
    try:
        for line, block, raises in blocks(page):
            code = compile("\n" * line + block, page.name, "exec")
            if raises:
                with pytest.raises(Exception):  # noqa: B017, any that the page shows
                    exec(code, namespace)
            else:
                exec(code, namespace)
    finally:
        torch.set_num_threads(threads)
        plt.close("all")


def test_readme_runs_something():
    assert list(blocks(ROOT / "README.md"))


# What is said.


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_relative_links_of_readme_and_contributing_resolve():
    """To files, and to headings as GitHub names them. The site's own are checked when it is built."""
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            path = ROOT / file if file else ROOT / name
            assert path.exists(), (name, target)
            assert not anchor or anchor in anchors(path), (name, target)


def anchors(page):
    """The headings of a Markdown page as anchors."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.lower())
        yield words.strip().replace(" ", "-")


def test_every_public_name_is_in_the_reference_and_in_use_somewhere():
    """In the API pages by its module, and in a guide, in the tutorial or in an example by its name."""
    written = "\n".join(path.read_text() for path in [*PAGES, *(ROOT / "examples").glob("*.py")])
    reference = "\n".join(path.read_text() for path in DOCS.glob("api/*.md"))
    for name in pyro_diffusion.__all__:
        found = getattr(pyro_diffusion, name)
        module = getattr(found, "__module__", None)
        if module is None or name.startswith("__"):
            continue
        assert f"automodule:: {module}\n" in reference, name
        assert re.search(rf"\b{name}\b", written), (
            f"{name} is in no guide, tutorial page or example"
        )


@pytest.mark.parametrize("word", WORDS)
def test_what_a_stranger_types_is_in_a_guide(word):
    guides = [re.sub(r"\s+", " ", page.read_text()).lower() for page in DOCS.glob("guides/*.md")]
    assert any(word.lower() in text for text in guides)


def test_every_module_has_a_page():
    index = (DOCS / "api/index.md").read_text().split()
    for module in PACKAGE:
        page = module.parts[1]  # a folder has one page for all of its modules
        if page.startswith("_"):
            continue
        assert page in index
        page = (DOCS / f"api/{page}.md").read_text()
        assert f"automodule:: {'.'.join(module.parts)}\n" in page


def test_every_page_is_of_a_module_that_is_there():
    modules = {".".join(module.parts) for module in PACKAGE} | {
        ".".join(module.parts[:2]) for module in PACKAGE
    }
    for page in DOCS.glob("api/*.md"):
        assert set(re.findall(r"automodule:: (\S+)", page.read_text())) <= modules, page.name


def test_every_example_is_in_the_gallery():
    """``make gallery`` has run since the example was added, and what it wrote is small."""
    found = json.loads((DOCS / "gallery/gallery.json").read_text())
    assert set(found) == {path.stem for path in (ROOT / "examples").glob("*.py")}
    for name, run in found.items():
        assert (DOCS / f"gallery/{name}.txt").stat().st_size < 20_000, name
        if run["picture"]:
            assert (DOCS / "gallery" / run["picture"]).stat().st_size < 150_000, name


def test_every_benchmark_is_on_the_page(monkeypatch):
    """The page of benchmarks is made from the files of results, all of them."""
    monkeypatch.syspath_prepend(DOCS)
    import tables

    page = tables.benchmarks()
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        assert f"### {path.stem.removesuffix('_cuda')}.py" in page
    assert "| nan" not in page


def test_the_picture_of_the_floors_is_of_the_imports_as_they_are(monkeypatch):
    """The picture holds the imports that it was drawn from; ``python docs/floors.py`` draws it anew."""
    monkeypatch.syspath_prepend(DOCS)
    import floors

    description = re.search(r"<dc:description>(.*?)</dc:description>", floors.PICTURE.read_text())
    drawn = json.loads(html.unescape(description[1]))
    assert drawn == floors.imports()
    assert {room for _, rooms in floors.KINDS.values() for room in rooms.split()} == set(drawn)


# The site.

#: Those of ``docs/conf.py`` but for viewcode.
EXTENSIONS = (
    "sphinx.ext.autodoc,sphinx.ext.napoleon,sphinx.ext.mathjax,sphinx_copybutton,sphinx_design,"
    "myst_nb"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors, without the output of its code and without copies of modules.

    The copies, of viewcode, take a quarter of the time; ``make docs`` makes them.
    """
    for needed in (
        "sphinx",
        "myst_nb",
        "furo",
        "sphinx_design",
        "sphinx_copybutton",
        "mathjax",
        "lightning",
    ):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [
            sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet",
            "-D", "nb_execution_mode=off", "-D", f"extensions={EXTENSIONS}",
            "--doctree-dir", str(folder / "doctrees"), str(DOCS), str(folder / "html"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "html"


def test_the_site_builds_with_warnings_as_errors(site):
    index = (site / "index.html").read_text()
    assert 'href="api/index.html' in index
    assert "forward_posterior" in (site / "api/processes.html").read_text()
    assert list((site / "_images").glob("floors*.svg"))


def test_the_site_needs_no_network(site):
    """Scripts, styles and pictures are files of the site, MathJax among them."""
    assert (site / "_static/tex-svg-full.js").stat().st_size > 1_000_000
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]+)"', page.read_text())
        assert not [target for target in loaded if "//" in target], page


def test_links_inside_the_site_resolve(site):
    """Every relative link leads to a file, and to an id in it."""
    ids, broken = {}, []
    for page in site.rglob("*.html"):
        for target in set(re.findall(r'<a\b[^>]*?href="([^"]+)"', page.read_text())):
            if "://" in target or target.startswith("mailto:"):
                continue
            file, _, anchor = unquote(html.unescape(target)).partition("#")
            path = (page.parent / file).resolve() if file else page
            if path not in ids:
                text = path.read_text() if path.suffix == ".html" and path.exists() else ""
                ids[path] = set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
            if not path.exists() or (anchor and path.suffix == ".html" and anchor not in ids[path]):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert not broken, "\n".join(sorted(broken)[:20])


@pytest.mark.parametrize(
    ("question", "page"),
    [
        ("How do I compute the log-likelihood of my data?", "guides/evidence.html"),
        ("How do I handle missing values?", "guides/missing_data.html"),
        ("Which estimator should I use?", "guides/evidence.html#which-estimator-should-i-use"),
        ("Which number do I report?", "guides/reading_the_bound.html#which-number-do-i-report"),
    ],
)
def test_a_question_is_one_click_from_the_first_page(site, question, page):
    index = (site / "index.html").read_text()
    assert question in index
    assert f'href="{page}"' in index
