r"""Simulation-based inference: the posterior of a simulator's parameters, from simulations alone.

The script draws pairs of parameters θ from the prior and observations x from the simulator, and fits a
conditional diffusion model of p(θ∣x) to them. No likelihood is evaluated. The parameters are mapped to the
real line, so that the prior is a standard normal there: a box by the inverse of the normal distribution
function, and normal parameters by their mean and standard deviation. The observation is the context. The
estimates of three networks are averaged. All tasks have the same settings.

The model gives draws for any observation by ``ODESampler``, and log q(θ∣x) by the flow. On new simulations
the script reports the conditional bound, the ranks of the true parameters among draws (simulation-based
calibration) and the expected coverage. The exact posteriors of two tasks are known: N(x/2, 0.05 I) for the
default one, and that of two moons. There the script also reports the KL divergence from the exact posterior.

    python examples/simulation_based_inference.py [--task two_moons] [--simulations 10000]
        [--data FOLDER] [--c2st-draws 10000] [--plot posterior.png] [--arviz posterior.nc]
        [--device cuda] [--seed 0] [--smoke] [--output outputs/sbi]

With ``--data FOLDER`` the draws are compared with the reference posteriors of Lueckmann et al. (2021),
https://arxiv.org/abs/2101.04653, in the files ``TASK.npz`` of that folder: arrays ``x_1``, ``posterior_1``, …
A classifier tries to tell draws from reference draws. Its accuracy (C2ST) is 0.5 for a perfect posterior.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import arviz as az
import matplotlib
import numpy as np
import pyro
import torch
from scipy import stats
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch.distributions import ComposeTransform, Independent, MultivariateNormal, Normal, Uniform
from torch.distributions.transforms import AffineTransform, CumulativeDistributionTransform

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LogSNRSchedule,
    NeuralDenoiser,
    ODESampler,
    PosteriorVariance,
    Standardize,
    VelocityPrediction,
    evaluate_bound,
    expected_coverage,
    fit,
    ode_log_likelihood,
    plot_pit,
    randomized_pit,
)
from pyro_diffusion.arviz_bridge import as_arviz

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VARIANCE = 0.1  # of the prior and of the noise of the Gaussian task
LEVELS = (0.5, 0.8, 0.95)  # of the credible regions whose coverage is printed


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    task, start = TASKS[args.task], time.perf_counter()
    theta, x = task.pairs(args.simulations, args.device)
    posterior, fits = learn(task, theta, x, args)
    print(f"{args.task}: {args.simulations:,} simulations, {time.perf_counter() - start:.0f} s")
    for fitted in fits:
        print(
            f"  a network: best at step {fitted.best.step:,}, bound {fitted.best.bound} nats per θ"
        )
    numbers = {"task": args.task, "simulations": args.simulations}
    numbers |= score(task, posterior, args)
    calibration = calibrate(task, posterior, args)
    observed = reference(args)
    if args.data is not None:
        numbers["c2st"] = compare(posterior, observed, args)
    paths = write(args, posterior, observed[0], calibration, numbers)
    print("wrote " + ", ".join(map(str, paths)))


class Task(NamedTuple):
    """A prior and a simulator: uniform parameters in (−w, w), or normal ones if there is no width w."""

    simulate: Callable
    num_parameters: int
    half_width: float | None = None
    exact: Callable | None = None  # the posterior given observations, where it is known

    @property
    def prior(self):
        """The distribution of θ."""
        zeros = torch.zeros(self.num_parameters)
        if self.half_width is None:
            return Independent(Normal(zeros, VARIANCE**0.5), 1)
        return Independent(Uniform(zeros - self.half_width, zeros + self.half_width), 1)

    @property
    def transform(self):
        """The bijection from the support of the prior to the real line that makes the prior N(0, I)."""
        if self.half_width is None:
            return Standardize(self.prior.mean, self.prior.stddev)
        to_unit = AffineTransform(0.5, 0.5 / self.half_width)
        return ComposeTransform([to_unit, CumulativeDistributionTransform(Normal(0.0, 1.0)).inv])

    def pairs(self, count, device):
        """Parameters and observations, simulated on the CPU."""
        theta = self.prior.sample((count,))
        if (
            self.half_width is not None
        ):  # float32 may round a draw to the edge, which has no density
            theta = theta.clamp(*((1 - 1e-6) * end for end in (-self.half_width, self.half_width)))
        return theta.to(device), self.simulate(theta).to(device)


def gaussian_linear(theta):
    """x ~ N(θ, 0.1 I)."""
    return theta + VARIANCE**0.5 * torch.randn_like(theta)


def gaussian_posterior(x):
    """The exact p(θ∣x) = N(x/2, 0.05 I) of the Gaussian task."""
    return Independent(Normal(x / 2, (VARIANCE / 2) ** 0.5), 1)


def two_moons(theta):
    """A point near a half circle, moved by the parameters."""
    shift = torch.stack([-theta.sum(-1).abs(), theta[:, 1] - theta[:, 0]], dim=-1)
    return half_circle(len(theta)) + shift / 2**0.5


def half_circle(count):
    """Points with a uniform angle and a radius near 0.1."""
    a = math.pi * (torch.rand(count) - 0.5)
    r = 0.1 + 0.01 * torch.randn(count)
    return torch.stack([r * a.cos() + 0.25, r * a.sin()], dim=-1)


class TwoMoonsPosterior(NamedTuple):
    """The exact p(θ∣x) of two moons: points of the half circle solved for θ, which has two solutions.

    The solutions are a rotation and a shift of the points, so that their density is that of the points.
    Solutions outside the prior's box are left out.
    """

    x: torch.Tensor

    def sample(self, shape):
        """Draws, ``shape + x.shape``."""
        x = self.x.expand(*shape, *self.x.shape)
        theta, valid = solve(x)
        while not valid.all():
            theta[~valid], valid[~valid] = solve(x[~valid])
        return theta

    def log_prob(self, theta):
        """log p(θ∣x), with the share of the solutions that are in the box by Monte Carlo."""
        valid = solve(self.x.expand(5_000, *self.x.shape))[1].double().mean(0)
        shift = torch.stack([-theta.sum(-1).abs(), theta[..., 1] - theta[..., 0]], dim=-1)
        r = (self.x - shift / 2**0.5 - torch.tensor([0.25, 0.0])).norm(dim=-1)
        return Normal(0.1, 0.01).log_prob(r) - (2 * math.pi * r).log() - valid.log()


def solve(x):
    """θ for which a random point of the half circle gives x, and whether θ exists and is in the box."""
    point = half_circle(x[..., 0].numel()).reshape(x.shape)
    u, v = point[..., 0] - x[..., 0], x[..., 1] - point[..., 1]  # |θ₁ + θ₂|/√2 and (θ₂ − θ₁)/√2
    signed = torch.where(torch.rand_like(u) < 0.5, u, -u)
    theta = torch.stack([signed - v, signed + v], dim=-1) / 2**0.5
    return theta, (u >= 0) & (theta.abs() < 1).all(-1)


def slcp(theta):
    """Four draws of a Gaussian whose mean, standard deviations and correlation are parameters."""
    s_1, s_2, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, theta[:, 4].tanh()
    rows = [torch.stack([s_1**2, rho * s_1 * s_2], -1), torch.stack([rho * s_1 * s_2, s_2**2], -1)]
    covariance = torch.stack(rows, -2) + 1e-6 * torch.eye(2)
    draws = MultivariateNormal(theta[:, :2], covariance).sample((4,))
    return draws.movedim(0, 1).flatten(1)


TASKS = {
    "gaussian_linear": Task(gaussian_linear, 10, exact=gaussian_posterior),
    "two_moons": Task(two_moons, 2, 1.0, TwoMoonsPosterior),
    "slcp": Task(slcp, 5, 3.0),
}


class Average(torch.nn.Module):
    """The mean of several networks."""

    def __init__(self, networks):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, x_t, log_snr, context):
        """Their mean output, which is their mean estimate of θ."""
        return torch.stack([network(x_t, log_snr, context) for network in self.networks]).mean(0)


class Posterior(NamedTuple):
    """q(θ∣x): a diffusion model of θ, and the mean and scale of its context."""

    diffusion: DiffusionModel
    standardize: Standardize

    def sample(self, num_draws, x):
        """Draws for each observation, ``(num_draws, N, P)``."""
        context = self.standardize(x).repeat(num_draws, 1)
        draws = ODESampler(self.diffusion, timesteps=64)(len(context), context=context)
        return draws.reshape(num_draws, len(x), -1)

    def bound(self, theta, x, standard_error):
        """The bound on log q(θ∣x), nats per datum."""
        return evaluate_bound(
            self.diffusion, theta, standard_error=standard_error, context=self.standardize(x)
        ).mean()

    def log_prob(self, theta, x):
        """log q(θ∣x) of the flow, for each pair."""
        with torch.no_grad():
            flow = ode_log_likelihood(self.diffusion, theta, context=self.standardize(x))
        return flow.log_evidence


def learn(task, theta, x, args):
    """Fit networks with different seeds and average them, which has a better bound than one network."""
    standardize, fits, networks = Standardize.from_data(x).to(x.device), [], []
    context, size = standardize(x), task.num_parameters
    for seed in range(args.seed, args.seed + args.num_networks):
        network = MLP(
            (size,), hidden_size=args.hidden_size, num_blocks=3, context_shape=context.shape[1:]
        )
        diffusion = build(task, network).to(x.device)
        fits.append(fit(diffusion, theta, context=context, max_steps=args.num_steps, seed=seed))
        networks.append(network)
    return Posterior(build(task, Average(networks)).to(x.device), standardize), fits


def build(task, network):
    """The diffusion model of θ. Posteriors may be 0.01 wide: the noise of the first state is 0.004."""
    size = (task.num_parameters,)
    schedule = LogSNRSchedule(1000, log_snr_max=11.0, log_snr_min=-8.0)
    prediction, variance = VelocityPrediction(), PosteriorVariance()
    denoiser = NeuralDenoiser(network, schedule, size, prediction=prediction, variance=variance)
    return DiffusionModel(denoiser, transform=task.transform)


def score(task, posterior, args):
    """The bound and the flow's density of new simulations, and the distance from an exact posterior."""
    theta, x = task.pairs(args.num_held_out, args.device)
    bound = posterior.bound(theta, x, args.standard_error)
    few, observed = theta[: args.num_flow], x[: args.num_flow]
    log_q = posterior.log_prob(few, observed).cpu()
    numbers = {
        "bound": bound._asdict(),
        "log_q": mean(log_q),
        "log_prior": mean(task.prior.log_prob(theta.cpu())),
    }
    print(
        f"held out, nats per θ: mean ± sampling error, {len(theta):,} new pairs ({len(few):,} by the flow)"
    )
    print(f"  bound on log q(θ∣x)    {bound.value:.3f} ± {bound.sampling_error:.3f}, and "
          f"± {bound.monte_carlo_error:.3f} Monte Carlo")  # fmt: skip
    print("  log q(θ∣x) by the flow {:.3f} ± {:.3f}".format(*numbers["log_q"]))
    print("  log prior              {:.3f} ± {:.3f}".format(*numbers["log_prior"]))
    if task.exact is not None:
        exact = task.exact(observed.cpu()).log_prob(few.cpu())
        numbers |= {"exact": mean(exact), "kl": mean(exact - log_q)}
        print("  log p(θ∣x), exact      {:.3f} ± {:.3f}".format(*numbers["exact"]))
        print("  KL(exact ‖ q), paired  {:.4f} ± {:.4f}".format(*numbers["kl"]))
    return numbers


def mean(values):
    """The mean over data and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def calibrate(task, posterior, args):
    """Ranks of the true parameters among draws, by coordinate, and the expected coverage."""
    theta, x = task.pairs(args.num_ranked, args.device)
    draws = posterior.sample(args.num_draws, x)
    ranks, credibility = randomized_pit(theta, draws), expected_coverage(theta, draws)
    p_values = [stats.kstest(rank, "uniform").pvalue for rank in ranks.T]
    least = min(1.0, len(p_values) * min(p_values))
    print(
        f"calibration, {len(theta):,} new pairs, {args.num_draws} draws for each; p-values are of uniformity"
    )
    print(
        f"  ranks of {len(p_values)} parameters   smallest p-value, times {len(p_values)}: {least:.2f}"
    )
    shares = {level: (credibility <= level).double().mean().item() for level in LEVELS}
    shown = ", ".join(f"{share:.3f} at {level}" for level, share in shares.items())
    p_value = stats.kstest(credibility, "uniform").pvalue
    print(f"  expected coverage     {shown}; p-value {p_value:.2f}")
    return {"ranks": ranks, "credibility": credibility}


def reference(args):
    """Observations with draws of their posterior: those of the files, or one with an exact posterior."""
    task = TASKS[args.task]
    if args.data is None:
        _, x = task.pairs(1, args.device)
        exact = task.exact and task.exact(x[0].cpu()).sample((args.num_plotted,)).to(args.device)
        return [(x, exact)]
    with np.load(args.data / f"{args.task}.npz") as file:
        count = sum(name.startswith("x_") for name in file)
        pairs = [(file[f"x_{n}"], file[f"posterior_{n}"]) for n in range(1, count + 1)]
    as_tensors = [[torch.tensor(part, device=args.device) for part in pair] for pair in pairs]
    return [(x[None], draws[: args.c2st_draws]) for x, draws in as_tensors]


def compare(posterior, observed, args):
    """C2ST of every observation, against its reference posterior."""
    scores = [c2st(posterior.sample(len(draws), x)[:, 0], draws) for x, draws in observed]
    shown = " ".join(f"{score:.3f}" for score in scores)
    print(
        f"C2ST, {len(observed[0][1]):,} draws      {np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f} "
        f"(sd over {len(scores)} observations: {shown})"
    )
    return scores


def c2st(draws, reference):
    """Cross-validated accuracy of a classifier that tells draws from reference draws: 0.5 is perfect."""
    draws, reference = draws.double().cpu().numpy(), reference.double().cpu().numpy()
    both = np.concatenate([reference, draws])
    label = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * reference.shape[1]
    network = MLPClassifier((width, width), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    scaled = (both - reference.mean(0)) / reference.std(0)
    return cross_val_score(network, scaled, label, cv=folds, scoring="accuracy").mean()


def write(args, posterior, observed, calibration, numbers):
    """The picture, the draws for ArviZ and the numbers; each is written aside and renamed."""
    x, known = observed
    draws = posterior.sample(args.num_plotted, x)[:, 0]
    tree = labelled(draws, x)
    known = None if known is None else labelled(known[: args.num_plotted], x)
    writers = {
        args.plot: lambda path: picture(tree, known, calibration).savefig(
            path, dpi=120, format="png"
        ),
        args.arviz: lambda path: tree.to_netcdf(str(path)),
        args.output / "result.json": lambda path: path.write_text(
            json.dumps(numbers, indent=2) + "\n"
        ),
    }
    for path, save in writers.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        save(aside)
        os.replace(aside, path)
    return list(writers)


def labelled(draws, x):
    """Draws of the posterior for one observation as ArviZ takes them."""
    posterior = {
        f"theta_{n}": theta.cpu().numpy()[None] for n, theta in enumerate(draws.T, start=1)
    }
    return as_arviz({
        "posterior": az.convert_to_dataset(posterior),
        "observed_data": az.convert_to_dataset({"x": x[0].cpu().numpy()[None, None]}),
    })  # fmt: skip


def picture(tree, known, calibration):
    """Draws for one observation, with reference draws above the diagonal; ranks and coverage."""
    fig = plt.figure(figsize=(11, 5.2), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1.25, 1))
    names = list(tree.posterior.data_vars)[:4]
    axes = left.subplots(len(names), len(names), squeeze=False)
    dots = {"s": 2, "alpha": 0.3, "edgecolors": "none"}
    for colour, size, drawn in (("C1", 0, known), ("C0", 2, tree)):
        if drawn is not None:
            az.plot_pair(
                drawn, var_names=names, marginals=True, ax=axes, textsize=9,
                scatter_kwargs={"color": colour, **dots, "s": size}, marginal_kwargs={"color": colour},
            )  # fmt: skip
    title = "draws for one observation (blue)" + (known is not None) * ", reference (orange)"
    for n, m in np.argwhere(np.tri(len(names), k=-1)) if known is not None else ():
        mirrored, ours = left.add_subplot(axes[m, n].get_subplotspec()), axes[n, m]
        mirrored.scatter(known.posterior[names[n]], known.posterior[names[m]], color="C1", **dots)
        mirrored.set(xlim=ours.get_ylim(), ylim=ours.get_xlim(), xticks=[], yticks=[])
    left.suptitle(title, fontsize="medium")
    ranks, coverage = right.subplots(2, 1)
    for rank in calibration["ranks"].T:
        plot_pit(rank, ranks)
    for band in ranks.collections[1:]:  # the same for each parameter
        band.remove()
    plot_pit(calibration["credibility"], coverage)
    ranks.set_title("ranks of each parameter", fontsize="medium")
    coverage.set_title("expected coverage", fontsize="medium")
    return fig


def parse_arguments(options=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="gaussian_linear")
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--steps", type=int, help="of each network; 12,000 by default")
    parser.add_argument("--data", type=Path, help="folder of the reference posteriors")
    parser.add_argument("--c2st-draws", type=int, default=10_000)
    parser.add_argument("--plot", type=Path, help="the picture; by default in the output folder")
    parser.add_argument("--arviz", type=Path, help="draws for ArviZ, a netCDF file; likewise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/sbi"))
    args = parser.parse_args(options)
    args.plot = args.plot or args.output / "posterior.png"
    args.arviz = args.arviz or args.output / "posterior.nc"
    args.num_steps = args.steps or (30 if args.smoke else 12_000)
    args.num_networks = 2 if args.smoke else 3
    args.hidden_size = 16 if args.smoke else 128
    args.simulations = 200 if args.smoke else args.simulations
    args.c2st_draws = 50 if args.smoke else args.c2st_draws
    args.num_held_out = 50 if args.smoke else 2_000
    args.num_flow = 5 if args.smoke else 500
    args.standard_error = 0.5 if args.smoke else 0.02
    args.num_ranked = 20 if args.smoke else 300
    args.num_draws = 9 if args.smoke else 99
    args.num_plotted = 50 if args.smoke else 2_000
    return args


if __name__ == "__main__":
    main()
