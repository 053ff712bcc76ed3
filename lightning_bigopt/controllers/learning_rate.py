"""Learning rates: a schedule's factor times each parameter group's own base value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_bigopt import trainer_access
from lightning_bigopt.clock import ClockSettings
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.controllers.resume import report_changes
from lightning_bigopt.controllers.scheduled_rate import ScheduledLearningRate
from lightning_bigopt.schedules import Schedule
from lightning_bigopt.schedules.checks import CooldownShape

if TYPE_CHECKING:
    from lightning_bigopt.clock import TrainingClock
    from lightning_bigopt.pipeline import Pipeline

__all__ = [
    "BaseOwner",
    "LearningRateController",
    "ModuleScheduler",
    "ScheduledLearningRate",
    "refuse_unknown",
]

ModuleScheduler: TypeAlias = Literal["raise", "replace"]
BaseOwner: TypeAlias = Literal["checkpoint", "config"]


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
        optimizers: Mapping[str, Schedule] | None = None,
        module_scheduler: ModuleScheduler = "raise",
        base_lr: BaseOwner = "checkpoint",
        cooldown_shape: CooldownShape = "1-sqrt",
        cooldown_end: float = 0.0,
        settings: ClockSettings | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, got {schedule!r}; try WarmupCosine()")
        for name, value, choices in (
            ("module_scheduler", module_scheduler, ModuleScheduler),
            ("base_lr", base_lr, BaseOwner),
            ("cooldown_shape", cooldown_shape, CooldownShape),
        ):
            if value not in get_args(choices):
                options = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} must be one of {options}, got {value!r}")
        if not 0.0 <= cooldown_end <= 1.0:
            raise ValueError(f"cooldown_end must be from 0 to 1, got {cooldown_end!r}")
        self.schedule = schedule
        self.groups = dict(groups or {})
        self.optimizers = dict(optimizers or {})
        self.module_scheduler = module_scheduler
        self.base_lr = base_lr
        self.cooldown_shape = cooldown_shape
        self.cooldown_end = cooldown_end
        self.settings = settings or ClockSettings()
        self._resolved: Schedule = schedule
        self._resolved_groups: dict[str | None, Schedule] = {}
        self._resolved_optimizers: dict[str, Schedule] = {}
        self._restored: dict[str, Any] | None = None
        self._epoch_is_new = False

    # ------------------------------------------------------------------------------- hooks

    def on_fit_start(self, pipeline: Pipeline) -> None:
        """Registers with Lightning, which saves and restores from here on."""
        trainer = pipeline.trainer
        self._refuse_conflicts(pipeline)
        for optimizer in trainer.optimizers:
            raw = getattr(optimizer, "optimizer", optimizer)
            label = trainer_access.optimizer_label(trainer, raw)
            scheduler = ScheduledLearningRate(raw, self, pipeline, label=label)
            trainer_access.add_scheduler(trainer, scheduler, name=label or None)

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
        for optimizer in trainer.optimizers:
            if any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(
                    "lr must be a number in every parameter group with LearningRateScheduler, got "
                    f"None in {type(getattr(optimizer, 'optimizer', optimizer)).__name__}, which "
                    "finds its own; give it one (Adafactor: relative_step=False, lr=1e-3), or "
                    "leave the scheduler out"
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
        """Resolves the schedules on the horizon and writes the first learning rates."""
        self.hears_of_batches = not pipeline.module.automatic_optimization
        schedulers = _schedulers(pipeline)
        groups = [group for scheduler in schedulers for group in scheduler.optimizer.param_groups]
        refuse_unknown(
            "groups",
            "parameter groups of the optimizer",
            self.groups,
            {group["name"] for group in groups if "name" in group},
        )
        refuse_unknown(
            "optimizers",
            "one of several optimizers",
            self.optimizers,
            {scheduler.label for scheduler in schedulers if scheduler.label},
        )
        self.resolve(pipeline.clock)
        before = [float(group["lr"]) for group in groups]
        for scheduler in schedulers:
            scheduler.replan()
            scheduler.write(pipeline.progress)
        restored, self._restored = self._restored, None
        if pipeline.trainer.ckpt_path is None or not pipeline.progress.fraction:
            return  # LearningRateFinder leaves a path behind too
        kept = [s.restored_bases for s in schedulers if s.restored_bases is not None]
        report_changes(
            None if restored is None or not kept else {**restored, "base_lrs": kept},
            {**self.state_dict(), "base_lrs": [s.bases for s in schedulers]},
            clock=pipeline.clock,
            rates=[(old, float(group["lr"])) for old, group in zip(before, groups, strict=True)],
            is_foreign=any(scheduler.is_foreign for scheduler in schedulers),
        )

    def resolve(self, clock: TrainingClock) -> None:
        """Converts the durations of every schedule on the clock's horizon."""
        self._resolved = self._on_horizon(self.schedule, clock)
        self._resolved_groups = {
            name: self._on_horizon(schedule, clock) for name, schedule in self.groups.items()
        }
        self._resolved_optimizers = {
            name: self._on_horizon(schedule, clock) for name, schedule in self.optimizers.items()
        }

    def _on_horizon(self, schedule: Schedule, clock: TrainingClock) -> Schedule:
        assert clock.horizon is not None  # needs_horizon
        resolved = schedule.resolve(clock.horizon)
        if clock.cooldown is None:
            return resolved
        at, over = clock.cooldown
        return resolved.with_cooldown(
            at, over=over, shape=self.cooldown_shape, end=self.cooldown_end
        )

    def on_epoch_start(self, pipeline: Pipeline) -> None:
        """Another callback may write learning rates when an epoch begins."""
        self._epoch_is_new = True

    def on_batch_start(self, pipeline: Pipeline, batch: Any, index: int) -> None:
        """Writes what no scheduler step wrote.

        Lightning steps no scheduler in manual optimization, and BackboneFinetuning adds a group
        and sets its learning rate when an epoch begins.
        """
        if self._epoch_is_new or self.hears_of_batches:
            self.rewrite(pipeline)
        self._epoch_is_new = False

    def on_new_parameters(self, pipeline: Pipeline) -> None:
        """Writes the learning rates of groups that arrived within an epoch."""
        if any(len(s.optimizer.param_groups) > len(s.bases) for s in _schedulers(pipeline)):
            self.rewrite(pipeline)

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """Writes the learning rates of the coming update, as Lightning's scheduler step would."""
        if not (pipeline.window.is_open or self.hears_of_batches):
            for scheduler in _schedulers(pipeline):
                scheduler.step()

    @staticmethod
    def rewrite(pipeline: Pipeline) -> None:
        """Writes the coming update's learning rates again: a factor has just changed."""
        for scheduler in _schedulers(pipeline):
            scheduler.write(pipeline.coming_progress)

    def value(
        self, group: str | None, fraction: float, base: float, *, optimizer: str = ""
    ) -> float:
        """The learning rate of a group at a share of the budget."""
        return self.schedule_of(group, optimizer=optimizer).value(fraction, base)

    def schedule_of(self, group: str | None, *, optimizer: str = "") -> Schedule:
        """What a group follows: the schedule of its name, else of its optimizer, else of all."""
        own = self._resolved_groups.get(group)
        return self._resolved_optimizers.get(optimizer, self._resolved) if own is None else own

    def state_dict(self) -> dict[str, Any]:
        """The schedules as written, so that a resumed run can say what was changed."""
        return {
            "schedule": repr(self.schedule),
            "groups": {name: repr(schedule) for name, schedule in self.groups.items()},
            "optimizers": {name: repr(schedule) for name, schedule in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps a checkpoint's description of itself until training starts."""
        self._restored = dict(state)


def refuse_unknown(name: str, what: str, asked: Iterable[str], known: set[str]) -> None:
    """Raises a ValueError for names that nothing has."""
    missing = sorted(set(asked) - known)
    if missing:
        raise ValueError(
            f"{name} must name {what}, got {missing!r}; the {name} are named {sorted(known)!r}"
        )


def _schedulers(pipeline: Pipeline) -> list[ScheduledLearningRate]:
    configs = pipeline.trainer.lr_scheduler_configs
    return [c.scheduler for c in configs if isinstance(c.scheduler, ScheduledLearningRate)]
