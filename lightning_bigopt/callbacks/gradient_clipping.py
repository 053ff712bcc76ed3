"""GradientClipping."""

from __future__ import annotations

from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.controllers.clipping import GradientClippingController
from lightning_bigopt.gradients import ClippingRule

__all__ = ["GradientClipping"]


class GradientClipping(OptimizationCallback):
    """Limits every update's gradient by a rule, after reduction and unscaling.

    The norm is the global one on one device, under DDP, FSDP1 and FSDP2, in 32-true, bf16-mixed
    and 16-mixed. It is taken once an update, in float32, and shared with every other callback.
    A fused optimizer is given the coefficient, and scales inside its own kernel.

    Args:
        rule: What is limited, and how.

    Raises:
        ValueError: At fit start with ``Trainer(gradient_clip_val=)``, a module that overrides
            ``configure_gradient_clipping``, or DeepSpeed, which clips by itself.

    State:
        ``clock``: what has been consumed; ``rule``: the history of an adaptive rule.

    Example:
        >>> from lightning_bigopt import GradientClipping, NormClip
        >>> GradientClipping(NormClip(max_norm=1.0))
        GradientClipping(NormClip(...))
    """

    controller: GradientClippingController

    def __init__(self, rule: ClippingRule) -> None:
        super().__init__(GradientClippingController(rule))

    def __repr__(self) -> str:
        return f"GradientClipping({type(self.controller.rule).__name__}(...))"
