r"""The digits once more, trained by Lightning: checkpoints, resuming, weight averaging, early stopping.

The model of ``digits.py``; what is different is who runs the loop. Every convenience is an argument or a
callback of Lightning's ``Trainer``; the package adds one module around ``ELBO()(model, guide)``, which
reads the bound of the validation digits with every timestep. Run it again with ``--resume`` to go on
from the last checkpoint.

    python examples/lightning_digits.py [--device cuda] [--seed 0] [--smoke] [--resume]
        [--output outputs/lightning_digits]
"""

import argparse
import functools
import json
import os
import time
import warnings
from pathlib import Path

import lightning.pytorch as lightning
import matplotlib
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from pyro.infer import TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    elbo_terms,
    plot_denoised,
    plot_training,
    plot_trajectory,
)
from pyro_diffusion.training import SVIModule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS = 17


def main():
    args = parse_arguments()
    lightning.seed_everything(args.seed, verbose=False)
    start = time.perf_counter()
    train, validation, held_out = load_data(args)

    network = MLP((8, 8), num_blocks=3, dropout=0.4, num_outputs=NUM_LEVELS)
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=4.0, log_snr_min=-8.0)
    denoiser = NeuralDenoiser(
        network, schedule, (8, 8), prediction=LevelPrediction(NUM_LEVELS),
        variance=PosteriorVariance(),
    )  # fmt: skip
    diffusion = DiffusionModel(denoiser)

    pair = diffusion.subsampled(num_timesteps=1)
    optimizer = functools.partial(decaying_adam, num_epochs=args.num_epochs)
    module = SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), optimizer)
    keep = ModelCheckpoint(
        args.output, monitor="val_bits_per_dim", filename="best", save_last=True,
        enable_version_counter=False,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu" if args.device == "cpu" else "gpu",
        max_epochs=args.num_epochs,
        check_val_every_n_epoch=args.check_every,
        gradient_clip_val=1000.0,
        callbacks=[
            keep,
            EMAWeightAveraging(decay=0.998),
            EarlyStopping("val_bits_per_dim", patience=4),
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    last = args.output / "last.ckpt"
    trainer.fit(
        module,
        DataLoader(TensorDataset(train), batch_size=256, shuffle=True),
        DataLoader(TensorDataset(validation), batch_size=256),
        ckpt_path=last if args.resume and last.exists() else None,
    )
    best = torch.load(keep.best_model_path, weights_only=True)
    module.load_state_dict(best["state_dict"])  # the averaged weights
    diffusion.to(args.device).eval()
    fitted = time.perf_counter()

    held_out = held_out.to(args.device)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, held_out, num_particles=4)
    print(f"\nheld-out bits/dim   {terms.bits_per_dim()}")
    print(f"validation bits/dim {keep.best_model_score:.4f} at step {best['global_step']}")
    paths = write(args.output, diffusion, module, terms, held_out[:4])
    print("\nwrote " + "\n      ".join(map(str, paths)))
    print(f"{fitted - start:.0f} s to fit, {time.perf_counter() - fitted:.0f} s to evaluate")


def decaying_adam(parameters, num_epochs):
    """What Lightning's configure_optimizers may return: an optimiser and a schedule by epoch."""
    adam = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=2.0)
    return [adam], [torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=num_epochs)]


def write(folder, diffusion, module, terms, x_0):
    """Pictures and numbers; each is written aside and renamed."""
    fig, ax = plt.subplots(layout="constrained")
    plot_training(module.history, ax)
    writers = {
        "training.png": lambda path: fig.savefig(path, dpi=120, format="png"),
        "trajectory.png": lambda path: save_grid(plot_trajectory(diffusion, x_0), path),
        "denoised.png": lambda path: save_grid(plot_denoised(diffusion, x_0), path),
        "result.json": lambda path: path.write_text(
            json.dumps({"bits_per_dim": terms.bits_per_dim()._asdict()}, indent=2) + "\n"
        ),
    }
    for name, save in writers.items():
        aside = folder / f".{name}.part"
        save(aside)
        os.replace(aside, folder / name)
    diffusion.save(folder / "model.pt")
    return [folder / name for name in (*writers, "model.pt", "best.ckpt", "last.ckpt")]


def save_grid(axes, path):
    axes[0, 0].figure.savefig(path, dpi=120, format="png")


def load_data(args):
    """Training, validation and held-out digits, the split of ``digits.py``."""
    x, label = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).reshape(-1, 8, 8)
    rest, held_out, label, _ = train_test_split(
        x, label, test_size=360, stratify=label, random_state=0
    )
    train, validation = train_test_split(rest, test_size=180, stratify=label, random_state=0)
    if args.smoke:
        return train[:64], validation[:16], held_out[:16]
    return train, validation, held_out


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--resume", action="store_true", help="go on from last.ckpt")
    parser.add_argument("--output", type=Path, default=Path("outputs/lightning_digits"))
    args = parser.parse_args()
    args.num_timesteps = 20 if args.smoke else 1000
    args.num_epochs = 4 if args.smoke else 450
    args.check_every = 2 if args.smoke else 50
    return args


if __name__ == "__main__":
    # Lightning's advice on worker processes, which data in memory do without
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*The number of training batches.*")
    main()
