"""Compares two trainings: each at its own best values, paired by seed, with a t-test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_bigopt.checks import as_code
from lightning_bigopt.reporting.compared_side import ComparedSide, SeedRun
from lightning_bigopt.reporting.paired_test import PairedTest, paired_test
from lightning_bigopt.reporting.study import Direction
from lightning_bigopt.trainer_access.processes import Processes
from lightning_bigopt.tuning.comparison_folder import ComparisonFolder, fingerprint
from lightning_bigopt.tuning.comparison_plan import ComparisonPlan
from lightning_bigopt.tuning.comparison_result import Comparison
from lightning_bigopt.tuning.hyperparameter_study import run_study
from lightning_bigopt.tuning.made_trainings import MadeTrainings
from lightning_bigopt.tuning.random_states import random_states_kept
from lightning_bigopt.tuning.seed_runs import SeedRuns
from lightning_bigopt.tuning.side import Side
from lightning_bigopt.tuning.space import Range, Space
from lightning_bigopt.tuning.study_result import Study
from lightning_bigopt.tuning.trainings import Trainings
from lightning_bigopt.tuning.tuned_ranges import tuned_ranges
from lightning_bigopt.type_checks import check_instance

__all__ = ["compare", "run_comparison"]


def compare(
    a: Side,
    b: Side,
    *,
    seeds: int | Sequence[int] = 8,
    tune: str | Sequence[str] | None = None,
    tune_b: str | Sequence[str] | None = None,
    space: Space | None = None,
    trials: int = 16,
    monitor: str = "val_loss",
    direction: Direction = "minimize",
    sampler: Any = "TPE",
    pruner: Any = "auto",
    seed: int = 0,
    relevant: float | None = None,
    folder: str | PathLike[str] | None = None,
) -> Comparison:
    """Compares two trainings, each at its own best values, with a paired t-test.

    First a :func:`study` searches the best values of each side, with the same number of trials,
    sampler, pruner and seed. Then each side trains with its best values at the same seeds. A seed
    sets the initial weights, the data and the order of the samples, also where the sides draw
    different numbers of random values; a loader with a seed of its own keeps it. The seeds of the
    comparison are others than that of the search, whose best loss is a little too good by the
    choice.

    Args:
        a: The first side.
        b: The second side, which may train another number of updates.
        seeds: Number of seeds, which are ``seed + 1``, ``seed + 2``, …; or the seeds.
        tune: Paths of the fields to tune, as for :func:`study`, such as ``"lr"``; None to compare
            the sides as they are.
        tune_b: Paths for the second side if they differ, such as ``"optimizer.lr"``.
        space: The range of each path. A learning rate may be left out: it is searched from a
            sixteenth of its value to sixteen times it.
        trials: Trials of each search.
        monitor: Name of the value that the modules log in their validations. The value at the end
            of the training counts.
        direction: ``"minimize"`` or ``"maximize"``.
        sampler: As for :func:`study`.
        pruner: As for :func:`study`.
        seed: Seed of the samplers, and of every training of a search.
        relevant: The smallest difference of the monitored value that matters, positive. An interval
            that contains such a difference makes a result that is not significant inconclusive.
            None for the smallest difference that the seeds could have shown.
        folder: Keeps searches and finished trainings, so that a comparison that was interrupted
            goes on, or one with more seeds uses them. Another config, other values or versions are
            trained anew. Of functions the source text counts, with defaults and outer variables,
            but not the code of what they call.

    Returns:
        Losses by seed, test, verdict and report.

    Raises:
        ImportError: If scipy is not installed.
        ValueError: If an argument is invalid, a tuned field has no effect on a minimized value in
            three or more trials, or every trial of a search has failed.

    Warns:
        UserWarning: If a best value is at an end of its range, the folder has trainings of another
            config, or all trials have the same value, as an accuracy may.

    Example:
        >>> found = compare(
        ...     Side(name="cosine", make_trainer=with_cosine, make_module=MyModule),
        ...     Side(name="linear", make_trainer=with_linear, make_module=MyModule),
        ...     tune="lr",
        ... )  # doctest: +SKIP
        >>> found.verdict  # doctest: +SKIP
        'linear is better by 0.031 (95 % interval 0.012 to 0.05, p = 0.0063, n = 8)'
    """
    plan = ComparisonPlan(
        seeds=seeds,
        tune=tune,
        tune_b=tune_b,
        space=space,
        trials=trials,
        monitor=monitor,
        direction=direction,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
        relevant=relevant,
        folder=folder,
    )
    made = []
    for argument, side in (("a", a), ("b", b)):
        check_instance(argument, side, Side, hint="write Side(make_trainer=..., make_module=...)")
        made.append(MadeTrainings(side.make_trainer, side.make_module, side.make_data, seed=seed))
    return run_comparison((made[0], made[1]), names=(a.name or "a", b.name or "b"), plan=plan)


def run_comparison(
    trainings: tuple[Trainings, Trainings], *, names: tuple[str, str], plan: ComparisonPlan
) -> Comparison:
    """Runs a comparison.

    Args:
        trainings: The trainings of both sides.
        names: Their names.
        plan: The options.

    Raises:
        ImportError: If scipy is not installed.
        ValueError: As :func:`compare` does.
    """
    if find_spec("scipy") is None:
        raise ImportError(
            "scipy must be installed to test a comparison; run pip install "
            "'lightning-bigopt[laws]', or 'lightning-bigopt[tune]' to tune, too"
        )
    if names[0] == names[1]:
        names = (f"{names[0]} (a)", f"{names[1]} (b)")
    seeds = [own.seed for own in trainings]
    with random_states_kept():
        entrants = [
            _Entrant(
                name=name,
                trainings=own,
                ranges=tuned_ranges(own, paths, plan.space, name=name),
                plan=plan,
            )
            for name, own, paths in zip(names, trainings, plan.paths, strict=True)
        ]
        processes = _processes(entrants)
        place = None
        if (folder := plan.folder) is not None:
            place = processes.from_first(lambda: ComparisonFolder(folder))
        studies = [entrant.search(place) for entrant in entrants]
        _check_same_trials(names, studies)
        best = [{} if study is None else study.best_values for study in studies]
        trained = [
            SeedRuns(
                trainings=entrant.trainings,
                name=entrant.name,
                values=values,
                monitor=plan.monitor,
                processes=processes,
                folder=place,
            )
            for entrant, values in zip(entrants, best, strict=True)
        ]
        for each in trained:
            each.warn_of_others()
        # Seed by seed, so that an interrupted comparison has pairs.
        pairs = [(trained[0].run(seed), trained[1].run(seed)) for seed in plan.seed_numbers]
    for own, seed in zip(trainings, seeds, strict=True):
        own.reseed(seed)  # that of the user in the configs of the result
    first, second = (
        ComparedSide(
            name=name,
            runs=tuple(pair[index] for pair in pairs),
            best_values=best[index],
            config=trainings[index].config(best[index]),
            study=studies[index],
        )
        for index, name in enumerate(names)
    )
    result = Comparison(
        a=first,
        b=second,
        monitor=plan.monitor,
        direction=plan.direction,
        test=_test(pairs),
        relevant=plan.relevant,
    )
    if edges := result.edges():
        rank_zero_warn(f"{'; '.join(edges)}. Until then such a side is not at its best.")
    return result


@dataclass(frozen=True, kw_only=True)
class _Entrant:
    """One side before it has trained."""

    name: str
    trainings: Trainings
    ranges: Mapping[str, Range]
    plan: ComparisonPlan

    def search(self, place: ComparisonFolder | None) -> Study | None:
        """Searches the best values; returns None if there is nothing to tune."""
        self.trainings.reseed(self.plan.seed)
        if not self.ranges:
            return None
        rank_zero_info(f"Tuning {', '.join(self.ranges)} of {self.name}.")
        # All that the values of its trials depend on: another search has another name.
        plan, ranges = self.plan, sorted(self.ranges.items())
        search = (plan.monitor, plan.direction, as_code(plan.sampler), as_code(plan.pruner))
        key = fingerprint(self.trainings.identity(), ranges, search, plan.seed)
        found = run_study(
            self.trainings,
            space=self.ranges,
            trials=plan.trials,
            monitor=plan.monitor,
            direction=plan.direction,
            sampler=plan.sampler,
            pruner=plan.pruner,
            storage=None if place is None else place.storage,
            name=f"{self.name} {key}",
            seed=plan.seed,
        )
        self._check(found)
        return found

    def _check(self, found: Study) -> None:
        """Raises if the search has no result, or the tuned fields have no effect."""
        complete = [trial for trial in found.trials if trial.state == "complete"]
        if not complete:
            raise ValueError(
                f"trials must be enough for one that completes, got {len(found.trials)} of "
                f"{self.name} without ({found.states()}); increase trials, or write pruner=None"
            )
        values = {tuple(sorted(trial.values.items(), key=str)) for trial in complete}
        if len(values) > 1 and len({trial.loss for trial in complete}) == 1:
            text = (
                f"tune must name fields that change the training, got {list(self.ranges)} of "
                f"{self.name}, with which {len(complete)} trials have the same {found.monitor} "
                f"{complete[0].loss}; name the field that is used, such as 'optimizer.lr'"
            )
            # Few trials, or an accuracy, may be equal by chance.
            if len(complete) >= 3 and self.plan.direction == "minimize":
                raise ValueError(text)
            rank_zero_warn(f"{text}. Ignore this if the value is one of few, as an accuracy is.")


def _check_same_trials(names: Sequence[str], studies: Sequence[Study | None]) -> None:
    """Raises if a search in the folder has gone on for longer than the other one."""
    counts = [
        0 if study is None else sum(t.state in ("complete", "pruned") for t in study.trials)
        for study in studies
    ]
    if 0 not in counts and counts[0] != counts[1]:
        listed = " and ".join(f"{c} of {name}" for name, c in zip(names, counts, strict=True))
        raise ValueError(
            f"trials must be the same number on both sides, got {listed}, as the folder contains "
            f"a longer search; write trials={max(counts)}, or choose another folder"
        )


def _processes(entrants: Sequence[_Entrant]) -> Processes:
    """Starts the processes; raises if the sides train on different numbers of them."""
    trainers = [entrant.trainings.prepare(entrant.ranges) for entrant in entrants]
    counts = [int(trainer.world_size) for trainer in trainers]
    if counts[0] != counts[1]:
        raise ValueError(
            "the sides must train on the same number of processes, got "
            + " and ".join(f"{c} for {e.name}" for c, e in zip(counts, entrants, strict=True))
            + "; write the same devices and num_nodes"
        )
    return Processes(trainers[0])


def _test(pairs: Sequence[tuple[SeedRun, SeedRun]]) -> PairedTest | None:
    """Returns the test of the pairs in which no side has diverged; None with fewer than two."""
    complete = [
        (first.loss, second.loss)
        for first, second in pairs
        if first.loss is not None and second.loss is not None
    ]
    if len(complete) < 2:
        return None
    return paired_test([first for first, _ in complete], [second for _, second in complete])
