"""LearningRateScheduler: schedules the learning rate of every parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.arguments import explain_arguments
from lightning_bigopt.callbacks.extended_cooldown import BEST, ExtendedCooldown
from lightning_bigopt.callbacks.mode_advice import advise_on_modes
from lightning_bigopt.callbacks.resume_report import (
    is_resumed,
    report_changes,
    warn_of_flat_cooldown,
    with_adopted,
)
from lightning_bigopt.callbacks.schedules import GroupSchedules
from lightning_bigopt.checks import as_code, check_between, check_choice, check_non_negative
from lightning_bigopt.durations.duration import DurationLike
from lightning_bigopt.engine.batch_contents import BatchCount
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.clock_settings import ClockSettings, OnResume
from lightning_bigopt.engine.lr_scheduler import LightningLRScheduler
from lightning_bigopt.engine.stage import LEARNING_RATE, Fit
from lightning_bigopt.optimizers.field_claim import BaseOwner
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.shapes import CooldownShape
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import schedulers, strategies

__all__ = ["LearningRateScheduler"]

ModuleScheduler: TypeAlias = Literal["raise", "replace"]

_ARGUMENTS = (
    "groups",
    "optimizers",
    "min_lr",
    "max_lr",
    "module_scheduler",
    "cooldown_shape",
    "cooldown_end",
    "base_lr",
)


@explain_arguments
class LearningRateScheduler(Capability):
    """Schedules the learning rate of every parameter group over the budget.

    The learning rate of a group is its configured ``lr`` times the factor of the schedule at the
    fraction of the budget consumed; ratios between groups are kept. Under ``max_steps`` the
    fraction of update t of T is t/T; under ``max_epochs`` it is (epochs ended + fraction of the
    current epoch's batches) / max_epochs before the update. Lightning saves and restores the
    scheduler, and LearningRateMonitor shows it.

    Args:
        schedule: Factor on the base learning rates over the budget, dimensionless.
        groups: Other schedules for parameter groups, by their ``name``: ``"head"`` also refers to
            ``"head.decay"`` and ``"head.no_decay"`` unless they have an entry. A group without a
            name has the one that the charts show, such as ``"group1"``.
        optimizers: Other schedules for some optimizers, by the name of their class: ``"Adam"``, or
            ``"Adam-0"`` and ``"Adam-1"`` for two of a class. The parts of a CombinedOptimizer count
            as optimizers.
        min_lr: Lower bound of every learning rate (base × factor) after the schedule's warm-up and
            after all adjustments; None for no bound.
        max_lr: Upper bound of every learning rate; None for no bound.
        module_scheduler: ``"raise"`` if ``configure_optimizers`` returns a scheduler, or
            ``"replace"`` it. The base learning rates are then those before it scaled them
            (``initial_lr`` of the groups).
        budget: An explicit budget such as ``"2e9 tokens"`` or ``"2 hours"`` that ends the training;
            None for the limits of the Trainer (``max_time`` only if it is the only one).
        samples: Counts the samples of a batch (a function, or the name of a field); None for the
            batch size of the loader.
        tokens: Counts the tokens of a batch: a function, or the name of an ids or mask field.
        on_resume: ``"continue"`` with the horizon of the checkpoint, ``"extend"`` to the horizon of
            this Trainer, or start a ``"cooldown"`` at the position of the checkpoint. A cooldown
            ends the training, unless the Trainer's limit ends it earlier; a checkpoint saved in
            such a cooldown continues it.
        cooldown: Length of that cooldown; a percentage refers to the budget of the checkpoint.
            ``"best"`` with ``on_resume="extend"``: the decay of a WarmupStableDecay becomes so much
            longer that the learning rate stays the best for the longer run
            (:func:`~lightning_bigopt.cooldown_for_extension`).
        cooldown_shape: Shape of that cooldown: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or
            ``"exponential"``.
        cooldown_end: Factor at the end of that cooldown, in [0, 1].
        base_lr: Base learning rates to use after a resume: those of the ``"checkpoint"`` or those
            of the ``"config"``.

    Raises:
        ValueError: At fit start if anything else writes the learning rate; at train start if the
            length of the training is unknown, or a duration does not fit into it.

    State:
        ``schedule``, ``groups`` and ``optimizers`` as code, so that a resumed run can report
        changes, and the chosen lengths of cooldowns. The base learning rates are in the
        checkpoint's ``lr_schedulers``.

    Example:
        >>> from lightning_bigopt import LearningRateScheduler, WarmupStableDecay
        >>> LearningRateScheduler(WarmupStableDecay(warmup="2%", decay="20%"))
        LearningRateScheduler(WarmupStableDecay(...))
    """

    owns = LEARNING_RATE
    rank = 20
    needs_samples = None

    def __init__(
        self,
        schedule: Schedule,
        *,
        groups: Mapping[str, Schedule] | None = None,
        optimizers: Mapping[str, Schedule] | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        module_scheduler: ModuleScheduler = "raise",
        budget: str | None = None,
        samples: BatchCount = None,
        tokens: BatchCount = None,
        on_resume: OnResume | None = None,
        cooldown: DurationLike | None = None,
        cooldown_shape: CooldownShape = "1-sqrt",
        cooldown_end: float = 0.0,
        base_lr: BaseOwner = "checkpoint",
    ) -> None:
        self._schedules = GroupSchedules(schedule, groups, optimizers, hint="WarmupCosine()")
        for name, bound in (("min_lr", min_lr), ("max_lr", max_lr)):
            if bound is not None:
                check_non_negative(name, bound)
        if min_lr is not None and max_lr is not None and min_lr > max_lr:
            raise ValueError(
                f"min_lr must be at most max_lr, got min_lr={min_lr} and max_lr={max_lr}; lower "
                "min_lr"
            )
        check_choice("module_scheduler", module_scheduler, ModuleScheduler)
        check_choice("base_lr", base_lr, BaseOwner)
        check_choice("cooldown_shape", cooldown_shape, CooldownShape)
        check_between("cooldown_end", cooldown_end, 0, 1, ends="[]")
        self.schedule = schedule
        self.groups, self.optimizers = dict(groups or {}), dict(optimizers or {})
        self.min_lr, self.max_lr = min_lr, max_lr
        self.module_scheduler = module_scheduler
        self.base_lr = base_lr
        self.cooldown_shape, self.cooldown_end = cooldown_shape, cooldown_end
        self._extended = ExtendedCooldown(
            self._schedules.by_argument, on_resume=on_resume, is_best=cooldown == BEST
        )
        cooldown = None if cooldown == BEST else cooldown
        self.settings = ClockSettings(
            budget=budget, samples=samples, tokens=tokens, on_resume=on_resume, cooldown=cooldown
        )
        self.needs_horizon = self._schedules.need_horizon or cooldown is not None
        self._saved: dict[str, Any] | None = None
        self._before: dict[tuple[int, int], float] = {}

    def check_fit(self, fit: Fit) -> None:
        """Raises if a callback or the strategy writes the learning rate."""
        trainer = fit.trainer
        if (
            trainer_callbacks.find_lightning_callback(trainer, "StochasticWeightAveraging")
            is not None
        ):
            raise ValueError(
                "callbacks must not contain StochasticWeightAveraging with LearningRateScheduler, "
                "got both: each writes the learning rate; write "
                "ModelAveraging(TailMean(over='10%')) instead of it"
            )
        if strategies.is_deepspeed(trainer) and "scheduler" in getattr(
            trainer.strategy, "config", {}
        ):
            raise ValueError(
                "the DeepSpeed config must not contain a scheduler with LearningRateScheduler, got "
                "one; remove it from the config"
            )

    def check_optimizers(self, fit: Fit) -> None:
        """Raises if an optimizer or the module writes the learning rate, and claims it."""
        trainer = fit.trainer
        for _, optimizer in fit.groups:
            if any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(
                    "lr must be a number in every parameter group with LearningRateScheduler, got "
                    f"None in {type(optimizer).__name__}, which computes its own; pass lr= to it "
                    "(Adafactor: relative_step=False, lr=1e-3), or remove the scheduler"
                )
        if trainer.lr_scheduler_configs and self.module_scheduler == "raise":
            raise ValueError(
                "configure_optimizers must not return a scheduler with LearningRateScheduler, got "
                f"{schedulers.scheduler_names(trainer)}; return the optimizer only, or pass "
                "module_scheduler='replace'"
            )
        initial = schedulers.initial_lrs(trainer)
        fit.scheduler_names = schedulers.remove_schedulers(trainer)
        fit.groups.claim("lr", base=self.base_lr)
        for index, (_, optimizer) in enumerate(fit.groups):
            if id(optimizer) in initial:
                fit.groups.set_bases("lr", index, initial[id(optimizer)])
                rank_zero_info(
                    "The scheduler of the module is replaced. The base learning rates are those "
                    f"before it scaled them: {initial[id(optimizer)]}."
                )
        if fit.has_started:  # the optimizers were replaced, and may have other names
            self._follow(fit)

    def start(self, fit: Fit) -> None:
        """Resolves the schedules on the horizon, and applies them to the learning rate."""
        # On a resume these are the learning rates of the checkpoint: Lightning has restored the
        # optimizers, and the engine has not written the groups yet.
        self._before = _learning_rates(fit)
        self._extended.apply(self._schedules.by_argument, fit)
        bases = [base for each in fit.groups.bases("lr") for base in each]
        if bases and not any(bases):
            rank_zero_warn(
                "The base learning rate of every parameter group is 0, so that nothing is trained. "
                "Pass another lr= to the optimizer."
            )
        self._follow(fit)

    def _follow(self, fit: Fit) -> None:
        self._schedules.resolve(
            fit,
            cooldown_shape=self.cooldown_shape,
            cooldown_end=self.cooldown_end,
            change=self._extended.of,
        )
        fit.groups.follow(
            "lr",
            self._schedules.schedule_of,
            owner=self,
            minimum=self.min_lr,
            maximum=self.max_lr,
        )

    def announce(self, fit: Fit) -> None:
        """Logs advice, and the differences between a resumed run and its checkpoint."""
        advise_on_modes(fit, lambda group, label: self.schedule_of(group, optimizer=label))
        saved, self._saved = self._saved, None
        if not is_resumed(fit):
            return
        schedulers_of_fit = _lightning_schedulers(fit)
        restored = [s.restored_bases for s in schedulers_of_fit if s.restored_bases is not None]
        used = [scheduler.bases for scheduler in schedulers_of_fit]
        adopted, rates = fit.groups.adopted("lr"), _learning_rates(fit)
        report_changes(
            None
            if saved is None or not restored
            else {**saved, "base_lrs": with_adopted(restored, used, adopted)},
            {**self.saved_state(), "base_lrs": used},
            clock=fit.clock,
            values=[(self._before[at], rates[at]) for at in rates if at not in adopted],
            is_foreign=any(scheduler.is_foreign for scheduler in schedulers_of_fit),
        )
        if fit.clock.cooldown is not None:
            start, _ = fit.clock.cooldown
            factors = [self.schedule_of(name)(start) for name in (None, *self.groups)]
            warn_of_flat_cooldown(factors, end=self.cooldown_end)

    @property
    def is_resolved(self) -> bool:
        """Whether the schedules have been resolved on the horizon of the current fit."""
        return self._schedules.is_resolved

    def schedule_of(self, group: str | None, *, optimizer: str = "") -> Schedule:
        """Returns the resolved schedule of a group: by its name, its optimizer, or for all."""
        return self._schedules.schedule_of(group, optimizer)

    def specification(self) -> str:
        """Returns the schedule as code."""
        return repr(self.schedule)

    def settings_as_code(self) -> dict[str, str]:
        """Returns all arguments besides the schedule and the settings of the clock."""
        return {name: as_code(getattr(self, name)) for name in _ARGUMENTS}

    def saved_state(self) -> dict[str, Any]:
        """Returns the schedules as code, and the chosen lengths of cooldowns."""
        lengths = self._extended.lengths
        return {
            "schedule": repr(self.schedule),
            "groups": {name: repr(schedule) for name, schedule in self.groups.items()},
            "optimizers": {name: repr(schedule) for name, schedule in self.optimizers.items()},
            **({"cooldown_lengths": dict(lengths)} if lengths else {}),
        }

    def load_saved_state(self, state: dict[str, Any]) -> None:
        """Restores the lengths, and stores the schedules for the report in :meth:`announce`."""
        self._saved = dict(state)
        self._extended.lengths = dict(self._saved.get("cooldown_lengths", {}))

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Does nothing: the schedules do not change within a fit."""

    def __repr__(self) -> str:
        return f"LearningRateScheduler({type(self.schedule).__name__}(...))"


def _learning_rates(fit: Fit) -> dict[tuple[int, int], float]:
    """Returns the learning rates by position: optimizer and group."""
    return {
        (index, position): float(group["lr"])
        for index, (_, optimizer) in enumerate(fit.groups)
        for position, group in enumerate(optimizer.param_groups)
    }


def _lightning_schedulers(fit: Fit) -> list[LightningLRScheduler]:
    configs = fit.trainer.lr_scheduler_configs
    return [c.scheduler for c in configs if isinstance(c.scheduler, LightningLRScheduler)]
