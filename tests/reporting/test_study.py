"""The report of a study: positions, edges, picture and page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lightning_bigopt.reporting.study import Axis, StudyTrial
from lightning_bigopt.reporting.study_picture import draw_basin, draw_importance
from lightning_bigopt.reporting.study_report import render_study
from lightning_bigopt.tuning import Study

LR = Axis(name="lr", low=1e-4, high=1e-1, is_log=True)
DECAY = Axis(name="schedule.decay", options=("10%", "20%", "40%"))
TRIALS = (
    StudyTrial(
        number=0,
        state="complete",
        values={"lr": 0.09, "schedule.decay": "20%"},
        loss=1.5,
        updates=40,
        updates_saved=10,
        seconds=2.0,
    ),
    StudyTrial(
        number=1,
        state="pruned",
        values={"lr": 0.001, "schedule.decay": "40%"},
        loss=2.5,
        reason="the pruner stopped it after 20 updates",
        updates=20,
    ),
    StudyTrial(
        number=2,
        state="pruned",
        values={"lr": 0.05, "schedule.decay": "10%"},
        reason="val_loss was nan & <bad> after 4 updates",
        updates=4,
    ),
    StudyTrial(number=3, state="complete", values={"lr": 0.01, "schedule.decay": "10%"}, loss=1.75),
)


def study(**options: Any) -> Study:
    given: dict[str, Any] = {
        "name": "a$b$",
        "monitor": "val_loss",
        "axes": (LR, DECAY),
        "trials": TRIALS,
        "best_values": {"lr": 0.09, "schedule.decay": "20%"},
        "config": "model:\n  lr: 0.09\n",
    }
    return Study(**{**given, **options})


def test_best_trial_and_cost():
    found = study()
    assert (found.best_loss, found.updates, found.updates_saved) == (1.5, 64, 10)
    assert found.best is TRIALS[0]
    assert study(direction="maximize").best is TRIALS[3]
    assert "2 trials complete, 2 pruned" in str(found)
    assert "saved" not in str(found)
    assert "saved 10 of the 74 updates" in str(study(budgets=(10, 40)))


@pytest.mark.parametrize(
    ("axis", "value", "advice"),
    [
        (LR, 0.09, "upper end of its range; search again from 0.01 to 10"),
        (LR, 1.1e-4, "lower end of its range; search again from 1e-06 to 0.001"),
        (LR, 0.01, ""),
        (Axis(name="wd", low=0.0, high=0.3), 0.295, "search again from 0.2 to 0.5"),
        (Axis(name="wd", low=0.0, high=0.3), 0.001, "cannot be widened below 0"),
        (Axis(name="wd", low=0.1, high=0.4), 0.1, "search again from 0 to 0.2"),
        (Axis(name="x", low=-1.0, high=2.0), -1.0, "search again from -3 to 0"),
        (DECAY, "40%", "is the largest option; add options beyond it"),
        (DECAY, "20%", ""),
        (Axis(name="rule", options=("A", "B", "C")), "C", ""),
        (Axis(name="size", options=("16", "32")), "32", ""),
    ],
)
def test_advice_at_the_ends_of_a_range(axis: Axis, value: Any, advice: str):
    found = axis.advice_at_edge(value)
    assert (advice in found) if advice else found == ""


def test_axis_of_a_new_range_contains_the_best_value():
    # The widened range has the width of the old one, and the old end is a third into it.
    text = LR.advice_at_edge(0.1)
    low, high = (float(word) for word in text.rpartition("from ")[2].split(" to "))
    assert math.log10(high / low) == pytest.approx(3, abs=0.01)
    assert math.log10(0.1 / low) == pytest.approx(1, abs=0.01)


def test_picture_has_the_values_and_losses(tmp_path: Path):
    figure = draw_basin(study())
    left, right = (axes for axes in figure.axes if axes.get_visible())
    points = {c.get_label(): c.get_offsets().tolist() for c in left.collections}
    assert points["complete"] == [[0.09, 1.5], [0.01, 1.75]]
    assert points["pruned"] == [[0.001, 2.5], [0.05, 2.5]]  # without a loss: at the upper edge
    assert points["best"] == [[0.09, 1.5]]
    assert left.get_xscale() == "log"
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["10%", "20%", "40%"]
    assert [x for x, _ in next(iter(right.collections)).get_offsets().tolist()] == [1.0, 0.0]
    path = study().picture(tmp_path / "new" / "study.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_bad_trials_are_drawn_at_the_edge():
    bad = StudyTrial(
        number=4, state="complete", values={"lr": 0.09, "schedule.decay": "10%"}, loss=1e30
    )
    figure = draw_basin(study(trials=(*TRIALS, bad)))
    assert figure.axes[0].get_ylim()[1] < 100


def test_bars_show_the_importance():
    figure = draw_importance(study(importance={"lr": 0.75, "schedule.decay": 0.25}))
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75]
    assert [text.get_text().strip() for text in axes.texts] == ["25 %", "75 %"]


def test_page_shows_everything(tmp_path: Path):
    importance = {"lr": 0.75, "schedule.decay": 0.25}
    page = render_study(study(importance=importance, budgets=(10, 40)))
    assert page.count("<svg") == 2
    for text in (
        "Study: a$b$",
        "None: the best values are inside their ranges, or fewer than six trials are",
        "val_loss was nan &amp; &lt;bad&gt; after 4 updates",
        "model:\n  lr: 0.09",
        "saved 10 of the 74 updates",
        "the pruner stopped it after 20 updates",
        "1.5 in trial 0",
    ):
        assert text in page
    path = study().report(tmp_path / "new" / "study.html")
    assert "Not enough complete trials" in path.read_text()


def test_advice_needs_six_complete_trials():
    def trials(count: int) -> Any:
        return tuple(
            StudyTrial(
                number=n,
                state="complete",
                values={"lr": 0.09, "schedule.decay": "20%"},
                loss=2.0 + n,
            )
            for n in range(count)
        )

    assert study(trials=trials(5)).edges() == []
    advice = "lr = 0.09 is at the upper end of its range; search again from 0.01 to 10"
    assert study(trials=trials(6)).edges() == [advice]
    assert advice in render_study(study(trials=trials(6)))


def test_study_without_a_complete_trial_is_drawn():
    found = study(trials=TRIALS[1:3], best_values={}, config="")
    assert found.best is None
    assert found.edges() == []
    assert "Best config" not in render_study(found)


@pytest.mark.parametrize("method", ["report", "picture"])
def test_folder_instead_of_a_file_raises(tmp_path: Path, method: str):
    with pytest.raises(ValueError, match="path must be the name of a file, got the folder"):
        getattr(study(), method)(tmp_path)
