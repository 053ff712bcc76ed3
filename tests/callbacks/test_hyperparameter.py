"""HyperparameterScheduler: any number of the groups, on the one clock, to the bit on resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_bigopt import (
    Constant,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    WarmupCosine,
)
from lightning_bigopt.optimizers import GroupField
from tests.kit import QUIET, Probe, ResumableLoader, loader

DOWN = Linear(start=1.0, end=0.0)


class Recorder(Probe):
    """Keeps a field of the first group at every update."""

    def __init__(self, field: str, **options: Any) -> None:
        super().__init__(**options)
        self.field, self.seen = GroupField(field), []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(self.field.read(optimizer.param_groups[0]))
        super().on_before_optimizer_step(optimizer)


def fit(module: L.LightningModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_steps": 4, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


@pytest.mark.parametrize(
    ("field", "optimizer", "options", "base"),
    [
        ("weight_decay", torch.optim.AdamW, {"weight_decay": 0.4}, 0.4),
        ("momentum", torch.optim.SGD, {"momentum": 0.9}, 0.9),
        ("betas[0]", torch.optim.AdamW, {"betas": (0.8, 0.96)}, 0.8),
        ("betas[1]", torch.optim.AdamW, {"betas": (0.8, 0.96)}, 0.96),
        ("eps", torch.optim.Adam, {"eps": 1e-4}, 1e-4),
        ("alpha", torch.optim.RMSprop, {"alpha": 0.5}, 0.5),
    ],
)
def test_any_number_of_the_groups_follows_its_schedule(
    field: str, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], base: float
) -> None:
    module = Recorder(field, optimizer=optimizer, **options)
    trainer = fit(module, HyperparameterScheduler(field, DOWN))
    assert module.seen == [base * (1 - t / 4) for t in range(4)]
    group = trainer.optimizers[0].param_groups[0]
    if "betas" in options:  # the other one is left alone, and the pair stays a tuple
        other = 1 - int(field[-2])
        assert isinstance(group["betas"], tuple)
        assert group["betas"][other] == options["betas"][other]


def test_what_is_written_is_what_the_optimizer_uses() -> None:
    """Against torch's own SGD, driven by hand."""
    module = Probe(lr=0.1, momentum=0.9)
    fit(module, HyperparameterScheduler("momentum", DOWN))
    twin = Probe(lr=0.1, momentum=0.9)
    optimizer = twin.configure_optimizers()
    for t, (x, y, _) in enumerate(ResumableLoader(8, 2)):
        optimizer.param_groups[0]["momentum"] = 0.9 * (1 - t / 4)
        optimizer.zero_grad()
        twin.loss(x, y).backward()
        optimizer.step()
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("field", ["weight_decay", "betas[1]"])
def test_a_tensor_is_filled_in_place(field: str) -> None:
    class Idle(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:  # torch refuses such tensors off the GPU
            return closure()

    class TensorField(Recorder):
        def configure_optimizers(self) -> Any:
            optimizer = Idle(self.parameters(), lr=0.1)
            self.tensor = torch.tensor(0.5)
            group = optimizer.param_groups[0]
            if field == "weight_decay":
                group["weight_decay"] = self.tensor
            else:
                group["betas"] = (torch.tensor(0.9), self.tensor)
            return optimizer

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            group = optimizer.param_groups[0]
            held = group["weight_decay"] if field == "weight_decay" else group["betas"][1]
            assert held is self.tensor
            super().on_before_optimizer_step(optimizer)

    module = TensorField(field)
    fit(module, HyperparameterScheduler(field, DOWN))
    assert module.seen == [0.5, 0.375, 0.25, 0.125]


def test_groups_keep_their_own_bases_and_named_ones_may_have_another_schedule() -> None:
    class Grouped(Probe):
        seen: list[Any] = []  # noqa: RUF012

        def configure_optimizers(self) -> Any:
            first, _, last = self.net
            return torch.optim.SGD(
                [
                    {"params": first.weight, "weight_decay": 0.4, "name": "body"},
                    {"params": first.bias, "weight_decay": 0.0},
                    {"params": last.parameters(), "weight_decay": 0.1, "name": "head"},
                ],
                lr=0.1,
            )

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.seen.append(tuple(g["weight_decay"] for g in optimizer.param_groups))

    module = Grouped()
    module.seen = []
    fit(module, HyperparameterScheduler("weight_decay", DOWN, groups={"head": Constant()}))
    assert module.seen == [(0.4 * (1 - t / 4), 0.0, 0.1) for t in range(4)]
    with pytest.raises(ValueError, match=r"groups must name parameter groups.*'tail'.*'body'"):
        fit(Grouped(), HyperparameterScheduler("weight_decay", DOWN, groups={"tail": DOWN}))


def test_several_fields_and_the_learning_rate_share_a_clock() -> None:
    module = Recorder("betas[0]", lr=1.0, optimizer=torch.optim.AdamW, betas=(0.8, 0.9))
    up = Linear(start=0.5, end=1.0)
    order = [
        LearningRateScheduler(DOWN),
        HyperparameterScheduler("betas[0]", up),
        HyperparameterScheduler("weight_decay", DOWN),
    ]
    for callbacks in itertools.permutations(order):
        module.seen, module.lrs = [], []
        trainer = fit(module, *callbacks)
        assert module.lrs == [1 - t / 4 for t in range(4)]
        assert module.seen == [0.8 * (0.5 + 0.5 * t / 4) for t in range(4)]
        assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.01 * 0.25


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_gives_the_same_values_and_weights_to_the_bit(tmp_path: Path, stop: int) -> None:
    def build() -> tuple[Recorder, list[Any]]:
        module = Recorder("betas[0]", optimizer=torch.optim.AdamW, betas=(0.8, 0.9))
        return module, [
            HyperparameterScheduler("betas[0]", WarmupCosine(warmup="30%", start=0.5, end=0.2)),
            HyperparameterScheduler("weight_decay", DOWN),
        ]

    straight, callbacks = build()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, *callbacks, checkpoint, enable_checkpointing=True, max_steps=7)
    resumed, callbacks = build()
    fit(resumed, *callbacks, ckpt=tmp_path / f"step={stop}.ckpt", max_steps=7)
    assert resumed.seen == straight.seen[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_group_that_arrives_in_mid_run_is_scheduled_and_survives_resume(tmp_path: Path) -> None:
    class Growing(Probe):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[0].parameters(), lr=0.1, weight_decay=0.4)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers().optimizer
            if self.trainer.global_step == 2 and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": self.net[2].weight, "weight_decay": 0.8})

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.seen.append([g["weight_decay"] for g in optimizer.param_groups])

    module = Growing()
    module.seen = []
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(
        module,
        HyperparameterScheduler("weight_decay", DOWN),
        checkpoint,
        enable_checkpointing=True,
        max_steps=8,
    )
    # The module adds the group after our hook, so that it follows from the next update on.
    assert module.seen[:2] == [[0.4], [0.4 * (1 - 1 / 8)]]
    assert module.seen[3:] == [[0.4 * (1 - t / 8), 0.8 * (1 - t / 8)] for t in range(3, 8)]


def test_a_modules_second_optimizer_is_scheduled_too() -> None:
    class Manual(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.seen: list[tuple[float, ...]] = []

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.a.parameters(), lr=1.0, weight_decay=0.4),
                torch.optim.Adam(self.b.parameters(), lr=0.1, weight_decay=0.8),
            ]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizers = self.optimizers()
            self.seen.append(tuple(o.param_groups[0]["weight_decay"] for o in optimizers))
            for net, optimizer in zip((self.a, self.b), optimizers, strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

    module = Manual()
    fit(module, HyperparameterScheduler("weight_decay", DOWN), max_steps=-1, max_epochs=1)
    assert module.seen == [(0.4 * (1 - t / 4), 0.8 * (1 - t / 4)) for t in range(4)]


def test_a_field_that_the_groups_do_not_have_raises_before_the_first_batch() -> None:
    module = Probe()
    with pytest.raises(ValueError, match=r"field must name a number.*'betas\[0\]'.*momentum"):
        fit(module, HyperparameterScheduler("betas[0]", DOWN))
    with pytest.raises(ValueError, match=r"field must name a number.*'nesterov'"):
        fit(module, HyperparameterScheduler("nesterov", DOWN))
    assert module.lrs == []


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"field must not be 'lr'.*LearningRateScheduler"):
        HyperparameterScheduler("lr", DOWN)
    with pytest.raises(ValueError, match=r"field must name a number.*'params'"):
        HyperparameterScheduler("params", DOWN)
    with pytest.raises(ValueError, match=r"field must name a number.*'betas\[x\]'"):
        HyperparameterScheduler("betas[x]", DOWN)
    with pytest.raises(ValueError, match=r"schedule must be a Schedule, got 0\.5"):
        HyperparameterScheduler("eps", 0.5)  # type: ignore[arg-type]


def test_two_schedulers_of_one_field_raise() -> None:
    twins = [HyperparameterScheduler("eps", DOWN), HyperparameterScheduler("eps", Constant())]
    with pytest.raises(RuntimeError, match=r"more than one.*HyperparameterScheduler"):
        fit(Probe(optimizer=torch.optim.Adam), *twins)


def test_it_writes_at_every_update_of_an_accumulated_run() -> None:
    module = Recorder("momentum", momentum=0.8)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[HyperparameterScheduler("momentum", DOWN)],
    )
    trainer.fit(module, loader(10, 2))
    assert module.seen == [0.8 * (1 - consumed / 5) for consumed in (0, 2, 4)]
