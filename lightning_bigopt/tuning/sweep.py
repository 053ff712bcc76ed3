"""The sweep itself: which rate each update uses, and what is kept of it."""

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

from lightning_bigopt import trainer_access
from lightning_bigopt.batching import BatchContext, BatchSizePolicy
from lightning_bigopt.callbacks import BatchSizeScheduler, GradientClipping
from lightning_bigopt.durations import Progress
from lightning_bigopt.tuning.curve import smooth
from lightning_bigopt.tuning.rates import BaseRates

__all__ = ["Sweep", "companions_of"]


class Sweep(Callback):
    """Writes the rates and keeps the losses, a verdict of all processes."""

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
        """The last moment before an update."""
        self.groups.write(self.rates[min(len(self.losses), len(self.rates) - 1)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss of a window that has ended."""
        if not isinstance(outputs, dict) or outputs.get("loss") is None:
            raise ValueError(
                "training_step must return the loss for a learning-rate range test, got "
                f"{outputs!r}; return it from manual optimization too"
            )
        parts = int(trainer.accumulate_grad_batches) if pl_module.automatic_optimization else 1
        self._window.append(outputs["loss"].detach() * parts)
        if not trainer_access.closes_window(trainer):
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
class _AtStart(BatchSizePolicy):
    """The first batch of another policy, all along."""

    policy: BatchSizePolicy
    adaptive: ClassVar[bool] = False

    @property
    def rounding(self) -> Any:  # type: ignore[override]
        """As the policy itself."""
        return self.policy.rounding

    def __call__(self, progress: Progress, *, context: BatchContext | None = None) -> int:
        """The size that the policy starts with."""
        return self.policy(Progress(fraction=0.0), context=context)


def companions_of(callbacks: Sequence[Callback]) -> list[Any]:
    """Copies of what makes the gradient: clipping, and the batch that the run starts with."""
    copies: list[Any] = []
    for callback in callbacks:
        if isinstance(callback, GradientClipping | BatchSizeScheduler):
            twin = copy.deepcopy(callback)
            twin.controller.reset()
            if isinstance(twin, BatchSizeScheduler):
                twin.controller.policy = _AtStart(twin.controller.policy)
            copies.append(twin)
    return copies
