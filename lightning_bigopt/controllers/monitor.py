"""Collects what an update used on the device, and hands it to the loggers in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bigopt import trainer_access
from lightning_bigopt.controllers.base import Controller

if TYPE_CHECKING:
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = ["MonitorController"]


class MonitorController(Controller):
    """Logs learning rates, the gradient norm, clipping and batch size of every n-th update."""

    role = "monitor"
    rank = 90

    def __init__(self, *, every: int | None = None) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(
                f"every must be a positive number of updates or None, got {every!r}; None follows "
                "Trainer(log_every_n_steps=)"
            )
        self.every = every
        self._values: dict[str, float | Tensor] = {}
        self._bar_is_empty = True

    def on_train_start(self, pipeline: Pipeline) -> None:
        """The progress bar of a new fit is empty."""
        self._values = {}
        self._bar_is_empty = True

    def _is_due(self, pipeline: Pipeline) -> bool:
        if self.every is None:
            return trainer_access.should_log(pipeline.trainer)
        return (trainer_access.batches_that_stepped(pipeline.trainer) + 1) % self.every == 0

    def wants_norms(self, step: OptimizerStep) -> bool:
        """The norm is taken where it will be shown."""
        return self._bar_is_empty or self._is_due(step.pipeline)

    def observe(self, step: OptimizerStep) -> None:
        """Keeps the update's values on the device."""
        if not self.wants_norms(step):
            return
        trainer, optimizer = step.pipeline.trainer, step.optimizer
        label = trainer_access.optimizer_label(trainer, optimizer)
        suffix = f"/{label}" if label else ""
        for index, group in enumerate(optimizer.param_groups):
            name = group.get("name") or (f"group{index}" if len(optimizer.param_groups) > 1 else "")
            self._values[f"optim/lr{suffix}" + (f"/{name}" if name else "")] = group["lr"]
        self._values[f"grad_norm/total{suffix}"] = step.norms.total
        if step.decision is not None and step.decision.coefficient is not None:
            self._values[f"clip/coefficient{suffix}"] = step.decision.coefficient
        self._values["batch/global_size"] = float(step.pipeline.window_samples)
        self._values["progress/samples"] = float(step.pipeline.samples)

    def on_batch_end(self, pipeline: Pipeline, outputs: Any, batch: Any) -> None:
        """Fetches everything in one transfer and logs it at Lightning's own step."""
        if not self._values:
            return
        collected, self._values = self._values, {}
        trainer = pipeline.trainer
        due, self._bar_is_empty = self._is_due(pipeline), False
        if not trainer.is_global_zero:
            return
        values = fetch(collected)
        trainer_access.show_on_progress_bar(
            trainer,
            {
                "lr": next(v for k, v in values.items() if k.startswith("optim/lr")),
                "grad_norm": next(v for k, v in values.items() if k.startswith("grad_norm/total")),
            },
        )
        if due:
            at = trainer_access.batches_that_stepped(trainer)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=at)


def fetch(values: dict[str, float | Tensor]) -> dict[str, float]:
    """All values as floats, with one transfer from the device."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in values.items()}
    device = next((t.device for t in tensors.values() if t.device.type != "cpu"), None)
    stacked = torch.stack([t.detach().to(device, torch.float32) for t in tensors.values()])
    fetched = dict(zip(tensors, stacked.tolist(), strict=True))
    return {name: float(fetched.get(name, value)) for name, value in values.items()}
