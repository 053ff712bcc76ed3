"""The settings of the clock, which all callbacks of a Trainer share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from lightning_bigopt.checks import check_choice, shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.engine.batch_contents import BatchCount, named_function
from lightning_bigopt.type_checks import check_instance

__all__ = ["ClockSettings", "OnResume"]

OnResume: TypeAlias = Literal["continue", "extend", "cooldown"]


@dataclass(frozen=True, kw_only=True)
class ClockSettings:
    """The settings of the clock that one callback gives, or that several callbacks give together.

    Args:
        budget: An explicit budget such as ``"2e9 tokens"`` or ``"2 hours"``; None for the limits of
            the Trainer.
        samples: Counts the samples of a batch: a function or its dotted name, or the name of a
            field whose rows are counted; None for the batch size of the loader.
        tokens: Counts the tokens of a batch: a function or its dotted name, or the name of a field
            (a mask is summed, ids are counted); None to count no tokens.
        on_resume: ``"continue"`` with the horizon of the checkpoint, ``"extend"`` to the horizon of
            the Trainer, or start a ``"cooldown"`` at the position of the checkpoint.
        cooldown: Length of that cooldown, after which the training ends.

    Raises:
        ValueError: If an argument is invalid, tokens are not counted for a budget in tokens, or
            ``cooldown`` is given without ``on_resume="cooldown"`` or vice versa.

    Example:
        >>> ClockSettings(budget="1e6 samples").merge(ClockSettings()).budget
        '1e6 samples'
    """

    budget: str | None = None
    samples: BatchCount = None
    tokens: BatchCount = None
    on_resume: OnResume | None = None
    cooldown: DurationLike | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_instance("budget", self.budget, str, hint="write '10000 steps' or '2 hours'")
            length = Duration.parse(self.budget, name="budget")
            unit = length.unit
            if unit == "fraction":
                raise ValueError(
                    "budget must be in steps, epochs, samples, tokens or a time, got "
                    f"{shown(self.budget)}; write '10000 steps' or '2 hours'"
                )
            if not length.value:
                raise ValueError(
                    f"budget must be positive, got {shown(self.budget)}; write '10000 steps' or "
                    "'2 hours'"
                )
            if unit == "tokens" and self.tokens is None:
                raise ValueError(
                    f"tokens must be given with a budget in tokens, got None for "
                    f"{shown(self.budget)}; pass tokens=a function of the batch, or the name of "
                    "its ids or mask"
                )
        for name in ("samples", "tokens"):
            object.__setattr__(self, name, named_function(getattr(self, name), name=name))
        if self.on_resume is not None:
            check_choice("on_resume", self.on_resume, OnResume)
        if (self.on_resume == "cooldown") != (self.cooldown is not None):
            raise ValueError(
                "cooldown must be given with on_resume='cooldown' and only then, got "
                f"{shown(self.cooldown)} with on_resume={shown(self.on_resume)}; write "
                "LearningRateScheduler(schedule, on_resume='cooldown', cooldown='20%')"
            )
        if self.cooldown is not None and not Duration.parse(self.cooldown, name="cooldown").value:
            raise ValueError(f"cooldown must be positive, got {shown(self.cooldown)}; write '20%'")

    def merge(self, other: ClockSettings) -> ClockSettings:
        """Merges the settings of two callbacks.

        Raises:
            ValueError: If both give a setting, with different values.
        """
        merged = {}
        for field in fields(self):
            first, second = getattr(self, field.name), getattr(other, field.name)
            if first is not None and second is not None and first != second:
                raise ValueError(
                    f"{field.name} must be the same on every callback, because there is one clock "
                    f"per Trainer, got {shown(first)} and {shown(second)}; pass it once"
                )
            merged[field.name] = second if first is None else first
        return ClockSettings(**merged)
