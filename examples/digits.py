r"""Fit a diffusion model to images of handwritten digits, and read its bound.

The data are the 1,797 digits that come with scikit-learn: 8×8 pixels of 17 grey levels. They are split by
class into 1,257 for training, 180 for validation and 360 held out. The model has T = 1000 steps. Its network,
a residual MLP, predicts logits over the 17 levels of every pixel. The forward chain's distribution of the
noisy pixel turns them into the exact posterior of the levels. ``--prediction noise`` is the usual
alternative: noise prediction, with Fourier features of the input and a discretised Gaussian likelihood of
learned scale.

``fit`` trains the model: ``RECIPE`` has settings that were tuned on these data. The same call trains a
small ladder VAE for comparison, with free bits, and the same functions read its bound.
``diffusion_vs_hvae.py`` compares the two families at length, and ``two_moons.py`` trains by plain ``SVI``.

    python examples/digits.py [--device cuda] [--seed 0] [--log-snr-max 4]
        [--prediction levels|noise] [--smoke] [--output outputs/digits]
"""

import argparse
import json
import os
import textwrap
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    FreeBitsELBO,
    HierarchicalVAE,
    LadderEncoder,
    LevelLikelihood,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    NoisePrediction,
    PosteriorVariance,
    Recipe,
    elbo_terms,
    fit,
    plot_bound,
    plot_samples,
    plot_schedule,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS = 17
RECIPE = {  # logits over levels overfit without the weight decay, and the noise does not
    "levels": Recipe(learning_rate=2e-3, weight_decay=2.0),
    "noise": Recipe(learning_rate=4e-3, weight_decay=0.0),
    # Without the warm-up and the free bits the ladder's levels collapse.
    "ladder": Recipe(
        learning_rate=1e-3, weight_decay=1.0, kl_warmup=0.4, elbo=FreeBitsELBO(free_nats=2.0)
    ),
}
NUM_STEPS = {"levels": 2000, "noise": 3500, "ladder": 1200}
LATENT_SIZES = (32, 16, 8)


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    train, validation, held_out = (part.to(args.device) for part in load_data())
    if args.smoke:
        train, validation, held_out = train[:64], validation[:16], held_out[:16]

    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=args.log_snr_max, log_snr_min=-8.0)
    diffusion = build(args.prediction, schedule).to(args.device)
    train_model(diffusion, args.prediction, train, validation, args)
    fitted = time.perf_counter()
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, held_out, num_particles=2)
    samples = diffusion.sample(args.num_samples)

    report(terms, histogram_bits_per_dim(torch.cat([train, validation]), held_out))
    paths = write(args.output, diffusion, terms, samples, held_out, args)
    print("\nwrote " + "\n      ".join(map(str, paths)))
    print(
        f"{fitted - start:.0f} s to fit, {time.perf_counter() - fitted:.0f} s to evaluate and draw"
    )

    print()
    pyro.set_rng_seed(args.seed)  # so that the ladder does not depend on what was drawn above
    ladder = build_ladder().to(args.device)
    train_model(ladder, "ladder", train, validation, args)
    theirs = elbo_terms(ladder.model, ladder.posterior_guide, held_out, num_particles=64)
    print(
        f"\nfor comparison, a ladder VAE of {len(LATENT_SIZES)} levels: {theirs.bits_per_dim()} bits/dim"
    )


def train_model(family, name, train, validation, args):
    """Fit in place, print a report, and leave the weights that are best on the validation data."""
    steps = 10 if args.smoke else NUM_STEPS[name]
    result = fit(
        family, train, validation=validation, max_steps=steps, seed=args.seed, recipe=RECIPE[name]
    )
    print(result)


def build(prediction, schedule):
    """The model. If it predicts levels, their posterior is p(x_0 | x_1), and it needs no likelihood."""
    likelihood, variance = None, PosteriorVariance()
    if prediction == "levels":
        network = MLP((64,), num_blocks=3, dropout=0.4, num_outputs=NUM_LEVELS)
        predicted = LevelPrediction(NUM_LEVELS)
    else:
        network = MLP((64,), num_blocks=3, dropout=0.1, fourier_frequencies=(2, 3, 4))
        predicted = NoisePrediction()
        likelihood = DiscretizedGaussianLikelihood(NUM_LEVELS, learnable=True)
    denoiser = NeuralDenoiser(network, schedule, (64,), prediction=predicted, variance=variance)
    return DiffusionModel(denoiser, likelihood)


def build_ladder():
    """A hierarchical VAE whose decoder predicts logits over the levels, as the diffusion model does."""
    settings = {"hidden_size": 256, "dropout": 0.1}
    encoder = LadderEncoder((64,), LATENT_SIZES, **settings)
    likelihood = LevelLikelihood(NUM_LEVELS)
    return HierarchicalVAE((64,), LATENT_SIZES, likelihood, encoder=encoder, **settings)


def report(terms, histogram):
    """Print the bound and what it is made of."""
    print("\nheld-out bits/dim")
    print(f"  diffusion, {len(terms.transition) + 1} steps   {terms.bits_per_dim()}")
    print(f"  per-pixel histogram     {histogram[0]:.4f} ± {histogram[1]:.4f} (sampling)")
    print("\nterms, nats per datum")
    print(textwrap.indent(terms.table(), "  "))


def histogram_bits_per_dim(train, held_out):
    """Bits per dimension, with the sampling error, of a histogram of each pixel (every count plus one)."""
    counts = torch.stack([(train == level).sum(0) for level in range(NUM_LEVELS)]) + 1.0
    log_probability = (counts / counts.sum(0)).log2()
    pixels = torch.arange(held_out.shape[1], device=held_out.device)
    bits = -log_probability[held_out.long(), pixels].mean(1)
    return bits.mean().item(), (bits.std() / len(bits) ** 0.5).item()


def write(folder, diffusion, terms, samples, held_out, args):
    """Write pictures, bound, model and numbers, each under another name first: no file is half written."""
    folder.mkdir(parents=True, exist_ok=True)
    fig, ax = plt.subplots(layout="constrained")
    plot_bound(terms, ax)
    bits = terms.bits_per_dim()
    numbers = {
        "bits_per_dim": bits._asdict(),
        "num_held_out": len(held_out),
        "seed": args.seed,
        "log_snr_max": args.log_snr_max,
        "prediction": args.prediction,
        "smoke": args.smoke,
    }
    images = (x.reshape(-1, 8, 8) for x in (samples, held_out))
    writers = {
        "bound.png": lambda path: fig.savefig(path, dpi=120, format="png"),
        "samples.png": lambda path: save_axes(plot_samples(*images), path),
        "schedule.png": lambda path: save_axes(plot_schedule(diffusion.schedule), path),
        "bound.nc": lambda path: terms.to_dataset().to_netcdf(path),
        "result.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
    }
    for name, save in writers.items():
        aside = folder / f".{name}.part"
        save(aside)
        os.replace(aside, folder / name)
    diffusion.save(folder / "model.pt")
    return [folder / name for name in (*writers, "model.pt")]


def save_axes(axes, path):
    axes[0].figure.savefig(path, dpi=120, format="png")


def load_data():
    """Training, validation and held-out digits, split by class. The split does not depend on the seed."""
    x, label = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    rest, held_out, label, _ = train_test_split(
        x, label, test_size=360, stratify=label, random_state=0
    )
    train, validation = train_test_split(rest, test_size=180, stratify=label, random_state=0)
    return train, validation, held_out


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-snr-max", type=float, default=4.0, help="where the chain starts")
    parser.add_argument("--prediction", choices=["levels", "noise"], default="levels")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/digits"))
    args = parser.parse_args()
    args.num_timesteps = 30 if args.smoke else 1000
    args.num_samples = 4 if args.smoke else 100
    return args


if __name__ == "__main__":
    main()
