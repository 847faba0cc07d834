r"""Deblur a digit of unknown noise by two routes, and lay both posteriors over one another.

A handwritten digit x of 8×8 pixels was blurred, and got Gaussian noise of an unknown standard deviation σ:

    y = A x + σ n,   n ~ N(0, I),   log σ ~ N(0, 1),   x ~ p(x) .

A is a known kernel of 3×3 weights. The prior p(x) is a diffusion model of digits. Its data are the digits of
scikit-learn with uniform noise on each grey level, split as in ``inpainting.py``. It has no likelihood of
levels, because the flow has none. Its transform is a standardisation of each pixel and no logit, so that y is
linear in the model's own units. Both routes get the same network, the same y and the same prior of σ:

    flow and NUTS     x is the site ``flow(diffusion)`` of a Pyro program. With ``TransformReparam``, stock
                      NUTS moves in the 64 normal numbers behind x and in σ together.
    chain and grid    ``posterior_samples`` gives log p(y∣σ) and draws of x at each σ of a grid. Bayes' rule
                      weights the levels, and the draws of x are mixed by these weights.

The script prints the posterior of σ, the pixels' means and standard deviations by both routes with Monte
Carlo errors, how often the intervals hold the true pixels, and the seconds of each. A difference beyond the
errors is one of the *laws*. The law of the flow is not that of the chain, unless the score is exact and T is
infinite. The script looks at three possible reasons:

    steps of the flow  the draws of NUTS are weighted for a flow with four times as many steps
    the two priors     standard deviations of pixels in draws of the flow and of the chain, over those of the
                       held-out images; no measurement is involved
    Monte Carlo        effective particles, k̂, R-hat, divergences

In the run of the gallery the posteriors of σ agree within 0.5 Monte Carlo errors. The means of the pixels
differ by 1.8 of their errors in the root mean square, where 1 is expected of one law. That is 0.17 posterior
standard deviations. Four of the nine levels of the grid have k̂ between 0.95 and 1.11, among them the one with
most of the posterior, so that the errors of the grid are not reliable. The steps of the flow hardly matter.
The two priors are not the same law: the chain of 32 steps is narrower, and both are narrower than held-out
images. One image and one seed do not tell which part of the 0.17 comes from the laws, and which part from
Monte Carlo errors that 8 runs and 2 chains understate.

The network is the one of ``inpainting.py``, anchored to a Gaussian where noise dominates, because
``posterior_samples`` also uses its derivatives.

    python examples/inverse_problem.py [--device cuda] [--seed 0] [--image 0] [--noise 1.5] [--grid 1.0 2.6]
        [--smoke] [--output outputs/inverse_problem]

A second run with the same output folder reads the fitted model from there.
"""

import argparse
import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from inpainting import AnchoredNetwork, load_data
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_sample
from pyro.infer.reparam import TransformReparam
from scipy.interpolate import CubicSpline
from scipy.stats import gaussian_kde

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LearnedVariance,
    LinearGaussian,
    LogSNRSchedule,
    NeuralDenoiser,
    Recipe,
    Standardize,
    evaluate_bound,
    fit,
    posterior_samples,
)
from pyro_diffusion.arviz_bridge import as_arviz
from pyro_diffusion.inference import Blur, flow
from pyro_diffusion.style import BLUE, GREEN, INK, RED, new_axes, styled

matplotlib.use("Agg")

SIDE, LEVELS = 8, 17
ROW = torch.tensor([0.25, 0.5, 0.25])
KERNEL = Blur(ROW[:, None] * ROW)
SHOWN = (19, 27, 36, 44)  # pixels whose marginals are drawn
COVERAGE = 0.9
FLOW, CHAIN = "flow and NUTS", "chain and grid"


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    watch = Watch()
    train, validation, held_out, label = load_data(args)
    diffusion = fitted(train, validation, args)
    bound = evaluate_bound(diffusion, held_out, standard_error=args.standard_error)
    print(f"bound on log p(x), held out: {bound.mean()} nats per image, T = {args.num_timesteps}")
    watch.lap("fit and bound")

    x = held_out[args.image]
    y = blurred(x) + args.noise * torch.randn_like(x)
    print(
        f"\na {label[args.image]}, blurred, with noise of sd {args.noise} grey levels of {LEVELS}"
    )
    routes = {}
    for name, route in ((FLOW, by_flow), (CHAIN, by_chain)):
        routes[name] = route(diffusion, y, args)
        watch.lap(name)
    numbers = report(routes, x.cpu()) | compare_laws(diffusion, routes, y, held_out, args)
    watch.lap("comparison")
    paths = write(args.output, routes, x.cpu(), y.cpu(), numbers | {"seconds": watch.laps}, args)
    print("\nwrote " + "\n      ".join(map(str, paths)))
    for name, (clock, processor) in watch.laps.items():
        print(f"{name}: {clock:.0f} s by the clock, {processor:.0f} s of the processor")


class Watch:
    """Seconds of each part, by the clock and of the processor; the first counts other jobs as well."""

    def __init__(self):
        self.laps, self.last = {}, self.now()

    def now(self):
        return time.perf_counter(), time.process_time()

    def lap(self, name):
        """End a part of the script, and give it a name."""
        now = self.now()
        self.laps[name] = tuple(b - a for a, b in zip(self.last, now, strict=True))
        self.last = now


def fitted(train, validation, args):
    """The prior. Log-SNRs end at 5: a flow ends with 8 % of each pixel's standard deviation as noise."""
    transform = Standardize.from_data(train)
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=5.0, log_snr_min=-6.0)
    network = MLP((SIDE * SIDE,), hidden_size=128, num_blocks=2, dropout=0.1, num_outputs=2)
    denoiser = NeuralDenoiser(
        AnchoredNetwork(network, transform(train)), schedule, (SIDE * SIDE,), variance=LearnedVariance()
    )  # fmt: skip
    diffusion = DiffusionModel(denoiser, transform=transform).to(args.device)
    recipe = Recipe(learning_rate=3e-3, weight_decay=0.1)
    print(
        fit(
            diffusion, train, validation=validation, max_steps=args.steps, seed=args.seed, recipe=recipe,
            path=args.output / ("smoke" if args.smoke else "fit"), progress=False,
        )
    )  # fmt: skip
    return diffusion.eval().requires_grad_(False)


def blurred(x):
    """A x for images ``batch + (64,)``."""
    return KERNEL(x.reshape(*x.shape[:-1], SIDE, SIDE)).flatten(-2)


def prior_of_noise(like):
    """p(σ): log σ is standard normal, and σ is in grey levels."""
    zero = torch.zeros((), device=like.device, dtype=like.dtype)
    return dist.LogNormal(zero, 1.0)


class Moment(NamedTuple):
    """Mean and standard deviation of a posterior, with Monte Carlo errors."""

    mean: np.ndarray
    mean_error: np.ndarray
    sd: np.ndarray
    sd_error: np.ndarray


class Route(NamedTuple):
    """What a route says about σ and x."""

    sigma: np.ndarray  #: draws by chain, ``(C, S)``
    x: np.ndarray  #: draws by chain, ``(C, S, 64)``
    moment_of_sigma: Moment  #: ``()``
    moment_of_x: Moment  #: ``(64,)``
    base: torch.Tensor | None = None  #: z, from which the flow makes x, ``(C, S, 64)``


def by_flow(diffusion, y, args):
    """x is a site of a Pyro program, and NUTS draws it and σ together."""
    law = flow(diffusion, num_steps=args.flow_steps)

    def instrument(y):
        sigma = pyro.sample("sigma", prior_of_noise(y))
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(blurred(x), sigma[..., None]).to_event(1), obs=y)

    program = poutine.reparam(instrument, {"x": TransformReparam()})
    found, divergent = [], 0
    for chain in range(args.chains):
        pyro.set_rng_seed(args.seed + chain)
        nuts = NUTS(program, init_strategy=init_to_sample, max_tree_depth=args.max_tree_depth)
        mcmc = MCMC(nuts, args.draws, warmup_steps=args.warmup, disable_progbar=True)
        mcmc.run(y)
        found.append(mcmc.get_samples())
        divergent += len(mcmc.diagnostics()["divergences"]["chain 0"])
    base, sigma = (torch.stack([draws[key] for draws in found]) for key in ("x_base", "sigma"))
    with torch.no_grad():
        x = law.transforms[1](law.transforms[0](base.flatten(0, 1))).reshape(base.shape)
    sigma, x = sigma.cpu().numpy(), x.cpu().numpy()
    report_nuts(sigma, x, divergent, args)
    return Route(sigma, x, of_chains("sigma", sigma), of_chains("x", x), base)


def of_chains(name, draws):
    """Moments of draws by chain, with ArviZ's Monte Carlo errors."""
    data = az.convert_to_dataset({name: draws})
    mean, sd = draws.mean((0, 1)), draws.std((0, 1), ddof=1)
    errors = [np.asarray(az.mcse(data, method=method)[name]) for method in ("mean", "sd")]
    return Moment(mean, errors[0], sd, errors[1])


def report_nuts(sigma, x, divergent, args):
    """Print R-hat and effective sample sizes of σ and of the pixels."""
    data = az.convert_to_dataset({"sigma": sigma, "x": x})
    rhat, ess = az.rhat(data), az.ess(data)
    pixels = np.asarray(ess["x"])
    print(
        f"{FLOW}: {args.chains} chains, {args.warmup} + {args.draws} draws, {args.flow_steps} steps of Heun; "
        f"{divergent} divergences\n"
        f"  R-hat {float(rhat['sigma']):.3f} of σ, {float(rhat['x'].max()):.3f} at most of a pixel; "
        f"effective draws {float(ess['sigma']):.0f} of σ, pixels {pixels.min():.0f} to {pixels.max():.0f}, "
        f"median {np.median(pixels):.0f}"
    )


def by_chain(diffusion, y, args):
    """log p(y∣σ) on a grid, the posterior of σ by Bayes' rule, and the mixture of the draws."""
    sigma = torch.logspace(*(math.log10(end) for end in args.grid), args.levels, device=y.device)
    likelihood = LinearGaussian(blurred, y.expand(args.levels, -1), sigma[:, None])
    draws = posterior_samples(
        diffusion, likelihood, 1, num_particles=args.num_particles, num_runs=args.num_runs,
        common_noise=True, progress=False,
    )  # fmt: skip
    sigma = sigma.cpu().double()
    evidence, particles = draws.log_evidence.cpu(), draws.particles.cpu().double()
    log_density = evidence + prior_of_noise(sigma).log_prob(sigma) + sigma.log()  # by log σ
    share = log_density.softmax(0)  # of each level; the grid is even in log σ
    weights = share * draws.log_weights.cpu().exp()  # (R, K, levels), whose sum is one
    report_grid(draws, sigma, share)

    pick = torch.multinomial(weights.flatten(), 4 * args.mixed, replacement=True)
    x = particles.flatten(0, 2)[pick].reshape(4, args.mixed, -1)
    of_sigma = by_runs(sigma.expand(weights.shape)[..., None], weights)
    return Route(
        between_levels(sigma, log_density, (4, args.mixed)), x.numpy(),
        Moment(*(value[0] for value in of_sigma)), by_runs(particles, weights),
    )  # fmt: skip


def by_runs(values, weights):
    r"""Moments of values ``(R, K, levels, D)`` by weight, with errors from the spread of the runs.

    The weights of all runs together have the sum one. A mean is a ratio of two means over the runs, whose
    error is sqrt(R / (R − 1) Σ_r s_r²), where s_r is the weighted sum of the deviations in run r.
    """
    runs = len(values)

    def moment(f):
        mean = torch.einsum("rkl,rkld->d", weights, f)
        spread = torch.einsum("rkl,rkld->rd", weights, f - mean).square().sum(0)
        return mean, (runs / (runs - 1) * spread).sqrt()

    mean, mean_error = moment(values)
    variance, error = moment((values - mean).square())
    sd = variance.sqrt()
    return Moment(*(v.numpy() for v in (mean, mean_error, sd, error / (2 * sd))))


def between_levels(sigma, log_density, shape):
    """Draws of σ from a spline through the log-densities of log σ."""
    fine = np.linspace(sigma[0].log().item(), sigma[-1].log().item(), 2_000)
    log_p = CubicSpline(sigma.log().numpy(), log_density.numpy())(fine)
    weight = torch.as_tensor(log_p).softmax(0)
    pick = torch.multinomial(weight, math.prod(shape), replacement=True)
    return np.exp(fine[pick.numpy()]).reshape(shape)


def report_grid(draws, sigma, share):
    """Print log p(y∣σ) by level."""
    runs, particles = draws.log_weights.shape[:2]
    least = draws.ess_by_timestep.amin(0)
    print(
        f"{CHAIN}: {len(sigma)} levels, {runs} runs of {particles} particles each; "
        f"{int(draws.reliable.sum())} levels are reliable\n"
        "      σ   log p(y∣σ)         share of the posterior   least effective   k̂"
    )
    for i, level in enumerate(sigma):
        log_p, error = draws.log_evidence[i].item(), draws.standard_error[i].item()
        print(
            f"  {level:.3f}   {log_p:8.2f} ± {error:.2f}   {share[i]:.4f}{'':18} {least[i]:4.0f}{'':12}"
            f"{draws.pareto_k[i]:.2f}"
        )


def report(routes, x):
    """Print both posteriors of σ by ArviZ, and the table of differences; return the numbers."""
    print("\nσ by ArviZ")
    for name, route in routes.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a smoke run: a few draws have no effective size
            table = az.summary(az.convert_to_dataset({"sigma": route.sigma}))
        columns = table.loc["sigma"].index[:4]
        print(f"  {name:15} " + "   ".join(f"{c} {table.loc['sigma'][c]}" for c in columns))

    print(
        f"\n{'':22}{FLOW:>18}    {CHAIN:>18}    difference\n{'':66}in Monte Carlo errors   in posterior sds"
    )
    a, b = (route.moment_of_sigma for route in routes.values())
    numbers = {"sigma": compare("σ", a, b)}
    a, b = (route.moment_of_x for route in routes.values())
    for pixel in SHOWN:
        of_pixel = (Moment(*(value[pixel] for value in moment)) for moment in (a, b))
        compare(f"pixel {pixel // SIDE}, {pixel % SIDE}", *of_pixel)
    print("  root mean square over all pixels, grey levels for the distance to the true image")
    for what in ("mean", "sd"):
        in_errors, in_sds = differences(a, b, what)
        numbers[f"pixels_{what}"] = rms(in_errors), rms(in_sds)
        print(f"    {what + 's':60}{rms(in_errors):11.1f}{rms(in_sds):23.2f}")
    for name, route in routes.items():
        moment = route.moment_of_x
        inside = np.quantile(route.x, [0.5 - COVERAGE / 2, 0.5 + COVERAGE / 2], axis=(0, 1))
        covered = ((inside[0] <= x.numpy()) & (x.numpy() <= inside[1])).mean()
        error = rms(moment.mean - x.numpy())
        print(
            f"    {name}: the mean is off by {error:.2f} levels, sd {rms(moment.sd):.2f}; {covered:.0%} of "
            f"the pixels are in their {COVERAGE:.0%} intervals"
        )
        numbers[name] = {"error": error, "sd": rms(moment.sd), "coverage": float(covered)}
    return numbers


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def differences(a, b, what):
    """Differences of means or standard deviations in Monte Carlo errors, and in posterior sds."""
    one, other = (getattr(moment, what) for moment in (a, b))
    errors = np.hypot(*(getattr(moment, what + "_error") for moment in (a, b)))
    return (one - other) / errors, (one - other) / np.hypot(a.sd, b.sd) * math.sqrt(2)


def compare(name, a, b):
    """Print a number's moments by both routes; return them with their differences."""
    found = {}
    for what in ("mean", "sd"):
        in_errors, in_sds = (float(value) for value in differences(a, b, what))
        cells = [(float(getattr(m, what)), float(getattr(m, what + "_error"))) for m in (a, b)]
        shown = "    ".join(f"{value:10.3f} ± {error:.3f}" for value, error in cells)
        print(f"  {name + ', ' + what:20}{shown}{in_errors:21.1f}{in_sds:23.2f}")
        found[what] = {"values": cells, "in_errors": in_errors, "in_sds": in_sds}
    return found


def compare_laws(diffusion, routes, y, held_out, args):
    """Print how far the flow's steps and the difference of the two priors can explain what was found."""
    base, sigma = routes[FLOW].base.flatten(0, 1), torch.as_tensor(routes[FLOW].sigma).flatten()
    coarse, fine = (flow(diffusion, num_steps=n * args.flow_steps) for n in (1, 4))
    with torch.no_grad():
        images = [law.transforms[1](law.transforms[0](base)) for law in (coarse, fine)]
        noise = sigma.to(y)[:, None]
        log_p = [dist.Normal(blurred(image), noise).log_prob(y).sum(-1) for image in images]
        weight = (log_p[1] - log_p[0]).double().softmax(0).cpu()
        moved = (images[1] - images[0]).square().mean().sqrt().item()
        priors = {
            "flow": fine.sample((args.prior_draws,)), "chain": diffusion.sample(args.prior_draws)
        }  # fmt: skip
    ess = 1 / weight.square().sum().item()
    mean = (weight @ sigma.double()).item()
    print(
        f"\nfour times as many steps of the flow move x by {moved:.3f} levels; the weights for them keep "
        f"{ess:.0f} of {len(weight)} draws\n  and change the mean of σ from {sigma.mean():.3f} to {mean:.3f}"
    )
    ratios = {}
    wide = held_out.std(0) > 1  # the other pixels are nearly always empty
    for name, draws in priors.items():
        ratios[name] = (draws.std(0) / held_out.std(0))[wide].mean().item()
        shift = (draws.mean(0) - held_out.mean(0)).square()[wide].mean().sqrt().item()
        print(
            f"prior by the {name:5}: sd of a pixel {ratios[name]:.3f} of that of held-out images, "
            f"in the mean; its mean is off by {shift:.2f} levels"
        )
    return {"fine": {"sigma": mean, "ess": ess, "moved": moved}, "sd_of_prior": ratios}


def write(folder, routes, x, y, numbers, args):
    """The picture, the numbers and the draws for ArviZ; each is written aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = picture(routes, x, y, args.noise)
    writers = {
        "inverse_problem.png": lambda path: figure.savefig(path, dpi=120, format="png"),
        "result.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
    }
    for name, route in routes.items():
        data = az.convert_to_dataset({"sigma": route.sigma, "x": route.x})
        tree = as_arviz({"posterior": data})
        writers[f"{name.split()[0]}.nc"] = lambda path, tree=tree: tree.to_netcdf(str(path))
    for name, save in writers.items():
        aside = folder / f".{name}.part"
        save(aside)
        os.replace(aside, folder / name)
    return [folder / name for name in writers]


@styled
def picture(routes, x, y, noise):
    """Images of truth, observation, means and standard deviations; marginals of σ and of pixels."""
    axes = new_axes(3, 4, (11, 8), grid=False)
    images = {"truth": x, "observed": y}
    for what in ("mean", "sd"):
        images |= {f"{what}: {k}": getattr(r.moment_of_x, what) for k, r in routes.items()}
    limit = max(float(route.moment_of_x.sd.max()) for route in routes.values())
    places = (*axes[0], *axes[1, :2])
    for ax, (name, image) in zip(places, images.items(), strict=True):
        is_sd = name.startswith("sd")
        style = {"cmap": "magma", "vmax": limit} if is_sd else {"cmap": "gray_r", "vmax": LEVELS}
        drawn = ax.imshow(np.asarray(image).reshape(SIDE, SIDE), vmin=0, **style)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_title(name, fontsize="medium")
        if is_sd:
            ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
    marginal(
        axes[1, 2], {k: r.sigma for k, r in routes.items()}, noise, "σ, grey levels", prior=True
    )
    axes[1, 2].set_ylim(0, 1.5 * axes[1, 2].get_ylim()[1])
    axes[1, 2].legend(fontsize="x-small", loc="upper right")
    of_pixels(axes[1, 3], *(route.moment_of_x for route in routes.values()))
    for ax, pixel in zip(axes[2], SHOWN, strict=True):
        draws = {name: route.x[..., pixel] for name, route in routes.items()}
        marginal(ax, draws, float(x[pixel]), f"pixel {pixel // SIDE}, {pixel % SIDE}, grey levels")
    return axes[0, 0].figure


def of_pixels(ax, a, b):
    """Means of all pixels by both routes, with the standard deviations of the posteriors."""
    ax.errorbar(
        a.mean, b.mean, b.sd, a.sd, fmt="o", ms=3, color=INK, ecolor="#BBBBBB", elinewidth=0.7
    )
    ax.axline((0, 0), slope=1, color=GREEN, lw=1)
    ax.set(xlabel=f"mean of a pixel: {FLOW}", ylabel=CHAIN)


def marginal(ax, draws, truth, label, *, prior=False):
    """Densities of a number by both routes, and its true value."""
    for color, (name, values) in zip((BLUE, RED), draws.items(), strict=True):
        values = values.ravel()
        low, high = values.min(), values.max()
        grid = np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 200)
        density = gaussian_kde(values)(grid)
        ax.plot(grid, density, color=color, label=name)
        ax.fill_between(grid, density, color=color, alpha=0.15, lw=0)
    if prior:
        grid = torch.linspace(*ax.get_xlim(), 200).clamp(min=1e-3)
        ax.plot(
            grid, prior_of_noise(grid).log_prob(grid).exp(), color=INK, ls="--", lw=1, label="prior"
        )
    ax.axvline(truth, color=GREEN, lw=1.2, label="truth")
    ax.set(xlabel=label, yticks=[], ylim=(0, None))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=int, default=0, help="which of the held-out images")
    parser.add_argument("--noise", type=float, default=1.5, help="the true sd, grey levels")
    parser.add_argument(
        "--grid", type=float, nargs=2, default=(1.0, 2.6), help="ends of the levels of σ"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/inverse_problem"))
    args = parser.parse_args()
    args.steps = 20 if args.smoke else 7_500
    args.num_timesteps = 6 if args.smoke else 32
    args.flow_steps = 2 if args.smoke else 8
    args.chains, args.warmup, args.draws = (2, 4, 6) if args.smoke else (2, 80, 120)
    args.max_tree_depth = 2 if args.smoke else 10
    args.levels = 3 if args.smoke else 9
    args.num_particles, args.num_runs = (12, 2) if args.smoke else (48, 8)
    args.mixed = 20 if args.smoke else 1_000  # draws of the mixture, four times as many
    args.prior_draws = 50 if args.smoke else 2_000
    args.standard_error = 2.0 if args.smoke else 0.3
    return args


if __name__ == "__main__":
    main()
