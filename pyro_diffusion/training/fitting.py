r"""Fit a model in one call: what a training script writes by hand around ``SVI``.

.. math::
    \theta, \phi \leftarrow \operatorname*{arg\,max}_{\theta, \phi}
        \sum_n w_n\, \mathrm{ELBO}_n(\theta, \phi),

with :math:`w_n = 1` unless data have weights. :func:`fit` holds some data out, trains on the rest in batches,
and leaves the weights whose held-out bound was best in the model. Lightning runs the loop
(:class:`~pyro_diffusion.training.lightning_module.SVIModule`). A :class:`Recipe` says how to train, and a
:class:`Fit` what came out.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import nn

from pyro_diffusion.checks import (
    check_argument,
    check_between,
    check_count,
    check_positive,
    require,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.family import Pair, programs
from pyro_diffusion.hvae import HierarchicalVAE
from pyro_diffusion.training.batches import check_context_dropout, each
from pyro_diffusion.training.columns import Passes, parts_of
from pyro_diffusion.training.fitted import Fit
from pyro_diffusion.training.held_out import HeldOut
from pyro_diffusion.training.losses import loss_of

if TYPE_CHECKING:
    from pyro_diffusion.training.watching import Watch

_STEPS = 5000  # where neither steps nor seconds are said
_MOST_READ = (
    1600  # held-out data of a check, a random choice; the best weights are read with all of them
)


class Recipe(NamedTuple):
    """How :func:`fit` trains."""

    learning_rate: float = 2e-3  #: of AdamW, after the warm-up; it falls to zero along a cosine
    batch_size: int = 256  #: rows in a batch; all of them where there are fewer
    weight_decay: float = 0.01  #: of AdamW, for weights of two axes or more
    warmup_steps: int = 100  #: steps over which the learning rate rises
    clip: float = 5.0  #: longest gradient, in running means of their norms
    averaging: float = 0.998  #: share of the averaged weights that a step keeps
    #: checks in a row with the best ahead by two standard errors, after which a run ends
    patience: int = 3
    num_timesteps: int = 1  #: random timesteps for each datum of a batch, for a diffusion model
    #: share of the run over which the weight of the latent sites rises from zero to one, so that levels do
    #: not collapse at the beginning; by default 0.2 for a hierarchical VAE, and none for anything else
    kl_warmup: float | None = None
    #: loss; by default analytic KLs, or log-ratios where a guide has another order than its model
    elbo: ELBO | None = None
    #: whether the step is machine code; by default in long runs, which repay the compilation (others run the
    #: graph of the programs, and short ones the programs); ``True`` is an error where programs are not static
    compiled: bool | None = None
    #: probability with which the context of a row of a batch is dropped, so that a network with a null token
    #: also learns data without a context; held-out data keep theirs
    context_dropout: float = 0.0


def fit(
    family: Pair,
    x_0: Any,
    *,
    validation: Any = None,
    weights: Any = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    recipe: Recipe | None = None,
    **given: Any,
) -> Fit:
    r"""Fit a model to data: batches, learning rate, averaged weights, validation, stopping, checkpoints.

    The model is trained in place. Some data are held out, and 20 times in a run their bound is read (that of
    1,600 of them, if there are more), with the averaged weights and always the same noise. The weights with
    the best held-out bound are in the model at the end, also after an error or an interrupt. A run ends early
    when the best has been ahead of the last by two standard errors of their paired difference three times in
    a row, but not in its first quarter, or before a quarter of it has followed the warm-up of the KLs.

    A diffusion model is trained at random timesteps
    (:meth:`~pyro_diffusion.diffusion.DiffusionModel.subsampled`), a hierarchical VAE by its own programs. In
    runs of 300 steps and more the step is traced into one graph
    (:func:`~pyro_diffusion.training.compile_elbo`) where the programs are static. Lightning runs it, on the
    device that the model is on. Fit one model at a time in a process, because Pyro's handlers are shared by
    all threads; use processes for several.

    Args:
        family: A ``DiffusionModel``, a ``HierarchicalVAE``, or a tuple ``(model, guide)`` of modules.
        x_0: Data: a tensor or an array of shape ``(N,)`` + the shape of one datum, a map-style dataset, or a
            dictionary of columns ``{"x_0": …, "mask": …}``. An ``np.memmap`` is read batch by batch.
        validation: Held-out data, in one of those forms; conditional data as
            ``{"x_0": …, "context": …}``. By default a tenth of the data is split off at random, at most
            10,000.
        weights: One number for each datum, its share of the loss and of the held-out bound, not negative.
            They are divided by their mean.
        max_steps: Steps of the optimiser; 5,000 by default if there is no ``max_seconds``.
        max_seconds: Seconds of training, checks and compilation included. The learning rate reaches zero at
            the first of the two ends.
        path: Folder of the run's checkpoint, ``last.ckpt``, written at every check. If there is one, the run
            goes on from it; a run that is over is read and not trained.
        seed: Of the split, the batches and the noise. Random states outside are as before.
        progress: Whether to show a progress bar, in runs of more than five seconds.
        recipe: How to train; ``Recipe()`` by default.
        given: What goes with the data, a row for each datum: ``mask=`` of observed entries, in the data's
            shape; ``context=`` of conditional data, a tensor or an array, or a tuple or dictionary of them;
            ``null=`` beside it, true for data without a context; and what else the programs take by name.

    Returns:
        A :class:`Fit`: the history of the run, the best held-out bound, and why the run ended.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: Data that do not fit the model, or too few to hold some out; a context that is not
            finite, has a label that does not exist, or is missing in held-out data; context dropout without a
            context or a null token; a step whose loss is not finite; a folder with the checkpoint of another
            model or of other data.

    Warns:
        UserWarning: The last weights are behind the best by more than two standard errors: the model
            overfits.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,), hidden_size=32), LogSNRSchedule(20), event_shape=(2,))
        >>> result = fit(DiffusionModel(denoiser), torch.randn(200, 2), max_steps=50)
        >>> result.num_data, result.num_held_out, result.ended
        (180, 20, 'all steps taken')
    """
    from pyro_diffusion.training import SVIModule  # noqa: F401 - it says how to install Lightning
    from pyro_diffusion.training.watching import Watch

    recipe = _check_recipe(Recipe() if recipe is None else recipe, given)
    if recipe.kl_warmup is None:
        recipe = recipe._replace(kl_warmup=0.2 if isinstance(family, HierarchicalVAE) else 0.0)
    limits = _limits(max_steps, max_seconds)
    model, guide = _programs(family, recipe)
    device = _device(model, guide)
    seed = check_count("seed", seed, 0, "It determines the split, the batches and the noise.")
    folder = None if path is None else _folder(path)
    pair = model, guide
    with _seeded(seed):
        data = parts_of(family, pair, x_0, validation, seed, device, weights=weights, **given)
    held_out = HeldOut(family, data.held_out, recipe.batch_size, device)
    size, dropout = min(recipe.batch_size, len(data.training["x_0"])), recipe.context_dropout
    batches = Passes(data.training, size, seed=seed, context_dropout=dropout)
    watch = Watch(held_out.fewer(_MOST_READ), recipe, *limits, folder, progress)
    with _seeded(seed), _quiet(), _modes_kept(model, guide):
        _train(model, guide, batches, watch)
    result = Fit.of(watch.record, held_out.estimate(), watch.ended, family, data)
    if result.overfits:
        warnings.warn(result.overfitting, UserWarning, stacklevel=2)
    return result


def _check_recipe(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    of_recipe = sorted(set(given) & set(Recipe._fields))
    require(
        not of_recipe,
        f"argument {of_recipe[0] if of_recipe else ''!r}",
        "it as an argument of fit",
        "it as a field of the recipe",
        f"Pass recipe=Recipe({of_recipe[0] if of_recipe else ''}=…).",
    )
    require(
        isinstance(recipe, Recipe),
        "argument 'recipe'",
        f"a {type(recipe).__name__}",
        "a Recipe",
        "Pass Recipe(learning_rate=1e-3), say.",
    )
    check_positive("learning_rate", recipe.learning_rate, "It is a field of Recipe.")
    meaning, remedy = "a number of mean norms", "math.inf clips nothing."
    check_between("clip", recipe.clip, 0.0, math.inf, meaning, remedy, ends="(]")
    if recipe.kl_warmup is not None:
        check_between("kl_warmup", recipe.kl_warmup, 0.0, 1.0, "a share", "Try 0.2.", ends="[)")
    for name, least in (
        ("batch_size", 1),
        ("warmup_steps", 0),
        ("patience", 1),
        ("num_timesteps", 1),
    ):
        check_count(name, getattr(recipe, name), least, "It is a field of Recipe.")
    for name, most in (("weight_decay", math.inf), ("averaging", 1.0)):
        remedy = "It is a field of Recipe."
        check_between(name, getattr(recipe, name), 0.0, most, "a share", remedy, ends="[)")
    check_context_dropout(recipe.context_dropout)
    if recipe.elbo is not None:
        check_argument("elbo", recipe.elbo, ELBO, "TraceMeanField_ELBO()")
    return recipe


def _limits(max_steps: int | None, max_seconds: float | None) -> tuple[int | None, float | None]:
    """The ends of the run: 5,000 steps where none is said."""
    if max_seconds is not None:
        check_positive("max_seconds", max_seconds, "Pass the seconds of training.")
    if max_steps is None:
        return (_STEPS if max_seconds is None else None), max_seconds
    return check_count("max_steps", max_steps, 1, "It is the number of steps."), max_seconds


def _programs(family: Pair, recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """The pair that is trained."""
    if isinstance(family, DiffusionModel):
        pair = family.subsampled(num_timesteps=recipe.num_timesteps)
        return pair.model, pair.guide
    for program in (found := programs(family)):
        require(
            isinstance(program, nn.Module),
            "argument 'family'",
            f"a program that is a {type(program).__name__}",
            "modules, whose parameters can be found",
            "Put pyro.param statements into a PyroModule, or train with pyro.infer.SVI.",
        )
    return found  # type: ignore[return-value]


def _folder(path: str | os.PathLike[str]) -> Path:
    """The folder of the checkpoint, made if it is missing."""
    try:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except (OSError, TypeError) as error:
        raise ValueError(
            f"argument 'path': got {path!r} ({error}); expected a folder in which a checkpoint can be "
            "written. Pass the path of a new folder, 'runs/first', say."
        ) from error


def _device(*programs: nn.Module) -> torch.device:
    for program in programs:
        for parameter in program.parameters():
            if parameter.requires_grad:
                return parameter.device
    raise ValueError(
        "argument 'family': got programs without parameters that require gradients; expected some to fit. "
        "Read an exact model with elbo_terms, and free frozen parameters with model.requires_grad_(True)."
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A random state of the run's own; that outside is as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _modes_kept(*programs: nn.Module) -> Iterator[None]:
    """Leave every module in the mode, training or evaluation, that it was in."""
    modes = [(part, part.training) for program in programs for part in program.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its lines about devices, and without its advice on loaders."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)


def _adamw(parameters: Iterator[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices and kernels, and none on biases and scales."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        fused=all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained),
    )


def _train(model: nn.Module, guide: nn.Module, batches: Passes, watch: "Watch") -> None:
    """Run Lightning's loop, from the folder's checkpoint if there is one, and leave the best weights."""
    import lightning.pytorch as lightning

    from pyro_diffusion.training.checkpoints import CheckpointFiles, latest_checkpoint
    from pyro_diffusion.training.watching import WatchedModule, tensors_of

    recipe, device = watch.recipe, watch.held_out.device
    model.train()
    guide.train()
    limits = watch.max_steps, watch.max_seconds
    first = each(lambda rows: rows.to(device), batches.first())
    loss = loss_of(model, guide, recipe, first, limits, watch.kl_share)
    module = WatchedModule(model, guide, loss, partial(_adamw, recipe=recipe))
    trainer = lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index or 0] if device.type == "cuda" else 1,
        max_steps=-1 if watch.max_steps is None else watch.max_steps,
        max_epochs=-1,
        callbacks=[watch],
        plugins=[CheckpointFiles()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    checkpoint = None if watch.folder is None else latest_checkpoint(watch.folder, module)
    try:
        trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # what Lightning makes of Ctrl+C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise
    finally:
        module.to(device)  # Lightning moves it to the CPU
        watch.record.restore(tensors_of(module))
