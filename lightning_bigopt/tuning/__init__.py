"""How to choose: the learning rate."""

from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.range_test import LearningRateRangeTest, learning_rate_range_test

__all__ = ["LearningRateRangeTest", "RangeTest", "learning_rate_range_test"]
