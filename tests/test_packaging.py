"""The version has one place, and what is built holds what it should. ``make wheel`` installs it as well."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from smoke import EXTRAS, check_sdist, check_wheel

import pyro_diffusion

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_in_one_place():
    """``pyro_diffusion/__init__.py`` has it. The others ask there, and the citation agrees."""
    version = pyro_diffusion.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "pyro_diffusion/__init__.py"
    assert "release = pyro_diffusion.__version__" in (ROOT / "docs/conf.py").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1].strip('"') == version


def test_the_changelog_begins_with_this_version_or_one_that_is_not_released():
    first = re.search(r"^## \[?(.*?)\]?( .*)?$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert pyro_diffusion.__version__ in first or first.lower().startswith("unreleased")


def test_the_extras_are_those_that_the_smoke_test_expects():
    assert set(PROJECT["project"]["optional-dependencies"]) == EXTRAS | {"test", "dev"}


def test_wheel_and_sdist_hold_what_they_should(tmp_path):
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", tmp_path],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert check_wheel(wheel) == check_sdist(sdist) == pyro_diffusion.__version__
