"""HyperparameterScheduler in fits: fields of the groups, the fraction of the budget, resume."""

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
from tests.helpers import QUIET, FieldRecorder, Probe, ResumableLoader, loader

DOWN = Linear(start=1.0, end=0.0)


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
def test_every_number_of_a_group_follows_its_schedule(
    field: str, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], base: float
) -> None:
    module = FieldRecorder(field, optimizer=optimizer, **options)
    trainer = fit(module, HyperparameterScheduler(field, DOWN))
    assert module.seen == [base * (1 - t / 4) for t in range(4)]
    group = trainer.optimizers[0].param_groups[0]
    if "betas" in options:  # the other beta is unchanged, and the pair stays a tuple
        other = 1 - int(field[-2])
        assert isinstance(group["betas"], tuple)
        assert group["betas"][other] == options["betas"][other]


def test_optimizer_uses_the_written_value() -> None:
    """Compares with a plain loop that sets the momentum of torch's SGD."""
    module = Probe(lr=0.1, momentum=0.9)
    fit(module, HyperparameterScheduler("momentum", DOWN))
    plain = Probe(lr=0.1, momentum=0.9)
    optimizer = plain.configure_optimizers()
    for t, (x, y, _) in enumerate(ResumableLoader(8, 2)):
        optimizer.param_groups[0]["momentum"] = 0.9 * (1 - t / 4)
        optimizer.zero_grad()
        plain.loss(x, y).backward()
        optimizer.step()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_several_fields_and_the_learning_rate_use_the_same_fraction() -> None:
    module = FieldRecorder("betas[0]", lr=1.0, optimizer=torch.optim.AdamW, betas=(0.8, 0.9))
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
        # Every field is written when an update has ended, for the next update.
        assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_gives_the_same_values_and_weights_to_the_bit(tmp_path: Path, stop: int) -> None:
    def build() -> tuple[FieldRecorder, list[Any]]:
        module = FieldRecorder("betas[0]", optimizer=torch.optim.AdamW, betas=(0.8, 0.9))
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


def test_second_optimizer_is_scheduled() -> None:
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


def test_unknown_field_raises_before_the_first_batch() -> None:
    module = Probe()
    with pytest.raises(ValueError, match=r"field must name a number.*'betas\[0\]'.*momentum"):
        fit(module, HyperparameterScheduler("betas[0]", DOWN))
    with pytest.raises(ValueError, match=r"field must name a number.*'nesterov'"):
        fit(module, HyperparameterScheduler("nesterov", DOWN))
    assert module.lrs == []


def test_invalid_arguments_raise_with_their_names() -> None:
    with pytest.raises(ValueError, match=r"field must not be 'lr'.*LearningRateScheduler"):
        HyperparameterScheduler("lr", DOWN)
    with pytest.raises(ValueError, match=r"field must name a number.*'params'"):
        HyperparameterScheduler("params", DOWN)
    with pytest.raises(ValueError, match=r"field must name a number.*'betas\[x\]'"):
        HyperparameterScheduler("betas[x]", DOWN)
    with pytest.raises(ValueError, match=r"schedule must be a Schedule, got 0\.5"):
        HyperparameterScheduler("eps", 0.5)  # type: ignore[arg-type]


def test_two_schedulers_of_one_field_raise() -> None:
    schedulers = [HyperparameterScheduler("eps", DOWN), HyperparameterScheduler("eps", Constant())]
    with pytest.raises(RuntimeError, match=r"more than one.*HyperparameterScheduler"):
        fit(Probe(optimizer=torch.optim.Adam), *schedulers)


def test_value_is_written_at_every_update_of_an_accumulated_run() -> None:
    module = FieldRecorder("momentum", momentum=0.8)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[HyperparameterScheduler("momentum", DOWN)],
    )
    trainer.fit(module, loader(10, 2))
    assert module.seen == [0.8 * (1 - consumed / 5) for consumed in (0, 2, 4)]
