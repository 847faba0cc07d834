r"""What guided draws follow: a mixture in one dimension, where everything is known.

Guidance of strength w moves a sampler's estimates away from the unconditional ones,
:math:`\hat x_0(c) + w\, (\hat x_0(c) - \hat x_0(\varnothing))`. One might expect draws from the tilted law
:math:`p(x)\, p(c \mid x)^{1 + w} / Z`. Here the denoiser of a mixture is exact, the context is the number of
a component, and the tilted law is known by quadrature. A difference between the two is therefore due to
guidance, not to a network.

    ODE    ``ODESampler``: no noise after x_T. In one dimension it is an increasing map of x_T, so that the
           quantiles of x_T become those of the draws, without Monte Carlo error
    SDE    ``ODESampler(…, eta=1)``: the same steps with the chain's noise, by independent draws

W1 is the Wasserstein distance to the tilted law, :math:`\int |F - G|\, dx`, in units of x. Its error is the
W1 between these draws and others with half as many steps. That covers the error of the steps and, for the
SDE, whose draws are independent, the Monte Carlo error. The row w = 0 is the check: there the tilted law is
p(x∣c), and the distances are of the size of their errors.

    python examples/guidance.py [--device cuda] [--seed 0] [--smoke] [--output outputs/guidance]
"""

import argparse
import os
from pathlib import Path

import matplotlib
import pyro
import torch

from pyro_diffusion import (
    DiffusionModel,
    GaussianMixtureDenoiser,
    Guidance,
    LogSNRSchedule,
    ODESampler,
)
from pyro_diffusion.style import BLUE, INK, PALE, RED, new_axes, styled

matplotlib.use("Agg")

STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
COMPONENT = 1
QUANTILES = 10_000
GRID = torch.linspace(-6, 8, 14_001, dtype=torch.float64)
STEP = (GRID[1] - GRID[0]).item()


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    timesteps, count = (20, 500) if args.smoke else (args.timesteps, args.draws)
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64, device=args.device)
    schedule = LogSNRSchedule(2 * timesteps, log_snr_max=12.0, log_snr_min=-18.0)
    diffusion = DiffusionModel(GaussianMixtureDenoiser([0.5, 0.5], means, 0.5, schedule))
    print("p(x) = ½ N(−1, ½²) + ½ N(1, ½²), given its second component;", end=" ")
    print(f"{timesteps} steps, {count:,} draws")
    print("       tilted law      p(x∣c)   ODE                              SDE")
    print("  w    mean    sd      W1       mean    sd    W1                 mean    sd    W1")
    laws, nearer, plain = {}, 0, below(law(diffusion.denoiser, 0.0))
    for w in STRENGTHS:
        tilted = law(diffusion.denoiser, w)
        by_ode = [quantiles(diffusion, w, n) for n in (timesteps, timesteps // 2)]
        by_sde = [draws(diffusion, w, n, count) for n in (timesteps, timesteps // 2)]
        laws[w] = tilted, by_ode[0], by_sde[0]
        of_plain = between(plain, below(tilted))
        print(f"{w:3g}  {words(*moments(tilted))}   {of_plain:.4f}", end="")
        print(row(by_ode, tilted), row(by_sde, tilted))
        if w:
            nearer += sum(of_plain < distance(x, tilted) for x in laws[w][1:])
    print(
        "Unless w = 0 the draws follow neither p(x∣c) nor the tilted law. The ODE and the SDE differ."
    )
    print(
        f"Without guidance p(x∣c) is nearer to the tilted law than {nearer} of the 8 guided laws."
    )
    print(f"picture: {plot(args.output, laws)}")


def law(denoiser, w):
    """The density of p(x) p(c∣x)^(1+w) / Z on the grid, which is p(x∣c)^(1+w) p(x)^(−w) / Z."""
    x = GRID[:, None].to(denoiser.means)
    context = torch.full((len(x),), COMPONENT, device=x.device)
    conditional = denoiser.conditional_distribution(context).log_prob(x)
    density = ((1 + w) * conditional - w * denoiser.data_distribution.log_prob(x)).exp().cpu()
    return density / (density.sum() * STEP)


def quantiles(diffusion, w, timesteps, count=QUANTILES):
    """Quantiles of the draws without noise: those of x_T ~ N(0, 1), mapped."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x_T = torch.distributions.Normal(0.0, 1.0).icdf(levels)[:, None].to(diffusion.denoiser.means)
    sampler = ODESampler(diffusion, timesteps, guidance=Guidance(w))
    return sampler(count, x_T, context=COMPONENT, progress=False)[:, 0].cpu()


def draws(diffusion, w, timesteps, count):
    """Independent draws with the chain's noise, in increasing order."""
    sampler = ODESampler(diffusion, timesteps, eta=1.0, guidance=Guidance(w))
    return sampler(count, context=COMPONENT, progress=False)[:, 0].cpu().sort().values


def moments(density):
    mean = (density * GRID).sum() * STEP
    return mean, ((density * (GRID - mean) ** 2).sum() * STEP).sqrt()


def below(density):
    """The distribution function on the grid, by the trapezoidal rule."""
    return (density.cumsum(0) - density / 2) * STEP


def between(F, G):
    """W1 of two distribution functions on the grid."""
    return (F - G).abs().sum().item() * STEP


def distance(x, density):
    """W1 of draws in increasing order to a law."""
    return between(torch.searchsorted(x, GRID) / len(x), below(density))


def row(values, tilted):
    """Mean, standard deviation and W1 with its error, from draws with all and with half of the steps."""
    x, with_half = values
    error = (x - with_half).abs().mean()  # W1 of two samples of one size, both in order
    return f"   {words(x.mean(), x.std())}  {distance(x, tilted):.4f} ± {error:.4f}"


def words(mean, std):
    return f"{mean:6.3f}  {std:.3f}"


@styled
def plot(folder, laws):
    """A panel for each strength: p(x∣c), the tilted law, and the laws of the draws."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = new_axes(1, len(laws), (2.3 * len(laws), 2.9))[0]
    conditional = laws[0.0][0]
    edges = torch.linspace(-1.5, 3.5, 71, dtype=torch.float64)
    for ax, (w, (tilted, by_ode, by_sde)) in zip(axes, laws.items(), strict=True):
        ax.fill_between(GRID, conditional, color=PALE, lw=0, label="$p(x \\mid c)$")
        label = "tilted, $p(x)\\,p(c \\mid x)^{1+w}/Z$"
        ax.plot(GRID, tilted, color=INK, lw=1.6, ls="--", label=label)
        ax.plot(*density_of(by_ode), color=BLUE, lw=1.8, label="guided, ODE")
        share = torch.histogram(by_sde, edges)[0] / len(by_sde) / edges.diff()
        ax.stairs(share, edges, color=RED, lw=1.2, label="guided, SDE")
        ax.set(title=f"$w = {w:g}$", xlim=(-0.9, 3.1), ylim=(0, 1.6), xlabel="$x$")
        ax.tick_params(labelleft=ax is axes[0])
    axes[0].set_ylabel("density")
    fig = axes[0].figure
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path, aside = folder / "guidance.png", folder / ".guidance.part"
    fig.savefig(aside, dpi=150, format="png")
    os.replace(aside, path)
    return path


def density_of(x):
    """The density between some of the quantiles, which are even in x_T."""
    levels = torch.special.ndtr(torch.linspace(-3.8, 3.8, 120, dtype=torch.float64))
    chosen = (levels * (len(x) - 1)).round().long().unique()
    x = x[chosen]
    return (x[1:] + x[:-1]) / 2, chosen.diff() / x.diff() / QUANTILES


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=200)
    parser.add_argument("--draws", type=int, default=40_000)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/guidance"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
