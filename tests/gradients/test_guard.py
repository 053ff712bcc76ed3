"""Detectors of bad updates: NonFinite, NormSpike, LossSpike; Backoff."""

from __future__ import annotations

import copy
import io
import itertools
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


class DetectorsWithState:
    """Detectors with their states."""

    def __init__(self, *detectors):
        self.detectors = detectors
        self.states = [detector.initial_state() for detector in detectors]

    def accepts(self, **readings):
        before = copy.deepcopy(self.states)
        verdict = inspect(self.detectors, self.states, readings)
        assert self.states == before  # decide does not change the state
        record(self.detectors, self.states, readings, verdict)
        return verdict is None


def norms_with_spikes(length, *, seed=0, rate=0.05):
    """Yields slowly falling norms with single spikes, bursts, NaN and inf."""
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
def test_norm_spike_equals_its_documented_rule(seed, window, armed, patience):
    guard = DetectorsWithState(NonFinite(), NormSpike(window, armed=armed, max_rejections=patience))
    truth = oracle.SpikeGuard(window, armed=armed, patience=patience)
    decisions = [
        (guard.accepts(norm=g), truth.accepts(g)) for g in norms_with_spikes(600, seed=seed)
    ]
    assert [a for a, _ in decisions] == [b for _, b in decisions]
    assert {a for a, _ in decisions} == {True, False}


def test_nothing_is_rejected_until_armed():
    guard = DetectorsWithState(NormSpike(armed=32))
    assert all(guard.accepts(norm=1.0) for _ in range(31))
    assert guard.accepts(norm=1e6)
    assert not guard.accepts(norm=1e6)


def test_spikes_are_found_while_norms_fall_during_a_warmup():
    """The deviation from a single median would include the whole fall and hide the spikes."""
    guard = DetectorsWithState(NormSpike())
    rng = random.Random(0)
    norms = [math.exp(rng.gauss(0.8 - 2.4 * min(t, 100) / 100, 0.15)) for t in range(140)]
    for t, norm in enumerate(norms):
        if t >= 60 and t % 5 == 0:
            assert not guard.accepts(norm=10 * norm), t
        else:
            assert guard.accepts(norm=norm), t


def test_rising_norms_are_accepted():
    guard = DetectorsWithState(NormSpike())
    rng = random.Random(0)
    assert all(guard.accepts(norm=math.exp(0.03 * t + rng.gauss(0, 0.05))) for t in range(400))


def test_norms_of_three_times_the_median_are_accepted():
    """Clean text has a spread of 6 % about the median, and single norms of up to 3 times it."""
    guard = DetectorsWithState(NormSpike())
    rng = random.Random(0)
    for t in range(1000):
        assert guard.accepts(norm=math.exp(rng.gauss(0, 0.06)) * (3.0 if t % 50 == 49 else 1.0))
    assert not guard.accepts(norm=6.0)


def swinging_norms(length):
    """Returns norms between 1 and 64 that double for six updates and halve for six."""
    exponents = [*range(7), *range(5, 0, -1)]
    return [2.0 ** exponents[t % 12] for t in range(length)]


def test_norms_that_swing_are_accepted_and_spikes_above_them_are_rejected():
    """Six standard deviations are a factor of 78, so those alone accept spikes below 600."""
    guard = DetectorsWithState(NormSpike())
    assert all(guard.accepts(norm=norm) for norm in swinging_norms(240))
    assert guard.accepts(norm=127.0)  # the second largest of the last half is 64
    assert not guard.accepts(norm=129.0)
    without = DetectorsWithState(NormSpike(margin=math.inf))
    assert all(without.accepts(norm=norm) for norm in swinging_norms(240))
    assert without.accepts(norm=500.0)


@pytest.mark.parametrize("margin", [1.5, 3.0])
def test_one_accepted_spike_does_not_raise_the_limit(margin):
    guard = DetectorsWithState(NormSpike(armed=32, margin=margin))
    for norm in (1e6, *swinging_norms(48)):  # the spike comes before the detector is armed
        assert guard.accepts(norm=norm)
    assert not guard.accepts(norm=margin * 64.0 + 1.0)
    assert guard.accepts(norm=margin * 64.0 - 1.0)


def test_infinite_margin_leaves_the_limit_by_the_spread():
    rng = random.Random(0)
    norms = [math.exp(rng.gauss(0, 0.5)) for _ in range(400)]
    rule = NormSpike(margin=math.inf)
    state = rule.initial_state()
    for norm in norms:
        rule.accept(norm, state)
    scores = [math.log(norm) for norm in norms[-128:]]
    steps = sorted(abs(b - a) for a, b in itertools.pairwise(scores))
    sigma = 1.4826 * steps[63] / math.sqrt(2)  # 127 differences
    middle = sum(sorted(scores[-16:])[7:9]) / 2
    assert rule.limit(state) == pytest.approx(math.exp(middle + 6 * sigma))


def test_spikes_are_rejected_and_not_stored():
    guard = DetectorsWithState(NonFinite(), NormSpike())
    found = 0
    for step in range(1000):
        norm = math.exp(random.gauss(0, 0.2))
        if step > 100 and step % 20 == 0:
            found += not guard.accepts(norm=norm * 30)
        else:
            assert guard.accepts(norm=norm)
    assert found == len(range(120, 1000, 20))


def test_larger_norms_are_accepted_after_five_rejections():
    guard = DetectorsWithState(NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    assert [guard.accepts(norm=50.0) for _ in range(12)] == [False] * 5 + [True] * 7
    assert not guard.accepts(norm=5000.0)
    assert guard.accepts(norm=50.0)


def test_accepted_norm_after_five_rejections_keeps_the_limit():
    guard = DetectorsWithState(NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    assert not any(guard.accepts(norm=50.0) for _ in range(5))
    assert guard.accepts(norm=1.0)
    assert not guard.accepts(norm=50.0)


def test_accepted_norm_resets_the_count_of_rejections():
    guard = DetectorsWithState(NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    for _ in range(10):
        assert [guard.accepts(norm=g) for g in (50.0,) * 4 + (1.0,)] == [False] * 4 + [True]


def test_non_finite_rejections_are_not_counted():
    guard = DetectorsWithState(NonFinite(), NormSpike(armed=4))
    for _ in range(40):
        guard.accepts(norm=1.0)
    before = copy.deepcopy(guard.states)
    assert not any(guard.accepts(norm=bad) for bad in (math.nan, math.inf) * 20)
    assert guard.states == before
    assert not guard.accepts(norm=50.0)


def test_zero_norm_is_accepted_and_not_stored():
    guard = DetectorsWithState(NormSpike(armed=2))
    assert all(guard.accepts(norm=g) for g in (1.0, 0.0, 1.0, 0.0))
    assert guard.states[0]["accepted"] == [0.0, 0.0]


def test_norm_spike_accepts_and_does_not_store_nan():
    guard = DetectorsWithState(NormSpike(armed=2))
    for _ in range(4):
        guard.accepts(norm=1.0)
    assert guard.accepts(norm=math.nan)
    assert guard.states[0]["accepted"] == [0.0] * 4


def test_loss_spike_works_with_negative_losses():
    guard = DetectorsWithState(NonFinite(), LossSpike(armed=8))
    for step in range(20):
        assert guard.accepts(norm=1.0, loss=-5.0 + 0.01 * (step % 3))
    assert not guard.accepts(norm=1.0, loss=-3.5)
    assert guard.accepts(norm=1.0, loss=-4.0)
    assert guard.accepts(norm=1.0, loss=-400.0)
    assert guard.accepts(norm=1.0)  # accepted without a loss


def test_rejection_of_one_detector_does_not_count_for_another():
    guard = DetectorsWithState(NormSpike(armed=4), LossSpike(armed=4))
    for _ in range(10):
        guard.accepts(norm=1.0, loss=1.0)
    accepted = list(guard.states[0]["accepted"])
    assert not guard.accepts(norm=1.0, loss=99.0)
    assert guard.states[0] == {"accepted": accepted, "rejected": []}
    assert guard.states[1]["rejected"] == [99.0]


def test_verdict_holds_the_reason():
    detectors, norm = (NonFinite(), NormSpike(armed=4)), {"norm": 100.0}
    states = [d.initial_state() for d in detectors]
    for _ in range(4):
        record(detectors, states, {"norm": 2.0}, None)
    verdict = inspect(detectors, states, norm)
    assert (verdict.detector, verdict.quantity, verdict.value) == ("NormSpike", "norm", 100.0)
    assert verdict.limit == pytest.approx(10.0)
    assert verdict.reason == "the gradient norm is 100, typically 2, at most 10"
    assert inspect(detectors, states, {"norm": math.nan}).detector == "NonFinite"


@pytest.mark.parametrize("stop", [0, 20, 40, 41, 45, 60])
def test_resumed_detectors_decide_as_uninterrupted(stop):
    detectors = (NonFinite(), NormSpike(armed=16, max_rejections=3))
    norms = list(norms_with_spikes(150, rate=0.2))
    straight = DetectorsWithState(*detectors)
    expected = [straight.accepts(norm=g) for g in norms]
    first = DetectorsWithState(*detectors)
    for norm in norms[:stop]:
        first.accepts(norm=norm)
    file = io.BytesIO()
    torch.save(first.states, file)
    file.seek(0)
    resumed = DetectorsWithState(*detectors)
    resumed.states = torch.load(file, weights_only=True)
    assert [resumed.accepts(norm=g) for g in norms[stop:]] == expected[stop:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormSpike(0), "window must be a positive integer, got 0"),
        (lambda: NormSpike(8), "armed must be at most window, got 32 with window=8"),
        (lambda: NormSpike(armed=0), "armed must be a positive integer, got 0"),
        (lambda: NormSpike(threshold=0.0), "threshold must be positive and finite, got 0.0"),
        (lambda: NormSpike(ratio=1.0), r"ratio must be in \(1, inf\), got 1.0; try 5.0"),
        (lambda: NormSpike(ratio=math.inf), r"ratio must be in \(1, inf\), got inf"),
        (lambda: NormSpike(margin=1.0), r"margin must be in \(1, inf\], got 1.0; try 2.0"),
        (lambda: NormSpike(margin=math.nan), r"margin must be in \(1, inf\], got nan"),
        (lambda: LossSpike(floor=math.nan), "floor must be positive and finite, got nan"),
        (lambda: LossSpike(max_rejections=-1), "max_rejections must be a positive integer, got -1"),
        (lambda: Backoff(1.0), r"factor must be in \(0, 1\), got 1.0"),
        (lambda: Backoff(recover=0), "recover must be a positive integer, got 0"),
        (lambda: Abort(0), "after must be a positive integer, got 0"),
    ],
)
def test_invalid_arguments_raise_with_constraint_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_backoff_recovers_in_the_given_updates_and_stays_at_one():
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


def test_specifications_compare_by_value():
    assert NormSpike() == NormSpike(
        128, armed=32, threshold=6.0, ratio=5.0, margin=2.0, max_rejections=5
    )
    assert len({Skip(), Skip(), ClipToMedian(), Abort(), Backoff(), NonFinite()}) == 5
