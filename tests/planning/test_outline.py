"""The outline of a run: which updates it holds, their batches, and the sentence about batches."""

from __future__ import annotations

import pytest
import torch

from lightning_bigopt.durations import Horizon, Progress, Span
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from lightning_bigopt.planning.outline import batch_stages, describe_batches, planned_updates
from lightning_bigopt.schedules import Linear

GROWING = (
    Span(updates=30, batches=1, samples=2),
    Span(updates=50, batches=2, samples=4),
    Span(updates=20, batches=4, samples=8),
)
NO_GROUPS = GroupSchedule([])


def growing(**options: float) -> Horizon:
    return Horizon(clock="steps", budget=100, spans=GROWING, **options)


def amounts() -> list[tuple[int, int, int]]:
    """Counts updates, batches and samples before every update of the growing run, one by one."""
    found, batches, samples = [], 0, 0
    for span in GROWING:
        for _ in range(int(span.updates)):
            found.append((len(found), batches, samples))
            batches += int(span.batches)
            samples += int(span.samples or 0)
    return found


def test_all_updates_have_the_counted_amounts() -> None:
    planned = list(planned_updates(growing(batches_per_epoch=10), NO_GROUPS, points=100))
    counted = amounts()
    assert [(u.progress.steps, u.progress.batches, u.progress.samples) for u in planned] == counted
    assert [u.progress.fraction for u in planned] == [t / 100 for t in range(100)]
    assert [u.progress.epochs for u in planned] == [batches / 10 for _, batches, _ in counted]
    assert [u.global_batch_size for u in planned] == [2] * 30 + [4] * 50 + [8] * 20
    assert [u.batches for u in planned] == [1] * 30 + [2] * 50 + [4] * 20
    assert not any(u.is_share for u in planned)


@pytest.mark.parametrize("points", [1, 2, 3, 7, 50, 99])
def test_chosen_updates_hold_the_first_the_last_and_all_changes(points: int) -> None:
    steps = [u.progress.steps for u in planned_updates(growing(), NO_GROUPS, points=points)]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    changes = [0, 30, 80][:points]
    assert set(changes) <= set(steps)
    assert points <= len(steps) <= points + 3
    if points > 1:
        assert steps[-1] == 99


@pytest.mark.parametrize("first", [1, 29, 30, 31, 98, 99])
def test_updates_before_the_first_are_left_out(first: int) -> None:
    full = {u.progress.steps: u for u in planned_updates(growing(), NO_GROUPS, points=100)}
    rest = list(planned_updates(growing(), NO_GROUPS, points=100, first=first))
    assert [u.progress.steps for u in rest] == list(range(first, 100))
    assert rest == [full[u.progress.steps] for u in rest]


def test_no_update_is_planned_beyond_the_end() -> None:
    assert list(planned_updates(growing(), NO_GROUPS, first=100)) == []


def test_budget_without_spans_gives_fractions() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    groups = GroupSchedule([("", optimizer)])
    groups.claim("lr")
    groups.follow("lr", lambda *_: Linear(), owner=None)
    horizon = Horizon(clock="tokens", budget=1000)
    planned = list(planned_updates(horizon, groups, points=4))
    assert all(update.is_share for update in planned)
    assert [update.progress.fraction for update in planned] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [update.progress.tokens for update in planned] == [0, 250, 500, 750, 1000]
    rates = [update.learning_rates[0].value for update in planned]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    rest = list(planned_updates(horizon, groups, points=4, spent=0.5))
    assert [update.progress.fraction for update in rest] == [0.75, 1.0]
    assert optimizer.param_groups[0]["lr"] == 0.4  # planning writes nothing


def test_batch_stages_are_the_starts_of_new_sizes() -> None:
    def size(progress: Progress) -> int:
        return 8 if progress.steps >= 80 else 2

    stages = list(batch_stages(growing(), size))
    assert [(start.steps, start.samples, now) for start, now in stages] == [(0, 0, 2), (80, 260, 8)]


def test_describe_batches_hides_the_middle_of_many_changes() -> None:
    changes = [(Progress(fraction=0.0, steps=10 * i), 2 * i) for i in range(1, 11)]
    assert describe_batches("2", changes, updates=None) == (
        "Global batch 2; 4 from update 20; 6 from update 30; 8 from update 40; 10 from update 50; "
        "12 from update 60; … 3 more …; 20 from update 100."
    )
    assert describe_batches("2", changes[:1], updates=7.0) == "Global batch 2; 7 updates."
