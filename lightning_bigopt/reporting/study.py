"""The result of a hyperparameter study as plain data: trials, best values, edges and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = ["Axis", "Direction", "StudyRecord", "StudyTrial", "TrialState"]

Direction: TypeAlias = Literal["minimize", "maximize"]
TrialState: TypeAlias = Literal["complete", "pruned", "failed", "running"]

_EDGE = 0.05  # share of an axis at each of its ends
_TRIALS_FOR_ADVICE = 6  # the best of fewer ones is often at an end by chance


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range of one searched value.

    Args:
        name: Path of the field.
        low: Smallest value; None for an axis of options.
        high: Largest value; None for an axis of options.
        is_log: Whether the axis is logarithmic.
        options: The options of a Choice as text; empty for numbers.
    """

    name: str
    low: float | None = None
    high: float | None = None
    is_log: bool = False
    options: tuple[str, ...] = ()

    def position(self, value: Any) -> float:
        """Returns the position of a value on the axis: 0 and 1 are the ends.

        Example:
            >>> Axis(name="lr", low=1e-4, high=1.0, is_log=True).position(1e-2)
            0.5
        """
        if self.low is None or self.high is None:
            return self.options.index(str(value)) / max(len(self.options) - 1, 1)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def advice_at_edge(self, value: Any) -> str:
        """Returns what to do about a best value at an end of the axis; "" if it is at none.

        Example:
            >>> axis = Axis(name="lr", low=1e-4, high=1e-1, is_log=True)
            >>> axis.advice_at_edge(0.09)
            'lr = 0.09 is at the upper end of its range; search again from 0.01 to 10'
            >>> axis.advice_at_edge(0.01)
            ''
        """
        if self.low is None or self.high is None:
            return self._advice_on_options(str(value))
        at = self.position(value)
        if _EDGE < at < 1 - _EDGE:
            return ""
        is_upper = at >= 0.5
        if self.is_log:
            ratio = self.high / self.low
            edge = self.high if is_upper else self.low
            third = ratio ** (1 / 3)
            low, high = (
                (edge / third, edge * third**2)
                if is_upper
                else (
                    edge / third**2,
                    edge * third,
                )
            )
        else:
            width = self.high - self.low
            shift = 2 * width / 3 if is_upper else -2 * width / 3
            low, high = self.low + shift, self.high + shift
        end = "upper" if is_upper else "lower"
        text = f"{self.name} = {_short(value)} is at the {end} end of its range; "
        if not self.is_log and low < 0 <= self.low:
            if self.low == 0:  # a length or a factor that cannot be negative
                return f"{text}it cannot be widened below 0: search a smaller range there"
            low = 0.0
        return f"{text}search again from {_short(low)} to {_short(high)}"

    def _advice_on_options(self, value: str) -> str:
        numbers = [number for option in self.options if (number := _number(option)) is not None]
        if len(numbers) < len(self.options) or len(numbers) < 3:
            return ""  # options without an order, or too few to have a middle
        if (mine := _number(value)) in (ends := (min(numbers), max(numbers))):
            end = "largest" if mine == ends[1] else "smallest"
            return f"{self.name} = {value} is the {end} option; add options beyond it"
        return ""


@dataclass(frozen=True, kw_only=True)
class StudyTrial:
    """One trial of a study.

    Args:
        number: Number of the trial in its study, from 0.
        state: ``"complete"``, ``"pruned"``, ``"failed"`` or ``"running"`` (in another process).
        values: The value of each field by path; objects as text.
        loss: Monitored value at the end, or the last one that was reported; None without any.
        reason: Why the trial was pruned or has failed; "" for a complete one.
        updates: Updates that were trained.
        updates_saved: Updates that separate runs would have trained in addition.
        seconds: Duration.
        curve: Monitored value after a number of updates, in ascending order.
    """

    number: int
    state: TrialState
    values: Mapping[str, Any]
    loss: float | None = None
    reason: str = ""
    updates: int = 0
    updates_saved: int = 0
    seconds: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """The trials of a study and what follows from them; ``print`` shows it as a table.

    Args:
        name: Name of the study.
        monitor: Name of the monitored value.
        direction: ``"minimize"`` or ``"maximize"``.
        axes: The range of each field.
        trials: All trials by number, without those of which another attempt was made.
        best_values: The values of the best trial by path, as a config or a function takes them.
        importance: Share of each field in the variance of the loss, by path; None if unknown.
        config: The best values as YAML.
        budgets: Updates of the budgets, for trials that share a trunk; empty otherwise.

    Example:
        >>> trials = [
        ...     StudyTrial(number=0, state="complete", values={"lr": 0.1}, loss=2.0, updates=50),
        ...     StudyTrial(number=1, state="pruned", values={"lr": 1.0}, reason="loss is nan"),
        ... ]
        >>> print(
        ...     StudyRecord(
        ...         name="gpt",
        ...         monitor="val_loss",
        ...         axes=(Axis(name="lr", low=0.01, high=1.0, is_log=True),),
        ...         trials=tuple(trials),
        ...         best_values={"lr": 0.1},
        ...     )
        ... )
        study 'gpt': 1 trial complete, 1 pruned
        best val_loss 2 in trial 0: lr=0.1
        cost: 50 updates in 0 s
        <BLANKLINE>
        trial  state     val_loss  updates  lr   reason
            0  complete         2       50  0.1
            1  pruned                    0  1    loss is nan
    """

    name: str
    monitor: str
    direction: Direction = "minimize"
    axes: tuple[Axis, ...]
    trials: tuple[StudyTrial, ...]
    best_values: Mapping[str, Any] = field(default_factory=dict)
    importance: Mapping[str, float] | None = None
    config: str = ""
    budgets: tuple[int, ...] = ()

    @property
    def best(self) -> StudyTrial | None:
        """The complete trial with the best monitored value; None without a complete one."""
        sign = 1 if self.direction == "minimize" else -1
        complete = [t for t in self.trials if t.state == "complete" and t.loss is not None]
        return min(complete, key=lambda t: sign * (t.loss or 0.0), default=None)

    @property
    def best_loss(self) -> float | None:
        """The monitored value of the best trial; None without a complete trial."""
        return None if self.best is None else self.best.loss

    @property
    def updates(self) -> int:
        """Updates that were trained in all trials."""
        return sum(trial.updates for trial in self.trials)

    @property
    def updates_saved(self) -> int:
        """Updates that separate runs of the same budgets would have trained in addition."""
        return sum(trial.updates_saved for trial in self.trials)

    @property
    def seconds(self) -> float:
        """Duration of all trials together."""
        return sum(trial.seconds for trial in self.trials)

    def edges(self) -> list[str]:
        """Returns one sentence for each best value at an end of its range, with what to do.

        None with fewer than six complete trials, whose best values are at an end by chance.
        """
        if self.best is None or self.count("complete") < _TRIALS_FOR_ADVICE:
            return []
        found = [axis.advice_at_edge(self.best.values[axis.name]) for axis in self.axes]
        return [advice for advice in found if advice]

    def count(self, state: TrialState) -> int:
        """Returns the number of trials in a state."""
        return sum(trial.state == state for trial in self.trials)

    def states(self) -> str:
        """Returns the number of trials in each state as text."""
        complete = self.count("complete")
        found = [f"{complete} trial{'' if complete == 1 else 's'} complete"]
        others: tuple[TrialState, ...] = ("pruned", "failed", "running")
        found += [f"{count} {state}" for state in others if (count := self.count(state))]
        return ", ".join(found)

    def cost(self) -> str:
        """Returns updates and seconds as text, and what shared trunks have saved."""
        text = f"{self.updates:,} updates in {self.seconds:,.0f} s"
        if not self.budgets:
            return text
        plain = self.updates + self.updates_saved
        return (
            f"{text}; shared trunks saved {self.updates_saved:,} of the {plain:,} updates that "
            "separate runs would have trained"
        )

    def summary(self) -> list[str]:
        """Returns one line each for the states, the best trial, the edges and the cost."""
        lines = [f"study {self.name!r}: {self.states()}"]
        if self.best is not None:
            chosen = ", ".join(f"{path}={_short(v)}" for path, v in self.best.values.items())
            lines.append(
                f"best {self.monitor} {_short(self.best.loss)} in trial {self.best.number}: "
                f"{chosen}"
            )
        return [*lines, *self.edges(), f"cost: {self.cost()}"]

    def __str__(self) -> str:
        head = ["trial", "state", self.monitor, "updates", *(a.name for a in self.axes), "reason"]
        rows = [
            [
                str(trial.number),
                trial.state,
                "" if trial.loss is None else _short(trial.loss),
                f"{trial.updates:,}",
                *(_short(trial.values.get(axis.name, "")) for axis in self.axes),
                trial.reason,
            ]
            for trial in self.trials
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        right = {0, 2, 3}  # numbers; the values may be texts
        lines = [
            "  ".join(
                cell.rjust(width) if index in right else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *rows]
        ]
        return "\n".join([*self.summary(), "", *lines])


def _short(value: Any) -> str:
    """Formats a number with four digits; other values as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _number(text: str) -> float | None:
    """Returns the number in a text, also a percentage; None if it is no number."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
