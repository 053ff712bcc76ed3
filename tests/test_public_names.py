"""The public names, pinned: a change here is a change for users and goes into the changelog."""

from __future__ import annotations

import lightning_bigopt
from lightning_bigopt import schedules

NAMES = """
    BatchSizePolicy BatchSizePolicyMixin BatchSizeScheduler BatchSizeSteps ClippingRule Constant
    ConstantBatchSize Cosine Duration GradientClipping GradientClippingMixin Horizon
    LearningRateScheduleMixin LearningRateScheduler Linear NormClip OptimizationMonitor Progress
    Schedule ValueClip WarmupCosine WarmupStableDecay __version__
"""


def test_public_names_are_exactly_these():
    assert sorted(lightning_bigopt.__all__) == sorted(NAMES.split())
    assert all(hasattr(lightning_bigopt, name) for name in lightning_bigopt.__all__)


def test_every_schedule_imports_from_the_top_too():
    assert all(
        getattr(lightning_bigopt, name) is getattr(schedules, name) for name in schedules.__all__
    )
