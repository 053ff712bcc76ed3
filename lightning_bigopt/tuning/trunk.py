"""One trunk at a constant learning rate, from which the cooldown of every budget branches off."""

from __future__ import annotations

import inspect
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from lightning_bigopt.batching.randomness import random_state, set_random_state
from lightning_bigopt.trainer_access import trial_runs
from lightning_bigopt.trainer_access.processes import Processes
from lightning_bigopt.tuning.refusals import PrunedError, refusals_pruned
from lightning_bigopt.tuning.trial import Cost, Report, add_callback, score, updates_counted
from lightning_bigopt.tuning.trunk_files import (
    Progress,
    checkpoint_path,
    random_path,
    read_progress,
    write_progress,
)
from lightning_bigopt.tuning.trunk_schedule import adapt, fork_of_run

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bigopt.tuning.trainings import Training, Trainings

__all__ = ["Trunk"]


class Trunk:
    """Trains the trunk of one trial and its branches.

    The trunk is trained up to the update at which the cooldown of the smallest budget begins, and
    saved. A branch resumes from there and trains the cooldown. The trunk then goes on to the next
    budget; the branch of the largest one is the trunk itself. Checkpoints and losses stay in a
    folder until the trial has ended, so that a trial that was interrupted goes on.

    Args:
        trainings: Builds the trainings.
        budgets: Budgets in updates, in ascending order.
        place: Folder for the checkpoints of this trial and its repetitions, of no other one.
        processes: The processes of the study.
        monitor: Name of the monitored value.
        report: Takes budget and value of a branch, in process 0, and returns whether to prune.
    """

    def __init__(
        self,
        trainings: Trainings,
        *,
        budgets: Sequence[int],
        place: Path,
        processes: Processes,
        monitor: str,
        report: Report | None,
    ) -> None:
        self.trainings, self.budgets, self.place = trainings, budgets, place
        self.processes, self.monitor, self.report = processes, monitor, report

    def run(self, values: Mapping[str, Any], cost: Cost) -> float:
        """Runs the branches of one trial in ascending order of their budgets.

        Args:
            values: The value of each field by path.
            cost: Is increased by the updates.

        Returns:
            The monitored value of the largest budget.

        Raises:
            PrunedError: If a branch is pruned.
        """
        try:
            loss = self._run_branches(values, self.place, cost)
        except PrunedError:
            self._remove(self.place)
            raise
        self._remove(self.place)
        return loss

    def _run_branches(self, values: Mapping[str, Any], place: Path, cost: Cost) -> float:
        progress = self._read(values, place)
        cost.updates = progress.updates
        last, start, loss = self.budgets[-1], 0, math.nan
        forks = self._forks(values)
        for budget in self.budgets:
            fork = forks.get(budget, start)
            if budget not in progress.losses:
                if budget < last:
                    self._grow(values, place, start, fork, cost, budget=budget)
                    self._write(place, progress, cost)
                progress.losses[budget] = self._branch(values, place, fork, budget, cost)
                self._write(place, progress, cost)
            loss, start = progress.losses[budget], fork
            cost.saved = sum(progress.losses) - cost.updates
            if self._is_pruned(budget, loss) and budget < last:
                raise PrunedError(f"the pruner stopped it at the budget of {budget} updates")
        return loss

    def _read(self, values: Mapping[str, Any], place: Path) -> Progress:
        """Reads what an interrupted trial has finished under the same conditions."""
        conditions = {
            "values": ", ".join(f"{path}={value!r}" for path, value in values.items()),
            "budgets": list(self.budgets),
            "monitor": self.monitor,
            "seed": repr(self.trainings.seed),
        }
        progress = Progress(conditions=conditions)
        if self.processes.is_first:
            progress = read_progress(place, conditions)
            write_progress(place, progress)  # checkpoints without this file would be discarded
        return self.processes.share(progress)

    def _write(self, place: Path, progress: Progress, cost: Cost) -> None:
        progress.updates = cost.updates
        if self.processes.is_first:
            write_progress(place, progress)

    def _is_pruned(self, budget: int, loss: float) -> bool:
        return self.processes.share(self.report is not None and self.report(budget, loss))

    def _build(self, values: Mapping[str, Any], budget: int) -> Training:
        with refusals_pruned():
            training = self.trainings.build(values)
            adapt(training.trainer, budget=budget, largest=self.budgets[-1])
        return training

    def _forks(self, values: Mapping[str, Any]) -> dict[int, int]:
        """Returns the update at which each budget but the largest leaves the trunk."""
        *smaller, largest = self.budgets
        with refusals_pruned():
            trainer = self._build(values, largest).trainer
            return {budget: fork_of_run(trainer, budget, largest) for budget in smaller}

    def _grow(
        self,
        values: Mapping[str, Any],
        place: Path,
        start: int,
        fork: int,
        cost: Cost,
        *,
        budget: int,
    ) -> None:
        """Trains the trunk from one fork to the next one, unless that is saved already."""
        if fork == 0 or self._is_saved(place, fork):
            return
        training = self._build(values, self.budgets[-1])
        add_callback(training.trainer, _Fork(fork, place, self.processes))
        with updates_counted(training.trainer, cost), _other_folders_allowed():
            training.fit(**self._resume(training, place, start))
        if not self._is_saved(place, fork):
            raise _ended_early(training, budget)

    def _is_saved(self, place: Path, fork: int) -> bool:
        return self.processes.all(random_path(place, fork, self.processes).exists())

    def _branch(
        self, values: Mapping[str, Any], place: Path, fork: int, budget: int, cost: Cost
    ) -> float:
        training = self._build(values, budget)
        with updates_counted(training.trainer, cost), _other_folders_allowed():
            loss = score(training, self.monitor, None, **self._resume(training, place, fork))
        if training.trainer.global_step < budget:
            raise _ended_early(training, budget)
        return loss

    def _resume(self, training: Training, place: Path, fork: int) -> dict[str, Any]:
        if fork == 0:
            return {}
        states = torch.load(random_path(place, fork, self.processes), weights_only=True)
        add_callback(training.trainer, _RandomStates(states))
        found: dict[str, Any] = {"ckpt_path": str(checkpoint_path(place, fork))}
        if "weights_only" in inspect.signature(training.trainer.fit).parameters:
            found["weights_only"] = False  # this study has written it
        return found

    def _remove(self, place: Path) -> None:
        self.processes.barrier()
        if self.processes.is_first:
            shutil.rmtree(place, ignore_errors=True)
        self.processes.barrier()


def _ended_early(training: Training, budget: int) -> PrunedError:
    """Returns the error for a limit or a callback that has ended a training."""
    return PrunedError(
        f"training ended after {training.trainer.global_step} updates, before the budget of "
        f"{budget}"
    )


@contextmanager
def _other_folders_allowed() -> Iterator[None]:
    """Ignores that the log folder of a branch is not that of its trunk."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
        yield


class _Fork(Callback):
    """Saves the trunk after an update, and ends its fit before the next one."""

    def __init__(self, update: int, place: Path, processes: Processes) -> None:
        self.update, self.place, self.processes = update, place, processes

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # callbacks may have a new state
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.update:
            trainer.save_checkpoint(checkpoint_path(self.place, self.update), weights_only=False)

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Saves the random states at the position at which a branch sets them."""
        if trainer.global_step < self.update:
            return
        path = random_path(self.place, self.update, self.processes)
        temporary = path.with_suffix(".tmp")
        torch.save(random_state(trainer.strategy.root_device), temporary)
        temporary.replace(path)  # a file with this name is whole
        raise trial_runs.exit_fit(trainer)


class _RandomStates(Callback):
    """Sets the random states of the trunk before the first batch of a branch."""

    def __init__(self, states: Mapping[str, Any]) -> None:
        self.states: Mapping[str, Any] | None = states

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if self.states is not None:
            set_random_state(self.states, trainer.strategy.root_device)
            self.states = None
