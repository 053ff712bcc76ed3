"""The verdicts of a comparison, its table, picture and page."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_bigopt import Comparison
from lightning_bigopt.reporting.compared_side import ComparedSide, SeedRun
from lightning_bigopt.reporting.comparison_picture import draw_comparison
from lightning_bigopt.reporting.comparison_report import render_comparison
from lightning_bigopt.reporting.paired_test import paired_test, pairs_needed
from lightning_bigopt.reporting.study import Axis, StudyRecord, StudyTrial

BASE = [2.0, 2.1, 2.2, 2.3]
LOWER = [1.9, 2.02, 2.09, 2.21]  # lower by 0.095 on average: p = 0.0007
ALIKE = [2.01, 2.09, 2.21, 2.295]
SIX, SIX_ALIKE = [*BASE, 2.4, 2.5], [*ALIKE, 2.41, 2.49]
UNCLEAR = [1.96, 2.09, 2.18, 2.3]


def side(name: str, losses: list[float | None], **options: Any) -> ComparedSide:
    updates = options.pop("updates", 100)
    runs = tuple(
        SeedRun(
            seed=number + 1,
            loss=loss,
            reason="" if loss is not None else "val_loss was nan after 40 updates",
            updates=updates if loss is not None else 40,
            seconds=2.0,
        )
        for number, loss in enumerate(losses)
    )
    return ComparedSide(name=name, runs=runs, **options)


def comparison(
    a: list[float | None] | list[float], b: list[float | None] | list[float], **options: Any
) -> Comparison:
    more = {name: options.pop(f"of_{name}", {}) for name in ("a", "b")}
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    test = paired_test(*map(list, zip(*pairs, strict=True))) if len(pairs) > 1 else None
    return Comparison(
        a=side("a.yaml", list(a), **more["a"]),
        b=side("b.yaml", list(b), **more["b"]),
        monitor="val_loss",
        test=test,
        **options,
    )


def search(name: str, best: float, **options: Any) -> StudyRecord:
    trials = tuple(
        StudyTrial(
            number=number,
            state="complete",
            values={name: rate},
            loss=2 + math.log10(rate / best) ** 2,
            updates=100,
            seconds=1.0,
        )
        for number, rate in enumerate((1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 9.5e-2))
    )
    axis = Axis(name=name, low=1e-3, high=1e-1, is_log=True)
    return StudyRecord(name=name, monitor="val_loss", axes=(axis,), trials=trials, **options)


def test_significant_difference_names_the_better_side():
    found = comparison(BASE, LOWER)
    assert found.winner is found.b
    assert found.difference == pytest.approx(-0.095)
    assert found.verdict == (
        "b.yaml is better by 0.095 (95 % interval 0.07446 to 0.1155, p = 0.00068, n = 4)"
    )
    exchanged = comparison(LOWER, BASE)
    assert exchanged.winner is exchanged.a
    assert exchanged.verdict == found.verdict.replace("b.yaml", "a.yaml")


def test_maximized_value_is_better_if_it_is_higher():
    found = comparison(BASE, LOWER, direction="maximize")
    assert found.winner is found.a
    assert found.verdict.startswith("a.yaml is better by 0.095 (95 % interval 0.07446 to 0.1155")


def test_verdict_says_how_many_updates_the_better_side_took():
    found = comparison(BASE, LOWER, of_b={"updates": 60})
    assert found.updates_ratio == pytest.approx(0.6)
    assert "b.yaml is better by 0.095 with 0.60 × the updates of a.yaml (95 %" in found.verdict
    found = comparison(BASE, ALIKE, of_b={"updates": 60})
    assert found.verdict.endswith("; b.yaml has trained 0.60 × the updates of a.yaml")


def test_small_difference_is_noise():
    found = comparison(SIX, SIX_ALIKE)
    assert found.winner is None
    assert found.p_value > 0.5
    smallest = f"{found.detectable_difference:.4g}"
    assert found.verdict.startswith(
        "noise: the difference 0.0008333 is not significant, and the whole interval lies within ± "
        f"{smallest}, the smallest difference that 6 seeds could have shown (95 % interval of b - a"
        f" {found.interval[0]:.4g} to "
    )
    assert found.verdict.endswith("n = 6)")


def test_fewer_than_five_seeds_do_not_show_noise():
    found = comparison(BASE, ALIKE)
    assert max(map(abs, found.interval)) < found.detectable_difference
    assert found.verdict.startswith(
        "inconclusive: the difference 0.00125 is not significant, and without relevant it takes 5 "
        "seeds to call it noise (95 %"
    )
    assert comparison(BASE, ALIKE, relevant=0.1).verdict.startswith("noise: ")


def test_number_of_seeds_that_is_not_above_those_trained_is_left_out():
    assert found_count(comparison(BASE, ALIKE, relevant=0.005)) > 4
    # Half of the relevant difference is the mean: the interval reaches beyond it.
    base = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]
    found = comparison(base, [x + 0.008 + s * 0.012 for x, s in zip(base, SIGNS, strict=True)])
    found = dataclasses.replace(found, relevant=0.016)
    assert found.verdict.startswith("inconclusive: ")
    assert found.test is not None
    assert pairs_needed(found.test.deviation, 0.016) <= 8
    assert "would show" not in found.verdict


SIGNS = (1, -1, 1, -1, 1, -1, 1, -1)


def found_count(found: Comparison) -> int:
    return int(found.verdict.partition("; about ")[2].split()[0])


def test_difference_that_may_matter_is_inconclusive():
    found = comparison(BASE, UNCLEAR)
    assert 0.05 < found.p_value < 0.2
    assert found.winner is None
    assert found.interval[0] < -found.detectable_difference
    assert found.verdict.startswith(
        f"inconclusive: the difference {abs(found.difference):.4g} is not significant, and the "
        f"interval reaches beyond ± {found.detectable_difference:.4g}, the smallest difference "
        "that 4 seeds could have shown (95 % interval of b - a"
    )
    assert " seeds would show 0.0175" in found.verdict


def test_difference_that_matters_decides_between_noise_and_inconclusive():
    # The interval of this difference reaches from about -0.04 to 0.008.
    assert comparison(BASE, UNCLEAR, relevant=0.1).verdict.startswith("noise: ")
    words = "within ± 0.1, the smallest difference that matters"
    assert words in comparison(BASE, UNCLEAR, relevant=0.1).verdict
    found = comparison(BASE, ALIKE, relevant=0.005)
    assert found.verdict.startswith("inconclusive: ")
    assert "the interval reaches beyond ± 0.005, the smallest difference that" in found.verdict
    assert (
        "which is less than the 0.5 that matters" in comparison(BASE, LOWER, relevant=0.5).verdict
    )
    assert "matters" not in comparison(BASE, LOWER, relevant=0.05).verdict


def test_seeds_that_would_show_a_difference_are_those_of_its_power():
    found = comparison(BASE, ALIKE, relevant=0.005)
    count = found_count(found)
    assert found.test is not None
    rng = np.random.default_rng(0)
    draws = 0.005 + found.test.deviation * rng.standard_normal((20_000, count))
    power = np.mean([np.abs(draws.mean(1) / draws.std(1, ddof=1)) * math.sqrt(count) > 2.0])
    assert 0.78 < power < 0.9


def test_diverged_training_is_named_and_its_side_cannot_win():
    found = comparison([2.0, 2.1, 2.2, 2.3, 2.4], [*LOWER, None])
    assert found.test is not None
    assert found.test.count == 4
    assert found.verdict.startswith(
        "b.yaml has diverged at 1 of 5 seeds (5); at the other 4 seeds: b.yaml is better by 0.095"
    )
    assert found.winner is None
    assert found.divergences() == ["b.yaml, seed 5: val_loss was nan after 40 updates"]
    assert found.divergences()[0] in str(found)
    assert "diverged" in str(found).splitlines()[-3]
    assert found.b.updates == 100  # those of the trainings that have not diverged
    # The side that has not diverged can win.
    other = comparison([2.0, 2.1, 2.2, 2.3, None], [*LOWER, 2.3])
    assert other.winner is other.b


def test_means_are_those_of_the_complete_pairs():
    found = comparison([2.0, 2.2, 9.0], [1.0, 1.4, None])
    assert found.pairs == [(2.0, 1.0), (2.2, 1.4)]
    assert found.means == pytest.approx((2.1, 1.2))
    assert found.difference == pytest.approx(-0.9)


@pytest.mark.parametrize("b", [[None, None, 2.2], [None, None, None]])
def test_too_few_pairs_have_no_verdict(b: list[float | None]):
    found = comparison([2.0, 2.1, 2.2], b)
    assert found.winner is None
    assert math.isnan(found.p_value)
    assert math.isnan(found.difference)
    assert found.verdict == (
        f"no verdict: b.yaml has diverged at {b.count(None)} of 3 seeds "
        f"({', '.join(str(n + 1) for n, x in enumerate(b) if x is None)}); a test needs two seeds "
        f"without divergence on both sides, got {3 - b.count(None)}"
    )
    assert "<svg" in render_comparison(found)
    assert "diverged" in str(found)


@pytest.mark.parametrize(("shift", "words"), [(0.0, "are equal"), (-0.25, "differ by -0.25")])
def test_equal_differences_have_no_verdict(shift: float, words: str):
    found = comparison([2.0, 2.25], [2.0 + shift, 2.25 + shift])
    assert found.winner is None
    assert f"no verdict: the sides {words} at every seed (n = 2)" in found.verdict
    assert "<svg" in render_comparison(found)


@pytest.mark.slow
def test_five_percent_of_verdicts_without_an_effect_are_wrong():
    rng = np.random.default_rng(1)
    count, wrong, kinds = 1500, 0, set()
    for _ in range(count):
        base = rng.normal(2.0, 0.1, 8)
        first, second = (base + rng.normal(0, 0.01, 8) for _ in "ab")
        test = paired_test(first.tolist(), second.tolist())
        record = Comparison(a=side("a", []), b=side("b", []), monitor="loss", test=test)
        kinds.add(record.verdict.split()[0])
        wrong += record.winner is not None
    assert kinds == {"a", "b", "noise:", "inconclusive:"}
    assert wrong / count == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / count))


def test_table_has_losses_differences_and_updates():
    found = comparison(BASE, LOWER, of_a={"best_values": {"lr": 0.01234567}}, of_b={"updates": 60})
    lines = str(found).splitlines()
    assert lines[0] == "val_loss of a.yaml (a) and b.yaml (b), minimized"
    assert "a.yaml: lr=0.01235" in lines
    assert "cost: 640 updates in 16 s" in lines
    rows = [line.split() for line in lines[lines.index("") + 1 :]]
    assert rows[0] == ["seed", "a.yaml", "b.yaml", "b", "-", "a"]
    assert rows[1] == ["1", "2.0000", "1.9000", "-0.10000"]
    assert rows[-2] == ["mean", "2.1500", "2.0550", "-0.09500"]
    assert rows[-1] == ["updates", "100", "60"]


def both_searched() -> Comparison:
    return comparison(
        BASE,
        LOWER,
        of_a={"study": search("lr", 1e-2), "best_values": {"lr": 1e-2}, "config": "lr: 0.01\n"},
        of_b={"study": search("optimizer.lr", 9.5e-2), "best_values": {"optimizer.lr": 9.5e-2}},
    )


def test_best_value_at_an_edge_is_said():
    found = both_searched()
    advice = "b.yaml: optimizer.lr = 0.095 is at the upper end of its range; search again from"
    assert [text.startswith(advice) for text in found.edges()] == [True]
    assert advice in str(found)
    assert advice in render_comparison(found)
    assert "and 1,200 updates in 12 s of search" in str(found)


def test_picture_has_pairs_interval_and_searches(tmp_path: Path):
    found = both_searched()
    pairs, differences, searches = draw_comparison(found).axes
    lines = [line.get_ydata().tolist() for line in pairs.lines]
    assert lines[:4] == [[a, b] for a, b in zip(BASE, LOWER, strict=True)]
    assert lines[4:] == [pytest.approx([mean] * 2) for mean in (2.15, 2.055)]
    dots = [c.get_offsets().tolist()[0] for c in differences.collections if len(c.get_offsets())]
    assert dots[:4] == [[n, LOWER[n] - BASE[n]] for n in range(4)]
    (bar,) = differences.containers
    ((low, high),) = (np.array(c.get_segments())[0, :, 1] for c in bar[2])
    assert (low, high) == pytest.approx(found.interval)
    drawn = [line.get_xdata().tolist() for line in searches.lines]
    assert drawn == [[1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 9.5e-2]] * 2
    assert searches.get_xscale() == "log"
    low, high = searches.get_xlim()
    assert low < 1e-3  # the searched range, wider than the trials
    assert high > 1e-1
    assert {text.get_text() for text in searches.get_xticklabels()} >= {"0.001", "0.01", "0.1"}
    assert found.picture(tmp_path / "new" / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in found.picture(tmp_path / "c.svg").read_text()
    assert len(draw_comparison(comparison(BASE, LOWER)).axes) == 2


def test_far_worse_trials_are_drawn_at_the_edge():
    study = search("lr", 1e-2)
    bad = StudyTrial(number=6, state="complete", values={"lr": 0.0999}, loss=1e30)
    study = StudyRecord(name="a", monitor="m", axes=study.axes, trials=(*study.trials, bad))
    options = {"study": study, "best_values": {"lr": 1e-2}}
    found = comparison(BASE, LOWER, of_a=options, of_b=options)
    assert draw_comparison(found).axes[2].get_ylim()[1] < 100


def test_page_shows_everything(tmp_path: Path):
    found = both_searched()
    page = found.report(tmp_path / "new" / "c.html").read_text()
    assert page.count("<svg") == 3
    for text in (
        "Comparison: a.yaml (a) and b.yaml (b)",
        found.verdict.replace("'", "&#39;"),
        "smallest difference that could have been seen",
        "power 0.8, level 0.05, 4 pairs",
        "lr: 0.01",
        "-0.09500",
    ):
        assert text in page
    assert not re.search(r"(src|href)=\"(?!#)", page)  # one file, which loads nothing


def test_names_are_escaped():
    found = Comparison(
        a=side("<a>", [2.0, 2.1]), b=side("a$b$", [1.0, 1.3]), monitor="x", test=None
    )
    page = render_comparison(found)
    assert "<a>" not in page
    assert "&lt;a&gt;" in page
    assert "a$b$" in page


@pytest.mark.parametrize("method", ["report", "picture"])
def test_folder_instead_of_a_file_raises(tmp_path: Path, method: str):
    with pytest.raises(ValueError, match="path must be the name of a file, got the folder"):
        getattr(comparison(BASE, LOWER), method)(tmp_path)
