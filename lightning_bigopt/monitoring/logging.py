"""Writes the values of OptimizationMonitor to all loggers; plans and histograms to TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.tensor import DTensor

from lightning_bigopt.durations.duration import amount_of
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.engine.update import Update
from lightning_bigopt.monitoring import earlier_events, tensorboard
from lightning_bigopt.monitoring.logged_axis import LoggedAxis, XAxis
from lightning_bigopt.monitoring.tags import tag_name
from lightning_bigopt.optimizers.names import group_names
from lightning_bigopt.planning.outline import planned_updates
from lightning_bigopt.trainer_access import loggers, loop

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "log_values",
    "planned_curves",
    "release_writers",
    "warn_without_histograms",
    "write_end",
    "write_histograms",
    "write_rejection",
    "write_start",
]

_HINTED: WeakSet[Any] = WeakSet()  # the loggers whose placeholder was reported


def log_values(fit: Fit, values: Mapping[str, float], axis: LoggedAxis) -> None:
    """Writes the values of one update to every logger.

    TensorBoard gets one event with all values; other loggers get one call of ``log_metrics``.

    Args:
        fit: The fit.
        values: Values by tag.
        axis: The x axis of the loggers.
    """
    trainer, step = fit.trainer, axis.after_update(fit)
    writers = loggers.tensorboard_writers(trainer)
    for logger in trainer.loggers:
        if logger in writers:
            writer, prefix = writers[logger]
            named = {prefix + tag: value for tag, value in values.items()} if prefix else values
            with loggers.failed_writes_warn(logger):
                tensorboard.write_scalars(writer, named, step=step)
                _write_dashboard(trainer, writer, named, prefix)
        else:
            loggers.log_metrics(logger, values, step=step)


def _write_dashboard(
    trainer: Trainer, writer: SummaryWriter, tags: Collection[str], prefix: str
) -> None:
    """Writes the dashboard for the current tags and those that the module has logged."""
    of_module = [prefix + tag for tag in loggers.logged_metrics(trainer)]
    tensorboard.write_dashboard(writer, [*tags, *of_module], prefix=prefix)


def write_start(fit: Fit, axis: LoggedAxis) -> None:
    """Writes the plan (as text and as curves) and the dashboard to TensorBoard.

    After a resume the curves start at the first update of the resumed run. In a folder with events
    of an earlier start of the run, those that this start logs again are discarded.
    """
    trainer = fit.trainer
    if not trainer.is_global_zero:
        return
    _hint_at_placeholder(trainer)
    first = loop.next_logger_step(trainer)
    # A rollback sets the index of the next update back, and not the axis.
    index = first - axis.updates if trainer.global_step else 0
    planned = [
        (step + axis.offset, values) for step, values in planned_curves(fit, axis.unit, first=index)
    ]
    for logger, (writer, prefix) in loggers.tensorboard_writers(trainer).items():
        curves = [(at, {prefix + tag: v for tag, v in values.items()}) for at, values in planned]
        tags = {tag for _, values in curves for tag in values}
        with loggers.failed_writes_warn(logger):
            _discard_repeated(fit, axis, writer, prefix)
            writer.add_text(prefix + "plan", plan_text(fit), first)
            tensorboard.write_curves(writer, curves)
            tensorboard.write_dashboard(writer, tags, prefix=prefix)


def _discard_repeated(fit: Fit, axis: LoggedAxis, writer: SummaryWriter, prefix: str) -> None:
    """Discards the events of an earlier start of the run that this start logs again."""
    trainer = fit.trainer
    resumed = trainer.global_step > 0
    # A second fit of a Trainer, without a checkpoint, continues behind its own events.
    continues = earlier_events.has_logged_fit(writer) and trainer.ckpt_path is None
    if not continues and (resumed or earlier_events.holds_earlier_training(writer, prefix)):
        earlier_events.discard_from(writer, axis.next_update(fit) if resumed else 0)
    earlier_events.mark_fit(writer)


def _hint_at_placeholder(trainer: Trainer) -> None:
    """Says once for each logger that Lightning's placeholder replaces the final metrics."""
    found = [lg for lg in loggers.loggers_with_placeholder(trainer) if lg not in _HINTED]
    if found:
        _HINTED.update(found)
        rank_zero_info(
            "TensorBoard's HParams tab will show Lightning's placeholder hp_metric instead of the "
            "final metrics, schedule and clipping rule; pass TensorBoardLogger(..., "
            "default_hp_metric=False)."
        )


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


def warn_without_histograms(trainer: Trainer) -> None:
    """Warns if the Trainer has loggers, but none that stores histograms."""
    kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
    is_trained_in_full = trainer.is_global_zero and not loop.is_fast_dev_run(trainer)
    if kinds and is_trained_in_full and not loggers.tensorboard_writers(trainer):
        rank_zero_warn(
            f"OptimizationMonitor(histograms_every=) writes histograms to TensorBoard only, got "
            f"{kinds}; write event_folder='runs/events' beside it, or pass a TensorBoardLogger too."
        )


def write_histograms(fit: Fit, update: Update, axis: LoggedAxis) -> None:
    """Writes the histogram of every gradient to TensorBoard; a collective for sharded gradients."""
    trainer = fit.trainer
    for name, parameter in update.parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.to_dense()
        # NumPy cannot compute a histogram of values that are not finite.
        if trainer.is_global_zero and full.numel() and bool(full.isfinite().all()):
            for logger, (writer, prefix) in loggers.tensorboard_writers(trainer).items():
                tag = prefix + tag_name("histograms/grad", name)
                with loggers.failed_writes_warn(logger):
                    writer.add_histogram(tag, full.float().cpu(), axis.before_step(fit))


def write_rejection(fit: Fit, reason: str, axis: LoggedAxis) -> None:
    """Writes the reason why the current update is rejected to TensorBoard, as text."""
    for logger, (writer, prefix) in loggers.tensorboard_writers(fit.trainer).items():
        with loggers.failed_writes_warn(logger):
            writer.add_text(prefix + "guard/rejected", reason, axis.before_step(fit))


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
    cells = [(_table_cell(key), _table_cell(value)) for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])


def _table_cell(text: str) -> str:
    """Returns a text in one line, without the character that separates cells in Markdown."""
    return " ".join(text.splitlines()).replace("|", r"\|")


def release_writers(fit: Fit) -> None:
    """Undoes what the monitor has changed in the writers of TensorBoard."""
    for writer, _ in loggers.tensorboard_writers(fit.trainer).values():
        tensorboard.release(writer)


def write_end(fit: Fit) -> None:
    """Completes the dashboard, and writes the run's row of TensorBoard's HParams tab.

    The row holds the hyperparameters and the final metrics. Nothing is written if Lightning has
    already written a row, with its placeholder hp_metric.
    """
    trainer = fit.trainer
    metrics = {
        name: float(value)
        for name, value in loggers.logged_metrics(trainer).items()
        if math.isfinite(float(value))
    }
    writers = loggers.tensorboard_writers(trainer)
    if not (metrics and writers):
        return
    # TensorBoard sorts the columns by name, upper case first, and shows the first five at first.
    values: dict[str, Any] = {
        owned.capitalize(): text for owned, text in fit.specifications().items()
    }
    for _, optimizer in fit.groups:
        values["Optimizer"] = type(optimizer).__name__
        group = optimizer.param_groups[0]
        rate = group.get("initial_lr", optimizer.defaults.get("lr", group.get("lr")))
        if rate is not None:
            values["Base learning rate"] = float(rate)
    values.update(fit.module.hparams)
    has_row = loggers.loggers_with_placeholder(trainer)
    for logger, (writer, prefix) in writers.items():
        with loggers.failed_writes_warn(logger):
            _write_dashboard(trainer, writer, (), prefix)
            if logger not in has_row:
                named = {prefix + tag: value for tag, value in metrics.items()}
                tensorboard.write_hyperparameters(writer, values, metrics=named)
            writer.flush()
