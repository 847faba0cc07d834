"""``python -m pyro_diffusion``: the report, the check, and that the check can fail."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import pyro_diffusion
from pyro_diffusion import __main__ as command

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
PARTS = dict(command._PARTS)


def test_the_command_passes(tmp_path):
    """In a process of its own, where nothing is imported and the folder is another one."""
    package = str(Path(pyro_diffusion.__file__).parent.parent)
    code = (
        f"import runpy, sys; sys.path.insert(0, {package!r}); sys.argv = ['pyro_diffusion']\n"
        "runpy.run_module('pyro_diffusion', run_name='__main__', alter_sys=True)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert lines[0].startswith(f"pyro_diffusion {pyro_diffusion.__version__}, Python 3.")
    assert f"torch {torch.__version__}" in result.stdout
    assert lines[-1].startswith("passed: pyro_diffusion works here (")
    assert [line.split()[0] for line in lines[-1 - len(PARTS) : -1]] == ["ok"] * len(PARTS)


def test_no_check_prints_versions_only(capsys):
    assert command.main(["--no-check"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*command._NEEDED, *command._EXTRAS, "cpu"))
    assert "passed" not in printed


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(command, "_version", lambda package: None)
    assert command.main(["--no-check"]) == 0
    assert (
        "lightning (not found: pip install 'pyro-diffusion[lightning]')" in capsys.readouterr().out
    )


def test_the_extras_are_those_of_the_project():
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    assert set(command._EXTRAS) == set(extras) - {"test", "dev"}
    for extra, package in command._EXTRAS.items():
        assert any(requirement.startswith(package) for requirement in extras[extra])


def shifted(function, by):
    return lambda *args: function(*args) + by


def no_step(self, *args, **kwargs):
    return 0.0


class WrongLoss:
    def __init__(self, model, guide, elbo):
        self.loss = lambda x_0: torch.as_tensor(elbo.loss(model, guide, x_0))

    def __call__(self, x_0):
        return 1.01 * self.loss(x_0)


#: For each part something that is broken: the oracle, or what is compared with it.
BROKEN = {
    "exact denoiser, Gaussian data": ("log_normal", shifted(command.log_normal, 1e-6)),
    "exact denoiser, a mixture": ("log_mixture", shifted(command.log_mixture, 1e-6)),
    "training by SVI": ("SVI.step", no_step),
    "evaluate_bound": ("log_normal", shifted(command.log_normal, 0.3)),
    "compile_elbo": ("compile_elbo", WrongLoss),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_broken_part_fails_the_check(name, monkeypatch, capsys):
    where, broken = BROKEN[name]
    monkeypatch.setattr(f"pyro_diffusion.__main__.{where}", broken)
    monkeypatch.setattr(command, "_PARTS", {name: PARTS[name]})
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert command.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("FAILED")
    assert lines[-1] == (
        f"failed: pyro_diffusion does not work as it should here. See above: {name}."
    )


def test_an_error_in_a_part_is_a_failure_that_is_printed(monkeypatch, capsys):
    def stops():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(
        command, "_PARTS", {"a part": stops, "another": lambda: command.Found(True, "")}
    )
    assert command.main([]) == 1
    assert "a part: RuntimeError: no such thing" in capsys.readouterr().out


def test_no_compiler_is_no_failure(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = command.compilation()
    assert found.passed
    assert "no C++ compiler" in found.words
    assert "none found" in command.report()


def test_the_check_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(command, "_PARTS", {"one": command.gaussian_identity})
    before = torch.get_rng_state()
    assert command.main([]) == 0
    assert torch.equal(torch.get_rng_state(), before)
