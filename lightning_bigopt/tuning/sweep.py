"""The sweep of a range test: sets the learning rate of each update and records the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.engine.optimizer_modes import train_optimizers
from lightning_bigopt.trainer_access import separate_loop
from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.branches import RecordLosses, state_restored
from lightning_bigopt.tuning.curve import RangeTest, smooth

__all__ = ["Sweep", "run_sweep"]


class Sweep(RecordLosses):
    """Sets the learning rate of each update and records its loss.

    Args:
        rates: Learning rate of the reference group for each update.
        groups: Writes the learning rates.
        smoothing: Decay of the moving average of the losses.
        stop_at: The sweep ends when the average exceeds this multiple of its minimum.
        skip: Number of first points that are ignored when looking for the minimum.

    Attributes:
        losses: Loss of each update, averaged over its micro-batches and over all processes.
        used: Learning rate of each of these updates.
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
        super().__init__()
        self.rates, self.groups = rates, groups
        self.smoothing, self.stop_at, self.skip = smoothing, stop_at, skip
        self.used: list[float] = []
        self._rate = rates[0]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sets the learning rate of the update; the sweep is the last callback."""
        # By optimizer steps, which are more than the losses with several optimizers.
        self._rate = self.rates[min(trainer.global_step, len(self.rates) - 1)]
        self.groups.write(self._rate)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the loss with its learning rate when an accumulation window ends."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if len(self.losses) > len(self.used):
            self.used.append(self._rate)

    def result(self) -> RangeTest:
        """Returns learning rates and losses."""
        return RangeTest(
            learning_rates=tuple(self.used),
            losses=tuple(self.losses),
            smoothing=self.smoothing,
            skip=self.skip,
            diverged=self.diverged,
        )

    def should_stop(self) -> bool:
        """Returns whether the smoothed loss has risen, or the last loss is not finite."""
        average = smooth(self.losses, self.smoothing)
        settled = average[self.skip :]
        rose = bool(settled) and 0.0 < self.stop_at * min(settled) < average[-1]
        return rose or super().should_stop()


def run_sweep(
    trainer: Trainer,
    module: LightningModule,
    groups: BaseRates,
    callbacks: Sequence[Callback],
    *,
    rates: tuple[float, ...],
    smoothing: float,
    skip: int,
    stop_at: float,
) -> Sweep:
    """Runs a sweep in a separate loop, and restores all state.

    Args:
        trainer: The Trainer, from ``on_fit_start`` on.
        module: The module to train.
        groups: Writes the learning rates.
        callbacks: The callbacks that take part in the sweep.
        rates: Learning rate of the reference group for each update.
        smoothing: Decay of the moving average of the losses.
        skip: Number of first points that the suggestion ignores.
        stop_at: The sweep ends when the average exceeds this multiple of its minimum.

    Returns:
        The sweep after its end.
    """
    sweep = Sweep(rates, groups, smoothing=smoothing, stop_at=stop_at, skip=skip)
    engine = [Engine()] if callbacks else []
    with state_restored(trainer, module):
        train_optimizers(trainer)
        separate_loop.run_separate_loop(
            trainer, module, callbacks=[*callbacks, *engine, sweep], max_steps=len(rates)
        )
    return sweep
