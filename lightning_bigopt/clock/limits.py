"""The limits of a fit, and the budget that they make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from lightning_bigopt import trainer_access
from lightning_bigopt.durations import Clock, Duration, Horizon

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Simulate", "resolve_horizon"]

Simulate: TypeAlias = Callable[[Clock, float], Horizon]


def resolve_horizon(trainer: Trainer, budget: str | None, simulate: Simulate | None) -> Horizon:
    """The budget of a fit: of all its limits, the one that ends first.

    Args:
        trainer: After its loaders are set up.
        budget: An explicit budget, or None.
        simulate: ``(clock, budget) -> Horizon``, which lays the run out update by update; None
            where the plan is not known in advance.

    Raises:
        ValueError: If nothing limits the run, or the limit cannot be counted.
    """
    exact = trainer_access.exact_loader(trainer)
    whole = None if exact is None else exact.samples
    each = trainer_access.epoch_batches(trainer) if exact is None else None
    limits: list[tuple[Clock, float]] = []
    if trainer.max_steps >= 0:
        limits.append(("steps", trainer.max_steps))
    max_epochs = trainer.max_epochs
    if max_epochs is not None and max_epochs >= 0:
        limits += _epochs(max_epochs, each, whole)
    if budget is not None:
        length = Duration.parse(budget, name="budget")
        if length.unit == "epochs":
            if each is None and whole is None:
                raise ValueError(
                    f"budget must not be in epochs for a loader without length, got {budget!r}; "
                    "write it in steps or samples"
                )
            limits += _epochs(length.value, each, whole)
        elif length.unit != "fraction":
            limits.append((length.unit, length.value))
    limits = [(clock, amount) for clock, amount in limits if amount > 0]
    if not limits:
        raise ValueError(
            f"the length of the training must be known for a schedule, got max_steps="
            f"{trainer.max_steps}, max_epochs={max_epochs} and a loader "
            f"{'without length' if each is None else f'of {each} batches'}; set max_steps, or pass "
            "budget='2e6 samples' to the scheduler"
        )
    overlong: Literal["raise", "compress"] = (
        "compress" if trainer_access.is_fast_dev_run(trainer) else "raise"
    )
    if simulate is None:
        if len(limits) > 1:
            names = ", ".join(f"{amount:g} {clock}" for clock, amount in limits)
            raise ValueError(
                f"the limits of the training must be one where the batch size is adaptive, got "
                f"{names}; keep one of them"
            )
        clock, amount = limits[0]
        return Horizon(
            clock=clock,
            budget=amount,
            batches_per_epoch=each,
            samples_per_epoch=whole,
            overlong=overlong,
        )
    chosen = min((simulate(clock, amount) for clock, amount in limits), key=_updates)
    return Horizon(
        clock=chosen.clock,
        budget=chosen.budget,
        spans=chosen.spans,
        batches_per_epoch=each,
        samples_per_epoch=whole,
        overlong=overlong,
    )


def _epochs(epochs: float, batches: int | None, samples: int | None) -> list[tuple[Clock, float]]:
    """A number of epochs as a limit in what the loader counts; none where it counts nothing."""
    if samples is not None:
        return [("samples", epochs * samples)]
    return [] if batches is None else [("batches", epochs * batches)]


def _updates(run: Horizon) -> float:
    # An explicit budget that only counting can compare with the Trainer's limits goes first.
    return run.total("steps") or 0.0
