r"""How right are posterior draws and log p(y) where both are known?

``posterior_samples`` is run on two kinds of linear problems, y = A x + noise, whose posterior has a closed
form. The denoisers are exact, so that all errors are those of the sampler.

- A Gaussian of 16 entries with correlations 0.9 to the power of the distance, four entries seen with noise
  0.1. Errors of the means are in units of their own Monte Carlo errors.
- Mixtures of 25 Gaussians in 8 and in 80 dimensions, seen through one, two or four linear measurements.
  These are the problems of MCGdiff (Cardoso et al., 2023, https://arxiv.org/abs/2308.07983) as its authors'
  public benchmark draws them: three problems of the published run (seed 27) and thirty more in 8 dimensions,
  and of those in 80 dimensions the four of seeds 1000 to 1003 for each number of measurements.

The distance is the max-sliced Wasserstein distance of ``ot.sliced.max_sliced_wasserstein_distance``: the
largest root mean square distance of the sorted projections, over 100 random directions. It is the mean, with
its standard deviation, over 20 repeats. A repeat compares 10,000 draws with 10,000 exact ones. The floor
compares another 10,000 exact draws with the same exact draws along the same directions. Every repeat has new
exact draws, new directions, and a new resampling of 10,000 draws from the weighted particles. The repeats
share the particles, which come from one call for each problem; the standard deviation therefore leaves out
what differs between calls. Uncorrected guidance (one particle for each draw and no resampling) gives 10,000
draws, which all repeats share. The floor is the mean of 100 repeats, so that a ratio to it is little noisy.

The distance of mode weights is half the sum of the absolute differences between the exact posterior weights
of the components and the mean probabilities of the components given the draws.

All chains have 100 steps, 2,000 particles, 16 runs, and a log-SNR that falls linearly; in 80 dimensions 250
particles, 8 runs and 4 repeats. For the mixtures it
ends at -14, so that each component is close to N(0, I) at the end of the chain, in 80 dimensions as well. It
begins at 4, because the component of a state is known by then and the last kernel of an exact denoiser is
exact. The least ESS is that of a run's particles, before they are resampled, at the worst timestep.

The published distances are those of the authors' benchmark (github.com/gabrielvc,
benchopts_inverse_problem_diffusion_prior, run of 15 March 2024). Its program compares 1,000 draws with 10,000
exact ones, in 4 to 12 runs. The distance of a tenth of the draws is the number to compare. A draw of MCGdiff
has a filter of its own with 32 or 128 particles; here all draws share 16 filters of 2,000.

    OMP_NUM_THREADS=1 python benchmarks/posterior.py --data FOLDER [--problems d8_dy1_seed27 …] [--limit N]
        [--again] [--seed 0] [--device cuda] [--smoke] [--output benchmarks/results]

FOLDER holds ``problems.npz``. Without it only the Gaussian is measured. The file of results is written after
every problem, and a run leaves out the problems that it holds already; ``--again`` measures them again.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_diffusion import (
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LogSNRSchedule,
)
from pyro_diffusion.inference import LinearGaussian, posterior_samples

NUM_DIRECTIONS = 100
LOG_SNR_MIN = -14.0
#: Max-sliced distances of seed 27 in 8 dimensions by number of measurements, mean and sd, as the authors'
#: benchmark reports them.
PUBLISHED = {
    "DDRM": {1: (29.7, 1.8), 2: (13.6, 1.4), 4: (0.486, 0.065)},
    "DPS": {1: (27.2, 2.2), 2: (18.7, 1.2), 4: (12.4, 0.8)},
    "MCGdiff, 32 particles": {1: (19.8, 2.1), 2: (10.8, 0.6), 4: (0.996, 0.146)},
    "MCGdiff, 128 particles": {1: (5.23, 0.51), 2: (4.28, 0.37), 4: (0.179, 0.024)},
}
#: What is measured of a problem: the problems of the published run first.
PROBLEMS = [
    *(f"d8_dy{dy}_seed{seed}" for seed in (27, *range(1000, 1010)) for dy in (1, 2, 4)),
    *(f"d80_dy{dy}_seed{seed}" for seed in range(1000, 1004) for dy in (1, 2, 4)),
]
GUIDANCE, CORRECTED, EXACT = "uncorrected guidance", "posterior_samples", "exact draws"
FLOOR_REPEATS = (
    10  #: times as many repeats of exact draws, so that a ratio to their mean is little noisy
)


def main():
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    path = args.output / "posterior.json"
    found = kept(path, args)
    if found["gaussian"] is None:
        found["gaussian"] = measure_gaussian(args)
        write(path, found)
    print("a component at T, KL from N(0, I): {:.4f} nats; authors {:.2f}\n".format(*found["ends"]))
    print(report_gaussian(found["gaussian"]), flush=True)
    print(TITLE)
    for name, problem in chosen(found["rows"], args):
        row = measure(name, problem, args)
        found["rows"] = [r for r in found["rows"] if r["problem"] != name] + [row]
        found["rows"].sort(key=lambda r: (r["d"], r["dy"], r["seed"]))
        write(path, found)
        print(markdown(row), flush=True)
    write(path, found)
    print(f"\nwrote {path}\n\n" + "\n".join(targets(found)))


# problems


class Problem(NamedTuple):
    """A mixture of Gaussians of unit covariance, measured as y = A x + noise."""

    weights: Tensor  #: of the components, ``(K,)``
    means: Tensor  #: ``(K, d)``
    operator: Tensor  #: A, ``(d_y, d)``
    y: Tensor  #: ``(d_y,)``
    noise: Tensor  #: standard deviation of the noise, ``()``

    @classmethod
    def load(cls, file, name):
        """A problem of the data set by its name."""
        a, y, variance, weights = (
            torch.as_tensor(file[f"{name}_{key}"])
            for key in ("A", "y", "noise_variance", "weights")
        )
        return cls(weights, centres(a.shape[1]), a, y, variance.sqrt())

    @classmethod
    def draw(cls, d, dy, generator):
        """A new problem: singular values and the noise are uniform, weights are squares of normals."""

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=generator.device)

        weights, means = normal(25).square(), centres(d)
        u, _, v = torch.linalg.svd(normal(dy, d), full_matrices=False)
        values = torch.rand(dy, generator=generator, device=generator.device)
        noise = values.max() * torch.rand((), generator=generator, device=generator.device)
        k = torch.multinomial(weights, 1, generator=generator)[0]
        a = u * values @ v
        y = a @ (means[k] + normal(d)) + noise * normal(dy)
        return cls(weights / weights.sum(), means, a, y, noise)

    def by_component(self):
        """log of a component's weight times the density of y in it, ``(K,)``."""
        a = self.operator
        spread = a @ a.mT + self.noise**2 * torch.eye(len(a))
        y = MultivariateNormal(self.means @ a.mT, spread)
        return self.weights.log() + y.log_prob(self.y)

    def log_evidence(self):
        """log p(y), nats."""
        return self.by_component().logsumexp(0)

    def posterior_weights(self):
        """Weights of the components given y, ``(K,)``."""
        return self.by_component().softmax(0)

    def posterior(self, count, generator):
        """Exact draws given y, ``(count, d)``, by Matheron's rule in a component drawn by its weight."""
        a, weights = self.operator, self.posterior_weights()
        k = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = [
            torch.randn(count, n, generator=generator, device=generator.device)
            for n in a.shape[::-1]
        ]
        x = self.means[k] + noise[0]
        spread = a @ a.mT + self.noise**2 * torch.eye(len(a))
        missing = self.y - x @ a.mT - self.noise * noise[1]
        return x + torch.linalg.solve(spread, missing.mT).mT @ a

    def weights_of(self, x):
        """Mean probabilities of the components given draws ``(count, d)``, ``(K,)``."""
        logits = self.weights.log() - torch.cdist(x, self.means).square() / 2
        return logits.softmax(-1).mean(0)

    def diffusion(self, args):
        """The chain whose data are the mixture."""
        schedule = LogSNRSchedule(
            args.num_timesteps, log_snr_max=args.log_snr_max, log_snr_min=LOG_SNR_MIN
        )
        return DiffusionModel(GaussianMixtureDenoiser(self.weights, self.means, 1.0, schedule))


def centres(d):
    """Means of the 25 components, ``(25, d)``: points of a square grid, repeated d / 2 times."""
    grid = -8.0 * torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(grid, grid).repeat(1, d // 2)


def ends():
    """The largest KL of a component from N(0, I) at T, d = 80: with this schedule, and with the authors'."""
    theirs = (1 - torch.linspace(1e-4, 0.02, 999)).prod()
    ours = torch.tensor(LOG_SNR_MIN).sigmoid()
    largest = centres(80).square().sum(1).max()
    return [(alpha_bar * largest / 2).item() for alpha_bar in (ours, theirs)]


def chosen(rows, args):
    """Names and problems that are to be measured."""
    done = set() if args.again else {r["problem"] for r in rows}
    if args.data is None:
        if not args.smoke:
            print("mixtures are left out: pass --data FOLDER, the folder of problems.npz")
            return
        generator = torch.Generator(args.device).manual_seed(args.seed)
        yield "d8_dy2_seed0", Problem.draw(8, 2, generator)
        return
    names = [name for name in args.problems if name not in done][: args.limit]
    with np.load(args.data / "problems.npz") as file:
        for name in names:
            yield name, Problem.load(file, name)


# measurements


def measure(name, problem, args):
    """Evidence and distances of one problem, with and without correction."""
    pyro.set_rng_seed(args.seed)
    diffusion = problem.diffusion(args)
    likelihood = LinearGaussian(problem.operator, problem.y, problem.noise)
    if problem.operator.shape[1] > 8 and not args.smoke:
        args = argparse.Namespace(
            **vars(args) | {"num_particles": 250, "num_runs": 8, "num_repeats": 4}
        )
    draws, seconds = {}, {}
    for method, particles in ((CORRECTED, args.num_particles), (GUIDANCE, 1)):
        start = time.perf_counter()
        draws[method] = posterior_samples(
            diffusion, likelihood, args.num_draws,
            num_particles=particles, num_runs=args.num_runs, progress=False,
        )  # fmt: skip
        seconds[method] = round(time.perf_counter() - start, 1)
    d, dy, seed = (int(part.lstrip("dyse")) for part in name.split("_"))
    weights = problem.posterior_weights()
    row = {"problem": name, "d": d, "dy": dy, "seed": seed, "noise": problem.noise.item()}
    row |= {"num_particles": args.num_particles, "num_runs": args.num_runs}
    row |= {"num_modes": int((weights > 0.01).sum()), "exact": problem.log_evidence().item()}
    row |= evidence(draws[CORRECTED], row["exact"])
    row |= distances(problem, draws, args)
    return row | {"seconds": seconds}


def evidence(draws, exact):
    """log Ẑ, its error in nats and in units of its own error, and how good the weights were."""
    error = draws.log_evidence.item() - exact
    return {
        "log_evidence": draws.log_evidence.item(),
        "standard_error": draws.standard_error.item(),
        "error": error,
        "z": error / draws.standard_error.item(),
        "least_ess": draws.ess_by_timestep.min().item(),
        "ess": draws.ess.item(),
        "pareto_k": draws.pareto_k.item(),
        "reliable": draws.reliable.item(),
    }


def distances(problem, draws, args):
    """Distances from exact draws and of the weights of modes, mean and sd over the repeats."""
    generator = torch.Generator(args.device).manual_seed(args.seed + 1)
    found = {kind: {m: [] for m in (EXACT, *draws)} for kind in ("distance", "of_a_tenth", "modes")}
    weights = problem.posterior_weights()
    for repeat in range(FLOOR_REPEATS * args.num_repeats):
        reference = problem.posterior(args.num_draws, generator)
        directions = torch.randn(
            NUM_DIRECTIONS, reference.shape[1], generator=generator, device=args.device
        )
        projected = projections(reference, directions)
        samples = {EXACT: problem.posterior(args.num_draws, generator)}
        if repeat < args.num_repeats:
            samples[CORRECTED] = draws[CORRECTED].resample(args.num_draws)
            samples[GUIDANCE] = draws[GUIDANCE].samples
        for method, x in samples.items():
            tenth = x[torch.randperm(len(x), generator=generator, device=args.device)[::10]]
            for kind, part in (("distance", x), ("of_a_tenth", tenth)):
                distance = max_sliced_distance(projections(part, directions), projected)
                found[kind][method].append(distance)
            total_variation = (problem.weights_of(x) - weights).abs().sum() / 2
            found["modes"][method].append(total_variation.item())
    return {kind: {m: mean_sd(values) for m, values in by.items()} for kind, by in found.items()}


def projections(x, directions):
    """Sorted projections of points ``(N, d)`` on directions ``(P, d)``, ``(P, N)``."""
    unit = directions / directions.norm(dim=1, keepdim=True)
    return np.sort((unit @ x.mT).cpu().numpy(), 1)  # several times as fast as torch's


def max_sliced_distance(x, y):
    """The largest W_2 of two sets of sorted projections ``(P, N)``; x may hold an N-th part of y's points."""
    x = x.repeat(y.shape[1] // x.shape[1], 1)
    return float(np.sqrt(np.square(x - y).mean(1).max()))


def mean_sd(values):
    values = torch.tensor(values)
    return [values.mean().item(), values.std().item()]


def measure_gaussian(args):
    """Errors of means, variances and log p(y) of a Gaussian of which a quarter is seen."""
    pyro.set_rng_seed(args.seed)
    index = torch.arange(16.0)
    covariance = 0.9 ** (index[:, None] - index).abs()
    a, y, noise = torch.eye(16)[::4], torch.tensor([1.0, -1.0, 0.5, 0.0]), 0.1
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=8.0, log_snr_min=-10.0)
    denoiser = GaussianDenoiser.from_covariance(torch.zeros(16), covariance, schedule)
    spread = a @ covariance @ a.mT + noise**2 * torch.eye(4)
    gain = torch.linalg.solve(spread, a @ covariance).mT
    mean, variance = gain @ y, (covariance - gain @ a @ covariance).diagonal()
    exact = MultivariateNormal(torch.zeros(4), spread).log_prob(y).item()
    rows = {}
    for method, particles in ((CORRECTED, args.num_particles), (GUIDANCE, 1)):
        start = time.perf_counter()
        draws = posterior_samples(
            DiffusionModel(denoiser), LinearGaussian(a, y, noise), args.num_particles * args.num_runs,
            num_particles=particles, num_runs=args.num_runs, progress=False,
        )  # fmt: skip
        found, error = draws.mean()
        rows[method] = {
            "mean_z": ((found - mean) / error).tolist(),
            "mean_errors": (found - mean).tolist(),
            "variance_errors": (draws.std().value.square() / variance - 1).tolist(),
            "seconds": round(time.perf_counter() - start, 1),
        }
        rows[method] |= evidence(draws, exact) if method == CORRECTED else {}
    return {"exact": exact, "rows": rows}


# report


TITLE = (
    "| problem | exact log p(y) | error, nats | z | least ESS | distance | uncorrected | exact draws "
    "| mode weights | uncorrected | exact draws | seconds |\n" + "|---" * 12 + "|"
)


def markdown(r):
    d, w = r["distance"], r["modes"]
    methods = (CORRECTED, GUIDANCE, EXACT)
    return (
        f"| {r['problem']} | {r['exact']:.3f} | {r['error']:+.4f} ± {r['standard_error']:.4f} "
        f"| {r['z']:+.1f} | {r['least_ess']:,.0f} | "
        + " | ".join("{:.3f} ± {:.3f}".format(*d[m]) for m in methods)
        + " | "
        + " | ".join(f"{w[m][0]:.4f}" for m in methods)
        + f" | {r['seconds'][CORRECTED]:.0f} + {r['seconds'][GUIDANCE]:.0f} |"
    )


def report_gaussian(found):
    lines = [
        "| Gaussian | worst mean, errors | worst variance | log p(y), error | z |",
        "|---" * 5 + "|",
    ]
    for method, r in found["rows"].items():
        z, variance = (max(map(abs, r[key])) for key in ("mean_z", "variance_errors"))
        evidence = (
            f"{r['error']:+.5f} ± {r['standard_error']:.5f} | {r['z']:+.1f}"
            if "z" in r
            else "– | –"
        )
        lines.append(f"| {method} | {z:.1f} | {variance:.1%} | {evidence} |")
    return "\n".join(lines) + "\n"


def targets(found):
    """How many of the problems in 8 dimensions reach what was asked for."""
    rows = [r for r in found["rows"] if r["d"] == 8]
    if not rows:
        return []
    ratios = [r["distance"][CORRECTED][0] / r["distance"][EXACT][0] for r in rows]
    return [
        f"log p(y) within 0.15 nats: {sum(abs(r['error']) <= 0.15 for r in rows)} of {len(rows)}",
        f"log p(y) within three errors: {sum(abs(r['z']) <= 3 for r in rows)} of {len(rows)}",
        f"distance at most 1.5 times that of exact draws: {sum(q <= 1.5 for q in ratios)} of {len(rows)}"
        f", largest ratio {max(ratios):.2f}",
    ]


def kept(path, args):
    """What the file of results holds already, if it was measured with the same settings."""
    names = ("num_timesteps", "log_snr_max", "num_particles", "num_runs", "num_draws", "num_repeats",
             "seed", "device")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    settings |= {
        "log_snr_min": LOG_SNR_MIN, "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "published": PUBLISHED, "ends": ends(),
    }  # fmt: skip
    empty = {"rows": [], "gaussian": None}
    found = json.loads(path.read_text()) if path.exists() else empty
    other = [name for name in names if found["gaussian"] and found.get(name) != settings[name]]
    if other and not args.again:
        raise SystemExit(
            f"{path} has numbers with another {', '.join(other)}: pass --again, which drops them, or --output"
        )
    found = empty if other else found
    found |= {"gaussian": None} if args.again else {}
    return found | settings


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(".posterior.json.part")
    aside.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(aside, path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of problems.npz")
    parser.add_argument("--problems", nargs="*", default=PROBLEMS, metavar="NAME")
    parser.add_argument("--limit", type=int, help="so many problems at most")
    parser.add_argument("--again", action="store_true", help="measure what the file holds again")
    parser.add_argument("--log-snr-max", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="hours of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    full, tiny = (100, 2000, 16, 10_000, 20), (20, 64, 4, 300, 3)
    (args.num_timesteps, args.num_particles, args.num_runs, args.num_draws,
     args.num_repeats) = tiny if args.smoke else full  # fmt: skip
    return args


if __name__ == "__main__":
    main()
