"""The smoke test of ``make wheel``: what was built holds what it should, and works where it is installed.

    python -I tests/smoke.py dist     # in an environment with the wheel alone, from another folder

It needs nothing but the standard library and the installed package. ``tests/test_packaging.py`` uses the
checks of the two files as well.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: What an sdist must hold beside the package, to test it and to build its site.
SOURCES = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "constraints.txt", "pyproject.toml", "docs/conf.py", "examples/digits.py", "tests/conftest.py",
    "tests/smoke.py", "tests/data/v0_1_model.pt", "benchmarks/results/speed.png",
)  # fmt: skip
#: Parts of a path that are made, and belong into neither file.
MADE = {"_build", "outputs", "dist", "build", "__pycache__", ".venv", ".git", ".mypy_cache"}
EXTRAS = {"docs", "examples", "images", "lightning"}


def modules():
    """The package's files, as they are in the repository."""
    files = (path for path in (ROOT / "pyro_diffusion").rglob("*") if path.is_file())
    return {str(f.relative_to(ROOT)) for f in files if "__pycache__" not in f.parts}


def check_wheel(path):
    """Exactly the package, its metadata, and the licence; returns the version."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        about = message_from_bytes(wheel.read(f"{info}/METADATA"))
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert {name for name in names if not name.startswith(info)} == modules()
    assert "pyro_diffusion/py.typed" in names
    assert "pyro_diffusion/__main__.py" in names
    assert licence == (ROOT / "LICENSE").read_text()
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    assert set(about.get_all("Provides-Extra")) >= EXTRAS
    return about["Version"]


def check_sdist(path):
    """The package, its tests, examples and site, and nothing that is made; returns the version."""
    with tarfile.open(path) as sdist:
        full = [member.name for member in sdist.getmembers() if member.isfile()]
    (top,) = {name.split("/")[0] for name in full}
    names = {name.removeprefix(f"{top}/") for name in full}
    missing = {*SOURCES, *modules()} - names
    assert not missing, f"not in the sdist: {sorted(missing)}"
    made = {name for name in names if MADE & set(Path(name).parts)}
    assert not made, f"in the sdist, but made by a command: {sorted(made)[:5]}"
    return top.removeprefix("pyro_diffusion-")


def check_installed(expected):
    """The package comes from where it was installed, as the version that was built, without extras."""
    import pyro_diffusion

    place = Path(pyro_diffusion.__file__).resolve()
    assert ROOT / "pyro_diffusion" not in place.parents, f"imported from the repository: {place}"
    assert pyro_diffusion.__version__ == version("pyro-diffusion") == expected
    assert metadata("pyro-diffusion")["Name"] == "pyro-diffusion"
    for package in ("lightning", "diffusers", "scikit-learn", "sphinx", "pytest"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        raise AssertionError(f"{package} {found} is installed; the wheel needs no extra")


def check_lightning_is_asked_for():
    """Without Lightning its names raise an error that says what to install."""
    try:
        from pyro_diffusion.training import SVIModule
    except ImportError as error:
        assert "pip install 'pyro-diffusion[lightning]'" in str(error), error  # noqa: PT017
    else:
        raise AssertionError(f"{SVIModule} without Lightning")


def check_command():
    """``python -m pyro_diffusion`` passes its own check in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-m", "pyro_diffusion"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(result.stdout, end="")
    assert result.returncode == 0, result.stderr
    assert "passed: " in result.stdout.splitlines()[-1]


def main():
    """Every check of what is in a folder and of what is installed."""
    folder = Path(sys.argv[1]).resolve()
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    built = check_wheel(wheel)
    assert built == check_sdist(sdist)
    check_installed(built)
    check_lightning_is_asked_for()
    check_command()
    print(f"{wheel.name} ({wheel.stat().st_size:,} bytes) works in an empty environment")
    print(f"{sdist.name} ({sdist.stat().st_size:,} bytes) holds what it needs")


if __name__ == "__main__":
    main()
