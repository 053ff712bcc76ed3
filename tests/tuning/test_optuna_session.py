"""Samplers and pruners by name, and the trials of a session, beside Optuna itself."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lightning_bigopt.tuning import Choice, Integer, Log, Uniform, optuna_session
from lightning_bigopt.tuning.optuna_parts import make_pruner, make_sampler
from lightning_bigopt.tuning.optuna_session import OptunaSession
from lightning_bigopt.tuning.optuna_storage import make_storage
from lightning_bigopt.tuning.trial import Outcome


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def session(**options: Any) -> OptunaSession:
    given: dict[str, Any] = {
        "distributions": {"x": FloatDistribution(0.0, 1.0)},
        "trials": 3,
        "storage": None,
        "name": "study",
        "direction": "minimize",
        "sampler": "random",
        "pruner": None,
        "seed": 0,
    }
    return OptunaSession(**{**given, **options})


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


@pytest.mark.filterwarnings("ignore:.*is experimental:optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TPE", optuna.samplers.TPESampler),
        ("tpe sampler", optuna.samplers.TPESampler),
        ("Random", optuna.samplers.RandomSampler),
        ("GP", optuna.samplers.GPSampler),
        ("NSGAII", optuna.samplers.NSGAIISampler),
        ("NSGAIISampler", optuna.samplers.NSGAIISampler),
    ],
)
def test_sampler_draws_what_optuna_draws_with_the_seed_of_the_trial(name: str, kind: Any):
    distributions = {"x": FloatDistribution(1e-3, 1.0, log=True), "n": IntDistribution(1, 9)}
    ours = optuna.create_study(sampler=make_sampler(name, seed=7))
    oracle = optuna.create_study(sampler=kind(seed=0))
    for number in range(12):
        mine = ours.ask(distributions)
        oracle.sampler = kind(seed=random.Random(f"7/{number}").getrandbits(32))
        theirs = oracle.ask(distributions)
        assert mine.params == theirs.params
        for study, trial in ((ours, mine), (oracle, theirs)):
            study.tell(trial, (trial.params["x"] - 0.1) ** 2 + trial.params["n"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:QMCSampler is experimental")
def test_quasi_random_points_of_two_starts_continue_one_sequence(tmp_path: Path):
    whole = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=5))
    points = [
        whole.ask({"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}).params
        for _ in range(6)
    ]
    distributions = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    found = []
    for _ in range(2):
        storage = tmp_path / "study.db"
        part = session(
            sampler="QMC", seed=5, distributions=distributions, storage=storage, trials=9
        )
        for _ in range(3):
            trial = part.ask()
            assert trial is not None
            found.append(trial.params)
            part.tell(trial.number, Outcome(state="complete", loss=1.0))
    assert found == points


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("median", optuna.pruners.MedianPruner),
        ("SuccessiveHalving", optuna.pruners.SuccessiveHalvingPruner),
        ("successive_halving", optuna.pruners.SuccessiveHalvingPruner),
        ("HyperbandPruner", optuna.pruners.HyperbandPruner),
        (None, optuna.pruners.NopPruner),
        ("none", optuna.pruners.NopPruner),
    ],
)
def test_pruner_by_name(name: Any, kind: Any):
    assert type(make_pruner(name)) is kind
    pruner = optuna.pruners.PercentilePruner(25.0)
    assert make_pruner(pruner) is pruner


def test_ranges_are_distributions_of_optuna():
    assert Log(1e-3, 1).distribution() == FloatDistribution(1e-3, 1.0, log=True)
    assert Uniform(-1, 1).distribution() == FloatDistribution(-1.0, 1.0)
    assert Integer(1, 8).distribution() == IntDistribution(1, 8)
    assert Integer(1, 8, log=True).distribution() == IntDistribution(1, 8, log=True)
    assert Choice([16, "a", None]).distribution() == CategoricalDistribution((16, "a", None))
    pairs = Choice([(0.9, 0.95), (0.9, 0.99)])
    assert pairs.distribution() == CategoricalDistribution(("(0.9, 0.95)", "(0.9, 0.99)"))
    assert pairs.decode("(0.9, 0.99)") == (0.9, 0.99)
    assert Choice([1, True, 1.0]).decode(True) is True


def test_storage_of_each_form(tmp_path: Path):
    assert make_storage(None) is None
    assert make_storage("sqlite:///a.db") == "sqlite:///a.db"
    assert make_storage(tmp_path / "new" / "a.db") == f"sqlite:///{tmp_path / 'new' / 'a.db'}"
    assert isinstance(make_storage(tmp_path / "a.log"), optuna.storages.JournalStorage)


def test_session_ends_after_finished_and_running_trials():
    part = session(trials=3)
    first, second, third = (part.ask() for _ in range(3))
    assert first and second and third  # noqa: PT018
    assert part.ask() is None  # all three are running
    part.tell(first.number, Outcome(state="complete", loss=1.0))
    part.fail(second.number, "a fault")
    fourth = part.ask()  # a failed trial does not count
    assert fourth is not None
    part.tell(third.number, Outcome(state="pruned", reason="too bad", updates=7))
    part.tell(fourth.number, Outcome(state="complete", loss=2.0))
    assert part.ask() is None
    states = {trial.number: (trial.state, trial.reason) for trial in part.records()}
    assert states == {
        0: ("complete", ""),
        1: ("failed", "a fault"),
        2: ("pruned", "too bad"),
        3: ("complete", ""),
    }


def test_values_that_end_their_process_are_tried_three_times():
    part = session(trials=4)
    values = []
    for _ in range(3):
        trial = part.ask()
        assert trial is not None
        values.append(trial.params["x"])
        trial.set_user_attr("pid", dead_process())
    other = part.ask()
    assert other is not None
    assert values[0] == values[1] == values[2] != other.params["x"]
    (failed, running) = part.records()
    assert (failed.number, failed.state, running.number) == (2, "failed", 3)
    assert failed.reason == "its process has ended 3 times with these values"


@pytest.mark.filterwarnings("ignore:.*is experimental:optuna.exceptions.ExperimentalWarning")
@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["TPE", "Random", "GP", "NSGAII", "QMC"])
@pytest.mark.parametrize("has_values", [True, False])
def test_a_killed_study_draws_the_values_of_an_uninterrupted_one(
    sampler: str, has_values: bool, tmp_path: Path
):
    def values(kills: list[int], place: Path) -> list[dict[str, Any]]:
        options: dict[str, Any] = {
            "distributions": {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)},
            "trials": 14,
            "sampler": sampler,
            "storage": place,
        }
        part = session(**options)
        complete = []
        while True:
            if len(complete) in kills:
                kills.remove(len(complete))
                part.repeat_dead_trials()
                trial = part.ask() if has_values else part.study.ask()
                assert trial is not None
                trial.set_user_attr("host", socket.gethostname())
                trial.set_user_attr("pid", dead_process())
                part = session(**options)
            trial = part.ask()
            if trial is None:
                return complete
            complete.append(trial.params)
            loss = (trial.params["x"] - 0.3) ** 2 + (trial.params["y"] - 0.6) ** 2
            part.tell(trial.number, Outcome(state="complete", loss=loss))

    expected = values([], tmp_path / "whole.db")
    assert len(expected) == 14
    assert values([0, 2, 2, 12], tmp_path / "killed.db") == expected


@pytest.mark.parametrize("sampler", ["TPE", "Random"])
def test_interruption_of_the_draw_changes_no_later_value(sampler: str, monkeypatch: Any):
    def values(*interrupted: int) -> list[Any]:
        part, found, draws = session(sampler=sampler, trials=6), [], 0
        suggest = optuna_session.suggest

        def interruptible(*arguments: Any) -> None:
            nonlocal draws
            draws += 1
            if draws in interrupted:
                raise KeyboardInterrupt
            suggest(*arguments)

        with monkeypatch.context() as context:
            context.setattr(optuna_session, "suggest", interruptible)
            while len(found) < 6:
                try:
                    trial = part.ask()
                except KeyboardInterrupt:
                    continue
                assert trial is not None
                found.append(trial.params["x"])
                part.tell(trial.number, Outcome(state="complete", loss=trial.params["x"]))
        return found

    assert values(1, 4) == values()


def test_half_drawn_trial_of_a_dead_process_is_drawn_again_as_a_whole(tmp_path: Path):
    ranges = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}
    options: dict[str, Any] = {"distributions": ranges, "storage": tmp_path / "study.db"}
    whole = session(distributions=ranges).ask()
    assert whole is not None
    half = session(**options).study.ask({"x": ranges["x"]})
    half.set_user_attr("host", socket.gethostname())
    half.set_user_attr("pid", dead_process())
    again = session(**options).ask()
    assert again is not None
    assert again.number == 1
    assert again.params == whole.params


def test_hyperband_draws_other_values_for_each_trial_after_a_kill(tmp_path: Path):
    def draw(kills: set[int]) -> list[Any]:
        options: dict[str, Any] = {
            "pruner": "Hyperband",
            "trials": 14,
            "storage": tmp_path / f"{sorted(kills)}.db",
        }
        part, found = session(**options), []
        while (trial := part.ask()) is not None:
            if len(found) in kills:
                kills.remove(len(found))
                trial.set_user_attr("pid", dead_process())
                part = session(**options)
                continue
            found.append(trial.params["x"])
            for step in range(1, 10):
                trial.report(trial.params["x"], step)
                trial.should_prune()  # the brackets are made here
            part.tell(trial.number, Outcome(state="complete", loss=trial.params["x"]))
        return found

    for kills in ({0}, {2}, {2, 5}):
        values = draw(set(kills))
        assert len(set(values)) == len(values) == 14


def test_two_sessions_repeat_a_dead_trial_once(tmp_path: Path):
    first = session(storage=tmp_path / "study.db")
    trial = first.ask()
    assert trial is not None
    trial.set_user_attr("pid", dead_process())
    second = session(storage=tmp_path / "study.db")
    stale = second.study.get_trials(deepcopy=True)
    first.repeat_dead_trials()
    second.study.get_trials = lambda **_: stale  # type: ignore[method-assign]  # read before
    second.repeat_dead_trials()
    states = [trial.state.name for trial in first.study.get_trials()]
    assert states == ["FAIL", "WAITING"]


def test_finite_grid_ends_the_session():
    sampler = optuna.samplers.GridSampler({"x": [0.25, 0.75]})
    part = session(sampler=sampler, trials=9)
    points = set()
    while (trial := part.ask()) is not None:
        points.add(trial.params["x"])
        part.tell(trial.number, Outcome(state="complete", loss=1.0))
    assert points == {0.25, 0.75}


def test_importance_is_that_of_optuna_and_needs_enough_trials():
    distributions = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    part = session(distributions=distributions, trials=30)
    for number in range(30):
        trial = part.ask()
        assert trial is not None
        loss = trial.params["x"] ** 2 + 0.01 * trial.params["y"]
        part.tell(trial.number, Outcome(state="complete", loss=loss))
        if number == 8:
            assert part.importance() is None
    found = part.importance()
    assert found is not None
    assert found["x"] > 0.9
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    assert found == optuna.importance.get_param_importances(part.study, evaluator=evaluator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "maximize"}, "direction must be that of the study .* 'maximize'"),
        ({"distributions": {"y": FloatDistribution(0, 1)}}, r"got \['y'\] .* made with \['x'\]"),
    ],
)
def test_other_study_in_the_storage_raises(tmp_path: Path, options: Any, message: str):
    first = session(storage=tmp_path / "study.db")
    assert first.ask() is not None
    with pytest.raises(ValueError, match=message):
        session(storage=tmp_path / "study.db", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "new"),
    [
        (FloatDistribution(0, 1), FloatDistribution(0, 2)),
        (FloatDistribution(0.1, 1), FloatDistribution(0.1, 1, log=True)),
        (FloatDistribution(0, 1), IntDistribution(0, 1)),
        (CategoricalDistribution(("a", "b")), CategoricalDistribution(("a", "c"))),
    ],
)
def test_other_ranges_on_the_same_storage_raise_before_a_trial(
    tmp_path: Path, stored: Any, new: Any
):
    first = session(storage=tmp_path / "study.db", distributions={"x": stored})
    assert first.ask() is not None
    with pytest.raises(
        ValueError, match=r"space must be that of the stored study .*; pass another"
    ):
        session(storage=tmp_path / "study.db", distributions={"x": new})
    assert len(first.study.trials) == 1


@pytest.mark.parametrize("method", ["sample_independent", "infer_relative_search_space"])
def test_trial_whose_values_cannot_be_drawn_fails_and_is_not_left_running(method: str):
    def raises(*arguments: Any) -> Any:
        raise RuntimeError("a fault of the sampler")

    part = session(sampler=optuna.samplers.RandomSampler())
    other = part.study.ask()  # of a process that is about to say that it runs it
    setattr(part.study.sampler, method, raises)
    with pytest.raises(RuntimeError, match="a fault of the sampler"):
        part.ask()
    assert [trial.state.name for trial in part.study.trials] == ["RUNNING", "FAIL"]
    assert other.number == 0


def test_last_value_of_a_diverged_trial_is_no_result():
    part = session(direction="maximize")
    for reason in ("val_acc was nan after 8 updates", "the pruner stopped it after 8 updates"):
        trial = part.ask()
        assert trial is not None
        trial.report(0.75, 4)
        part.tell(trial.number, Outcome(state="pruned", reason=reason))
    assert [trial.loss for trial in part.records()] == [None, 0.75]


@pytest.mark.slow
def test_tables_made_by_another_process_at_the_same_time_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    errors = ["table trials already exists", "UNIQUE constraint failed: alembic_version"]
    create = optuna.create_study

    def meets_another_process(**options: Any) -> Any:
        if errors:
            raise RuntimeError(errors.pop())
        return create(**options)

    monkeypatch.setattr(optuna, "create_study", meets_another_process)
    assert session(storage=tmp_path / "study.db").ask() is not None
    errors += ["table trials already exists"] * 100
    with pytest.raises(ValueError, match=r"storage must be a database .* table trials already"):
        session(storage=tmp_path / "study.db")


def test_storage_that_cannot_be_used_raises_before_the_first_trial(tmp_path: Path):
    (tmp_path / "text.db").write_text("no database, but a text that is longer than its header" * 9)
    (tmp_path / "text.journal").write_text("no journal\n")
    (tmp_path / "folder.db").mkdir()
    names = ["text.db", "text.journal", "folder.db", "text.db/below.db"]
    wrong = [str(tmp_path / name) for name in names]
    for storage in [*wrong, "nothing://host/study", f"sqlite:////{tmp_path}/missing/study.db"]:
        with pytest.raises(ValueError, match=r"storage must be .* got .*; pass another file"):
            session(storage=storage)


def test_folder_name_is_kept_by_repetitions_and_by_no_other_study(tmp_path: Path):
    part = session(storage=tmp_path / "study.db")
    first = part.ask()
    assert first is not None
    part.repeat(first.number, reason="interrupted")
    again = session(storage=tmp_path / "study.db")
    second, third = again.ask(), again.ask()
    assert second is not None
    assert third is not None
    assert again.folder_name(second) == part.folder_name(first) != again.folder_name(third)
    (tmp_path / "study.db").unlink()
    other = session(storage=tmp_path / "study.db")
    new = other.ask()
    assert new is not None
    assert new.params == first.params
    assert other.folder_name(new) != part.folder_name(first)
