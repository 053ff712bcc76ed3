"""Resolves the budget of a fit: the limit that the run reaches first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import Clock as ClockUnit
from lightning_bigopt.durations.duration import Duration, DurationLike, amount_of
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.trainer_access import loaders, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "ROUNDING",
    "Simulate",
    "announce_limits",
    "describe_budget",
    "report_early_end",
    "resolve_horizon",
    "several_optimizers",
    "warn_of_other_budget",
    "warn_of_short_limit",
]

ROUNDING = 1e-12  # tolerance of comparisons with the end of a cooldown

Simulate: TypeAlias = Callable[[ClockUnit, float], Horizon]
"""Simulates a run: unit and amount of its budget → horizon with all updates."""


class _Limit(NamedTuple):
    """A limit of the run in a unit that can be counted, and in epochs if it was given in them."""

    unit: ClockUnit
    amount: float
    epochs: float | None = None


def resolve_horizon(trainer: Trainer, budget: str | None, simulate: Simulate | None) -> Horizon:
    """Returns the horizon of a fit.

    Args:
        trainer: The Trainer, after its loaders are set up.
        budget: An explicit budget; None for the limits of the Trainer.
        simulate: Simulates the run; None if the batch sizes are not known in advance.

    Raises:
        ValueError: If no limit of the run can be counted, several limits cannot be compared, or the
            Trainer would train on beyond an explicit budget.
    """
    if budget is not None:
        _check_no_minimum(trainer, f"budget={budget!r}")
    exact = loaders.exact_loader(trainer)
    samples = None if exact is None else exact.samples
    batches = loop.epoch_batches(trainer) if exact is None else None
    limits = _limits(trainer, budget, batches=batches, samples=samples)
    if not limits:
        raise ValueError(
            "the length of the training must be known for schedules and RollBack, got max_steps="
            f"{trainer.max_steps}, max_epochs={trainer.max_epochs} and a loader "
            f"{'without a length' if batches is None else 'of ' + amount_of(batches, 'batches')}; "
            "set max_steps, or pass budget='2e6 samples' to LearningRateScheduler"
        )
    if simulate is not None:
        runs = [
            replace(simulate(limit.unit, limit.amount), epochs=limit.epochs) for limit in limits
        ]
        run = min(runs, key=_updates)
        others = [limit for limit, other in zip(limits, runs, strict=True) if other is not run]
        run = replace(run, others=tuple(map(_without_updates, others)))
    elif len(limits) == 1:
        run = _without_updates(limits[0])
    else:
        names = ", ".join(amount_of(limit.amount, limit.unit) for limit in limits)
        raise ValueError(
            "the training must have a single limit with an adaptive batch size, got "
            f"{names}; keep one of them"
        )
    # Warm-ups of thousands of updates must not make fast_dev_run, with one update, fail.
    overlong: Literal["raise", "compress"] = "raise"
    if loop.is_fast_dev_run(trainer):
        overlong = "compress"
    return replace(run, batches_per_epoch=batches, samples_per_epoch=samples, overlong=overlong)


def _check_no_minimum(trainer: Trainer, limit: str) -> None:
    minimums = {"min_steps": trainer.min_steps, "min_epochs": trainer.min_epochs}
    if trainer.min_steps and trainer.min_epochs == 1:
        del minimums["min_epochs"]  # Lightning sets it beside min_steps
    found = " and ".join(f"{name}={value}" for name, value in minimums.items() if value)
    if found:
        raise ValueError(
            f"the Trainer must not have a minimum with {limit}, because it would train on beyond "
            f"it, got {found}; remove {'them' if ' and ' in found else 'it'}"
        )


def _limits(
    trainer: Trainer, budget: str | None, *, batches: int | None, samples: int | None
) -> list[_Limit]:
    """Returns all limits of the fit, each in a unit that can be counted."""
    limits: list[_Limit] = []
    length = None if budget is None else Duration.parse(budget, name="budget")
    if length is not None and length.unit == "seconds":
        return [_Limit("seconds", length.value)]  # the other limits cannot be compared with it
    if trainer.max_steps >= 0:
        limits.append(_Limit("steps", trainer.max_steps))
    max_epochs = trainer.max_epochs
    if max_epochs is not None and max_epochs >= 0:
        limits += _epochs(max_epochs, batches, samples)
    if length is not None:
        if length.unit == "epochs":
            if batches is None and samples is None:
                raise ValueError(
                    f"budget must not be in epochs for a loader without a length, got "
                    f"{shown(budget)}; write it in steps or samples"
                )
            limits += _epochs(length.value, batches, samples)
        elif length.unit != "fraction":
            limits.append(_Limit(length.unit, length.value))
    allowed = loop.max_seconds(trainer)
    if not limits and allowed is not None:
        _check_no_minimum(trainer, f"max_time of {amount_of(allowed, 'seconds')} as the only limit")
        # Only then: a job's safety limit must not make learning rates depend on the machine.
        limits.append(_Limit("seconds", allowed))
    return [limit for limit in limits if limit.amount > 0]


def _epochs(epochs: float, batches: int | None, samples: int | None) -> list[_Limit]:
    """Converts a number of epochs to samples or batches; empty for a loader without a length."""
    if samples is not None:
        return [_Limit("samples", epochs * samples, epochs)]
    return [] if batches is None else [_Limit("batches", epochs * batches, epochs)]


def _without_updates(limit: _Limit) -> Horizon:
    return Horizon(clock=limit.unit, budget=limit.amount, epochs=limit.epochs)


def _updates(run: Horizon) -> float:
    # An explicit budget whose updates are known by counting only, as in tokens, cannot be compared
    # with the limits of the Trainer. It takes precedence.
    return run.total("steps") or 0.0


def describe_budget(horizon: Horizon) -> str:
    """Returns the budget in the unit in which it was given, such as ``"10 epochs"``."""
    if horizon.epochs is not None:
        return amount_of(horizon.epochs, "epochs")
    return amount_of(horizon.budget, horizon.clock)


def several_optimizers(count: int, unit: str) -> str:
    """Describes the durations of a run whose optimizers Lightning counts together.

    Args:
        count: Number of optimizers.
        unit: Unit of the budget.
    """
    if unit == "steps":
        return (
            f"max_steps counts the steps of all {count} optimizers, and manual optimization does "
            "not say in advance how many each batch makes. The learning rate at each step is "
            "right. The conversion to samples and epochs assumes one step per batch: write "
            "durations in steps or percent, or limit the run by max_epochs. If each optimizer "
            f"steps once per batch, a run of N batches has max_steps={count} * N"
        )
    return (
        f"Lightning counts the steps of all {count} optimizers, and manual optimization does not "
        "say in advance how many each batch makes. The learning rate at each fraction of the "
        "budget is right. Updates are counted as one per batch here: write durations in "
        "epochs or percent"
    )


def announce_limits(trainer: Trainer, horizon: Horizon) -> None:
    """Logs what the user should know about the limits of the run when it starts."""
    _warn_of_time_limit(trainer, horizon)
    _warn_of_continued_epoch(trainer)
    if len(trainer.optimizers) > 1:
        rank_zero_info(several_optimizers(len(trainer.optimizers), horizon.clock) + ".")


def _warn_of_continued_epoch(trainer: Trainer) -> None:
    """Warns if Lightning continues an epoch that had ended, and trains one epoch less."""
    epochs = trainer.max_epochs
    if epochs is not None and epochs >= 0 and loop.continues_ended_epoch(trainer):
        batches, more = loop.epoch_batches(trainer), "no further batch of it"
        if batches is not None:
            more = f"at most one batch more than the {amount_of(batches, 'batches')} of the epoch"
        rank_zero_warn(
            "Lightning continues an epoch that had ended when the checkpoint was saved: it trains "
            f"{more}, and one epoch less. Resume from a checkpoint that was saved in "
            "on_train_batch_end, such as by ModelCheckpoint(every_n_train_steps=), or limit the "
            "run by max_epochs alone."
        )


def _warn_of_time_limit(trainer: Trainer, horizon: Horizon) -> None:
    """Logs a line if ``max_time`` may end the run before its schedules do."""
    allowed = loop.max_seconds(trainer)
    if allowed is not None and horizon.clock != "seconds":
        rank_zero_info(
            f"max_time may end the run before the schedules do, which follow the budget of "
            f"{describe_budget(horizon)}. To follow the time, pass "
            f"budget='{amount_of(allowed, 'seconds')}' to the scheduler."
        )


def report_early_end(trainer: Trainer, horizon: Horizon, *, fraction: float) -> None:
    """Warns if a limit that the budget does not follow has ended the run before its schedules.

    Args:
        trainer: The Trainer, at the end of the fit.
        horizon: The horizon of the fit.
        fraction: Fraction of the budget consumed.
    """
    limit = loop.reached_limit(trainer)
    if limit is None or fraction >= 1 - ROUNDING or horizon.clock == "seconds":
        return
    way_out = {
        "max_time": "pass a time as budget= to the scheduler",
        "max_epochs": "remove max_epochs, or write the length of the run in steps or samples",
        "max_steps": "raise max_steps",
    }[limit]
    rank_zero_warn(
        f"{limit} ended the run at {fraction:.0%} of the budget of {describe_budget(horizon)}, "
        f"before the end of its schedules. Resume from a checkpoint, or {way_out}."
    )


def warn_of_other_budget(
    kept: Horizon, own: Horizon, *, fraction: float, ends_run: bool = False
) -> None:
    """Warns if the budget of a checkpoint that is continued differs from that of the Trainer.

    Args:
        kept: The horizon of the checkpoint.
        own: The horizon of the Trainer.
        fraction: Fraction of ``kept`` that is consumed.
        ends_run: Whether the end of ``kept`` ends the run, as with an explicit budget.
    """
    before, now = describe_budget(kept), describe_budget(own)
    # The same limits may be reached in another order, because epochs have other lengths now.
    if {before, *map(describe_budget, kept.others)} != {now, *map(describe_budget, own.others)}:
        rank_zero_warn(
            f"The checkpoint was trained for {before}, this Trainer is set to {now}. "
            f"on_resume='continue' keeps the checkpoint's horizon: "
            f"{_consequence(kept, own, fraction, ends_run=ends_run)}. Pass on_resume='extend' to "
            f"stretch the schedule to {now}."
        )


def _consequence(kept: Horizon, own: Horizon, fraction: float, *, ends_run: bool) -> str:
    """Describes a run that follows ``kept``, under a Trainer with the limit ``own``."""
    before, now = describe_budget(kept), describe_budget(own)
    is_timed = kept.clock == "seconds"
    if fraction >= 1:
        if is_timed or ends_run:
            what = "time is over" if is_timed else "budget is spent"
            return f"this {what}, so that no update is trained"
        return (
            "its schedule has ended, so that every update uses the last learning rate of the "
            "schedule, which is 0 for most schedules"
        )
    if ends_run:
        return f"the run ends after {before}, or at a limit of the Trainer if that is earlier"
    if is_timed:
        return f"the run ends after {before} of training, or after {now} if that is earlier"
    same = kept.clock == own.clock and (kept.epochs is None) == (own.epochs is None)
    ratio = (own.epochs or own.budget) / (kept.epochs or kept.budget)
    if same and ratio < 1:
        return f"the run ends at {ratio:.0%} of the schedule"
    condition = "" if same else f", if {now} are longer"
    return (
        f"after {before} every update uses the last learning rate of the schedule{condition}, "
        "which is 0 for most schedules"
    )


def warn_of_short_limit(
    own: Horizon, horizon: Horizon, cooldown: DurationLike | None, *, end: float
) -> None:
    """Warns if the Trainer's limit ends a cooldown early.

    Args:
        own: The horizon of the Trainer.
        horizon: The horizon of the checkpoint.
        cooldown: Length of the cooldown.
        end: End of the cooldown, as a fraction of ``horizon``.
    """
    limit, needed = own.budget, end * horizon.budget
    if own.epochs is not None and horizon.epochs is not None:
        limit, needed, unit = own.epochs, end * horizon.epochs, "epochs"
    elif own.clock == horizon.clock:
        unit = str(own.clock)
    else:
        return
    if limit < needed * (1 - ROUNDING):
        rank_zero_warn(
            f"The Trainer stops at {amount_of(limit, unit)}, before the cooldown ends at "
            f"{needed:g}; raise its limit, or shorten the cooldown of {cooldown!r}."
        )
