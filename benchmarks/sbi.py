r"""How good are posteriors from simulations alone, by task and number of simulations?

The benchmark runs ``examples/simulation_based_inference.py`` for each task and budget, with one setting for
all. C2ST is the accuracy of a classifier that tells draws from those of a reference posterior, 10,000 of
each: 0.5 is perfect. It is the mean over the observations that have a reference, with its standard deviation
over them. The bound, the flow's log-density and the KL divergence from the exact posterior are of new
simulations and in nats per datum. The settings were chosen by the bound at 10,000 simulations, after the C2ST
of a single network on two observations of SLCP (0.875 and 0.827) had been seen. The references are those of
Lueckmann et al. (2021), https://arxiv.org/abs/2101.04653, whose own results for neural posterior estimation
are the column NPE. Without ``--data`` there is no C2ST. The seconds are of one thread, while other jobs ran.

    python benchmarks/sbi.py [--tasks two_moons slcp] [--simulations 10000 100000] [--data FOLDER]
        [--device cuda] [--smoke] [--output benchmarks/results]

A run replaces the rows of its tasks and budgets, and keeps the other rows of the file.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import pyro
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import simulation_based_inference as sbi

#: C2ST of neural posterior estimation, from the result file of Lueckmann et al. (2021).
NPE = {
    ("two_moons", 10_000): (0.606, 0.037),
    ("two_moons", 100_000): (0.542, 0.023),
    ("slcp", 10_000): (0.901, 0.045),
    ("slcp", 100_000): (0.831, 0.049),
}


def main():
    args = parse_arguments()
    path = args.output / "sbi.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for simulations in args.simulations:
        for name in args.tasks:
            row = measure(name, simulations, args)
            same = (row["task"], row["simulations"])
            rows = [r for r in rows if (r["task"], r["simulations"]) != same] + [row]
            rows.sort(key=lambda r: (list(sbi.TASKS).index(r["task"]), r["simulations"]))
            write(path, rows, args)
    report(rows)


def measure(name, simulations, args):
    """One posterior, fitted and compared with what is known."""
    options = ["--task", name, "--simulations", str(simulations), "--device", args.device]
    options += ["--steps", str(args.steps)] * (args.steps is not None)
    options += ["--data", str(args.data)] * (args.data is not None) + ["--smoke"] * args.smoke
    options = sbi.parse_arguments(options)
    pyro.set_rng_seed(options.seed)
    task, start = sbi.TASKS[name], time.perf_counter()
    posterior, fits = sbi.learn(task, *task.pairs(options.simulations, args.device), options)
    row = {"task": name, "simulations": options.simulations, "steps": [f.num_steps for f in fits]}
    row["fit_seconds"] = round(time.perf_counter() - start, 1)
    row |= sbi.score(task, posterior, options)
    credibility = sbi.calibrate(task, posterior, options)["credibility"]
    row["coverage"] = {p: (credibility <= p).double().mean().item() for p in sbi.LEVELS}
    if args.data is not None:
        row["c2st"] = sbi.compare(posterior, sbi.reference(options), options)
        row["c2st_draws"] = options.c2st_draws
    row["npe"] = NPE.get((name, options.simulations))
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def report(rows):
    print("\n| task | simulations | C2ST | NPE | bound, nats | KL, nats | fit, s |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        scores = torch.tensor(r.get("c2st", [float("nan")]), dtype=torch.float64)
        spread = f"{scores.mean():.3f} ± {scores.std(correction=min(1, len(scores) - 1)):.3f}"
        npe = "{:.3f} ± {:.3f}".format(*r["npe"]) if r["npe"] else "–"
        kl = "{:.4f} ± {:.4f}".format(*r["kl"]) if "kl" in r else "–"
        print(
            f"| {r['task']} | {r['simulations']:,} | {spread if 'c2st' in r else '–'} | {npe} "
            f"| {r['bound']['value']:.3f} ± {r['bound']['sampling_error']:.3f} | {kl} "
            f"| {r['fit_seconds']:.0f} |"
        )


def write(path, rows, args):
    numbers = {
        "rows": rows,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": args.device,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(".sbi.json.part")
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=sbi.TASKS, default=list(sbi.TASKS))
    parser.add_argument("--simulations", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument(
        "--steps", type=int, help="of each network; by default those of the example"
    )
    parser.add_argument("--data", type=Path, help="folder of the reference posteriors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.simulations = args.simulations[:1] if args.smoke else args.simulations
    return args


if __name__ == "__main__":
    main()
