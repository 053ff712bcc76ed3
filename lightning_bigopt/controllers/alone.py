"""Logging of a controller that works without an OptimizationMonitor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bigopt import trainer_access

if TYPE_CHECKING:
    from lightning_bigopt.controllers.base import Controller
    from lightning_bigopt.pipeline import Pipeline

__all__ = ["log_alone"]


def log_alone(controller: Controller, pipeline: Pipeline) -> None:
    """Logs a controller's metrics on an update that Lightning logs, where no monitor does it."""
    trainer = pipeline.trainer
    if not trainer.loggers or not trainer_access.should_log(trainer):
        return
    if any(other.role == "monitor" for other in pipeline.controllers):
        return
    values = {name: float(value) for name, value in controller.metrics(pipeline).items()}
    if values and trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer_access.batches_that_stepped(trainer))
