"""Runs one trial: builds, trains and validates it, and turns its failures into outcomes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from time import perf_counter
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback

from lightning_bigopt.callbacks.step_guard.too_many_rejections import TooManyRejectionsError
from lightning_bigopt.checks import shown
from lightning_bigopt.trainer_access import callbacks as trainer_callbacks
from lightning_bigopt.trainer_access import trial_runs
from lightning_bigopt.tuning.refusals import (
    PrunedError,
    RefusedError,
    SetupError,
    refusals_pruned,
)
from lightning_bigopt.tuning.trainings import Training, Trainings

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Outcome", "Report", "Validations", "add_callback", "run_trial", "score"]

Report: TypeAlias = Callable[[int, float], bool]
"""Takes the updates and the monitored value of a validation; returns whether to prune."""

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial has ended.

    Args:
        state: ``"complete"`` or ``"pruned"``.
        loss: Monitored value at the end of a complete trial.
        reason: Why it was pruned.
        updates: Updates that were trained.
        updates_saved: Updates that separate runs would have trained in addition.
        seconds: Duration.
    """

    state: Literal["complete", "pruned"]
    loss: float | None = None
    reason: str = ""
    updates: int = 0
    updates_saved: int = 0
    seconds: float = 0.0


@dataclass
class Cost:
    """Counts what a trial costs, also if it is pruned.

    Args:
        updates: Updates that were trained.
        saved: Updates that separate runs would have trained in addition.
        start: When the trial began.
    """

    updates: int = 0
    saved: int = 0
    start: float = field(default_factory=perf_counter)


class Validations(Callback):
    """Reports the monitored value of every validation, and stops a trial that is pruned.

    Process 0 decides; all processes stop together.

    Args:
        monitor: Name of the value.
        report: Reports it to Optuna, in process 0; None to report nothing.

    Attributes:
        reason: Why the trial was stopped; "" if it was not.
        step: Updates at the last validation.
    """

    def __init__(self, monitor: str, report: Report | None) -> None:
        self.monitor, self.report = monitor, report
        self.reason, self.step, self.is_enabled = "", -1, False
        self.is_over = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads whether the run validates."""
        self.is_enabled = bool(trainer.enable_validation)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the reports: a validation after the fit is the outcome of the trial."""
        self.is_over = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports the value."""
        is_due = not (trainer.sanity_checking or self.is_over)
        if not is_due or self.monitor not in trainer.callback_metrics:
            return
        if self.step == trainer.global_step:  # a second validation within an accumulation window
            return
        self.step = trainer.global_step
        value = float(trainer.callback_metrics[self.monitor])
        self.reason = trainer.strategy.broadcast(self._judge(trainer, value))
        if self.reason:
            trial_runs.stop_now(trainer)

    def _judge(self, trainer: Trainer, value: float) -> str:
        if trainer.global_rank:
            return ""
        if not math.isfinite(value):
            return f"{self.monitor} was {value} after {self.step} updates"
        if (
            self.report is None
            or not self.report(self.step, value)
            or trial_runs.is_at_end(trainer)
        ):
            return ""
        return f"the pruner stopped it after {self.step} updates"


def add_callback(trainer: Trainer, callback: Callback) -> None:
    """Adds a callback to a Trainer, before its checkpoint callbacks."""
    place = trainer_callbacks.first_checkpoint_callback(trainer)
    trainer_callbacks.callbacks_of(trainer).insert(place, callback)


def score(training: Training, monitor: str, report: Report | None, **options: Any) -> float:
    """Trains, and returns the monitored value of the last validation.

    If the last validation is older than the last update, the module is validated once more.

    Args:
        training: The training.
        monitor: Name of the value.
        report: Reports the value of every validation; None to report nothing.
        options: Further keyword arguments of ``Trainer.fit``.

    Raises:
        PrunedError: If the pruner stops the training, or the value is not finite.
        ValueError: If no value has this name.
    """
    trainer, validations = training.trainer, Validations(monitor, report)
    add_callback(trainer, validations)
    training.fit(**options)
    if validations.reason:
        raise PrunedError(validations.reason)
    metrics = dict(trainer.callback_metrics)
    if validations.is_enabled and validations.step < trainer.global_step:
        trainer.strategy.barrier()
        training.validate()
        metrics |= trainer.callback_metrics
    if monitor not in metrics:
        raise _not_logged(monitor, list(metrics), is_validated=validations.is_enabled)
    value = float(trainer.strategy.broadcast(float(metrics[monitor])))
    if not math.isfinite(value):
        raise PrunedError(f"{monitor} was {value} after {trainer.global_step} updates")
    return value


def run_trial(
    trainings: Trainings,
    values: Mapping[str, Any],
    *,
    monitor: str,
    report: Report | None,
    run: Callable[[Mapping[str, Any], Cost], float] | None = None,
    check_setup: Callable[[Mapping[str, Any]], None] | None = None,
) -> Outcome:
    """Runs one trial. Every process calls it with the same values.

    Args:
        trainings: Builds the training.
        values: The value of each field by path.
        monitor: Name of the monitored value.
        report: Reports the value of every validation, in process 0.
        run: Runs the trial instead of one training; it is given values and cost, and returns the
            monitored value.
        check_setup: Is given the values if they are refused, and raises if others would be, too.

    Returns:
        The outcome. A trial is pruned if the pruner stops it, a constructor refuses a value, the
        monitored value is not finite, StepGuard rejects too many updates, or memory runs out.

    Raises:
        Exception: Any other error of the training.
    """
    cost = Cost()

    def train_once(values: Mapping[str, Any], cost: Cost) -> float:
        with refusals_pruned():
            training = trainings.build(values)
        with updates_counted(training.trainer, cost):
            return score(training, monitor, report)

    loss: float | None = None
    reason = ""
    try:
        loss = (run or train_once)(values, cost)
    except PrunedError as error:
        reason = str(error)
        if isinstance(error, RefusedError) and check_setup is not None:
            check_setup(values)
    gc.collect()  # a Trainer and its module refer to each other
    return Outcome(
        state="pruned" if loss is None else "complete",
        loss=loss,
        reason=reason,
        updates=cost.updates,
        updates_saved=cost.saved,
        seconds=perf_counter() - cost.start,
    )


@contextmanager
def updates_counted(trainer: Trainer, cost: Cost) -> Iterator[None]:
    """Counts the updates of a fit in the block, and raises a PrunedError for expected failures."""
    start = _Start()
    add_callback(trainer, start)
    try:
        yield
    except TooManyRejectionsError as error:
        raise PrunedError(str(error)) from error
    except ValueError as error:
        # A schedule that does not fit into the run is refused when training starts.
        is_setup = start.has_trained or isinstance(error, SetupError)
        if is_setup or not _is_of_package(error):
            raise
        raise RefusedError(f"refused: {error}") from error
    except RuntimeError as error:
        if not trial_runs.is_out_of_memory(trainer, error):
            raise
        reason = f"out of memory: {str(error).splitlines()[0]}"
        if trainer.world_size > 1:
            # The other processes wait in a collective, and cannot be told.
            raise RuntimeError(
                f"{reason} on process {trainer.global_rank} of {trainer.world_size}; start the "
                "study again, which goes on with other values"
            ) from error
        raise PrunedError(reason) from error
    finally:
        cost.updates += max(trainer.global_step - start.step, 0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Start(Callback):
    """Remembers the update at which a fit starts."""

    def __init__(self) -> None:
        self.step, self.has_trained = 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.has_trained = True


def _is_of_package(error: BaseException) -> bool:
    """Returns whether an error was raised in this package."""
    modules = [f.f_globals.get("__name__", "") for f, _ in walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].partition(".")[0] == _PACKAGE


def _not_logged(monitor: str, logged: list[str], *, is_validated: bool) -> SetupError:
    if not is_validated:
        return SetupError(
            f"make_data must return validation data for monitor={monitor!r}, got none; return "
            "(train_loader, val_loader), or pass the name of a value that training logs"
        )
    similar = get_close_matches(monitor, logged, n=1)
    advice = f"did you mean {similar[0]!r}?" if similar else f"logged are {shown(sorted(logged))}"
    return SetupError(
        f"monitor must be the name of a value that the module logs, got {monitor!r}; {advice}"
    )
