r"""Beyond one machine: several processes, data on disk, bfloat16, and a run that goes on when it was killed.

Data: scikit-learn's 8×8 digits, or ``--data x.npy``, rows of whole numbers from 0 to 16 (``--levels``) of any
shape, which stay on disk; the last tenth is held out. Lightning starts the processes, one a device:

    python examples/scale_out.py --devices 2

On several nodes run the same command on each, by SLURM (``srun``) or by torchrun:

    torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        examples/scale_out.py --devices 8 --nodes 2 --device cuda --precision bf16-mixed

Ranks draw noise of their own and stratify timesteps together. Held-out data and samples are shared out in the
end, and rank 0 speaks for all. ``--resume`` goes on from the newest whole checkpoint in ``--output``, in the
middle of an epoch, too.

    python examples/scale_out.py [--devices 2] [--nodes 1] [--strategy ddp] [--precision 32-true]
        [--accumulate 1] [--batch-size 128] [--data x.npy] [--levels 17] [--compile] [--resume]
        [--device cuda] [--seed 0] [--smoke] [--output outputs/scale_out]
"""

import argparse
import functools
import json
import os
import time
import warnings
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from pyro.infer import TraceMeanField_ELBO
from sklearn.datasets import load_digits

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    OrderedBatches,
    ShuffledBatches,
    compile_elbo,
    elbo_terms,
    over_ranks,
)
from pyro_diffusion.training import CheckpointFiles, SVIModule, latest_checkpoint


def main():
    args = parse_arguments()
    lightning.seed_everything(args.seed, verbose=False)  # all ranks alike: the model is the same
    train, held_out = load_data(args)
    diffusion = build(train.shape[1:], args)
    pair = diffusion.subsampled(num_timesteps=1)
    elbo = TraceMeanField_ELBO()
    if args.compile:
        elbo = functools.partial(compile_elbo, elbo=elbo)
    optimizer = functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1)
    module = SVIModule(pair.model, pair.guide, elbo, optimizer)

    trainer = lightning.Trainer(
        accelerator="cpu" if args.device == "cpu" else "gpu",
        devices=args.devices,
        num_nodes=args.nodes,
        strategy=args.strategy,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1000.0,
        max_epochs=args.num_epochs,
        check_val_every_n_epoch=args.check_every,
        callbacks=[
            EMAWeightAveraging(decay=0.99),
            ModelCheckpoint(args.output, every_n_train_steps=args.keep_every),
        ],
        plugins=[CheckpointFiles()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(
        module,
        ShuffledBatches(train, args.batch_size, seed=args.seed),
        OrderedBatches(held_out, args.batch_size),
        ckpt_path=latest_checkpoint(args.output, module) if args.resume else None,
        weights_only=True,
    )
    seconds = time.perf_counter() - start

    device = trainer.strategy.root_device
    diffusion.to(device).eval()  # the averaged weights

    def bound(rows):
        x_0 = torch.as_tensor(np.array(rows), device=device)
        return elbo_terms(
            diffusion.model, diffusion.posterior_guide, x_0, num_particles=4, progress=False
        )

    terms = over_ranks(bound, held_out)
    drawn = over_ranks(diffusion.sample, args.num_samples)
    if trainer.is_global_zero:
        steps = f"{trainer.global_step} steps on {trainer.world_size} ranks in {seconds:.0f} s"
        print(f"held-out bits/dim {terms.bits_per_dim()}, {len(held_out)} data, {steps}")
        print(
            f"{len(drawn)} draws of mean {drawn.double().mean():.2f}; data: {held_out.mean():.2f}"
        )
        write(args.output, diffusion, terms, drawn)


def build(event_shape, args):
    network = MLP(tuple(event_shape), num_blocks=2, dropout=0.2, num_outputs=args.levels)
    schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=4.0, log_snr_min=-8.0)
    prediction = LevelPrediction(args.levels)
    return DiffusionModel(NeuralDenoiser(network, schedule, event_shape, prediction=prediction))


def load_data(args):
    """Training and held-out rows, as arrays: digits, or a file that is mapped and not read."""
    if args.data is None:
        x = load_digits().images.astype(np.uint8)
        x = x[np.random.default_rng(0).permutation(len(x))]
    else:
        x = np.load(args.data, mmap_mode="r")
    if args.smoke:
        x = x[:180]
    num_train = len(x) - len(x) // 10
    return x[:num_train], x[num_train:]


def write(folder, diffusion, terms, drawn):
    """The model, its bound and its draws; each is written aside and renamed."""
    diffusion.save(folder / "model.pt")
    writers = {
        "samples.npy": lambda path: np.save(path, drawn.cpu().numpy()),
        "result.json": lambda path: path.write_text(
            json.dumps({"bits_per_dim": terms.bits_per_dim()._asdict()}, indent=2) + "\n"
        ),
    }
    for name, save in writers.items():
        aside = folder / f".part-{name}"
        save(aside)
        os.replace(aside, folder / name)
    print("wrote " + ", ".join(str(folder / name) for name in ("model.pt", *writers)))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, help="processes on a node: 2 on CPU, else all GPUs")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed, bf16-true, 64-true, …")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to an optimiser step")
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a batch, on each rank")
    parser.add_argument("--data", type=Path, help="rows of whole numbers in a .npy file")
    parser.add_argument("--levels", type=int, default=17, help="how many whole numbers there are")
    parser.add_argument("--compile", action="store_true", help="compile the loss")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/scale_out"))
    args = parser.parse_args()
    if args.devices is None:
        args.devices = 2 if args.device == "cpu" else -1
    args.num_timesteps, args.num_epochs = (20, 2) if args.smoke else (1000, 150)
    args.check_every, args.keep_every = (1, 1) if args.smoke else (25, 100)
    args.num_samples = 9 if args.smoke else 1000
    if args.smoke:
        args.batch_size = 16
    return args


if __name__ == "__main__":
    # Lightning's advice on small batches, and on a folder that holds the run that goes on
    warnings.filterwarnings("ignore", module="lightning.*")
    main()
