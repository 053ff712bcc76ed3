"""The sweep of a range test: sets the learning rate of each update and records the losses."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_bigopt.tuning.base_rates import BaseRates
from lightning_bigopt.tuning.branches import RecordLosses
from lightning_bigopt.tuning.curve import smooth

__all__ = ["Sweep"]


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

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sets the learning rate of the update; the sweep is the last callback."""
        self.groups.write(self.rates[min(len(self.losses), len(self.rates) - 1)])

    def should_stop(self) -> bool:
        """Returns whether the smoothed loss has risen, or the last loss is not finite."""
        average = smooth(self.losses, self.smoothing)
        settled = average[self.skip :]
        rose = bool(settled) and 0.0 < self.stop_at * min(settled) < average[-1]
        return rose or super().should_stop()
