"""Progress and Span: amounts in every unit."""

from __future__ import annotations

import pytest

from lightning_bigopt.durations import Progress, Span


def test_progress_in_every_unit():
    progress = Progress(fraction=0.25, steps=10, batches=20, epochs=0.5, samples=320, tokens=4096)
    assert progress.consumed("fraction") == 0.25
    assert [progress.consumed(u) for u in ("steps", "epochs", "samples", "tokens")] == [
        10,
        0.5,
        320,
        4096,
    ]
    assert progress.of("50%") == 0.5
    assert progress.of("5 steps") == 2.0
    assert progress.of("2K tokens") == 2.048
    assert progress.of(0) == float("inf")


def test_span_in_every_unit():
    span = Span(updates=3, batches=2, samples=64)
    assert [span.amount(c) for c in ("steps", "batches", "samples", "tokens")] == [1, 2, 64, None]


@pytest.mark.parametrize("bad", [{"updates": 0}, {"batches": -1}, {"samples": 0}, {"tokens": 0.0}])
def test_empty_span_raises(bad: dict[str, float]):
    (name,) = bad
    with pytest.raises(
        ValueError, match=rf"^Span\.{name} must be (positive and finite|a positive integer), got"
    ):
        Span(**{"updates": 1, **bad})
