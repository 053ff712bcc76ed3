"""Checks for settings that conflict with ModelAveraging, before the first batch."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bigopt.averaging.average import Average
from lightning_bigopt.averaging.tail_mean import TailMean
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.optimizers import modes
from lightning_bigopt.optimizers.names import unwrapped
from lightning_bigopt.trainer_access import strategies
from lightning_bigopt.trainer_access.callbacks import find_lightning_callback
from lightning_bigopt.trainer_access.packages import classes

__all__ = ["check_conflicts", "check_durations", "check_optimizers"]


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
            "strategy must not be FSDP1 or DeepSpeed with ModelAveraging, got "
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


def check_durations(fit: Fit, averages: Mapping[str, Average]) -> None:
    """Raises if the clock does not count the unit of an average, or it does not fit the budget.

    Raises:
        ValueError: For tokens that no callback counts, epochs of unknown length, a time without a
            budget in time, and a TailMean that is longer than the budget, or whose end is that of
            a cooldown.
    """
    clock = fit.clock
    counted = {
        "tokens": clock.settings.tokens is not None,
        "epochs": bool(clock.epoch.length),
        "seconds": clock.is_timed,
    }
    ways_out = {
        "tokens": "pass tokens= to LearningRateScheduler or OptimizationMonitor",
        "epochs": "write it in steps, samples or percent",
        "seconds": "write it in percent, or give the budget as a time",
    }
    for name, average in averages.items():
        for duration in average.durations:
            if not counted.get(duration.unit, True):
                raise ValueError(
                    f"the durations of averages[{name!r}] must have a unit that the run counts, "
                    f"got {str(duration)!r}; {ways_out[duration.unit]}"
                )
        average.check(clock.horizon)
        if clock.cooldown is not None and isinstance(average, TailMean):
            raise ValueError(
                f"on_resume must not be 'cooldown' with TailMean, got both: {average!r} averages "
                "the end of the budget, not of the cooldown; remove the TailMean"
            )
