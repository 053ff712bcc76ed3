"""The values of an update that need no measurement, and those that the progress bar shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from lightning_bigopt.engine.clock import Clock
from lightning_bigopt.gradients.clip_decision import ClipDecision
from lightning_bigopt.monitoring.group_values import hyperparameters_of
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.optimizers.names import group_names
from lightning_bigopt.trainer_access import loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "add_clipping",
    "add_hyperparameters",
    "batch_values",
    "for_progress_bar",
    "is_due",
    "without_unknown",
]


def is_due(trainer: Trainer, every: int | None) -> bool:
    """Returns whether the current update is an ``every``-th; None: whether Lightning logs it."""
    if every is None:
        return loop.should_log(trainer)
    return (loop.batches_that_stepped(trainer) + 1) % every == 0


def add_hyperparameters(values: MetricBuffer, optimizer: Optimizer, label: str) -> None:
    """Adds the values of the parameter groups of an optimizer."""
    groups = optimizer.param_groups
    for name, group in zip(group_names(groups), groups, strict=True):
        for tag, value in hyperparameters_of(group).items():
            values.add(tag_name(tag, label, name), value)


def add_clipping(values: MetricBuffer, decision: ClipDecision, label: str) -> None:
    """Adds coefficient and threshold; ``clip/fraction`` is a metric of GradientClipping."""
    for pattern, part in decision.each_group():
        factor, threshold = part.coefficient, part.threshold
        if factor is None and part.coefficients is not None:
            factor = part.coefficients.mean()
        if factor is not None:
            values.add(tag_name("clip/coefficient", label, pattern), factor)
        if threshold is not None and (not isinstance(threshold, Tensor) or threshold.ndim == 0):
            values.add(tag_name("clip/threshold", label, pattern), threshold)


def batch_values(clock: Clock, micro_size: int | None) -> dict[str, float]:
    """Returns sizes of the batch, and samples and tokens consumed by the run.

    Args:
        clock: The counts of consumed data.
        micro_size: Samples of one process in the last micro-batch; None if they are unknown.
    """
    values = {"batch/accumulate": float(clock.window.batches)}
    if micro_size is not None:
        values["batch/micro_size"] = float(micro_size)
    if clock.samples_are_known:
        values["progress/samples"] = float(clock.samples)
    if clock.settings.tokens is not None:
        values["progress/tokens"] = float(clock.tokens)
    return values


def for_progress_bar(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values that the progress bar shows, by the names that it shows."""
    shown = {
        "grad_norm": next(v for k, v in values.items() if k.startswith("grad_norm/total")),
    }
    if "batch/global_size" in values:
        shown["global_batch"] = values["batch/global_size"]
    rate = next((v for k, v in values.items() if k.startswith("optim/lr")), None)
    if rate is not None:
        shown = {"lr": rate, **shown}
    if values.get("guard/skipped"):
        shown["skipped"] = values["guard/skipped"]
    return shown


def without_unknown(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values without the spike scores that are NaN: nothing was compared yet.

    Example:
        >>> without_unknown({"loss": math.nan, "stability/spike_score/loss": math.nan})
        {'loss': nan}
    """
    return {
        tag: value
        for tag, value in values.items()
        if not (math.isnan(value) and tag.startswith("stability/"))
    }
