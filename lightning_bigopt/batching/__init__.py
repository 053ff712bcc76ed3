"""Global batches: policies, plans of an update, simulated runs, the exact loader, scaling rules."""

from lightning_bigopt.batching.batch_plan import BatchPlan, plan_update
from lightning_bigopt.batching.exact_loader import GlobalBatchLoader
from lightning_bigopt.batching.global_window import GlobalWindow, MicroBatch
from lightning_bigopt.batching.micro_batch_search import MicroBatchSearch, search_micro_batch_size
from lightning_bigopt.batching.planned_sizes import planned_sizes
from lightning_bigopt.batching.policies.batch_size_policy import (
    BatchContext,
    BatchSizePolicy,
    check_explicit_sizes,
    plan_at,
)
from lightning_bigopt.batching.policies.fixed_batch import (
    ConstantBatchSize,
    FullBatch,
    SingleSample,
)
from lightning_bigopt.batching.policies.noise_scale_batch import NoiseScaleBatchSize
from lightning_bigopt.batching.policies.scheduled_batch import SchedulePolicy, SeesawBatchSize
from lightning_bigopt.batching.policies.steps_and_ramps import BatchSizeRamp, BatchSizeSteps
from lightning_bigopt.batching.scaling_rules import (
    ScalingRule,
    adascale_gain,
    learning_rate_factor,
    recommended_rule,
    scaled_beta,
    weight_decay_factor,
)
from lightning_bigopt.batching.simulation import simulate, simulate_exact
from lightning_bigopt.batching.window_length import WindowLength
from lightning_bigopt.gradients.noise_scale import (
    NoiseScaleEstimator,
    NoiseScaleReport,
    noise_scale_terms,
)

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
    "check_explicit_sizes",
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
