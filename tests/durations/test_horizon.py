"""Conversion of durations to fractions of a budget, compared with counting update by update."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.durations import Horizon, Span

CLOCKS = ("steps", "batches", "samples", "tokens")
spans = st.lists(
    st.builds(
        Span,
        updates=st.integers(1, 20),
        batches=st.integers(1, 4),
        samples=st.integers(1, 64),
        tokens=st.integers(1, 999),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


def count(run: tuple[Span, ...]) -> list[dict[str, int]]:
    """Returns the amounts consumed before every update, and at the end."""
    rows = [dict.fromkeys(CLOCKS, 0)]
    for span in run:
        each = {"steps": 1, **{c: getattr(span, c) for c in CLOCKS[1:]}}
        for _ in range(span.updates):
            rows.append({clock: rows[-1][clock] + each[clock] for clock in CLOCKS})
    return rows


@given(spans, st.sampled_from(CLOCKS), st.sampled_from(CLOCKS), st.data())
def test_conversion_agrees_with_counting(run, clock: str, unit: str, data: st.DataObject):
    rows = count(run)
    horizon = Horizon(clock=clock, budget=rows[-1][clock], spans=run, batches_per_epoch=5)
    begin = data.draw(st.integers(0, len(rows) - 1))
    end = data.draw(st.integers(begin, len(rows) - 1))
    amount = rows[end][unit] - rows[begin][unit]
    share = (rows[end][clock] - rows[begin][clock]) / rows[-1][clock]
    length = f"{amount / 5!r} epochs" if unit == "batches" else f"{amount} {unit}"
    start, stop = (rows[row][clock] / rows[-1][clock] for row in (begin, end))
    assert horizon.fraction(length, start=start) == pytest.approx(share, abs=1e-9)
    assert horizon.fraction(length, stop=stop) == pytest.approx(share, abs=1e-9)
    assert horizon.total(unit) == pytest.approx(rows[-1][unit])


@given(spans, st.sampled_from(CLOCKS), st.sampled_from(CLOCKS[2:]), st.data())
def test_part_of_a_run_converts_as_the_whole_run(run, clock: str, unit: str, data: st.DataObject):
    rows = count(run)
    budget = rows[-1][clock]
    horizon = Horizon(clock=clock, budget=budget, spans=run)
    begin = data.draw(st.integers(0, len(rows) - 2))
    middle = data.draw(st.integers(begin, len(rows) - 1))
    end = data.draw(st.integers(begin + 1, len(rows) - 1))
    part = horizon.span(rows[begin][clock] / budget, rows[end][clock] / budget)
    length = f"{rows[middle][unit] - rows[begin][unit]} {unit}"
    inside = (rows[middle][clock] - rows[begin][clock]) / (rows[end][clock] - rows[begin][clock])
    assert part.fraction(length) == pytest.approx(inside, abs=1e-9)
    assert part.total(unit) == pytest.approx(rows[end][unit] - rows[begin][unit])


@given(spans, st.sampled_from(CLOCKS), st.sampled_from(CLOCKS[2:]))
def test_axis_contains_every_update(run, clock: str, unit: str):
    rows = count(run)
    axis = Horizon(clock=clock, budget=rows[-1][clock], spans=run).axis(f"1 {unit}")
    assert axis[0] == (0.0, 0.0)
    assert axis[-1] == (1.0, pytest.approx(rows[-1][unit]))
    for row in rows:
        share = row[clock] / rows[-1][clock]
        right = next(i for i, (at, _) in enumerate(axis) if at >= share - 1e-12 and i)
        (x0, y0), (x1, y1) = axis[right - 1], axis[right]
        on_line = y0 + (y1 - y0) * (share - x0) / (x1 - x0)
        assert on_line == pytest.approx(row[unit], abs=1e-6 * rows[-1][unit])


def test_axis_of_a_part_begins_at_zero():
    run = (Span(updates=10, samples=10), Span(updates=10, samples=30))
    part = Horizon(clock="steps", budget=20, spans=run).span(0.25, 1.0)
    corners = [(0.0, 0.0), (pytest.approx(1 / 3), 50.0), (1.0, 350.0)]
    assert list(part.axis("1 sample")) == corners


def test_run_with_equal_updates_has_an_axis_of_two_points():
    assert Horizon.of_steps(10, samples_per_step=32).axis("5 samples") == ((0.0, 0.0), (1.0, 320))
    assert Horizon.of_steps(10, steps_per_epoch=4).axis("1 epoch") == ((0.0, 0.0), (1.0, 2.5))
    assert Horizon.of_steps(10).axis("5%") == ((0.0, 0.0), (1.0, 1.0))
    two = (Span(updates=5, samples=8), Span(updates=5, samples=8))
    assert len(Horizon(clock="steps", budget=10, spans=two).axis("1 sample")) == 2


def test_conversion_beyond_the_run_continues_with_the_last_updates():
    run = (Span(updates=10, samples=8), Span(updates=10, samples=16))
    horizon = Horizon(clock="steps", budget=20, spans=run)
    assert horizon.fraction("400 samples") == 30 / 20


def test_update_that_crosses_the_end_counts_in_full():
    horizon = Horizon(clock="samples", budget=1000, spans=(Span(updates=4, samples=300),))
    assert horizon.total("steps") == 4
    assert horizon.total("samples") == 1000
    assert horizon.fraction("2 steps") == 0.6


@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_steps_of_steps_are_exact(total: int, steps: int):
    assert Horizon.of_steps(total).fraction(steps) == steps / total


def test_fraction_of_an_update_is_exact_in_the_unit_of_the_budget():
    horizon = Horizon.of_steps(1000)
    assert all(horizon.fraction(f"{k / 10}%") == k / 1000 for k in range(1001))


def test_unknown_unit_raises_with_a_remedy():
    horizon = Horizon(clock="samples", budget=1e6)
    assert horizon.fraction("250000 samples") == 0.25
    assert horizon.fraction("25%") == 0.25
    assert horizon.total("steps") is None
    with pytest.raises(
        ValueError, match=r"^warmup must be in samples or percent here, got '5 steps"
    ):
        horizon.fraction(5, name="warmup")
    with pytest.raises(
        ValueError, match="known in advance in samples: with an adaptive batch size"
    ):
        horizon.axis("5 steps")
    with pytest.raises(ValueError, match="decay must not be in epochs if the length of an epoch"):
        horizon.fraction("2 epochs", name="decay")
    with pytest.raises(ValueError, match="known in advance in tokens"):
        Horizon.of_steps(10).fraction("5 tokens")


class TestShares:
    def test_follow_each_other(self):
        run = (Span(updates=10, samples=10), Span(updates=10, samples=30))
        horizon = Horizon(clock="steps", budget=20, spans=run)
        assert horizon.shares({"a": "50%", "b": "150 samples"}) == pytest.approx((0.5, 0.25))
        assert horizon.shares({"a": "100 samples", "b": "300 samples"}) == pytest.approx((0.5, 0.5))

    def test_parts_that_end_with_the_budget_are_counted_from_its_end(self):
        run = (Span(updates=10, samples=10), Span(updates=10, samples=30))
        horizon = Horizon(clock="steps", budget=20, spans=run)
        lengths = {"warmup": "50 samples", "hold": "150 samples", "decay": "150 samples"}
        shares = horizon.shares(lengths, last=["hold", "decay"])
        assert shares == pytest.approx((0.25, 0.25, 0.25))

    def test_last_part_ends_with_the_budget(self):
        run = (Span(updates=10, samples=10), Span(updates=10, samples=30))
        horizon = Horizon(clock="steps", budget=20, spans=run)
        lengths = {"hold": "50 samples", "decay": "300 samples"}
        assert horizon.shares(lengths, last=list(lengths)) == pytest.approx((0.25, 0.5))

    def test_keep_the_order_of_the_names(self):
        horizon = Horizon.of_steps(10)
        assert horizon.shares({"a": 1, "b": 2, "c": 3}, last=["a"]) == (0.1, 0.2, 0.3)
        assert horizon.shares({}) == ()

    def test_may_fill_the_whole_budget(self):
        for total in range(1, 200):
            shares = Horizon.of_steps(total).shares({f"update {i}": 1 for i in range(total)})
            assert shares == (1 / total,) * total
        rounded_up = {"warmup": 0.75, "decay": 0.25 + 1e-12}
        assert Horizon.of_steps(7).shares(rounded_up) == (0.75, 0.25 + 1e-12)

    def test_must_fit_into_the_budget(self):
        with pytest.raises(
            ValueError,
            match=r"^warmup \+ decay must be at most the whole budget \(10 steps\), got "
            r"warmup='6 steps' \+ decay='50%'; shorten it, or train longer$",
        ):
            Horizon.of_steps(10).shares({"warmup": 6, "decay": "50%"})

    def test_are_compressed_in_a_fast_dev_run(self):
        tiny = Horizon(clock="steps", budget=1, overlong="compress")
        assert tiny.shares({"warmup": 30, "decay": 10}) == (0.75, 0.25)
        assert tiny.span(0.5, 1.0).overlong == "compress"


class TestSpan:
    def test_fraction_inside_a_span(self):
        inner = Horizon.of_steps(1000).span(0.5, 1.0).span(0.2, 0.6)
        assert (inner.offset, inner.budget) == (600, pytest.approx(200))
        assert inner.fraction("100 steps") == pytest.approx(0.5)
        assert inner.fraction("50%") == 0.5

    @pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.6, 0.5)])
    def test_must_not_be_empty(self, start: float, stop: float):
        with pytest.raises(ValueError, match="budget must be positive and finite, got"):
            Horizon.of_steps(10).span(start, stop)


@pytest.mark.parametrize("budget", [0, -5, float("inf"), float("nan")])
def test_budget_must_be_positive(budget: float):
    with pytest.raises(ValueError, match="budget must be positive and finite, got"):
        Horizon(clock="steps", budget=budget)


def test_offset_must_not_be_negative():
    with pytest.raises(ValueError, match="offset must be non-negative and finite, got -1"):
        Horizon(clock="steps", budget=10, offset=-1)


@pytest.mark.parametrize("name", ["total_steps", "samples_per_step", "tokens_per_step"])
def test_counts_must_be_positive(name: str):
    counts = {"total_steps": 10, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0; "):
        Horizon.of_steps(counts.pop("total_steps"), **counts)


def test_equality_ignores_cached_values():
    one, other = Horizon.of_steps(10, samples_per_step=2), Horizon.of_steps(10, samples_per_step=2)
    one.fraction("4 samples")
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == other


def test_axis_in_epochs_of_a_loader_that_counts_samples():
    """The epochs of a GlobalBatchLoader are counted in samples: 3 epochs of 6 samples."""
    spans = (Span(updates=2, samples=6), Span(updates=2, samples=3))
    horizon = Horizon(clock="samples", budget=18, spans=spans, samples_per_epoch=6)
    assert horizon.axis("2 epochs") == ((0.0, 0.0), (1.0, 3.0))
    by_steps = Horizon(clock="steps", budget=4, spans=spans, samples_per_epoch=6)
    assert by_steps.axis("2 epochs") == ((0.0, 0.0), (0.5, 2.0), (1.0, 3.0))
