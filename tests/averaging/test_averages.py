"""Averages against closed forms, torch's AveragedModel, and runs with decayed gradients."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_bigopt.averaging import (
    EMA,
    Average,
    AverageState,
    Merge,
    TailMean,
    merge_coefficients,
    merge_weights,
)
from lightning_bigopt.durations import Horizon, Progress

CURVES = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: math.cos(math.pi * r / 2) ** 2,
    "1-sqrt": lambda r: 1 - r**0.5,
    "exponential": lambda r: 2 ** (1 - r) - 1,
}


def walk(steps: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Returns the weights after each of several updates, float64."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(steps, 5, generator=generator, dtype=torch.float64)
    return [{"a": w[:2].clone(), "b": w[2:].clone()} for w in moves.cumsum(0)]


def run(
    average: Average, weights: list[dict[str, Tensor]], sizes: list[int] | None = None
) -> tuple[AverageState, Progress]:
    state, sizes = average.initial_state(), sizes or [1] * len(weights)
    horizon, samples = Horizon.of_steps(len(weights)), 0
    progress = Progress(fraction=0.0)
    for step, (weight, size) in enumerate(zip(weights, sizes, strict=True), 1):
        samples += size
        progress = Progress(fraction=step / len(weights), steps=step, samples=samples)
        average.update(state, weight, progress, horizon)
    return state, progress


def value(average: Average, weights: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    state, progress = run(average, weights, **options)
    found = average.value(state, weights[-1], progress)
    assert found is not None
    return dict(found)


def close(one: dict[str, Tensor], other: dict[str, Tensor], *, within: float = 1e-13) -> bool:
    return all(
        torch.allclose(one[name], other[name], rtol=within, atol=within)
        for name in one.keys() | other.keys()
    )


def weighted(weights: list[dict[str, Tensor]], factors: list[float]) -> dict[str, Tensor]:
    total = math.fsum(factors)
    return {
        name: sum(f / total * w[name] for f, w in zip(factors, weights, strict=True))  # type: ignore[misc]
        for name in weights[0]
    }


# ---------------------------------------------------------------------------------------- EMA


@pytest.mark.parametrize(("half_life", "steps_per_half_life"), [(7, 7), ("20%", 10), (0.1, 5)])
def test_ema_is_the_weighted_mean_of_all_weights(half_life: Any, steps_per_half_life: int) -> None:
    weights = walk(50)
    decay = 2 ** (-1 / steps_per_half_life)
    expected = weighted(weights, [decay ** (49 - i) for i in range(50)])
    assert close(value(EMA(half_life), weights), expected)


def test_ema_equals_that_of_torch_with_the_same_bias_correction() -> None:
    weights, decay = walk(40), 2 ** (-1 / 8)
    model = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, w in weights[0].items()})

    def corrected(average: Tensor, current: Tensor, count: Tensor) -> Tensor:
        share = (1 - decay) / (1 - decay ** (int(count) + 1))
        return average + share * (current - average)

    averaged = AveragedModel(model, avg_fn=corrected)
    for each in weights:
        for name, weight in each.items():
            model[name].data.copy_(weight)
        averaged.update_parameters(model)
    found = value(EMA(8), weights)
    for name, expected in averaged.module.named_parameters():
        torch.testing.assert_close(found[name], expected.data, rtol=1e-13, atol=1e-13)


def test_a_batch_ramp_does_not_change_the_memory_in_samples() -> None:
    """Twice the samples in an update weigh as much as two updates with the same weights."""
    weights = walk(20)
    sizes = [10] * 10 + [20] * 10
    doubled = [w for w, size in zip(weights, sizes, strict=True) for _ in range(size // 10)]
    ramp = value(EMA("50 samples"), weights, sizes=sizes)
    assert close(ramp, value(EMA("50 samples"), doubled, sizes=[10] * 30))


def test_ema_begins_after_its_start() -> None:
    weights = walk(20)
    average = EMA(3, start=12)
    state, progress = run(average, weights[:12])
    assert average.value(state, weights[11], progress) is None
    decay = 2 ** (-1 / 3)
    expected = weighted(weights[12:], [decay ** (7 - i) for i in range(8)])
    assert close(value(average, weights), expected)


def test_another_budget_does_not_age_an_ema() -> None:
    """The amounts in percent are counted anew from the position in the other budget."""
    average, weights = EMA("10%"), walk(3)
    state, _ = run(average, weights[:2])  # at 100 % of a budget of two updates
    average.count_from(state, Progress(fraction=0.5, steps=2))
    average.update(state, weights[2], Progress(fraction=0.6, steps=3), None)
    # One half-life has passed, not -4.
    mass = 1 - 2.0**-10
    share = 0.5 / (mass + 0.5 * (1 - mass))
    expected = torch.lerp(value(average, weights[:2])["a"], weights[2]["a"], share)
    torch.testing.assert_close(state.copies[0]["a"], expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------- tail means


@pytest.mark.parametrize("over", ["30%", 0.3, 15, "15 steps"])
def test_the_tail_mean_equals_that_of_torch(over: Any) -> None:
    weights = walk(50)
    model = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, w in weights[0].items()})
    averaged = AveragedModel(model, avg_fn=lambda a, x, n: a + (x - a) / (int(n) + 1))
    for each in weights[35:]:
        for name, weight in each.items():
            model[name].data.copy_(weight)
        averaged.update_parameters(model)
    found = value(TailMean(over), weights)
    for name, expected in averaged.module.named_parameters():
        torch.testing.assert_close(found[name], expected.data, rtol=1e-13, atol=1e-13)


def test_before_its_part_the_tail_mean_is_the_current_weights() -> None:
    average, weights = TailMean("20%"), walk(50)
    state, horizon = average.initial_state(), Horizon.of_steps(50)
    for step in range(1, 41):
        progress = Progress(fraction=step / 50, steps=step)
        average.update(state, weights[step - 1], progress, horizon)
    assert average.value(state, weights[39], progress) is None
    assert state.copies == []


def test_an_extended_budget_begins_the_tail_anew() -> None:
    average, weights = TailMean("50%"), walk(6)
    state, _ = run(average, weights[:4])
    average.count_from(state, Progress(fraction=0.5, steps=4))
    for step in (5, 6):
        now = Progress(fraction=step / 8, steps=step)
        average.update(state, weights[step - 1], now, Horizon.of_steps(8))
    assert close(state.copies[0], weighted(weights[4:], [1, 1]))


# ------------------------------------------------------------------------------------- merges


@pytest.mark.parametrize("emulate", CURVES)
@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_merge_equals_the_run_with_decayed_gradients(emulate: Any, count: int) -> None:
    """With the same gradients the run with the decay has the weights of the merge."""
    generator = torch.Generator().manual_seed(count)
    first = torch.randn(7, generator=generator, dtype=torch.float64)
    moves = torch.randn(count - 1, 7, generator=generator, dtype=torch.float64)
    checkpoints = [first, *(first + moves[: i + 1].sum(0) for i in range(count - 1))]
    factors = [CURVES[emulate]((j + 1) / count) for j in range(count - 1)]
    decayed = first + sum(f * move for f, move in zip(factors, moves, strict=True))
    coefficients = merge_coefficients(range(count), emulate=emulate)
    merged = merge_weights([{"w": w} for w in checkpoints], coefficients)["w"]
    assert (merged - decayed).abs().max() <= 1e-15 * max(1.0, decayed.abs().max().item()) * 8
    assert math.fsum(coefficients) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("count", [2, 4, 10])
def test_a_linear_decay_gives_equal_weights(count: int) -> None:
    assert merge_coefficients(range(count)) == pytest.approx([1 / count] * count, abs=1e-15)


def test_unequal_distances_weigh_with_their_length() -> None:
    assert merge_coefficients([10, 20, 40], begin=0) == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize("emulate", CURVES)
def test_the_merge_of_a_run_uses_the_copies_of_its_window(emulate: Any) -> None:
    weights = walk(40)
    found = value(Merge(over=20, emulate=emulate, checkpoints=4), weights)
    chosen = [weights[i - 1] for i in (25, 30, 35, 40)]
    edges = [CURVES[emulate](j / 4) for j in range(5)]
    coefficients = [one - other for one, other in pairwise(edges)]
    assert close(found, weighted(chosen, coefficients))


def test_a_merge_is_available_between_copies() -> None:
    """The current weights are the last checkpoint, and stand for a shorter interval."""
    average, weights = Merge(over=20, checkpoints=4), walk(42)
    state, progress = run(average, weights)
    found = average.value(state, weights[-1], progress)
    assert found is not None
    chosen = [weights[i - 1] for i in (25, 30, 35, 40, 42)]
    assert close(dict(found), weighted(chosen, [3, 5, 5, 5, 2]))


@pytest.mark.parametrize("at", [25, 50, 75, 100])
def test_percent_of_a_merge_refer_to_the_part_of_the_run_until_now(at: int) -> None:
    """At every time the merge is that of a run that ends then."""
    weights, average = walk(100), Merge(over="20%", checkpoints=5)
    state, horizon = average.initial_state(), Horizon.of_steps(100)
    for step in range(1, at + 1):
        progress = Progress(fraction=step / 100, steps=step)
        average.update(state, weights[step - 1], progress, horizon)
        assert len(state.copies) <= 7
    found = average.value(state, weights[at - 1], progress)
    assert found is not None
    first = at * 0.8
    positions = [p for p in state.numbers["positions"] if p > first + 1e-6]
    assert all(other - one <= at * 0.04 + 1 for one, other in pairwise(positions))
    used = [weights[round(p) - 1] for p in positions]
    edges = [first, *positions]
    lengths = [other - one for one, other in pairwise(edges)]
    if positions[-1] < at:
        used.append(weights[at - 1])
        lengths.append(at - positions[-1])
    assert close(dict(found), weighted(used, lengths), within=1e-12)


@pytest.mark.parametrize("over", ["20%", "50%"])
def test_the_copies_of_a_merge_in_percent_are_bounded(over: str) -> None:
    average = Merge(over, checkpoints=10)
    state = average.initial_state()
    for step in range(1, 5000):
        average.update(state, {"w": torch.zeros(1)}, Progress(fraction=0.0, steps=step), None)
        assert len(state.copies) <= 15


def test_merged_weights_keep_their_types() -> None:
    copies = [
        {"half": torch.full((2,), 1.0 + i / 128, dtype=torch.bfloat16), "count": torch.tensor(i)}
        for i in (0, 1, 2)
    ]
    merged = merge_weights(copies, [1 / 3] * 3)
    assert merged["half"].dtype == torch.bfloat16
    assert merged["half"].tolist() == [1.0078125] * 2  # the mean, computed in float32
    assert merged["count"].item() == 2  # of the last copy


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(0), "half_life must be positive, got 0"),
        (lambda: EMA("much"), "half_life must be a duration"),
        (lambda: EMA("1%", start="soon"), "start must be a duration"),
        (lambda: TailMean(0), "over must be positive, got 0"),
        (lambda: Merge(0), "over must be positive, got 0"),
        (lambda: Merge("60%"), "over must be at most 50%"),
        (lambda: Merge("20%", emulate="sqrt"), "emulate must be"),
        (lambda: Merge("20%", checkpoints=1), "checkpoints must be"),
        (lambda: merge_coefficients([]), "positions must contain a checkpoint"),
        (lambda: merge_coefficients([2, 1]), "positions must ascend"),
        (lambda: merge_weights([], [1.0]), "coefficients must be one for each copy"),
        (lambda: merge_weights([{"a": torch.ones(1)}], [0.5]), "must have the sum 1"),
        (
            lambda: merge_weights([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [0.5, 0.5]),
            "must have the same names",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("average", [EMA(4), TailMean("50%"), Merge(10, checkpoints=3)])
def test_a_copied_state_continues_to_the_bit(average: Average) -> None:
    weights = walk(30)
    expected = value(average, weights)
    state, horizon = average.initial_state(), Horizon.of_steps(30)
    for step in range(1, 31):
        if step == 20:
            state = AverageState(
                copies=copy.deepcopy(state.copies), numbers=copy.deepcopy(state.numbers)
            )
        progress = Progress(fraction=step / 30, steps=step)
        average.update(state, weights[step - 1], progress, horizon)
    found = average.value(state, weights[-1], progress)
    assert found is not None
    assert all(torch.equal(found[name], expected[name]) for name in expected)
