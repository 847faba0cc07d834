r"""Do the calibration checks reject wrong models, and only those?

The benchmark runs 200 repetitions with fixed seeds, n = 3,000 each, of two checks of the exact chain of a
Gaussian (D = 2, T = 10). Each check uses one scalar, chosen in advance:

- *predictive*: the first entry of the data among draws of the model (``randomized_pit``);
- *posterior*: the first entry of the state x_5 among draws of the guide
  (``simulation_based_calibration``).

Each PIT is tested for uniformity at the 1 % level, by Kolmogorov-Smirnov and by Cramér-von Mises, and each
test is counted on its own: once with the truth as the model, once with a shift of 0.1 standard deviations
(of the data, or of the guide's distribution of x_5 given x_0). For a true model, 2 rejections in 200 are
expected.

    python benchmarks/calibration.py [--repetitions 200] [--device cuda] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import pyro
import torch
from scipy import stats
from tqdm.auto import trange

from pyro_diffusion import (
    DiffusionModel,
    GaussianDenoiser,
    LogSNRSchedule,
    randomized_pit,
    simulation_based_calibration,
)

MEAN, STD, NUM_TIMESTEPS = (0.5, -1.0), (0.5, 2.0), 10
LEVEL, SHIFT = 0.01, 0.1
TESTS = {
    "Kolmogorov-Smirnov": lambda pit: stats.kstest(pit, "uniform").pvalue,
    "Cramér-von Mises": lambda pit: stats.cramervonmises(pit, "uniform").pvalue,
}


def main():
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    start = time.perf_counter()
    checks = {"predictive": predictive, "posterior": posterior}
    rejected = {(c, m, t): 0 for c in checks for m in ("truth", "shifted") for t in TESTS}
    for repetition in trange(args.repetitions, unit="repetition"):
        for seed, (check, model, test) in enumerate(rejected):
            if test != next(iter(TESTS)):
                continue
            pyro.set_rng_seed(10_000 * repetition + seed)
            pit = checks[check](SHIFT if model == "shifted" else 0.0, args).cpu().numpy()
            for name, p_value in TESTS.items():
                rejected[check, model, name] += int(p_value(pit) < LEVEL)
    report(rejected, args, time.perf_counter() - start)


def chain(shift=0.0):
    """The exact chain of N(mean, std²), with data shifted by a fraction of their standard deviation."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    schedule = LogSNRSchedule(NUM_TIMESTEPS, log_snr_max=6.0, log_snr_min=-12.0)
    return DiffusionModel(GaussianDenoiser(mean + shift * std, std, schedule))


def predictive(shift, args):
    """Ranks of true data among data that are drawn through the model's chain."""
    x_0 = torch.distributions.Normal(torch.tensor(MEAN), torch.tensor(STD)).sample((args.num_data,))
    draws = chain(shift).sample(args.num_draws * args.num_data)
    return randomized_pit(x_0[:, 0], draws[:, 0].reshape(args.num_draws, args.num_data))


def posterior(shift, args):
    """Ranks of states of the model's trajectories among states of its guide."""
    diffusion = chain()
    t = torch.tensor(5)
    move = shift * diffusion.schedule.noise(t) / diffusion.schedule.signal(t)
    return simulation_based_calibration(
        (diffusion.model, lambda x_0: diffusion.guide(x_0 + move)),
        lambda states: states["x_5"][:, 0],
        num_simulations=args.num_data,
        num_draws=args.num_draws,
        batch_size=100_000,
    )


def report(rejected, args, seconds):
    """Print the table, and write JSON with all that is needed to run it again."""
    print(f"\nrejected at the {LEVEL:.0%} level, of {args.repetitions}; n = {args.num_data:,}")
    print(
        "\n| check | test | truth as model | shifted by 0.1 standard deviations |\n|---|---|---|---|"
    )
    for check, test in dict.fromkeys((check, test) for check, _, test in rejected):
        print(
            f"| {check} | {test} | {rejected[check, 'truth', test]} | {rejected[check, 'shifted', test]} |"
        )
    numbers = {
        "level": LEVEL,
        "shift": SHIFT,
        "repetitions": args.repetitions,
        "num_data": args.num_data,
        "num_draws": args.num_draws,
        "num_timesteps": NUM_TIMESTEPS,
        "rejected": [
            {"check": check, "model": model, "test": test, "count": count}
            for (check, model, test), count in rejected.items()
        ],
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".calibration.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "calibration.json")
    print(f"\n{seconds:.0f} s; wrote {args.output / 'calibration.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.repetitions = 2 if args.smoke else args.repetitions
    args.num_data = 200 if args.smoke else 3_000
    args.num_draws = 19
    return args


if __name__ == "__main__":
    main()
