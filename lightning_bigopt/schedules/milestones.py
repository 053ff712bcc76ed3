"""Shapes that are written down as a table of moments and factors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

from lightning_bigopt.durations import Duration, DurationLike, Horizon
from lightning_bigopt.schedules.base import SNAP, Schedule, check_non_negative, resolved_share

__all__ = ["MultiStep", "PiecewiseLinear"]

Table: TypeAlias = Mapping[DurationLike, float] | Sequence[tuple[DurationLike, float]]
