"""Factors compared with the formulas of the papers (tests/oracles/schedules.py), to 1e-12."""

from __future__ import annotations

import math

import pytest

from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import (
    REX,
    Chain,
    CosineWithRestarts,
    Cyclic,
    InfiniteSchedule,
    Linear,
    Noam,
    OneCycle,
    Polynomial,
    Power,
    Schedule,
    Seesaw,
    TriStage,
    Warmup,
    WarmupCosine,
    WarmupInverseSquareRoot,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.oracles import schedules as paper

RUNS = [(10, 3), (97, 10), (1000, 37), (1024, 256)]


def assert_same(schedule: Schedule, total: int, expected) -> None:
    ours = schedule.values(total)
    differences = [abs(ours[t] - expected(t)) for t in range(total)]
    assert max(differences) <= 1e-12, f"update {differences.index(max(differences))}"


@pytest.mark.parametrize(("total", "warmup"), RUNS)
class TestPapers:
    def test_rex(self, total: int, warmup: int):
        assert_same(REX(), total, lambda t: paper.rex(t, total))

    def test_noam(self, total: int, warmup: int):
        d_model = 512
        peak = paper.noam(warmup, d_model, warmup)
        ours = Noam(warmup=warmup)
        assert ours.values(total)[0] == 0.0
        later = [f * peak for f in ours.values(total)]
        assert all(
            math.isclose(later[t], paper.noam(t, d_model, warmup), rel_tol=1e-12)
            for t in range(1, total)
        )

    def test_noam_is_the_inverse_square_root_recipe(self, total: int, warmup: int):
        recipe = WarmupInverseSquareRoot(warmup=warmup).values(total)
        assert_same(Noam(warmup=warmup), total, lambda t: recipe[t])

    @pytest.mark.parametrize("power", [0.5, 0.9, 2.0])
    def test_polynomial(self, total: int, warmup: int, power: float):
        assert_same(Polynomial(power=power), total, lambda t: paper.polynomial(t, total, power))

    @pytest.mark.parametrize("b", [-0.51, -1.0])
    def test_power(self, total: int, warmup: int, b: float):
        ours = Warmup(warmup, Power(b, timescale=warmup))
        assert_same(ours, total, lambda t: t / warmup if t < warmup else paper.power(t, warmup, b))

    def test_power_scheduler_with_its_linear_tail(self, total: int, warmup: int):
        """In the last tenth of the budget the factor falls linearly from the power law to zero."""
        tail = total - total // 10
        law = Warmup(warmup, Power(-0.51, timescale=warmup))
        ours = Chain([(tail, law), Linear()], seams="scale")
        reached = paper.power(tail, warmup, -0.51)

        def expected(t: int) -> float:
            if t < warmup:
                return t / warmup
            if t < tail:
                return paper.power(t, warmup, -0.51)
            return reached * (total - t) / (total - tail)

        assert_same(ours, total, expected)

    @pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt", "exponential"])
    @pytest.mark.parametrize("end", [0.0, 0.1])
    def test_wsd(self, total: int, warmup: int, shape: str, end: float):
        for decay in (1, total // 5, total - warmup):
            ours = WarmupStableDecay(warmup=warmup, decay=decay, cooldown=shape, end=end)
            assert_same(
                ours, total, lambda t, d=decay: paper.wsd(t, total, warmup, d, shape=shape, end=end)
            )

    @pytest.mark.parametrize("plateau", [0.3, 1.0])
    def test_infinite(self, total: int, warmup: int, plateau: float):
        fall = total // 3
        ours = InfiniteSchedule(warmup=warmup, decay=fall, plateau=plateau)
        assert_same(ours, total, lambda t: paper.infinite(t, warmup, warmup + fall, plateau))

    def test_tri_stage(self, total: int, warmup: int):
        hold, decay = total // 3, total // 4
        ours = TriStage(warmup=warmup, hold=hold, decay=decay, start=0.02, end=0.05)
        assert_same(
            ours,
            total,
            lambda t: paper.tri_stage(
                t, warmup, hold, decay, init_lr_scale=0.02, final_lr_scale=0.05
            ),
        )

    @pytest.mark.parametrize("shape", ["cosine", "linear"])
    def test_one_cycle(self, total: int, warmup: int, shape: str):
        ours = OneCycle(warmup=warmup, start=0.1, end=0.001, shape=shape)
        assert_same(
            ours,
            total,
            lambda t: paper.one_cycle(t, warmup, total, start=0.1, end=0.001, shape=shape),
        )

    @pytest.mark.parametrize("step", [1, 4, 25])
    def test_triangular(self, total: int, warmup: int, step: int):
        plain = Cyclic(low=0.3, up=step)
        halved = Cyclic(low=0.3, up=step, mode="triangular2")
        assert_same(plain, total, lambda t: paper.triangular(t, step, 0.3, 1.0))
        assert_same(halved, total, lambda t: paper.triangular2(t, step, 0.3, 1.0))

    @pytest.mark.parametrize("multiplier", [1, 2, 3])
    @pytest.mark.parametrize("decay", [1.0, 0.8])
    def test_sgdr(self, total: int, warmup: int, multiplier: int, decay: float):
        ours = CosineWithRestarts(
            first_cycle=warmup, cycle_multiplier=multiplier, cycle_decay=decay, end=1e-12
        )
        expected = paper.sgdr_run(total, warmup, multiplier, 1e-12, cycle_decay=decay)
        assert_same(ours, total, lambda t: expected[t])

    def test_peaks_do_not_fall_below_the_end(self, total: int, warmup: int):
        ours = CosineWithRestarts(first_cycle=1, cycle_decay=0.1, end=0.05).values(total)
        assert ours[:2] == [1.0, pytest.approx(0.1)]
        assert all(factor == pytest.approx(0.05) for factor in ours[2:])

    @pytest.mark.parametrize("inner", [WarmupLinear, WarmupCosine, WarmupStableDecay])
    def test_seesaw(self, total: int, warmup: int, inner: type[Schedule]):
        schedule = inner(warmup=warmup)
        rates, batches = paper.seesaw(schedule.values(total))
        ours = Seesaw(schedule, max_batch_factor=1e30).resolve(Horizon.of_steps(total))
        assert isinstance(ours, Seesaw)
        assert_same(ours, total, lambda t: rates[t])
        grown = [ours.batch_factor(t / total) for t in range(total)]
        assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(grown, batches, strict=True))
