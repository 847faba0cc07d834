"""What several processes do, for ``test_parallel.py`` and ``test_resuming.py``: start with :func:`launch`.

Each rank runs one function of this file and saves what it returns to ``<folder>/<function>_<rank>.pt``.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyro
import torch
import torch.distributed
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    GaussianDenoiser,
    LogSNRSchedule,
    NeuralDenoiser,
    OrderedBatches,
    ShuffledBatches,
    StratifiedTimesteps,
    elbo_terms,
    over_ranks,
)

PATHS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}  # of a process
STEPS, PER_RANK = 16, 8  # as many timesteps, all alike, as two ranks have draws: each is a stratum


def launch(function, folder, world_size=2, timeout=120):
    """Run a function of this file on some ranks, as torchrun would; what each rank returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", __file__, function, str(folder)]
    processes = []
    try:
        for rank in range(world_size):
            own = os.environ | PATHS | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        for process in processes:
            said, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, said.decode()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    files = [Path(folder) / f"{function}_{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=True) for file in files]


# --- shares of data ------------------------------------------------------------------------------


def exact(event_size=3):
    """A model whose bound is log p(x_0) on every path, a parameter that does nothing included."""
    mean = torch.arange(event_size).double()
    denoiser = GaussianDenoiser(mean, 1 + 0.5 * mean, LogSNRSchedule(5, log_snr_min=-30.0))
    denoiser.unused = nn.Parameter(torch.zeros(()))
    return DiffusionModel(denoiser)


def distinct(n):
    """Data of which each has another density."""
    return torch.linspace(-2, 3, 3 * n, dtype=torch.float64).reshape(n, 3)


def measure(folder):
    """Everything that evaluates, in one start of two processes."""
    torch.distributed.init_process_group("gloo")
    return {"shares": shares(), "evaluate": evaluate(folder)}


def shares():
    """The bound of seven data and of one, draws, masks, and errors, over the ranks."""
    rank = torch.distributed.get_rank()
    diffusion = exact()

    def bound(x, mask=None):
        return elbo_terms(diffusion.model, diffusion.guide, x, num_particles=2, mask=mask)

    mask = distinct(7).abs() > 0.3
    found = {
        "seven": over_ranks(bound, distinct(7))._asdict(),
        "one": over_ranks(bound, distinct(1))._asdict(),
        "masked": over_ranks(bound, distinct(7), mask)._asdict(),
        "drawn": pyro.set_rng_seed(0) or over_ranks(diffusion.sample, 7),
        "again": over_ranks(diffusion.sample, 7),
        "drawn once more": pyro.set_rng_seed(0) or over_ranks(diffusion.sample, 7),
        "tree": over_ranks(
            lambda n, x, c: (
                torch.stack((x[:, 0], c["a"], c["b"][0].double(), torch.full((n,), n))).T
            ),
            7,
            distinct(7),
            {"a": distinct(7)[:, 1], "b": (torch.arange(7),)},
        ),
        "seen": over_ranks(lambda n: torch.full((n,), float(rank)), 7),
    }
    for name, function in (("fails", fails_on_one), ("means", lambda x: x.mean())):
        try:
            over_ranks(function, distinct(7))
        except ValueError as error:
            found[name] = str(error)
    return found


def fails_on_one(x):
    if torch.distributed.get_rank() == 1:
        raise ValueError("site 'x_3': got NaN")
    return x


# --- training ------------------------------------------------------------------------------------


def network_model(num_timesteps=STEPS, **arguments):
    torch.manual_seed(0)
    network = MLP((2,), hidden_size=16, num_blocks=1, **arguments)
    return DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(num_timesteps), (2,)))


def training_data(n=64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1))


class Record(Messenger):
    """What the guide drew, by step and site, each with the dimension that data are in."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"] and msg["name"] not in ("data", "timesteps"):
            value = msg["value"].detach().clone()
            where = value.dim() - msg["fn"].event_dim - 1
            self.steps[-1].setdefault(msg["name"], (value, where))


def lightning_trainer(folder, **arguments):
    import lightning.pytorch as lightning

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, **quiet | arguments)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def watch(record):
    """A callback that begins a step's record, and keeps the first gradient after it was averaged."""
    import lightning.pytorch as lightning

    class Watch(lightning.Callback):
        gradient = None

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            record.steps.append({})

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if self.gradient is None:
                self.gradient = torch.cat([p.grad.flatten() for p in module.parameters()])

    return Watch()


def adapt(diffusion, **arguments):
    from pyro_diffusion.training import SVIModule

    pair = diffusion.subsampled(timesteps=StratifiedTimesteps(1 / STEPS))
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    return SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), adam, **arguments)


def train(folder):
    """Four steps in two precisions, with what was drawn; then everything at once in bfloat16."""
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging

    found = {}
    for precision in ("64-true", "32-true"):
        lightning.seed_everything(3, verbose=False)
        diffusion, record = network_model(), Record()
        watched = watch(record)
        x = training_data().to(torch.float64 if "64" in precision else torch.float32)
        trainer = lightning_trainer(
            folder,
            devices=2,
            strategy="ddp",
            precision=precision,
            max_epochs=1,
            callbacks=[watched],
        )
        with record:
            trainer.fit(adapt(diffusion), ShuffledBatches(x, PER_RANK))
        found[precision] = {
            "gradient": watched.gradient, "draws": record.steps, "weights": weights(diffusion),
        }  # fmt: skip
    found["whole"] = six_steps(folder)
    found["resumed"] = six_steps(folder, Path(folder) / "step=2.ckpt")
    diffusion = network_model()
    trainer = lightning_trainer(
        folder, devices=2, strategy="ddp", precision="bf16-mixed", max_epochs=2,
        accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=[EMAWeightAveraging(decay=0.5)],
    )  # fmt: skip
    module = adapt(diffusion)
    trainer.fit(
        module, ShuffledBatches(training_data(), PER_RANK), OrderedBatches(training_data(9), 4)
    )
    found["bf16-mixed"] = weights(diffusion)
    found["history"] = module.history[4]
    found["states"] = module._generator_states()
    trainer.save_checkpoint(Path(folder) / "two.ckpt")
    return found


def six_steps(folder, path=None):
    """Weights after six steps, four to an epoch, with a checkpoint at the second; or on from there."""
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    lightning.seed_everything(3, verbose=False)
    diffusion, loader = network_model(), ShuffledBatches(training_data(), PER_RANK)
    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = lightning_trainer(
        folder, devices=2, strategy="ddp", max_steps=6, callbacks=[keep], enable_checkpointing=True
    )
    trainer.fit(adapt(diffusion), loader, ckpt_path=path, weights_only=True)
    return weights(diffusion)


def evaluation_module():
    from pyro_diffusion.training import SVIModule

    diffusion = exact()
    sgd = functools.partial(torch.optim.SGD, lr=0.0)
    return SVIModule(diffusion.model, diffusion.guide, Trace_ELBO(), sgd)


def evaluate(folder):
    """What ``Trainer.validate`` and ``test`` say of eleven data, of one, and of a padded loader."""
    found = {}
    for n in (11, 1):
        trainer = lightning_trainer(folder, devices=2, strategy="ddp")
        loader = OrderedBatches(distinct(n), 4)
        found[n] = {
            "val": trainer.validate(evaluation_module(), loader, verbose=False)[0],
            "test": trainer.test(evaluation_module(), loader, verbose=False)[0],
        }
    for distributed in (True, False):
        trainer = lightning_trainer(
            folder, devices=2, strategy="ddp", use_distributed_sampler=distributed
        )
        try:
            loader = DataLoader(TensorDataset(distinct(11)), batch_size=4)
            trainer.test(evaluation_module(), loader, verbose=False)
        except ValueError as error:
            found[f"distributed {distributed}"] = str(error)
    return found


# --- a run that is killed ------------------------------------------------------------------------


def losses_of_a_run(folder, resume=False, stop_after=None, shuffled=True, every=3):
    """Three epochs of eight steps, a checkpoint every three; ``{step: loss}``, in hexadecimal.

    The process kills itself after a step, or, told by a negative one, is left by an exception.
    """
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    from pyro_diffusion.training import CheckpointFiles, latest_checkpoint

    class Stop(ModelCheckpoint):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            losses[trainer.global_step] = float(outputs["loss"]).hex()
            with open(folder / "losses.txt", "a") as file:
                file.write(f"{trainer.global_step} {losses[trainer.global_step]}\n")
            if stop_after is not None and trainer.global_step == abs(stop_after):
                if stop_after > 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt

    folder, losses = Path(folder), {}
    folder.mkdir(exist_ok=True)
    lightning.seed_everything(3 if not resume else 4, verbose=False)
    module = adapt(network_model(dropout=0.2))
    x = training_data()
    loader = ShuffledBatches(x, 8) if shuffled else DataLoader(TensorDataset(x), 8, shuffle=True)
    keep = Stop(
        folder, save_top_k=-1, save_last="link", every_n_train_steps=every, filename="{step}"
    )
    trainer = lightning_trainer(
        folder, max_epochs=3, devices=1, enable_checkpointing=True, plugins=[CheckpointFiles()],
        callbacks=[EMAWeightAveraging(decay=0.9), keep], num_sanity_val_steps=1,
    )  # fmt: skip
    path = latest_checkpoint(folder, module) if resume else None
    validation = OrderedBatches(training_data(9), 4)
    trainer.fit(module, loader, validation, ckpt_path=path, weights_only=True)
    return losses | {"weights": weights(module).tolist()}


def killed(folder):
    """A run that is killed after step 13 of 24, in the middle of its second epoch."""
    losses_of_a_run(folder, stop_after=13)


if __name__ == "__main__":
    name, out = sys.argv[1:]
    result = globals()[name](out)
    torch.save(result, Path(out) / f"{name}_{os.environ.get('RANK', 0)}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
