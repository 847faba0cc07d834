r"""Quality of samples against the number of steps, and the cost of a step besides the network.

The quality is measured by unbiased energy distances,
:math:`2 E\lVert x - y \rVert - E\lVert x - x' \rVert - E\lVert y - y' \rVert`, which are zero on average for
equal distributions. Their standard error is the error over independent blocks of samples. There are two sets:

- eight Gaussians on a ring, for which the mean is exact, so that the distance is the samplers' own error;
- the 8×8 digits of scikit-learn, in pixel space (levels over 16), under a network trained once with the
  settings of ``examples/digits.py``. The 360 held-out digits are the same for all samplers. For the floor,
  training digits are used instead of samples.

β and β̃ are the chain itself with the two variances. Costs are the shortest of interleaved runs at T = 1000,
64 samples and an MLP of three blocks that predicts the noise, divided by as many bare calls of that network.

    python benchmarks/samplers.py [--seed 0] [--device cuda] [--smoke] [--output benchmarks/results]
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_diffusion import (
    MLP,
    AncestralSampler,
    DataPrediction,
    DDIMSampler,
    DiffusionModel,
    ForwardVariance,
    GaussianMixtureDenoiser,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    ODESampler,
    PosteriorVariance,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS = 17
#: Name, variance of the model, sampler, and how it is drawn.
SAMPLERS = {
    "ancestral, β": (ForwardVariance(), AncestralSampler, "o-", "#9a9a9a"),
    "ancestral, β̃": (PosteriorVariance(), AncestralSampler, "s-", "#4d4d4d"),
    "DDIM": (PosteriorVariance(), DDIMSampler, "^-", "#0072b2"),
    "ODE": (PosteriorVariance(), ODESampler, "D-", "#009e73"),
    "SDE": (PosteriorVariance(), lambda *args: ODESampler(*args, eta=1.0), "v-", "#d55e00"),
}


def main() -> None:
    args = parse_arguments()
    start = time.process_time()
    pyro.set_rng_seed(args.seed)
    train, held_out = (part.to(args.device) for part in load_data(args))
    oracle = ring(args)
    network = fit(train, args)
    results = {
        "mixture": mixture_table(oracle, args),
        "digits": digits_table(network, train, held_out, args),
        "cost": costs(args),
    }
    for name in ("mixture", "digits"):
        report(name, results[name])
    print("\ncost at T = 1000 over the bare network calls\n\n| | " + " | ".join(results["cost"]))
    print("|---" * (1 + len(results["cost"])) + "|")
    print("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in results["cost"].values()) + " |")
    pictures = {
        "samplers.png": draw_curves(results),
        "samplers_digits.png": draw_digits(network, held_out, args),
    }
    write(results, pictures, time.process_time() - start, args)


# models


def ring(args: argparse.Namespace) -> GaussianMixtureDenoiser:
    """Eight Gaussians on a circle, with unit variance in total."""
    angle = torch.arange(8) * torch.pi / 4
    means = 1.4 * torch.stack((angle.cos(), angle.sin()), 1)
    schedule = LogSNRSchedule(1000, log_snr_max=8.0, log_snr_min=-8.0)
    return GaussianMixtureDenoiser(torch.ones(8), means, 0.14, schedule).to(args.device)


class ExactMean(nn.Module):
    """An exact denoiser's estimate as a network's output, so that the variance can be chosen."""

    def __init__(self, denoiser: GaussianMixtureDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        return self.denoiser.x_0_hat(x_t, log_snr.double())


def model(network: nn.Module, prediction: Any, variance: Any, schedule: Any) -> DiffusionModel:
    shape = (2,) if isinstance(network, ExactMean) else (64,)
    denoiser = NeuralDenoiser(network, schedule, shape, prediction=prediction, variance=variance)
    return DiffusionModel(denoiser)


def digits_model(network: nn.Module, variance: Any) -> DiffusionModel:
    schedule = LogSNRSchedule(1000, log_snr_max=4.0, log_snr_min=-8.0)
    return model(network, LevelPrediction(NUM_LEVELS), variance, schedule)


def load_data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    train, held_out = train_test_split(x, test_size=360, random_state=0, stratify=y)
    part = (lambda z: z[:64]) if args.smoke else (lambda z: z)
    return tuple(torch.tensor(part(z), dtype=torch.float32) for z in (train, held_out))


def fit(train: Tensor, args: argparse.Namespace) -> nn.Module:
    """The example's network for levels by plain SVI; returns the average of the weights."""
    network = MLP((64,), num_blocks=3, dropout=0.4, num_outputs=NUM_LEVELS)
    diffusion = digits_model(network, PosteriorVariance()).to(args.device)
    settings = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 2.0}
    optim = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.AdamW, "optim_args": settings, "T_max": args.num_epochs}
    )
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, optim, TraceMeanField_ELBO())
    average = AveragedModel(diffusion, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    for _ in range(args.num_epochs):
        for batch in train[torch.randperm(len(train))].split(256):
            svi.step(batch, num_data=len(train))
            average.update_parameters(diffusion)
        optim.step()
    return average.module.eval().denoiser.network


# distances


def energy_distances(blocks: Tensor, others: Tensor) -> list[float]:
    """Unbiased energy distances of blocks of samples ``(K, n, D)`` to ``(K, m, D)``, or ``(1, m, D)``."""
    between = torch.cdist(blocks, others.expand(len(blocks), -1, -1)).mean((1, 2))
    within = [
        torch.cdist(x, x).sum((1, 2)) / (x.shape[1] * (x.shape[1] - 1)) for x in (blocks, others)
    ]
    return (2 * between - within[0] - within[1]).tolist()


def mean_and_error(values: list[float]) -> dict[str, float]:
    values = torch.tensor(values, dtype=torch.float64)
    return {
        "value": values.mean().item(),
        "standard_error": (values.std() / len(values) ** 0.5).item(),
    }


def table(
    build: Callable[[Any], DiffusionModel],
    distance: Callable[[Tensor], list[float]],
    count: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each sampler and number of steps."""
    rows = []
    for name, (variance, sampler, *_) in SAMPLERS.items():
        for steps in args.steps:
            x_0 = sampler(build(variance), steps)(count, progress=False)
            rows.append({"sampler": name, "steps": steps} | mean_and_error(distance(x_0)))
    return rows


def mixture_table(oracle: GaussianMixtureDenoiser, args: argparse.Namespace) -> dict[str, Any]:
    count, num_blocks = args.mixture_samples, args.num_blocks
    draw = lambda: oracle.data_distribution.sample((count,)).reshape(num_blocks, -1, 2)  # noqa: E731
    exact = draw()
    distance = lambda x: energy_distances(x.reshape(num_blocks, -1, 2), exact)  # noqa: E731
    build = lambda variance: model(  # noqa: E731
        ExactMean(oracle), DataPrediction(), variance, oracle.schedule
    )
    rows = table(build, distance, count, args)
    return {"rows": rows, "floor": mean_and_error(energy_distances(draw(), exact))}


def digits_table(
    network: nn.Module, train: Tensor, held_out: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    blocks = lambda x: x[: len(x) // args.num_blocks * args.num_blocks].reshape(  # noqa: E731
        args.num_blocks, -1, 64
    )
    distance = lambda x: energy_distances(blocks(x) / 16, held_out[None] / 16)  # noqa: E731
    build = lambda variance: digits_model(network, variance)  # noqa: E731
    rows = table(build, distance, args.digit_samples, args)
    return {"rows": rows, "floor": mean_and_error(distance(train))}


def costs(args: argparse.Namespace) -> dict[str, float]:
    """Shortest time of interleaved runs, divided by that of as many bare network calls."""
    network = MLP((64,), num_blocks=3)
    schedule = LogSNRSchedule(args.cost_steps)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, (64,))).to(args.device).eval()
    runs = {
        "bare": lambda: bare(network, args),
        "program": lambda: diffusion.sample(64),
        "AncestralSampler": lambda sampler=AncestralSampler(diffusion): sampler(64, progress=False),
        "ODESampler": lambda sampler=ODESampler(diffusion): sampler(64, progress=False),
    }
    if not args.smoke:
        compiled = AncestralSampler(diffusion)
        compiled.compile()
        runs["AncestralSampler, compiled"] = lambda: compiled(64, progress=False)
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _ in range(args.cost_runs):
        for name, run in runs.items():
            begin = time.perf_counter()
            run().sum().item()
            seconds[name].append(time.perf_counter() - begin)
    return {name: min(s) / min(seconds["bare"]) for name, s in seconds.items() if name != "bare"}


@torch.no_grad()
def bare(network: nn.Module, args: argparse.Namespace) -> Tensor:
    x_t, log_snr = torch.randn(64, 64, device=args.device), torch.zeros(64, device=args.device)
    for _ in range(args.cost_steps):
        output = network(x_t, log_snr)
    return output


# tables and figures


def report(name: str, result: dict[str, Any]) -> None:
    steps = list(dict.fromkeys(row["steps"] for row in result["rows"]))
    show = lambda e: f"{1e3 * e['value']:.2f} ± {1e3 * e['standard_error']:.2f}"  # noqa: E731
    print(f"\n{name}: energy distance × 1000; floor {show(result['floor'])}\n")
    print(
        "| sampler | "
        + " | ".join(f"{n} steps" for n in steps)
        + " |\n"
        + "|---" * (1 + len(steps))
        + "|"
    )
    for sampler in SAMPLERS:
        cells = [show(row) for row in result["rows"] if row["sampler"] == sampler]
        print(f"| {sampler} | " + " | ".join(cells) + " |")


def draw_curves(results: dict[str, Any]) -> plt.Figure:
    """Energy distance against the number of steps; linear within the floor's own error, then logarithmic."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    titles = {"mixture": "8 Gaussians, exact mean", "digits": "8×8 digits, trained network"}
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        rows, floor = results[name]["rows"], results[name]["floor"]
        level = max(0.0, floor["value"]) + 2 * floor["standard_error"]
        for i, (sampler, (_, _, style, colour)) in enumerate(SAMPLERS.items()):
            line = [row for row in rows if row["sampler"] == sampler]
            x = [row["steps"] * 1.05 ** (i - 2) for row in line]  # side by side, not on top
            y, error = ([scale * row[key] for row in line] for key, scale in _SHOWN)
            ax.errorbar(
                x, y, error, fmt=style, color=colour, ms=4, lw=1.3, elinewidth=0.8, label=sampler
            )
        ax.axhspan(-level, level, color="0.93", zorder=0, label="floor ± 2 s.e.")
        ax.axhline(0, color="0.75", lw=0.8, zorder=0)
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=level, linscale=0.8)
        decades = [
            10.0**k for k in range(-4, 1) if level < 10.0**k < 2 * max(r["value"] for r in rows)
        ]
        ax.set_yticks([0.0, *decades], ["0", *(f"{d:g}" for d in decades)])
        ax.set(xlabel="steps", title=title, ylim=(-4 * level, None))
        ax.set_xticks(steps := [row["steps"] for row in line], [f"{n:,}" for n in steps])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("energy distance")
    axes[1].legend(frameon=False, fontsize=9)
    return fig


_SHOWN = (("value", 1), ("standard_error", 2))


def draw_digits(network: nn.Module, held_out: Tensor, args: argparse.Namespace) -> plt.Figure:
    """Samples from the same x_T: a row for each sampler, a column for each number of steps."""
    rows, columns = 2, 5
    steps = [n for n in args.steps if n != 100]
    fig, axes = plt.subplots(
        len(SAMPLERS) + 1, len(steps), figsize=(1.9 * len(steps), 0.85 * (len(SAMPLERS) + 1)),
        layout="constrained",
    )  # fmt: skip
    x_T = digits_model(network, PosteriorVariance()).prior().sample((rows * columns,))
    for (name, (variance, sampler, *_)), line in zip(SAMPLERS.items(), axes, strict=False):
        for count, ax in zip(steps, line, strict=True):
            pyro.set_rng_seed(args.seed)
            x_0 = sampler(digits_model(network, variance), count)(len(x_T), x_T, progress=False)
            show_digits(ax, x_0, rows)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for i, ax in enumerate(axes[-1]):
        show_digits(ax, held_out[10 * i : 10 * (i + 1)], rows)
    axes[-1][0].set_ylabel("held-out data", rotation=0, ha="right", va="center")
    for count, ax in zip(steps, axes[0], strict=True):
        ax.set_title(f"{count} steps", fontsize=10)
    return fig


def show_digits(ax: plt.Axes, x: Tensor, rows: int) -> None:
    tiles = nn.functional.pad(x.cpu().reshape(rows, -1, 8, 8), (1, 1, 1, 1))
    image = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    ax.imshow(image, cmap="gray_r", vmin=0, vmax=16)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def write(
    results: dict[str, Any],
    pictures: dict[str, plt.Figure],
    cpu_seconds: float,
    args: argparse.Namespace,
) -> None:
    numbers = results | {
        "num_epochs": args.num_epochs,
        "split": "1,437 to train, 360 held out, by class",
        "log_snr": {"mixture": [8.0, -8.0], "digits": [4.0, -8.0]},
        "timesteps": "evenly spaced of 1000, both ends included",
        "samples": {"mixture": args.mixture_samples, "digits": args.digit_samples},
        "blocks": args.num_blocks,
        "cost_steps": args.cost_steps,
        "cost_runs": args.cost_runs,
        "cost_batch": 64,
        "ema_decay": 0.998,
        "cpu_seconds": cpu_seconds,
        "seed": args.seed,
        "smoke": args.smoke,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, fig in pictures.items():
        aside = args.output / f".{name}.part"
        fig.savefig(aside, dpi=130, format="png")
        os.replace(aside, args.output / name)
    aside = args.output / ".samplers.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "samplers.json")
    print(f"\nwrote {args.output / 'samplers.json'}, {' and '.join(pictures)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_epochs, args.steps, args.num_blocks = (
        (2, (5, 10), 4) if args.smoke else (400, (5, 10, 20, 50, 100, 1000), 10)
    )
    args.mixture_samples, args.digit_samples = (400, 40) if args.smoke else (20_000, 1000)
    args.cost_steps, args.cost_runs = (10, 1) if args.smoke else (1000, 5)
    return args


if __name__ == "__main__":
    main()
