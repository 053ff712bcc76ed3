"""Any other number of a parameter group on a schedule: weight decay, momentum, betas, eps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.learning_rate import refuse_unknown
from lightning_bigopt.optimizers import GroupField
from lightning_bigopt.schedules import Schedule

if TYPE_CHECKING:
    from lightning_bigopt.clock import ClockSettings
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["HyperparameterController"]


class HyperparameterController(Controller):
    """Writes ``schedule(fraction) × base`` into one field of every group before every update."""

    rank = 25
    needs_horizon = True

    def __init__(
        self,
        field: str,
        schedule: Schedule,
        *,
        groups: Mapping[str, Schedule] | None = None,
        settings: ClockSettings,
    ) -> None:
        self.field = GroupField(field)
        if field == "lr":
            raise ValueError(
                "field must not be 'lr', got 'lr'; LearningRateScheduler schedules learning rates"
            )
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, got {schedule!r}; try Linear(end=0.1)")
        self.role = f"schedule of {field}"  # type: ignore[misc]  # one of each field may be there
        self.schedule = schedule
        self.groups = dict(groups or {})
        self.settings = settings
        self._bases: list[list[float]] = []
        self._restored: list[list[float]] | None = None
        self._resolved: dict[str | None, Schedule] = {}

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Reads the configured values, before a checkpoint's optimizer state replaces them."""
        self._bases = [
            [self.field.read(group) for group in optimizer.param_groups]
            for optimizer in pipeline.trainer.optimizers
        ]

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Resolves the schedule; the bases of a checkpoint win over configured ones."""
        horizon = pipeline.clock.horizon
        assert horizon is not None  # needs_horizon
        if self._restored is not None:
            self._bases, self._restored = self._restored, None
        refuse_unknown(
            "groups",
            "parameter groups of the optimizer",
            self.groups,
            {
                group["name"]
                for optimizer in pipeline.trainer.optimizers
                for group in optimizer.param_groups
                if "name" in group
            },
        )
        self._resolved = {n: s.resolve(horizon) for n, s in self.groups.items()}
        self._resolved[None] = self.schedule.resolve(horizon)

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Writes the values of the update under way."""
        fraction = pipeline.progress.fraction
        for optimizer, bases in zip(pipeline.trainer.optimizers, self._bases, strict=True):
            self._write(optimizer, bases, fraction)

    def _write(self, optimizer: Optimizer, bases: list[float], fraction: float) -> None:
        groups = optimizer.param_groups
        bases.extend(self.field.read(group) for group in groups[len(bases) :])
        for group, base in zip(groups, bases, strict=True):
            schedule = self._resolved.get(group.get("name"), self._resolved[None])
            self.field.write(group, schedule.value(fraction, base))

    def state_dict(self) -> dict[str, Any]:
        """The base values, an optimizer and a group each."""
        return {"bases": [list(bases) for bases in self._bases]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the base values until training starts."""
        self._restored = [[float(value) for value in bases] for bases in state["bases"]]
