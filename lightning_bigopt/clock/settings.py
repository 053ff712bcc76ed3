"""What the callbacks ask of the one clock."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

from lightning_bigopt.counting import BatchCount, named_function
from lightning_bigopt.durations import Duration, DurationLike

__all__ = ["ClockSettings", "OnResume"]

OnResume: TypeAlias = Literal["continue", "extend", "cooldown"]


@dataclass(frozen=True, kw_only=True)
class ClockSettings:
    """What a callback asks of the one clock; two different answers to one question raise.

    Args:
        budget: An explicit budget such as ``"2e9 tokens"``; None for the Trainer's own limits.
        samples: Counts the samples in a batch: a function or its dotted name, or the name of a
            field whose first dimension is counted; None for the loader's batch size.
        tokens: Counts the tokens in a batch: a function or its dotted name, or the name of a
            field: a mask is summed, ids are counted; None where nobody counts tokens.
        on_resume: ``"continue"`` on the checkpoint's horizon, ``"extend"`` to the Trainer's, or
            start the ``"cooldown"`` where the checkpoint stopped.
        cooldown: Length of that cooldown, after which the training ends.

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
            unit = Duration.parse(self.budget, name="budget").unit
            if unit == "fraction":
                raise ValueError(
                    f"budget must be in steps, epochs, samples or tokens, got {self.budget!r}"
                )
            if unit == "tokens" and self.tokens is None:
                raise ValueError(
                    f"tokens must be given with a budget in tokens, got None for {self.budget!r}; "
                    "pass tokens=a function of the batch, or the name of its ids or mask"
                )
        for name in ("samples", "tokens"):
            object.__setattr__(self, name, named_function(getattr(self, name), name=name))
        if self.on_resume not in (None, *get_args(OnResume)):
            raise ValueError(
                f"on_resume must be 'continue', 'extend' or 'cooldown', got {self.on_resume!r}"
            )
        if (self.on_resume == "cooldown") != (self.cooldown is not None):
            raise ValueError(
                f"cooldown must be given with on_resume='cooldown' and only then, got "
                f"{self.cooldown!r} with on_resume={self.on_resume!r}; write "
                "LearningRateScheduler(schedule, on_resume='cooldown', cooldown='20%')"
            )
        if self.cooldown is not None and not Duration.parse(self.cooldown, name="cooldown").value:
            raise ValueError(f"cooldown must be positive, got {self.cooldown!r}")

    def merge(self, other: ClockSettings) -> ClockSettings:
        """One set of settings out of two.

        Raises:
            ValueError: If both answer a question, differently.
        """
        merged = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(
                    f"{field.name} must be the same on every callback, because there is one clock "
                    f"per Trainer, got {mine!r} and {theirs!r}; give it once"
                )
            merged[field.name] = theirs if mine is None else mine
        return ClockSettings(**merged)
