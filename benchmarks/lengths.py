r"""The bound of one network at every length of the chain, T = 10 … 10,000 and T → ∞, by reverse variance.

The network is trained once, on the 8×8 digits of scikit-learn at T = 100. It predicts levels, as in
``examples/digits.py``, and has one more output for the learned variance. Then the bound of the same weights
is computed on other grids of the same curve by ``with_num_timesteps`` and ``evaluate_bound``. The second
model is the exact mean of a Gaussian of 16 dimensions, standard deviation one half, with the same choice of
variances. Its bound rises with T under β (``ForwardVariance``), does not rise under β̃, and equals log p
under the optimal variance. "Rows" are the network rows that the requested Monte Carlo error needs; a full sum
needs N·T.

    python benchmarks/lengths.py [--seed 0] [--device cuda] [--smoke] [--output benchmarks/results]
"""

import argparse
import json
import math
import os
import platform
import time
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
    DataPrediction,
    DiffusionModel,
    ForwardVariance,
    LearnedVariance,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    OptimalVariance,
    PosteriorVariance,
    evaluate_bound,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS = 17
STYLES = {"β": "o-", "β̃": "s--", "learned": "^-.", "optimal": "d:"}


def main() -> None:
    args = parse_arguments()
    start = time.process_time()
    pyro.set_rng_seed(args.seed)
    train, held_out = (part.to(args.device) for part in load_data(args))
    fitted = fit(train, args)
    digits = with_variances(fitted, train)
    bits = math.log(2) * 64
    tables = {
        "digits": table(digits, held_out, args.bits_error * bits, args),
        "Gaussian": table(*oracle(args), 16 * args.oracle_error, args),
    }
    for name, rows in tables.items():
        unit, per = ("bits/dim", bits) if name == "digits" else ("nats/dim", 16)
        print(f"\n{name}: −bound, {unit} ± Monte Carlo ± sampling; network rows\n")
        print("| T | variance | −bound | rows | of a full sum |\n|---|---|---|---|---|")
        for r in rows:
            share = "" if r["num_timesteps"] == "inf" else f"{r['rows'] / r['full_rows']:.3g}"
            print(
                f"| {r['num_timesteps']} | {r['variance']} | {-r['bound'] / per:.4f} ± "
                f"{r['monte_carlo_error'] / per:.2g} ± {r['sampling_error'] / per:.2g} | "
                f"{r['rows']:,} | {share} |"
            )
    write(tables, time.process_time() - start, args)


def load_data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    train, held_out = train_test_split(x, test_size=360, random_state=0, stratify=y)
    part = (lambda z: z[:64]) if args.smoke else (lambda z: z)
    return tuple(torch.tensor(part(z), dtype=torch.float32) for z in (train, held_out))


def fit(train: Tensor, args: argparse.Namespace) -> DiffusionModel:
    """Plain SVI at T = 100 with a learned variance; returns the average of the weights."""
    network = MLP((64,), num_blocks=3, dropout=0.4, num_outputs=NUM_LEVELS + 1)
    schedule = LogSNRSchedule(100, log_snr_max=4.0, log_snr_min=-8.0)
    denoiser = NeuralDenoiser(
        network, schedule, (64,), prediction=LevelPrediction(NUM_LEVELS), variance=LearnedVariance()
    )
    diffusion = DiffusionModel(denoiser).to(args.device)
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
    return average.module.eval()


class MeanOnly(nn.Module):
    """A network's outputs without the last one, which only the learned variance uses."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        return self.network(x_t, log_snr)[..., :-1]


def with_variances(fitted: DiffusionModel, train: Tensor) -> dict[str, DiffusionModel]:
    """The same network under every variance."""
    network = MeanOnly(fitted.denoiser.network)

    def model(variance: Any) -> DiffusionModel:
        denoiser = NeuralDenoiser(
            network,
            fitted.schedule,
            (64,),
            prediction=fitted.denoiser.prediction,
            variance=variance,
        )
        return DiffusionModel(denoiser)

    optimal = OptimalVariance.from_data(fitted, train)
    models = {name: model(v) for name, v in (("β", ForwardVariance()), ("β̃", PosteriorVariance()))}
    return models | {"learned": fitted, "optimal": model(optimal)}


class ExactMean(nn.Module):
    """The estimate of a Gaussian datum of standard deviation one half."""

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        signal, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        return (signal * 0.25 / (signal**2 * 0.25 + noise))[:, None] * x_t


def oracle(args: argparse.Namespace) -> tuple[dict[str, DiffusionModel], Tensor]:
    schedule = LogSNRSchedule(100, log_snr_max=8.0, log_snr_min=-10.0)
    x_0 = 0.5 * torch.randn(200, 16, dtype=torch.float64)

    def model(variance: Any) -> DiffusionModel:
        denoiser = NeuralDenoiser(
            ExactMean().double(), schedule, (16,), prediction=DataPrediction(), variance=variance
        )
        return DiffusionModel(denoiser).to(args.device)

    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        squares = 0.25 / (1 + 0.25 * torch.linspace(-12, 10, 400).exp())
        optimal = OptimalVariance(torch.linspace(-12, 10, 400), squares)
        models = {"β": model(ForwardVariance()), "β̃": model(PosteriorVariance())}
        models["optimal"] = model(optimal)
    return models, x_0.to(args.device)


def table(
    models: dict[str, DiffusionModel], x_0: Tensor, standard_error: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for length in args.lengths:
        for name, diffusion in models.items():
            if length == math.inf and name != "β":
                continue  # all variances have the same limit
            result = evaluate_bound(
                diffusion, x_0, standard_error=standard_error, num_timesteps=length
            )
            mean = result.mean()
            rows.append(
                {
                    "num_timesteps": str(length),
                    "variance": "any" if length == math.inf else name,
                    "bound": mean.value,
                    "monte_carlo_error": mean.monte_carlo_error,
                    "sampling_error": mean.sampling_error,
                    "rows": result.rows,
                    "full_rows": None if length == math.inf else result.full_rows,
                    "estimator": result.estimator,
                }
            )
    return rows


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """−bound against T, a line for each variance, with the limit."""
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        per = 64 * math.log(2) if name == "digits" else 16
        for variance, style in STYLES.items():
            line = [r for r in rows if r["variance"] == variance]
            if line:
                x, y, e = (
                    [int(r["num_timesteps"]) for r in line],
                    [-r["bound"] / per for r in line],
                    [2 * r["monte_carlo_error"] / per for r in line],
                )
                ax.errorbar(x, y, e, fmt=style, ms=4, label=variance)
        limit = -rows[-1]["bound"] / per
        ax.axhline(limit, color="0.4", lw=1, label="T → ∞")
        # The large loss of β̃ at few steps would hide the other curves.
        top = max(-r["bound"] / per for r in rows if r["variance"] == "β")
        low = min(-r["bound"] / per for r in rows)
        margin = 0.1 * (top - low)
        ax.set(xscale="log", xlabel="T", title=name, ylim=(low - margin, top + margin))
        ax.set_ylabel("−bound, " + ("bits/dim" if name == "digits" else "nats/dim"))
        ax.legend(frameon=False)
    aside = path.with_name(f".{path.name}.part")
    fig.savefig(aside, dpi=120, format="png")
    os.replace(aside, path)


def write(tables: dict[str, Any], cpu_seconds: float, args: argparse.Namespace) -> None:
    numbers = tables | {
        "trained_at": 100,
        "num_epochs": args.num_epochs,
        "split": "1,437 to train, 360 held out, by class",
        "log_snr": {"digits": [4.0, -8.0], "Gaussian": [8.0, -10.0]},
        "dequantisation": None,
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
    draw(tables, args.output / "lengths.png")
    aside = args.output / ".lengths.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "lengths.json")
    print(f"\nwrote {args.output / 'lengths.json'} and lengths.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_epochs, args.bits_error, args.oracle_error, args.lengths = (
        (2, 0.1, 0.1, (2, 10, math.inf))
        if args.smoke
        else (300, 0.005, 2e-3, (10, 30, 100, 300, 1000, 3000, 10_000, math.inf))
    )
    return args


if __name__ == "__main__":
    main()
