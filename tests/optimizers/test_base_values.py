"""Base values of an optimizer that is used in several fits, or that a torch scheduler scaled."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    parameter_groups,
)
from tests.helpers import QUIET

RIGHT = [0.1 * (1 - step / 4) for step in range(4)]


class Keeps(L.LightningModule):
    """Makes its optimizer in ``__init__``, and records the learning rate of every step."""

    def __init__(self, lr: Any = 0.1) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.5)
        self.optimizer.register_step_pre_hook(self.record)
        self.rates: list[float] = []
        self.decays: list[float] = []

    def record(self, optimizer: Any, *_: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        self.decays.append(optimizer.param_groups[0]["weight_decay"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer


class Scheduled(Keeps):
    def __init__(self, scheduler_of: Any) -> None:
        super().__init__()
        self.scheduler_of = scheduler_of

    def configure_optimizers(self) -> Any:
        return [self.optimizer], [self.scheduler_of(self.optimizer)]


def fit(module: Keeps, *callbacks: Any, **options: Any) -> Any:
    trainer = L.Trainer(**{**QUIET, "max_steps": 4, **options}, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    return trainer


def test_optimizer_that_outlives_a_fit_starts_at_its_base_again() -> None:
    module = Keeps()
    for _ in range(3):
        module.rates.clear()
        fit(module, LearningRateScheduler(Linear()))
        assert module.rates == pytest.approx(RIGHT)


def test_the_base_that_is_used_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    module = Keeps()
    with caplog.at_level(logging.INFO):
        fit(module, LearningRateScheduler(Linear()), max_steps=2)
        assert not [text for text in caplog.messages if "base learning rates" in text]
        fit(module, LearningRateScheduler(Linear()))
    (line,) = [text for text in caplog.messages if "base learning rates" in text]
    assert line.startswith("The base learning rates of AdamW are [0.1], before an earlier fit or ")
    assert line.endswith("changed them to [0.0].")


def test_same_trainer_fits_again_with_the_same_optimizer() -> None:
    module = Keeps()
    trainer = fit(module, LearningRateScheduler(Linear()), max_steps=-1, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    module.rates.clear()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert module.rates == pytest.approx([0.1 * (0.5 - step / 8) for step in range(4)])


def test_fast_dev_run_leaves_no_mark() -> None:
    module = Keeps()
    fit(module, LearningRateScheduler(Linear(start=0.1, end=1)), max_steps=-1, fast_dev_run=True)
    module.rates.clear()
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == pytest.approx(RIGHT)


def test_interrupted_fit_leaves_no_mark() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise ZeroDivisionError

    module = Keeps()
    with pytest.raises(ZeroDivisionError):
        fit(module, LearningRateScheduler(Linear()), Fails())
    module.rates.clear()
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == pytest.approx(RIGHT)


def test_learning_rate_in_a_tensor_starts_at_its_base_again() -> None:
    module = Keeps(torch.tensor(0.1))
    for _ in range(2):
        module.rates.clear()
        fit(module, LearningRateScheduler(Linear()))
        assert module.rates == pytest.approx(RIGHT)


def test_weight_decay_and_the_coupling_to_the_batch_do_not_compound() -> None:
    module = Keeps()
    for _ in range(2):
        module.rates.clear()
        module.decays.clear()
        fit(
            module,
            HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.5)),
            BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 16}), lr_scaling="sqrt"),
            max_steps=2,
        )
        assert module.decays == pytest.approx([0.5, 0.375])
        assert module.rates == pytest.approx([0.1, 0.2])


def test_value_that_is_written_between_fits_is_the_base() -> None:
    module = Keeps()
    fit(module, LearningRateScheduler(Linear()))
    module.optimizer.param_groups[0]["lr"] = 0.3
    module.rates.clear()
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == pytest.approx([3 * rate for rate in RIGHT])


SCHEDULERS = {
    "warm-up from 0": lambda o: LambdaLR(o, lambda step: min(1.0, step / 100)),
    "LinearLR": lambda o: LinearLR(o, start_factor=0.25),
    "StepLR": lambda o: StepLR(o, 2),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, start_factor=0.25), ExponentialLR(o, 0.9)], milestones=[5]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_replaced_scheduler_leaves_its_initial_learning_rate(name: str) -> None:
    module = Scheduled(SCHEDULERS[name])
    for _ in range(2):
        module.rates.clear()
        fit(module, LearningRateScheduler(Linear(), module_scheduler="replace"))
        assert module.rates == pytest.approx(RIGHT)


def test_learning_rate_written_after_a_replaced_scheduler_is_the_base() -> None:
    class Writes(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.3

    module = Scheduled(SCHEDULERS["LinearLR"])
    fit(module, Writes(), LearningRateScheduler(Linear(), module_scheduler="replace"))
    assert module.rates == pytest.approx([3 * rate for rate in RIGHT])


@pytest.mark.parametrize(
    "scheduler_of",
    [
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    ],
)
def test_schedulers_that_overwrite_initial_lr_are_refused(scheduler_of: Any) -> None:
    module = Scheduled(scheduler_of)
    with pytest.raises(ValueError, match=r"OneCycleLR or CyclicLR .* return the optimizer only"):
        fit(module, LearningRateScheduler(Constant(), module_scheduler="replace"))


def test_base_of_zero_warns() -> None:
    with pytest.warns(UserWarning, match="base learning rate of every parameter group is 0"):
        fit(Keeps(0.0), LearningRateScheduler(Linear()))


def test_groups_that_share_a_tensor_have_learning_rates_of_their_own() -> None:
    class Shares(Keeps):
        def __init__(self) -> None:
            super().__init__()
            rate = torch.tensor(0.1)
            groups = [{"params": [p], "name": n} for n, p in self.layer.named_parameters()]
            self.optimizer = torch.optim.AdamW(groups, lr=rate)
            self.optimizer.register_step_pre_hook(self.record)

        def record(self, optimizer: Any, *_: Any) -> None:
            self.rates += [float(group["lr"]) for group in optimizer.param_groups]

    module = Shares()
    fit(module, LearningRateScheduler(Linear(), groups={"bias": Constant()}))
    assert module.rates[::2] == pytest.approx(RIGHT)
    assert module.rates[1::2] == pytest.approx([0.1] * 4)


# ------------------------------------------------------------- optimizers that are copied

HALVE = Linear(start=1.0, end=0.5)


def base_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "base value" in text]


def decays_of_next_fit(optimizer: torch.optim.Optimizer, *own: Any, **options: Any) -> Keeps:
    module = Keeps()
    module.optimizer = optimizer
    # The copy has parameters of its own, which are trained here.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    module.layer.weight, module.layer.bias = parameters
    optimizer.register_step_pre_hook(module.record)
    fit(module, *(own or (HyperparameterScheduler("weight_decay", HALVE),)), **options)
    return module


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize(
    "kind", ["state loaded", "plain SGD, state loaded", "loaded into itself", *COPIES]
)
def test_a_loaded_state_or_copy_logs_which_base_value_is_used(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A state_dict and a copy cannot hold the base values, so a line names them."""

    def optimizer_of(layer: nn.Linear) -> torch.optim.Optimizer:
        if kind == "plain SGD, state loaded":
            return torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
        return torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)

    module = Keeps()
    module.optimizer = optimizer_of(module.layer)
    fit(module, HyperparameterScheduler("weight_decay", HALVE))
    if kind in COPIES:
        loaded = COPIES[kind](module.optimizer)
    else:
        loaded = module.optimizer if kind == "loaded into itself" else optimizer_of(nn.Linear(3, 1))
        loaded.load_state_dict(copy.deepcopy(module.optimizer.state_dict()))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = decays_of_next_fit(loaded)
    assert again.decays == pytest.approx([0.25 * HALVE(t / 4) for t in range(4)])
    (line,) = base_lines(caplog)
    assert "weight_decay" in line
    assert "are [0.25], the current values" in line
    assert "default is 0.5" in line
    assert "write the configured values into the groups" in line


def test_groups_with_values_of_their_own_are_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Keeps()
    module.optimizer = torch.optim.AdamW(parameter_groups(module.layer, weight_decay=0.1))
    with caplog.at_level(logging.INFO):
        fit(module, HyperparameterScheduler("weight_decay", HALVE))
    assert base_lines(caplog) == []


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_the_base_learning_rate(how: str) -> None:
    module = Keeps()
    fit(module, LearningRateScheduler(Linear()))
    again = decays_of_next_fit(COPIES[how](module.optimizer), LearningRateScheduler(Linear()))
    assert again.rates == pytest.approx(RIGHT)


def test_a_state_of_mid_run_that_is_loaded_into_the_same_optimizer_keeps_initial_lr() -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.state = copy.deepcopy(trainer.optimizers[0].state_dict())

    module, saves = Keeps(), Saves()
    fit(module, LearningRateScheduler(Linear()), saves)
    module.optimizer.load_state_dict(saves.state)
    assert module.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    module.rates.clear()
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == pytest.approx(RIGHT)


def test_the_configured_values_of_a_new_optimizer_have_no_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Groups(Keeps):
        def __init__(self) -> None:
            super().__init__()
            groups = [
                {"params": [self.layer.weight]},
                {"params": [self.layer.bias], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)

    with caplog.at_level(logging.INFO):
        fit(Groups(), HyperparameterScheduler("weight_decay", HALVE))
        fit(Groups(), HyperparameterScheduler("betas[0]", HALVE))
    assert not base_lines(caplog)


def test_a_pickle_needs_no_code_of_the_package() -> None:
    module = Keeps()
    fit(module, HyperparameterScheduler("weight_decay", HALVE))
    assert b"lightning_bigopt" not in pickle.dumps(module.optimizer)
    assert module.optimizer.state_dict().keys() == {"state", "param_groups"}
    assert module.optimizer.state_dict()["param_groups"][0].keys() == {
        *torch.optim.AdamW(nn.Linear(3, 1).parameters()).state_dict()["param_groups"][0]
    }


def test_an_optimizer_is_freed_after_the_fit() -> None:
    module = Keeps()
    fit(module, HyperparameterScheduler("weight_decay", HALVE))
    reference, module.optimizer = weakref.ref(module.optimizer), None
    trainer = module.trainer
    trainer.strategy.optimizers = []
    del module, trainer
    gc.collect()
    assert reference() is None
