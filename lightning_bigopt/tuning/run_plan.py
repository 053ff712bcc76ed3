"""``plan()``: computes learning rates and batch sizes of a run without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.checks import check_count, shown
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.engine.budget import several_optimizers
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.engine.stage import Fit, Stages
from lightning_bigopt.planning.expected_loss import ExpectedLoss
from lightning_bigopt.planning.loss_law import LossLaw
from lightning_bigopt.planning.outline import PlannedUpdate, planned_updates
from lightning_bigopt.reporting.planned_run import Boundary, PlanRow, TrainingPlan
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import loop, separate_loop, trial_runs
from lightning_bigopt.trainer_access.packages import classes
from lightning_bigopt.trainer_access.planning_strategy import planned_in_one_process
from lightning_bigopt.tuning.plan_losses import losses_of_plan
from lightning_bigopt.type_checks import check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

__all__ = ["plan"]

StagesT = TypeVar("StagesT", bound=Stages)

_FUSABLE = frozenset({"Adam", "AdamW", "SGD", "Adagrad"})
_UNLIMITED = "the Trainer has no limit and will run 1000 epochs; set max_steps or max_epochs"


def plan(
    trainer: Trainer,
    module: LightningModule,
    train_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    points: int = 200,
    law: LossLaw | None = None,
) -> TrainingPlan:
    """Computes the plan of a run without training.

    A fit is started and ended before its first batch, with copies of the callbacks of
    lightning_bigopt and no other callbacks: ``prepare_data``, ``setup``, ``configure_model``,
    ``train_dataloader`` and ``configure_optimizers`` run. No process is started and nothing is
    logged; the Trainer can fit afterwards. The plan leaves out everything that a run measures: an
    adaptive batch size and learning-rate reductions at a plateau.

    Args:
        trainer: The Trainer with its callbacks.
        module: The module to train.
        train_dataloaders: As for ``Trainer.fit``; None for the module's own.
        datamodule: As for ``Trainer.fit``.
        points: Approximate number of updates in the plan.
        law: A law of the loss, fitted to pilots with the batch size of this run: the plan then
            contains the expected loss with its band, and that of the same run with the usual
            schedules at the same peak learning rate.

    Returns:
        The plan; ``print`` shows it as a table.

    Raises:
        ValueError: If the length of the run is unknown, the Trainer has reached its limit, or an
            argument is invalid.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_bigopt import LearningRateScheduler, Linear
        >>> scheduler = LearningRateScheduler(
        ...     Linear(start=1.0, end=0.0), module_scheduler="replace"
        ... )
        >>> trainer = L.Trainer(
        ...     max_steps=100,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     callbacks=[scheduler],
        ... )
        >>> found = plan(trainer, BoringModel())
        >>> found.totals["updates"], found.rows[50].update, found.rows[50].learning_rates
        (100.0, 50, {'lr': 0.05})
    """
    if not hasattr(trainer, "fit_loop"):
        raise ValueError(
            f"trainer must be a Trainer, got {shown(trainer)}; write plan(trainer, module)"
        )
    check_instance("module", module, nn.Module, hint="write plan(trainer, module)")
    check_count("points", points, of="updates", hint="try 200")
    if law is not None:
        check_instance("law", law, LossLaw, hint="write LossLaw.fit(runs)")
    unlimited = loop.is_unlimited(trainer)
    callbacks = list(trainer_callbacks.callbacks_of(trainer))
    checkpoints = trainer_callbacks.checkpoint_descriptions(callbacks)
    planner = _Planner(points, [_UNLIMITED] if unlimited else [], checkpoints, law)
    copies: list[Any] = [_fresh_copy(c) for c in callbacks if isinstance(c, Capability)]
    of_lightning = classes("callbacks.GradientAccumulationScheduler", "callbacks.Timer")
    copies += [copy.deepcopy(c) for c in callbacks if isinstance(c, of_lightning)]
    with (
        planned_in_one_process(trainer),
        # Lightning makes the iterator before on_train_start; one with workers draws random numbers.
        separate_loop.loaders_restored(trainer, train_dataloaders, with_states_of=())
        if train_dataloaders is not None
        else nullcontext(),
    ):
        trial_runs.fit_quietly(
            trainer,
            module,
            train_dataloaders,
            datamodule=datamodule,
            callbacks=[*copies, planner],
        )
    if planner.plan is None:  # Lightning has ended the fit before its start
        raise ValueError(
            "trainer must have updates left to plan, got one that has made "
            f"{trainer.global_step} updates with max_steps={trainer.max_steps} and "
            f"max_epochs={trainer.max_epochs}; use a new Trainer"
        )
    return planner.plan


class _Planner(Engine):
    """An engine that starts the capabilities, computes the plan, and ends the fit."""

    needs_horizon = True

    def __init__(
        self,
        points: int = 200,
        warnings: Sequence[str] = (),
        checkpoints: Sequence[str] = (),
        law: LossLaw | None = None,
    ) -> None:
        super().__init__()
        self._points, self._warnings, self._checkpoints = points, warnings, checkpoints
        self._law = law
        self.plan: TrainingPlan | None = None

    def _collect(self, trainer: Trainer) -> list[Stages]:
        # Copies here too: Lightning has added the callbacks of the module and its mixins.
        return [_fresh_copy(capability) for capability in super()._collect(trainer)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the plan and ends the fit.

        Raises:
            BaseException: Always. Lightning catches it and ends the fit without ``on_exception``.
        """
        assert self._fit is not None  # set in on_fit_start
        warnings = list(self._warnings)
        try:
            self._start(self._fit)
        except ValueError as error:
            if self.clock.horizon is None:
                raise
            # A duration does not fit into the horizon. Training would raise; the plan shows the
            # message as its first warning, and everything else.
            warnings.insert(0, str(error))
        # A module's ModelCheckpoint replaces the Trainer's.
        checkpoints = trainer_callbacks.checkpoint_descriptions(
            trainer_callbacks.callbacks_of(trainer)
        )
        self.plan = _plan_of(
            self._fit, self._points, warnings, checkpoints or self._checkpoints, self._law
        )
        raise trial_runs.exit_fit(trainer)


def _fresh_copy(capability: StagesT) -> StagesT:
    copied = copy.deepcopy(capability)
    copied.reset()
    copied.take_loaded_state()  # discards it: the plan starts at update 0
    return copied


def _plan_of(
    fit: Fit, points: int, warnings: list[str], checkpoints: Sequence[str], law: LossLaw | None
) -> TrainingPlan:
    horizon = fit.clock.horizon
    assert horizon is not None  # the planner sets needs_horizon
    scheduler = next((c for c in fit.capabilities if isinstance(c, LearningRateScheduler)), None)
    if scheduler is not None and not scheduler.is_resolved:
        scheduler = None
    rows = [_row(update, horizon) for update in planned_updates(horizon, fit.groups, points=points)]
    warnings += _warnings([optimizer for _, optimizer in fit.groups], horizon, scheduler)
    if scheduler is not None:
        warnings += _rate_warnings(rows)
    losses: tuple[ExpectedLoss, ...] = ()
    if law is not None:
        own = bool(fit.trainer.lr_scheduler_configs)
        losses, doubts = losses_of_plan(law, horizon, fit.groups, scheduler, module_schedules=own)
        warnings += doubts
    return TrainingPlan(
        totals=_totals(horizon),
        rows=tuple(rows),
        boundaries=() if scheduler is None else tuple(_boundaries(scheduler, horizon)),
        checkpoints=tuple(checkpoints),
        warnings=tuple(warnings),
        expected_losses=losses,
    )


def _row(update: PlannedUpdate, horizon: Horizon) -> PlanRow:
    progress, known = update.progress, horizon.total
    counts_samples = known("samples") is not None and not update.is_share
    counts_tokens = known("tokens") is not None and not update.is_share
    has_epochs = bool(horizon.batches_per_epoch or horizon.samples_per_epoch)
    return PlanRow(
        update=None if update.is_share else progress.steps,
        fraction=progress.fraction,
        epoch=progress.epochs if has_epochs and not update.is_share else None,
        samples=progress.samples if counts_samples or horizon.clock == "samples" else None,
        tokens=progress.tokens if counts_tokens or horizon.clock == "tokens" else None,
        learning_rates={
            "/".join(part for part in (rate.optimizer, rate.group) if part) or "lr": rate.value
            for rate in update.learning_rates
        },
        global_batch_size=update.global_batch_size,
        accumulate=update.batches,
    )


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


def _boundaries(scheduler: LearningRateScheduler, horizon: Horizon) -> Iterator[Boundary]:
    """Yields the boundaries of the stages, each at the first update that starts at or after it."""
    try:
        axis = horizon.axis("1 step")
    except ValueError:
        axis = ()  # the updates are unknown: an adaptive batch size, or a budget in tokens
    for name, share in scheduler.schedule_of(None).boundaries().items():
        update = _first_update(share, axis) if axis else None
        yield Boundary(name=name, update=update, fraction=share)


def _first_update(share: float, axis: Sequence[tuple[float, float]]) -> int:
    """Returns the first update that starts at or after a fraction of the budget."""
    for (low, before), (high, after) in pairwise(axis):
        if share <= high:
            update = before + (after - before) * (share - low) / (high - low)
            # Rounded first, or 20.000000000000004 would become update 21.
            return math.ceil(round(update, 6))
    return math.ceil(axis[-1][1])


def _warnings(
    optimizers: list[Optimizer], horizon: Horizon, scheduler: LearningRateScheduler | None
) -> Iterator[str]:
    if scheduler is None:
        yield (
            "there is no LearningRateScheduler: the learning rate stays constant, or follows the "
            "module's own scheduler"
        )
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if name in _FUSABLE and not any(group.get("fused") for group in optimizer.param_groups):
            yield f"{name} is not fused: pass fused=True to clip inside its kernel"
    if len(optimizers) > 1:
        yield several_optimizers(len(optimizers), horizon.clock)
    if not horizon.spans:
        unknown = "updates and samples" if horizon.clock != "samples" else "updates"
        reason = {
            "tokens": "tokens are counted while training",
            "seconds": "their number depends on the speed of the machine",
        }.get(horizon.clock, "the batch size adapts, or is unknown")
        yield f"{unknown} are not known in advance: {reason}"


def _rate_warnings(rows: Sequence[PlanRow]) -> Iterator[str]:
    for group in rows[0].learning_rates if rows else ():
        rates = [row.learning_rates[group] for row in rows]
        if rates[-1] >= 0.999 * max(rates) and max(rates) > 0:
            yield (
                f"the learning rate of {group} never decays: it ends at its highest value "
                f"{rates[-1]:.3g}"
            )
