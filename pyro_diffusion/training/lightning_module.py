r"""A Lightning module around ``ELBO()(model, guide)``, for training with Lightning's ``Trainer``.

The module computes the bound. Lightning does the rest: progress bar, checkpoints and resuming, weight
averaging (``EMAWeightAveraging``), gradient clipping, precision, devices and loggers are arguments of
its ``Trainer``. Plain ``SVI`` in a script needs none of this.

Lightning also starts the processes (``Trainer(strategy="ddp", devices=…, num_nodes=…)``). On several ranks
the module adds four things. Each rank draws noise of its own. The timesteps of all ranks together are
stratified (:class:`~pyro_diffusion.chains.JointStrata`). Validation counts each datum once. A checkpoint
holds the state of every rank's generators, so that a run that was killed and is resumed on as many processes
takes the same steps as a run without interruption.

The loss is :math:`-\widehat{\mathrm{ELBO}} / N` over a batch of :math:`N`, in nats per datum. The meaning of
a clipping threshold or a learning rate therefore does not depend on the batch size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from pyro_diffusion.bounds import ELBOTerms, elbo_terms
from pyro_diffusion.chains import JointStrata, SubsampledProgram
from pyro_diffusion.checks import require
from pyro_diffusion.given import by_position
from pyro_diffusion.params import check_state_dict
from pyro_diffusion.scoring import replayed
from pyro_diffusion.training.batches import ShuffledBatches, check_shares, split_batch
from pyro_diffusion.training.parallel import agreed_seed, gather, rank_and_size

_NUM_BLOCKS = 5  # blocks of timesteps; the sum of the terms in a block is logged
_MANY_BATCHES = 2**20  # more than a rank validates on, so that no two ranks have the same seeds


class SVIModule(lightning.LightningModule):
    r"""A Lightning module that minimises :math:`-\mathrm{ELBO}` of a Pyro model and guide.

    A batch is data of shape ``(N,) + event_shape``, alone, as the only tensor of a ``TensorDataset``, or
    in a dictionary of the programs' arguments (``{"x_0": …, "mask": …}``). Conditional data have a column
    ``"context"``, a tensor, tuple or dictionary of tensors with a row for each datum. A column ``"null"`` of
    booleans marks rows whose context was dropped, which
    ``ShuffledBatches({"x_0": x_0, "context": c}, 256, context_dropout=0.1)`` makes for training. Validation
    drops none, so that its bound is that of :math:`p(x \mid c)`.

    Training logs ``train_loss``, in nats per datum. Validation computes the bound with every timestep. It
    logs ``val_bits_per_dim``, ``val_elbo`` with ``val_elbo_error`` (one standard error of the mean, particles
    and data together), and the terms: ``val_x_0`` (reconstruction), ``val_x_T``, and blocks of timesteps
    between. ``Trainer.test`` logs the same as ``test_…``. Every validation draws the same noise, so that only
    the model changes between two of them.

    On several ranks each reads its own data. Use :class:`~pyro_diffusion.training.batches.ShuffledBatches`
    for training, and :class:`~pyro_diffusion.training.batches.OrderedBatches` for validation: it reads each
    datum exactly once. When training begins, a rank's noise is seeded by a number from rank 0's generator
    plus the rank. A single process has the same draws as without Lightning. Checkpoints hold the states of
    all generators, and ``trainer.fit(…, ckpt_path=…)`` continues from them.

    Args:
        model: Program for :math:`p`; a module, like all of this package's.
        guide: Program for :math:`q`.
        elbo: Loss, such as ``TraceMeanField_ELBO()``.
        optimizer: ``optimizer(parameters)`` returns a torch optimiser, or anything else that Lightning's
            ``configure_optimizers`` may return. An example is ``partial(torch.optim.Adam, lr=1e-3)``.
        validation: The (model, guide) pair whose bound is computed on validation data. By default these are
            the programs themselves; for a subsampled ``model`` they are the whole chain that it is
            subsampled from, with its ``posterior_guide``.
        num_particles: Trajectories for each validation datum.

    Attributes:
        history: Mean terms by timestep, ``(T + 1,)``, under the step of the validation. Row t is the term
            at ``x_t``, and row 0 the reconstruction.
            :func:`~pyro_diffusion.plots.plot_training` draws it. It is part of checkpoints.

    Raises:
        ValueError: Programs without parameters. From training: a loss that is not finite, with step and
            site. From validation on several ranks: a loader that repeats data. From loading: a checkpoint of
            another model.

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
        self.validation = _whole(model, guide) if validation is None else validation
        self.optimizer, self.num_particles = optimizer, num_particles
        self.history: dict[int, Tensor] = {}
        self._sums: list[Tensor] = []
        self._strata: JointStrata | None = None
        self._generators: list[dict[str, Tensor]] = []  # states to continue from, by rank
        self._resumed_at = 0  # the step of the checkpoint
        require(
            any(True for _ in self.parameters()),
            "arguments 'model' and 'guide'",
            "programs without parameters of their own",
            "modules",
            "Put pyro.param statements into a PyroModule, or train with pyro.infer.SVI.",
        )

    def configure_optimizers(self) -> Any:
        """The optimiser that the user passed, over all parameters of model and guide."""
        return self.optimizer(self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r""":math:`-\widehat{\mathrm{ELBO}} / N` of a batch."""
        x_0, given = split_batch(batch)
        data, rest = by_position(x_0, given)
        if self._strata is not None:
            self._strata.advance()
        try:
            with self._strata or nullcontext():
                loss = self.elbo(*data, **rest)
            if not loss.isfinite():
                raise ValueError(_first_that_is_not_finite(self.elbo, x_0, given))
        except ValueError as error:
            raise ValueError(f"step {self.global_step}: {error}") from error
        loss = loss / len(x_0)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(x_0))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compute the bound of a batch, with every timestep."""
        x_0, given = split_batch(batch)
        if not len(x_0):  # the end of a share that is shorter than another rank's
            return
        model, guide = self.validation
        with torch.random.fork_rng([x_0.device] if x_0.is_cuda else []):
            torch.manual_seed(rank_and_size()[0] * _MANY_BATCHES + len(self._sums))
            terms = elbo_terms(
                model, guide, x_0, num_particles=self.num_particles, progress=False, **given
            )
        self._sums.append(_sums(terms))

    test_step = validation_step

    def on_fit_start(self) -> None:
        """Give each rank its own noise, or the generators' states for it in a checkpoint."""
        rank, world_size = rank_and_size()
        self._strata = None
        self._restore_generators()
        if world_size > 1:
            steps = gather(self._resumed_at)
            require(
                len(set(steps)) == 1,
                "argument 'ckpt_path'",
                f"checkpoints of the steps {steps} on ranks 0 … {len(steps) - 1}",
                "the same one on all",
                "Keep checkpoints in a folder that every node can read.",
            )
            seed = agreed_seed()
            self._strata = JointStrata(rank, world_size, seed, self.device)
            torch.manual_seed(seed + rank)
            if len(self._generators) == world_size:
                self._restore_generators()
        self._generators = []

    def _restore_generators(self) -> None:
        """Set the generators to a checkpoint's states for this rank, or else to those for rank 0."""
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
        """Begin a new run with the first batch, also if an earlier run has used the loader."""
        if self.trainer.global_step == 0 and isinstance(
            self.trainer.train_dataloader, ShuffledBatches
        ):
            self.trainer.train_dataloader.rewind()

    def on_validation_start(self) -> None:
        """Raise an error for loaders that repeat data; discard the sums of an interrupted validation."""
        self._sums.clear()
        check_shares("validation", self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """As in validation."""
        self._sums.clear()
        check_shares("test", self.trainer.test_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log the terms, and keep them in the history."""
        terms = self._mean_terms("val")
        if not self.trainer.sanity_checking:
            self.history[self.global_step] = terms

    def on_test_epoch_end(self) -> None:
        """Log the terms."""
        self._mean_terms("test")

    def _mean_terms(self, stage: str) -> Tensor:
        """Terms by timestep, averaged over the data of all processes, and logged in blocks."""
        by_rank = gather(torch.stack(self._sums).sum(0).cpu() if self._sums else None)
        self._sums.clear()
        *sums, squares, bits, count = torch.stack([s for s in by_rank if s is not None]).sum(0)
        terms = torch.stack(sums) / count
        elbo, last = terms[0] - terms[1:].sum(), len(terms) - 1
        error = ((squares / count - elbo**2).clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
        numbers = {
            "bits_per_dim": bits / count,
            "elbo": elbo,
            "elbo_error": error,
            "x_0": terms[0],
            f"x_{last}": terms[-1],
        } | {
            _name_of(block.tolist()): terms[block].sum()
            for block in torch.arange(1, last).tensor_split(_NUM_BLOCKS)
            if len(block)
        }
        for name, number in numbers.items():  # the same on every rank
            self.log(
                f"{stage}_{name}",
                number.float(),
                prog_bar=name in ("bits_per_dim", "elbo"),
                sync_dist=True,
            )
        return terms

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the history and the states of all ranks' generators into a checkpoint."""
        checkpoint["history"] = self.history
        checkpoint["generators"] = gather(self._generator_states())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the history and the generators' states out of a checkpoint."""
        if self._trainer is not None and self._trainer.state.fn != "fit":
            return  # a test of these weights does not continue their run
        self.history = dict(checkpoint.get("history", {}))
        self._generators = checkpoint.get("generators", [])
        self._resumed_at = checkpoint.get("global_step", 0)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as ``torch.nn.Module`` does, after a check of all names and shapes."""
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)


def _whole(model: Callable[..., Any], guide: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The programs with every site. For a subsampled pair they are those of its family."""
    if not isinstance(model, SubsampledProgram):
        return model, guide
    family = model.owner
    return family.model, family.posterior_guide


def _name_of(block: list[int]) -> str:
    """``x_3_to_x_5`` for a block of timesteps, ``x_3`` for a single one."""
    return "_to_".join(f"x_{t}" for t in sorted({block[0], block[-1]}))


def _sums(terms: ELBOTerms) -> Tensor:
    """Sums over data of the terms by timestep, the square of the bound, bits per dimension, and one."""
    rows = terms.stacked
    bits = torch.full_like(rows[:1], terms.bits_per_dim().value)
    return torch.cat([rows, terms.elbo.square()[None], bits, torch.ones_like(bits)]).sum(1)


def _first_that_is_not_finite(elbo: Any, x_0: Tensor, given: dict[str, Any]) -> str:
    """Describe the first site whose log-probability is not finite, on a new draw."""
    for trace in replayed(elbo.model, elbo.guide, x_0, **given):
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
