"""The site builds without a warning, from the docstrings and README as they are."""

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
    assert 'href="api/kernels.html' in index
    assert "forward_posterior" in (tmp_path / "html/api/kernels.html").read_text()
