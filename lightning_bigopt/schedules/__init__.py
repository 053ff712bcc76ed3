"""Schedules: pure functions from the fraction of the budget spent to a dimensionless factor."""

from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.schedules.chain import Chain
from lightning_bigopt.schedules.composition import Clamp, Product, Warmup
from lightning_bigopt.schedules.cycles import CosineWithRestarts, Cyclic, OneCycle
from lightning_bigopt.schedules.decays import REX, Constant, Cooldown, Cosine, Linear, Polynomial
from lightning_bigopt.schedules.milestones import MultiStep, PiecewiseLinear
from lightning_bigopt.schedules.periodic import Exponential, InverseSquareRoot, Power, StepDecay
from lightning_bigopt.schedules.plateaus import InfiniteSchedule, TriStage, WarmupStableDecay
from lightning_bigopt.schedules.recipes import (
    Noam,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupLinear,
)
from lightning_bigopt.schedules.seesaw import Seesaw

__all__ = [
    "REX",
    "Chain",
    "Clamp",
    "Constant",
    "Cooldown",
    "Cosine",
    "CosineWithRestarts",
    "Cyclic",
    "Exponential",
    "InfiniteSchedule",
    "InverseSquareRoot",
    "Linear",
    "MultiStep",
    "Noam",
    "OneCycle",
    "PiecewiseLinear",
    "Polynomial",
    "Power",
    "Product",
    "Schedule",
    "Seesaw",
    "StepDecay",
    "TriStage",
    "Warmup",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupInverseSquareRoot",
    "WarmupLinear",
    "WarmupStableDecay",
]
