r"""How good is a diffusion chain as the guide of a Pyro model, beside Pyro's own guides?

Eight targets are plain Pyro models:

- mixture: two Gaussians in ten dimensions, weights 0.3 and 0.7, means 3 and -3 on the first two axes,
  standard deviations 0.7 and 0.5;
- funnel: Neal's, v ~ N(0, 3²) and nine x ~ N(0, exp v);
- banana: x ~ N(0, 3²), y ~ N(0.3 (x² - 9), 1), and three N(0, 1);
- forty: 40 Gaussians of equal weights in two dimensions, means uniform in [-40, 40]², standard deviations
  1.31;
- brownian: a random walk of 30 steps, seen at 20 of them, with unknown scales of steps and noise (the data of
  inference_gym's ``BrownianMotionUnknownScalesMissingMiddleObservations``);
- schools: eight schools, centred;
- manywell: 16 independent pairs with two modes each, of unequal weights, 65,536 modes together;
- logistic: logistic regression on scikit-learn's breast cancer data, 31 coefficients.

Every guide has the same seconds of one thread's process time, because other jobs may run on the machine. The
learning rate is constant for half of them and falls linearly to a twentieth in the other half. Entries of
the gradients are clipped at 10, as in ``ClippedAdam``. The learning rates of AutoDiffusion and its broad
starts were chosen by short runs with seed 0; those of Pyro's guides were not tuned. The parameters with the
best bound in ten paired comparisons are kept (``KeepBest``), and their time counts. AutoIAFNormal has one,
two or four transforms, chosen by the bound of three runs of a sixth of the seconds, which do not count.

AutoDiffusion is run on two bases. One is AutoDiagonalNormal. The other is the best of the other three guides
by the bound of the same seed. The base is fitted for a fifth of the seconds, or half if it is the best,
and base and chain are fitted together for the rest. For the mixtures the run on the diagonal base begins
broad, with a base that is not trained: the variance of log-weights (``LogVarianceELBO``, 512 draws) is
minimised for 90 % of the seconds, and the bound for the rest, and no state is kept but the last.

The bound and log Z are of 2,000 draws, with Pareto k and the effective sample size of the weights. Errors of
moments are those of the draws without weights, in exact standard deviations. For the funnel they are moments
of v and log |x|, for positive latents of their logarithms. The moments are exact: from a million exact draws,
in closed form or by quadrature; for logistic they are those of NUTS. The distance of mode weights is half the
sum of absolute differences between exact weights and shares of the draws. For forty, 2,000 exact draws have
a distance of about 0.06. NUTS from one start says how many of the 40 modes one chain finds. The gain
is the paired difference of the bounds of AutoDiffusion at the end and at its start, which is the fitted base.
A gain of zero means that ``KeepBest`` found no better state than the start. The file that is kept has 25
seconds for each guide and seed 0, measured while other jobs ran.

``compile_elbo`` is not used: a compiled step of AutoDiffusion is seven times as fast (3.9 and 28.7 ms on the
funnel with 16 draws), but compilation takes 46 seconds of process time here.

    OMP_NUM_THREADS=1 python benchmarks/autoguide.py [--seconds 60] [--seeds 0 1 2] [--targets funnel …]
        [--guides AutoDiffusion …] [--again] [--smoke] [--output benchmarks/results]

The file of results is written after every run, and a run that it holds is left out; ``--again`` measures it
again.

References:
    Denoising Diffusion Samplers (Vargas et al., 2023). https://arxiv.org/abs/2302.13834
    Flow Annealed Importance Sampling Bootstrap (Midgley et al., 2023; the 40 modes and the many wells).
    https://arxiv.org/abs/2208.01893
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_feasible

from pyro_diffusion.diagnostics import to_arviz
from pyro_diffusion.inference.autoguide import AutoDiffusion
from pyro_diffusion.training import KeepBest, LogVarianceELBO

DIAGONAL, FULL, FLOW = "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoIAFNormal"
CHAIN, BEST = "AutoDiffusion", "AutoDiffusion, best base"
GUIDES = (DIAGONAL, FULL, FLOW, CHAIN, BEST)
#: Learning rates by guide, chosen by runs of ten seconds.
RATES = {DIAGONAL: 1e-2, FULL: 1e-2, FLOW: 3e-3, CHAIN: 5e-3, BEST: 2e-3}
PARTICLES, MANY = 64, 512  #: draws of a step: of the bound, and of the variance of log-weights
FITTED = {CHAIN: 0.2, BEST: 0.5}  #: part of the seconds in which the base alone is fitted
BROAD = 0.9  #: part of the seconds in which the variance of log-weights is minimised
BROAD_RATES = {2.0: 1e-2, 25.0: 2e-3}  #: learning rates of broad starts, by their scale

Y_BROWNIAN = [
    0.21592641, 0.118771404, -0.07945447, 0.037677474, -0.27885845, -0.1484156, -0.3250906, -0.22957903,
    -0.44110894, -0.09830782, -0.8786016, -0.83736074, -0.7384849, -0.8939254, -0.7774566, -0.70238715,
    -0.87771565, -0.51853573, -0.6948214, -0.6202789,
]  # fmt: skip
SEEN = [*range(10), *range(20, 30)]
SCHOOLS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
SCHOOLS_SD = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


# targets


def normal(name, loc, scale, num):
    """A vector of normals of one scale."""
    scale = torch.as_tensor(scale)[..., None].expand(*torch.as_tensor(scale).shape, num)
    return pyro.sample(name, dist.Normal(loc, scale).to_event(1))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    normal("x", 0.0, (v / 2).exp(), 9)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(0.3 * (x.square() - 9), 1.0))
    normal("rest", 0.0, 1.0, 3)


@cache
def components(name):
    """Means (M, d), standard deviations (M,) and weights (M,) of the components of a mixture."""
    if name == "mixture":
        means = torch.zeros(2, 10)
        means[0, :2], means[1, :2] = 3.0, -3.0
        return means, torch.tensor([0.7, 0.5]), torch.tensor([0.3, 0.7])
    means = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 40
    return means, torch.full((40,), math.log1p(math.e)), torch.full((40,), 1 / 40)


def gaussians(name):
    """The model of a mixture."""
    means, sds, weights = components(name)
    pyro.sample("z", dist.MixtureOfDiagNormals(means, sds[:, None].expand_as(means), weights.log()))


def brownian():
    alpha = pyro.sample("alpha", dist.LogNormal(0.0, 2.0))
    beta = pyro.sample("beta", dist.LogNormal(0.0, 2.0))
    steps = dist.Normal(0.0, alpha[..., None].expand(*alpha.shape, 30)).to_event(1)
    walk = LowerCholeskyAffine(torch.zeros(30), torch.ones(30, 30).tril())
    x = pyro.sample("x", dist.TransformedDistribution(steps, walk))
    y = torch.tensor(Y_BROWNIAN)
    pyro.sample("y", dist.Normal(x[..., SEEN], beta[..., None]).to_event(1), obs=y)


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    theta = normal("theta", mu[..., None], tau, 8)
    y, sd = torch.tensor(SCHOOLS), torch.tensor(SCHOOLS_SD)
    pyro.sample("y", dist.Normal(theta, sd).to_event(1), obs=y)


def wells(d):
    """Log-density of the first number of a pair, not normalised."""
    return d / 2 + 6 * d.square() - d**4


def manywell():
    start = dist.Normal(torch.zeros(32), 1.0).to_event(1)
    z = pyro.sample("z", start)
    d, v = z[..., :16], z[..., 16:]
    pyro.factor("wells", (wells(d) - v.square() / 2).sum(-1) - start.log_prob(z))


@cache
def cancer():
    """Standardised features with a column of ones (569, 31), and labels."""
    from sklearn.datasets import load_breast_cancer

    x, y = (torch.as_tensor(values).float() for values in load_breast_cancer(return_X_y=True))
    return torch.cat([torch.ones(len(x), 1), (x - x.mean(0)) / x.std(0)], 1), y


def logistic():
    x, y = cancer()
    w = normal("w", 0.0, 1.0, 31)
    pyro.sample("y", dist.Bernoulli(logits=w @ x.mT).to_event(1), obs=y)


# exact answers


def of_draws(model, statistics, num=1_000_000):
    """Means and standard deviations, from exact draws of a model without data."""
    pyro.set_rng_seed(1)
    with pyro.plate("draws", num), pyro.poutine.trace() as tracer:
        model()
    sites = {n: s["value"] for n, s in tracer.trace.nodes.items() if s["type"] == "sample"}
    values = statistics(sites).double()
    return 0.0, values.mean(0), values.std(0)


def integrate(log_joint, area, mean, variance):
    """Log Z, means and standard deviations of a mixture of normals over a grid of its parameters.

    Args:
        log_joint: Log-density of parameters and data at the points of the grid, (G,).
        area: Area of a cell.
        mean: Means given the parameters, (G, m).
        variance: Variances given the parameters, (G, m).
    """
    weights = torch.softmax(log_joint, 0)
    first = weights @ mean
    second = weights @ (variance + (mean - first).square())
    return torch.logsumexp(log_joint, 0).item() + math.log(area), first, second.sqrt()


def exact_brownian():
    a, b = torch.cartesian_prod(*[torch.arange(-8.0, 6.0, 0.05).double()] * 2).T
    alpha2, beta2 = (2 * a)[:, None].exp(), (2 * b)[:, None].exp()
    index = torch.arange(1, 31).double()
    whole = torch.minimum(index[:, None], index)
    values, vectors = torch.linalg.eigh(whole[SEEN][:, SEEN])
    spread = alpha2 * values + beta2  # eigenvalues of the covariance of y, (G, 20)
    y = vectors.mT @ torch.tensor(Y_BROWNIAN).double()
    gain = whole[:, SEEN] @ vectors  # (30, 20)
    prior = dist.Normal(0.0, 2.0)
    log_joint = (
        dist.Normal(0.0, spread.sqrt()).log_prob(y).sum(1) + prior.log_prob(a) + prior.log_prob(b)
    )
    x = alpha2 * ((y / spread) @ gain.mT)
    variance = alpha2 * whole.diagonal() - alpha2.square() * (1 / spread @ gain.square().mT)
    mean = torch.cat([a[:, None], b[:, None], x], 1)
    zeros = torch.zeros(len(a), 2).double()
    return integrate(log_joint, 0.05**2, mean, torch.cat([zeros, variance.clamp(min=0)], 1))


def exact_schools():
    log_tau, mu = torch.arange(-14.0, 9.0, 0.05).double(), torch.arange(-45.0, 45.0, 0.25).double()
    s, m = torch.cartesian_prod(log_tau, mu).T[:, :, None]
    y, sd = torch.tensor(SCHOOLS).double(), torch.tensor(SCHOOLS_SD).double()
    tau = s.exp()
    log_joint = dist.Normal(m, (sd.square() + tau.square()).sqrt()).log_prob(y).sum(1)
    log_joint += (dist.Normal(0.0, 5.0).log_prob(m) + dist.HalfCauchy(5.0).log_prob(tau) + s)[:, 0]
    precision = sd**-2 + tau**-2
    theta = (y / sd.square() + m / tau.square()) / precision
    none = torch.zeros_like(s)
    return integrate(
        log_joint, 0.05 * 0.25, torch.cat([m, s, theta], 1), torch.cat([none, none, 1 / precision], 1)
    )  # fmt: skip


def exact_manywell():
    d = torch.arange(-5.0, 5.0, 0.001).double()
    log_z, mean, sd = integrate(wells(d), 0.001, d[:, None], torch.zeros(len(d), 1).double())
    zeros = torch.zeros(16).double()
    return (
        16 * (log_z + math.log(2 * math.pi) / 2),
        torch.cat([mean.expand(16), zeros]), torch.cat([sd.expand(16), zeros + 1]),
    )  # fmt: skip


def nuts(model, num, seed=0):
    """Draws of one chain of NUTS by site."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    chain = MCMC(kernel, num_samples=num, warmup_steps=num // 2, disable_progbar=True)
    chain.run()
    return chain.get_samples()


def exact_logistic(num=2000):
    """The moments of NUTS; the evidence is not known."""
    w = nuts(logistic, num)["w"].double()
    return None, w.mean(0), w.std(0)


class Target(NamedTuple):
    """A model and what is known of it."""

    model: Callable[[], Any]
    statistics: Callable[[dict[str, torch.Tensor]], torch.Tensor]  #: of draws, (K, m)
    exact: Callable[
        [], tuple[Any, ...]
    ]  #: log Z, and means and standard deviations of the statistics
    broad: float | None = None  #: scale of a broad start, for a target of several modes


def columns(*names):
    """Statistics that are the latents, those of ``log …`` by their logarithms."""

    def read(z):
        parts = [z[n.removeprefix("log ")] for n in names]
        parts = [
            p.abs().clamp(min=1e-30).log() if n.startswith("log ") else p
            for n, p in zip(names, parts, strict=True)
        ]
        return torch.cat([p if p.dim() > 1 else p[:, None] for p in parts], 1)

    return read


def drawn(model, *names, broad=None):
    """A target that can be sampled, with log Z = 0."""
    return Target(model, columns(*names), partial(of_draws, model, columns(*names)), broad)


TARGETS = {
    "mixture": drawn(partial(gaussians, "mixture"), "z", broad=2.0),
    "funnel": drawn(funnel, "v", "log x"),
    "banana": drawn(banana, "x", "y", "rest"),
    "forty": drawn(partial(gaussians, "forty"), "z", broad=25.0),
    "brownian": Target(brownian, columns("log alpha", "log beta", "x"), exact_brownian),
    "schools": Target(schools, columns("mu", "log tau", "theta"), exact_schools),
    "manywell": Target(manywell, columns("z"), exact_manywell),
    "logistic": Target(logistic, columns("w"), exact_logistic),
}


# training


class Run:
    """Fit guides within a number of seconds of process time."""

    def __init__(self, model, seconds, rate):
        self.model, self.seconds, self.rate = model, seconds, rate
        self.start, self.steps, self.gradients = time.process_time(), 0, 0

    @property
    def passed(self):
        """Part of the seconds that has passed."""
        return (time.process_time() - self.start) / self.seconds

    def fit(self, guide, elbo, end, *, keep=True, rate=None):
        """Train until a part of the seconds has passed; returns the paired gain over the start."""
        guide()
        begin, loss = self.passed, elbo(self.model, guide)
        parameters = [p for p in loss.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters)
        best, first = (
            (KeepBest(self.model, guide, max_plate_nesting=0) for _ in range(2))
            if keep
            else (None,) * 2
        )
        cost = 1 + guide.drift.schedule.num_timesteps if isinstance(guide, AutoDiffusion) else 1
        compared = 0
        while self.passed < end:
            done = (self.passed - begin) / (end - begin)
            for group in optimizer.param_groups:
                group["lr"] = (rate or self.rate) * min(1.0, max(2 * (1 - done), 0.05))
            optimizer.zero_grad()
            loss().backward()
            if all(p.grad is None or p.grad.isfinite().all() for p in parameters):
                torch.nn.utils.clip_grad_value_(parameters, 10.0)
                optimizer.step()
            self.steps, self.gradients = self.steps + 1, self.gradients + cost * elbo.num_particles
            if keep and int(10 * done) > compared:
                best.update()
                compared = int(10 * done)
        if not keep:
            return None
        best.update()
        best.restore()
        return first.update()


def settings(number, kind=Trace_ELBO):
    """An objective with its draws in a plate."""
    return kind(num_particles=number, vectorize_particles=True, max_plate_nesting=0)


def plain(name, target, args):
    """Pyro's guide; AutoIAFNormal with the best number of transforms."""
    kinds = {DIAGONAL: AutoDiagonalNormal, FULL: AutoMultivariateNormal}
    if name in kinds:
        return kinds[name](target.model), {}
    bounds = {}
    for number in (1, 2, 4):
        guide = AutoIAFNormal(target.model, num_transforms=number)
        Run(target.model, args.seconds / 6, RATES[FLOW]).fit(guide, settings(PARTICLES), 1.0)
        bounds[number] = read(guide, args)["bound"]
    number = max(bounds, key=bounds.get)
    return AutoIAFNormal(target.model, num_transforms=number), {
        "transforms": number,
        "bounds": bounds,
    }


def broad(target, run, args):
    """AutoDiffusion from a broad start: the variance of log-weights first, and then the bound."""
    guide = AutoDiffusion(
        target.model, args.num_timesteps, partial(AutoDiagonalNormal, init_scale=1.0), target.broad,
        init_loc_fn=init_to_feasible,
    )  # fmt: skip
    guide()
    guide.base.requires_grad_(False)
    rate = BROAD_RATES[target.broad]
    run.fit(guide, settings(args.many, LogVarianceELBO), BROAD, keep=False, rate=rate)
    run.fit(guide, settings(args.many), 1.0, keep=False, rate=rate / 10)
    return guide, {"base": "broad", "broad": [target.broad, BROAD, rate]}


def chain(name, target, rows, run, args):
    """AutoDiffusion on a base that is fitted first."""
    others = [row for row in rows if row["guide"] in GUIDES[:3]]
    if not others and name == BEST:
        raise SystemExit(f"{BEST} needs the rows of the other guides: add them to --guides")
    best = max(others, key=lambda row: row["bound"]) if name == BEST else {"guide": DIAGONAL}
    kinds = {
        DIAGONAL: AutoDiagonalNormal, FULL: AutoMultivariateNormal,
        FLOW: partial(AutoIAFNormal, num_transforms=best.get("transforms")),
    }  # fmt: skip
    base = kinds[best["guide"]](target.model)
    run.fit(base, settings(PARTICLES), FITTED[name], rate=RATES[best["guide"]])
    guide = AutoDiffusion(target.model, args.num_timesteps, base)
    gain = run.fit(guide, settings(PARTICLES), 1.0)
    return guide, {"base": best["guide"], "gain": [gain.value, gain.standard_error]}


# measurements


def read(guide, args):
    """Bound, log Z, Pareto k, effective draws per draw; and the draws with their log-weights."""
    tree = to_arviz(guide, num_draws=args.num_draws, max_plate_nesting=0, progress=False)
    found = {name: tree["importance"][name].item() for name in tree["importance"].data_vars}
    draws = {n: torch.as_tensor(x.values[0]) for n, x in tree["posterior"].data_vars.items()}
    weights = torch.as_tensor(tree["sample_stats"]["log_weight"].values[0])
    return {
        "bound": found["elbo"], "bound_error": found["elbo_standard_error"],
        "log_z": found["evidence"], "log_z_error": found["evidence_standard_error"],
        "pareto_k": found["pareto_k"], "ess": found["ess"] / args.num_draws,
        "draws": draws, "log_weights": weights,
    }  # fmt: skip


def measure(name, guide_name, seed, found, args):
    """One run: a guide is fitted to a target, and read."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    target = TARGETS[name]
    rows = [r for r in found["rows"] if (r["target"], r["seed"]) == (name, seed)]
    fixed = plain(guide_name, target, args) if guide_name in GUIDES[:3] else None
    run = Run(target.model, args.seconds, RATES[guide_name])
    if fixed:
        guide, notes = fixed
        run.fit(guide, settings(PARTICLES), 1.0)
    elif target.broad and guide_name == CHAIN:
        guide, notes = broad(target, run, args)
    else:
        guide, notes = chain(guide_name, target, rows, run, args)
    seconds = time.process_time() - run.start
    got = read(guide, args)
    draws, log_weights = got.pop("draws"), got.pop("log_weights")
    got |= moments(target.statistics(draws), log_weights, found["references"][name])
    if target.broad:
        got |= modes(name, draws["z"], log_weights)
    counts = {"steps": run.steps, "gradients": run.gradients, "seconds": round(seconds, 1)}
    return {"target": name, "guide": guide_name, "seed": seed} | got | counts | notes


def moments(values, log_weights, exact):
    """The worst errors of means and standard deviations, of draws as they are and weighted."""
    mean, sd = (torch.tensor(exact[key]).double() for key in ("mean", "sd"))
    values, weights = values.double(), torch.softmax(log_weights.double(), 0)
    ratio = (values.std(0) / sd).log()
    weighted = weights @ values
    error = (weights.square() @ (values - weighted).square()).sqrt()
    return {
        "mean_error": ((values.mean(0) - mean) / sd).abs().max().item(),
        "sd_ratio": ratio[ratio.abs().argmax()].exp().item(),
        "weighted_mean_error": ((weighted - mean) / sd).abs().max().item(),
        "weighted_z": ((weighted - mean) / error).square().mean().sqrt().item(),
    }


def modes(name, z, log_weights=None):
    """Shares of the draws by mode, number of modes that are found, and distance from the weights."""
    means, sds, weights = components(name)
    normals = dist.Normal(means, sds[:, None]).to_event(1)
    shares = torch.softmax(normals.log_prob(z[:, None]) + weights.log(), 1)
    found = shares.mean(0)
    result = {
        "distance": ((found - weights).abs().sum() / 2).item(),
        "modes": int((found > 0.1 * weights).sum()),
        "shares": found.tolist(),
    }
    if log_weights is not None:
        weighted = torch.softmax(log_weights.double(), 0) @ shares.double()
        result["weighted_distance"] = ((weighted - weights).abs().sum() / 2).item()
    return result


def reference(name, args):
    """What is known of a target, as numbers; and for the 40 modes what NUTS finds."""
    target = TARGETS[name]
    start = time.process_time()
    log_z, mean, sd = exact_logistic(args.num_nuts) if name == "logistic" else target.exact()
    known = {"log_z": log_z, "mean": mean.tolist(), "sd": sd.tolist()}
    if name == "forty":
        known["nuts"] = modes(name, nuts(target.model, args.num_nuts)["z"])
    return known | {"seconds": round(time.process_time() - start, 1)}


# report

TITLE = (
    "| target | guide | seed | bound | log Z, error | k | ESS | mean | sd | modes | gain | steps |\n"
    + "|---" * 12 + "|"
)  # fmt: skip


def markdown(r, known):
    shift = known["log_z"] or 0.0
    modes = f"{r['modes']}, {r['distance']:.3f}" if "modes" in r else "–"
    gain = "{:+.3f} ± {:.3f}".format(*r["gain"]) if "gain" in r else "–"
    kind = f"{r['guide']} {r.get('transforms', '')}".strip()
    return (
        f"| {r['target']} | {kind} | {r['seed']} | {r['bound']:.3f} ± {r['bound_error']:.3f} "
        f"| {r['log_z'] - shift:+.3f} ± {r['log_z_error']:.3f} | {r['pareto_k']:.2f} | {r['ess']:.1%} "
        f"| {r['mean_error']:.2f} | {r['sd_ratio']:.2f} | {modes} | {gain} | {r['steps']:,} |"
    )


def kept(path, args):
    """What the file of results holds already, if it was measured with the same settings."""
    names = ("seconds", "num_timesteps", "num_draws")
    now = {name: getattr(args, name) for name in names} | {
        "rates": RATES,
        "particles": [PARTICLES, args.many],
    }
    found = json.loads(path.read_text()) if path.exists() else {}
    other = [name for name in now if found.get("rows") and found.get(name) != now[name]]
    if other:
        raise SystemExit(f"{path} has numbers with another {', '.join(other)}: pass --output")
    machine = {
        "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
        "device": args.device,
    }  # fmt: skip
    return {"references": {}, "rows": []} | found | now | machine


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(".autoguide.json.part")
    aside.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(aside, path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="process time of a guide")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--guides", nargs="*", choices=GUIDES, default=GUIDES)
    parser.add_argument("--again", action="store_true", help="measure what the file holds again")
    parser.add_argument("--device", default="cpu", help="the processor, whatever it says")
    parser.add_argument("--smoke", action="store_true", help="hours of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_timesteps, args.num_draws, args.many, args.num_nuts = 16, 2000, MANY, 2000
    if args.smoke:
        args.num_timesteps, args.num_draws, args.many, args.num_nuts = 4, 100, 32, 20
        args.seconds, args.seeds, args.targets = 0.2, [0], ["mixture", "schools"]
    return args


def main():
    args = parse_arguments()
    args.device = "cpu"  # steps of a few milliseconds, which a GPU does not shorten
    torch.set_num_threads(1)
    path = args.output / "autoguide.json"
    found = kept(path, args)
    print(TITLE)
    for seed in args.seeds:
        for name in args.targets:
            if name not in found["references"]:
                found["references"][name] = reference(name, args)
            for guide in args.guides:
                key = (name, guide, seed)
                others = [r for r in found["rows"] if (r["target"], r["guide"], r["seed"]) != key]
                if len(others) < len(found["rows"]) and not args.again:
                    continue
                row = measure(name, guide, seed, found, args)
                found["rows"] = [*others, row]
                write(path, found)
                print(markdown(row, found["references"][name]), flush=True)
    write(path, found)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
