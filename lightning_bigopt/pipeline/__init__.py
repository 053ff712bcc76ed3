"""One pipeline per Trainer, which runs all controllers in fixed order."""

from lightning_bigopt.pipeline.run import Pipeline
from lightning_bigopt.pipeline.step import OptimizerStep

__all__ = ["OptimizerStep", "Pipeline"]
