"""Ranges of the values that a study searches: Log, Uniform, Integer and Choice."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_bigopt.arguments import Specification, explain_arguments
from lightning_bigopt.checks import check_number, check_positive, shown
from lightning_bigopt.reporting.study import Axis

__all__ = ["Choice", "Integer", "Log", "Range", "Space", "Uniform", "checked_space"]

_PLAIN = (bool, int, float, str, type(None))


class Range(Specification, ABC):
    """Base class of the ranges of a search space."""

    _used_in = "study(..., space={{'lr': {}}})"

    @abstractmethod
    def distribution(self) -> Any:
        """Returns the range as a distribution of Optuna."""

    @abstractmethod
    def axis(self, name: str) -> Axis:
        """Returns the range as plain data for a report.

        Args:
            name: Path of the field.
        """

    @abstractmethod
    def example(self) -> Any:
        """Returns a value of the range, with which the fields of a trial are looked up."""

    def decode(self, stored: Any) -> Any:
        """Returns the value of a trial from that which Optuna stores."""
        return stored


@explain_arguments
@dataclass(frozen=True)
class Uniform(Range):
    """Numbers between two bounds, all equally likely.

    Args:
        low: Smallest value.
        high: Largest value.

    Raises:
        ValueError: If a bound is not finite, or ``low`` is not below ``high``.

    Example:
        >>> Uniform(0.0, 0.3)
        Uniform(low=0.0, high=0.3)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def distribution(self) -> Any:
        """Returns a ``FloatDistribution``."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(float(self.low), float(self.high))

    def axis(self, name: str) -> Axis:
        """Returns a linear axis."""
        return Axis(name=name, low=self.low, high=self.high)

    def example(self) -> float:
        """Returns the middle."""
        return (self.low + self.high) / 2


@explain_arguments
@dataclass(frozen=True)
class Log(Range):
    """Positive numbers between two bounds, uniform in their logarithm.

    Args:
        low: Smallest value, positive.
        high: Largest value.

    Raises:
        ValueError: If a bound is not positive and finite, or ``low`` is not below ``high``.

    Example:
        >>> Log(1e-4, 1e-1)
        Log(low=0.0001, high=0.1)
        >>> Log(0, 1)
        Traceback (most recent call last):
        ValueError: low must be positive and finite, got 0; write Uniform(0, 1), or a positive bound
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        hint = f"write Uniform({shown(self.low)}, {shown(self.high)}), or a positive bound"
        check_positive("low", self.low, hint=hint)
        _check_bounds(self.low, self.high)

    def distribution(self) -> Any:
        """Returns a ``FloatDistribution`` with ``log=True``."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(float(self.low), float(self.high), log=True)

    def axis(self, name: str) -> Axis:
        """Returns a logarithmic axis."""
        return Axis(name=name, low=self.low, high=self.high, is_log=True)

    def example(self) -> float:
        """Returns the geometric mean of the bounds."""
        return math.sqrt(self.low) * math.sqrt(self.high)


@explain_arguments
@dataclass(frozen=True)
class Integer(Range):
    """Integers between two bounds, which belong to the range.

    Args:
        low: Smallest value.
        high: Largest value.
        log: Whether the logarithm of the value is uniform, instead of the value.

    Raises:
        ValueError: If a bound is not an integer, ``low`` is not below ``high``, or ``low`` is not
            positive with ``log=True``.

    Example:
        >>> Integer(1, 6)
        Integer(low=1, high=6, log=False)
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if type(bound) is not int:
                raise ValueError(
                    f"{name} must be an integer, got {shown(bound)}; write Integer(1, 6), or "
                    "Uniform for numbers that are no integers"
                )
        if type(self.log) is not bool:
            raise ValueError(f"log must be True or False, got {shown(self.log)}; write log=True")
        if self.log:
            check_positive("low", self.low, hint="write 1, or log=False")
        _check_bounds(self.low, self.high)

    def distribution(self) -> Any:
        """Returns an ``IntDistribution``."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log)

    def axis(self, name: str) -> Axis:
        """Returns a linear or logarithmic axis."""
        return Axis(name=name, low=self.low, high=self.high, is_log=self.log)

    def example(self) -> int:
        """Returns the smallest value."""
        return self.low


@explain_arguments
@dataclass(frozen=True)
class Choice(Range):
    """One of several values of any type, such as numbers, durations or schedules.

    Args:
        options: The values, at least one.

    Raises:
        ValueError: If ``options`` is no list, is empty, or contains a value twice.

    Example:
        >>> Choice([16, 32, 64])
        Choice(options=(16, 32, 64))
        >>> Choice(16, 32)
        Traceback (most recent call last):
        TypeError: the arguments of Choice must be among options, got 32 without a name; write
        them as in Choice([16, 32])
    """

    options: Sequence[Any]

    def __post_init__(self) -> None:
        given: Any = self.options
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        if not is_list or not given:
            got = shown(given)
            hint = "[16, 32]" if is_list else f"[{got}, ...]"
            raise ValueError(f"options must be a list of values, got {got}; write Choice({hint})")
        object.__setattr__(self, "options", tuple(self.options))
        labels = [_comparable(label) for label in self.labels()]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"options must be different values, got {shown(list(self.options))}; remove one "
                "of those that are equal"
            )

    def __hash__(self) -> int:
        return hash(self.labels())

    def labels(self) -> tuple[Any, ...]:
        """Returns what a storage keeps of each option: itself, or its text for an object."""
        return tuple(o if isinstance(o, _PLAIN) else repr(o) for o in self.options)

    def distribution(self) -> Any:
        """Returns a ``CategoricalDistribution`` over the labels."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.labels())

    def axis(self, name: str) -> Axis:
        """Returns an axis with one position for each option."""
        return Axis(name=name, options=tuple(map(str, self.labels())))

    def example(self) -> Any:
        """Returns the first option."""
        return self.options[0]

    def decode(self, stored: Any) -> Any:
        """Returns the option of a label."""
        wanted = _comparable(stored)
        labels = map(_comparable, self.labels())
        return next(o for o, label in zip(self.options, labels, strict=True) if label == wanted)


Space: TypeAlias = Mapping[str, Range]
"""A search space: the range of each field by its dotted path."""


def checked_space(space: Any) -> dict[str, Range]:
    """Returns a search space as a dictionary.

    Raises:
        ValueError: If it is no dictionary, is empty, or contains something else than ranges.

    Example:
        >>> checked_space({"lr": (1e-4, 1e-1)})
        Traceback (most recent call last):
        ValueError: space must contain ranges, got (0.0001, 0.1) for 'lr'; write
        Log(0.0001, 0.1) or Uniform(0.0001, 0.1)
    """
    example = "{'lr': Log(1e-4, 1e-1)}"
    if not isinstance(space, Mapping) or not space:
        raise ValueError(
            f"space must be a dictionary of ranges by path, got {shown(space)}; write {example}"
        )
    ranges: Mapping[Any, Any] = space
    for path, values in ranges.items():
        if not isinstance(path, str) or not path:
            raise ValueError(
                f"space must have the paths of fields as keys, got {shown(path)}; write {example}"
            )
        if not isinstance(values, Range):
            raise ValueError(
                f"space must contain ranges, got {shown(values)} for {path!r}; {_advice(values)}"
            )
    return dict(space)


def _advice(values: Any) -> str:
    if isinstance(values, tuple) and len(values) == 2:
        return f"write Log{values} or Uniform{values}"
    if isinstance(values, Sequence) and not isinstance(values, str):
        return f"write Choice({shown(list(values))})"
    return "write Log(1e-4, 1e-1), Uniform(0, 1), Integer(1, 6) or Choice([16, 32])"


def _check_bounds(low: float, high: float) -> None:
    check_number("low", low)
    check_number("high", high)
    if not low < high:
        raise ValueError(
            f"high must be larger than low, got low={shown(low)} and high={shown(high)}; exchange "
            "them, or remove the field to keep its value"
        )


def _comparable(label: Any) -> tuple[str, Any]:
    """Returns a label with its type, because ``1 == 1.0 == True``."""
    return type(label).__name__, label
