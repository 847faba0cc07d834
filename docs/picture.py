"""Draw the picture of README and of the first page: a bound by timestep beside samples.

    python examples/digits.py
    python docs/picture.py [--run outputs/digits]

writes ``docs/picture.png`` from what the first command wrote, ``bound.nc`` and ``model.pt``.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import xarray

from pyro_diffusion import LogSNRSchedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent / "picture.png"
SIDE = 8  # samples in a row
BLUE = "#0072b2"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("outputs/digits"))
    run = parser.parse_args().run
    with xarray.open_dataset(run / "bound.nc") as bound:
        figure, axes = plt.subplots(
            1, 2, figsize=(10, 4), width_ratios=(1.35, 1), layout="constrained"
        )
        draw_bound(bound.load(), axes[0])
    draw_samples(run / "model.pt", axes[1])
    figure.savefig(PICTURE, dpi=110)


def draw_bound(bound, ax):
    """The KL of every timestep with its Monte Carlo error, and the bits per dimension as the title."""
    transition, t = bound["transition"], bound["timestep"].to_numpy()
    mean = transition.mean("data").to_numpy()
    error = np.sqrt((bound["transition_standard_error"] ** 2).sum("data")) / bound.sizes["data"]
    ax.fill_between(t, mean - error, mean + error, color=BLUE, alpha=0.35, lw=0)
    ax.fill_between(t, 0, mean, color=BLUE, alpha=0.12, lw=0)
    ax.plot(t, mean, color=BLUE, lw=1.2)
    ends = {"reconstruction": "log-likelihood of the digit", "prior": "KL at the end of the chain"}
    lines = [f"{mean.sum():.1f} nats: the area below the curve"] + [
        f"{abs(bound[name].mean().item()):.3g} nats: {words}" for name, words in ends.items()
    ]
    lines[1] = lines[1].replace("nats: log", "nats: −log")
    ax.text(
        0.97, 0.94, "\n".join(lines), transform=ax.transAxes, ha="right", va="top", linespacing=1.6
    )
    bits = bound.attrs
    ax.set_title(
        f"{bits['bits_per_dim']:.3f} ± {bits['bits_per_dim_monte_carlo_error']:.3f} (Monte Carlo) "
        f"± {bits['bits_per_dim_sampling_error']:.3f} (sampling) bits per pixel"
    )
    ax.set(
        xlabel="timestep t",
        ylabel="KL at $x_t$, nats per image",
        xlim=(0, t[-1] + 1),
        ylim=(0, None),
    )
    ax.spines[["top", "right"]].set_visible(False)


def draw_samples(path, ax):
    """Samples of the fitted model, side by side in one image."""
    sys.path.insert(0, str(PICTURE.parents[1] / "examples"))
    import digits

    diffusion = digits.build("levels", LogSNRSchedule(1000, log_snr_max=4.0, log_snr_min=-8.0))
    diffusion.load(path)
    pyro.set_rng_seed(0)
    samples = diffusion.eval().sample(SIDE**2).reshape(SIDE, SIDE, 8, 8)
    framed = np.pad(samples.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    ax.imshow(framed.transpose(0, 2, 1, 3).reshape(10 * SIDE, 10 * SIDE), cmap="gray_r")
    ax.set(title=f"{SIDE**2} samples", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
