r"""The bound where the answer is known: Gaussian data.

First the zero-variance identity: with the exact reverse chain of Gaussian data, or of a mixture, every
draw of the one-sample ``Trace_ELBO`` *is* log p(x_0). Then what the usual reverse variances cost when the
mean is exact.
Averaged over the data, q(x_{0:T}) is the exact chain, so that the price of a variance is

    -ELBO = H(x_0) + KL(q(x_T) ‖ p(x_T)) + Σ_t ½ (r_t − 1 − log r_t),   r_t = exact_t / used_t,

and β̃ ("fixed small") costs more than its name suggests: its first steps are far from exact.

    python examples/gaussian_oracle.py [--device cuda] [--seed 0] [--smoke]
"""

import argparse
import math
from pathlib import Path

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_diffusion import (
    AlphaSchedule,
    CosineSchedule,
    DataPrediction,
    DiffusionModel,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LinearSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    elbo_terms,
)

MEAN, STD = 0.5, 0.5


def main():
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    pyro.set_rng_seed(args.seed)
    zero_variance_identity()
    price_of_a_variance(num_particles=50 if args.smoke else 2_000)


def zero_variance_identity():
    print("one-sample Trace_ELBO against log p(x_0), five data, three draws each")
    print("data        T  guide            log p(x_0)         largest relative error")
    mean, std = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.1, 1.0, 3.0])
    modes = torch.stack([mean, -mean, 3 * mean])
    x_0 = torch.randn(5, 3).exp()
    for num_timesteps in (1, 2, 10, 50):
        alpha = torch.linspace(0.99, 0.7, num_timesteps)
        alpha[-1] = 1e-24  # the identity holds up to √ᾱ_T times the mean
        schedule = AlphaSchedule(alpha)
        for name, denoiser in {
            "Gaussian": GaussianDenoiser(mean, std, schedule),
            "mixture": GaussianMixtureDenoiser([0.2, 0.5, 0.3], modes, std.expand(3, 3), schedule),
        }.items():
            diffusion = DiffusionModel(denoiser)
            exact = denoiser.data_distribution.log_prob(x_0).sum().item()
            for guide in (diffusion.guide, diffusion.posterior_guide):
                draws = [-Trace_ELBO().loss(diffusion.model, guide, x_0) for _ in range(3)]
                error = max(abs(draw / exact - 1) for draw in draws)
                print(
                    f"{name:9s} {num_timesteps:3d}  {type(guide).__name__:15s}  {exact:.10f}     "
                    f"{error:.1e}"
                )


def price_of_a_variance(num_particles):
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    print(f"\nN({MEAN}, {STD**2}) data, exact mean; entropy {entropy:.8f} nats")
    print("schedule      T   variance   -ELBO in closed form   measured                 gap, nats")
    # The bound is quadratic in x_0: mean ± std average to its expectation, without sampling error.
    x_0 = torch.tensor([[MEAN - STD], [MEAN + STD]])
    for name, curve in (("linear", LinearSchedule), ("cosine", CosineSchedule)):
        for num_timesteps in (10, 100, 1000):
            schedule = curve(num_timesteps)
            exact = GaussianDenoiser(torch.tensor([MEAN]), torch.tensor([STD]), schedule)
            denoisers = {
                "exact": exact,
                "β": around(exact, ForwardVariance()),
                "β̃": around(exact, PosteriorVariance()),
            }
            for variance, denoiser in denoisers.items():
                diffusion = DiffusionModel(denoiser)
                expected = closed_form(exact, denoiser)
                terms = elbo_terms(
                    diffusion.model,
                    diffusion.posterior_guide,
                    x_0,
                    num_particles=num_particles,
                    analytic_kl=False,  # near the exact chain the log-ratios are the quieter estimator
                )
                bound = terms.mean()
                print(
                    f"{name}  {num_timesteps:7d}   {variance:9s}  {expected:.8f}             "
                    f"{-bound.value:.5f} ± {bound.monte_carlo_error:.5f}      "
                    f"{expected - entropy:.5f}"
                )


class ExactEstimate(nn.Module):
    """The exact x̂_0 as a network that predicts the datum."""

    def __init__(self, denoiser):
        super().__init__()
        self.x_0_hat = denoiser.x_0_hat

    def forward(self, x_t, log_snr):
        return self.x_0_hat(x_t, log_snr)


def around(exact, variance):
    """The exact mean with another variance."""
    return NeuralDenoiser(
        ExactEstimate(exact), exact.schedule, (1,), prediction=DataPrediction(), variance=variance
    )


def closed_form(exact, denoiser):
    """-ELBO averaged over the data, by the formula above."""
    schedule = exact.schedule
    alpha_bar = schedule.alpha_bar(schedule.num_timesteps).item()
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    prior = 0.5 * (variance + alpha_bar * MEAN**2 - 1 - math.log(variance))
    t = torch.arange(1, schedule.num_timesteps + 1)
    x_t = torch.zeros(len(t), 1)  # the variances do not depend on the state
    ratio = exact(x_t, t).variance / denoiser(x_t, t).variance
    price = (ratio - 1 - ratio.log()).sum().item() / 2
    return 0.5 * math.log(2 * math.pi * math.e * STD**2) + prior + price


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, help="unused: this example only prints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
