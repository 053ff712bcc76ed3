"""Trains the side of a comparison at one seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.reporting.compared_side import SeedRun
from lightning_bigopt.trainer_access.processes import Processes
from lightning_bigopt.tuning.comparison_folder import ComparisonFolder, fingerprint
from lightning_bigopt.tuning.random_states import seed_apart
from lightning_bigopt.tuning.trainings import Trainings
from lightning_bigopt.tuning.trial import Cost, add_callback, run_trial, score, updates_counted

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SeedRuns"]


@dataclass(frozen=True, kw_only=True)
class SeedRuns:
    """Trains one side at several seeds; every process has one.

    Args:
        trainings: Builds the trainings.
        name: Name of the side.
        values: The tuned values by path.
        monitor: Name of the monitored value.
        processes: The processes of the comparison.
        folder: Keeps the finished trainings; None to keep none.
    """

    trainings: Trainings
    name: str
    values: Mapping[str, Any]
    monitor: str
    processes: Processes
    folder: ComparisonFolder | None

    def run(self, seed: int) -> SeedRun:
        """Trains at one seed, unless the folder holds this training.

        Args:
            seed: Seed of the weights and of the order of the samples.

        Raises:
            ValueError: If the training is refused, or a record cannot be read.
            RuntimeError: If memory runs out.
        """
        folder, trained = self.folder, self._fingerprint()
        if folder is not None:
            kept = self.processes.from_first(lambda: folder.read(trained, seed))
            if kept is not None:
                return kept
        run = self.processes.share(self._train(seed))
        if folder is not None and self.processes.is_first:
            folder.write(run, name=self.name, values=self.values, trained=trained)
        found = run.reason if run.loss is None else f"{self.monitor} {run.loss:.6g}"
        rank_zero_info(f"Seed {seed}, {self.name}: {found}.")
        return run

    def warn_of_others(self) -> None:
        """Warns if the folder holds trainings of a side of this name that are not used."""
        if self.folder is None or not self.processes.is_first:
            return
        if count := self.folder.count_others(self.name, self._fingerprint()):
            rank_zero_warn(
                f"The folder {str(self.folder.folder)!r} contains {count} trainings of {self.name} "
                "with another config, other best values, another monitor or other versions. They "
                "are not used."
            )

    def _fingerprint(self) -> str:
        values = sorted(self.values.items())
        return fingerprint(self.name, self.trainings.identity(), values, self.monitor)

    def _train(self, seed: int) -> SeedRun:
        self.trainings.reseed(seed, is_paired=True)

        def train_once(values: Mapping[str, Any], cost: Cost) -> float:
            training = self.trainings.build(values)
            add_callback(training.trainer, _SameOrder(seed))
            with updates_counted(training.trainer, cost):
                return score(training, self.monitor, None)

        try:
            outcome = run_trial(
                self.trainings, self.values, monitor=self.monitor, report=None, run=train_once
            )
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error  # Trainer.fit turns Ctrl-C into exit(1)
            raise
        if outcome.reason.startswith("refused: "):
            raise ValueError(outcome.reason.removeprefix("refused: "))
        if outcome.reason.startswith("out of memory"):
            raise RuntimeError(f"{self.name}, seed {seed}: {outcome.reason}")
        return SeedRun(
            seed=seed,
            loss=outcome.loss,
            reason=outcome.reason,
            updates=outcome.updates,
            seconds=outcome.seconds,
        )


class _SameOrder(Callback):
    """Sets the seeds again before the loader draws the order of an epoch.

    Otherwise the order would depend on how many random numbers the module has drawn for its weights
    and its dropout, which differs between the sides.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_apart(self.seed, 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0:  # the loader has begun the first epoch before this hook
            seed_apart(self.seed, trainer.current_epoch)
