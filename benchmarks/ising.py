r"""Exact samples of the Ising model at its critical point: how far bounds stay below a known log p.

The data are 8 × 8 spins on a torus, p(x) = exp(−β H(x)) / Z with Z from the transfer matrix. Three models of
about 80,000 parameters are fitted by SVI: a diffusion of bits, a Gaussian diffusion that predicts levels, and
a ladder VAE. Both diffusions have the same network of circular convolutions and are trained as continuous
chains. The gap is the mean of log p(x) − bound(x) over held-out rows, datum by datum, at T → ∞, 1,000 and
100. The spread over the rows gives its error, ± (sampling), which includes the error from the draws, ±
(Monte Carlo). Samples, at T = 200, are compared with exact samples by the total variation distance of
histograms of energy and magnetisation.

    python benchmarks/ising.py [--data ising_L8.npz] [--seed 0] [--device cuda] [--smoke]
        [--output benchmarks/results]

The file holds 0/1 configurations, shape (N, 8, 8), under the key ``beta_c``. Without a file as many
configurations are drawn here, row by row, by the transfer matrix.

References:
    Crystal Statistics II (Kaufman, 1949): Z of the finite torus. https://doi.org/10.1103/PhysRev.76.1232
    Variational Diffusion Models (Kingma et al., 2021), section 4.2. https://arxiv.org/abs/2107.00630
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
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_diffusion import (
    BernoulliDiffusion,
    DiffusionModel,
    HierarchicalVAE,
    KLWarmup,
    LadderEncoder,
    LevelLikelihood,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    elbo_terms,
    evaluate_bound,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Model = DiffusionModel | HierarchicalVAE

SIDE, BETA = 8, 0.5 * math.log(1 + math.sqrt(2))
CHANNELS, LADDER_CHANNELS = 44, 34
LATENT_SHAPES = ((4, 8, 8), (8, 4, 4), (16, 2, 2))
LENGTHS = (math.inf, 1000, 100)
SAMPLING_LENGTH = 200
LEARNING_RATE, EMA_DECAY, BATCH = 2e-3, 0.999, 128
NUM_STEPS = {"bits": 4_500, "Gaussian": 4_500, "ladder VAE": 2_000}
WARMUP_SHARE = 0.1  # of the ladder's steps: the warm-up of its KLs
READ_BATCH = 512  # network rows at a time, which fit into a core's cache


def main() -> None:
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    spins, source = load(args)
    log_p = log_probability(spins)
    train, test = spins[: int(0.8 * len(spins))], spins[int(0.9 * len(spins)) :][: args.num_test]
    log_p = log_p[int(0.9 * len(spins)) :][: args.num_test]
    entropy = {"mean": -log_p.mean().item(), "standard_error": standard_error(log_p)}
    print(f"{source}; −log p of {len(test)} held-out rows: {entropy['mean']:.3f} nats\n")
    print(
        "| model | parameters | T | log p − bound, nats | ± (sampling) | ± (Monte Carlo) | "
        "CPU min to fit | to read |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows, models = [], {}
    for name, build in {"bits": bits, "Gaussian": gaussian, "ladder VAE": ladder}.items():
        pyro.set_rng_seed(args.seed)
        models[name], seconds = fit(build().to(args.device), train, args.num_steps[name], args)
        model = models[name]
        for length in LENGTHS if isinstance(model, DiffusionModel) else (None,):
            rows.append({"model": name, "parameters": count(model), "num_timesteps": length})
            rows[-1] |= read(model, length, test, log_p, args) | {"fit_cpu_seconds": seconds}
            print(markdown(rows[-1]), flush=True)
    write(rows, {}, entropy, source, args)
    samples = {name: draw(model, args) for name, model in models.items()}
    distances = compare(samples, spins, args)
    write(rows, distances, entropy, source, args)
    print(f"\nwrote {args.output / 'ising.json'} and ising.png")


# The data, and their exact probabilities.


def load(args: argparse.Namespace) -> tuple[Tensor, str]:
    """Configurations of 0 and 1, float, and their source."""
    if args.data is None:
        return exact_samples(args.num_data).to(args.device), "exact samples drawn here"
    with np.load(args.data) as file:
        spins = torch.from_numpy(file["beta_c"][: args.num_data]).float()
    return spins.to(args.device), f"{args.data.name}, beta_c"


def transfer_powers() -> tuple[Tensor, list[Tensor]]:
    """The rows of a configuration, (256, 8) of ±1, and V¹ … V⁸ of the matrix between rows."""
    rows = 2.0 * (torch.arange(2**SIDE)[:, None] >> torch.arange(SIDE) & 1).double() - 1
    inside = (rows * rows.roll(1, -1)).sum(-1)
    matrix = (BETA * (0.5 * (inside[:, None] + inside) + rows @ rows.T)).exp()
    return rows, [torch.linalg.matrix_power(matrix, k) for k in range(1, SIDE + 1)]


def exact_samples(number: int) -> Tensor:
    """Independent configurations: the first row, then each given the one before it and the first."""
    rows, powers = transfer_powers()
    first = torch.multinomial(powers[-1].diagonal(), number, replacement=True)
    drawn = [first]
    for left in range(SIDE - 1, 0, -1):
        drawn.append(torch.multinomial(powers[0][drawn[-1]] * powers[left - 1][first], 1)[:, 0])
    return ((rows[torch.stack(drawn, 1)] + 1) / 2).float()


def log_probability(spins: Tensor) -> Tensor:
    """−β H − log Z, nats, float64."""
    log_z = transfer_powers()[1][-1].trace().log()
    return -BETA * energy(spins).double() - log_z.to(spins.device)


def energy(spins: Tensor) -> Tensor:
    signs = 2 * spins - 1
    return -(signs * (signs.roll(1, -1) + signs.roll(1, -2))).sum((-1, -2))


def magnetisation(spins: Tensor) -> Tensor:
    return (2 * spins - 1).sum((-1, -2))


# The models.


def bits() -> BernoulliDiffusion:
    schedule = LinearDecaySchedule()
    return BernoulliDiffusion(NeuralBernoulliDenoiser(TorusNetwork(), schedule, (SIDE, SIDE)))


def gaussian() -> DiffusionModel:
    schedule = LogSNRSchedule(log_snr_max=3.5, log_snr_min=-8.5)
    network, prediction = TorusNetwork(num_outputs=2), LevelPrediction(2)
    return DiffusionModel(NeuralDenoiser(network, schedule, (SIDE, SIDE), prediction=prediction))


def ladder() -> HierarchicalVAE:
    """A ladder VAE of three convolutional levels, of 8 × 8, 4 × 4 and 2 × 2 sites."""
    width, (low, middle, high) = LADDER_CHANNELS, (shape[0] for shape in LATENT_SHAPES)
    path = [
        nn.Sequential(nn.Unflatten(1, (1, SIDE)), conv(1, width), nn.SiLU(), conv(width, width)),
        nn.Sequential(nn.SiLU(), conv(width, width, stride=2)),
        nn.Sequential(nn.SiLU(), conv(width, width, stride=2)),
    ]
    heads = [
        Gaussian(nn.SiLU(), nn.Conv2d(width, 2 * channels, 1)) for channels in (low, middle, high)
    ]
    decoder = [
        nn.Sequential(*two_hidden(low, width, 2), ChannelsLast()),
        Gaussian(nn.Upsample(scale_factor=2), *two_hidden(middle, width, 2 * low)),
        Gaussian(nn.Upsample(scale_factor=2), *two_hidden(high, width, 2 * middle)),
    ]
    return HierarchicalVAE(
        (SIDE, SIDE),
        LATENT_SHAPES,
        LevelLikelihood(2),
        encoder=LadderEncoder.from_layers(path, heads),
        decoder=decoder,
    )


class TorusNetwork(nn.Module):
    """A residual network of circular convolutions, conditioned on log-SNR; zero at initialisation."""

    def __init__(self, num_outputs: int = 1, num_blocks: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = conv(1, CHANNELS), conv(CHANNELS, num_outputs)
        self.widen = nn.ModuleList(conv(CHANNELS, CHANNELS) for _ in range(num_blocks))
        self.narrow = nn.ModuleList(conv(CHANNELS, CHANNELS) for _ in range(num_blocks))
        self.condition = nn.Sequential(
            nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 2 * num_blocks * CHANNELS)
        )
        self.register_buffer("frequencies", 2 * math.pi / torch.logspace(0.5, 2, 8))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        angles = log_snr[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        conditions = self.condition(waves)[:, :, None, None].chunk(2 * len(self.widen), 1)
        h = self.enter(x_t[:, None])
        for widen, narrow, gain, shift in zip(
            self.widen, self.narrow, conditions[::2], conditions[1::2], strict=True
        ):
            h = h + narrow(silu((1 + gain) * widen(silu(h)) + shift))
        output = self.leave(silu(h)).movedim(1, -1)
        return output.squeeze(-1) if output.shape[-1] == 1 else output


class Gaussian(nn.Module):
    """Mean and scale of a level of the ladder, two halves of a network's channels."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> dist.Independent:
        mean, raw = self.network(h).chunk(2, 1)
        return dist.Normal(mean, softplus(raw + 0.5413) + 1e-4).to_event(3)  # softplus(0.5413) = 1


class ChannelsLast(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.movedim(1, -1)


def conv(channels: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, 3, stride, padding=1, padding_mode="circular")


def two_hidden(channels: int, width: int, outputs: int) -> tuple[nn.Module, ...]:
    return (
        conv(channels, width), nn.SiLU(), conv(width, width), nn.SiLU(), conv(width, outputs)
    )  # fmt: skip


# Fitting and evaluating.


def fit(
    model: Model, train: Tensor, num_steps: int, args: argparse.Namespace
) -> tuple[Model, float]:
    """Plain SVI; returns the average of the weights, and CPU seconds."""
    start = time.process_time()
    is_diffusion = isinstance(model, DiffusionModel)
    pair = model.continuous() if is_diffusion else model
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optim = pyro.optim.OneCycleLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"betas": (0.9, 0.99)},
            "max_lr": LEARNING_RATE,
            "total_steps": num_steps + 1,
            "pct_start": 0.05,
        }
    )
    svi = SVI(pair.model, pair.guide, optim, TraceMeanField_ELBO())
    for step in range(num_steps):
        batch = moved(train[torch.randint(len(train), (args.batch,), device=train.device)])
        warm = 1.0 if is_diffusion else min(1.0, (step + 1) / (WARMUP_SHARE * num_steps))
        with KLWarmup(warm):
            loss = svi.step(batch, num_data=len(train))
        optim.step()
        average.update_parameters(model)
        if args.verbose and (step + 1) % 500 == 0:
            print(f"step {step + 1}, {loss / len(train):.2f} nats", flush=True)
    return average.module.eval(), time.process_time() - start


def moved(batch: Tensor) -> Tensor:
    """The batch under a symmetry of the torus: shift, rotation, reflection; each row with its own sign."""
    shifts = torch.randint(SIDE, (2,)).tolist()
    batch = torch.rot90(batch.roll(shifts, (-1, -2)), int(torch.randint(4, ())), (-2, -1))
    if torch.rand(()) < 0.5:
        batch = batch.mT
    flip = torch.rand(len(batch), 1, 1, device=batch.device) < 0.5
    return torch.where(flip, 1 - batch, batch).contiguous()


@torch.no_grad()
def read(
    model: Model, length: float | None, test: Tensor, log_p: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """The paired gap, and its two errors."""
    start = time.process_time()
    if length is None:
        reading = elbo_terms(
            model.model, model.guide, test, num_particles=args.ladder_particles, progress=False
        )
        bound = reading.reconstruction - reading.transition.sum(0) - reading.prior
    else:
        reading = evaluate_bound(
            model,
            test,
            standard_error=args.read_error,
            num_timesteps=length,
            batch_size=READ_BATCH,
        )
        bound = reading.elbo
    gap = log_p - bound
    return {
        "gap": gap.mean().item(),
        "standard_error": standard_error(gap),
        "monte_carlo_error": reading.mean().monte_carlo_error,
        "bound": bound.mean().item(),
        "network_rows": getattr(reading, "rows", None),
        "read_cpu_seconds": time.process_time() - start,
    }


def draw(model: Model, args: argparse.Namespace) -> Tensor:
    """Samples, drawn in parts that fit into a core's cache."""
    if isinstance(model, DiffusionModel):
        model = model.with_num_timesteps(args.sampling_length)
    parts = [args.num_samples // args.sample_chunks] * args.sample_chunks
    return torch.cat([model.sample(part) for part in parts])


def compare(
    samples: dict[str, Tensor], spins: Tensor, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Distances of histograms from those of exact samples, and the figure."""
    number = args.num_samples
    exact, others = spins[:-number], {"exact": spins[-number:], **samples}
    distances = {name: {} for name in others}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for ax, statistic in zip(axes, (energy, magnetisation), strict=True):
        reference = histogram(statistic(exact))
        levels = sorted(reference)
        for name, x in others.items():
            found = histogram(statistic(x))
            distances[name][statistic.__name__] = 0.5 * sum(
                abs(found.get(v, 0.0) - reference.get(v, 0.0)) for v in found.keys() | reference
            )
            xs = [v / SIDE**2 for v in levels]
            style = {"color": "black", "lw": 2.5, "alpha": 0.4} if name == "exact" else {"lw": 1}
            ax.plot(xs, [found.get(v, 0.0) for v in levels], label=name, **style)
        ax.set(xlabel=f"{statistic.__name__} per spin", ylabel=f"share of {number:,} samples")
    axes[0].legend(frameon=False)
    aside = args.output / ".ising.png.part"
    fig.savefig(aside, dpi=120, format="png")
    os.replace(aside, args.output / "ising.png")
    print(
        "\n| samples | energy, total variation distance | magnetisation |\n|---|---|---|\n"
        + "\n".join(
            f"| {name} | {d['energy']:.4f} | {d['magnetisation']:.4f} |"
            for name, d in distances.items()
        )
    )
    return distances


def histogram(values: Tensor) -> dict[int, float]:
    levels, counts = values.round().long().unique(return_counts=True)
    return dict(zip(levels.tolist(), (counts / len(values)).tolist(), strict=True))


def standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def count(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())


def markdown(r: dict[str, Any]) -> str:
    length = {None: "", math.inf: "∞"}.get(r["num_timesteps"], str(r["num_timesteps"]))
    return (
        f"| {r['model']} | {r['parameters']:,} | {length} | {r['gap']:.3f} | {r['standard_error']:.3f} | "
        f"{r['monte_carlo_error']:.3f} | {r['fit_cpu_seconds'] / 60:.1f} | {r['read_cpu_seconds'] / 60:.1f} |"
    )


def write(
    rows: list[dict[str, Any]],
    distances: dict[str, dict[str, float]],
    entropy: dict[str, float],
    source: str,
    args: argparse.Namespace,
) -> None:
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "output", "verbose")}
    numbers = {
        "rows": [r | {"num_timesteps": str(r["num_timesteps"])} for r in rows],
        "total_variation": distances,
        "minus_log_p": entropy,
        "data": source,
        "split": "first 80 % train, last 10 % test, the 10 % between unused",
        "beta": BETA,
        "settings": settings,
        "optimiser": f"Adam, one cycle up to {LEARNING_RATE}",
        "ema_decay": EMA_DECAY,
        "trained_with": "continuous(num_timesteps=1); the ladder with KL warm-up",
        "augmentation": "shift, rotation, reflection of a batch, sign of each row",
        "schedules": {"bits": repr(bits().schedule), "Gaussian": repr(gaussian().schedule)},
        "dequantisation": None,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".ising.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "ising.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="an hour's work in seconds")
    parser.add_argument("--verbose", action="store_true", help="print steps")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    full = {
        "num_data": 70_000,
        "num_test": 7_000,
        "num_steps": NUM_STEPS,
        "batch": BATCH,
        "read_error": 0.025,
        "ladder_particles": 20,
        "sampling_length": SAMPLING_LENGTH,
        "num_samples": 2_000,
        "sample_chunks": 10,
    }
    smoke = {
        "num_data": 500,
        "num_test": 50,
        "num_steps": dict.fromkeys(NUM_STEPS, 3),
        "batch": 16,
        "read_error": 1.0,
        "ladder_particles": 2,
        "sampling_length": 5,
        "num_samples": 20,
        "sample_chunks": 1,
    }
    vars(args).update(smoke if args.smoke else full)
    return args


if __name__ == "__main__":
    main()
