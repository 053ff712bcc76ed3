"""Writes the values of OptimizationMonitor to all loggers; plans and histograms to TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.monitoring import tensorboard
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.optimizers.names import group_names
from lightning_bigopt.planning.outline import planned_updates
from lightning_bigopt.trainer_access import loggers, loop

__all__ = [
    "XAxis",
    "log_values",
    "planned_curves",
    "write_end",
    "write_histograms",
    "write_rejection",
    "write_start",
]

XAxis: TypeAlias = Literal["updates", "samples", "tokens"]


def log_values(fit: Fit, values: Mapping[str, float], axis: XAxis) -> None:
    """Writes the values of one update to every logger.

    TensorBoard gets one event with all values; other loggers get one call of ``log_metrics``.

    Args:
        fit: The fit.
        values: Values by tag.
        axis: Unit of the step.
    """
    trainer = fit.trainer
    step = loop.batches_that_stepped(trainer) if axis == "updates" else getattr(fit.clock, axis)
    writers = loggers.tensorboard_writers(trainer)
    for logger in trainer.loggers:
        if logger in writers:
            writer, prefix = writers[logger]
            named = {prefix + tag: value for tag, value in values.items()} if prefix else values
            tensorboard.write_scalars(writer, named, step=step)
            tensorboard.write_dashboard(writer, named, prefix=prefix)
        else:
            loggers.log_metrics(logger, values, step=step)


def write_start(fit: Fit, axis: XAxis) -> None:
    """Writes the plan (as text and as curves) and the dashboard to TensorBoard.

    After a resume the curves start at the first update of the resumed run.
    """
    trainer = fit.trainer
    if not trainer.is_global_zero:
        return
    if loggers.hp_metric_hides_metrics(trainer):
        rank_zero_info(
            "TensorBoard's HParams tab will show Lightning's placeholder hp_metric and no final "
            "metrics; pass TensorBoardLogger(..., default_hp_metric=False)."
        )
    resumed = trainer.global_step > 0
    first = loop.next_logger_step(trainer)
    for writer, prefix in loggers.tensorboard_writers(trainer).values():
        if resumed:
            step = first if axis == "updates" else getattr(fit.clock, axis) + 1
            tensorboard.purge_from(writer, step)
        writer.add_text(prefix + "plan", plan_text(fit), first)
        planned = planned_curves(fit, axis, first=first if resumed else 0)
        curves = [(at, {prefix + tag: v for tag, v in values.items()}) for at, values in planned]
        tensorboard.write_curves(writer, curves)
        tensorboard.write_dashboard(writer, {tag for _, v in curves for tag in v}, prefix=prefix)


def planned_curves(fit: Fit, axis: XAxis, *, first: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields the planned learning rates and batch sizes of some updates.

    If the updates of the budget are unknown in advance, the plan holds fractions of the budget
    instead; they have a step on the axis that counts the budget only.

    Args:
        fit: The fit.
        axis: Unit of the steps.
        first: Index of the first update.

    Yields:
        The step and the values by tag.
    """
    horizon = fit.clock.horizon
    if horizon is None:
        return
    for update in planned_updates(horizon, fit.groups, first=first, spent=fit.clock.fraction):
        progress, size = update.progress, update.global_batch_size
        values = {}
        if "lr" in fit.groups:
            values = {
                tag_name("plan/lr", rate.optimizer, rate.group): rate.value
                for rate in update.learning_rates
                if math.isfinite(rate.value)
            }
        if size is not None:
            values["plan/global_size"] = size
        if update.is_share and axis == horizon.clock:
            yield int(getattr(progress, axis)), values
        elif not update.is_share and axis == "updates":
            yield progress.steps, values
        elif axis == "samples" and size is not None:
            # Measured values are logged after their update, and count its samples.
            yield progress.samples + int(size), values


def write_histograms(fit: Fit, update: Update, axis: XAxis) -> None:
    """Writes the histogram of every gradient to TensorBoard; a collective for sharded gradients."""
    trainer = fit.trainer
    for name, parameter in update.parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.to_dense()
        # NumPy cannot compute a histogram of values that are not finite.
        if trainer.is_global_zero and full.numel() and bool(full.isfinite().all()):
            for writer, prefix in loggers.tensorboard_writers(trainer).values():
                tag = prefix + tag_name("histograms/grad", name)
                writer.add_histogram(tag, full.float().cpu(), _current_step(fit, axis))


def write_rejection(fit: Fit, reason: str, axis: XAxis) -> None:
    """Writes the reason why the current update is rejected to TensorBoard, as text."""
    for writer, prefix in loggers.tensorboard_writers(fit.trainer).values():
        writer.add_text(prefix + "guard/rejected", reason, _current_step(fit, axis))


def _current_step(fit: Fit, axis: XAxis) -> int:
    """Returns the step of the current update on the axis, before the optimizer's step."""
    if axis == "updates":
        return loop.batches_that_stepped(fit.trainer)
    return int(getattr(fit.clock.progress(), axis))


def plan_text(fit: Fit) -> str:
    """Formats schedules, rules, policies, budget and parameter groups as a Markdown table."""
    rows = {owned: f"`{text}`" for owned, text in fit.specifications().items()}
    horizon = fit.clock.horizon
    if horizon is not None:
        rows["budget"] = amount_of(horizon.budget, horizon.clock)
        for unit in ("steps", "samples", "tokens"):
            total = horizon.total(unit)
            if total is not None and unit != horizon.clock:
                rows["updates" if unit == "steps" else unit] = f"{total:,.0f}"
    bases = fit.groups.bases("lr") if "lr" in fit.groups else None
    for index, (label, optimizer) in enumerate(fit.groups):
        groups = optimizer.param_groups
        for number, (name, group) in enumerate(zip(group_names(groups), groups, strict=True)):
            base = group.get("lr") if bases is None else bases[index][number]
            shown = {**group, "lr": base}
            rows[f"{label or type(optimizer).__name__} {name}".strip()] = ", ".join(
                f"{key} {shown[key]}"
                for key in ("lr", "weight_decay", "betas")
                if shown.get(key) is not None
            )
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)


def write_end(fit: Fit) -> None:
    """Writes hyperparameters and final metrics for TensorBoard's HParams tab."""
    trainer = fit.trainer
    metrics = {
        name: float(value)
        for name, value in loggers.finished_metrics(trainer).items()
        if math.isfinite(float(value))
    }
    writers = loggers.tensorboard_writers(trainer)
    if not (trainer.is_global_zero and metrics and writers):
        return
    values: dict[str, Any] = dict(fit.specifications())
    for _, optimizer in fit.groups:
        values["optimizer"] = type(optimizer).__name__
        group = optimizer.param_groups[0]
        rate = group.get("initial_lr", optimizer.defaults.get("lr", group.get("lr")))
        if rate is not None:
            values["base lr"] = float(rate)
    values.update(fit.module.hparams)
    for writer, _ in writers.values():
        folder = Path(writer.log_dir) / "hyperparameters"
        tensorboard.write_hyperparameters(folder, values, metrics=metrics)
        writer.flush()
