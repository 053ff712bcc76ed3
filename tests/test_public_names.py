"""The public names, pinned: a change here is a change for users and goes into the changelog."""

from __future__ import annotations

import lightning_bigopt
from lightning_bigopt import schedules

NAMES = """
    AGC Abort Action AdaGC AutoClip Average BF16 Backoff BatchSizePolicy BatchSizePolicyMixin
    BatchSizeRamp BatchSizeScheduler BatchSizeSteps Chain Clamp ClipToMedian ClippingRule
    CombinedOptimizer Comparison Compressor Constant ConstantBatchSize Cooldown Cosine
    CosineWithRestarts CriticalBatchSize Cyclic Detector Duration EMA ExpectedLoss Exponential
    FP16 FoundLearningRate FullBatch GlobalBatchFinder GlobalBatchLoader GradientClipping
    GradientClippingMixin GradientCompression GradientCompressionMixin GradientNoiseScale
    GradientNoiseScaleMixin Groups Horizon HyperparameterLaw HyperparameterScheduleMixin
    HyperparameterScheduler InfiniteSchedule InverseSquareRoot LearningRateRangeTest
    LearningRateScheduleMixin LearningRateScheduler Linear LossCurve LossLaw LossSpike
    MaxUpdateRatio MeasuredBatchSize Merge ModelAveraging ModelAveragingMixin MultiPowerLaw
    MultiStep MuonAdamW Noam NoiseScaleBatchSize NonFinite NormClip NormSpike OneCycle
    OptimizationMonitor OptimizationMonitorMixin ParameterGroup PerParameterNormClip
    PiecewiseLinear Polynomial Power PowerSGD Product Progress REX RangeTest ReduceOnPlateau
    ReduceOnPlateauMixin RollBack Schedule SchedulePolicy Seesaw SeesawBatchSize Side
    SingleSample Skip StepDecay StepGuard StepGuardMixin Study Suggestion TailMean
    TooManyRejectionsError TopK TriStage UpdateClip ValueClip Warmup WarmupConstant WarmupCosine
    WarmupInverseSquareRoot WarmupLinear WarmupStableDecay ZClip __version__ combine_optimizers
    compare convex_bound cooldown_for_extension critical_batch_size find_learning_rate
    learning_rate_range_test learning_rate_ratio muon_adamw parameter_groups plan
    read_loss_curve read_loss_curves replay study suggest
"""


def test_public_names_are_exactly_these():
    assert sorted(lightning_bigopt.__all__) == sorted(NAMES.split())
    assert all(hasattr(lightning_bigopt, name) for name in lightning_bigopt.__all__)


def test_every_schedule_is_importable_from_the_package():
    assert all(
        getattr(lightning_bigopt, name) is getattr(schedules, name) for name in schedules.__all__
    )
