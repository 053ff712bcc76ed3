"""Resolves the budget of a fit: the limit that the run reaches first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_bigopt.durations.duration import Clock as ClockUnit
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.trainer_access import loaders, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Simulate", "resolve_horizon"]

Simulate: TypeAlias = Callable[[ClockUnit, float], Horizon]
"""Simulates a run: unit and amount of its budget → horizon with all updates."""


def resolve_horizon(trainer: Trainer, budget: str | None, simulate: Simulate | None) -> Horizon:
    """Returns the horizon of a fit.

    Args:
        trainer: The Trainer, after its loaders are set up.
        budget: An explicit budget; None for the limits of the Trainer.
        simulate: Simulates the run; None if the batch sizes are not known in advance.

    Raises:
        ValueError: If no limit of the run can be counted, or several limits cannot be compared.
    """
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
        run = min((simulate(unit, amount) for unit, amount in limits), key=_updates)
    elif len(limits) == 1:
        unit, amount = limits[0]
        run = Horizon(clock=unit, budget=amount)
    else:
        names = ", ".join(f"{amount:g} {unit}" for unit, amount in limits)
        raise ValueError(
            "the training must have a single limit with an adaptive batch size, got "
            f"{names}; keep one of them"
        )
    # Warm-ups of thousands of updates must not make fast_dev_run, with one update, fail.
    overlong: Literal["raise", "compress"] = "raise"
    if loop.is_fast_dev_run(trainer):
        overlong = "compress"
    return replace(run, batches_per_epoch=batches, samples_per_epoch=samples, overlong=overlong)


def _limits(
    trainer: Trainer, budget: str | None, *, batches: int | None, samples: int | None
) -> list[tuple[ClockUnit, float]]:
    """Returns all limits of the fit, each in a unit that can be counted."""
    limits: list[tuple[ClockUnit, float]] = []
    if trainer.max_steps >= 0:
        limits.append(("steps", trainer.max_steps))
    max_epochs = trainer.max_epochs
    if max_epochs is not None and max_epochs >= 0:
        limits += _epochs(max_epochs, batches, samples)
    if budget is not None:
        length = Duration.parse(budget, name="budget")
        if length.unit == "epochs":
            if batches is None and samples is None:
                raise ValueError(
                    f"budget must not be in epochs for a loader without a length, got {budget!r}; "
                    "write it in steps or samples"
                )
            limits += _epochs(length.value, batches, samples)
        elif length.unit != "fraction":
            limits.append((length.unit, length.value))
    return [(unit, amount) for unit, amount in limits if amount > 0]


def _epochs(
    epochs: float, batches: int | None, samples: int | None
) -> list[tuple[ClockUnit, float]]:
    """Converts a number of epochs to samples or batches; empty for a loader without a length."""
    if samples is not None:
        return [("samples", epochs * samples)]
    return [] if batches is None else [("batches", epochs * batches)]


def _updates(run: Horizon) -> float:
    # An explicit budget whose updates are known by counting only, as in tokens, cannot be compared
    # with the limits of the Trainer. It takes precedence.
    return run.total("steps") or 0.0
