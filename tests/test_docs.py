"""The site builds without a warning, from the docstrings and README as they are."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted(
    path.relative_to(ROOT).with_suffix("") for path in (ROOT / "pyro_diffusion").rglob("[a-z]*.py")
)


def test_every_module_has_a_page():
    index = (ROOT / "docs/api/index.md").read_text().split()
    for module in PACKAGE:
        page = module.parts[1]  # a folder has one page for all of its modules
        assert page in index
        page = (ROOT / f"docs/api/{page}.md").read_text()
        assert f"automodule:: {'.'.join(module.parts)}\n" in page


def test_every_page_is_of_a_module_that_is_there():
    modules = {".".join(module.parts) for module in PACKAGE} | {
        ".".join(module.parts[:2]) for module in PACKAGE
    }
    for page in (ROOT / "docs/api").glob("*.md"):
        assert set(re.findall(r"automodule:: (\S+)", page.read_text())) <= modules, page.name


def test_the_picture_of_the_floors_is_of_the_imports_as_they_are(monkeypatch):
    """The picture holds the imports that it was drawn from; ``python docs/floors.py`` draws it anew."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import floors

    description = re.search(r"<dc:description>(.*?)</dc:description>", floors.PICTURE.read_text())
    drawn = json.loads(html.unescape(description[1]))
    assert drawn == floors.imports()
    assert {room for _, rooms in floors.KINDS.values() for room in rooms.split()} == set(drawn)


def test_the_site_builds_with_warnings_as_errors(tmp_path):
    for needed in ("sphinx", "myst_parser", "furo", "lightning"):
        pytest.importorskip(needed)
    result = subprocess.run(
        [
            sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet",
            "--doctree-dir", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "html"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    index = (tmp_path / "html/index.html").read_text()
    assert 'href="api/processes.html' in index
    assert "forward_posterior" in (tmp_path / "html/api/processes.html").read_text()
    assert list((tmp_path / "html/_images").glob("floors*.svg"))
