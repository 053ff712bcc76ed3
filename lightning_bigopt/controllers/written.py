"""Where the monitor's values go: every logger, and what only TensorBoard can show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from lightning_bigopt import trainer_access
from lightning_bigopt.controllers.batch_size import BatchSizeController
from lightning_bigopt.controllers.learning_rate import (
    LearningRateController,
    ScheduledLearningRate,
)
from lightning_bigopt.controllers.outlook import planned_rate, planned_shares, planned_updates
from lightning_bigopt.reporting import tensorboard
from lightning_bigopt.reporting.tags import tag_name

if TYPE_CHECKING:
    from lightning_bigopt.durations import Progress
    from lightning_bigopt.pipeline import OptimizerStep, Pipeline

__all__ = [
    "group_names",
    "log_values",
    "write_end",
    "write_histograms",
    "write_rejection",
    "write_start",
]

Axis = Literal["updates", "samples", "tokens"]


def log_values(pipeline: Pipeline, values: Mapping[str, float], axis: Axis) -> None:
    """Hands one update's values to every logger: one event to TensorBoard, one call to others."""
    trainer = pipeline.trainer
    step = (
        trainer_access.batches_that_stepped(trainer)
        if axis == "updates"
        else int(getattr(pipeline.clock, axis))
    )
    writers = trainer_access.tensorboard_writers(trainer)
    for logger in trainer.loggers:
        if logger in writers:
            writer, prefix = writers[logger]
            named = {prefix + tag: value for tag, value in values.items()} if prefix else values
            tensorboard.write_scalars(writer, named, step=step)
            tensorboard.write_dashboard(writer, named, prefix=prefix)
        else:
            trainer_access.log_metrics(logger, values, step=step)


def write_start(pipeline: Pipeline, axis: Axis) -> None:
    """The dashboard, the plan as text and as curves; a resumed run goes on where it stopped."""
    trainer = pipeline.trainer
    if not trainer.is_global_zero:
        return
    if trainer_access.placeholder_hides_metrics(trainer):
        rank_zero_info(
            "TensorBoard's HParams tab will show Lightning's placeholder hp_metric and no final "
            "metrics; pass TensorBoardLogger(..., default_hp_metric=False)."
        )
    begun = trainer.global_step > 0
    first = trainer_access.coming_step(trainer)
    for writer, prefix in trainer_access.tensorboard_writers(trainer).values():
        if begun:
            step = first if axis == "updates" else int(getattr(pipeline.clock, axis)) + 1
            tensorboard.forget_after(writer, step)
        writer.add_text(prefix + "plan", plan_text(pipeline), first)
        planned = planned_curves(pipeline, axis, first=first if begun else 0)
        curves = [(at, {prefix + tag: v for tag, v in values.items()}) for at, values in planned]
        tensorboard.write_curves(writer, curves)
        tensorboard.write_dashboard(writer, {tag for _, v in curves for tag in v}, prefix=prefix)


def planned_curves(
    pipeline: Pipeline, axis: Axis, *, first: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """The planned learning rates and batches at some updates, by their place on the axis.

    A budget whose updates are not known in advance, such as one in tokens, has its learning rates
    by the share that is spent, on the axis that counts it; other axes have no curve then.
    """
    horizon = pipeline.clock.horizon
    if horizon is None:
        return
    if axis == horizon.clock and not horizon.spans:
        if not _waits_for_the_batch(pipeline, axis):
            for progress in planned_shares(horizon, first=pipeline.clock.fraction):
                yield int(getattr(progress, axis)), _planned_rates(pipeline, progress)
        return
    for update in planned_updates(horizon, first=first):
        progress = update.progress
        values = _planned_rates(pipeline, progress)
        if update.global_batch_size is not None:
            values["plan/global_size"] = update.global_batch_size
        if axis == "updates":
            yield progress.steps, values
        elif axis == "samples" and update.global_batch_size is not None:
            yield progress.samples + int(update.global_batch_size), values


def _planned_rates(pipeline: Pipeline, progress: Progress) -> dict[str, float]:
    """The learning rate of every group on a schedule, by tag."""
    owner = pipeline.find(LearningRateController)
    if owner is None:
        return {}
    return {
        tag: planned_rate(
            owner, pipeline.controllers, progress, group=group, base=base, optimizer=label
        )
        for tag, label, group, base in _scheduled_groups(pipeline)
    }


def _waits_for_the_batch(pipeline: Pipeline, axis: Axis) -> bool:
    """Whether learning rates follow a batch that the share of the budget does not tell."""
    batch = pipeline.find(BatchSizeController)
    if batch is None or batch.coupling.lr_scaling is None:
        return False
    return batch.policy.adaptive or not batch.policy.units <= {"fraction", axis}


def _scheduled_groups(pipeline: Pipeline) -> Iterator[tuple[str, str, str | None, float]]:
    """For each group on a schedule its tag, optimizer, name and base learning rate."""
    trainer = pipeline.trainer
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, ScheduledLearningRate):
            label = trainer_access.optimizer_label(trainer, scheduler.optimizer)
            groups = scheduler.optimizer.param_groups
            for name, group, base in zip(group_names(groups), groups, scheduler.bases, strict=True):
                yield tag_name("plan/lr", label, name), label, group.get("name"), base


def group_names(groups: list[dict[str, Any]]) -> list[str]:
    """How the groups of an optimizer are called in tags; ``""`` for the only one.

    Groups may share a name, and so a schedule; their tags are numbered.

    Example:
        >>> group_names([{"name": "decay"}, {}]), group_names([{}])
        (['decay', 'group1'], [''])
        >>> group_names([{"name": "body"}, {"name": "body"}, {"name": "head"}])
        ['body-0', 'body-1', 'head']
    """
    several = len(groups) > 1
    names = [
        str(group.get("name") or (f"group{index}" if several else ""))
        for index, group in enumerate(groups)
    ]
    if len(set(names)) == len(names):
        return names
    return [
        f"{name}-{index}" if names.count(name) > 1 else name for index, name in enumerate(names)
    ]


def write_histograms(step: OptimizerStep, axis: Axis) -> None:
    """Writes the histogram of every gradient to TensorBoard; every process joins."""
    pipeline = step.pipeline
    trainer, at = pipeline.trainer, _place(pipeline, axis)
    for name, parameter in step.parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if trainer.is_global_zero and whole.numel() and bool(whole.isfinite().all()):
            for writer, prefix in trainer_access.tensorboard_writers(trainer).values():
                tag = prefix + tag_name("histograms/grad", name)
                writer.add_histogram(tag, whole.float().cpu(), at)


def write_rejection(pipeline: Pipeline, why: str, axis: Axis) -> None:
    """Writes why the guard objects to the update under way, as text for TensorBoard."""
    for writer, prefix in trainer_access.tensorboard_writers(pipeline.trainer).values():
        writer.add_text(prefix + "guard/rejected", why, _place(pipeline, axis))


def _place(pipeline: Pipeline, axis: Axis) -> int:
    """Where on the axis the update under way belongs, before it is made."""
    if axis == "updates":
        return trainer_access.batches_that_stepped(pipeline.trainer)
    return int(getattr(pipeline.clock.progress(), axis))


def specifications(pipeline: Pipeline) -> dict[str, str]:
    """What the user asked of each controller, as written."""
    found: dict[str, list[str]] = {}
    for controller in pipeline.controllers:
        for field in ("schedule", "rule", "policy", "detectors", "actions"):
            if hasattr(controller, field):
                parts = getattr(controller, field)
                parts = parts if isinstance(parts, tuple) else (parts,)
                found.setdefault(controller.role, []).extend(map(repr, parts))
    return {role: ", ".join(parts) for role, parts in found.items()}


def plan_text(pipeline: Pipeline) -> str:
    """The plan as a Markdown table."""
    rows = {role: f"`{written}`" for role, written in specifications(pipeline).items()}
    horizon = pipeline.clock.horizon
    if horizon is not None:
        rows["budget"] = f"{horizon.budget:g} {horizon.clock}"
        for unit in ("steps", "samples", "tokens"):
            total = horizon.total(unit)
            if total is not None and unit != horizon.clock:
                rows["updates" if unit == "steps" else unit] = f"{total:,.0f}"
    bases = {tag: base for tag, _, _, base in _scheduled_groups(pipeline)}
    for optimizer in pipeline.trainer.optimizers:
        raw = getattr(optimizer, "optimizer", optimizer)
        label = trainer_access.optimizer_label(pipeline.trainer, raw)
        for name, group in zip(group_names(raw.param_groups), raw.param_groups, strict=True):
            base = bases.get(tag_name("plan/lr", label, name), group.get("lr"))  # of the schedule
            shown = {**group, "lr": base}
            rows[f"{label or type(raw).__name__} {name}".strip()] = ", ".join(
                f"{key} {shown[key]}"
                for key in ("lr", "weight_decay", "betas")
                if shown.get(key) is not None
            )
    lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)


def write_end(pipeline: Pipeline) -> None:
    """Hyperparameters with final metrics, for TensorBoard's HParams tab."""
    trainer = pipeline.trainer
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if math.isfinite(float(value))
    }
    writers = trainer_access.tensorboard_writers(trainer)
    if not (trainer.is_global_zero and metrics and writers):
        return
    values: dict[str, Any] = dict(specifications(pipeline))
    for optimizer in trainer.optimizers:
        raw = getattr(optimizer, "optimizer", optimizer)
        values["optimizer"] = type(raw).__name__
        group = raw.param_groups[0]
        rate = group.get("initial_lr", raw.defaults.get("lr", group.get("lr")))
        if rate is not None:
            values["base lr"] = float(rate)
    values.update(pipeline.module.hparams)
    for writer, _ in writers.values():
        folder = Path(writer.log_dir) / "hyperparameters"
        tensorboard.write_hyperparameters(folder, values, metrics=metrics)
        writer.flush()
