"""The global batch: policies that name it, plans that carry it out, the exact loader, its noise."""

from lightning_bigopt.batching.adaptive import NoiseScaleBatchSize
from lightning_bigopt.batching.global_window import GlobalWindow, MicroBatch
from lightning_bigopt.batching.loader import GlobalBatchLoader
from lightning_bigopt.batching.memory import MicroBatchSearch, search_micro_batch_size
from lightning_bigopt.batching.noise_scale import (
    NoiseScaleEstimator,
    NoiseScaleReport,
    noise_scale_terms,
)
from lightning_bigopt.batching.plan import BatchPlan, check_written_sizes, plan_at, plan_update
from lightning_bigopt.batching.policies import (
    BatchContext,
    BatchSizePolicy,
    ConstantBatchSize,
    FullBatch,
    SingleSample,
)
from lightning_bigopt.batching.ramps import BatchSizeRamp, BatchSizeSteps
from lightning_bigopt.batching.scaling import (
    ScalingRule,
    adascale_gain,
    learning_rate_factor,
    recommended_rule,
    scaled_beta,
    weight_decay_factor,
)
from lightning_bigopt.batching.scheduled import SchedulePolicy, SeesawBatchSize
from lightning_bigopt.batching.simulation import planned_sizes, simulate, simulate_exact
from lightning_bigopt.batching.window import WindowLength

__all__ = [
    "BatchContext",
    "BatchPlan",
    "BatchSizePolicy",
    "BatchSizeRamp",
    "BatchSizeSteps",
    "ConstantBatchSize",
    "FullBatch",
    "GlobalBatchLoader",
    "GlobalWindow",
    "MicroBatch",
    "MicroBatchSearch",
    "NoiseScaleBatchSize",
    "NoiseScaleEstimator",
    "NoiseScaleReport",
    "ScalingRule",
    "SchedulePolicy",
    "SeesawBatchSize",
    "SingleSample",
    "WindowLength",
    "adascale_gain",
    "check_written_sizes",
    "learning_rate_factor",
    "noise_scale_terms",
    "plan_at",
    "plan_update",
    "planned_sizes",
    "recommended_rule",
    "scaled_beta",
    "search_micro_batch_size",
    "simulate",
    "simulate_exact",
    "weight_decay_factor",
]
