"""Every example and every benchmark runs, quickly, and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What each script prints, in any case, when run with ``--smoke``.
LISTED = {
    "classify.py": ["images decided", "network rows", "nearest neighbour", "wrong decisions"],
    "diffusion_vs_hvae.py": ["arviz.compare", "log-ratio at x_1", "active units", "diffusion.nc"],
    "digits.py": ["bits/dim", "histogram", "Monte Carlo", "sampling", "bound.nc", "ladder VAE"],
    "eight_schools.py": ["R-hat of log tau", "chain on flow, resampled", "share of the mode"],
    "estimator_variance.py": ["consistency", "matching", "one trajectory", "independent"],
    "gaussian_oracle.py": ["log p(x_0)", "β̃", "closed form"],
    "guidance.py": ["tilted law", "W1", "neither p(x∣c) nor", "guidance.png"],
    "latent_diffusion.py": [
        "jointly",
        "where reliable",
        "cross-entropy at prior.x_0",
        "latents.png",
    ],
    "lecture.py": ["equations hold", "off by", "≠", "exact"],
    "lightning_digits.py": ["bits/dim", "validation", "trajectory.png", "last.ckpt"],
    "inpainting.py": ["log score", "uncorrected guidance", "Monte Carlo of the diffusion model"],
    "inverse_problem.py": ["R-hat", "share of the posterior", "in posterior sds", "as many steps"],
    "noise_scale.py": ["log p(y∣σ)", "posterior mean of σ", "as a share of those without"],
    "poisson_counts.py": ["exact -log p(n)", "paired", "known mean rate", "nominal 0.90"],
    "proportions.py": ["exact log p", "mixture of 30", "paired", "proportions.png"],
    "scale_out.py": ["bits/dim", "Monte Carlo", "sampling", "draws of", "ranks"],
    "simulation_based_inference.py": [
        "bound on log q",
        "KL(exact ‖ q)",
        "coverage",
        "posterior.nc",
    ],
    "two_moons.py": ["entropy", "sequential", "subsampled"],
}


BENCHMARKS = {
    "autoguide.py": ["| mixture | AutoDiffusion |", "| schools | AutoIAFNormal", "best base"],
    "heartbeat.py": ["best", "heartbeats among samples", "log p is -2.3219"],
    "flow.py": ["order", "SVI, weighted", "share right", "s for 1,000 iterations"],
    "fit.py": ["behind", "ahead of the loop", "a step of fit"],
    "honesty.py": ["sd z", "evaluate_bound", "levels", "smc_evidence"],
    "ising.py": ["log p − bound", "ladder VAE", "total variation"],
    "lengths.py": ["variance", "of a full sum", "| inf | any |"],
    "toys.py": ["gap, paired", "8 Gaussians", "moons"],
    "variance.py": ["learned / floor", "stratified", "one a dimension"],
    "samplers.py": ["energy distance", "ancestral, β̃", "bare network calls"],
    "speed.py": ["by hand", "compile_elbo", "network rows", "ancestral", "memory", "diffusers"],
    "sbi.py": ["| two_moons |", "| slcp |", "KL, nats"],
    "smc.py": ["sequential", "importance", "exact", "reliable"],
    "stress.py": ["| 12 | 12 | 0 | 0 | 0 | 0 |", "slowest"],
    "calibration.py": ["truth as model", "predictive", "posterior"],
    "memory_map.py": ["anonymous, MB", "rows/s", "MB more than"],
    "posterior.py": ["uncorrected guidance", "d8_dy2_seed0", "within three errors"],
    "paired.py": ["after / before", "rows are slower"],
    "parity.py": ["kernels of q", "bound by paths", "samples: DDIM", "losses: compiled, bits"],
    "evidence.py": ["network rows alone", "ratio", "peak memory", "netCDF"],
}
SCRIPTS = {"examples": LISTED, "benchmarks": BENCHMARKS}


@pytest.mark.parametrize("folder", SCRIPTS)
def test_every_script_is_listed(folder):
    assert {path.name for path in (ROOT / folder).glob("*.py")} == set(SCRIPTS[folder])


@pytest.mark.parametrize(
    ("folder", "script"), [(f, s) for f, scripts in SCRIPTS.items() for s in sorted(scripts)]
)
def test_script_runs(folder, script, tmp_path, device):
    result = subprocess.run(
        [
            sys.executable, "-W", "error::UserWarning:pyro_diffusion", str(ROOT / folder / script),
            "--smoke", "--device", str(device), "--output", str(tmp_path),
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    for words in SCRIPTS[folder][script]:
        assert words in result.stdout, (words, result.stdout)
    if folder == "benchmarks":
        json.loads((tmp_path / script).with_suffix(".json").read_text())
    if script == "digits.py":
        check_digits_outputs(tmp_path)


def check_digits_outputs(folder):
    """The pictures, the bound and a model that can be loaded without the script."""
    import torch
    import xarray

    for name in ("samples.png", "bound.png", "schedule.png"):
        assert (folder / name).stat().st_size > 5_000
    with xarray.open_dataset(folder / "bound.nc") as dataset:
        assert dataset["transition"].attrs["units"] == "nats per datum"
    state = torch.load(folder / "model.pt", weights_only=True)
    assert any(name.startswith("denoiser.network.") for name in state)
    assert "bits_per_dim" in json.loads((folder / "result.json").read_text())
