"""Factors compared with the functions of transformers, over a grid of arguments, to 1e-12."""

from __future__ import annotations

import pytest
import torch
import transformers.optimization as hf

from lightning_bigopt.schedules import (
    Chain,
    Constant,
    Cosine,
    CosineWithRestarts,
    InverseSquareRoot,
    Polynomial,
    Schedule,
    Warmup,
    WarmupConstant,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupLinear,
    WarmupStableDecay,
)

RUNS = [(1, 0), (10, 0), (10, 3), (97, 1), (100, 10), (100, 99), (1000, 37), (1024, 256)]


def factors(make, total: int, **arguments) -> list[float]:
    """Returns transformers' factors of the updates 0 … total, the end included."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (function,) = make(optimizer, **arguments).lr_lambdas
    return [float(function(step)) for step in range(total + 1)]


def assert_same(schedule: Schedule, expected: list[float], total: int) -> None:
    ours = [*schedule.values(total), end_of(schedule, total)]
    assert len(ours) == len(expected)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-12


def end_of(schedule: Schedule, total: int) -> float:
    from lightning_bigopt.durations import Horizon

    return schedule.resolve(Horizon.of_steps(total))(1.0)


@pytest.mark.parametrize(("total", "warmup"), RUNS)
class TestWithWarmup:
    def test_constant(self, total: int, warmup: int):
        assert_same(Constant(), factors(hf.get_constant_schedule, total), total)

    def test_constant_with_warmup(self, total: int, warmup: int):
        expected = factors(hf.get_constant_schedule_with_warmup, total, num_warmup_steps=warmup)
        assert_same(WarmupConstant(warmup=warmup), expected, total)

    def test_linear(self, total: int, warmup: int):
        run = {"num_warmup_steps": warmup, "num_training_steps": total}
        expected = factors(hf.get_linear_schedule_with_warmup, total, **run)
        assert_same(WarmupLinear(warmup=warmup), expected, total)

    def test_cosine(self, total: int, warmup: int):
        run = {"num_warmup_steps": warmup, "num_training_steps": total}
        expected = factors(hf.get_cosine_schedule_with_warmup, total, **run)
        assert_same(WarmupCosine(warmup=warmup, end=0.0), expected, total)

    def test_three_half_waves_equal_a_chain(self, total: int, warmup: int):
        run = {"num_warmup_steps": warmup, "num_training_steps": total, "num_cycles": 1.5}
        expected = factors(hf.get_cosine_schedule_with_warmup, total, **run)
        wave = [(1 / 3, Cosine()), (1 / 3, Cosine(start=0.0, end=1.0)), Cosine()]
        assert_same(Warmup(warmup, Chain(wave)), expected, total)

    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
    def test_cosine_with_min_lr(self, total: int, warmup: int, rate: float):
        run = {"num_warmup_steps": warmup, "num_training_steps": total, "min_lr_rate": rate}
        expected = factors(hf.get_cosine_with_min_lr_schedule_with_warmup, total, **run)
        assert_same(WarmupCosine(warmup=warmup, end=rate), expected, total)

    @pytest.mark.parametrize("cycles", [1, 2, 4])
    def test_cosine_with_hard_restarts(self, total: int, warmup: int, cycles: int):
        run = {"num_warmup_steps": warmup, "num_training_steps": total, "num_cycles": cycles}
        make = hf.get_cosine_with_hard_restarts_schedule_with_warmup
        expected = factors(make, total, **run)
        schedule = Warmup(warmup, CosineWithRestarts(first_cycle=1 / cycles))
        assert_same(schedule, expected, total)

    @pytest.mark.parametrize(("end", "power"), [(1e-7, 1.0), (0.2, 2.0), (0.01, 0.5)])
    def test_polynomial(self, total: int, warmup: int, end: float, power: float):
        run = {"num_warmup_steps": warmup, "num_training_steps": total}
        make = hf.get_polynomial_decay_schedule_with_warmup
        expected = factors(make, total, **run, lr_end=end, power=power)
        assert_same(Warmup(warmup, Polynomial(power=power, end=end)), expected, total)

    @pytest.mark.parametrize("timescale", [None, 1, 50, 10_000])
    def test_inverse_sqrt(self, total: int, warmup: int, timescale: int | None):
        run = {"num_warmup_steps": warmup, "timescale": timescale}
        expected = factors(hf.get_inverse_sqrt_schedule, total, **run)
        if (
            timescale is None and not warmup
        ):  # the default of transformers, which must be given here
            timescale = 10_000
        ours = WarmupInverseSquareRoot(warmup=warmup, timescale=timescale)
        assert_same(ours, expected, total)
        inner = InverseSquareRoot(timescale=timescale or warmup)
        assert_same(Warmup(warmup, inner), expected, total)


@pytest.mark.parametrize(("total", "warmup", "decay"), [(10, 0, 10), (100, 5, 20), (997, 31, 401)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("cooldown", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd(total: int, warmup: int, decay: int, *, floor: float, cooldown: str, shape: str):
    expected = factors(
        hf.get_wsd_schedule,
        total,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=total,
        warmup_type=shape,
        decay_type=cooldown,
        min_lr_ratio=floor,
    )
    ours = WarmupStableDecay(
        warmup=warmup,
        decay=decay,
        cooldown=cooldown,
        warmup_shape=shape,
        start=floor,
        end=floor,
    )
    assert_same(ours, expected, total)


@pytest.mark.parametrize(("total", "warmup"), [(10, 2), (100, 10), (997, 31)])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_cosine_warmup_with_min_lr_is_one_update_ahead(total: int, warmup: int, rate: float):
    """transformers counts the updates of this schedule from 1, those of all others from 0."""
    expected = factors(
        hf.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
        total,
        num_warmup_steps=warmup,
        num_training_steps=total,
        min_lr_rate=rate,
    )
    ours = WarmupCosine(warmup=warmup, end=rate).values(total)
    assert max(abs(a - b) for a, b in zip(ours[1:], expected, strict=False)) <= 1e-12
