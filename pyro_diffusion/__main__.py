r"""What is installed, and whether it works: ``python -m pyro_diffusion``.

It prints versions, devices and the extras that are found. Then it runs a check of about ten seconds; the
first time, the C++ compiler takes some twenty more. Each part of the check compares the package with an
oracle, a number that is computed without it:

- With the exact reverse chain of Gaussian data, or of a mixture, every draw of the bound is
  :math:`\log p(x_0)`.
- Training by ``SVI`` brings the bound closer to :math:`\log p(x_0)`, and never above it.
- ``evaluate_bound`` agrees with :math:`\log p(x_0)` within its own error.
- A loss of ``compile_elbo`` is Pyro's loss under the same seed, if there is a C++ compiler.

The last line states whether the check passed, and the exit status is 0 or 1. ``--no-check`` leaves the check
out.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_diffusion
from pyro_diffusion.bounds import elbo_terms, evaluate_bound
from pyro_diffusion.denoisers import GaussianDenoiser, GaussianMixtureDenoiser, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import AlphaSchedule, LogSNRSchedule
from pyro_diffusion.training import compile_elbo
from pyro_diffusion.training.compilation import cpp_compiler

_NEEDED = ("torch", "pyro-ppl", "numpy", "arviz", "xarray", "matplotlib", "torchdiffeq")
#: A package of each extra.
_EXTRAS = {
    "lightning": "lightning",
    "images": "diffusers",
    "examples": "scikit-learn",
    "docs": "sphinx",
}


class Found(NamedTuple):
    """What one part of the check found."""

    passed: bool
    words: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and run the check.

    Returns:
        The exit status: 0 if every part passed, or was left out, and 1 otherwise.
    """
    parser = argparse.ArgumentParser(
        "python -m pyro_diffusion", description="What is installed, and whether it works."
    )
    parser.add_argument("--no-check", action="store_true", help="print versions only")
    options = parser.parse_args(arguments)
    print(report())
    if options.no_check:
        return 0
    start = time.perf_counter()
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        passed = [_run(name, part) for name, part in _PARTS.items()]
    seconds = time.perf_counter() - start
    if all(passed):
        print(f"passed: pyro_diffusion works here ({seconds:.0f} s)")
        return 0
    failed = ", ".join(name for name, good in zip(_PARTS, passed, strict=True) if not good)
    print(f"failed: pyro_diffusion does not work as it should here. See above: {failed}.")
    return 1


def report() -> str:
    """Versions, extras and devices, a line for each kind."""
    extras = [
        f"{extra} ({_version(package)})"
        if _version(package)
        else f"{extra} (not found: pip install 'pyro-diffusion[{extra}]')"
        for extra, package in _EXTRAS.items()
    ]
    compiler = cpp_compiler() or "none found"
    return "\n".join(
        [
            f"pyro_diffusion {pyro_diffusion.__version__}, Python {platform.python_version()}, "
            f"{platform.platform()}",
            f"needed        {', '.join(f'{name} {_version(name)}' for name in _NEEDED)}",
            f"extras        {', '.join(extras)}",
            f"devices       {', '.join(_devices())}",
            f"C++ compiler  {compiler}",
        ]
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cpu (threads: {torch.get_num_threads()})"]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
    return found + ["mps"] * torch.backends.mps.is_available()


def _run(name: str, part: Callable[[], Found]) -> bool:
    """Run a part of the check and print what it found. An error in it is a failure."""
    pyro.set_rng_seed(0)
    start = time.perf_counter()
    try:
        found = part()
    except Exception as error:  # any error is reported, and the next part runs
        found = Found(False, f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    print(
        f"{'ok    ' if found.passed else 'FAILED'} {seconds:4.1f} s  {name}: {found.words}",
        flush=True,
    )
    return found.passed


# The oracles, written from the formulas and without this package.


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    r""":math:`\log N(x; m, \operatorname{diag}(s^2))`, one number for each row."""
    terms = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return terms.sum(-1)


def log_mixture(x: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    r""":math:`\log \sum_k w_k N(x; m_k, \operatorname{diag}(s_k^2))`, one number for each row."""
    return (weights.log() + log_normal(x[:, None], means, stds)).logsumexp(-1)


_MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
_STD = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)


def _steps(num_timesteps: int = 10) -> AlphaSchedule:
    """A chain whose last state does not depend on the datum, up to rounding, as the identity requires."""
    alpha = torch.linspace(0.99, 0.7, num_timesteps, dtype=torch.float64)
    alpha[-1] = 1e-24
    return AlphaSchedule(alpha)


def gaussian_identity() -> Found:
    """Every draw of the bound is the exact log-density of Gaussian data."""
    x_0 = torch.randn(5, 3, dtype=torch.float64)
    diffusion = DiffusionModel(GaussianDenoiser(_MEAN, _STD, _steps()))
    return _identity(diffusion, x_0, log_normal(x_0, _MEAN, _STD))


def mixture_identity() -> Found:
    """Every draw of the bound is the exact log-density of a mixture."""
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.stack([_MEAN, -_MEAN, 3 * _MEAN])
    x_0 = torch.randn(5, 3, dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(weights, means, _STD.expand(3, 3), _steps())
    return _identity(DiffusionModel(denoiser), x_0, log_mixture(x_0, weights, means, _STD))


def _identity(diffusion: DiffusionModel, x_0: Tensor, log_p: Tensor) -> Found:
    exact = float(log_p.sum())
    draws = [
        -Trace_ELBO().loss(diffusion.model, guide, x_0)
        for guide in (diffusion.guide, diffusion.posterior_guide)
        for _ in range(3)
    ]
    error = max(abs(draw / exact - 1) for draw in draws)
    words = f"log p {exact:.6f} nats, largest relative error of {len(draws)} draws {error:.1e}"
    return Found(error < 1e-9, words)


def training() -> Found:
    """SVI brings the bound closer to the exact log-density, and not above it."""
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.3])
    held_out = mean + std * torch.randn(300, 2)
    log_p = log_normal(held_out, mean, std)
    network = MLP((2,), hidden_size=32, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(20, log_snr_max=6.0), (2,)))
    fast = diffusion.subsampled(4)
    svi = SVI(fast.model, fast.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())

    def gap() -> tuple[float, float]:
        """Mean of log p − bound, and its standard error."""
        difference = log_p - elbo_terms(diffusion, held_out, progress=False).elbo
        return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))

    before, _ = gap()
    for _ in range(200):
        svi.step(mean + std * torch.randn(256, 2))
    after, error = gap()
    entropy = 0.5 * float((2 * math.pi * math.e * std**2).log().sum())
    words = (
        f"entropy {entropy:.3f} nats; log p − bound was {before:.3f}, and is {after:.3f} ± {error:.3f} "
        "after 200 steps"
    )
    return Found(-5 * error < after < before / 2, words)


def estimation() -> Found:
    """The bound of an exact chain is log p within the error that the estimate states."""
    x_0 = _MEAN + _STD * torch.randn(200, 3, dtype=torch.float64)
    schedule = LogSNRSchedule(1000, log_snr_max=14.0, log_snr_min=-14.0)
    diffusion = DiffusionModel(GaussianDenoiser(_MEAN, _STD, schedule))
    bound = evaluate_bound(diffusion, x_0, standard_error=0.05).mean()
    exact = float(log_normal(x_0, _MEAN, _STD).mean())
    words = f"log p {exact:.3f} nats, bound {bound.value:.3f} ± {bound.monte_carlo_error:.3f}"
    return Found(abs(bound.value - exact) < 5 * bound.monte_carlo_error, words)


def compilation() -> Found:
    """The compiled loss is Pyro's under the same seed."""
    if cpp_compiler() is None:
        return Found(True, "left out, because there is no C++ compiler")
    x_0, network = torch.randn(16, 2), MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(1), (2,)))
    compiled = compile_elbo(diffusion.model, diffusion.guide, Trace_ELBO())
    compiled(x_0)
    pyro.set_rng_seed(1)
    loss = compiled(x_0).item()
    pyro.set_rng_seed(1)
    by_pyro = Trace_ELBO().loss(diffusion.model, diffusion.guide, x_0)
    words = f"loss {loss:.4f} nats, by Pyro {by_pyro:.4f}"
    return Found(abs(loss - by_pyro) < 1e-4 * abs(by_pyro), words)


_PARTS: dict[str, Callable[[], Found]] = {
    "exact denoiser, Gaussian data": gaussian_identity,
    "exact denoiser, a mixture": mixture_identity,
    "training by SVI": training,
    "evaluate_bound": estimation,
    "compile_elbo": compilation,
}


if __name__ == "__main__":
    raise SystemExit(main())
