r"""A run of :func:`~pyro_diffusion.training.fit` seen by Lightning: one callback around every step.

Lightning owns the loop, the optimiser's step, the devices and the checkpoints. :class:`Watch` sets the
learning rate, shortens gradients, averages the weights and reads the held-out bound. The learning rate of a
step is

.. math::
    \eta(u) = \eta_0 \min\!\big(1, \tfrac{s + 1}{W}\big)\, \tfrac12 \big(1 + \cos \pi u\big),

where :math:`s` is the step, :math:`W` the steps of warm-up (a twentieth of the run at most), and :math:`u`
the share of the run that is over, in steps or in seconds. The average of the weights after :math:`s` steps,
taken at every fifth step with the fifth power of :math:`d_s`, is
:math:`\bar\theta \leftarrow \bar\theta + (1 - d_s)(\theta - \bar\theta)` with
:math:`d_s = \min(d, (1 + s)/(10 + s))`, so that the weights of the beginning soon have no share in it. A
gradient whose norm is more than :math:`c` times the running mean of the norms is shortened to that length.

References:
    Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019). https://arxiv.org/abs/1711.05101
    SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov and Hutter, 2017), the cosine.
    https://arxiv.org/abs/1608.03983
"""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pyro_diffusion.training.batches import each
from pyro_diffusion.training.columns import Columns
from pyro_diffusion.training.held_out import HeldOut, Record
from pyro_diffusion.training.lightning_module import SVIModule

if TYPE_CHECKING:
    from pyro_diffusion.training.fitting import Recipe


class WatchedModule(SVIModule):
    """An ``SVIModule`` without Lightning's log, which slows every step. :class:`Watch` keeps the losses."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    def transfer_batch_to_device(
        self, batch: Columns, device: torch.device, dataloader_idx: int
    ) -> Columns:
        """The batch, which is on the device already unless the data did not fit there."""
        moved: Columns = each(lambda column: column.to(device), batch)
        return moved


LAST = "last.ckpt"  #: name of the checkpoint in a run's folder
_NUM_CHECKS, _SHORTEST = 20, 25  # checks of a run; steps between two of them, at least
_EARLIEST = 0.25  # share of a run that is always taken: large steps may make a model worse at first
_WARM_UP = 0.05  # of a run, at most
_EVERY = 5  # steps after which the weights are averaged, and a check may be due
_COST = 0.05  # share of the time that checks take
_FEWEST_ROWS, _MOST_ROWS = 1024, 8192  # network rows of a check
_MEMORY = 0.02  # of the running mean of the gradients' norms: 50 steps


class Watch(WeightAveraging):
    """The callback of a run.

    Args:
        held_out: Held-out data.
        recipe: How to train.
        max_steps: Steps after which the run ends; ``None`` for none.
        max_seconds: Seconds after which it ends; ``None`` for none.
        folder: Where the checkpoint is written after every check, or ``None``.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        held_out: HeldOut,
        recipe: "Recipe",
        max_steps: int | None,
        max_seconds: float | None,
        folder: Path | None,
        progress: bool,
    ) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.held_out, self.recipe = held_out, recipe
        self.max_steps, self.max_seconds, self.folder = max_steps, max_seconds, folder
        self.record = Record(held_out, recipe.patience)
        self.seconds, self.ended = 0.0, ""
        self.kl_share = torch.ones((), device=held_out.device)
        self._start = time.perf_counter()
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._next = 0.0  # share of the run at which the next check is due
        self._bar = tqdm(
            desc="fitting", unit="step", total=max_steps, delay=5, disable=not progress
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Add the time of an earlier run to the clock; check the weights of the beginning."""
        self._parameters = [p for group in _groups(trainer) for p in group["params"]]
        self._start -= self.seconds
        self._bar.update(trainer.global_step)
        self._plan_check(trainer.global_step)  # a run that is resumed may have another length
        if not self.record.checks:
            self._check(trainer, pl_module)
        self._end_if_over(trainer, self.seconds)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate, and the weight of the latent sites."""
        step, recipe = trainer.global_step, self.recipe
        if recipe.kl_warmup:
            self.kl_share.fill_(min(1.0, self._share(step) / recipe.kl_warmup))
        steps = min(recipe.warmup_steps, _WARM_UP * (self.max_steps or math.inf))
        warm_up = min(1.0, (step + 1) / max(1.0, steps))
        cosine = (1 + math.cos(math.pi * min(1.0, self._share(step)))) / 2
        for group in _groups(trainer):
            group["lr"] = recipe.learning_rate * warm_up * cosine

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Shorten a gradient that is much longer than those before it."""
        mean = 0.0 if self._norm is None else float(self._norm)
        limit = self.recipe.clip * mean if mean > 0 else math.inf  # all gradients so far were zero
        norm = nn.utils.clip_grad_norm_(self._parameters, limit).detach().clamp(max=limit)
        self._norm = norm if self._norm is None or mean == 0 else self._norm.lerp(norm, _MEMORY)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the weights. Check them if it is time, and end the run if it is over."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._losses.append(outputs["loss"].detach())
        self._bar.update()
        step, seconds = trainer.global_step, time.perf_counter() - self._start
        self._end_if_over(trainer, seconds)
        if step == self.max_steps or self.ended or self._is_due(step):
            self._check(trainer, pl_module)
            self._end_if_over(trainer, seconds)
            if self.folder is not None:
                trainer.save_checkpoint(self.folder / LAST)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the average, as Lightning does; :func:`fit` then puts the best weights in its place."""
        super().on_train_end(trainer, pl_module)
        self._bar.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the bar also after an error or an interrupt."""
        self._bar.close()

    def _end_if_over(self, trainer: Any, seconds: float) -> None:
        """Stop if the time is up, or the best has been ahead often enough."""
        self.ended = ""  # a check may find a new best
        if self.max_seconds is not None and seconds >= self.max_seconds:
            self.ended = f"{self.max_seconds:g} seconds are over"
        elif self.record.is_over and self._share(trainer.global_step) >= (
            _EARLIEST + (self.recipe.kl_warmup or 0.0)
        ):
            self.ended = (
                f"the best is ahead by two standard errors, {self.recipe.patience} times in a row"
            )
        trainer.should_stop = bool(self.ended)

    def _share(self, step: int) -> float:
        """Share of the run that is over."""
        steps = 0.0 if self.max_steps is None else step / self.max_steps
        if self.max_seconds is None:
            return steps
        return max(steps, (time.perf_counter() - self._start) / self.max_seconds)

    def _is_due(self, step: int) -> bool:
        return step % _EVERY == 0 and self._share(step) >= self._next

    def _check(self, trainer: Any, pl_module: Any) -> None:
        """Read the bound of the held-out data with the averaged weights, and put it down."""
        self._swap_models(pl_module)
        try:
            start = time.perf_counter()
            bounds = self.held_out.read(rows=self._rows())
            took = time.perf_counter() - start
            loss = float(torch.stack(self._losses).mean()) if self._losses else math.nan
            self.seconds = time.perf_counter() - self._start
            self.record.add(
                bounds,
                lambda: tensors_of(pl_module),
                step=trainer.global_step,
                train_bound=-loss,
                learning_rate=float(_groups(trainer)[0]["lr"]),
                seconds=self.seconds,
            )
        finally:
            self._swap_models(pl_module)
        self._losses.clear()
        self._plan_check(trainer.global_step, took)
        last = self.record.checks[-1]
        self._bar.set_postfix_str(
            f"held-out bound {last['bound']:.4g} ± {last['bound_error']:.2g} nats", refresh=False
        )

    def _plan_check(self, step: int, took: float = 0.0) -> None:
        """Say when the next check is due, after one at ``step`` that took so many seconds."""
        shortest = 0.0 if self.max_steps is None else _SHORTEST / self.max_steps
        pause = 0.0 if self.max_seconds is None else took / (_COST * self.max_seconds)
        self._next = self._share(step) + max(1 / _NUM_CHECKS, shortest, pause)

    def _rows(self) -> int:
        """Network rows of a check, few enough for its share of the time; a step counts three times."""
        if self.max_steps is None:
            return _MOST_ROWS
        steps = max(self.max_steps / _NUM_CHECKS, _SHORTEST)
        rows = 3 * _COST * steps * self.recipe.batch_size * self.recipe.num_timesteps
        return round(min(max(rows, _FEWEST_ROWS), _MOST_ROWS))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights are averaged now: at every fifth step, and at the last."""
        step = 0 if step_idx is None else step_idx + 1
        return step > 0 and (step % _EVERY == 0 or step == self.max_steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run goes on from."""
        return super().state_dict() | {
            "record": self.record.state_dict(),
            "seconds": self.seconds,
            "norm": self._norm,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self.record.load_state_dict(state_dict["record"])
        self.seconds, self._norm = state_dict["seconds"], state_dict["norm"]

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        step = _EVERY * int(num_averaged)
        decay = min(self.recipe.averaging, (1 + step) / (10 + step)) ** _EVERY
        if not averaged[0].is_floating_point():  # buffers, such as an index or a count
            torch._foreach_copy_(averaged, current)
            return
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)
        if not torch.stack(torch._foreach_norm(averaged)).isfinite().all():
            for average, now in zip(averaged, current, strict=True):  # an attention mask of −∞
                average.copy_(torch.where(average.isfinite(), average, now))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the order in which Lightning averages them."""
    return [*module.parameters(), *module.buffers()]


def _groups(trainer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = trainer.optimizers[0].param_groups
    return groups
