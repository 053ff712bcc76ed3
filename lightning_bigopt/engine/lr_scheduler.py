"""The torch scheduler through which Lightning saves, restores and shows learning rates."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_bigopt.optimizers.group_schedule import GroupSchedule

__all__ = ["LightningLRScheduler"]


class LightningLRScheduler(LRScheduler):
    """Represents the scheduled learning rates of one optimizer to Lightning.

    Lightning saves it in checkpoints, and LearningRateMonitor shows it. It does not write learning
    rates: the engine writes them through a :class:`GroupSchedule`.

    Args:
        optimizer: The optimizer.
        groups: The schedule of all parameter groups.
        index: Index of the optimizer in ``groups``.

    Attributes:
        restored_bases: The base learning rates of the checkpoint; None if there is none.
        is_foreign: Whether the checkpoint has the state of another scheduler.
    """

    def __init__(self, optimizer: Optimizer, groups: GroupSchedule, *, index: int) -> None:
        # LRScheduler.__init__ is not called: it would replace optimizer.step permanently, and set
        # the learning rates.
        self.optimizer = optimizer
        self.last_epoch = 0
        self.restored_bases: list[float] | None = None
        self.is_foreign = False
        self._groups, self._index = groups, index

    def step(self, epoch: int | None = None) -> None:
        """Does nothing: the engine writes learning rates at the end of an update."""

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns the current learning rates, one for each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    @property
    def bases(self) -> list[float]:
        """The base learning rates, one for each group."""
        return self._groups.bases("lr")[self._index]

    def set_bases(self, bases: list[float]) -> None:
        """Replaces the base learning rates; allowed at any time in a run."""
        self._groups.set_bases("lr", self._index, bases)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a Trainer hold the base learning rates, and not the schedules and
        # adjustments of the fit, which may be functions of any kind.
        bases = GroupSchedule([("", self.optimizer)])
        bases.claim("lr")
        bases.set_bases("lr", 0, self.bases)
        return {**vars(self), "_groups": bases, "_index": 0}

    def state_dict(self) -> dict[str, Any]:
        """Returns the base learning rates."""
        return {"version": 1, "last_epoch": self.last_epoch, "base_lrs": self.bases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the base learning rates; warns if the state is that of another scheduler."""
        if state_dict.get("version") != 1 or "base_lrs" not in state_dict:
            self.is_foreign = True
            rank_zero_warn(
                "The checkpoint holds the state of another learning-rate scheduler "
                f"(fields {sorted(map(str, state_dict))}). The configured base learning rates of "
                f"the optimizer are used instead: {self.bases}."
            )
            return
        self.last_epoch = int(state_dict["last_epoch"])
        self.restored_bases = [float(value) for value in state_dict["base_lrs"]]
        self._groups.restore_bases("lr", self._index, self.restored_bases)
