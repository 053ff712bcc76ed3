"""Learning rates: a schedule's factor times each parameter group's own base value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_bigopt import trainer_access
from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.durations import Progress
from lightning_bigopt.optimizers import GroupField
from lightning_bigopt.schedules import Schedule

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["LearningRateController", "ModuleScheduler", "ScheduledLearningRate"]

ModuleScheduler: TypeAlias = Literal["raise", "replace"]


_RATE = GroupField("lr")


class ScheduledLearningRate(LRScheduler):
    """Lightning's handle on the schedule: it steps, is saved, and LearningRateMonitor sees it.

    ``LRScheduler.__init__`` is not called: it patches ``optimizer.step`` and steps once, and what
    is patched must be undone.
    """

    def __init__(
        self, optimizer: Optimizer, controller: LearningRateController, pipeline: Pipeline
    ) -> None:
        self.optimizer = optimizer
        self.last_epoch = 0
        self.bases = [float(group["lr"]) for group in optimizer.param_groups]
        self._controller = controller
        self._pipeline = pipeline
        self._last_lr: list[float | Tensor] = list(self.bases)

    def step(self, epoch: int | None = None) -> None:
        """Writes the learning rates of the coming update."""
        self.last_epoch += 1
        self.write(self._pipeline.clock.progress())

    def write(self, progress: Progress) -> None:
        """Recomputes every group's learning rate from its base."""
        groups, bases = self.optimizer.param_groups, self.bases
        if len(groups) > len(bases):  # a group that arrives in mid-run brings its own base
            bases.extend(float(group["lr"]) for group in groups[len(bases) :])
        factor = math.prod(c.learning_rate_factor(progress) for c in self._pipeline.controllers)
        for group, base in zip(groups, bases, strict=True):
            value = self._controller.value(group.get("name"), progress.fraction, base)
            _RATE.write(group, value * factor)
        self._last_lr = [group["lr"] for group in groups]

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates written last, a group each."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """The base learning rates and the number of steps."""
        return {"version": 1, "last_epoch": self.last_epoch, "base_lrs": list(self.bases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the base learning rates of a checkpoint; a foreign scheduler's are left alone."""
        if state_dict.get("version") != 1 or "base_lrs" not in state_dict:
            rank_zero_warn(
                "The checkpoint holds the state of another learning-rate scheduler "
                f"(fields {sorted(map(str, state_dict))}). The base learning rates of the "
                f"optimiser as configured are used instead: {self.bases}."
            )
            return
        self.last_epoch = int(state_dict["last_epoch"])
        kept = [float(value) for value in state_dict["base_lrs"]]
        if self._controller.base_lr == "checkpoint":
            if kept != self.bases:
                rank_zero_info(
                    f"Base learning rates {self.bases} of the configuration give way to "
                    f"{kept} of the checkpoint; base_lr='config' keeps the configured ones."
                )
            self.bases = kept


class LearningRateController(Controller):
    """Writes ``schedule(fraction) × base`` into every parameter group before every update."""

    role = "learning rate"
    rank = 20
    needs_horizon = True

    def __init__(
        self,
        schedule: Schedule,
        *,
        groups: Mapping[str, Schedule] | None = None,
        module_scheduler: ModuleScheduler = "raise",
        base_lr: Literal["checkpoint", "config"] = "checkpoint",
        settings: ClockSettings | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, got {schedule!r}; try WarmupCosine()")
        if module_scheduler not in ("raise", "replace"):
            raise ValueError(
                f"module_scheduler must be 'raise' or 'replace', got {module_scheduler!r}"
            )
        if base_lr not in ("checkpoint", "config"):
            raise ValueError(f"base_lr must be 'checkpoint' or 'config', got {base_lr!r}")
        self.schedule = schedule
        self.groups = dict(groups or {})
        self.module_scheduler = module_scheduler
        self.base_lr = base_lr
        self.settings = settings or ClockSettings()
        self._resolved: Schedule = schedule
        self._resolved_groups: dict[str | None, Schedule] = {}

    # ------------------------------------------------------------------------------- hooks

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Registers with Lightning, which saves, restores and steps from here on."""
        trainer = pipeline.trainer
        self._refuse_conflicts(pipeline)
        for optimizer in trainer.optimizers:
            raw = getattr(optimizer, "optimizer", optimizer)
            scheduler = ScheduledLearningRate(raw, self, pipeline)
            name = trainer_access.optimizer_label(trainer, raw)
            trainer_access.add_scheduler(trainer, scheduler, name=name or None)

    def _refuse_conflicts(self, pipeline: Pipeline) -> None:
        trainer = pipeline.trainer
        if any(
            isinstance(c, StochasticWeightAveraging) for c in trainer_access.callbacks_of(trainer)
        ):
            raise ValueError(
                "callbacks must not hold StochasticWeightAveraging with LearningRateScheduler, got "
                "both: each writes the learning rate; remove one of them"
            )
        if trainer_access.is_deepspeed(trainer) and "scheduler" in getattr(
            trainer.strategy, "config", {}
        ):
            raise ValueError(
                "the DeepSpeed config must not hold a scheduler with LearningRateScheduler, got "
                "one; remove it from the config"
            )
        configs = trainer.lr_scheduler_configs
        if configs and self.module_scheduler == "raise":
            names = ", ".join(type(config.scheduler).__name__ for config in configs)
            raise ValueError(
                f"configure_optimizers must not return a scheduler with LearningRateScheduler, got "
                f"{names}; return the optimizer only, or pass module_scheduler='replace'"
            )
        if configs:
            trainer_access.remove_schedulers(trainer)

    def on_train_start(self, pipeline: Pipeline) -> None:
        """Resolves the schedule on the horizon and writes the first learning rates."""
        horizon = pipeline.clock.horizon
        assert horizon is not None  # needs_horizon
        known = {
            group.get("name")
            for scheduler in _schedulers(pipeline)
            for group in scheduler.optimizer.param_groups
        }
        missing = sorted(set(self.groups) - known)
        if missing:
            raise ValueError(
                f"groups must name parameter groups of the optimizer, got {missing!r}; the groups "
                f"are named {sorted(str(name) for name in known if name is not None)!r}"
            )
        self._resolved = self.schedule.resolve(horizon)
        self._resolved_groups = {n: s.resolve(horizon) for n, s in self.groups.items()}
        for scheduler in _schedulers(pipeline):
            scheduler.write(pipeline.progress)

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Writes what no scheduler step wrote.

        Lightning steps no scheduler in manual optimisation, and a parameter group may just have
        been added by a callback.
        """
        manual = not pipeline.module.automatic_optimization
        for scheduler in _schedulers(pipeline):
            if manual or len(scheduler.optimizer.param_groups) > len(scheduler.bases):
                scheduler.write(pipeline.progress)

    @staticmethod
    def rewrite(pipeline: Pipeline) -> None:
        """Writes the coming update's learning rates again: a factor has just changed."""
        for scheduler in _schedulers(pipeline):
            scheduler.write(pipeline.coming_progress)

    def value(self, group: str | None, fraction: float, base: float) -> float:
        """The learning rate of a named group at a share of the budget."""
        return self._resolved_groups.get(group, self._resolved).value(fraction, base)


def _schedulers(pipeline: Pipeline) -> list[ScheduledLearningRate]:
    configs = pipeline.trainer.lr_scheduler_configs
    return [c.scheduler for c in configs if isinstance(c.scheduler, ScheduledLearningRate)]
