"""Compression of the gradients that data-parallel processes send to each other."""

from lightning_bigopt.gradients.compression.compressor import Compressor
from lightning_bigopt.gradients.compression.half_precision import BF16, FP16
from lightning_bigopt.gradients.compression.power_sgd import PowerSGD
from lightning_bigopt.gradients.compression.top_k import TopK

__all__ = ["BF16", "FP16", "Compressor", "PowerSGD", "TopK"]
