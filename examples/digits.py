r"""Fit a diffusion model to real images by SVI and read its bound.

Data: the 1,797 handwritten digits that come with scikit-learn, 8×8 pixels of 17 grey levels, split
by class into 1,257 for training, 180 to stop on and 360 held out. Model: T = 1000 steps and a
residual MLP that predicts the level of every pixel: logits over the 17 levels, which the known law of
the noisy state turns into their exact posterior. ``--prediction noise`` is the usual alternative,
with Fourier features of the input and a discretised Gaussian likelihood of learned scale. The last line
is a small ladder VAE, fitted and read by the same functions (``diffusion_vs_hvae.py`` compares at length).

    python examples/digits.py [--device cuda] [--seed 0] [--log-snr-max 4]
        [--prediction levels|noise] [--smoke] [--output outputs/digits]
"""

import argparse
import copy
import json
import math
import os
import textwrap
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import trange

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    HierarchicalVAE,
    KLWarmup,
    LadderEncoder,
    LevelLikelihood,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    NoisePrediction,
    PosteriorVariance,
    elbo_terms,
    plot_bound,
    plot_samples,
    plot_schedule,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS = 17
OPTIMISER = {  # each at its best here: logits over levels overfit, the noise does not
    "levels": {"lr": 2e-3, "weight_decay": 2.0},
    "noise": {"lr": 4e-3, "weight_decay": 0.0},
    "ladder": {"lr": 1e-3, "weight_decay": 1.0},
}
NUM_EPOCHS = {"levels": 400, "noise": 700, "ladder": 300}
LATENT_SIZES = (32, 16, 8)
WARMUP = 60  # epochs over which the ladder's KLs come in, or its upper levels fall silent


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    train, validation, held_out = (part.to(args.device) for part in load_data())
    if args.smoke:
        train, validation, held_out = train[:64], validation[:16], held_out[:16]

    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=args.log_snr_max, log_snr_min=-8.0)
    diffusion = build(args.prediction, schedule).to(args.device)
    optimiser = OPTIMISER[args.prediction]
    diffusion = fit(
        diffusion, diffusion.subsampled(), train, validation, optimiser, args.num_epochs, args
    )
    fitted = time.perf_counter()
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, held_out, num_particles=2)
    samples = diffusion.sample(args.num_samples)

    report(terms, histogram_bits_per_dim(torch.cat([train, validation]), held_out))
    paths = write(args.output, diffusion, terms, samples, held_out, args)
    print("\nwrote " + "\n      ".join(map(str, paths)))
    print(
        f"{fitted - start:.0f} s to fit, {time.perf_counter() - fitted:.0f} s to evaluate and draw"
    )

    ladder, epochs = build_ladder().to(args.device), 2 if args.smoke else NUM_EPOCHS["ladder"]
    ladder = fit(ladder, ladder, train, validation, OPTIMISER["ladder"], epochs, args)
    theirs = elbo_terms(ladder.model, ladder.posterior_guide, held_out, num_particles=64)
    print(
        f"\nfor comparison, a ladder VAE of {len(LATENT_SIZES)} levels: {theirs.bits_per_dim()} bits/dim"
    )


def build(prediction, schedule):
    """The model; its own p(x_0 | x_1) is the posterior of the levels, where it predicts those."""
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
    """A hierarchical VAE from the same programs; its decoder says what ``LevelPrediction`` says."""
    settings = {"hidden_size": 256, "dropout": 0.1}
    encoder = LadderEncoder((64,), LATENT_SIZES, **settings)
    likelihood = LevelLikelihood(NUM_LEVELS)
    return HierarchicalVAE((64,), LATENT_SIZES, likelihood, encoder=encoder, **settings)


def fit(family, pair, train, validation, optimiser, num_epochs, args):
    """Plain SVI on a pair of programs; returns the weight average that bounds validation best."""
    optim = pyro.optim.CosineAnnealingLR(
        {
            "optimizer": torch.optim.AdamW,
            "optim_args": {"betas": (0.9, 0.99), **optimiser},
            "T_max": num_epochs,
        }
    )
    svi = SVI(pair.model, pair.guide, optim, TraceMeanField_ELBO())
    average = AveragedModel(family, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    best, best_bits, patience = None, math.inf, 5
    with trange(num_epochs, desc="fitting", unit="epoch") as epochs:
        for epoch in epochs:
            family.train()
            warm = 1.0 if isinstance(family, DiffusionModel) else min(1.0, (epoch + 1) / WARMUP)
            for batch in train[torch.randperm(len(train))].split(256):
                with KLWarmup(warm):
                    svi.step(batch, num_data=len(train))
                average.update_parameters(family)
            optim.step()
            if (epoch + 1) % args.check_every:
                continue
            bits = quick_bits_per_dim(average.module, validation)
            epochs.set_postfix_str(f"validation {bits:.3f} bits/dim")
            if bits < best_bits:
                best, best_bits, patience = copy.deepcopy(average.module), bits, 5
            elif patience := patience - 1:
                continue
            else:
                break
    return best.eval()


@torch.no_grad()
def quick_bits_per_dim(family, x_0):
    """The bound, of a diffusion model at 20 timesteps a datum, with the same draws at every check."""
    family.eval()
    pair = family.subsampled(num_timesteps=20) if isinstance(family, DiffusionModel) else family
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = TraceMeanField_ELBO().loss(pair.model, pair.guide, x_0)
    return loss / x_0.numel() / math.log(2)


def report(terms, histogram):
    """Print the bound and what it is made of."""
    print("\nheld-out bits/dim")
    print(f"  diffusion, {len(terms.transition) + 1} steps   {terms.bits_per_dim()}")
    print(f"  per-pixel histogram     {histogram[0]:.4f} ± {histogram[1]:.4f} (sampling)")
    print("\nterms, nats per datum")
    print(textwrap.indent(terms.table(), "  "))


def histogram_bits_per_dim(train, held_out):
    """A histogram for every pixel, each level counted once more: mean and its sampling error."""
    counts = torch.stack([(train == level).sum(0) for level in range(NUM_LEVELS)]) + 1.0
    log_probability = (counts / counts.sum(0)).log2()
    pixels = torch.arange(held_out.shape[1], device=held_out.device)
    bits = -log_probability[held_out.long(), pixels].mean(1)
    return bits.mean().item(), (bits.std() / len(bits) ** 0.5).item()


def write(folder, diffusion, terms, samples, held_out, args):
    """Pictures, bound, model and numbers; each is written aside and renamed."""
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
    """Training, validation and held-out digits, split by class; the split is always the same."""
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
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/digits"))
    args = parser.parse_args()
    args.num_timesteps = 30 if args.smoke else 1000
    args.num_epochs = 2 if args.smoke else NUM_EPOCHS[args.prediction]
    args.check_every = 1 if args.smoke else 25
    args.num_samples = 4 if args.smoke else 100
    return args


if __name__ == "__main__":
    main()
