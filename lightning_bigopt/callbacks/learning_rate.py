"""LearningRateScheduler."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.clock import BatchCount, ClockSettings, OnResume
from lightning_bigopt.controllers.learning_rate import (
    BaseOwner,
    LearningRateController,
    ModuleScheduler,
)
from lightning_bigopt.durations import DurationLike
from lightning_bigopt.schedules import Schedule
from lightning_bigopt.schedules.checks import CooldownShape

__all__ = ["LearningRateScheduler"]


class LearningRateScheduler(OptimizationCallback):
    """Schedules the learning rate of every parameter group over the whole budget.

    The base is each parameter group's own ``lr``, so ratios between groups are kept; the schedule
    is a factor of the fraction of the budget spent. Under ``max_steps`` update t of T sees t/T,
    under ``max_epochs`` the share of loader batches consumed before it. Lightning saves and
    restores the scheduler, and LearningRateMonitor sees it.

    Args:
        schedule: The factor over the budget.
        groups: Other schedules for named parameter groups.
        optimizers: Other schedules for some of several optimizers (manual optimization), by their
            class's name: ``"Adam"``, or ``"Adam-0"`` and ``"Adam-1"`` for two of a class.
        module_scheduler: ``"raise"`` where ``configure_optimizers`` returns a scheduler of its
            own, or ``"replace"`` it.
        budget: An explicit budget such as ``"2e9 tokens"`` that ends the training; None for the
            Trainer's ``max_steps`` or ``max_epochs``.
        samples: Counts the samples in a batch (a function or a field's name); None for the
            loader's batch size.
        tokens: Counts the tokens in a batch (a function, or the name of an ids or mask field).
        on_resume: ``"continue"`` on the checkpoint's horizon; ``"extend"`` to this Trainer's; or
            start the ``"cooldown"`` where the checkpoint stopped, to branch a finished model off
            a stable run. The training then ends with the cooldown, or at the Trainer's own limit;
            a checkpoint that is in its cooldown goes on with it.
        cooldown: Length of that cooldown; a percentage is a share of the checkpoint's budget.
        cooldown_shape: Its curve: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        cooldown_end: The factor at its end.
        base_lr: Who owns the base learning rate after a resume: ``"checkpoint"`` or ``"config"``.

    Raises:
        ValueError: At fit start for a second owner of the learning rate; at train start where the
            length of the training cannot be known, or a duration does not fit into it.

    State:
        ``clock``: batches, samples and tokens consumed, the horizon, and a cooldown on resume;
        ``schedule``, ``groups`` and ``optimizers`` as written, so that a resumed run can say what
        was changed. The base learning rates are in the checkpoint's ``lr_schedulers``.

    Example:
        >>> from lightning_bigopt import LearningRateScheduler, WarmupStableDecay
        >>> LearningRateScheduler(WarmupStableDecay(warmup="2%", decay="20%"))
        LearningRateScheduler(WarmupStableDecay(...))
    """

    controller: LearningRateController

    def __init__(
        self,
        schedule: Schedule,
        *,
        groups: Mapping[str, Schedule] | None = None,
        optimizers: Mapping[str, Schedule] | None = None,
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
        settings = ClockSettings(
            budget=budget, samples=samples, tokens=tokens, on_resume=on_resume, cooldown=cooldown
        )
        super().__init__(
            LearningRateController(
                schedule,
                groups=groups,
                optimizers=optimizers,
                module_scheduler=module_scheduler,
                base_lr=base_lr,
                cooldown_shape=cooldown_shape,
                cooldown_end=cooldown_end,
                settings=settings,
            )
        )

    def __repr__(self) -> str:
        return f"LearningRateScheduler({type(self.controller.schedule).__name__}(...))"
