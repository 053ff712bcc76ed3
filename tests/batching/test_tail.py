"""The tail of an epoch of a GlobalBatchLoader, compared with the windows written out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    BatchSizePolicy,
    BatchSizeRamp,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    SchedulePolicy,
    planned_sizes,
    simulate_exact,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Linear

TAILS = ("keep", "merge", "drop")


def make(length: int, micro: int, *, rank: int = 0, world: int = 1, **options: Any) -> Any:
    loader = GlobalBatchLoader(
        range(length),  # type: ignore[arg-type]
        micro_batch_size=micro,
        collate_fn=list,
        seed=3,
        **options,
    )
    loader.set_rank(rank=rank, world_size=world)
    return loader


def closed_form(length: int, size: int, tail: str) -> list[int]:
    """Returns the samples of the updates of an epoch with a constant global batch."""
    full, rest = divmod(length, size)
    if not full:
        return [rest]
    if not rest or tail == "drop":
        return [size] * full
    return [size] * full + [rest] if tail == "keep" else [size] * (full - 1) + [size + rest]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tail", TAILS)
def test_epochs_of_1_to_40_samples(tail: Any, world: int) -> None:
    for length, size, micro in product(range(1, 41), (1, 2, 5, 8, 13), (1, 3, 8)):
        expected = closed_form(length, size, tail)
        trained: dict[int, list[int]] = {}
        for rank in range(world):
            loader = make(length, micro, rank=rank, world=world, tail=tail)
            loader.set_batch_sizes(lambda size=size: [size] * 100)
            windows = list(loader.windows())
            assert [window.samples for window in windows] == expected
            assert windows[-1].end == length
            assert windows[-1].left_out == length - sum(expected)
            assert not any(window.left_out for window in windows[:-1])
            parts: dict[int, list[int]] = {}
            for index, batch in enumerate(loader):
                part = loader.micro_batch(index)
                parts.setdefault(part.window.position, []).append(part.samples)
                trained.setdefault(part.window.position, []).extend(batch[: part.samples])
                is_last = part.index + 1 == part.window.accumulate
                assert part.left_out == (part.window.left_out if is_last else 0)
            for window in windows:
                of_window = parts[window.position]
                # As few micro-batches as possible, whose samples differ by one at most.
                assert len(of_window) == -(-window.samples // (micro * world))
                assert max(of_window) <= micro
                assert max(of_window) - min(of_window) <= 1
        assert [len(samples) for samples in trained.values()] == expected
        all_samples = [sample for samples in trained.values() for sample in samples]
        assert len(set(all_samples)) == len(all_samples) == sum(expected)


@given(
    length=st.integers(1, 200),
    size=st.integers(1, 60),
    micro=st.integers(4, 9),
    world=st.sampled_from([1, 2, 4]),
    tail=st.sampled_from(["merge", "drop"]),
)
@settings(max_examples=300, deadline=None)
def test_without_a_tail_no_micro_batch_has_one_sample(
    length: int, size: int, micro: int, world: int, tail: Any
) -> None:
    size, length = max(size, 2 * world), max(length, 2 * world)
    for rank in range(world):
        loader = make(length, micro, rank=rank, world=world, tail=tail)
        loader.set_batch_sizes(lambda: [size] * 200)
        assert all(len(batch) > 1 for batch in loader)


def test_drop_leaves_out_other_samples_in_each_epoch_of_a_permutation() -> None:
    left_out = {"permute": [], "sequential": []}
    for shuffle, found in left_out.items():
        loader = make(10, 4, tail="drop", shuffle=shuffle)
        for epoch in range(4):
            loader.epoch = epoch
            found.append(set(range(10)) - {sample for batch in loader for sample in batch})
    assert [len(found) for found in left_out["permute"]] == [2] * 4
    assert len(set(map(frozenset, left_out["permute"]))) > 1
    assert left_out["sequential"] == [{8, 9}] * 4


@pytest.mark.parametrize("tail", TAILS)
def test_loader_resumes_at_every_update(tail: Any) -> None:
    def sizes_from(position: int) -> Any:
        while True:  # a function of the position, as a policy is one of the progress
            size = 3 if position < 9 else 7
            yield size
            position += size

    def of_two_epochs(loader: Any) -> tuple[list[list[int]], list[dict[str, int]]]:
        seen, states = [], [loader.state_dict()]
        loader.set_batch_sizes(lambda: sizes_from(loader.position))
        while loader.epoch < 2:
            windows: dict[int, list[int]] = {}
            for index, batch in enumerate(loader):
                part = loader.micro_batch(index)
                windows.setdefault(part.window.position, []).extend(batch)
                if part.index + 1 == part.window.accumulate:
                    loader.advance(part.window.end - loader.position)
                    states.append(loader.state_dict())
            seen += windows.values()
            assert loader.position == loader.samples
            loader.end_epoch()
        return seen, states

    seen, states = of_two_epochs(make(25, 4, tail=tail))
    lengths = {"keep": [3, 3, 3, 7, 7, 2], "merge": [3, 3, 3, 7, 9], "drop": [3, 3, 3, 7, 7]}
    assert [len(window) for window in seen] == lengths[tail] * 2
    for done, state in enumerate(states[:-1]):
        resumed = make(25, 4, tail=tail)
        resumed.load_state_dict(state)
        assert of_two_epochs(resumed)[0] == seen[done:]


# ------------------------------------------------------------------------------ simulation


@dataclass
class Run:
    """Arguments of a simulated run."""

    policy: BatchSizePolicy
    clock: Any
    budget: int
    micro: int
    world: int
    length: int
    tail: Any

    def options(self) -> dict[str, Any]:
        return {
            "clock": self.clock,
            "budget": self.budget,
            "micro_batch_size": self.micro,
            "world_size": self.world,
            "samples_per_epoch": self.length,
            "tail": self.tail,
        }

    def progress(self, steps: int, samples: int) -> Progress:
        used = {"steps": steps, "samples": samples}[self.clock]
        epochs = samples / self.length
        return Progress(fraction=used / self.budget, steps=steps, samples=samples, epochs=epochs)

    def loop_over_samples(self) -> list[tuple[int, int, int]]:
        """Takes single samples; returns micro-batches, samples and left-out ones of updates."""
        updates, steps, samples = [], 0, 0
        while (progress := self.progress(steps, samples)).fraction < 1:
            size, place = self.policy(progress), samples % self.length
            taken = 0
            while taken < size and place + taken < self.length:
                taken += 1
            rest, left_out = self.length - place - taken, 0
            if 0 < rest < taken and self.tail == "merge":
                taken += rest
            elif 0 < rest < taken and self.tail == "drop":
                left_out = rest
            micro_batches = sum(1 for _ in range(0, taken, self.micro * self.world))
            updates.append((micro_batches, taken, left_out))
            steps, samples = steps + 1, samples + taken + left_out
        return updates


@st.composite
def policies(draw: Any) -> BatchSizePolicy:
    def duration() -> str:
        unit = draw(st.sampled_from(["%", " steps", " samples", " epochs"]))
        return f"{draw(st.integers(1, 100))}{unit}"

    kind = draw(st.sampled_from(["constant", "steps", "ramp", "schedule"]))
    size = st.integers(1, 30)
    if kind == "constant":
        return ConstantBatchSize(draw(size))
    if kind == "steps":
        try:
            return BatchSizeSteps({"0%": draw(size), **{duration(): draw(size) for _ in range(3)}})
        except ValueError:  # thresholds that do not ascend, or equal sizes
            assume(False)
    if kind == "ramp":
        start, end = sorted(draw(st.lists(size, min_size=2, max_size=2, unique=True)))
        return BatchSizeRamp(start, end=end, over=duration())
    return SchedulePolicy(Linear(start=1.0, end=draw(st.floats(0.5, 6))), base=draw(size))


RUNS = st.builds(
    Run,
    policy=policies(),
    clock=st.sampled_from(["steps", "samples"]),
    budget=st.integers(1, 200),
    micro=st.integers(1, 6),
    world=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 40),
    tail=st.sampled_from(TAILS),
)


@given(RUNS)
@settings(max_examples=300, deadline=None)
def test_simulation_equals_the_loop_over_samples(run: Run) -> None:
    horizon = simulate_exact(run.policy, **run.options())
    found = [
        (span.batches, span.global_batch_size, span.left_out)
        for span in horizon.spans
        for _ in range(span.updates)
    ]
    assert found == run.loop_over_samples()
    consumed = sum(span.updates * (span.samples or 0) for span in horizon.spans)
    assert consumed == sum(taken + left_out for _, taken, left_out in found)


@given(RUNS, st.data())
@settings(max_examples=150, deadline=None)
def test_loader_yields_the_simulated_updates_from_any_of_them(run: Run, data: Any) -> None:
    updates = run.loop_over_samples()
    first = data.draw(st.integers(0, len(updates) - 1))
    samples = sum(taken + left_out for _, taken, left_out in updates[:first])
    start, place = run.progress(first, samples), samples % run.length
    loader = make(run.length, run.micro, world=run.world, tail=run.tail)
    loader.position = place
    options = run.options()
    del options["tail"]
    loader.set_batch_sizes(
        lambda: planned_sizes(run.policy, start=start, position=place, **options)
    )
    windows = list(loader.windows())
    assert windows[-1].end == run.length
    found = [(window.accumulate, window.samples, window.left_out) for window in windows]
    # The loader also plans the updates of the epoch beyond the budget.
    planned = updates[first : first + len(found)]
    assert found[: len(planned)] == planned


@pytest.mark.parametrize("tail", ["last", None, True])
def test_other_tails_raise(tail: Any) -> None:
    with pytest.raises(ValueError, match=r"tail must be 'keep', 'merge' or 'drop', got"):
        make(10, 2, tail=tail)
    with pytest.raises(ValueError, match=r"tail must be 'keep', 'merge' or 'drop', got"):
        simulate_exact(
            ConstantBatchSize(2),
            clock="steps",
            budget=3,
            micro_batch_size=2,
            world_size=1,
            samples_per_epoch=10,
            tail=tail,
        )
