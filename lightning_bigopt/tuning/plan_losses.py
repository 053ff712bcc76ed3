"""The losses that a law expects of a planned run, and of the run with other schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.planning.expected_loss import ExpectedLoss
from lightning_bigopt.planning.loss_curve import interpolated_rates
from lightning_bigopt.planning.loss_law import LossLaw
from lightning_bigopt.planning.outline import PlannedUpdate, planned_updates
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.plateaus import WarmupStableDecay
from lightning_bigopt.schedules.recipes import WarmupConstant, WarmupCosine, WarmupLinear

__all__ = ["losses_of_plan"]

THIS_RUN = "this run"
_POINTS = 20_000  # updates with a learning rate of their own; between them it is interpolated


def losses_of_plan(
    law: LossLaw,
    horizon: Horizon,
    groups: GroupSchedule,
    scheduler: LearningRateScheduler | None,
    *,
    module_schedules: bool = False,
) -> tuple[tuple[ExpectedLoss, ...], list[str]]:
    """Predicts the loss of a planned run, and of the run with the usual schedules.

    The learning rate is that of the parameter group with the highest one. The other schedules have
    the warm-up and the peak of the run. In a run of more than 20,000 updates, the learning rates
    are computed for so many of them and interpolated: a part of the schedule that is shorter than
    a 20,000th of the run is not seen.

    Args:
        law: The law.
        horizon: The horizon of the run.
        groups: The schedules of the learning rates.
        scheduler: The scheduler of the run; None without one.
        module_schedules: Whether the module has a scheduler of its own, which no plan knows.

    Returns:
        The predictions, that of the run first, and warnings.
    """
    if scheduler is None and module_schedules:
        own = "the module has its own learning-rate scheduler"
        return (), [f"the loss cannot be predicted: {own}; use LearningRateScheduler instead"]
    total = horizon.total("steps")
    if total is None:
        return (), ["the loss cannot be predicted: the number of updates is not known in advance"]
    updates = list(planned_updates(horizon, groups, points=min(round(total), _POINTS)))
    places = [update.progress.steps for update in updates]
    rates = _highest(updates)
    if not rates or not max(rates) > 0:
        return (), ["the loss cannot be predicted: no parameter group has a learning rate"]

    def expected(values: Sequence[float], name: str) -> ExpectedLoss:
        every = interpolated_rates(places, values, places[-1] + 1)
        return law.predict_learning_rates(every, name=name)

    first = expected(rates, THIS_RUN)
    warnings = [f"expected loss: {note}" for note in first.notes]
    if len({update.global_batch_size for update in updates}) > 1:
        warnings.append(
            "expected loss: the batch size changes, and the law describes runs with the batch size "
            "of the pilots"
        )
    run, peak = Horizon.of_steps(places[-1] + 1), max(rates)
    others = []
    for name, schedule in _alternatives(scheduler):
        resolved = schedule.resolve(run)
        values = [peak * resolved(place / (places[-1] + 1)) for place in places]
        others.append(replace(expected(values, name), notes=()))
    return (first, *others), warnings


def _highest(updates: list[PlannedUpdate]) -> list[float]:
    """Returns the learning rate of each update of the group with the highest one."""
    columns = list(zip(*([r.value for r in u.learning_rates] for u in updates), strict=True))
    return list(max(columns, key=max)) if columns else []


def _alternatives(scheduler: LearningRateScheduler | None) -> Iterator[tuple[str, Schedule]]:
    share = 0.0 if scheduler is None else scheduler.schedule_of(None).warmup_end()
    warmup = f"{100 * share:.6g}%" if share else 0
    yield "WarmupConstant()", WarmupConstant(warmup=warmup)
    yield "WarmupCosine(end=0.1)", WarmupCosine(warmup=warmup, end=0.1)
    yield "WarmupLinear(end=0)", WarmupLinear(warmup=warmup, end=0.0)
    if share < 0.8:
        yield "WarmupStableDecay(decay='20%')", WarmupStableDecay(warmup=warmup, decay="20%")
