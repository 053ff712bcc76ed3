"""Checks, after a refused trial, whether the training is refused without its values, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_bigopt.trainer_access import trial_runs
from lightning_bigopt.tuning.trainings import Trainings
from lightning_bigopt.tuning.trial import add_callback
from lightning_bigopt.tuning.trunk_schedule import adapt

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["check_setup"]


def check_setup(trainings: Trainings, values: Mapping[str, Any], budgets: Sequence[int]) -> None:
    """Builds the training with unchanged values and starts it up to its first batch.

    Nothing is checked if a function has no default for a searched argument.

    Args:
        trainings: Builds the training.
        values: The values of the trial that was refused.
        budgets: Budgets in updates; empty without a trunk.

    Raises:
        ValueError: If the training is refused without the values, too.
    """
    unchanged = trainings.unchanged(values)
    if unchanged is None:
        return
    try:
        training = trainings.build(unchanged)
        trainer: Any = training.trainer
        if budgets:
            adapt(trainer, budget=budgets[-1], largest=budgets[-1])
        add_callback(trainer, _EndsBeforeTraining())
        trainer.loggers = trial_runs.silent_loggers(trainer)
        training.fit()
    except ValueError:
        raise
    except Exception:  # noqa: BLE001  # a function may need the values: this says nothing
        return


class _EndsBeforeTraining(Callback):
    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        raise trial_runs.exit_fit(trainer)
