"""Factors compared with torch's schedulers, to 1e-12."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_bigopt.schedules import (
    Chain,
    Constant,
    Cosine,
    CosineWithRestarts,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    PiecewiseLinear,
    Polynomial,
    Product,
    Schedule,
    StepDecay,
)

Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def rates(make: Make, total: int) -> list[float]:
    """Returns the learning rates of the updates 0 … total - 1 for the base 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler, found = make(optimizer), []
    for _ in range(total):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def assert_same(schedule: Schedule, make: Make, total: int) -> None:
    pairs = zip(schedule.values(total), rates(make, total), strict=True)
    assert max(abs(ours - theirs) for ours, theirs in pairs) <= 1e-12


@pytest.mark.parametrize("total", [10, 100, 333])
@pytest.mark.parametrize("every", [1, 3, 7, 30])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.97])
def test_step_lr(total: int, every: int, gamma: float):
    ours = StepDecay(decay=gamma, every=f"{every} steps")
    assert_same(ours, lambda o: lr_scheduler.StepLR(o, every, gamma=gamma), total)


@pytest.mark.parametrize(("total", "gamma"), [(10, 0.5), (100, 0.95), (1000, 0.999)])
def test_exponential_lr(total: int, gamma: float):
    ours = Exponential(decay=gamma, every=1)
    assert_same(ours, lambda o: lr_scheduler.ExponentialLR(o, gamma), total)


@pytest.mark.parametrize("milestones", [[1], [3, 7], [30, 60, 90]])
@pytest.mark.parametrize("total", [100, 333])
def test_multi_step_lr(total: int, milestones: list[int]):
    ours = MultiStep({step: 0.1**stage for stage, step in enumerate(milestones, start=1)})
    assert_same(ours, lambda o: lr_scheduler.MultiStepLR(o, milestones), total)


@pytest.mark.parametrize(("total", "iterations"), [(10, 5), (100, 33)])
def test_constant_lr(total: int, iterations: int):
    ours = MultiStep({0: 0.25, iterations: 1.0})
    assert_same(ours, lambda o: lr_scheduler.ConstantLR(o, 0.25, iterations), total)


@pytest.mark.parametrize(("total", "iterations"), [(10, 5), (100, 33)])
def test_linear_lr(total: int, iterations: int):
    ours = PiecewiseLinear({0: 0.3, iterations: 0.9})
    assert_same(ours, lambda o: lr_scheduler.LinearLR(o, 0.3, 0.9, iterations), total)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("total", [10, 100, 333])
def test_polynomial_lr(total: int, power: float):
    assert_same(
        Polynomial(power=power), lambda o: lr_scheduler.PolynomialLR(o, total, power), total
    )


@pytest.mark.parametrize("eta_min", [0.0, 0.1])
@pytest.mark.parametrize("total", [10, 100, 333])
def test_cosine_annealing_lr(total: int, eta_min: float):
    ours = Cosine(end=eta_min)
    assert_same(ours, lambda o: lr_scheduler.CosineAnnealingLR(o, total, eta_min), total)


@pytest.mark.parametrize("eta_min", [0.0, 0.1])
@pytest.mark.parametrize(("first", "multiplier"), [(10, 1), (7, 1), (10, 2), (3, 3), (1, 2)])
@pytest.mark.parametrize("total", [100, 333])
def test_cosine_annealing_warm_restarts(total: int, first: int, multiplier: int, eta_min: float):
    ours = CosineWithRestarts(first_cycle=first, cycle_multiplier=multiplier, end=eta_min)
    assert_same(
        ours,
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, first, multiplier, eta_min),
        total,
    )


@pytest.mark.parametrize(("up", "down"), [(5, None), (7, 7), (3, 11), (64, 16)])
@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cyclic_lr(up: int, down: int | None, mode: str):
    total, gamma = 333, 0.99
    per_cycle = 0.5 if mode == "triangular2" else gamma ** (up + (down or up))
    ours = Cyclic(low=0.2, up=up, down=down, mode=mode, cycle_decay=per_cycle)

    def make(optimizer):
        return lr_scheduler.CyclicLR(
            optimizer, 0.2, 1.0, step_size_up=up, step_size_down=down, mode=mode, gamma=gamma
        )

    assert_same(ours, make, total)


@pytest.mark.parametrize(("strategy", "shape"), [("cos", "cosine"), ("linear", "linear")])
@pytest.mark.parametrize(("total", "pct"), [(10, 0.3), (101, 0.25), (333, 0.5)])
def test_one_cycle_lr_with_shifted_updates(total: int, pct: float, strategy: str, shape: str):
    """torch's cycle peaks at ``pct * total - 1`` and ends at ``total - 1``: one update earlier."""
    ours = OneCycle(
        warmup=(pct * total - 1) / (total - 1), start=1 / 25, end=1 / 25 / 1e4, shape=shape
    )

    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, 1.0, total_steps=total, pct_start=pct, anneal_strategy=strategy
        )

    assert_same(ours, make, total - 1)


def test_one_cycle_in_three_phases_equals_a_chain():
    total, pct = 101, 0.3
    rise, back = pct * total - 1, 2 * pct * total - 2
    clock = total - 1
    ours = Chain(
        [
            (rise / clock, Cosine(start=1 / 25, end=1.0)),
            ((back - rise) / clock, Cosine(end=1 / 25)),
            Cosine(start=1 / 25, end=1 / 25 / 1e4),
        ]
    )

    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, 1.0, total_steps=total, pct_start=pct, three_phase=True
        )

    assert_same(ours, make, total - 1)


def test_sequential_lr_equals_a_chain():
    total, first = 100, 30
    ours = Chain([(first, Constant(0.25)), Exponential(decay=0.9, every=1)], seams="jump")

    def make(optimizer):
        parts = [
            lr_scheduler.ConstantLR(optimizer, 0.25, total_iters=total),
            lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[first])

    assert_same(ours, make, total)


def test_chained_scheduler_equals_a_product():
    total = 100
    ours = Product([StepDecay(decay=0.5, every=20), Linear()])

    def make(optimizer):
        parts = [
            lr_scheduler.StepLR(optimizer, 20, gamma=0.5),
            lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total),
        ]
        return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)

    assert_same(ours, make, total)


@pytest.mark.parametrize(("strategy", "shape"), [("cos", "cosine"), ("linear", "linear")])
def test_swalr_equals_a_cooldown(strategy: str, shape: str):
    total, epochs = 100, 30
    ours = Constant().with_cooldown(0.0, over=epochs / total, shape=shape, end=0.1)

    def make(optimizer):
        return SWALR(optimizer, 0.1, anneal_epochs=epochs, anneal_strategy=strategy)

    assert_same(ours, make, total)
