"""Tools that start their own fits or trials: plan, finders, branches and studies."""

from lightning_bigopt.tuning.batch_finder import GlobalBatchFinder
from lightning_bigopt.tuning.compare import compare
from lightning_bigopt.tuning.comparison_result import Comparison
from lightning_bigopt.tuning.critical_batch import CriticalBatchSize
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.find_learning_rate import find_learning_rate
from lightning_bigopt.tuning.found_learning_rate import FoundLearningRate
from lightning_bigopt.tuning.hyperparameter_study import study
from lightning_bigopt.tuning.measure_critical_batch import critical_batch_size
from lightning_bigopt.tuning.measured_batch_size import MeasuredBatchSize
from lightning_bigopt.tuning.range_test import LearningRateRangeTest, learning_rate_range_test
from lightning_bigopt.tuning.run_plan import plan
from lightning_bigopt.tuning.side import Side
from lightning_bigopt.tuning.space import Choice, Integer, Log, Uniform
from lightning_bigopt.tuning.study_result import Study

__all__ = [
    "Choice",
    "Comparison",
    "CriticalBatchSize",
    "FoundLearningRate",
    "GlobalBatchFinder",
    "Integer",
    "LearningRateRangeTest",
    "Log",
    "MeasuredBatchSize",
    "RangeTest",
    "Side",
    "Study",
    "Uniform",
    "compare",
    "critical_batch_size",
    "find_learning_rate",
    "learning_rate_range_test",
    "plan",
    "study",
]
