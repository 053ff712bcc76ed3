"""Tools that start their own fits or trials: run plan, range test, batch finder, study."""

from lightning_bigopt.tuning.batch_finder import GlobalBatchFinder
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.hyperparameter_study import study
from lightning_bigopt.tuning.range_test import LearningRateRangeTest, learning_rate_range_test
from lightning_bigopt.tuning.run_plan import plan
from lightning_bigopt.tuning.space import Choice, Integer, Log, Uniform
from lightning_bigopt.tuning.study_result import Study

__all__ = [
    "Choice",
    "GlobalBatchFinder",
    "Integer",
    "LearningRateRangeTest",
    "Log",
    "RangeTest",
    "Study",
    "Uniform",
    "learning_rate_range_test",
    "plan",
    "study",
]
