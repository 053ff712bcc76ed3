"""Schedules: pure functions from the fraction of the budget spent to a dimensionless factor."""

from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.composition import Chain, Clamp, Product, Warmup
from lightning_bigopt.schedules.decays import REX, Constant, Cooldown, Cosine, Linear, Polynomial
from lightning_bigopt.schedules.recipes import (
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)

__all__ = [
    "REX",
    "Chain",
    "Clamp",
    "Constant",
    "Cooldown",
    "Cosine",
    "Linear",
    "Polynomial",
    "Product",
    "Schedule",
    "Warmup",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupStableDecay",
]
