"""The hyperparameter study: trials of Optuna over fields of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import check_choice, check_count
from lightning_bigopt.durations.duration import DurationLike
from lightning_bigopt.reporting.study import Direction, StudyTrial
from lightning_bigopt.trainer_access.processes import Processes
from lightning_bigopt.tuning.made_trainings import MadeTrainings
from lightning_bigopt.tuning.optuna_session import OptunaSession
from lightning_bigopt.tuning.random_states import random_states_kept
from lightning_bigopt.tuning.space import Range, Space, checked_space
from lightning_bigopt.tuning.study_result import Study
from lightning_bigopt.tuning.trainings import Trainings
from lightning_bigopt.tuning.trial_loop import TrialLoop
from lightning_bigopt.tuning.trunk_files import trunk_folder
from lightning_bigopt.tuning.trunk_schedule import budgets_in_updates, check_trunk
from lightning_bigopt.type_checks import check_instance

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["run_study", "study"]


def study(
    make_trainer: Callable[..., Trainer],
    make_module: Callable[..., LightningModule],
    *,
    space: Space,
    trials: int = 16,
    make_data: Callable[..., Any] | None = None,
    monitor: str = "val_loss",
    direction: Direction = "minimize",
    sampler: Any = "TPE",
    pruner: Any = "auto",
    storage: Any = None,
    name: str = "study",
    seed: int = 0,
    budgets: Sequence[DurationLike] | None = None,
    folder: str | PathLike[str] | None = None,
) -> Study:
    """Searches the values of fields with Optuna; each trial is a training.

    A trial sets the seeds, builds module, Trainer and data, trains, and is judged by the last
    validation. The path of a field is

    - the name of an argument of ``make_module``, ``make_trainer`` or ``make_data``: ``"lr"``;
    - a field of a callback: ``"EarlyStopping.patience"``, ``"GradientClipping.rule.max_norm"``,
      or short ``"clip.max_norm"``, ``"schedule.decay"``, ``"batch.sizes"``, ``"guard.actions"``;
      its last part suffices if only one field of the callbacks has it;
    - a field of the parameter groups: ``"optimizer.betas"``.

    A callback is made anew from its constructor arguments with the new value, so that its checks
    run again.

    Args:
        make_trainer: Makes the Trainer, with its callbacks, for each trial.
        make_module: Makes the module for each trial.
        space: The range of each field by path: :class:`Log`, :class:`Uniform`, :class:`Integer` or
            :class:`Choice`.
        trials: Trials after which the study ends: complete and pruned ones, those in the storage
            included. Several processes that share a storage may exceed it by one each.
        make_data: Makes the data for each trial: a loader, a pair of loaders for training and
            validation, a datamodule, or a dictionary of arguments of ``Trainer.fit``. None for a
            module that has its loaders.
        monitor: Name of the value that the module logs in its validation.
        direction: ``"minimize"`` or ``"maximize"``.
        sampler: A sampler of Optuna or its name, such as ``"TPE"``, ``"GP"``, ``"Random"`` or
            ``"QMC"``.
        pruner: A pruner of Optuna or its name, such as ``"median"`` or ``"Hyperband"``; None for no
            pruning. ``"auto"`` is ``"median"``, and successive halving over the budgets.
        storage: File ``study.db`` (SQLite) or ``study.journal``, a URL, a storage of Optuna, or
            None for the memory. A study in a storage goes on where it has stopped, and trials of a
            process that has died are repeated.
        name: Name of the study in the storage.
        seed: Seed of the sampler and of every training.
        budgets: Shares of the Trainer's ``max_steps``, or updates, for trials that share a trunk:
            the constant part of the schedule is trained once for each trial, and the cooldown of
            each budget branches off it. The schedule must be of the family of
            :class:`~lightning_bigopt.schedules.WarmupStableDecay`; a warm-up in percent is that of
            the largest budget. None for one training per trial.
        folder: Folder for the checkpoints of trunks, which are removed when their trial has ended;
            None for one beside the storage, or a temporary one.

    Returns:
        Best values, trials, cost and report.

    Raises:
        ValueError: If a path is unknown or ambiguous, an argument is invalid, or every trial has
            failed.

    Example:
        >>> def make_module(lr):
        ...     return MyModule(lr=lr)  # doctest: +SKIP
        >>> found = study(
        ...     make_trainer, make_module, space={"lr": Log(1e-4, 1e-1)}
        ... )  # doctest: +SKIP
        >>> found.best_values  # doctest: +SKIP
        {'lr': 0.0031}
    """
    check_count("seed", seed, minimum=0, hint="write 0")
    trainings = MadeTrainings(make_trainer, make_module, make_data, seed=seed)
    return run_study(
        trainings,
        space=space,
        trials=trials,
        monitor=monitor,
        direction=direction,
        sampler=sampler,
        pruner=pruner,
        storage=storage,
        name=name,
        seed=seed,
        budgets=budgets,
        folder=folder,
    )


def run_study(
    trainings: Trainings,
    *,
    space: Space,
    trials: int,
    monitor: str,
    direction: Direction,
    sampler: Any,
    pruner: Any,
    storage: Any,
    name: str,
    seed: int,
    budgets: Sequence[DurationLike] | None = None,
    folder: str | PathLike[str] | None = None,
) -> Study:
    """Runs a study over trainings; the arguments are those of :func:`study`."""
    ranges = checked_space(space)
    check_count("trials", trials, of="trials", hint="write 16")
    check_choice("direction", direction, Direction)
    for argument, text in {"monitor": monitor, "name": name}.items():
        check_instance(argument, text, str, hint=f"write {argument}='val_loss'")
    with random_states_kept():
        trainer = trainings.prepare(ranges)
        lengths: tuple[int, ...] = ()
        if budgets is not None:
            lengths = budgets_in_updates(budgets, trainer.max_steps)
            check_trunk(trainer, lengths)
        processes = Processes(trainer)
        session = None
        if processes.is_first:
            session = OptunaSession(
                distributions={path: values.distribution() for path, values in ranges.items()},
                trials=trials,
                storage=storage,
                name=name,
                direction=direction,
                sampler=sampler,
                pruner=_pruner(pruner, lengths),
                seed=seed,
            )
        del trainer
        with trunk_folder(folder, storage, processes, is_needed=bool(lengths)) as place:
            trial_loop = TrialLoop(
                trainings, ranges, monitor, processes, session, budgets=lengths, folder=place
            )
            while trial_loop.run_next():
                pass
        result = None if session is None else _result(session, ranges, trainings, monitor)
        if session is not None:
            session.discard_refused()
        found = processes.share(result and replace(result, budgets=lengths))
    assert found is not None  # process 0 has made it
    _check_some_trained(found)
    return found


def _pruner(pruner: Any, budgets: tuple[int, ...]) -> Any:
    """Returns the pruner that ``"auto"`` means; others unchanged."""
    if pruner != "auto":
        return pruner
    if len(budgets) < 2:
        return "median"
    from optuna.pruners import SuccessiveHalvingPruner

    ratio = (budgets[-1] / budgets[0]) ** (1 / (len(budgets) - 1))
    return SuccessiveHalvingPruner(min_resource=budgets[0], reduction_factor=max(2, round(ratio)))


def _result(
    session: OptunaSession, ranges: Mapping[str, Range], trainings: Trainings, monitor: str
) -> Study:
    """Returns the result of a study as plain data."""
    found = Study(
        name=session.study.study_name,
        monitor=monitor,
        direction="minimize" if session.study.direction.name == "MINIMIZE" else "maximize",
        axes=tuple(values.axis(path) for path, values in ranges.items()),
        trials=tuple(session.records()),
        importance=session.importance(),
    )
    if found.best is None:
        return found
    best = {path: ranges[path].decode(found.best.values[path]) for path in ranges}
    return replace(found, best_values=best, config=trainings.config(best))


def _check_some_trained(found: Study) -> None:
    """Raises if no trial has a value, and says why."""
    if found.best is not None or any(_was_compared(trial) for trial in found.trials):
        return
    reasons = list(dict.fromkeys(trial.reason for trial in found.trials if trial.reason))
    if len(reasons) == 1 and reasons[0].startswith("refused: "):
        raise ValueError(
            f"trainings must be built in at least one trial, got {len(found.trials)} refused with "
            f"{reasons[0].removeprefix('refused: ')!r}; correct what it names, and start again"
        )
    raise ValueError(
        f"space must contain values that can be trained, got {len(found.trials)} trials of which "
        f"none was trained to its end ({'; '.join(reasons[:3])}); change the ranges"
    )


def _was_compared(trial: StudyTrial) -> bool:
    return trial.reason.startswith("the pruner") or trial.state == "running"
