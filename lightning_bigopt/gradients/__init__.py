"""Gradients: measuring norms, clipping, and detecting bad steps. Works without Lightning.

>>> from torch import nn, optim
>>> import torch
>>> model = nn.Linear(3, 1)
>>> optimizer = optim.AdamW(model.parameters(), fused=True)
>>> model(torch.ones(1, 3)).sum().backward()
>>> decision = clip_gradients_(model, NormClip(max_norm=1.0), optimizer=optimizer)
>>> decision.norms.value, round(decision.coefficient.item(), 3)
(2.0, 0.5)
>>> optimizer.step()
"""

from lightning_bigopt.gradients.actions import Abort, Action, Backoff, ClipToMedian, Skip
from lightning_bigopt.gradients.apply import (
    after_step_once,
    apply_,
    clear_,
    scale_,
    takes_grad_scale,
)
from lightning_bigopt.gradients.clip import clip_gradients_
from lightning_bigopt.gradients.detectors import LossSpike, NonFinite, NormSpike
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.guard import Detector, Verdict, inspect, record
from lightning_bigopt.gradients.measure import measure, norms_of
from lightning_bigopt.gradients.noise_scale import (
    NoiseScaleEstimator,
    NoiseScaleReport,
    noise_scale_terms,
)
from lightning_bigopt.gradients.optimizer_step import StepControl, step_control
from lightning_bigopt.gradients.roll_back import RollBack
from lightning_bigopt.gradients.rules import (
    AGC,
    AdaGC,
    AutoClip,
    ClipContext,
    ClipDecision,
    ClippingRule,
    Groups,
    MaxUpdateRatio,
    NormClip,
    PerParameterNormClip,
    RuleState,
    UpdateClip,
    UpdateRule,
    ValueClip,
    ZClip,
)
from lightning_bigopt.gradients.skip import skip_update_

__all__ = [
    "AGC",
    "Abort",
    "Action",
    "AdaGC",
    "AutoClip",
    "Backoff",
    "ClipContext",
    "ClipDecision",
    "ClipToMedian",
    "ClippingRule",
    "Detector",
    "GradientNorms",
    "Groups",
    "LossSpike",
    "MaxUpdateRatio",
    "NoiseScaleEstimator",
    "NoiseScaleReport",
    "NonFinite",
    "NormClip",
    "NormSpike",
    "PerParameterNormClip",
    "RollBack",
    "RuleState",
    "Skip",
    "StepControl",
    "UpdateClip",
    "UpdateRule",
    "ValueClip",
    "Verdict",
    "ZClip",
    "after_step_once",
    "apply_",
    "clear_",
    "clip_gradients_",
    "inspect",
    "measure",
    "noise_scale_terms",
    "norms_of",
    "record",
    "scale_",
    "skip_update_",
    "step_control",
    "takes_grad_scale",
]
