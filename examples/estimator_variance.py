r"""The lecture's variance argument, measured.

Lecture notes prefer the matching form of the bound (E10) to the consistency form (E11), because a
consistency term is an expectation over three variables and a matching term over one, so that its
estimate "could potentially" be noisier, the more so for the sum of T − 1 of them. Here are the
variances of one draw, for 64-dimensional Gaussian data and a denoiser that is exact or off by a
known amount:

    consistency           log q(x_t | x_{t-1}) / p(x_t | x_{t+1})         three variables
    matching, sampled     log q(x_t | x_{t+1}, x_0) / p(x_t | x_{t+1})    two variables
    matching, analytic    KL(q(x_t | x_{t+1}, x_0) ‖ p(x_t | x_{t+1}))    one variable

Term by term the argument holds. For the total it depends on how the terms are drawn. Drawn
independently their variances add up. On one trajectory they are coupled: both sampled forms are then
the same number, log p(x_{0:T}) / q(x_{1:T} | x_0), in which the terms' noise cancels near the optimum,
down to zero at the exact reverse chain, where the analytic KLs still vary.

    python examples/estimator_variance.py [--device cuda] [--seed 0] [--smoke] [--output DIR]
"""

import argparse
import os
from pathlib import Path

import matplotlib
import pyro
import torch

from pyro_diffusion import CosineSchedule, DiffusionModel, GaussianDenoiser, elbo_terms
from pyro_diffusion.denoisers import Denoised, Denoiser

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FACTORS = (1.0, 1.01, 1.1)
STYLES = {"consistency": "-", "matching, sampled": "--", "matching, analytic": ":"}


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    torch.set_default_device(args.device)
    dimension, num_particles = 64, 20 if args.smoke else 400
    std = torch.linspace(0.1, 2.0, dimension)
    schedule = CosineSchedule(20 if args.smoke else args.num_timesteps)
    x_0 = std * torch.randn(8, dimension)

    print(
        f"variance of one draw, mean over 8 data; D = {dimension}, T = {schedule.num_timesteps}, ",
        end="",
    )
    print(f"{num_particles} particles")
    print(
        "x̂_0                  estimator            largest term   independent   one trajectory   -ELBO"
    )
    curves = {}
    for factor in FACTORS:
        exact = GaussianDenoiser(torch.zeros(dimension), std, schedule)
        diffusion = DiffusionModel(Scaled(exact, factor))
        for name, terms in forms(diffusion, x_0, num_particles):
            term = num_particles * terms.term_standard_error.square().mean(1)
            total = num_particles * terms.standard_error.square().mean()
            print(
                f"{describe(factor):19s}  {name:18s}  {term[1:].max():12.4g}  {term.sum():12.4g}"
                f"  {total:15.4g}   {-terms.mean().value:.2f}"
            )
            curves[factor, name] = term[1:-1].cpu()
    print(f"wrote {plot(args.output, curves)}")


class Scaled(Denoiser):
    """The exact denoiser with an estimate that is off by a factor."""

    def __init__(self, exact, factor):
        super().__init__(exact.schedule, exact.event_shape)
        self.exact, self.factor = exact, factor

    @property
    def dtype(self):
        return self.exact.dtype

    def denoise(self, x_t, log_snr):
        return Denoised(self.factor * self.exact.x_0_hat(x_t, log_snr))

    def reverse_kernel(self, x_t, t, denoised):
        return self.exact.reverse_kernel(x_t, t, denoised)


def describe(factor):
    return "exact" if factor == 1 else f"{factor - 1:.0%} too large"


def forms(diffusion, x_0, num_particles):
    """The three estimators of one bound."""
    for name, guide, analytic_kl in (
        ("consistency", diffusion.guide, False),
        ("matching, sampled", diffusion.posterior_guide, False),
        ("matching, analytic", diffusion.posterior_guide, True),
    ):
        yield (
            name,
            elbo_terms(
                diffusion.model, guide, x_0, num_particles=num_particles, analytic_kl=analytic_kl
            ),
        )


def plot(folder, curves):
    folder.mkdir(parents=True, exist_ok=True)
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, factor in zip(("C0", "C1"), (FACTORS[0], FACTORS[-1]), strict=True):
        for name, style in STYLES.items():
            variance = curves[factor, name]
            label = f"{name}; $\\hat x_0$ {describe(factor)}"
            ax.plot(range(1, len(variance) + 1), variance, style, color=color, label=label)
    ax.set(xlabel="timestep $t$", ylabel="variance of one draw of $L_t$, nats²", yscale="log")
    ax.legend(fontsize="small")
    path, aside = folder / "estimator_variance.png", folder / ".estimator_variance.part"
    fig.savefig(aside, dpi=120, format="png")
    os.replace(aside, path)
    return path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-timesteps", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/estimator_variance"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
