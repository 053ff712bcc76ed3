"""Attributes of earlier versions that raise an error with the new spelling."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["RemovedAttribute"]


class RemovedAttribute:
    """An attribute of a class that raises when it is read.

    Args:
        since: The version that removed it.
        advice: The new spelling, as an instruction.

    Raises:
        AttributeError: When the attribute is read, on the class or on an instance.

    Example:
        >>> class Rule:
        ...     measures = RemovedAttribute("0.2", "write norm_order")
        >>> Rule().measures
        Traceback (most recent call last):
        AttributeError: Rule.measures was removed in lightning_bigopt 0.2; write norm_order
    """

    def __init__(self, since: str, advice: str) -> None:
        self._since, self._advice = since, advice

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(
            f"{owner.__name__}.{self._name} was removed in lightning_bigopt {self._since}; "
            f"{self._advice}"
        )
