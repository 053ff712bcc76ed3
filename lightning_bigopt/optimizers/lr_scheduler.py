"""Learning-rate schedules as plain torch schedulers, for training loops without Lightning."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_bigopt.checks import check_count
from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.durations.progress import Progress
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.type_checks import check_instance

__all__ = ["ScheduleLR", "as_lr_scheduler"]


def as_lr_scheduler(schedule: Schedule, optimizer: Optimizer, horizon: Horizon | int) -> ScheduleLR:
    """Converts a schedule into a ``torch.optim.lr_scheduler.LRScheduler``.

    Args:
        schedule: Factor over the budget, dimensionless.
        optimizer: The optimizer; the base of each parameter group is its ``initial_lr``, if an
            earlier scheduler has set it, else its ``lr``.
        horizon: The budget; an int counts updates.

    Returns:
        The scheduler. Call its ``step()`` once after every update. In a ``SequentialLR`` it may
        stand at any place; its updates are counted from its milestone. In a ``ChainedScheduler`` it
        must come first, because it writes base × factor and not a multiple of the current value, as
        ``LambdaLR`` does, too.

    Raises:
        ValueError: If an argument has another type, a duration of the schedule does not fit into
            the horizon, or the number of updates of the horizon is unknown.

    Example:
        >>> import torch
        >>> from lightning_bigopt.schedules import Linear
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        >>> as_lr_scheduler(Linear(), optimizer, 100).get_last_lr()
        [0.4]
    """
    return ScheduleLR(optimizer, schedule, horizon)


class ScheduleLR(LRScheduler):
    """Writes ``base × schedule`` into every parameter group; step it once after every update.

    Update t of a run of T uses the factor at exactly t/T. Every learning rate is recomputed from
    its base, and a tensor is filled in place. The base of a group that is added later is its
    current ``lr``. The state contains plain numbers only.

    Args:
        optimizer: The optimizer; the base of each parameter group is its ``initial_lr``, if an
            earlier scheduler has set it, else its ``lr``.
        schedule: Factor over the budget, dimensionless.
        horizon: The budget; an int counts updates.

    Raises:
        ValueError: If an argument has another type, a duration of the schedule does not fit into
            the horizon, or the number of updates of the horizon is unknown.

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
        # LRScheduler.__init__ is not called: it replaces optimizer.step by a wrapper that warns
        # if scheduler.step() is called first.
        check_instance("schedule", schedule, Schedule, hint="pass Cosine()")
        check_instance(
            "optimizer", optimizer, Optimizer, hint="pass torch.optim.AdamW(module.parameters())"
        )
        if not isinstance(horizon, Horizon):
            check_count(
                "horizon", horizon, hint="pass the number of updates, or Horizon.of_steps(1000)"
            )
            horizon = Horizon.of_steps(horizon)
        if horizon.total("steps") is None:
            raise ValueError(
                "horizon must have a known number of updates, got a budget of "
                f"{amount_of(horizon.budget, horizon.clock)} without spans; pass the number of "
                "updates, or Horizon.of_steps(1000)"
            )
        self.optimizer = optimizer
        self.schedule = schedule
        self.last_epoch = 0
        self._resolved = schedule.resolve(horizon)
        axis = horizon.axis("1 step", name="horizon")
        self._fractions = [fraction for fraction, _ in axis]
        self._updates = [updates for _, updates in axis]
        self._groups = GroupSchedule([("", optimizer)])
        self._groups.claim("lr")
        self._groups.follow("lr", self._schedule_of, owner=self)
        self._write()

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The base learning rates, one for each parameter group."""
        return self._groups.bases("lr")[0]

    def step(self, epoch: int | None = None) -> None:
        """Writes the learning rates of the next update, or of update ``epoch``."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._write()

    def fraction(self, update: int) -> float:
        """Returns the fraction of the budget spent before an update, counted from 0."""
        fractions, updates = self._fractions, self._updates
        if len(fractions) == 2:  # updates of equal size: exactly t/T, without interpolation
            return update / updates[1]
        right = min(max(1, bisect_right(updates, update)), len(updates) - 1)
        inside = (update - updates[right - 1]) / (updates[right] - updates[right - 1])
        return fractions[right - 1] + inside * (fractions[right] - fractions[right - 1])

    def _schedule_of(self, group: str | None, optimizer: str) -> Schedule:
        return self._resolved

    def _progress(self) -> Progress:
        update = max(0, self.last_epoch)  # negative inside nested SequentialLRs
        return Progress(fraction=self.fraction(update), steps=update)

    def _write(self) -> None:
        self._groups.write(self._progress())

        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    # SequentialLR calls these two: at the start, and at the scheduler's milestone.

    def _initial_step(self) -> None:
        self.step()

    def _update_lr(self, epoch: int | None = None) -> None:
        self.step(epoch)

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns the learning rates written last, one for each group; tensors as copies."""
        return self._last_lr

    def get_lr(self) -> list[float | Tensor]:
        """Returns the learning rates of update ``last_epoch``, one for each parameter group."""
        return [planned.value for planned in self._groups.planned("lr", self._progress())]

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates done and the base learning rates."""
        return {"version": 1, "last_epoch": self.last_epoch, "base_lrs": self.base_lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state of :meth:`state_dict` and writes its learning rates.

        Raises:
            ValueError: If the state is not of this class and version, or has another number of
                parameter groups.
        """
        if state_dict.get("version") != 1 or not {"base_lrs", "last_epoch"} <= state_dict.keys():
            raise ValueError(
                "state_dict must be that of a ScheduleLR of version 1, got the fields "
                f"{sorted(map(str, state_dict))}; load it into the scheduler that wrote it"
            )
        groups, bases = len(self.optimizer.param_groups), state_dict["base_lrs"]
        if len(bases) != groups:
            raise ValueError(
                f"state_dict must have the base of each of the {groups} parameter groups, got "
                f"base_lrs={bases}; add or remove groups of the optimizer first"
            )
        self.last_epoch = int(state_dict["last_epoch"])
        self._groups.restore_bases("lr", 0, state_dict["base_lrs"])
        # A restored optimizer has its learning rates, which other schedulers of a ChainedScheduler
        # may have changed. In a SequentialLR another scheduler may be in use before update 0.
        if self.last_epoch >= 0 and not self._groups.was_changed():
            self._write()
