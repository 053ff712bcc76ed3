"""NormSpike and LossSpike on recorded runs of real data, clean and with storms of spikes."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.spike_rules import RuleOf01
from benchmarks.storms.replay import draw_storm, replay
from benchmarks.storms.tasks import Task
from lightning_bigopt.gradients import LossSpike, NormSpike

SEEDS = range(2)
PERCEPTRON = Task("MLP", "AdamW")
UPDATES = {PERCEPTRON: 1000, Task("GPT", "AdamW"): 250}


@cache
def recordings(task):
    return [task.train(seed, UPDATES[task]) for seed in SEEDS]


def rejected_share(rule, task):
    """Returns the share of the good updates that a rule rejects in clean runs."""
    runs = [run.norms if rule.quantity == "norm" else run.losses for run in recordings(task)]
    return sum(len(replay(rule, values, {})) for values in runs) / sum(map(len, runs))


def recall(rule, task):
    """Returns the share of the spikes that a rule rejects in eight storms."""
    caught = bad = 0
    for seed, run in zip(SEEDS, recordings(task), strict=True):
        for number in range(4):
            storm = draw_storm(10 * seed + number, len(run.norms))
            caught += len(replay(rule, run.norms, storm) & storm.keys())
            bad += len(storm)
    return caught / bad


@pytest.mark.slow
@pytest.mark.parametrize("task", UPDATES, ids=str)
def test_one_of_a_thousand_good_updates_and_nearly_all_spikes_are_rejected(task):
    assert rejected_share(NormSpike(), task) <= 0.001
    assert recall(NormSpike(), task) >= 0.95


@pytest.mark.slow
def test_spikes_in_swinging_norms_are_rejected_more_often_than_by_version_0_1():
    assert recall(RuleOf01(), PERCEPTRON) < 0.85 < recall(NormSpike(), PERCEPTRON)


def test_rising_and_swinging_norms_of_momentum_are_accepted():
    """The third notebook: the norms rise tenfold in the first updates, and swing afterwards."""
    runs = [Task("MLP", "SGD", warmup=False, size=64).train(seed, 100) for seed in range(10)]
    assert sum(len(replay(RuleOf01(), run.norms, {})) for run in runs) > 10
    assert sum(len(replay(NormSpike(), run.norms, {})) for run in runs) <= 1


@pytest.mark.slow
def test_losses_of_clean_runs_are_accepted():
    assert rejected_share(LossSpike(), PERCEPTRON) == 0


def test_storms_have_the_given_spikes_at_distinct_places():
    storms = [draw_storm(seed, 1000) for seed in range(20)]
    assert len({tuple(storm) for storm in storms}) == 20
    for storm in storms:
        places = sorted(storm)
        assert len(places) == 20
        assert places[0] >= 50
        assert places[-1] < 1000
        bursts = sorted(place for place in places if storm[place].burst)
        assert len(bursts) == 8
        for first in (bursts[0], bursts[4]):
            assert bursts[bursts.index(first) :][:4] == list(range(first, first + 4))
            assert len({storm[first + offset] for offset in range(4)}) == 1
    assert {spike.factor for storm in storms for spike in storm.values()} == {
        10, 30, 100, 300, 1000
    }  # fmt: skip
