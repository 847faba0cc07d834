r"""Proportions in (0, 1): a diffusion model and two Gaussian mixtures of scikit-learn, ranked by log p.

Each datum is two proportions, such as cloud cover and relative humidity. Most of them are close to 0 or 1.
All models are fitted to the logits, :math:`y = \log x - \log(1 - x)`, and all report the density of the
proportions, :math:`\log p(x) = \log p(y) + \log |\partial y / \partial x|`. The data are simulated, so that
their exact density is known.

``compare`` ranks the models on the same held-out data. The diffusion model's log p is estimated by
``importance_evidence``, with a Monte Carlo error. The mixtures' log p is exact and goes in through
``Evidence.exact``. The picture shows the density of the probability flow (``ode_log_likelihood``), and draws
of the diffusion model beside data.

    python examples/proportions.py [--device cuda] [--seed 0] [--smoke] [--output outputs/proportions]
"""

import argparse
import os
from pathlib import Path

import matplotlib
import pyro
import torch
from sklearn.mixture import GaussianMixture
from torch.distributions import ComposeTransform

from pyro_diffusion import (
    MLP,
    DataPrediction,
    DiffusionModel,
    Evidence,
    LearnedVariance,
    Logit,
    LogSNRSchedule,
    NeuralDenoiser,
    Recipe,
    Standardize,
    compare,
    evaluate_bound,
    fit,
    importance_evidence,
    ode_log_likelihood,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    train = proportions(1_000 if args.smoke else 20_000).to(args.device)
    held_out = proportions(50 if args.smoke else 500).to(args.device)
    truth = log_density(held_out)
    print(f"exact log p of the held-out rows: {truth.mean():.4f} nats per datum")

    diffusion = build(train).to(args.device)
    steps = 30 if args.smoke else args.steps
    print(fit(diffusion, train, max_steps=steps, seed=args.seed, recipe=Recipe(batch_size=512)))
    bound = evaluate_bound(diffusion, held_out, standard_error=0.05)
    print(f"bound {bound.mean()}, of {bound.rows:,} network rows")

    particles = 100 if args.smoke else args.particles
    evidence = {"diffusion": importance_evidence(diffusion, held_out, num_particles=particles)}
    transform = Logit()
    for components in (3, 30):
        mixture = GaussianMixture(components, random_state=0).fit(transform(train).cpu().numpy())
        y = transform(held_out)
        log_p = torch.as_tensor(mixture.score_samples(y.cpu().numpy())).to(truth)
        log_p = log_p + transform.log_abs_det_jacobian(held_out, y).double().sum(-1)
        evidence[f"mixture of {components}"] = Evidence.exact(log_p, held_out)
    evidence["exact density"] = Evidence.exact(truth, held_out)
    table = compare(evidence)
    print(table[["elpd_diff", "dse", "mc_error", "bad_k", "score"]].to_string())
    for name, e in evidence.items():
        gap = truth - e.log_evidence
        error = gap.std() / len(gap) ** 0.5
        print(f"{name}: {gap.mean():.3f} ± {error:.3f} nats below the exact density, paired")
    print("picture:", plot(args.output, diffusion, train))


def proportions(count):
    """Logits are points of a curve with noise: most proportions are close to 0 or 1."""
    centre = curve(torch.rand(count, dtype=torch.float64))
    return (centre + NOISE * torch.randn(count, 2, dtype=torch.float64)).sigmoid().float()


NOISE = 0.6


def curve(u):
    """A curve of logits."""
    return torch.stack((10 * u - 3, 4 * (6.283 * u).sin() + 2), -1)


def log_density(x):
    """log p(x) by quadrature over the curve, in float64."""
    p = x.double().cpu()
    y = p.log() - torch.log1p(-p)
    u = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000
    law = torch.distributions.Normal(curve(u), NOISE)
    inside = law.log_prob(y[:, None]).sum(-1).logsumexp(1) - torch.tensor(4_000.0).log()
    return (inside - p.log().sum(-1) - torch.log1p(-p).sum(-1)).to(x.device)


def build(train):
    schedule = LogSNRSchedule(50, log_snr_max=6.0)
    network = MLP((2,), hidden_size=128, num_blocks=2, num_outputs=2)
    denoiser = NeuralDenoiser(
        network, schedule, (2,), prediction=DataPrediction(), variance=LearnedVariance()
    )
    return DiffusionModel(denoiser, transform=scaled(train))


def scaled(train):
    """The transform to logits of mean zero and standard deviation one."""
    logit = Logit()
    return ComposeTransform([logit, Standardize.from_data(logit(train))])


def plot(folder, diffusion, train):
    folder.mkdir(parents=True, exist_ok=True)
    edges = torch.linspace(-9, 12, 60)
    y = torch.cartesian_prod(edges, edges)
    x = y.sigmoid()
    inside = (x > 0).all(-1) & (x < 1).all(-1)
    with torch.no_grad():
        log_p = torch.full((len(x),), -float("inf"), dtype=torch.float64)
        value = ode_log_likelihood(diffusion, x[inside].to(train.device), rtol=1e-3, atol=1e-3)
        volume = Logit().log_abs_det_jacobian(x[inside], y[inside]).sum(-1)
        log_p[inside] = value.log_evidence.cpu() - volume  # of the logits
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    image = log_p.clamp(min=-12).reshape(60, 60).T
    shown = axes[0].imshow(image, origin="lower", extent=(-9, 12, -9, 12), cmap="viridis")
    fig.colorbar(shown, ax=axes[0], label="nats")
    axes[0].set(
        title="log density of the flow, in logits",
        xlabel="logit of cover",
        ylabel="logit of humidity",
    )
    draws = diffusion.sample(1_000).cpu()
    for values, name, color in ((train[:1_000].cpu(), "data", "C0"), (draws, "draws", "C1")):
        axes[1].scatter(*values.T, s=3, label=name, color=color, alpha=0.6)
    axes[1].set(title="proportions", xlabel="cover", ylabel="humidity")
    fig.legend(loc="outside right upper")
    path, aside = folder / "proportions.png", folder / ".proportions.part"
    fig.savefig(aside, dpi=120, format="png")
    os.replace(aside, path)
    return path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--particles", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/proportions"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
