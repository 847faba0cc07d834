r"""``fit`` with its defaults against settings by hand, against a loop by hand, and its cost a step.

*Defaults.* On six data sets a model is fitted with the defaults of ``fit`` and of ``MLP``, and with five
settings chosen by hand: learning rates, widths and dropout. All have the same seconds. The bound of test data
is read with the same noise for all, so that "behind" is a paired difference by datum, divided by the number
of dimensions: how far the defaults are behind the best of the five. The aim is 0.02 nats per dimension, or
two paired errors.

*By hand.* The loop of README, ``SVI`` with Adam, and ``fit`` on the same seconds.

*Speed.* A step of ``fit``, data, averages and checks included, against a step of an eager loop without Pyro,
for a network of 165 thousand parameters and batches of 128.

    python benchmarks/fit.py [--only speed hand defaults] [--seconds 40] [--seed 0] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from ising import exact_samples
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from speed import SmallNetwork, by_hand, processor

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LevelPrediction,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    PosteriorVariance,
    Recipe,
    Standardize,
    fit,
)
from pyro_diffusion.training.held_out import HeldOut, Mean

BY_HAND = {
    "learning rate 5e-4": ({}, Recipe(learning_rate=5e-4)),
    "learning rate 5e-3": ({}, Recipe(learning_rate=5e-3)),
    "width 128": ({"hidden_size": 128}, Recipe()),
    "width 512": ({"hidden_size": 512}, Recipe()),
    "dropout 0.2": ({"dropout": 0.2}, Recipe()),
}
DEFAULTS = {"defaults": ({}, Recipe())}


def main():
    args = parse_arguments()
    warnings.filterwarnings("ignore", message=".*overfits.*")
    parts = {"speed": speed, "hand": hand, "defaults": defaults}
    numbers = {name: parts[name](args) for name in parts if name in args.only}
    write(numbers, args)


# The data and their models.


class Task(NamedTuple):
    """Data, and a model for them with a network of some settings."""

    x_0: torch.Tensor
    model: object

    def parts(self):
        """Data to fit, a tenth of which ``fit`` holds out, and a fifth of all for the test."""
        generator = torch.Generator().manual_seed(0)
        x_0 = self.x_0[torch.randperm(len(self.x_0), generator=generator)]
        first = min(len(x_0) // 5, 1000)
        return x_0[first:], x_0[:first]


def reals(x_0):
    """A model of real numbers, standardised."""

    def model(**network):
        shape = tuple(x_0.shape[1:])
        denoiser = NeuralDenoiser(MLP(shape, **network), LogSNRSchedule(1000), shape)
        return DiffusionModel(denoiser, transform=Standardize.from_data(x_0))

    return Task(x_0, model)


def ring():
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(2500)
    return reals(torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(2500, 2))


def digits():
    x_0 = torch.tensor(load_digits().data, dtype=torch.float32).reshape(-1, 8, 8)

    def model(**network):
        denoiser = NeuralDenoiser(
            MLP((8, 8), num_outputs=17, **network), LogSNRSchedule(1000, log_snr_max=4.0), (8, 8),
            prediction=LevelPrediction(17), variance=PosteriorVariance(),
        )  # fmt: skip
        return DiffusionModel(denoiser)

    return Task(x_0, model)


def wine():
    return reals(torch.tensor(load_wine().data, dtype=torch.float32))


def breast_cancer():
    return reals(torch.tensor(load_breast_cancer().data, dtype=torch.float32))


def bits(x_0):
    def model(**network):
        shape = tuple(x_0.shape[1:])
        return DiffusionModel(
            NeuralBernoulliDenoiser(MLP(shape, **network), LogSNRSchedule(1000), shape)
        )

    return Task(x_0, model)


def ising():
    torch.manual_seed(0)
    return bits(exact_samples(6000))


def disabilities():
    """Sixteen answers of 6,000 people in five latent classes, as in a long-term care survey."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(5, 16, generator=generator) ** 2
    classes = torch.randint(5, (6000,), generator=generator)
    return bits(torch.bernoulli(chances[classes], generator=generator))


TASKS = {
    "ring": ring,
    "digits": digits,
    "wine": wine,
    "breast cancer": breast_cancer,
    "Ising 8×8": ising,
    "binary table": disabilities,
}


# Defaults against settings by hand.


def defaults(args):
    """How far the defaults are behind the best of the settings by hand."""
    print("| data | defaults, nats | best by hand | behind, nats per dimension | within the aim |")
    print("|---|---|---|---|---|", flush=True)
    rows = []
    for name in args.tasks:
        task = TASKS[name]()
        train, test = task.parts()
        settings = DEFAULTS | {name: BY_HAND[name] for name in args.settings}
        bounds, runs = {}, {}
        for setting, (network, recipe) in settings.items():
            torch.manual_seed(args.seed)
            model = task.model(**network)
            result = fit(
                model,
                train,
                max_seconds=args.seconds,
                seed=args.seed,
                recipe=recipe,
                progress=False,
            )
            bounds[setting] = read(model, test, args)
            runs[setting] = {"steps": result.num_steps, "ended": result.ended}
        rows.append(line_of(name, bounds, runs, test[0].numel()))
        print(markdown(rows[-1]), flush=True)
    return rows


def line_of(name, bounds, runs, dimension):
    """The defaults beside the best of the others."""
    best = max(set(bounds) - set(DEFAULTS), key=lambda setting: float(bounds[setting].mean()))
    behind = Mean.of(bounds[best] - bounds["defaults"])
    return {
        "data": name,
        "dimension": dimension,
        "bounds": {setting: Mean.of(bound)._asdict() for setting, bound in bounds.items()},
        "runs": runs,
        "best_by_hand": best,
        "behind_per_dim": behind.value / dimension,
        "error_per_dim": behind.error / dimension,
        "within": behind.value <= max(0.02 * dimension, 2 * behind.error),
    }


def markdown(line):
    ours, best = line["bounds"]["defaults"], line["bounds"][line["best_by_hand"]]
    return (
        f"| {line['data']} | {ours['value']:.3f} ± {ours['error']:.3f} | {best['value']:.3f} "
        f"({line['best_by_hand']}) | {line['behind_per_dim']:.4f} ± {line['error_per_dim']:.4f} | "
        f"{'yes' if line['within'] else 'no'} |"
    )


def read(model, test, args):
    """The bound of every test datum, with the same noise for every model."""
    held_out = HeldOut(model, {"x_0": test}, 1024, model.device)
    return torch.stack([held_out.read(seed) for seed in range(1, 1 + args.readings)]).mean(0)


# The loop by hand.


def hand(args):
    """README's loop and ``fit`` on the same seconds; paired by datum."""
    rows = []
    for name in args.tasks[:2]:
        task = TASKS[name]()
        train, test = task.parts()
        torch.manual_seed(args.seed)
        ours, theirs = task.model(), task.model()
        fit(ours, train, max_seconds=args.seconds, seed=args.seed, progress=False)
        steps = loop_by_hand(theirs, train, args.seconds)
        ahead = Mean.of(read(ours, test, args) - read(theirs, test, args))
        rows.append({"data": name, "ahead": ahead._asdict(), "steps_by_hand": steps})
        print(f"{name}: fit is ahead of the loop by {ahead.value:.3f} ± {ahead.error:.3f} nats")
    return rows


def loop_by_hand(model, x_0, seconds):
    """Plain SVI with Adam, as in README; the number of steps."""
    pair, start, steps = model.subsampled(), time.perf_counter(), 0
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 3e-3}), TraceMeanField_ELBO())
    while time.perf_counter() - start < seconds:
        svi.step(x_0[torch.randint(len(x_0), (256,))], num_data=len(x_0))
        steps += 1
    return steps


# Speed.


def speed(args):
    """Seconds a step of ``fit`` over those of an eager loop by hand, in turn."""
    x_0, ratios, ours, theirs = torch.randn(5000, 64), [], [], []
    recipe = Recipe(batch_size=128, compiled=not args.smoke)
    for _ in range(args.repeats):
        model = DiffusionModel(NeuralDenoiser(SmallNetwork(), LogSNRSchedule(1000), (64,)))
        theirs.append(eager(model, x_0, args.steps))
        result = fit(model, x_0, max_steps=2 * args.steps, recipe=recipe, progress=False)
        seconds = result.history["seconds"]
        late = seconds.sel(step=slice(args.steps, None))
        count = int(late["step"][-1] - late["step"][0])
        ours.append(float(late[-1] - late[0]) / count)
        ratios.append(ours[-1] / theirs[-1])
    line = {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "milliseconds": 1e3 * statistics.median(ours),
        "milliseconds_by_hand": 1e3 * statistics.median(theirs),
        "threads": torch.get_num_threads(),
        "target": 1.1,
    }
    print(
        f"a step of fit / a step by hand: {line['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{line['milliseconds']:.2f} ms"
    )
    return line


def eager(model, x_0, steps):
    """Seconds a step of a loop without Pyro: shuffled batches, the loss, Adam."""
    loss = by_hand(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    start, taken = time.perf_counter(), 0
    while taken < steps:
        for rows in torch.randperm(len(x_0)).split(128):
            optimizer.zero_grad()
            loss(x_0[rows]).backward()
            optimizer.step()
            taken += 1
    return (time.perf_counter() - start) / taken


def write(numbers, args):
    """JSON with the machine; parts that were not run stay as they were."""
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "fit.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "seconds": args.seconds,
        "seed": args.seed,
    }
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(before | numbers | machine, indent=2, ensure_ascii=False) + "\n")
    os.replace(aside, path)
    print(f"\nwrote {path}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["speed", "hand", "defaults"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="the CPU, for which the seconds are")
    parser.add_argument("--smoke", action="store_true", help="half an hour's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.readings, args.repeats, args.steps = 32, 5, 1000
    args.tasks, args.settings = list(TASKS), list(BY_HAND)
    if args.smoke:
        args.tasks, args.settings = args.tasks[:1], args.settings[:1]
        args.seconds, args.readings, args.repeats, args.steps = 0.1, 1, 1, 30
    return args


if __name__ == "__main__":
    main()
