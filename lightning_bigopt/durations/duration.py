"""Durations: lengths of training in any unit, as users write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral
from typing import Any, Literal, TypeAlias

from lightning_bigopt.checks import check_choice, check_count, check_non_negative, shown

__all__ = ["Clock", "Duration", "DurationLike", "Unit", "amount_of"]

Unit: TypeAlias = Literal["fraction", "steps", "epochs", "samples", "tokens", "seconds"]
"""Units of a duration."""

Clock: TypeAlias = Literal["steps", "batches", "samples", "tokens", "seconds"]
"""Units of a budget."""

_UNITS: dict[str, Unit] = {
    "%": "fraction",
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "sample": "samples",
    "samples": "samples",
    "token": "tokens",
    "tokens": "tokens",
}
_TIMES = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("day", "days"), 86_400),
}
"""Words for times, in seconds."""

_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_PATTERN = re.compile(rf"\s*({_NUMBER})\s*([KMBT]?)\s*([a-z]+|%)?\s*")
_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_LEAST_DECIMALS = -13  # smaller percentages are written with an exponent
_LONGEST_INT = 300  # digits; Python refuses to convert strings of more than 4300
_FORMS = "'10%', '500 steps', '3 epochs', '1e6 samples', '2e9 tokens' or '10 min'"


@dataclass(frozen=True)
class Duration:
    """A length of training in one unit.

    Args:
        value: Amount in ``unit``; non-negative and finite.
        unit: ``"fraction"`` (of the whole budget, which is 1.0), ``"steps"`` (optimizer updates),
            ``"epochs"``, ``"samples"``, ``"tokens"`` or ``"seconds"`` of training.

    Raises:
        ValueError: If ``value`` is negative or not finite, or ``unit`` is unknown.

    Example:
        >>> Duration.parse("10%")
        Duration(value=0.1, unit='fraction')
        >>> Duration.parse("2B tokens") == Duration(2_000_000_000, "tokens")
        True
        >>> Duration.parse(500)
        Duration(value=500, unit='steps')
        >>> Duration.parse("1.5 hours")
        Duration(value=5400, unit='seconds')
        >>> str(Duration.parse(0.25))
        '25%'
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, Unit)
        check_non_negative("value", self.value)
        value: Any = self.value
        if type(value) not in (int, float):  # a NumPy scalar; str() shows plain numbers
            plain = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(self, "value", plain)

    @classmethod
    def parse(cls, value: DurationLike, *, name: str = "duration") -> Duration:
        """Parses a duration as users write it.

        Args:
            value: A ``Duration``; a string such as ``"10%"``, ``"500 steps"`` or
                ``"2e9 tokens"``; an int (optimizer steps); a float in [0, 1] (a fraction). A string
                that holds only a number is parsed as that number.
            name: Name of the argument, for the error.

        Returns:
            The duration.

        Raises:
            ValueError: If ``value`` is none of these.

        Example:
            >>> Duration.parse("3 epochs").unit
            'epochs'
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            check_count(name, value, minimum=0, of="steps", hint="write 500 or '10%'")
            check_non_negative(name, value, hint="write 500 or '10%'")  # an int may exceed floats
            return cls(value, "steps")
        if isinstance(value, float):
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"{name} must be a fraction in [0, 1] when it is a float, got {shown(value)}; "
                    f"write an int for steps, or a unit such as {_FORMS}"
                )
            return cls(value, "fraction")
        if isinstance(value, str):
            return cls._parse_text(value, name)
        raise _not_a_duration(name, value)

    @classmethod
    def _parse_text(cls, text: str, name: str) -> Duration:
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise _not_a_duration(name, text)
        number, suffix, word = match[1].replace("_", ""), match[2], match[3]
        if word is None and not suffix:
            whole = number.lstrip("+-").isdigit()
            is_int = whole and len(number) < _LONGEST_INT
            return cls.parse(int(number) if is_int else float(number), name=name)
        if word not in _UNITS and word not in _TIMES:
            raise ValueError(
                f"{name} must have one of the units %, steps, epochs, samples, tokens, seconds, "
                f"minutes, hours, days, got {shown(text)}; for instance '500 steps'"
            )
        unit = _UNITS.get(word, "seconds")
        # Decimal, because the floats 2.3 * 10**9 and 1.1 / 100 differ from the numbers written.
        exact = Decimal(number).scaleb(_POWERS[suffix] - (2 if unit == "fraction" else 0))
        exact *= _TIMES.get(word, 1)
        amount = float(exact)
        if not 0 <= amount < math.inf:
            raise ValueError(
                f"{name} must be non-negative and finite, got {shown(text)}; write '500 steps'"
            )
        if unit == "fraction" and amount > 1:
            raise ValueError(f"{name} must be at most 100%, got {shown(text)}; write '10%'")
        countable = unit != "fraction" and exact == exact.to_integral_value()
        return cls(int(exact) if countable else amount, unit)

    def __str__(self) -> str:
        if self.unit == "fraction":
            percent = Decimal(repr(float(self.value))).scaleb(2).normalize()
            return f"{percent:f}%" if percent.adjusted() > _LEAST_DECIMALS else f"{percent}%"
        return f"{self.value!r} {_noun(self.value, self.unit)}"


DurationLike: TypeAlias = Duration | int | float | str
"""Everything that :meth:`Duration.parse` accepts as a duration."""


def amount_of(value: float, unit: str) -> str:
    """Describes an amount, with the unit in the singular for one.

    Args:
        value: The amount.
        unit: Name of the unit in the plural.

    Example:
        >>> amount_of(1, "batches"), amount_of(2_000_000, "steps"), amount_of(1.5, "epochs")
        ('1 batch', '2000000 steps', '1.5 epochs')
    """
    number = f"{value:.0f}" if float(value).is_integer() else f"{value:g}"
    return f"{number} {_noun(value, unit)}"


def _not_a_duration(name: str, value: object) -> ValueError:
    return ValueError(
        f"{name} must be a duration such as {_FORMS}, got {shown(value)}; write '10%' or 500"
    )


def _noun(value: float, unit: str) -> str:
    if value != 1:
        return unit
    return unit[:-2] if unit.endswith(("ches", "sses")) else unit[:-1]
