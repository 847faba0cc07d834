r"""Training at scale: the one adapter to the engine, a Lightning module around ``ELBO()(model, guide)``.

Everything that is not the bound is Lightning's own: progress bar, checkpoints and resuming, weight
averaging (``EMAWeightAveraging``), gradient clipping, precision, devices and loggers are arguments of
its ``Trainer``. Plain ``SVI`` in a script needs none of this.

Processes are Lightning's as well (``Trainer(strategy="ddp", devices=…, num_nodes=…)``). Under several
ranks the module sees to it that each draws noise of its own, that the timesteps of all together are
stratified (:class:`~pyro_diffusion.timesteps.JointStrata`), that validation counts each datum once, and
that a checkpoint holds the state of every rank's generators: a run that was killed continues, on as
many processes, as if it had not been.

The loss is :math:`-\widehat{\mathrm{ELBO}} / N` over a batch of :math:`N`, in nats per datum, so that a
clipping threshold or a learning rate does not change its meaning with the batch size.
"""

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

try:
    import lightning.pytorch as lightning
    from lightning.fabric.plugins import TorchCheckpointIO
except ImportError as error:
    raise ImportError(
        "pyro_diffusion.training: got no installation of Lightning; expected lightning>=2.6. Install "
        "it with pip install 'pyro-diffusion[lightning]', or train with pyro.infer.SVI."
    ) from error

from pyro_diffusion.batches import ShuffledBatches
from pyro_diffusion.bounds import ELBOTerms, elbo_terms
from pyro_diffusion.chains import JointStrata, SubsampledProgram
from pyro_diffusion.compilation import compile_elbo
from pyro_diffusion.parallel import agreed_seed, gather, rank_and_size
from pyro_diffusion.params import ParamScope, check_state

__all__ = ["CheckpointFiles", "SVIModule", "compile_elbo", "latest_checkpoint"]

_NUM_BLOCKS = 5  # of timesteps, whose terms are logged together
_MANY_BATCHES = 2**20  # more than a rank validates on: no two ranks' noise is seeded alike


class SVIModule(lightning.LightningModule):
    r"""A Lightning module that minimises :math:`-\mathrm{ELBO}` of a Pyro model and guide.

    A batch is data of shape ``(N,) + event_shape``, alone, as the only tensor of a ``TensorDataset``, or
    in a dictionary of the programs' arguments (``{"x_0": …, "mask": …}``). Logged are ``train_loss``
    (nats per datum); from validation data, with every timestep, ``val_bits_per_dim``, ``val_elbo`` with
    ``val_elbo_error`` (one standard error of the mean, particles and data together) and the terms:
    ``val_x_0`` (reconstruction), ``val_x_T`` and blocks of timesteps between; from ``Trainer.test`` the
    same as ``test_…``. Noise is the same at every validation, so that what changes is the model.

    On several ranks each reads its own data: :class:`~pyro_diffusion.batches.ShuffledBatches` for
    training, :class:`~pyro_diffusion.batches.OrderedBatches` for validation, of which none is lost or
    counted twice. Noise is then seeded, when training begins, by a number from rank 0's generator plus
    the rank; one process alone draws what it would have drawn without Lightning. Checkpoints hold the
    states of all generators, with which ``trainer.fit(…, ckpt_path=…)`` goes on.

    Args:
        model: Program for :math:`p`; a module, like all of this package's.
        guide: Program for :math:`q`.
        elbo: Loss, such as ``TraceMeanField_ELBO()``.
        optimizer: ``optimizer(parameters)`` gives a torch optimiser, or whatever else Lightning's
            ``configure_optimizers`` may return; ``partial(torch.optim.Adam, lr=1e-3)``.
        validation: The (model, guide) pair whose bound is read on validation data. By default the
            whole chain that ``model`` is subsampled from, with its ``posterior_guide``, or the
            programs themselves.
        num_particles: Trajectories for each validation datum.

    Attributes:
        history: Mean terms by timestep, ``(T + 1,)`` (row t is at ``x_t``; row 0 the reconstruction), by
            the step at which validation data were read; :func:`~pyro_diffusion.plots.plot_training`
            draws it. It is part of checkpoints.

    Raises:
        ValueError: Programs without parameters; from training, a loss that is not finite, with step
            and site; from validation on several ranks, a loader that repeats data; from loading, a
            checkpoint of another model.

    Example:
        >>> from functools import partial
        >>> denoiser = NeuralDenoiser(MLP((2,)), LogSNRSchedule(20), event_shape=(2,))
        >>> pair = DiffusionModel(denoiser).subsampled()
        >>> optimizer = partial(torch.optim.Adam, lr=1e-3)
        >>> module = SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), optimizer)

    References:
        PyTorch Lightning: https://lightning.ai/docs/pytorch/stable/common/trainer.html
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        elbo: Callable[..., nn.Module],
        optimizer: Callable[[Iterator[nn.Parameter]], Any],
        *,
        validation: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        num_particles: int = 1,
    ) -> None:
        super().__init__()
        self.elbo = elbo(model, guide)
        self.optimizer = optimizer
        self.validation = _whole(model, guide) if validation is None else validation
        self.num_particles = num_particles
        self.history: dict[int, Tensor] = {}
        self._sums: list[Tensor] = []
        self._strata: JointStrata | None = None
        self._generators: list[dict[str, Tensor]] = []  # states to go on from, by rank
        self._resumed_at = 0  # the step of the checkpoint
        if not list(self.parameters()):
            raise ValueError(
                "arguments 'model' and 'guide': got programs without parameters of their own; expected "
                "modules. Put pyro.param statements into a PyroModule, or train with pyro.infer.SVI."
            )

    def configure_optimizers(self) -> Any:
        """The optimiser that was asked for, over all parameters of model and guide."""
        return self.optimizer(self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r""":math:`-\widehat{\mathrm{ELBO}} / N` of a batch."""
        x_0, given = _arguments(batch)
        if self._strata is not None:
            self._strata.advance()
        try:
            with self._strata or nullcontext():
                loss = self.elbo(x_0, **given)
            if not loss.isfinite():
                raise ValueError(_first_that_is_not_finite(self.elbo, x_0, given))
        except ValueError as error:
            raise ValueError(f"step {self.global_step}: {error}") from error
        loss = loss / len(x_0)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(x_0))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Read the bound of a batch, with every timestep."""
        self._read("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As in validation."""
        self._read("test", batch)

    def on_fit_start(self) -> None:
        """Give each rank noise of its own, or what it had when the checkpoint was written.

        What is left is what an epoch begins with: a DataLoader that draws its order draws it again.
        """
        rank, world_size = rank_and_size()
        self._strata = None
        self._restore_generators()
        if world_size > 1:
            _check_same_step(gather(self._resumed_at))
            seed = agreed_seed()
            self._strata = JointStrata(rank, world_size, seed, self.device)
            torch.manual_seed(seed + rank)
            if len(self._generators) == world_size:
                self._restore_generators()
        self._generators = []

    def _restore_generators(self) -> None:
        """Take up the states of a checkpoint: those of this rank, or of rank 0 where there was no such."""
        if not self._generators:
            return
        rank = rank_and_size()[0]
        states = self._generators[rank if rank < len(self._generators) else 0]
        torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)
        if "strata" in states and self._strata is not None:
            self._strata.generator.set_state(states["strata"].cpu())

    def _generator_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        if self._strata is not None:
            states["strata"] = self._strata.generator.get_state()
        return states

    def on_train_start(self) -> None:
        """A run that begins anew begins with the first batch, wherever its loader was left."""
        if self.trainer.global_step == 0 and isinstance(
            self.trainer.train_dataloader, ShuffledBatches
        ):
            self.trainer.train_dataloader.rewind()

    def on_validation_start(self) -> None:
        """Refuse loaders that count data twice; begin with nothing, if the last validation broke off."""
        self._sums.clear()
        _check_shares("validation", self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """As in validation."""
        self._sums.clear()
        _check_shares("test", self.trainer.test_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log the terms, and keep them in the history."""
        terms = self._mean_terms("val")
        if not self.trainer.sanity_checking:
            self.history[self.global_step] = terms

    def on_test_epoch_end(self) -> None:
        """Log the terms."""
        self._mean_terms("test")

    def _read(self, stage: str, batch: Any) -> None:
        x_0, given = _arguments(batch)
        if not len(x_0):  # the end of a share that is shorter than another rank's
            return
        model, guide = self.validation
        with torch.random.fork_rng([x_0.device] if x_0.is_cuda else []):
            torch.manual_seed(rank_and_size()[0] * _MANY_BATCHES + len(self._sums))
            terms = elbo_terms(
                model, guide, x_0, num_particles=self.num_particles, progress=False, **given
            )
        self._sums.append(_sums(terms))

    def _mean_terms(self, stage: str) -> Tensor:
        """Terms by timestep, averaged over the data of all processes, and logged in blocks."""
        by_rank = gather(torch.stack(self._sums).sum(0).cpu() if self._sums else None)
        self._sums.clear()
        everything = torch.stack([sums for sums in by_rank if sums is not None]).sum(0)
        *sums, squares, bits, count = everything
        terms = torch.stack(sums) / count
        elbo, last = terms[0] - terms[1:].sum(), len(terms) - 1
        error = ((squares / count - elbo**2).clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
        numbers = {"bits_per_dim": bits / count, "elbo": elbo, "elbo_error": error}
        numbers |= {"x_0": terms[0], f"x_{last}": terms[-1]}
        for block in torch.arange(1, last).tensor_split(_NUM_BLOCKS):
            if len(block):
                name = f"x_{int(block[0])}"
                name += f"_to_x_{int(block[-1])}" if len(block) > 1 else ""
                numbers[name] = terms[block].sum()
        for name, number in numbers.items():  # the same on every rank
            in_bar = name in ("bits_per_dim", "elbo")
            self.log(f"{stage}_{name}", number.float(), prog_bar=in_bar, sync_dist=True)
        return terms

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the history and the states of all ranks' generators into a checkpoint."""
        checkpoint["history"] = self.history
        checkpoint["generators"] = gather(self._generator_states())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the history and the generators' states out of a checkpoint."""
        if self._trainer is not None and self._trainer.state.fn != "fit":
            return  # a test of older weights is no return to their run
        self.history = dict(checkpoint.get("history", {}))
        self._generators = checkpoint.get("generators", [])
        self._resumed_at = checkpoint.get("global_step", 0)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``torch.nn.Module`` does, but names and shapes are compared before anything is copied."""
        check_state(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)


def _whole(model: Callable[..., Any], guide: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The programs with every site: of the family that a subsampled pair belongs to."""
    if not isinstance(model, SubsampledProgram):
        return model, guide
    family: Any = model.owner
    if not hasattr(family, "posterior_guide"):
        raise ValueError(
            "argument 'validation': got none for a subsampled pair that stands alone; expected the model "
            "and guide with every site, whose bound validation reads. Pass validation=(model, guide)."
        )
    return family.model, family.posterior_guide


def _arguments(batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """A batch as data and the other arguments of the programs."""
    if isinstance(batch, Mapping) and "x_0" in batch:
        return batch["x_0"], {name: value for name, value in batch.items() if name != "x_0"}
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        got = f"a {type(batch).__name__}" + (
            f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        )
        raise ValueError(
            f"argument 'batch': got {got}; expected a tensor of data, one tensor in a list, or a "
            'dictionary with "x_0". Name further arguments: {"x_0": x_0, "mask": mask}.'
        )
    return batch, {}


def _sums(terms: ELBOTerms) -> Tensor:
    """Sums over data: terms by timestep, the square of the bound, bits per dimension, one."""
    rows = torch.cat([terms.reconstruction[None], terms.transition, terms.prior[None]])
    bits = torch.full_like(rows[:1], terms.bits_per_dim().value)
    return torch.cat([rows, terms.elbo.square()[None], bits, torch.ones_like(bits)]).sum(1)


def _check_shares(stage: str, loaders: Any) -> None:
    """Raise a ``ValueError`` if several ranks would read the same data."""
    world_size = rank_and_size()[1]
    loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        if world_size == 1 or not isinstance(loader, DataLoader):
            continue
        sampler, num_data = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
        padded = isinstance(sampler, DistributedSampler) and sampler.total_size > num_data
        if padded or isinstance(sampler, SequentialSampler | RandomSampler):
            raise ValueError(
                f"{stage} data: got a DataLoader with a {type(sampler).__name__}, which reads some of "
                f"{num_data} data more than once on {world_size} ranks; expected each of them once, on one "
                "rank. Pass OrderedBatches(data, batch_size) as the dataloader."
            )


def _check_same_step(steps: list[int]) -> None:
    """Raise a ``ValueError`` on every rank if some of them go on from elsewhere."""
    if len(set(steps)) > 1:
        raise ValueError(
            f"argument 'ckpt_path': got checkpoints of the steps {steps} on ranks 0 … {len(steps) - 1}; "
            "expected the same one on all. Keep checkpoints in a folder that every node sees."
        )


def _first_that_is_not_finite(elbo: nn.Module, x_0: Tensor, given: dict[str, Any]) -> str:
    """Name the site whose log-probability spoils the loss, on a fresh draw."""
    guide = poutine.trace(elbo.guide).get_trace(x_0, **given)
    model = poutine.trace(poutine.replay(elbo.model, trace=guide)).get_trace(x_0, **given)
    for trace in (guide, model):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site["log_prob"].isfinite().all():
                return (
                    f"site {name!r}: got a log-probability that is NaN or infinite; expected finite "
                    "numbers. Lower the learning rate, clip gradients (Trainer(gradient_clip_val=…)), or "
                    "check the data for values outside the support."
                )
    return (
        "loss: got NaN or infinity, and finite numbers at every site of a second draw; expected finite "
        "numbers. Lower the learning rate or clip gradients (Trainer(gradient_clip_val=…))."
    )


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, written aside in their own folder and renamed when they are whole.

    ``Trainer(plugins=[CheckpointFiles()])``. Without it a checkpoint is gathered in the system's temporary
    folder; where that is another file system, it is copied over the older one, and a process that is
    killed meanwhile leaves neither.

    Raises:
        ValueError: From reading, a file that is cut short or no checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; an older one of that name stays until this one is whole."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        try:
            torch.load(aside, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {str(path)!r}: got something that weights_only=True would not read again "
                f"({str(error).splitlines()[0]}); expected tensors, Python's numbers and strings. Look for "
                "NumPy's numbers among the optimiser's arguments, or objects in a callback's state."
            ) from error
        os.replace(aside, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, or say in words why it cannot be read."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch has one for each way in which a file can be broken
            raise ValueError(
                f"checkpoint {str(path)!r}: got a file that cannot be read ({type(error).__name__}); "
                "expected a whole checkpoint of Lightning's. It was cut short, or is something else: "
                "resume from latest_checkpoint(folder, module), which passes over such files."
            ) from error


def latest_checkpoint(folder: str | os.PathLike[str], module: SVIModule) -> Path | None:
    """The newest whole checkpoint of this very model, for ``trainer.fit(…, ckpt_path=…)``.

    Files are looked at from the newest to the oldest, and read with ``weights_only=True``. One that is
    cut short, damaged or of another model is passed over with a warning that says why.

    Args:
        folder: Where checkpoints (``*.ckpt``) are, or are going to be.
        module: The module that is going to be trained on; it is left as it is.

    Returns:
        The file, or ``None`` where there is no checkpoint at all: the run begins.

    Raises:
        ValueError: Checkpoints of which none is whole and of this model: rather than begin anew over them.
    """
    if Path(folder).is_file():
        raise ValueError(
            f"argument 'folder': got the file {str(folder)!r}; expected the folder where checkpoints are. "
            "Pass a file to trainer.fit(…, ckpt_path=…) itself."
        )
    # Each once: last.ckpt is often a link, and for a moment a link to nothing.
    files = {path.resolve() for path in Path(folder).glob("*.ckpt") if path.is_file()}
    wrong = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            _check_checkpoint(path, module)
        except ValueError as error:
            wrong.append(f"{path.name}: {error}")
            continue
        for reason in wrong:
            warnings.warn(f"passed over {reason}", stacklevel=2)
        return path
    if wrong:
        raise ValueError(
            f"argument 'folder': got {str(folder)!r}, where no checkpoint can be used ({'; '.join(wrong)}); "
            "expected a whole one of this model, or none. Put another copy there, build the model with the "
            "arguments that it was saved with, or train in another folder."
        )
    return None


def _check_checkpoint(path: Path, module: SVIModule) -> None:
    """Raise a ``ValueError`` if a file is not a whole checkpoint of a model like this; change nothing."""
    checkpoint = CheckpointFiles().load_checkpoint(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f"checkpoint {str(path)!r}: got a file whose part {damaged!r} is damaged; expected a whole one. "
            "Use another copy."
        )
    if not isinstance(checkpoint, dict) or not {"state_dict", "loops"} <= set(checkpoint):
        raise ValueError(
            f"checkpoint {str(path)!r}: got a file without the state of a run; expected one that Lightning "
            "wrote. Numbers of a model alone are loaded with model.load(path)."
        )
    state = checkpoint["state_dict"]
    check_state(module, state)
    for name, scope in module.named_modules():
        if isinstance(scope, ParamScope):
            scope.set_extra_state(state[f"{name}._extra_state"])
