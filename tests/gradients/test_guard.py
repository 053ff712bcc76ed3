from __future__ import annotations

import copy
import io
import math
import random

import pytest
import torch

from lightning_bigopt.gradients import (
    Abort,
    Backoff,
    ClipToMedian,
    LossSpike,
    NonFinite,
    NormSpike,
    Skip,
    inspect,
    record,
)
from tests.oracles import gradients as oracle


class Guarded:
    """Detectors with their states."""

    def __init__(self, *detectors):
        self.detectors = detectors
        self.states = [detector.initial_state() for detector in detectors]

    def accepts(self, **readings):
        before = copy.deepcopy(self.states)
        verdict = inspect(self.detectors, self.states, readings)
        assert self.states == before  # looking changes nothing
        record(self.detectors, self.states, readings, verdict)
        return verdict is None


def storm(length, *, seed=0, rate=0.05):
    """Norms of a run that falls slowly, with spikes alone and in bursts, NaN and inf."""
    rng = random.Random(seed)
    burst = 0
    for step in range(length):
        if burst == 0 and rng.random() < rate:
            burst = rng.choice((1, 1, 4, 9))
        norm = math.exp(rng.gauss(-step / length, 0.15))
        if burst:
            burst -= 1
            norm = rng.choice((norm * 10, norm * 1000, math.nan, math.inf))
        yield norm


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("window", "armed", "patience"), [(128, 32, 5), (16, 4, 2), (8, 8, 1)])
def test_norm_spike_equals_the_rule_as_it_is_told(seed, window, armed, patience):
    guard = Guarded(NonFinite(), NormSpike(window, armed=armed, max_rejections=patience))
    truth = oracle.SpikeGuard(window, armed, 6.0, 4.0, patience)
    decisions = [(guard.accepts(norm=g), truth.accepts(g)) for g in storm(600, seed=seed)]
    assert [a for a, _ in decisions] == [b for _, b in decisions]
    assert {a for a, _ in decisions} == {True, False}


def test_nothing_is_rejected_until_armed():
    guard = Guarded(NormSpike(armed=32))
    assert all(guard.accepts(norm=1.0) for _ in range(31))
    assert guard.accepts(norm=1e6)
    assert not guard.accepts(norm=1e6)


def test_norms_that_fall_while_the_rate_warms_up_do_not_blind_it():
    """A deviation from one median would take in the whole fall: a limit of hundreds of medians."""
    guard = Guarded(NormSpike())
    rng = random.Random(0)
    norms = [math.exp(rng.gauss(0.8 - 2.4 * min(t, 100) / 100, 0.15)) for t in range(140)]
    for t, norm in enumerate(norms):
        if t >= 60 and t % 5 == 0:
            assert not guard.accepts(norm=10 * norm), t
        else:
            assert guard.accepts(norm=norm), t


def test_rising_norms_are_no_spikes():
    guard = Guarded(NormSpike())
    rng = random.Random(0)
    assert all(guard.accepts(norm=math.exp(0.03 * t + rng.gauss(0, 0.05))) for t in range(400))


def test_the_even_norms_of_good_batches_may_triple():
    """Seen on clean text: a spread of 6 % about the median, and single norms of 1.7 to 3 times."""
    guard = Guarded(NormSpike())
    rng = random.Random(0)
    for t in range(1000):
        assert guard.accepts(norm=math.exp(rng.gauss(0, 0.06)) * (3.0 if t % 50 == 49 else 1.0))
    assert not guard.accepts(norm=5.0)


def test_spikes_are_found_and_do_not_move_the_window():
    guard = Guarded(NonFinite(), NormSpike())
    found = 0
    for step in range(1000):
        norm = math.exp(random.gauss(0, 0.2))
        if step > 100 and step % 20 == 0:
            found += not guard.accepts(norm=norm * 30)
        else:
            assert guard.accepts(norm=norm)
    assert found == len(range(120, 1000, 20))


def test_after_five_rejections_the_regime_has_changed():
    guard = Guarded(NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    assert [guard.accepts(norm=50.0) for _ in range(12)] == [False] * 5 + [True] * 7
    assert not guard.accepts(norm=5000.0)
    assert guard.accepts(norm=50.0)


def test_a_good_step_after_five_rejections_is_no_new_regime():
    guard = Guarded(NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    assert not any(guard.accepts(norm=50.0) for _ in range(5))
    assert guard.accepts(norm=1.0)
    assert not guard.accepts(norm=50.0)


def test_a_good_step_ends_the_count_of_rejections():
    guard = Guarded(NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    for _ in range(10):
        assert [guard.accepts(norm=g) for g in (50.0,) * 4 + (1.0,)] == [False] * 4 + [True]


def test_non_finite_rejections_are_not_counted():
    guard = Guarded(NonFinite(), NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    before = copy.deepcopy(guard.states)
    assert not any(guard.accepts(norm=bad) for bad in (math.nan, math.inf) * 20)
    assert guard.states == before
    assert not guard.accepts(norm=50.0)


def test_a_zero_norm_is_accepted_and_forgotten():
    guard = Guarded(NormSpike(armed=2))
    assert all(guard.accepts(norm=g) for g in (1.0, 0.0, 1.0, 0.0))
    assert guard.states[0]["accepted"] == [0.0, 0.0]


def test_the_norm_detector_alone_leaves_what_is_not_finite_to_the_other():
    guard = Guarded(NormSpike(armed=2))
    for _ in range(4):
        guard.accepts(norm=1.0)
    assert guard.accepts(norm=math.nan)
    assert guard.states[0]["accepted"] == [0.0] * 4


def test_loss_spike_looks_at_negative_losses_too():
    guard = Guarded(NonFinite(), LossSpike(armed=8))
    for step in range(20):
        assert guard.accepts(norm=1.0, loss=-5.0 + 0.01 * (step % 3))
    assert not guard.accepts(norm=1.0, loss=-3.5)
    assert guard.accepts(norm=1.0, loss=-4.0)
    assert guard.accepts(norm=1.0, loss=-400.0)
    assert guard.accepts(norm=1.0)  # no loss, no opinion


def test_a_rejection_by_one_detector_does_not_count_with_another():
    guard = Guarded(NormSpike(armed=4), LossSpike(armed=4))
    for _ in range(10):
        guard.accepts(norm=1.0, loss=1.0)
    accepted = list(guard.states[0]["accepted"])
    assert not guard.accepts(norm=1.0, loss=99.0)
    assert guard.states[0] == {"accepted": accepted, "rejected": []}
    assert guard.states[1]["rejected"] == [99.0]


def test_the_verdict_says_why():
    detectors, norm = (NonFinite(), NormSpike(armed=4)), {"norm": 100.0}
    states = [d.initial_state() for d in detectors]
    for _ in range(4):
        record(detectors, states, {"norm": 2.0}, None)
    verdict = inspect(detectors, states, norm)
    assert (verdict.detector, verdict.quantity, verdict.value) == ("NormSpike", "norm", 100.0)
    assert verdict.limit == pytest.approx(8.0)
    assert verdict.reason == "the gradient norm is 100, typically 2, at most 8"
    assert inspect(detectors, states, {"norm": math.nan}).detector == "NonFinite"


@pytest.mark.parametrize("stop", [0, 20, 40, 41, 45, 60])
def test_resumed_decides_as_uninterrupted(stop):
    detectors = (NonFinite(), NormSpike(armed=16, max_rejections=3))
    norms = list(storm(150, rate=0.2))
    straight = Guarded(*detectors)
    expected = [straight.accepts(norm=g) for g in norms]
    first = Guarded(*detectors)
    for norm in norms[:stop]:
        first.accepts(norm=norm)
    file = io.BytesIO()
    torch.save(first.states, file)
    file.seek(0)
    resumed = Guarded(*detectors)
    resumed.states = torch.load(file, weights_only=True)
    assert [resumed.accepts(norm=g) for g in norms[stop:]] == expected[stop:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormSpike(0), "window must be a positive integer, got 0"),
        (lambda: NormSpike(8), "armed must be at most window, got 32 with window=8"),
        (lambda: NormSpike(armed=0), "armed must be a positive integer, got 0"),
        (lambda: NormSpike(threshold=0.0), "threshold must be positive and finite, got 0.0"),
        (lambda: NormSpike(ratio=1.0), "ratio must be above 1, got 1.0"),
        (lambda: NormSpike(ratio=math.inf), "ratio must be positive and finite, got inf"),
        (lambda: LossSpike(floor=math.nan), "floor must be positive and finite, got nan"),
        (lambda: LossSpike(max_rejections=-1), "max_rejections must be a positive integer, got -1"),
        (lambda: Backoff(1.0), r"factor must be in \(0, 1\), got 1.0"),
        (lambda: Backoff(recover=0), "recover must be a positive integer, got 0"),
        (lambda: Abort(0), "after must be a positive integer, got 0"),
    ],
)
def test_bad_arguments_name_constraint_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_backoff_recovers_in_its_time_and_never_beyond_one():
    backoff = Backoff(0.25, recover=10)
    state = backoff.initial_state()
    backoff.reject(state)
    backoff.reject(state)
    assert state["level"] == 0.0625
    levels = []
    for _ in range(20):
        backoff.accept(state)
        levels.append(state["level"])
    assert levels == sorted(levels)
    assert levels[-1] == 1.0
    backoff.reject(state)
    for _ in range(10):
        backoff.accept(state)
    assert state["level"] == pytest.approx(1.0)


def test_abort_counts_only_in_a_row():
    abort = Abort(3)
    state = abort.initial_state()
    assert not abort.reject(state)
    assert not abort.reject(state)
    abort.accept(state)
    assert [abort.reject(state) for _ in range(3)] == [False, False, True]


def test_specifications_are_values():
    assert NormSpike() == NormSpike(128, armed=32, threshold=6.0, ratio=4.0, max_rejections=5)
    assert len({Skip(), Skip(), ClipToMedian(), Abort(), Backoff(), NonFinite()}) == 5
