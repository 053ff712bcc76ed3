"""Tools that start their own fits or trials: run plan, range test, batch finder, branches."""

from lightning_bigopt.tuning.batch_finder import GlobalBatchFinder
from lightning_bigopt.tuning.critical_batch import CriticalBatchSize
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.measure_critical_batch import critical_batch_size
from lightning_bigopt.tuning.measured_batch_size import MeasuredBatchSize
from lightning_bigopt.tuning.range_test import LearningRateRangeTest, learning_rate_range_test
from lightning_bigopt.tuning.run_plan import plan

__all__ = [
    "CriticalBatchSize",
    "GlobalBatchFinder",
    "LearningRateRangeTest",
    "MeasuredBatchSize",
    "RangeTest",
    "critical_batch_size",
    "learning_rate_range_test",
    "plan",
]
