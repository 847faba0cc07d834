r"""Are the Monte Carlo errors that the readers report correct?

``evaluate_bound`` chooses how much it draws, and at which timesteps, from its own earlier draws. If it is
repeated many times on the same model and data, its estimates should scatter about the truth by the error that
it reports: :math:`z = (\text{estimate} - \text{truth}) / \text{error}` has mean zero and standard deviation
one. Four small networks are trained for a short time, on bits (a mixture of twelve products, 16 columns,
probabilities :math:`u^3`; as a chain of bits and as levels), grey levels and reals. Their bounds are
evaluated at T = 20, 100 and infinity, on 10, 400 and 3,000 held-out rows, at loose and tight targets. The
truth is the mean of the repeats, each weighted by its rows. By Wald's identity a stopping rule does not bias
*this* mean; the bias of the plain mean is the mean of z. At T = 20 the mean of the repeats is also compared
with whole trajectories by ``elbo_terms``, whose number of draws is fixed (*off*, in errors of the
difference). The error of sd z is the error of a standard deviation, by the fourth moment.

The work is the number of rows times the variance of an estimate: the cost of a given *true* error.
``--before`` takes the JSON of a run with another version of the package, and adds its numbers. The last rows
are the errors of ``elbo_terms``, ``importance_evidence`` and ``smc_evidence``, whose number of particles is
fixed, for five steps and a mixture of two Gaussians, where Pareto k̂ is good.

    python benchmarks/honesty.py [--num-repeats 200] [--seed 0] [--before FILE] [--device cuda] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import json
import math
import os
import platform
import time
import warnings
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    GaussianMixtureDenoiser,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
    smc_evidence,
)

DIMENSION = 16
#: Kind, number of data, T, target; repeats as a share of all.
CASES = [
    ("bits", 3000, 20, 0.02, 0.4),
    ("bits", 3000, math.inf, 0.1, 0.5),
    ("bits", 400, 100, 0.05, 1.0),
    ("bits", 10, 20, 0.3, 1.0),
    ("bits", 10, math.inf, 0.3, 1.0),
    ("levels", 3000, 20, 0.05, 0.5),
    ("levels", 400, math.inf, 0.1, 1.0),
    ("levels", 10, 100, 0.3, 1.0),
    ("grey", 3000, 20, 0.2, 0.5),
    ("grey", 400, 100, 0.2, 1.0),
    ("grey", 10, math.inf, 0.5, 1.0),
    ("reals", 3000, math.inf, 0.2, 0.5),
    ("reals", 400, 20, 0.1, 1.0),
    ("reals", 10, 100, 0.5, 1.0),
    ("reals", 10, 20, 0.05, 1.0),
]
TITLE = "| reader | data | N | T | target | mean z | sd z | off | rows | rows × var | before: sd z | work |"


def main():
    args = parse_arguments()
    torch.set_default_device(args.device)
    start, models, rows = time.perf_counter(), {}, []
    print(f"{TITLE}\n{'|---' * TITLE.count(' | ')}|---|")
    for case in CASES:
        if case[0] not in models:
            models[case[0]] = trained(case[0], args)
        rows.append(bounds(*models[case[0]], *case, args))
        print(markdown(rows[-1], args.before), flush=True)
    for reader, read in READERS.items():
        rows.append(others(reader, read, args))
        print(markdown(rows[-1], args.before), flush=True)
    write(rows, time.perf_counter() - start, args)


def trained(kind, args):
    """A model that was trained briefly on 10,000 draws, and 3,000 more draws."""
    pyro.set_rng_seed(args.seed)
    network = MLP((DIMENSION,), hidden_size=32, num_outputs=2 if kind == "levels" else 1)
    if kind == "bits":
        denoiser = NeuralBernoulliDenoiser(network, LinearDecaySchedule(20), (DIMENSION,))
    else:
        schedule = LogSNRSchedule(20, log_snr_max=8.0, log_snr_min=-8.0)
        settings = {"prediction": LevelPrediction(2)} if kind == "levels" else {}
        denoiser = NeuralDenoiser(network, schedule, (DIMENSION,), **settings)
    likelihood = DiscretizedGaussianLikelihood(num_levels=8) if kind == "grey" else None
    diffusion, x_0 = DiffusionModel(denoiser, likelihood), DRAWS[kind](13_000)
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 3e-3}), TraceMeanField_ELBO())
    for _ in range(args.num_steps):
        svi.step(x_0[torch.randint(10_000, (256,))])
    return diffusion, x_0[10_000:]


def bits(count):
    probs = torch.rand(12, DIMENSION) ** 3
    return (torch.rand(count, DIMENSION) < probs[torch.randint(12, (count,))]).float()


def grey(count):
    factors = torch.randn(count, 4) @ torch.randn(4, DIMENSION) / 2
    levels = 8 * (factors + 0.3 * torch.randn(count, DIMENSION)).sigmoid()
    return levels.long().clamp(0, 7)


def reals(count):
    means = torch.randn(5, DIMENSION)
    return means[torch.randint(5, (count,))] + 0.2 * torch.randn(count, DIMENSION)


DRAWS = {"bits": bits, "levels": lambda count: bits(count).long(), "grey": grey, "reals": reals}


def bounds(diffusion, x_0, kind, count, num_timesteps, target, share, args):
    """Repeats of ``evaluate_bound``."""
    x_0, results, terms = x_0[:count], [], None
    if num_timesteps == 20:
        particles = max(2, math.ceil(args.true_rows / (20 * count)))
        terms = elbo_terms(diffusion, x_0, num_particles=particles, progress=False).mean()
    for repeat in range(max(4, int(share * args.num_repeats))):
        pyro.set_rng_seed(10_000 * (args.seed + 1) + repeat)
        result = evaluate_bound(diffusion, x_0, standard_error=target, num_timesteps=num_timesteps)
        results.append((*result.mean()[:2], result.rows))
    numbers = scores(results)
    if terms is not None:
        error = math.hypot(numbers["sd"] / math.sqrt(len(results)), terms.monte_carlo_error)
        numbers["off"] = (numbers["mean"] - terms.value) / error
    return {
        "reader": "evaluate_bound",
        "data": kind,
        "num_data": count,
        "num_timesteps": num_timesteps if num_timesteps < math.inf else "∞",
        "target": target,
    } | numbers


def scores(results):
    """Mean and standard deviation of z, with errors; the work."""
    value, claimed, rows = torch.tensor(results, dtype=torch.float64, device="cpu").T
    z = (value - (value * rows).sum() / rows.sum()) / claimed
    deviation, sd = z - z.mean(), z.std().item()
    kurtosis = (deviation.pow(4).mean() / deviation.square().mean() ** 2).item()
    return {
        "num_repeats": len(z),
        "mean_z": z.mean().item(),
        "mean_z_error": sd / math.sqrt(len(z)),
        "sd_z": sd,
        "sd_z_error": sd * math.sqrt(max(kurtosis - 1, 0.0) / len(z)) / 2,
        "largest_z": z.abs().max().item(),
        "claimed": [claimed.min().item(), claimed.median().item(), claimed.max().item()],
        "mean": value.mean().item(),
        "sd": value.std().item(),
        "rows": rows.mean().item(),
        "work": (rows.mean() * value.var()).item(),
    }


def mixture():
    """A chain of few steps, whose x̂_0 is exact and whose kernels are not; and its data."""
    schedule = LogSNRSchedule(5, log_snr_max=6.0, log_snr_min=-8.0)
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]])
    denoiser = GaussianMixtureDenoiser(weights, means, 0.4, schedule)
    return DiffusionModel(denoiser), denoiser.data_distribution


READERS = {
    "elbo_terms": lambda d, x: elbo_terms(d, x, num_particles=8, progress=False),
    "importance_evidence": lambda d, x: importance_evidence(
        d, x, num_particles=200, progress=False
    ),
    "smc_evidence": lambda d, x: smc_evidence(d, x, num_particles=100, progress=False),
}


def others(reader, read, args):
    """Repeats of a reader whose number of particles is fixed."""
    pyro.set_rng_seed(args.seed)
    diffusion, law = mixture()
    x_0, results, tails = law.sample((20,)), [], []
    for _ in range(max(4, args.num_repeats)):
        result = read(diffusion, x_0)
        results.append((*result.mean()[:2], 1))
        tails.append(getattr(result, "pareto_k", torch.zeros(1)).max().item())
    return (
        {
            "reader": reader,
            "data": "reals",
            "num_data": len(x_0),
            "num_timesteps": diffusion.schedule.num_timesteps,
            "target": None,
            "largest_pareto_k": max(tails),
        }
        | scores(results)
        | {"rows": None, "work": None}
    )


def markdown(r, before):
    off = f"{r['off']:+.1f}" if "off" in r else "–"
    case = ("reader", "data", "num_data", "num_timesteps", "target")
    same = [old for old in before if all(old[key] == r[key] for key in case)]
    then = ratio = rows = work = "–"
    if r["rows"]:
        rows, work = f"{r['rows']:,.0f}", f"{r['work']:.3g}"
    if same:
        then = f"{same[0]['sd_z']:.2f} ± {same[0]['sd_z_error']:.2f}"
        ratio = f"{same[0]['work'] / r['work']:.1f} ×" if r["work"] else "–"
    return (
        f"| {r['reader']} | {r['data']} | {r['num_data']:,} | {r['num_timesteps']} | {r['target'] or '–'} | "
        f"{r['mean_z']:+.2f} ± {r['mean_z_error']:.2f} | {r['sd_z']:.2f} ± {r['sd_z_error']:.2f} | {off} | "
        f"{rows} | {work} | {then} | "
        f"{ratio} |"
    )


def write(rows, seconds, args):
    numbers = {
        "rows": rows,
        "before": args.before,
        "num_steps": args.num_steps,
        "num_repeats": args.num_repeats,
        "true_rows": args.true_rows,
        "seconds": round(seconds),
        "seed": args.seed,
        "smoke": args.smoke,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".honesty.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "honesty.json")
    print(f"\nwrote {args.output / 'honesty.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-repeats", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--before", type=Path, help="honesty.json of another version")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.before = json.loads(args.before.read_text())["rows"] if args.before else []
    args.num_steps, args.true_rows = (5, 2_000) if args.smoke else (800, 600_000)
    if args.smoke:
        args.num_repeats = 4
        CASES[:] = [(kind, min(count, 40), t, 5.0, 1.0) for kind, count, t, *_ in CASES[::3]]
    warnings.filterwarnings("ignore", message="argument 'max_rows'")  # the rows have the error
    return args


if __name__ == "__main__":
    main()
