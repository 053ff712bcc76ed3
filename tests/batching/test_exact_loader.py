"""The exact loader, compared with a sample-by-sample implementation of its documentation."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from lightning_bigopt.batching import (
    BatchSizeSteps,
    GlobalBatchLoader,
    planned_sizes,
)
from lightning_bigopt.durations import Progress


class Indices(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


class Augmented(Indices):
    """Samples drawn from all three random generators."""

    def __getitem__(self, index):
        return index, torch.rand(()).item(), random.random(), np.random.random()  # noqa: NPY002  (datasets call it)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def as_list(batch):
    return list(batch)


def make(length, micro, *, rank=0, world=1, sizes=None, **options):
    kind = options.pop("kind", Indices)
    loader = GlobalBatchLoader(kind(length), micro_batch_size=micro, collate_fn=as_list, **options)
    loader.set_rank(rank=rank, world_size=world)
    if sizes is not None:
        loader.set_batch_sizes(lambda: sizes_from(sizes, loader.position))
    return loader


def sizes_from(sizes, position):
    """Returns fixed global batches, from the update that starts at ``position``."""
    place = 0
    for size in sizes:
        if place >= position:
            yield size
        place += size
    while True:
        yield sizes[-1]


def epoch(loader):
    return [(batch, loader.micro_batch(index)) for index, batch in enumerate(loader)]


def batches_sample_by_sample(order, micro, world, sizes):
    """Computes the batches of each rank as (indices, samples that count), sample by sample."""
    yielded = {rank: [] for rank in range(world)}
    place, sizes = 0, iter(sizes)
    while place < len(order):
        window = order[place : place + next(sizes)]
        place += len(window)
        by_rank = [[] for _ in range(world)]
        for index, sample in enumerate(window):
            by_rank[index % world].append(sample)
        pieces = 1
        while pieces * micro * world < len(window):
            pieces += 1
        for rank, mine in enumerate(by_rank):
            lengths = [0] * pieces
            for n in range(len(mine)):
                lengths[n % pieces] += 1
            left = list(mine)
            for length in lengths:
                batch, left = left[:length], left[length:]
                yielded[rank].append((batch or [window[0]], length))
    return yielded


# -------------------------------------------------------------------------------- batches


@given(
    length=st.integers(1, 60),
    micro=st.integers(1, 6),
    world=st.sampled_from([1, 2, 3, 4]),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    epoch_number=st.integers(0, 3),
)
@settings(deadline=None)
def test_every_batch_equals_the_sample_by_sample_one(length, micro, world, sizes, epoch_number):
    loaders = [
        make(length, micro, rank=rank, world=world, sizes=sizes, seed=5) for rank in range(world)
    ]
    for loader in loaders:
        loader.epoch = epoch_number
    one = make(length, length, seed=5, sizes=[length])
    one.epoch = epoch_number
    order = [sample for batch in one for sample in batch]
    assert sorted(order) == list(range(length))
    expected = batches_sample_by_sample(order, micro, world, sizes_from(sizes, 0))
    for rank, loader in enumerate(loaders):
        found = [(batch, micro_batch.samples) for batch, micro_batch in epoch(loader)]
        assert found == expected[rank]
        assert all(batch and len(batch) <= micro for batch, _ in found)


@given(
    length=st.integers(1, 60),
    micro=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_updates_do_not_depend_on_the_number_of_processes(length, micro, sizes):
    def updates(world):
        streams = [
            epoch(make(length, micro, rank=rank, world=world, sizes=sizes)) for rank in range(world)
        ]
        assert len({len(stream) for stream in streams}) == 1, "collectives would not match"
        found = {}
        for row in zip(*streams, strict=True):
            windows = {micro_batch.window for _, micro_batch in row}
            assert len(windows) == 1
            window = windows.pop()
            lanes = found.setdefault(window.position, [[] for _ in range(world)])
            for lane, (batch, micro_batch) in zip(lanes, row, strict=True):
                lane.extend(batch[: micro_batch.samples])
        return {
            position: [
                lane[turn]
                for turn in range(max(map(len, lanes)))
                for lane in lanes
                if turn < len(lane)
            ]
            for position, lanes in found.items()
        }

    alone = updates(1)
    assert updates(2) == alone
    assert updates(4) == alone
    assert sorted(sample for samples in alone.values() for sample in samples) == list(range(length))


@given(
    length=st.integers(1, 40),
    micro=st.integers(1, 5),
    world=st.sampled_from([1, 2, 4]),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=50)
def test_weighted_mean_of_micro_batches_is_the_mean_over_samples(length, micro, world, sizes):
    truth = np.random.default_rng(0).normal(size=length)
    totals, windows = {}, {}
    for rank in range(world):
        for batch, micro_batch in epoch(make(length, micro, rank=rank, world=world, sizes=sizes)):
            window = micro_batch.window
            share = micro_batch.weight * truth[batch].mean() / window.accumulate / world
            totals[window] = totals.get(window, 0.0) + share
            windows.setdefault(window, []).extend(batch[: micro_batch.samples])
    for window, samples in windows.items():
        assert len(samples) == window.samples
        assert totals[window] == pytest.approx(truth[samples].mean(), abs=1e-12)


def test_gradient_of_an_uneven_window_is_the_mean_over_its_samples():
    x, y = torch.randn(7, 3), torch.randn(7)
    model = nn.Linear(3, 1)

    def gradient(rows):
        loss = (model(x[rows]).squeeze(1) - y[rows]).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    total = [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(4):
        for batch, micro_batch in epoch(make(7, 1, rank=rank, world=4, sizes=[7])):
            for into, part in zip(total, gradient(batch), strict=True):
                into.add_(micro_batch.weight * part / micro_batch.window.accumulate / 4)
    for found, expected in zip(total, gradient(list(range(7))), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_equal_micro_batches_have_weight_one_exactly():
    for rank in range(3):
        for _, micro_batch in epoch(make(7 * 3 * 5 * 2, 7, rank=rank, world=3, sizes=[105])):
            assert micro_batch.weight == 1.0


def test_order_depends_on_epoch_and_seed_unless_sequential():
    def order(**options):
        number = options.pop("epoch", 0)
        loader = make(50, 8, **options)
        loader.epoch = number
        return [sample for batch in loader for sample in batch]

    assert order() == order()
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
    # ``torch.initial_seed()`` may be any number below 2**64.
    assert len({tuple(order(seed=s, epoch=0)) for s in (-1, 1, 2**63 + 5, 2**64 - 1)}) == 4
    assert order(shuffle="sequential", epoch=2) == list(range(50))


# ------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_at_every_update_yields_the_rest(world):
    sizes, length = [3, 5, 5, 1, 8], 41
    for rank in range(world):
        whole = make(length, 2, rank=rank, world=world, sizes=sizes, seed=9)
        stream, states = [], []
        for _ in range(2):
            states.append((len(stream), whole.state_dict()))
            for batch, micro_batch in epoch(whole):
                stream.append(batch)
                if micro_batch.index == micro_batch.window.accumulate - 1:
                    whole.advance(micro_batch.window.samples)
                    states.append((len(stream), whole.state_dict()))
            whole.end_epoch()
        assert whole.epoch == 2
        for at, state in states:
            resumed = make(length, 2, rank=rank, world=world, sizes=sizes, seed=9)
            resumed.load_state_dict(state)
            rest = []
            while resumed.epoch < 2:
                rest += [batch for batch, _ in epoch(resumed)]
                resumed.epoch, resumed.position = resumed.epoch + 1, 0
            assert rest == stream[at:]


def test_state_is_plain_data_and_resumes_on_another_number_of_processes():
    sizes = [6, 6, 4]
    one = make(30, 2, sizes=sizes)
    one.advance(6)
    state = one.state_dict()
    assert all(type(value) is int for value in state.values())
    assert pickle.loads(pickle.dumps(state)) == state
    rest = {}
    for rank in (0, 1):
        two = make(30, 2, rank=rank, world=2, sizes=sizes)
        two.advance(6)
        assert two.state_dict() == state
        two = make(30, 2, rank=rank, world=2, sizes=sizes)
        two.load_state_dict(state)
        for batch, micro_batch in epoch(two):
            rest.setdefault(micro_batch.window.position, []).extend(batch[: micro_batch.samples])
    expected = {}
    for batch, micro_batch in epoch(one):
        expected.setdefault(micro_batch.window.position, []).extend(batch)
    assert {k: sorted(v) for k, v in rest.items()} == {k: sorted(v) for k, v in expected.items()}


def test_second_end_epoch_does_nothing():
    loader = make(10, 2)
    loader.end_epoch()
    assert (loader.epoch, loader.position) == (0, 0)
    loader.advance(10)
    state = loader.state_dict()
    loader.end_epoch()
    loader.end_epoch()
    assert (loader.epoch, loader.position) == (1, 0)
    resumed = make(10, 2)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.position) == (1, 0)
    resumed.advance(10)
    assert len(list(resumed)) == 5
    assert (resumed.epoch, resumed.position) == (2, 0)


def test_iteration_does_not_change_the_position():
    loader = make(10, 2)
    list(loader)
    assert (loader.epoch, loader.position) == (0, 0)
    iterator = iter(loader)
    next(iterator)
    assert list(loader) == [*list(make(10, 2))]


@pytest.mark.parametrize(("change", "name"), [({"length": 11}, "samples"), ({"seed": 1}, "seed")])
def test_other_data_or_another_seed_raises_inside_an_epoch_only(change, name):
    loader = make(10, 2)
    other = {"length": 10, **change}
    fresh = loader.state_dict()
    loader.advance(4)
    twin = make(other.pop("length"), 2, **other)
    with pytest.raises(ValueError, match=rf"{name} must be the checkpoint's .*inside an epoch"):
        twin.load_state_dict(loader.state_dict())
    twin.load_state_dict(fresh)


# ---------------------------------------------------------------------------------- workers


def test_workers_do_not_change_the_batches():
    sizes = [3, 9, 2, 2, 7, 7, 11]
    for position in (0, 12):
        alone, helped = make(60, 4, sizes=sizes), make(60, 4, sizes=sizes, num_workers=2)
        alone.position = helped.position = position
        assert epoch(alone) == epoch(helped)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_do_not_change(workers):
    legacy = np.random.mtrand._rand  # the generator of np.random.rand
    before = torch.get_rng_state(), random.getstate(), legacy.get_state()[1].tolist()
    for randomness in ("ambient", "sample"):
        list(make(20, 4, num_workers=workers, randomness=randomness))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert legacy.get_state()[1].tolist() == before[2]


def test_sample_stream_depends_on_seed_epoch_and_index_alone():
    def samples(*, rank=0, world=1, workers=0, position=0, number=0):
        loader = make(
            24,
            3,
            rank=rank,
            world=world,
            sizes=[6],
            num_workers=workers,
            randomness="sample",
            kind=Augmented,
        )
        loader.epoch, loader.position = number, position
        return {row[0]: row[1:] for batch in loader for row in batch}

    torch.manual_seed(1)
    expected = samples()
    torch.manual_seed(2)
    assert samples() == expected
    assert samples(rank=0, world=2) | samples(rank=1, world=2) == expected
    assert samples(workers=2) == expected
    rest = samples(position=12)
    assert rest.items() <= expected.items()
    assert len(rest) == 12
    assert len(set(expected.values())) == 24
    assert samples(number=1).items().isdisjoint(expected.items())


def test_ambient_workers_are_seeded_from_seed_epoch_position_and_rank():
    def drawn(position, *, seed=0, rank=0):
        loader = make(16, 4, num_workers=1, kind=Augmented, seed=seed, rank=rank, world=2)
        loader.position = position
        return [row[1:3] for batch in loader for row in batch][:4]

    torch.manual_seed(1)
    first = drawn(8)
    torch.manual_seed(2)
    assert drawn(8) == first
    assert len({tuple(x) for x in (first, drawn(0), drawn(8, seed=1), drawn(8, rank=1))}) == 4


# ----------------------------------------------------------------------------- batch sizes


def test_planned_sizes_of_a_policy():
    policy = BatchSizeSteps({"0%": 4, "50%": 10})
    loader = make(25, 3)

    def sizes():
        samples = 25 * loader.epoch + loader.position
        return planned_sizes(
            policy,
            start=Progress(fraction=samples / 50, samples=samples),
            position=loader.position,
            clock="samples",
            budget=50,
            micro_batch_size=3,
            world_size=1,
            samples_per_epoch=25,
        )

    loader.set_batch_sizes(sizes)
    assert [window.samples for window in loader.windows()] == [4, 4, 4, 4, 4, 4, 1]
    loader.epoch = 1
    assert [window.samples for window in loader.windows()] == [10, 10, 5]
    loader.epoch, loader.position = 0, 20
    assert [window.samples for window in loader.windows()] == [4, 1]


def test_lower_and_future_micro_batches_raise():
    loader = make(12, 2)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    assert loader.micro_batch(0) == loader.micro_batch(0)
    assert loader.micro_batch(1).window.position == 2
    for index in (0, 2, 7):
        with pytest.raises(ValueError, match=r"index must be that of a batch yielded"):
            loader.micro_batch(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batch_size": 0}, r"micro_batch_size must be a positive"),
        ({"dataset": Indices(0)}, r"dataset must not be empty"),
        ({"dataset": Stream()}, r"dataset must have a length"),
        ({"dataset": object()}, r"dataset must have a length .* got an object"),
        ({"shuffle": "yes"}, r"shuffle must be 'permute' or 'sequential', got 'yes'"),
        ({"randomness": "own"}, r"randomness must be 'ambient' or 'sample', got 'own'"),
        ({"options": {"batch_size": 3}}, r"options must not contain batch_size"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchLoader(**{"dataset": Indices(3), "micro_batch_size": 1, **arguments})


def test_invalid_calls_raise():
    loader = make(10, 2)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        loader.set_rank(rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"samples must be from 0 to the 10 left .* got 11"):
        loader.advance(11)
    loader.set_batch_sizes(lambda: [4, 4])
    with pytest.raises(ValueError, match=r"sizes must reach the end .* sample 8 of 10"):
        list(loader)
    loader.set_batch_sizes(lambda: [4, 0])
    with pytest.raises(ValueError, match=r"sizes must be a positive number .* got 0"):
        list(loader)


def test_loader_is_no_dataloader_and_has_no_length():
    loader = make(10, 2)
    assert not isinstance(loader, torch.utils.data.DataLoader)
    assert not hasattr(loader, "__len__")


def test_method_names_of_version_0_1_work():
    loader = make(10, 2)
    loader.place(rank=1, world_size=2)
    loader.plan(lambda: [10])
    assert (loader.rank, loader.world_size) == (1, 2)
    assert [window.samples for window in loader.windows()] == [10]
