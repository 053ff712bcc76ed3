"""Tools that start their own fits or trials: run plan, range test, batch finder."""

from lightning_bigopt.tuning.batch_finder import GlobalBatchFinder
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.range_test import LearningRateRangeTest, learning_rate_range_test
from lightning_bigopt.tuning.run_plan import plan

__all__ = [
    "GlobalBatchFinder",
    "LearningRateRangeTest",
    "RangeTest",
    "learning_rate_range_test",
    "plan",
]
