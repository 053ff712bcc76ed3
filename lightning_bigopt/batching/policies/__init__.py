"""Batch-size policies, one idea per module."""

from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    Rounding,
)
from lightning_bigopt.batching.policies.fixed_batch import (
    ConstantBatchSize,
    FullBatch,
    SingleSample,
)
from lightning_bigopt.batching.policies.noise_scale_batch import NoiseScaleBatchSize
from lightning_bigopt.batching.policies.scheduled_batch import SchedulePolicy, SeesawBatchSize
from lightning_bigopt.batching.policies.steps_and_ramps import BatchSizeRamp, BatchSizeSteps

__all__ = [
    "BatchContext",
    "BatchSizePolicy",
    "BatchSizeRamp",
    "BatchSizeSteps",
    "ConstantBatchSize",
    "FullBatch",
    "NoiseScaleBatchSize",
    "Rounding",
    "SchedulePolicy",
    "SeesawBatchSize",
    "SingleSample",
]
