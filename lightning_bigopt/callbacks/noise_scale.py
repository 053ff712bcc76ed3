"""GradientNoiseScale."""

from __future__ import annotations

from lightning_bigopt.batching import NoiseScaleReport
from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.controllers.noise_scale import NoiseScaleController

__all__ = ["GradientNoiseScale"]


class GradientNoiseScale(OptimizationCallback):
    """Measures the gradient noise scale, which predicts the critical batch within a factor 2 to 6.

    Where an update accumulates, the gradient of its first micro-batch is compared with the whole
    (one process, DDP, FSDP2; one more norm an update). Where DDP reduces a single micro-batch, each
    process's share is (a communication hook; one dot product a bucket). Noise and signal are
    averaged apart and divided last. One small transfer to the host an update.

    Args:
        decay: Of the weights from one update to the next, in [0, 1).
        minimum_updates: Updates before anything is reported; at least 2.

    Raises:
        ValueError: At fit start with manual optimization, DeepSpeed, or a DDP communication hook of
            another owner.

    Tags:
        ``noise_scale/simple``, ``noise_scale/standard_error``, ``noise_scale/noise`` and
        ``noise_scale/signal``; nothing, and once the reason, where the error is hopeless.

    State:
        ``clock``: what has been consumed; ``estimator``: weighted sums, as plain numbers.

    Example:
        >>> from lightning_bigopt import GradientNoiseScale
        >>> GradientNoiseScale().report.reason
        'too few updates measured (0 of 16)'

    References:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, App. A.1.
    """

    controller: NoiseScaleController

    def __init__(self, *, decay: float = 0.99, minimum_updates: int = 16) -> None:
        super().__init__(NoiseScaleController(decay=decay, minimum_updates=minimum_updates))

    @property
    def report(self) -> NoiseScaleReport:
        """What is known so far."""
        return self.controller.report
