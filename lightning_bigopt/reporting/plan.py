"""Works a whole run out before anything is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigopt import trainer_access
from lightning_bigopt.callbacks.base import OptimizationCallback
from lightning_bigopt.clock import TrainingClock, resolve_horizon
from lightning_bigopt.controllers.batch_size import BatchSizeController
from lightning_bigopt.controllers.batch_supply import constant_plan
from lightning_bigopt.controllers.learning_rate import LearningRateController
from lightning_bigopt.controllers.outlook import PlannedUpdate, planned_shares, planned_updates
from lightning_bigopt.controllers.written import group_names
from lightning_bigopt.durations import Horizon, Progress
from lightning_bigopt.reporting.planned_run import Boundary, PlanRow, TrainingPlan

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["plan"]

_FUSABLE = frozenset({"Adam", "AdamW", "SGD", "Adagrad"})
_UNLIMITED = "the Trainer has no limit and would run 1000 epochs; set max_steps or max_epochs"


def plan(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    points: int = 200,
) -> TrainingPlan:
    """Works a whole run out without training anything.

    The hooks ``prepare_data``, ``setup``, ``configure_model``, ``train_dataloader`` and
    ``configure_optimizers`` run; no process is started and the Trainer can fit afterwards. What a
    run measures as it goes (an adaptive batch, a plateau) and the scaling of the learning rate
    with the batch are not in it.

    Args:
        trainer: With its callbacks.
        module: What it will train.
        train_dataloaders: As for ``Trainer.fit``; None for the module's own.
        datamodule: As for ``Trainer.fit``.
        points: About how many updates are worked out.

    Returns:
        The plan.

    Raises:
        ValueError: If the length of the run cannot be known, or ``points`` is not positive.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_bigopt import LearningRateScheduler, Linear
        >>> trainer = L.Trainer(
        ...     max_steps=100,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
        ... )
        >>> found = plan(trainer, BoringModel())
        >>> found.totals["updates"], found.rows[50].update, found.rows[50].learning_rates
        (100.0, 50, {'lr': 0.05})
    """
    if type(points) is not int or points < 1:
        raise ValueError(f"points must be a positive number of updates, got {points!r}; try 200")
    unlimited = trainer_access.is_unlimited(trainer)
    with trainer_access.data_in_place(trainer, module, train_dataloaders, datamodule=datamodule):
        callbacks = _callbacks(trainer, module)
        controllers = [c.controller for c in callbacks if isinstance(c, OptimizationCallback)]
        optimizers = _optimizers(module)
        clock = TrainingClock()
        for controller in controllers:
            clock.settings = clock.settings.merge(controller.settings)
        batch = next((c for c in controllers if isinstance(c, BatchSizeController)), None)
        simulate = constant_plan(trainer) if batch is None else batch.simulator(trainer)
        horizon = clock.horizon = resolve_horizon(trainer, clock.settings.budget, simulate)
        found = next((c for c in controllers if isinstance(c, LearningRateController)), None)
        owner = copy.copy(found)
        surprises = list(_warnings(optimizers, horizon, owner))
        if unlimited:
            surprises.insert(0, _UNLIMITED)
        boundaries: list[Boundary] = []
        if owner is not None:
            try:
                owner.resolve(clock)
                boundaries = list(_boundaries(owner, horizon))
            except ValueError as error:
                surprises.insert(0, str(error))
                owner = None
        rows = [
            _row(u, horizon, optimizers, owner) for u in planned_updates(horizon, points=points)
        ] or [_share(p, horizon, optimizers, owner) for p in planned_shares(horizon, points=points)]
        if owner is not None:
            surprises += _about_rates(rows)
        return TrainingPlan(
            totals=_totals(horizon),
            rows=tuple(rows),
            boundaries=tuple(boundaries),
            checkpoints=tuple(_checkpoints(callbacks)),
            warnings=tuple(surprises),
        )


def _callbacks(trainer: Trainer, module: LightningModule) -> list[Callback]:
    brought = module.configure_callbacks()
    more = list(brought) if isinstance(brought, Sequence) else [brought]
    return [*trainer_access.callbacks_of(trainer), *more]


def _optimizers(module: LightningModule) -> list[Optimizer]:
    """What ``configure_optimizers`` returns, in all the forms that it may have."""
    found: Any = module.configure_optimizers()
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Sequence):
        found = found[0]
    several = found if isinstance(found, Sequence) else [] if found is None else [found]
    return [one["optimizer"] if isinstance(one, dict) else one for one in several]


def _row(
    update: PlannedUpdate,
    horizon: Horizon,
    optimizers: list[Optimizer],
    owner: LearningRateController | None,
) -> PlanRow:
    progress, known = update.progress, horizon.total
    return PlanRow(
        update=progress.steps,
        fraction=progress.fraction,
        epoch=progress.epochs if horizon.batches_per_epoch else None,
        samples=progress.samples if known("samples") is not None else None,
        tokens=progress.tokens if known("tokens") is not None else None,
        learning_rates=_rates(progress.fraction, optimizers, owner),
        global_batch_size=update.global_batch_size,
        accumulate=update.batches,
    )


def _share(
    progress: Progress,
    horizon: Horizon,
    optimizers: list[Optimizer],
    owner: LearningRateController | None,
) -> PlanRow:
    """What is known where only counting will tell the updates."""
    return PlanRow(
        update=None,
        fraction=progress.fraction,
        epoch=None,
        samples=progress.samples if horizon.clock == "samples" else None,
        tokens=progress.tokens if horizon.clock == "tokens" else None,
        learning_rates=_rates(progress.fraction, optimizers, owner),
        global_batch_size=None,
        accumulate=None,
    )


def _rates(
    fraction: float, optimizers: list[Optimizer], owner: LearningRateController | None
) -> dict[str, float]:
    rates = {}
    for optimizer in optimizers:
        label = trainer_access.label_among(optimizers, optimizer)
        for name, group in zip(
            group_names(optimizer.param_groups), optimizer.param_groups, strict=True
        ):
            if group.get("lr") is None:
                continue  # the optimizer finds its own, as Adafactor does
            base = float(group["lr"])
            if owner is not None:
                base = owner.value(group.get("name"), fraction, base, optimizer=label)
            rates["/".join(part for part in (label, name) if part) or "lr"] = base
    return rates


def _totals(horizon: Horizon) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, unit in (("updates", "steps"), ("samples", "samples"), ("tokens", "tokens")):
        total = horizon.total(unit)  # type: ignore[arg-type]
        if total is not None:
            found[name] = float(total)
    batches = horizon.total("batches")
    if batches is not None and horizon.batches_per_epoch:
        found["epochs"] = batches / horizon.batches_per_epoch
    return found


def _boundaries(owner: LearningRateController, horizon: Horizon) -> Iterator[Boundary]:
    """The seams of the schedule, each at the first update that starts behind it."""
    try:
        axis = horizon.axis("1 step")
    except ValueError:
        axis = ()  # the batch adapts, or only counting will tell
    for name, share in owner.schedule_of(None).boundaries().items():
        update = _first_update(share, axis) if axis else None
        yield Boundary(name=name, update=update, fraction=share)


def _first_update(share: float, axis: Sequence[tuple[float, float]]) -> int:
    """The first update that starts at a share of the budget or beyond."""
    for (low, before), (high, after) in pairwise(axis):
        if share <= high:
            update = before + (after - before) * (share - low) / (high - low)
            return math.ceil(round(update, 6))
    return math.ceil(axis[-1][1])


def _warnings(
    optimizers: list[Optimizer], horizon: Horizon, owner: LearningRateController | None
) -> Iterator[str]:
    if owner is None:
        yield "no LearningRateScheduler: the learning rate stays as configured, or is the module's"
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if name in _FUSABLE and not any(group.get("fused") for group in optimizer.param_groups):
            yield f"{name} could be fused: pass fused=True, and clipping costs next to nothing"
    if not horizon.spans:
        known = "updates and samples" if horizon.clock != "samples" else "updates"
        why = (
            "tokens are only counted as they come"
            if horizon.clock == "tokens"
            else "the batch adapts, or nobody says it"
        )
        yield f"{known} are not known in advance: {why}"


def _about_rates(rows: Sequence[PlanRow]) -> Iterator[str]:
    for group in rows[0].learning_rates if rows else ():
        rates = [row.learning_rates[group] for row in rows]
        if rates[-1] >= 0.999 * max(rates) and max(rates) > 0:
            yield (
                f"the learning rate of {group} never decays: it ends at its highest value "
                f"{rates[-1]:.3g}"
            )


def _checkpoints(callbacks: Sequence[Callback]) -> Iterator[str]:
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            monitored = f" by {callback.monitor}" if callback.monitor else ""
            yield f"{trainer_access.checkpoint_interval(callback)}{monitored}"
