"""Averages of the weights of a run: EMA, mean of the last part, and merges of checkpoints."""

from lightning_bigopt.averaging.average import Average, AverageState
from lightning_bigopt.averaging.ema import EMA
from lightning_bigopt.averaging.merge import Merge, merge_coefficients
from lightning_bigopt.averaging.merge_checkpoints import merge_checkpoints
from lightning_bigopt.averaging.tail_mean import TailMean
from lightning_bigopt.averaging.weights import merge_weights

__all__ = [
    "EMA",
    "Average",
    "AverageState",
    "Merge",
    "TailMean",
    "merge_checkpoints",
    "merge_coefficients",
    "merge_weights",
]
