r"""Eight schools, centred: a diffusion chain as the guide of a posterior with a funnel, beside NUTS.

Eight schools measured the effect of a course on test scores, each with a known standard error (Rubin, 1981):

    mu ~ N(0, 5),   tau ~ HalfCauchy(5),   theta_j ~ N(mu, tau),   y_j ~ N(theta_j, sigma_j) .

The model is centred: the effects theta_j are latents whose scale is a latent as well. Where tau is small, all
effects must be near mu. This neck of the posterior is too narrow for one Gaussian. Four guides get the same
model:

    normal           ``AutoMultivariateNormal``, a Gaussian in unconstrained coordinates
    chain on normal  ``AutoDiffusion`` on the fitted Gaussian
    flow             ``AutoIAFNormal`` with two transforms
    chain on flow    ``AutoDiffusion`` on the fitted flow

A chain begins as its base, and ``KeepBest`` holds the best parameters. The effects integrate out in closed
form, so that a grid over mu and log tau gives log p(y) and the law of log tau. NUTS draws from the same model
without its centring (``LocScaleReparam``), where there is no neck.

The script prints for each guide

    bound      the mean of log p(y, z) − log q(z) over its draws, nats
    log p(y)   the estimate by the weights of these draws, with its error
    k̂          Pareto k of the weights; the verdict says what follows from it
    effective  effective sample size of the weighted draws
    log tau    its mean, its standard deviation and the share below zero, of the draws and of draws resampled
               by weight

A second part has a posterior of two modes. An instrument reads four numbers z with one of two offsets, of
probabilities 0.3 and 0.7, and the modes are 12 standard deviations or more apart. ``AutoNormal`` keeps one. A
chain that begins three times as broad, and that minimises the variance of the log-weights first
(``LogVarianceELBO``), keeps both. The shares of the modes are beside the exact ones.

In the run of the gallery each chain has a better bound than its base, by 1.9 and 0.2 nats. No guide's draws
go far enough into the neck: log tau is below zero for 20 % of the posterior. The errors of log p(y) do not
show this. The flow alone has k̂ 0.57, which is below the limit, and log p(y) is low by 0.14 nats, more than
seven of its errors. The chain on the normal is low by 0.2 nats with k̂ 0.64. The chain keeps both modes,
with a share of 0.50 in place of 0.30; weights give 0.35, and log p(y) is low by 0.19 nats, six of its
errors.

    python examples/eight_schools.py [--seed 0] [--device cpu] [--smoke] [--output outputs/eight_schools]
"""

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.reparam import LocScaleReparam

from pyro_diffusion import (
    AutoDiffusion,
    KeepBest,
    LogVarianceELBO,
    global_evidence,
    to_arviz,
)
from pyro_diffusion.evidence import GlobalEvidence
from pyro_diffusion.style import BLUE, GREEN, INK, ORANGE, RED, styled

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
NORMAL, CHAIN, FLOW, BOTH = "normal", "chain on normal", "flow", "chain on flow"
TOGETHER = {"vectorize_particles": True, "max_plate_nesting": 1}


def schools(y, sigma):
    """Effects of eight schools, with a common mean and a common scale."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[0]), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.full_like(y[0], 5.0)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def main():
    args = parse_arguments()
    data = Y.to(args.device), SIGMA.to(args.device)
    exact = by_quadrature()
    nuts = by_nuts(data, args)
    guides = fitted(data, args)
    numbers = {"exact": exact.log_p, "log tau": report(guides, nuts, exact)}
    for name, guide in guides.items():
        print(f"  {name}: {guide.evidence.verdict}")
    numbers["modes"] = two_modes(args)
    paths = write(args.output, numbers, guides, nuts)
    print("\nwrote " + "\n      ".join(map(str, paths)))


class Exact(NamedTuple):
    """What a grid says about eight schools."""

    log_p: float  #: log p(y), nats
    log_tau: np.ndarray  #: the grid
    share: np.ndarray  #: posterior probability of each of its points


def by_quadrature():
    """y_j ~ N(mu, sigma_j² + tau²) by the trapezoidal rule over mu and log tau."""
    mu = torch.linspace(-30, 30, 601, dtype=torch.float64)[:, None]
    log_tau = torch.linspace(-14, 10, 2401, dtype=torch.float64)
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    for y, sigma in zip(Y.double(), SIGMA.double(), strict=True):
        log_p = log_p + dist.Normal(mu, (sigma**2 + tau**2).sqrt()).log_prob(y)
    total = log_p.logsumexp((0, 1))
    volume = (60 / 600) * (24 / 2400)
    share = (log_p - total).exp().sum(0)
    return Exact((total + math.log(volume)).item(), log_tau.numpy(), share.numpy())


def by_nuts(data, args):
    """Draws by chain, ``(C, S)`` and ``(C, S, 8)``, of the model without its centring."""
    start = time.process_time()
    program = poutine.reparam(schools, {"theta": LocScaleReparam(centered=0.0)})
    found = []
    for chain in range(args.chains):
        pyro.set_rng_seed(args.seed + chain)
        mcmc = MCMC(NUTS(program), args.draws, warmup_steps=args.warmup, disable_progbar=True)
        mcmc.run(*data)
        found.append(mcmc.get_samples())
    mu, tau, z = (torch.stack([x[k] for x in found]) for k in ("mu", "tau", "theta_decentered"))
    draws = {"mu": mu, "tau": tau, "theta": mu[..., None] + tau[..., None] * z}
    draws = {name: x.cpu().numpy() for name, x in draws.items()}
    data = az.convert_to_dataset({**draws, "log_tau": np.log(draws["tau"])})
    rhat, ess = az.rhat(data), az.ess(data)
    print(
        f"NUTS: {args.chains} chains of {args.warmup} + {args.draws} draws; R-hat of log tau "
        f"{float(rhat['log_tau']):.3f}, largest of all {max(float(x.max()) for x in rhat.values()):.3f}; "
        f"effective draws of log tau {float(ess['log_tau']):.0f}; {time.process_time() - start:.0f} s"
    )
    return draws


class Fitted(NamedTuple):
    """A guide after its training."""

    evidence: GlobalEvidence
    draws: dict[str, np.ndarray]  #: by site, draws in front
    resampled: dict[str, np.ndarray]  #: by weight
    seconds: float  #: of training, without its base's


def fitted(data, args):
    """The four guides by name."""
    pyro.set_rng_seed(args.seed)
    found, bases = {}, {}
    flow = partial(AutoIAFNormal, num_transforms=2)
    for name, guide in ((NORMAL, AutoMultivariateNormal), (FLOW, flow)):
        bases[name] = guide(schools)
        rate = 0.02 if name == NORMAL else 0.01
        found[name] = trained(bases[name], data, args.base_steps, rate, 64, args)
    for name, base, rate in ((CHAIN, NORMAL, 0.01), (BOTH, FLOW, 0.005)):
        guide = AutoDiffusion(schools, args.num_timesteps, bases[base])
        found[name] = trained(guide, data, args.steps, rate, 256, args)
    return {name: found[name] for name in (NORMAL, CHAIN, FLOW, BOTH)}


def trained(guide, data, steps, rate, num_particles, args):
    """Maximise the bound, keep the best parameters, and read the guide."""
    start = time.process_time()
    best = KeepBest(schools, guide, *data, num_particles=args.held, max_plate_nesting=1)
    elbo = Trace_ELBO(num_particles=num_particles, **TOGETHER)
    svi = SVI(schools, guide, decaying(rate, steps), elbo)
    for step in range(1, steps + 1):
        svi.step(*data)
        if step % max(steps // 5, 1) == 0:
            best.update()
    best.restore()
    seconds = time.process_time() - start
    evidence = global_evidence(
        schools, guide, *data, num_particles=args.read, max_plate_nesting=1, progress=False
    )
    tree = to_arviz(guide, *data, num_draws=args.read, max_plate_nesting=1, progress=False)
    groups = (tree[group] for group in ("posterior", "resampled"))
    return Fitted(
        evidence, *({k: g[k].values[0] for k in ("mu", "tau", "theta")} for g in groups), seconds
    )


def decaying(rate, steps):
    """Adam with a learning rate that falls to a thirtieth."""
    return pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.03 ** (1 / steps)})


def report(guides, nuts, exact):
    """Print the tables, and return the moments of log tau."""
    print(
        f"\nlog p(y) by quadrature {exact.log_p:.3f} nats\n"
        "guide              bound             log p(y)          k̂      effective         processor s"
    )
    for name, guide in guides.items():
        e = guide.evidence
        print(
            f"  {name:15}  {e.elbo:7.2f} ± {e.elbo_standard_error:.3f}   {e.log_evidence:7.2f} ± "
            f"{e.standard_error:.3f}  {e.pareto_k:5.2f}   {e.ess:5.0f} of {e.num_particles:,}   "
            f"{guide.seconds:6.0f}"
        )
    mean = (exact.share * exact.log_tau).sum()
    sd = math.sqrt((exact.share * (exact.log_tau - mean) ** 2).sum())
    rows = {"exact": (mean, sd, exact.share[exact.log_tau < 0].sum())}
    rows["NUTS"] = moments(nuts)
    for name, guide in guides.items():
        rows[name] = moments(guide.draws)
        rows[f"{name}, resampled"] = moments(guide.resampled)
    print("\nlog tau                       mean     sd   share below 0")
    for name, values in rows.items():
        print(f"  {name:26}{values[0]:6.2f} {values[1]:6.2f}   {values[2]:.3f}")
    return {name: [float(x) for x in values] for name, values in rows.items()}


def moments(draws):
    """Mean and standard deviation of log tau, and the share of draws below zero."""
    log_tau = np.log(draws["tau"])
    return log_tau.mean(), log_tau.std(), (log_tau < 0).mean()


# Two modes.


WEIGHTS = torch.tensor([0.3, 0.7])
OFFSETS = torch.tensor([[3.0, -3.0, 0.0, 0.0], [-3.0, 3.0, 0.0, 0.0]])
NOISE = torch.tensor([[0.7], [0.5]])


def instrument(y):
    """A reading of four numbers by an instrument with one of two offsets, and which one is not known."""
    z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 5.0).to_event(1))
    offsets, noise, weights = (x.to(y) for x in (OFFSETS, NOISE, WEIGHTS))
    law = dist.Normal(z[..., None, :] + offsets, noise).to_event(1)
    pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), law), obs=y)


def two_modes(args):
    """Print the share of the first mode by each guide; return the shares."""
    pyro.set_rng_seed(args.seed)
    y = torch.zeros(4, device=args.device)
    parts = WEIGHTS.log() + dist.Normal(0.0, (NOISE**2 + 25).sqrt()).log_prob(OFFSETS).sum(1)
    log_p, share = parts.logsumexp(0).item(), parts.softmax(0)[0].item()
    print(f"\ntwo modes: log p(y) = {log_p:.3f} nats, share of the mode z_1 < 0 {share:.3f}")
    normal = AutoNormal(instrument)
    guide = AutoDiffusion(
        instrument, args.mode_timesteps, partial(AutoDiagonalNormal, init_scale=1.0), init_scale=3.0
    )
    runs = (
        ("AutoNormal, bound", normal, Trace_ELBO, args.mode_steps, 0.03),
        ("chain, log-variance", guide, LogVarianceELBO, args.mode_steps, 0.005),
        ("chain, bound after it", guide, Trace_ELBO, args.mode_steps, 0.003),
    )
    shares = {"exact": share}
    for name, program, loss, steps, rate in runs:
        start = time.process_time()
        best = KeepBest(instrument, program, y, num_particles=args.held, max_plate_nesting=0)
        svi = SVI(
            instrument,
            program,
            decaying(rate, steps),
            loss(256, vectorize_particles=True, max_plate_nesting=0),
        )
        for step in range(1, steps + 1):
            svi.step(y)
            if loss is Trace_ELBO and step % max(steps // 4, 1) == 0:
                best.update()
        if loss is Trace_ELBO:
            best.restore()
        draws = to_arviz(program, y, num_draws=args.read, max_plate_nesting=0, progress=False)
        negative, weighted = (
            float((draws[group]["z"][..., 0] < 0).mean()) for group in ("posterior", "resampled")
        )
        of = draws["importance"]
        print(
            f"  {name:22} share {negative:.3f}, resampled {weighted:.3f}; bound {float(of['elbo']):.2f}, "
            f"log p(y) {float(of['evidence']):.2f} ± {float(of['evidence_standard_error']):.2f}, k̂ "
            f"{float(of['pareto_k']):.2f}; {time.process_time() - start:.0f} s"
        )
        shares[name] = [negative, weighted]
    return shares


# The picture.


@styled
def picture(guides, nuts):
    """Intervals of all latents, and draws of log tau beside the first effect."""
    figure, axes = plt.subplot_mosaic(
        [["forest", NORMAL, CHAIN], ["forest", FLOW, BOTH]],
        figsize=(11, 6.4), layout="constrained", width_ratios=(1.25, 1, 1),
    )  # fmt: skip
    of_nuts = {name: x.reshape(-1, *x.shape[2:]) for name, x in nuts.items()}
    forest(axes["forest"], of_nuts, guides)
    for name, guide in guides.items():
        funnel(axes[name], of_nuts, guide.draws, name)
    return figure


def forest(ax, nuts, guides):
    """Medians, 50 % and 90 % intervals, one line a source."""
    sources = (
        ("NUTS", nuts, INK), (NORMAL, guides[NORMAL].draws, ORANGE),
        (CHAIN, guides[CHAIN].draws, BLUE), (BOTH, guides[BOTH].draws, GREEN),
        (f"{BOTH}, resampled", guides[BOTH].resampled, RED),
    )  # fmt: skip
    for row, (name, draws, color) in enumerate(sources):
        columns = np.column_stack([draws["mu"], draws["tau"], draws["theta"]])
        low, first, median, third, high = np.quantile(
            columns, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0
        )
        at = np.arange(columns.shape[1]) + 0.15 * (row - 2)
        ax.hlines(at, low, high, color=color, lw=1)
        ax.hlines(at, first, third, color=color, lw=3)
        ax.plot(median, at, "o", color=color, ms=4, mec="white", mew=0.5, label=name)
    labels = ["mu", "tau", *(f"theta {j + 1}" for j in range(len(Y)))]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) + 1.6, -0.8)
    ax.set(xlabel="points of the test", title="median, 50 % and 90 % intervals")
    ax.legend(fontsize="x-small", loc="lower center", ncols=2)


def funnel(ax, nuts, draws, name, shown=1000):
    """Draws of a guide over those of NUTS."""
    for source, color, label in ((nuts, "#BBBBBB", "NUTS"), (draws, BLUE, name)):
        pick = np.linspace(0, len(source["tau"]) - 1, shown).astype(int)
        theta, log_tau = source["theta"][pick, 0], np.log(source["tau"][pick])
        ax.plot(theta, log_tau, ".", color=color, ms=3, alpha=0.6, label=label)
    ax.set(xlim=(-15, 35), ylim=(-4, 4), xlabel="theta 1", ylabel="log tau", title=name)
    ax.legend(fontsize="x-small", loc="lower right", markerscale=2)


def write(folder, numbers, guides, nuts):
    """The picture and the numbers, each written aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = picture(guides, nuts)
    writers = {
        "eight_schools.png": lambda path: figure.savefig(path, dpi=120, format="png"),
        "result.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
    }
    for name, save in writers.items():
        aside = folder / f".{name}.part"
        save(aside)
        os.replace(aside, folder / name)
    return [folder / name for name in writers]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/eight_schools"))
    args = parser.parse_args()
    args.chains, args.warmup, args.draws = (2, 10, 20) if args.smoke else (4, 300, 500)
    args.base_steps, args.steps = (5, 3) if args.smoke else (2_000, 500)
    args.num_timesteps = 3 if args.smoke else 16
    args.held, args.read = (50, 50) if args.smoke else (1_000, 4_000)
    args.mode_timesteps, args.mode_steps = (2, 3) if args.smoke else (8, 500)
    return args


if __name__ == "__main__":
    main()
