"""SpikeScore: compared with a loop over numpy, saved in the middle, and never synchronized."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_bigopt.monitoring.spike_score import SpikeScore


def oracle(values: list[float]) -> tuple[int, int]:
    """Returns the numbers of spikes and of compared values, one value after the other."""
    history: list[float] = []
    spikes = compared = 0
    for value in values:
        if not math.isfinite(value):
            continue
        before = np.array(history[-128:])
        if len(before) >= 63:
            compared += 1
            excess = value - before.mean()
            far = excess > 6 * before.std(ddof=1)
            spikes += bool(far and excess > 1e-6 * abs(before.mean()))
        history.append(value)
    return spikes, compared


def series(seed: int, length: int) -> list[float]:
    random = np.random.default_rng(seed)
    values = np.exp(random.normal(size=length) * 0.2)
    values[random.random(length) < 0.01] *= 1000 ** random.random()
    values[length - length // 10 : length - 1 : 41] = 60.0
    values[random.random(length) < 0.02] = math.nan
    values[random.random(length) < 0.01] = math.inf
    return [float(value) for value in values]


def as_tensor(value: float) -> Any:
    return torch.tensor(value, dtype=torch.float64)


def on_device() -> SpikeScore:
    """Returns a score that has seen a tensor on a device, and computes with tensors."""
    score = SpikeScore()
    score._history = torch.full((128,), math.nan, dtype=torch.float64)
    return score


@pytest.mark.parametrize("make", [SpikeScore, on_device])
@pytest.mark.parametrize("kind", [float, as_tensor])
@pytest.mark.parametrize("length", [0, 63, 64, 65, 200, 1000])
def test_score_equals_a_loop_over_the_values(length: int, kind: Any, make: Any) -> None:
    values, score = series(length, length), make()
    for index, value in enumerate(values):
        score.add(kind(value))
        if index % 37 == 0:
            score.value()  # reading in the middle changes nothing
    spikes, compared = oracle(values)
    state = score.state_dict()
    assert (state["spikes"], state["compared"]) == (spikes, compared)
    assert length < 1000 or spikes > 3
    expected = spikes / compared if compared else math.nan
    assert float(score.value()) == pytest.approx(expected, nan_ok=True)
    assert state["history"] == [value for value in values if math.isfinite(value)][-128:]


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 129, 500])
def test_saved_score_continues(cut: int) -> None:
    values = series(3, 700)
    whole, first, second = SpikeScore(), SpikeScore(), SpikeScore()
    for value in values:
        whole.add(value)
    for value in values[:cut]:
        first.add(value)
    state = json.loads(json.dumps(first.state_dict()))
    assert state == first.state_dict()
    second.load_state_dict(state)
    for value in values[cut:]:
        second.add(value)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("value", [0.0, 1 / 3, -2.7, 1e-30])
def test_constant_series_has_no_spikes(value: float) -> None:
    score = SpikeScore()
    for index in range(300):
        score.add(value * (1 + 1e-7 * (index % 2)))
    assert score.state_dict()["spikes"] == 0
    assert score.state_dict()["compared"] == 300 - 63


def test_spike_enters_the_history() -> None:
    score = SpikeScore()
    values = [1.0, 1.1] * 50 + [50.0] * 10
    for value in values:
        score.add(value)
    # The later ones are within 6 standard deviations of a history that contains the first ones.
    assert score.state_dict()["spikes"] == oracle(values)[0] < 5


def test_nothing_is_read_from_a_device() -> None:
    with FakeTensorMode():
        score = SpikeScore()
        for _ in range(200):
            score.add(torch.ones((), device="cuda"))
        found = score.value()
        with pytest.raises(DataDependentOutputException):
            torch.stack([found]).tolist()


def test_numbers_and_tensors_may_be_mixed() -> None:
    """A number keeps its float64 value beside a tensor, also one that float32 cannot hold."""
    mixed, numbers = SpikeScore(), SpikeScore()
    for index in range(64):
        value = 0.1 + index / 7 if index != 40 else 1e39
        mixed.add(torch.tensor(value, dtype=torch.float64) if index == 3 else value)
        numbers.add(value)
    assert mixed.state_dict() == numbers.state_dict()


def test_numbers_near_the_largest_are_no_error() -> None:
    score = SpikeScore()
    for index in range(200):
        score.add(1e308 if index % 2 else 1e200)
    assert score.state_dict()["compared"] == 200 - 63
