"""Clipping rules: fixed and adaptive limits on gradients and updates."""

from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.gradients.rules.adagc import AdaGC
from lightning_bigopt.gradients.rules.adaptive_norm_clip import AutoClip, ZClip
from lightning_bigopt.gradients.rules.agc import AGC
from lightning_bigopt.gradients.rules.clipping_rule import ClipContext, ClippingRule, RuleState
from lightning_bigopt.gradients.rules.max_update_ratio import MaxUpdateRatio
from lightning_bigopt.gradients.rules.norm_clip import NormClip, PerParameterNormClip
from lightning_bigopt.gradients.rules.rule_groups import Groups
from lightning_bigopt.gradients.rules.update_clip import UpdateClip
from lightning_bigopt.gradients.rules.update_rule import UpdateRule
from lightning_bigopt.gradients.rules.value_clip import ValueClip

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
