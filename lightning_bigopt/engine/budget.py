"""Resolves the budget of a fit: the limit that the run reaches first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.durations.duration import Clock as ClockUnit
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.trainer_access import loaders, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "ROUNDING",
    "Simulate",
    "describe_budget",
    "report_time_limit",
    "resolve_horizon",
    "warn_of_continued_epoch",
    "warn_of_other_budget",
    "warn_of_short_limit",
    "warn_of_time_limit",
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
            "the length of the training must be known for a schedule, got max_steps="
            f"{trainer.max_steps}, max_epochs={trainer.max_epochs} and a loader "
            f"{'without a length' if batches is None else f'of {batches} batches'}; set max_steps, "
            "or pass budget='2e6 samples' to the scheduler"
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
        names = ", ".join(f"{limit.amount:g} {limit.unit}" for limit in limits)
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
    if trainer.min_steps or trainer.min_epochs:
        raise ValueError(
            f"the Trainer must not have min_steps or min_epochs with {limit}, because it would "
            f"train on beyond it, got min_steps={trainer.min_steps} and "
            f"min_epochs={trainer.min_epochs}; remove them"
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
                    f"budget must not be in epochs for a loader without a length, got {budget!r}; "
                    "write it in steps or samples"
                )
            limits += _epochs(length.value, batches, samples)
        elif length.unit != "fraction":
            limits.append(_Limit(length.unit, length.value))
    allowed = loop.max_seconds(trainer)
    if not limits and allowed is not None:
        _check_no_minimum(trainer, f"max_time of {allowed:g} seconds as the only limit")
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
        return f"{horizon.epochs:g} epochs"
    return f"{horizon.budget:g} {horizon.clock}"


def warn_of_continued_epoch(trainer: Trainer) -> None:
    """Warns if Lightning continues an epoch that had ended, and trains one epoch less."""
    epochs = trainer.max_epochs
    if epochs is not None and epochs >= 0 and loop.continues_ended_epoch(trainer):
        rank_zero_warn(
            "Lightning continues an epoch that had ended when the checkpoint was saved: it trains "
            f"one batch more than the {trainer.num_training_batches:g} batches of the epoch, and "
            "one epoch less. Resume from a checkpoint that was saved in on_train_batch_end, such "
            "as by ModelCheckpoint(every_n_train_steps=), or limit the run by max_epochs alone."
        )


def warn_of_time_limit(trainer: Trainer, horizon: Horizon) -> None:
    """Logs a line if ``max_time`` may end the run before its schedules do."""
    allowed = loop.max_seconds(trainer)
    if allowed is not None and horizon.clock != "seconds":
        rank_zero_info(
            f"max_time may end the run before the schedules do, which follow the budget of "
            f"{describe_budget(horizon)}. To follow the time, pass budget='{allowed:g} seconds' to "
            "the scheduler."
        )


def report_time_limit(trainer: Trainer, horizon: Horizon, *, fraction: float) -> None:
    """Warns if ``max_time`` has ended the run before its schedules.

    Args:
        trainer: The Trainer, at the end of the fit.
        horizon: The horizon of the fit.
        fraction: Fraction of the budget consumed.
    """
    if fraction < 1 and horizon.clock != "seconds" and loop.time_is_over(trainer):
        rank_zero_warn(
            f"max_time ended the run at {fraction:.0%} of the budget of {describe_budget(horizon)}"
            ", before the end of its schedules. Resume from a checkpoint, or pass a time as "
            "budget= to the scheduler."
        )


def warn_of_other_budget(kept: Horizon, own: Horizon) -> None:
    """Warns if the budget of a checkpoint that is continued differs from that of the Trainer."""
    before, now = describe_budget(kept), describe_budget(own)
    # The same limits may be reached in another order, because epochs have other lengths now.
    if {before, *map(describe_budget, kept.others)} != {now, *map(describe_budget, own.others)}:
        rank_zero_warn(
            f"The checkpoint was trained for {before}, this Trainer is set to {now}. "
            "on_resume='continue' keeps the checkpoint's horizon; pass on_resume='extend' to "
            "stretch the schedule to the new one."
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
            f"The Trainer stops at {limit:g} {unit}, before the cooldown ends at {needed:g}; raise "
            f"its limit, or shorten the cooldown of {cooldown!r}."
        )
