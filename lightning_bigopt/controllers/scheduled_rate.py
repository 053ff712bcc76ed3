"""Lightning's handle on the schedule of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Schedule

if TYPE_CHECKING:
    from lightning_bigopt.controllers.learning_rate import LearningRateController
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["ScheduledLearningRate"]


class ScheduledLearningRate(LRScheduler):
    """Lightning's handle on the schedule: it is saved, and LearningRateMonitor sees it.

    ``LRScheduler.__init__`` is not called: it patches ``optimizer.step`` and steps once, and what
    is patched must be undone.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        controller: LearningRateController,
        pipeline: Pipeline,
        *,
        label: str,
    ) -> None:
        self.optimizer = optimizer
        self.label = label
        self.last_epoch = 0
        self.restored_bases: list[float] | None = None
        self.is_foreign = False
        self._plan: list[Schedule] = []
        self._shared: Schedule | None = None
        self._multipliers: list[Callable[[Progress], float]] = []
        self.bases = [float(group["lr"]) for group in optimizer.param_groups]
        self._controller = controller
        self._pipeline = pipeline
        self._last_lr: list[float | Tensor] = list(self.bases)

    def step(self, epoch: int | None = None) -> None:
        """Writes the learning rates of the coming update."""
        self.last_epoch += 1
        clock = self._pipeline.clock
        if self._multipliers:
            self.write(clock.progress())
        else:
            self._write(clock.fraction, 1.0)

    def write(self, progress: Progress) -> None:
        """Recomputes every group's learning rate from its base."""
        common = math.prod(multiply(progress) for multiply in self._multipliers)
        self._write(progress.fraction, common)

    def replan(self) -> None:
        """Notes which schedule each group follows and who multiplies: either may have changed."""
        groups, bases = self.optimizer.param_groups, self.bases
        # A group that arrives in mid-run brings its own base.
        bases.extend(float(group["lr"]) for group in groups[len(bases) :])
        of = self._controller.schedule_of
        plan = self._plan = [of(group.get("name"), optimizer=self.label) for group in groups]
        # One schedule for all groups is evaluated once.
        alone = bool(plan) and not plan[0].needs_base and plan.count(plan[0]) == len(plan)
        self._shared = plan[0] if alone else None
        self._multipliers = [
            controller.learning_rate_factor
            for controller in self._pipeline.controllers
            if type(controller).learning_rate_factor is not Controller.learning_rate_factor
        ]

    def _write(self, fraction: float, common: float) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self._plan):
            self.replan()
        bases, shared = self.bases, self._shared
        rates: list[float | Tensor]
        if shared is None:
            plan = zip(self._plan, bases, strict=True)
            rates = [schedule.value(fraction, base) * common for schedule, base in plan]
        else:
            factor = shared(fraction)
            rates = [base * factor * common for base in bases]
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place, so that nothing recompiles
            else:
                group["lr"] = rate
        self._last_lr = rates

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates written last, a group each."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """The base learning rates and the number of steps."""
        return {"version": 1, "last_epoch": self.last_epoch, "base_lrs": list(self.bases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the base learning rates of a checkpoint; a foreign scheduler's are left alone."""
        if state_dict.get("version") != 1 or "base_lrs" not in state_dict:
            self.is_foreign = True
            rank_zero_warn(
                "The checkpoint holds the state of another learning-rate scheduler "
                f"(fields {sorted(map(str, state_dict))}). The base learning rates of the "
                f"optimizer as configured are used instead: {self.bases}."
            )
            return
        self.last_epoch = int(state_dict["last_epoch"])
        kept = self.restored_bases = [float(value) for value in state_dict["base_lrs"]]
        # Groups that arrived in mid-run are in no config.
        configured = len(self.bases) if self._controller.base_lr == "config" else 0
        self.bases = self.bases[:configured] + kept[configured:]
