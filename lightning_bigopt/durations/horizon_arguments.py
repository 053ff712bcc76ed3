"""Checks of the arguments of a Horizon."""

from __future__ import annotations

from typing import Any

from lightning_bigopt.checks import check_choice, check_count, check_non_negative, check_positive
from lightning_bigopt.durations.duration import Clock
from lightning_bigopt.durations.progress import Span
from lightning_bigopt.type_checks import check_items

__all__ = ["check_counts", "check_fields"]

_UNKNOWN = "None if it is unknown"


def check_fields(horizon: Any) -> None:
    """Raises unless the fields of a horizon are valid."""
    check_choice("clock", horizon.clock, Clock)
    check_positive("budget", horizon.budget)
    check_non_negative("offset", horizon.offset)
    check_choice("overlong", horizon.overlong, ("raise", "compress"))
    check_items("spans", horizon.spans, Span)
    check_items("others", horizon.others, type(horizon))
    for name in ("batches_per_epoch", "samples_per_epoch"):
        if getattr(horizon, name) is not None:
            check_count(name, getattr(horizon, name), hint=_UNKNOWN)
    if horizon.epochs is not None:
        check_positive("epochs", horizon.epochs, hint=_UNKNOWN)


def check_counts(*, total_steps: int, **counts: int | None) -> None:
    """Raises unless counts are positive integers, or None for unknown ones."""
    check_count("total_steps", total_steps)
    for name, count in counts.items():
        if count is not None:
            check_count(name, count, hint=_UNKNOWN)
