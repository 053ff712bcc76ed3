"""Clipping rules, one idea a module."""

from lightning_bigopt.gradients.rules.adaptive import AutoClip, ZClip
from lightning_bigopt.gradients.rules.base import (
    ClipContext,
    ClipDecision,
    ClippingRule,
    RuleState,
)
from lightning_bigopt.gradients.rules.groups import Groups
from lightning_bigopt.gradients.rules.norm import NormClip, PerParameterNormClip
from lightning_bigopt.gradients.rules.pertensor import AdaGC
from lightning_bigopt.gradients.rules.unitwise import AGC
from lightning_bigopt.gradients.rules.updates import MaxUpdateRatio, UpdateClip, UpdateRule
from lightning_bigopt.gradients.rules.value import ValueClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipContext",
    "ClipDecision",
    "ClippingRule",
    "Groups",
    "MaxUpdateRatio",
    "NormClip",
    "PerParameterNormClip",
    "RuleState",
    "UpdateClip",
    "UpdateRule",
    "ValueClip",
    "ZClip",
]
