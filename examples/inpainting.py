r"""Complete handwritten digits of which the upper half is seen, with the uncertainty of each hidden pixel.

A diffusion model of whole images is the prior. ``impute`` draws the 32 hidden pixels given the 32 seen ones.
No model is trained for this pattern of gaps: any other mask would do. The draws are those of the joint model,
by sequential Monte Carlo. They come with the density of what was seen, so that
:math:`\log p(x_{mis} \mid x_{obs}) = \log p(x) - \log p(x_{obs})` is known for every image, up to a Monte
Carlo error.

The data are the 1,797 digits of scikit-learn, 8×8 pixels of 17 grey levels, split as in ``digits.py`` into
1,257 images for training, 180 for validation and 360 held out. A density needs real numbers. So each level k
becomes a number k + u, with u uniform in (0, 1), drawn once from a fixed seed. Each training image is there
ten times, with its own u. All models get these numbers and report densities in these units: nats per image,
per grey level of each pixel. (The mean of log p(k + u) over u is a bound on the log-probability of k.)

Two other models have exact conditional distributions: a Gaussian, and mixtures of Gaussians with full
covariances, fitted by scikit-learn to the same data. Their regularisation is chosen on the validation images.
All models work with standardised logits of the pixels, in which each of them has the best density on
validation images.

The script prints, for the hidden pixels of all held-out images,

    log score  the mean of log p(x_mis∣x_obs): how probable the hidden half was, all of its pixels together
    coverage   the share of pixels inside their central 50 % and 90 % intervals; 0.5 and 0.9 would be right
    CRPS       the continuous ranked probability score of a pixel, in grey levels; the smaller the better

Uncorrected guidance is there as well. It takes the same steps with a single particle, and no weight corrects
them. It has no density, because nothing is known of how far its draws are from the model's.

The diffusion model gives the hidden half the highest density, but its intervals are too narrow, and the
mixtures have a better CRPS. More particles hardly change this: with 256 in place of 64, the coverage of the
first 30 images at 90 % was 0.86 in place of 0.85. For 60 draws of the model itself in place of digits it was
0.85 ± 0.01, and 0.45 ± 0.02 at 50 %: half of what is missing is the model's, half is Monte Carlo error.

The network predicts the noise. At large noise it is anchored to a Gaussian of the training data
(``AnchoredNetwork``), because ``impute`` also uses its derivatives.

    python examples/inpainting.py [--device cuda] [--seed 0] [--num-particles 64] [--num-runs 2] [--smoke]
        [--output outputs/inpainting]

A second run with the same output folder reads the fitted model from there. On one thread the fit takes four
minutes, and the draws take a quarter of an hour.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from torch.distributions import ComposeTransform

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LearnedVariance,
    Logit,
    LogSNRSchedule,
    NeuralDenoiser,
    Recipe,
    Standardize,
    evaluate_bound,
    fit,
    impute,
    randomized_pit,
    smc_evidence,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS, SIDE, SEEN = 17, 8, 32
COPIES = 10  # of each training image, with noise of its own
RECIPE = Recipe(learning_rate=3e-3, weight_decay=0.1)
LEVELS = (0.5, 0.9)  # of the intervals


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    train, validation, held_out, label = load_data(args)
    transform = scaled(train)
    diffusion = build(transform, train, args).to(args.device)
    folder = args.output / ("smoke" if args.smoke else "fit")
    print(
        fit(
            diffusion, train, validation=validation, max_steps=args.steps, seed=args.seed,
            recipe=RECIPE, path=folder,
        )
    )  # fmt: skip
    diffusion.eval()
    fitted = time.perf_counter()

    results = exact_models(transform, train, validation, held_out, args)
    found, posterior, guided = by_diffusion(diffusion, held_out, args)
    results |= found
    numbers = report(results, posterior, held_out)
    paths = write(args.output, diffusion, numbers, held_out, label, posterior, guided)
    print("\nwrote " + "\n      ".join(map(str, paths)))
    print(f"{fitted - start:.0f} s to fit, {time.perf_counter() - fitted:.0f} s for the rest")


class Result(NamedTuple):
    """What a model says about the hidden half of N images."""

    draws: torch.Tensor  #: of the hidden pixels, in grey levels, ``(S, N, 32)``
    log_p: torch.Tensor | None = None  #: log p(x) of the whole image, ``(N,)``
    log_score: torch.Tensor | None = None  #: log p(x_mis∣x_obs), ``(N,)``


class AnchoredNetwork(torch.nn.Module):
    r"""A network for the noise that becomes that of a Gaussian where noise dominates.

    For data from :math:`N(0, C)` the noise of :math:`x_t = a x_0 + \sigma \epsilon` is known,

        :math:`E[\epsilon \mid x_t] = \sigma (a^2 C + \sigma^2 I)^{-1} x_t` .

    The output is this times :math:`1 - g`, plus the network's output times :math:`g`, where
    :math:`g = 1 / (1 + e^{-2 (\lambda + 1)})` falls from one to zero as the log-SNR :math:`\lambda` falls.
    Posterior sampling needs the covariance of :math:`x_0` given :math:`x_t`, which is
    :math:`(\sigma^2 / a^2) (I - \sigma\, \partial \hat\epsilon / \partial x_t)`. It is a small difference
    times a large number where noise dominates. A network that is right about :math:`\epsilon` is rarely right
    about this difference. The Gaussian is.
    """

    def __init__(self, network, y):
        super().__init__()
        self.network = network
        values, vectors = torch.linalg.eigh(torch.cov(y.double().T))
        self.register_buffer("values", values.to(y.dtype))
        self.register_buffer("vectors", vectors.to(y.dtype))

    def forward(self, x_t, log_snr):
        """Noise of shape ``(B, 64)``, with numbers for the variance in a last axis."""
        log_snr = log_snr.to(x_t.dtype)[:, None]
        signal, noise = log_snr.sigmoid(), (-log_snr).sigmoid()  # a² and σ²
        gaussian = (x_t @ self.vectors) / (signal * self.values + noise) @ self.vectors.T
        share = (2 * (log_snr + 1)).sigmoid()
        output, variance = self.network(x_t, log_snr[:, 0]).unbind(-1)
        mixed = share * output + (1 - share) * noise.sqrt() * gaussian
        return torch.stack((mixed, variance), dim=-1)


def build(transform, train, args):
    """The diffusion model. Log-SNRs stop at -4, where the signal left is a fiftieth of the variance."""
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=3.0, log_snr_min=-4.0)
    network = MLP((SIDE * SIDE,), hidden_size=128, num_blocks=2, dropout=0.1, num_outputs=2)
    denoiser = NeuralDenoiser(
        AnchoredNetwork(network, transform(train)), schedule, (SIDE * SIDE,), variance=LearnedVariance()
    )  # fmt: skip
    return DiffusionModel(denoiser, transform=transform)


def scaled(train):
    """The transform to logits of mean zero and standard deviation one."""
    logit = Logit(0.0, NUM_LEVELS)
    return ComposeTransform([logit, Standardize.from_data(logit(train))])


def by_diffusion(diffusion, held_out, args):
    """Results of the diffusion model and of uncorrected guidance, and the two posteriors."""
    mask = torch.zeros_like(held_out, dtype=torch.bool)
    mask[:, :SEEN] = True
    bound = evaluate_bound(diffusion, held_out, standard_error=args.standard_error)
    print(f"\nbound on log p(x), held out: {bound.mean()} nats per image, T = {args.num_timesteps}")
    whole = smc_evidence(diffusion, held_out, num_particles=args.num_whole)
    start = time.perf_counter()
    posterior = impute(
        diffusion, held_out, mask, args.num_draws,
        num_particles=args.num_particles, num_runs=args.num_runs,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    guided = impute(diffusion, held_out, mask, args.num_guided, num_particles=1)
    report_monte_carlo(whole, posterior, seconds)
    log_score = whole.log_evidence - posterior.log_evidence
    found = {
        "diffusion": Result(posterior.samples[..., SEEN:], whole.log_evidence, log_score),
        "uncorrected guidance": Result(guided.samples[..., SEEN:]),
    }
    return found, posterior, guided


def report_monte_carlo(whole, posterior, seconds):
    """Print how well log p(x) and log p(x_obs) are known."""
    print("\nMonte Carlo of the diffusion model")
    for name, e in (("log p(x)", whole), ("log p(x_obs)", posterior)):
        error, count = e.standard_error, int(e.reliable.sum())
        print(
            f"  {name:13} standard error {error.median():.2f} in the median, {error.max():.2f} at most; "
            f"{count} of {len(error)} reliable"
        )
    least = posterior.ess_by_timestep.amin(0)
    runs, particles = posterior.log_weights.shape[:2]
    print(
        f"  {runs} runs of {particles} particles an image, {seconds:.0f} s: effective {least.median():.0f} "
        f"at the worst step, {posterior.ess.median():.0f} of all runs at the end (medians)"
    )


class Mixture:
    """A Gaussian mixture over the model's units, with its conditional distributions in closed form.

    Args:
        fitted: ``GaussianMixture`` of scikit-learn with full covariances.
        transform: From grey levels to the model's units, entry by entry.
    """

    def __init__(self, fitted, transform):
        self.transform = transform
        self.log_weights, self.means, covariances = (
            torch.as_tensor(x)
            for x in (np.log(fitted.weights_), fitted.means_, fitted.covariances_)
        )
        cross = covariances[:, :SEEN, SEEN:]
        self.root_seen = torch.linalg.cholesky(covariances[:, :SEEN, :SEEN])
        self.gain = torch.cholesky_solve(cross, self.root_seen).mT
        self.root_hidden = torch.linalg.cholesky(covariances[:, SEEN:, SEEN:] - self.gain @ cross)

    def result(self, x, num_draws):
        """The densities of images in grey levels, and draws of their hidden half."""
        y = self.transform(x).double()
        volume = self.transform.log_abs_det_jacobian(x, self.transform(x)).double()
        by_component = self.log_weights + log_normal(
            y[:, None, :SEEN] - self.means[:, :SEEN], self.root_seen
        )
        log_seen, share = by_component.logsumexp(1), by_component.log_softmax(1)
        means = self.means[:, SEEN:] + torch.einsum(
            "khs,nks->nkh", self.gain, y[:, None, :SEEN] - self.means[:, :SEEN]
        )
        hidden = log_normal(y[:, None, SEEN:] - means, self.root_hidden)
        log_score = (share + hidden).logsumexp(1) + volume[:, SEEN:].sum(1)
        log_p = log_seen + volume[:, :SEEN].sum(1) + log_score
        return Result(self._grey_levels(self._draw(share, means, num_draws)), log_p, log_score)

    def _draw(self, share, means, num_draws):
        """Draws in the model's units, ``(S, N, 32)``."""
        k = torch.distributions.Categorical(logits=share).sample((num_draws,))
        z = torch.randn(*k.shape, means.shape[-1], dtype=means.dtype)
        image = torch.arange(len(means))
        return means[image, k] + (self.root_hidden[k] @ z[..., None]).squeeze(-1)

    def _grey_levels(self, y):
        """Hidden pixels in grey levels; the transform takes whole images."""
        whole = torch.cat((torch.zeros_like(y), y), dim=-1)
        return self.transform.inv(whole)[..., SEEN:]


def log_normal(x, root):
    """log N(x; 0, L Lᵀ) for ``(N, K, D)`` and ``(K, D, D)``, shape ``(N, K)``."""
    z = torch.linalg.solve_triangular(root, x.permute(1, 2, 0), upper=False)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (-0.5 * z.square().sum(1) - log_det[:, None]).T - 0.5 * x.shape[-1] * math.log(
        2 * math.pi
    )


def exact_models(transform, train, validation, held_out, args):
    """A Gaussian and two mixtures, each with the regularisation of the best validation density."""
    transform = transform_on_cpu(transform)
    train, validation, held_out = (x.cpu() for x in (train, validation, held_out))
    y, results = transform(train).double().numpy(), {}
    print("\nregularisation by the validation images: added to the variances, log p(x) there")
    for components in args.components:
        tried = {}
        for added in args.added:
            mixture = GaussianMixture(components, reg_covar=added, random_state=0, max_iter=200)
            mixture = Mixture(mixture.fit(y), transform)
            tried[added] = mixture.result(validation, 1).log_p.mean().item(), mixture
        best = max(tried, key=lambda added: tried[added][0])
        name = "Gaussian" if components == 1 else f"mixture of {components}"
        shown = "  ".join(f"{added:g}: {log_p:.2f}" for added, (log_p, _) in tried.items())
        print(f"  {name:13} {shown}   takes {best:g}")
        results[name] = tried[best][1].result(held_out, args.num_draws)
    return results


def report(results, posterior, held_out):
    """Print the table, and return its numbers."""
    truth, ours = held_out[:, SEEN:].cpu(), results["diffusion"].log_score.cpu()
    print(
        f"\nthe hidden half of {len(truth)} images, {truth.shape[1]} pixels each; mean ± sampling error"
    )
    print("                       log p(x)         log score        diffusion's lead   coverage 50 %    "
          "coverage 90 %    CRPS")  # fmt: skip
    numbers = {}
    for name, result in results.items():
        draws, row = result.draws.cpu().double(), {}
        if result.log_p is not None:
            row["log_p"] = mean(result.log_p.cpu())
            row["log_score"] = mean(result.log_score.cpu())
            row["lead"] = mean(ours - result.log_score.cpu())
        rank = randomized_pit(truth, draws)
        for level in LEVELS:
            inside = ((rank - 0.5).abs() < level / 2).double()
            row[f"coverage_{100 * level:.0f}"] = mean(inside.mean(1))
        row["crps"] = mean(ranked_score(truth.double(), draws).mean(1))
        numbers[name] = row
        dash = f"{'—':15}"
        cells = [f"{row[key][0]:7.2f} ± {row[key][1]:.2f} " if key in row else dash
                 for key in ("log_p", "log_score", "lead")]  # fmt: skip
        cells += [f"{row[key][0]:.3f} ± {row[key][1]:.3f}" for key in list(row)[-3:]]
        print(f"  {name:20} " + "  ".join(cells))
    bias = 0.5 * posterior.standard_error.square().mean().item()
    print(
        "log p(x) and log score: nats per image, density of grey levels. The Monte Carlo estimate of log "
        f"p(x_obs)\nis low by about {bias:.2f} nats in the mean, and the diffusion's log score is high by "
        "as much."
    )
    return numbers | {"reliable": int(posterior.reliable.sum()), "bias": bias}


def mean(values):
    """The mean over images and its standard error."""
    values = values.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def ranked_score(truth, draws):
    """The continuous ranked probability score of each pixel from draws ``(S, …)``, without bias."""
    count, ordered = len(draws), draws.sort(0).values
    weight = (2 * torch.arange(count).double() + 1 - count) / (count * (count - 1))
    spread = torch.tensordot(weight, ordered, 1)
    return (draws - truth).abs().mean(0) - spread


def write(folder, diffusion, numbers, held_out, label, posterior, guided):
    """Write the picture, the numbers and the model, each under another name first."""
    folder.mkdir(parents=True, exist_ok=True)
    fig = picture(held_out.cpu(), label, posterior, guided)
    writers = {
        "inpainting.png": lambda path: fig.savefig(path, dpi=120, format="png"),
        "result.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
    }
    for name, save in writers.items():
        aside = folder / f".{name}.part"
        save(aside)
        os.replace(aside, folder / name)
    diffusion.save(folder / "model.pt")
    return [folder / name for name in (*writers, "model.pt")]


def picture(held_out, label, posterior, guided, num_draws=4):
    """For an image of each class: truth, seen half, mean, standard deviation, and draws."""
    shown = [int((label == c).nonzero()[0]) for c in label.unique()]
    half = held_out.clone()
    half[:, SEEN:] = math.nan
    rows = {"truth": held_out, "seen": half, "mean": posterior.mean().value}
    rows["standard\ndeviation"] = posterior.std().value
    rows |= {f"draw {n + 1}": posterior.samples[n] for n in range(num_draws)}
    rows["guidance,\nuncorrected"] = guided.samples[0]
    size = (0.85 * len(shown) + 1.6, 0.85 * len(rows) + 0.3)
    fig, axes = plt.subplots(
        len(rows), len(shown), figsize=size, layout="constrained", squeeze=False
    )
    grey, spread = (
        plt.colormaps[name].with_extremes(bad="#cfe3f5") for name in ("gray_r", "magma")
    )
    for cells, (name, images) in zip(axes, rows.items(), strict=True):
        is_spread = name.startswith("standard")
        style = {"cmap": spread, "vmax": 8} if is_spread else {"cmap": grey, "vmax": NUM_LEVELS}
        for ax, image in zip(cells, images[shown].cpu(), strict=True):
            drawn = ax.imshow(image.reshape(SIDE, SIDE), vmin=0, **style)
            ax.set(xticks=[], yticks=[])
            ax.axhline(SIDE / 2 - 0.5, color="C0", linewidth=1)
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center")
        if is_spread:
            fig.colorbar(drawn, ax=cells, label="levels")
    return fig


def transform_on_cpu(transform):
    """The transform for models that are not on the device; numbers of the logits are on it."""
    logit, scale = transform.parts
    return ComposeTransform([logit, Standardize(scale.loc.cpu(), scale.scale.cpu())])


def load_data(args):
    """Training, validation and held-out images as real numbers, and the classes of the last.

    Neither the split nor the noise depends on the seed.
    """
    x, label = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    rest, held_out, rest_label, label = train_test_split(
        x, label, test_size=360, stratify=label, random_state=0
    )
    train, validation = train_test_split(rest, test_size=180, stratify=rest_label, random_state=0)
    if args.smoke:
        train, validation, held_out, label = train[:200], validation[:20], held_out[:4], label[:4]
    generator = torch.Generator().manual_seed(0)
    train, validation, held_out = (
        with_noise(part, generator).to(args.device)
        for part in (train.repeat(COPIES, 1), validation, held_out)
    )
    return train, validation, held_out, torch.as_tensor(label)


def with_noise(levels, generator):
    """Levels plus uniform noise, strictly inside (0, 17), whose ends have no logit."""
    noise = torch.rand(levels.shape, generator=generator)
    return levels + noise.clamp(1e-5, 1 - 1e-5)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-particles", type=int, default=64)
    parser.add_argument("--num-runs", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/inpainting"))
    args = parser.parse_args()
    args.steps = 20 if args.smoke else 12_000
    args.num_timesteps = 6 if args.smoke else 32
    args.num_particles = 25 if args.smoke else args.num_particles
    args.num_whole = 25 if args.smoke else 128
    args.num_draws = 9 if args.smoke else 99
    args.num_guided = 4 if args.smoke else 24
    args.standard_error = 2.0 if args.smoke else 0.1
    args.components = (1, 2) if args.smoke else (1, 10, 50)
    args.added = (0.3,) if args.smoke else (0.01, 0.05, 0.1, 0.2)
    return args


if __name__ == "__main__":
    main()
