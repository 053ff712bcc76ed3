"""The sweep of a range test: sets the learning rate of each update and records the losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.batching.policies.batch_size_policy import BatchContext, BatchSizePolicy
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.trainer_access import loop
from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.curve import smooth

__all__ = ["Sweep", "callbacks_affecting_gradients"]


class Sweep(Callback):
    """Sets the learning rate of each update and records its loss.

    Args:
        rates: Learning rate of the reference group for each update.
        groups: Writes the learning rates.
        smoothing: Decay of the moving average of the losses.
        stop_at: The sweep ends when the average exceeds this multiple of its minimum.
        skip: Number of first points that are ignored when looking for the minimum.

    Attributes:
        losses: Loss of each update, averaged over its micro-batches and over all processes.
        diverged: Whether the sweep ended early.
    """

    def __init__(
        self,
        rates: tuple[float, ...],
        groups: BaseRates,
        *,
        smoothing: float,
        stop_at: float,
        skip: int,
    ) -> None:
        self.rates, self.groups = rates, groups
        self.smoothing, self.stop_at, self.skip = smoothing, stop_at, skip
        self.losses: list[float] = []
        self.diverged = False
        self._window: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sets the learning rate of the update; the sweep is the last callback."""
        self.groups.write(self.rates[min(len(self.losses), len(self.rates) - 1)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the mean loss when an accumulation window ends, and stops after a divergence."""
        if not isinstance(outputs, dict) or outputs.get("loss") is None:
            raise ValueError(
                "training_step must return the loss for a learning-rate range test, got "
                f"{outputs!r}; return it with manual optimization too"
            )
        # Lightning's outputs hold the loss divided by the accumulation.
        parts = int(trainer.accumulate_grad_batches) if pl_module.automatic_optimization else 1
        self._window.append(outputs["loss"].detach() * parts)
        if not loop.closes_window(trainer):
            return
        mean = torch.stack(self._window).mean()
        self._window = []
        self.losses.append(float(trainer.strategy.reduce(mean, reduce_op="mean")))
        average = smooth(self.losses, self.smoothing)
        settled = average[self.skip :]
        rose = bool(settled) and 0.0 < self.stop_at * min(settled) < average[-1]
        if rose or not math.isfinite(self.losses[-1]):
            self.diverged = trainer.should_stop = True


@dataclass(frozen=True)
class _FirstSize(BatchSizePolicy):
    """Constant batch size: the first size of another policy."""

    policy: BatchSizePolicy
    adaptive: ClassVar[bool] = False

    @property
    def rounding(self) -> Any:  # type: ignore[override]
        """The rounding of the other policy."""
        return self.policy.rounding

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """Returns the size of the other policy at the start of the budget."""
        return self.policy(Progress(fraction=0.0), context=context)


def callbacks_affecting_gradients(callbacks: Sequence[Callback]) -> list[Any]:
    """Copies the callbacks that affect gradients, in their initial state.

    These are GradientClipping, and BatchSizeScheduler with the first size of its policy.
    """
    copies: list[Any] = []
    for callback in callbacks:
        if isinstance(callback, GradientClipping | BatchSizeScheduler):
            copied = copy.deepcopy(callback)
            copied.reset()
            copied.take_loaded_state()
            if isinstance(copied, BatchSizeScheduler):
                copied.policy = _FirstSize(copied.policy)
            copies.append(copied)
    return copies
