"""A schedule as a plain torch scheduler, for training loops without Lightning."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import Schedule

__all__ = ["ScheduleLR"]


class ScheduleLR(LRScheduler):
    """``schedule × base`` in every parameter group; step it once after every update.

    Update t of a run of T gets the schedule at exactly t/T. Every learning rate is recomputed from
    its base, one held as a tensor is filled in place, and a group that is added later is scheduled
    from its own ``lr``. The state is plain numbers.

    Args:
        optimizer: Its groups' ``lr`` are the bases.
        schedule: The factor over the budget.
        horizon: The budget; an int is updates.

    Raises:
        ValueError: If a duration of the schedule does not fit into the horizon, or the horizon
            does not say which share of it an update is.

    Example:
        >>> import torch
        >>> from lightning_bigopt.schedules import Linear
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        >>> scheduler = ScheduleLR(optimizer, Linear(), 4)
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr(), scheduler.state_dict()
        ([0.2], {'version': 1, 'last_epoch': 2, 'base_lrs': [0.4]})
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, horizon: Horizon | int) -> None:
        # LRScheduler.__init__ would wrap optimizer.step, to warn where step() comes first.
        if isinstance(horizon, int):
            horizon = Horizon.of_steps(horizon)
        self.optimizer = optimizer
        self.schedule = schedule
        self.last_epoch = 0
        self.base_lrs: list[float | Tensor] = [float(g["lr"]) for g in optimizer.param_groups]
        self._resolved = schedule.resolve(horizon)
        axis = horizon.axis("1 step", name="horizon")
        self._shares = [share for share, _ in axis]
        self._updates = [updates for _, updates in axis]
        self._write()

    def step(self, epoch: int | None = None) -> None:
        """Writes the learning rates of the next update, or of update ``epoch``."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._write()

    def fraction(self, update: int) -> float:
        """The share of the budget spent before an update, counted from 0."""
        shares, updates = self._shares, self._updates
        if len(shares) == 2:  # the exact t/T
            return update / updates[1]
        right = min(max(1, bisect_right(updates, update)), len(updates) - 1)
        part = (update - updates[right - 1]) / (updates[right] - updates[right - 1])
        return shares[right - 1] + part * (shares[right] - shares[right - 1])

    def _write(self) -> None:
        groups, bases, schedule = self.optimizer.param_groups, self.base_lrs, self._resolved
        bases.extend(float(group["lr"]) for group in groups[len(bases) :])
        fraction = self.fraction(self.last_epoch)
        rates: list[float | Tensor]
        if schedule.needs_base:
            rates = [schedule.value(fraction, float(base)) for base in bases]
        else:
            factor = schedule(fraction)
            rates = [base * factor for base in bases]
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates written last, a group each."""
        return list(self._last_lr)

    def get_lr(self) -> list[float | Tensor]:
        """The same; torch's schedulers call it inside ``step``."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The updates done and the bases."""
        return {"version": 1, "last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another left off, and writes its learning rates.

        Raises:
            ValueError: If the state is not of this class and version.
        """
        if state_dict.get("version") != 1 or "base_lrs" not in state_dict:
            raise ValueError(
                "state_dict must be that of a ScheduleLR of version 1, got the fields "
                f"{sorted(map(str, state_dict))}; load it into the scheduler that wrote it"
            )
        self.last_epoch = int(state_dict["last_epoch"])
        self.base_lrs = [float(value) for value in state_dict["base_lrs"]]
        self._write()
