"""Checks for settings that conflict with ModelAveraging, before the first batch."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bigopt.averaging.average import Average
from lightning_bigopt.durations.duration import Duration
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers import modes
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.trainer_access import strategies
from lightning_bigopt.trainer_access.callbacks import find_lightning_callback
from lightning_bigopt.trainer_access.packages import classes

__all__ = ["check_conflicts", "check_optimizers", "check_units"]


def check_conflicts(fit: Fit) -> None:
    """Raises for strategies whose weights cannot be averaged, and Lightning's own averages.

    Raises:
        ValueError: With DeepSpeed or FSDP1, and beside WeightAveraging, EMAWeightAveraging or
            StochasticWeightAveraging.
    """
    trainer = fit.trainer
    is_fsdp1 = isinstance(trainer.strategy, classes("strategies.FSDPStrategy"))
    if strategies.is_deepspeed(trainer) or is_fsdp1:
        raise ValueError(
            "strategy must keep the parameters of the module with ModelAveraging, got "
            f"{type(trainer.strategy).__name__}; use ModelParallelStrategy (FSDP2) or DDP"
        )
    for kind, way_out in (
        ("WeightAveraging", "remove it, and write ModelAveraging(EMA(half_life='1%'))"),
        ("StochasticWeightAveraging", "remove it, and write ModelAveraging(TailMean(over='10%'))"),
    ):
        if (other := find_lightning_callback(trainer, kind)) is not None:
            raise ValueError(
                f"callbacks must not contain {type(other).__name__} with ModelAveraging, got both; "
                f"{way_out}"
            )


def check_optimizers(fit: Fit) -> None:
    """Raises for an optimizer that averages the weights itself.

    Raises:
        ValueError: For an optimizer with ``train()`` and ``eval()``, such as a schedule-free one.
    """
    for optimizer in map(unwrapped, fit.trainer.optimizers):
        if modes.has_modes(optimizer):
            raise ValueError(
                f"optimizer must not have train() and eval() with ModelAveraging, got "
                f"{type(optimizer).__name__}, which averages the weights itself; remove "
                "ModelAveraging"
            )


def check_units(fit: Fit, averages: Mapping[str, Average]) -> None:
    """Raises if the clock does not count the unit of an average.

    Raises:
        ValueError: For tokens that no callback counts, epochs of unknown length, and a time without
            a budget in time.
    """
    clock = fit.clock
    for name, average in averages.items():
        units = {duration.unit: duration for duration in _durations(average)}
        for unit, way_out in (
            ("tokens", "pass tokens= to LearningRateScheduler or OptimizationMonitor"),
            ("epochs", "write it in steps, samples or percent"),
            ("seconds", "write it in percent, or give the budget as a time"),
        ):
            is_counted = {
                "tokens": clock.settings.tokens is not None,
                "epochs": bool(clock.epoch.length),
                "seconds": clock.is_timed,
            }[unit]
            if unit in units and not is_counted:
                raise ValueError(
                    f"{name} must have a duration in a unit that the run counts, got "
                    f"{str(units[unit])!r}; {way_out}"
                )


def _durations(average: Average) -> list[Duration]:
    start = getattr(average, "start", 0)
    return [average.duration, *([Duration.parse(start)] if start else [])]
