"""How to choose: the learning rate, the micro-batch."""

from lightning_bigopt.tuning.batch_finder import GlobalBatchFinder
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.range_test import LearningRateRangeTest, learning_rate_range_test

__all__ = ["GlobalBatchFinder", "LearningRateRangeTest", "RangeTest", "learning_rate_range_test"]
