"""``as_lr_scheduler``: schedules as torch schedulers, without Lightning."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from lightning_bigopt import LearningRateScheduler
from lightning_bigopt.durations import Horizon, Span
from lightning_bigopt.optimizers import ScheduleLR, as_lr_scheduler
from lightning_bigopt.schedules import (
    Chain,
    Clamp,
    Constant,
    Cosine,
    CosineWithRestarts,
    Linear,
    MultiStep,
    Noam,
    OneCycle,
    Polynomial,
    Power,
    Schedule,
    Seesaw,
    StepDecay,
    Warmup,
    WarmupCosine,
    WarmupStableDecay,
)
from tests.helpers import Probe, fit, loader

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
def test_scheduler_equals_lambda_lr_of_the_same_schedule(schedule: Schedule):
    mine, theirs = sgd(0.4, 0.1), sgd(0.4, 0.1)
    ours = as_lr_scheduler(schedule, mine, 50)
    factors = [*schedule.values(50), schedule.resolve(Horizon.of_steps(50))(1.0)]
    torchs = LambdaLR(theirs, lambda t: factors[min(t, 50)])
    assert isinstance(ours, LRScheduler)
    assert isinstance(ours, ScheduleLR)
    assert run(ours, 60) == run(torchs, 60)
    assert ours.get_last_lr() == torchs.get_last_lr()


def test_optimizer_is_not_patched_and_there_is_no_warning():
    optimizer = sgd(0.4)
    scheduler = as_lr_scheduler(Linear(), optimizer, 4)
    scheduler.step()  # torch's schedulers warn here
    assert "step" not in vars(optimizer)


def test_state_is_plain_numbers_and_resumes_at_any_step():
    straight = run(as_lr_scheduler(WarmupCosine(warmup="30%"), sgd(0.4, 0.1), 20), 20)
    for stop in range(20):
        first = as_lr_scheduler(WarmupCosine(warmup="30%"), sgd(0.4, 0.1), 20)
        run(first, stop)
        state = copy.deepcopy(first.state_dict())
        assert state == {"version": 1, "last_epoch": stop, "base_lrs": [0.4, 0.1]}
        second = as_lr_scheduler(WarmupCosine(warmup="30%"), sgd(9.0, 9.0), 20)
        second.load_state_dict(state)
        assert run(second, 20 - stop) == straight[stop:]


def test_state_of_another_scheduler_raises():
    scheduler = as_lr_scheduler(Linear(), sgd(0.4), 4)
    foreign = LambdaLR(sgd(0.4), lambda t: 1.0).state_dict()
    with pytest.raises(ValueError, match=r"state_dict must be that of a ScheduleLR"):
        scheduler.load_state_dict(foreign)


def test_tensor_is_filled_in_place_and_a_new_group_has_its_own_base():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler = as_lr_scheduler(Linear(), optimizer, 4)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.375
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 1.0})
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.5]


@pytest.mark.parametrize("clock", ["samples", "batches", "steps"])
def test_horizon_in_another_unit_is_converted_to_updates(clock: Any):
    spans = (Span(updates=4, batches=1, samples=2), Span(updates=3, batches=2, samples=4))
    amounts = {"samples": [2] * 4 + [4] * 3, "batches": [1] * 4 + [2] * 3, "steps": [1] * 7}[clock]
    horizon = Horizon(clock=clock, budget=sum(amounts), spans=spans)
    seen = run(as_lr_scheduler(Linear(), sgd(1.0), horizon), 7)
    wanted = [[1 - sum(amounts[:t]) / sum(amounts)] for t in range(7)]
    assert seen == [pytest.approx(rate, abs=1e-12) for rate in wanted]


def test_horizon_that_cannot_be_converted_to_updates_raises():
    with pytest.raises(ValueError, match=r"^horizon must have a known .*1000000000 tokens"):
        as_lr_scheduler(Linear(), sgd(1.0), Horizon(clock="tokens", budget=1e9))


def test_step_to_a_given_update_and_get_lr():
    optimizer = sgd(1.0)
    scheduler = as_lr_scheduler(Linear(), optimizer, 4)
    scheduler.step(3)
    assert scheduler.get_last_lr() == scheduler.get_lr() == [0.25]


def test_removed_method_raises_with_the_new_line():
    message = (
        r"removed in lightning_bigopt 0\.2; "
        r"write from lightning_bigopt\.optimizers import as_lr_scheduler; "
        r"as_lr_scheduler\(schedule, optimizer, horizon\)$"
    )
    with pytest.raises(AttributeError, match=message):
        Linear().as_lr_scheduler(sgd(0.4), 4)


# ------------------------------------------------------- equal to LearningRateScheduler in a fit

IN_A_FIT = {
    "constant": Constant(),
    "linear": Linear(end=0.1),
    "cosine": Cosine(end=0.1),
    "warmup_cosine": WarmupCosine(warmup="30%"),
    "wsd_in_steps": WarmupStableDecay(warmup=2, decay=3),
    "restarts": CosineWithRestarts(first_cycle="40%"),
    "steps": StepDecay(every=2, decay=0.7),
    "milestones": MultiStep({"30%": 0.3, 5: 0.1}),
    "one_cycle": OneCycle(),
    "noam": Noam(warmup=3),
    "power": Warmup(2, Power(timescale="10%")),
    "chain": Chain([(2, Linear(start=0.0, end=1.0)), Cosine()]),
    "clamp": Clamp(Warmup(3, Polynomial(power=2.0)), low=0.2),
    "seesaw": Seesaw(WarmupCosine(warmup="20%")),
}


class TwoGroups(Probe):
    """Two groups with different learning rates, held as floats or as tensors."""

    def __init__(self, *, tensors: bool = False) -> None:
        super().__init__()
        self.tensors = tensors
        self.used: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        first, _, last = self.net
        rates = [torch.tensor(0.3), torch.tensor(0.07)] if self.tensors else [0.3, 0.07]
        groups = [
            {"params": [*layer.parameters()], "lr": rate}
            for layer, rate in zip((first, last), rates, strict=True)
        ]
        return torch.optim.AdamW(groups, foreach=False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.used.append([float(group["lr"]) for group in optimizer.param_groups])


@pytest.mark.parametrize("updates", [7, 20])
@pytest.mark.parametrize("name", IN_A_FIT)
def test_learning_rates_equal_those_of_a_fit_to_the_bit(name: str, updates: int):
    schedule = IN_A_FIT[name]
    module = TwoGroups()
    fit(module, loader(40, 2), LearningRateScheduler(schedule), max_steps=updates)
    plain = TwoGroups().configure_optimizers()
    assert run(as_lr_scheduler(schedule, plain, updates), updates) == module.used


def test_learning_rate_tensors_equal_those_of_a_fit_to_the_bit():
    module = TwoGroups(tensors=True)
    fit(module, loader(40, 2), LearningRateScheduler(WarmupCosine(warmup="30%")), max_steps=9)
    plain = TwoGroups(tensors=True).configure_optimizers()
    assert run(as_lr_scheduler(WarmupCosine(warmup="30%"), plain, 9), 9) == module.used


@pytest.mark.parametrize("accumulate", [1, 3])
def test_learning_rates_equal_those_of_a_fit_over_epochs(accumulate: int):
    """10 batches an epoch; with ``accumulate`` 3 the last window of an epoch has one batch."""
    schedule, module = WarmupCosine(warmup="30%"), TwoGroups()
    scheduler = LearningRateScheduler(schedule)
    fit(module, loader(20, 2), scheduler, max_epochs=2, accumulate_grad_batches=accumulate)
    whole, rest = divmod(10, accumulate)
    epoch = (Span(updates=whole, batches=accumulate),)
    if rest:
        epoch += (Span(updates=1, batches=rest),)
    horizon = Horizon(clock="batches", budget=20, spans=epoch * 2)
    plain = TwoGroups().configure_optimizers()
    found = run(as_lr_scheduler(schedule, plain, horizon), len(module.used))
    assert len(found) == 2 * (whole + bool(rest))
    for mine, theirs in zip(found, module.used, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


def test_new_group_gets_the_same_learning_rates_as_in_a_fit():
    class Adds(TwoGroups):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 4:
                extra = torch.nn.Parameter(torch.zeros(2))
                self.trainer.optimizers[0].add_param_group({"params": [extra], "lr": 0.5})

    module = Adds()
    fit(module, loader(40, 2), LearningRateScheduler(WarmupCosine(warmup="30%")), max_steps=9)
    optimizer = TwoGroups().configure_optimizers()
    scheduler = as_lr_scheduler(WarmupCosine(warmup="30%"), optimizer, 9)
    found = run(scheduler, 3)
    found.append([float(group["lr"]) for group in optimizer.param_groups])
    optimizer.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5})
    scheduler.step()
    found += run(scheduler, 5)
    assert [len(row) for row in found] == [2] * 4 + [3] * 5
    assert found == module.used
    assert scheduler.base_lrs == [0.3, 0.07, 0.5]


# ------------------------------------------------------------------------------ copies and pickles


def deep_copy(scheduler: ScheduleLR) -> ScheduleLR:
    return copy.deepcopy(scheduler)


def through_pickle(scheduler: ScheduleLR) -> ScheduleLR:
    copied: ScheduleLR = pickle.loads(pickle.dumps(scheduler))
    return copied


@pytest.mark.parametrize("copied_by", [deep_copy, through_pickle])
@pytest.mark.parametrize("schedule", CURVES)
def test_copy_continues_with_its_own_optimizer(schedule: Schedule, copied_by: Any):
    straight = run(as_lr_scheduler(schedule, sgd(0.4, 0.1), 20), 20)
    scheduler = as_lr_scheduler(schedule, sgd(0.4, 0.1), 20)
    run(scheduler, 8)
    other = copied_by(scheduler)
    assert other.optimizer is not scheduler.optimizer
    assert other.state_dict() == scheduler.state_dict()
    assert run(other, 12) == straight[8:]
    assert scheduler.last_epoch == 8
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == straight[8]
    assert run(scheduler, 12) == straight[8:]


@pytest.mark.parametrize("copied_by", [deep_copy, through_pickle])
def test_copy_schedules_its_own_new_groups(copied_by: Any):
    scheduler = as_lr_scheduler(Linear(), sgd(0.4), 4)
    other = copied_by(scheduler)
    other.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 1.0})
    other.step()
    scheduler.step()
    assert [group["lr"] for group in other.optimizer.param_groups] == pytest.approx([0.3, 0.75])
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == pytest.approx([0.3])


def test_state_with_a_new_group_resumes():
    scheduler = as_lr_scheduler(Linear(), sgd(0.4), 4)
    scheduler.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 1.0})
    scheduler.step()
    state = scheduler.state_dict()
    assert state == {"version": 1, "last_epoch": 1, "base_lrs": [0.4, 1.0]}
    resumed = as_lr_scheduler(Linear(), sgd(9.0, 9.0), 4)
    resumed.load_state_dict(state)
    assert run(resumed, 3) == run(scheduler, 3)


@pytest.mark.slow
def test_importing_schedules_does_not_import_torch():
    source = "import sys; sys.modules['lightning_bigopt'] = type(sys)('lightning_bigopt')\n"
    source += f"sys.modules['lightning_bigopt'].__path__ = [{str(Path('lightning_bigopt'))!r}]\n"
    source += "import lightning_bigopt.schedules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


# ------------------------------------------------------ beside and inside torch's own schedulers


def linear(optimizer: Optimizer, updates: int = 4) -> ScheduleLR:
    return as_lr_scheduler(Linear(), optimizer, updates)


def linear_lambda(optimizer: Optimizer, updates: int = 4) -> LambdaLR:
    """The same curve as a scheduler of torch, whose compositions torch's own tests cover."""
    return LambdaLR(optimizer, lambda step: min(1.0, max(0.0, 1 - step / updates)))


COMPOSITIONS = {
    "second on one optimizer": lambda o, make: [make(o), make(o)][1],
    "after a warm-up": lambda o, make: SequentialLR(o, [LinearLR(o, 0.25), make(o)], [3]),
    "before a decay": lambda o, make: SequentialLR(o, [make(o), ExponentialLR(o, 0.5)], [3]),
    "twice": lambda o, make: SequentialLR(o, [make(o), make(o)], [3]),
    "three times": lambda o, make: SequentialLR(o, [make(o), make(o, 3), make(o, 2)], [2, 5]),
    "from the first update on": lambda o, make: SequentialLR(o, [make(o), make(o)], [0]),
    "first in a chain": lambda o, make: ChainedScheduler([make(o), ExponentialLR(o, 0.5)]),
}


@pytest.mark.parametrize("rates", [(0.4,), (0.4, 0.1), (torch.tensor(0.4), 0.1)])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_equal_those_of_lambda_lr(name: str, rates: tuple[Any, ...]):
    seen = []
    for make in (linear, linear_lambda):
        optimizer = sgd(*(r.clone() if isinstance(r, torch.Tensor) else r for r in rates))
        scheduler = COMPOSITIONS[name](optimizer, make)
        used, shown = [], []
        for _ in range(9):
            used.append([float(group["lr"]) for group in optimizer.param_groups])
            shown.append([float(rate) for rate in scheduler.get_last_lr()])
            optimizer.step()
            scheduler.step()
        seen.append((used, shown))
    (used, shown), (right, right_shown) = seen
    for mine, theirs in zip([*used, *shown], [*right, *right_shown], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-8)


@pytest.mark.parametrize("stop", range(1, 8))
def test_sequence_resumes_at_any_step(stop: int):
    def make() -> SequentialLR:
        optimizer = sgd(0.4)
        return SequentialLR(optimizer, [linear(optimizer), linear(optimizer)], [3])

    straight, first, resumed = make(), make(), make()
    right = run(straight, 8)
    run(first, stop)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert run(resumed, 8 - stop) == right[stop:]


def test_last_learning_rates_keep_tensors():
    optimizer = sgd(torch.tensor(0.4), 0.1)
    tensor, number = linear(optimizer).get_last_lr()
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(number, float)
    optimizer.param_groups[0]["lr"].fill_(3.0)
    assert float(tensor) == pytest.approx(0.4)  # a copy, as in torch's schedulers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Linear(), torch.nn.Linear(1, 1), 4), r"^optimizer must be an Optimizer, got Linear\("),
        ((Linear(), sgd(0.4), "4"), r"^horizon must be .*got '4'; write 4 without quotes"),
        ((Linear(), sgd(0.4), 4.5), r"^horizon must be .*got 4.5; pass the number of updates"),
        ((Linear(), sgd(0.4), True), r"^horizon must be .*got True; pass the number of updates"),
        (("linear", sgd(0.4), 4), r"^schedule must be a Schedule, got 'linear'"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        as_lr_scheduler(*arguments)


def test_state_of_another_number_of_groups_is_refused():
    state = linear(sgd(0.4)).state_dict()
    with pytest.raises(ValueError, match=r"base of each of the 2 parameter groups, got base_lrs="):
        linear(sgd(0.4, 0.1)).load_state_dict(state)


@pytest.mark.parametrize("stop", range(1, 7))
def test_first_in_a_chain_resumes_with_its_optimizer(stop: int):
    def chain(make: Any) -> ChainedScheduler:
        optimizer = sgd(0.4)
        return ChainedScheduler([make(optimizer, 8), ExponentialLR(optimizer, 0.5)])

    seen = []
    for make in (linear, linear_lambda):
        first, resumed = chain(make), chain(make)
        run(first, stop)
        resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        seen.append([rate for rates in run(resumed, 8 - stop) for rate in rates])
    assert seen[0] == pytest.approx(seen[1])


def test_state_without_its_update_is_refused():
    with pytest.raises(ValueError, match="state_dict must be that of a ScheduleLR"):
        linear(sgd(0.4)).load_state_dict({"version": 1, "base_lrs": [0.4]})
