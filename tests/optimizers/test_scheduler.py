"""``schedule.as_lr_scheduler``: a plain torch scheduler, outside Lightning."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_bigopt.durations import Horizon, Span
from lightning_bigopt.schedules import (
    Clamp,
    Constant,
    Cosine,
    Linear,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)

CURVES = [Constant(), Linear(), Cosine(end=0.1), WarmupStableDecay(warmup="10%", decay="20%")]


def sgd(*rates: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])


def run(scheduler: LRScheduler, updates: int) -> list[list[float]]:
    seen = []
    for _ in range(updates):
        seen.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("schedule", CURVES)
def test_it_equals_lambda_lr_of_the_same_curve(schedule: Schedule):
    mine, theirs = sgd(0.4, 0.1), sgd(0.4, 0.1)
    ours = schedule.as_lr_scheduler(mine, 50)
    curve = schedule.values(51)  # of another run: not what is compared
    assert len(curve) == 51
    factors = [*schedule.values(50), schedule.resolve(Horizon.of_steps(50))(1.0)]
    torchs = LambdaLR(theirs, lambda t: factors[min(t, 50)])
    assert isinstance(ours, LRScheduler)
    assert run(ours, 60) == run(torchs, 60)
    assert ours.get_last_lr() == torchs.get_last_lr()


def test_the_optimizer_is_not_patched_and_no_order_is_warned_of():
    optimizer = sgd(0.4)
    scheduler = Linear().as_lr_scheduler(optimizer, 4)
    scheduler.step()  # torch warns here
    assert "step" not in vars(optimizer)


def test_a_state_of_plain_numbers_resumes_at_any_step():
    straight = run(WarmupCosine(warmup="30%").as_lr_scheduler(sgd(0.4, 0.1), 20), 20)
    for stop in range(20):
        first = WarmupCosine(warmup="30%").as_lr_scheduler(sgd(0.4, 0.1), 20)
        run(first, stop)
        state = copy.deepcopy(first.state_dict())
        assert state == {"version": 1, "last_epoch": stop, "base_lrs": [0.4, 0.1]}
        second = WarmupCosine(warmup="30%").as_lr_scheduler(sgd(9.0, 9.0), 20)
        second.load_state_dict(state)
        assert run(second, 20 - stop) == straight[stop:]


def test_a_foreign_state_is_refused():
    scheduler = Linear().as_lr_scheduler(sgd(0.4), 4)
    foreign = LambdaLR(sgd(0.4), lambda t: 1.0).state_dict()
    with pytest.raises(ValueError, match=r"state_dict must be that of a ScheduleLR"):
        scheduler.load_state_dict(foreign)


def test_a_tensor_is_filled_in_place_and_a_late_group_brings_its_base():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler = Linear().as_lr_scheduler(optimizer, 4)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.375
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 1.0})
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.5]


def test_bounds_in_absolute_terms_act_on_each_group():
    scheduler = Clamp(schedule=Linear(), low=0.2, high=0.3, unit="lr").as_lr_scheduler(
        sgd(0.4, 0.1), 4
    )
    assert run(scheduler, 4) == [
        [0.3, 0.2],
        [0.3, 0.2],
        [0.2, 0.2],
        [0.2, 0.2],
    ]


@pytest.mark.parametrize("clock", ["samples", "batches", "steps"])
def test_a_horizon_in_another_unit_is_carried_over_to_updates(clock: Any):
    spans = (Span(updates=4, batches=1, samples=2), Span(updates=3, batches=2, samples=4))
    amounts = {"samples": [2] * 4 + [4] * 3, "batches": [1] * 4 + [2] * 3, "steps": [1] * 7}[clock]
    horizon = Horizon(clock=clock, budget=sum(amounts), spans=spans)
    seen = run(Linear().as_lr_scheduler(sgd(1.0), horizon), 7)
    wanted = [[1 - sum(amounts[:t]) / sum(amounts)] for t in range(7)]
    assert seen == [pytest.approx(rate, abs=1e-12) for rate in wanted]


def test_a_horizon_that_nobody_knows_in_updates_is_refused():
    with pytest.raises(ValueError, match=r"horizon must be in tokens"):
        Linear().as_lr_scheduler(sgd(1.0), Horizon(clock="tokens", budget=1e9))


def test_it_goes_into_torchs_own_composition():
    optimizer = sgd(1.0)
    scheduler = Linear().as_lr_scheduler(optimizer, 4)
    scheduler.step(3)
    assert scheduler.get_last_lr() == scheduler.get_lr() == [0.25]


@pytest.mark.slow
def test_schedules_alone_still_cost_no_torch():
    source = "import sys; sys.modules['lightning_bigopt'] = type(sys)('lightning_bigopt')\n"
    source += f"sys.modules['lightning_bigopt'].__path__ = [{str(Path('lightning_bigopt'))!r}]\n"
    source += "import lightning_bigopt.schedules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)
