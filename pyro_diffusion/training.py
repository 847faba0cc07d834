r"""Training at scale: the one adapter to the engine, a Lightning module around ``ELBO()(model, guide)``.

Everything that is not the bound is Lightning's own: progress bar, checkpoints and resuming, weight
averaging (``EMAWeightAveraging``), gradient clipping, precision, devices and loggers are arguments of
its ``Trainer``. Plain ``SVI`` in a script needs none of this.

The loss is :math:`-\widehat{\mathrm{ELBO}} / N` over a batch of :math:`N`, in nats per datum, so that a
clipping threshold or a learning rate does not change its meaning with the batch size.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

try:
    import lightning.pytorch as lightning
except ImportError as error:
    raise ImportError(
        "pyro_diffusion.training: got no installation of Lightning; expected lightning>=2.6. Install "
        "it with pip install 'pyro-diffusion[lightning]', or train with pyro.infer.SVI."
    ) from error

from pyro_diffusion.bounds import ELBOTerms, elbo_terms
from pyro_diffusion.chains import SubsampledProgram
from pyro_diffusion.compilation import compile_elbo
from pyro_diffusion.store import check_state

__all__ = ["SVIModule", "compile_elbo"]

_NUM_BLOCKS = 5  # of timesteps, whose terms are logged together


class SVIModule(lightning.LightningModule):
    r"""A Lightning module that minimises :math:`-\mathrm{ELBO}` of a Pyro model and guide.

    A batch is data of shape ``(N,) + event_shape``, alone, as the only tensor of a ``TensorDataset``, or
    in a dictionary of the programs' arguments (``{"x_0": …, "mask": …}``). Logged are ``train_loss``
    (nats per datum); from validation data, with every timestep, ``val_bits_per_dim``, ``val_elbo`` with
    ``val_elbo_error`` (one standard error of the mean, particles and data together) and the terms:
    ``val_x_0`` (reconstruction), ``val_x_T`` and blocks of timesteps between; from ``Trainer.test`` the
    same as ``test_…``. Noise is the same at every validation, so that what changes is the model.

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
            and site; from loading, a checkpoint of another model.

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
        try:
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
        model, guide = self.validation
        with torch.random.fork_rng([x_0.device] if x_0.is_cuda else []):
            torch.manual_seed(len(self._sums))
            terms = elbo_terms(
                model, guide, x_0, num_particles=self.num_particles, progress=False, **given
            )
        self._sums.append(_sums(terms))
        bits = terms.bits_per_dim().value
        self.log(f"{stage}_bits_per_dim", bits, prog_bar=True, batch_size=len(x_0), sync_dist=True)

    def _mean_terms(self, stage: str) -> Tensor:
        """Terms by timestep, averaged over the data of all processes, and logged in blocks."""
        sums = torch.stack(self._sums).sum(0).to(self.device)
        self._sums.clear()
        *sums, squares, count = self.all_gather(sums).reshape(-1, len(sums)).sum(0).cpu()
        terms = torch.stack(sums) / count
        elbo, last = terms[0] - terms[1:].sum(), len(terms) - 1
        error = ((squares / count - elbo**2).clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
        self.log(f"{stage}_elbo", elbo.float(), prog_bar=True, sync_dist=True)
        self.log(f"{stage}_elbo_error", error.float(), rank_zero_only=True)
        self.log(f"{stage}_x_0", terms[0].float(), rank_zero_only=True)
        self.log(f"{stage}_x_{last}", terms[-1].float(), rank_zero_only=True)
        for block in torch.arange(1, last).tensor_split(_NUM_BLOCKS):
            if len(block):
                name = f"{stage}_x_{int(block[0])}"
                name += f"_to_x_{int(block[-1])}" if len(block) > 1 else ""
                self.log(name, terms[block].sum().float(), rank_zero_only=True)
        return terms

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the history into a checkpoint."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the history out of a checkpoint."""
        self.history = dict(checkpoint.get("history", {}))

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
    """Sums over data: terms by timestep, the square of the bound, one."""
    rows = torch.cat([terms.reconstruction[None], terms.transition, terms.prior[None]])
    rows = torch.cat([rows, terms.elbo.square()[None], torch.ones_like(rows[:1])])
    return rows.sum(1)


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
