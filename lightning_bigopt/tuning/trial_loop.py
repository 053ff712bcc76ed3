"""Runs the trials of a study one after the other, on all processes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_bigopt.trainer_access.processes import Processes
from lightning_bigopt.tuning.optuna_session import OptunaSession
from lightning_bigopt.tuning.setup_check import check_setup
from lightning_bigopt.tuning.space import Range
from lightning_bigopt.tuning.trainings import Trainings
from lightning_bigopt.tuning.trial import Outcome, Report, run_trial
from lightning_bigopt.tuning.trunk import Trunk

__all__ = ["TrialLoop"]


class TrialLoop:
    """Runs the trials one after the other; every process has one.

    Args:
        trainings: Builds the trainings.
        ranges: The range of each field by path.
        monitor: Name of the monitored value.
        processes: The processes of the study.
        session: The study of Optuna, in process 0.
        budgets: Budgets in updates for trials with a trunk; empty for one training per trial.
        folder: Folder for the checkpoints of trunks.
    """

    def __init__(
        self,
        trainings: Trainings,
        ranges: Mapping[str, Range],
        monitor: str,
        processes: Processes,
        session: OptunaSession | None,
        *,
        budgets: tuple[int, ...],
        folder: Path,
    ) -> None:
        self.trainings, self.ranges, self.monitor = trainings, ranges, monitor
        self.processes, self.session = processes, session
        self.budgets, self.folder = budgets, folder

    def run_next(self) -> bool:
        """Runs the next trial; returns False if there is none."""
        trial = None if self.session is None else self.session.ask()
        request = None
        if trial is not None and self.session is not None:
            name, has_trained = self.session.folder_name(trial), self.session.has_trained()
            request = (trial.number, trial.params, name, has_trained)
        request = self.processes.share(request)
        if request is None:
            return False
        number, stored, folder_name, has_trained = request
        values = {path: self.ranges[path].decode(stored[path]) for path in self.ranges}
        report = None if trial is None else partial(_report, trial)
        try:
            outcome = run_trial(
                self.trainings,
                values,
                monitor=self.monitor,
                report=report,
                run=self._trunk(report, folder_name).run if self.budgets else None,
                check_setup=None if has_trained else self._check_setup,
            )
        except BaseException as error:
            self._record_error(number, stored, error)
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error  # Trainer.fit turns Ctrl-C into exit(1)
            raise
        if self.session is not None:
            self.session.tell(number, outcome)
            rank_zero_info(_line(number, stored, self.monitor, outcome))
        return True

    def _check_setup(self, values: Mapping[str, Any]) -> None:
        check_setup(self.trainings, values, self.budgets)

    def _trunk(self, report: Report | None, folder_name: str) -> Trunk:
        return Trunk(
            self.trainings,
            budgets=self.budgets,
            place=self.folder / folder_name,
            processes=self.processes,
            monitor=self.monitor,
            report=report,
        )

    def _record_error(self, number: int, stored: Mapping[str, Any], error: BaseException) -> None:
        if not isinstance(error, Exception):  # Ctrl-C, or exit: another start tries it again
            if self.session is not None:
                self.session.repeat(number, reason="interrupted")
            return
        text = f"Trial {number} has failed with {_written(stored)}."
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(text)
        else:
            rank_zero_info(text)
        if self.session is not None:
            self.session.fail(number, f"{type(error).__name__}: {error}")


def _report(trial: Any, step: int, value: float) -> bool:
    trial.report(value, step)
    return bool(trial.should_prune())


def _line(number: int, stored: Mapping[str, Any], monitor: str, outcome: Outcome) -> str:
    if outcome.loss is None:
        return f"Trial {number} was pruned with {_written(stored)}: {outcome.reason}."
    return f"Trial {number}: {monitor} {outcome.loss:.6g} with {_written(stored)}."


def _written(stored: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}"
        for path, value in stored.items()
    )
