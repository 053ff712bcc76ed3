"""HyperparameterScheduler in fits: fields of the groups, the fraction of the budget, resume."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
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
from tests.helpers import QUIET, FieldRecorder, ManualLayers, Probe, ResumableLoader, SaveAt, loader

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
    module = ManualLayers(
        partial(torch.optim.SGD, lr=1.0, weight_decay=0.4),
        partial(torch.optim.Adam, lr=0.1, weight_decay=0.8),
        field="weight_decay",
    )
    fit(module, HyperparameterScheduler("weight_decay", DOWN), max_steps=-1, max_epochs=1)
    assert module.seen == [(0.4 * (1 - t / 4), 0.8 * (1 - t / 4)) for t in range(4)]


def test_unknown_field_raises_before_the_first_batch() -> None:
    module = Probe()
    with pytest.raises(ValueError, match=r"field must name a number.*'betas\[0\]'.*momentum"):
        fit(module, HyperparameterScheduler("betas[0]", DOWN))
    with pytest.raises(ValueError, match=r"field must name a number.*'nesterov'"):
        fit(module, HyperparameterScheduler("nesterov", DOWN))
    assert module.lrs == []


@pytest.mark.parametrize(
    ("field", "advice"),
    [
        ("weight_decya", r"did you mean 'weight_decay'\?$"),
        ("beta", r"did you mean 'betas'\?$"),
        ("betas", r"write 'betas\[0\]' for the first number of \(0\.9, 0\.999\)$"),
        ("betas[2]", r"write 'betas\[0\]' for the first number of \(0\.9, 0\.999\)$"),
        ("betsa[0]", r"did you mean 'betas'\?$"),
        ("wd", r"the groups have .*betas, .*weight_decay$"),
    ],
)
def test_advice_for_a_field_that_is_no_number(field: str, advice: str) -> None:
    module = Probe(optimizer=torch.optim.AdamW)
    with pytest.raises(
        ValueError, match=rf"field must name a number.* got '{re.escape(field)}'; {advice}"
    ):
        fit(module, HyperparameterScheduler(field, DOWN))


@pytest.mark.parametrize(
    ("value", "found"),
    [("0.5", "'0.5'"), (None, "None"), ([0.5], r"\[0.5\]"), ("missing", "a group without it")],
)
def test_a_learning_rate_that_is_no_number_in_mid_run_is_named(value: Any, found: str) -> None:
    class Writes(Probe):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            group = self.trainer.optimizers[0].param_groups[0]
            if batch_idx == 2 and value == "missing":
                del group["lr"]
            elif batch_idx == 2:
                group["lr"] = value

    message = rf"^lr must be a number in every parameter group, got {found}; pass a number to"
    with pytest.raises(ValueError, match=message):
        fit(Writes(), LearningRateScheduler(DOWN))


def test_none_in_a_group_is_named() -> None:
    class HasNone(Probe):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([{"params": self.parameters(), "name": "body"}])
            optimizer.param_groups[0]["momentum"] = None
            return optimizer

    message = r"^momentum must be a number in every parameter group, got None in 'body'; pass a nu"
    with pytest.raises(ValueError, match=message):
        fit(HasNone(), HyperparameterScheduler("momentum", DOWN))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, Fraction])
def test_numbers_of_other_types_are_scheduled(kind: Any) -> None:
    value = kind(1)
    module = FieldRecorder("weight_decay", lr=kind(2), weight_decay=value)
    fit(module, LearningRateScheduler(DOWN), HyperparameterScheduler("weight_decay", DOWN))
    assert module.lrs == [2 * (1 - t / 4) for t in range(4)]
    assert module.seen == [1 - t / 4 for t in range(4)]


def test_an_optimizer_as_an_argument_is_named_by_its_class() -> None:
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match=r"^schedule must be a Schedule, got an AdamW; try Linear"):
        HyperparameterScheduler("eps", optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^schedule must be a Schedule, got an AdamW; try Warmup"):
        LearningRateScheduler(optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^min_lr must be .*, got an AdamW"):
        LearningRateScheduler(DOWN, min_lr=optimizer)  # type: ignore[arg-type]


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


# -------------------------------------------------------------- base values after a resume


def decayed(weight_decay: float) -> FieldRecorder:
    return FieldRecorder("weight_decay", weight_decay=weight_decay)


def saved(tmp_path: Path, *callbacks: Any) -> Path:
    """Fits with weight decay 0.4 over 8 updates, and saves after update 2."""
    path = tmp_path / "2.ckpt"
    fit(decayed(0.4), *callbacks, SaveAt(path, 2), max_steps=8)
    return path


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "Changes since" in message]


@pytest.mark.parametrize(("base", "used"), [("checkpoint", 0.4), ("config", 1.2)])
def test_base_values_of_checkpoint_or_config(
    tmp_path: Path, base: Any, used: float, info_log: Any
) -> None:
    path = saved(tmp_path, HyperparameterScheduler("weight_decay", DOWN))
    module = decayed(1.2)
    scheduler = HyperparameterScheduler("weight_decay", DOWN, base=base)
    if base == "config":
        with pytest.warns(UserWarning, match=r"weight_decay jumps when .*: 0\.3 → 0\.9 \(× 3\)"):
            fit(module, scheduler, ckpt=path, max_steps=8)
        assert "weight_decay bases: 0.4 → 1.2" in "".join(reports(info_log))
    else:
        fit(module, scheduler, ckpt=path, max_steps=8)
        assert not reports(info_log)
    assert module.seen == pytest.approx([used * (1 - t / 8) for t in range(2, 8)], abs=1e-12)


def test_config_base_values_of_two_resumes_equal_a_run_with_them(tmp_path: Path) -> None:
    path, later = saved(tmp_path, HyperparameterScheduler("weight_decay", DOWN)), tmp_path / "4"
    with pytest.warns(UserWarning, match="weight_decay jumps"):
        fit(
            decayed(1.2),
            HyperparameterScheduler("weight_decay", DOWN, base="config"),
            SaveAt(later, 4),
            ckpt=path,
            max_steps=8,
        )
    module = decayed(7.0)
    fit(module, HyperparameterScheduler("weight_decay", DOWN), ckpt=later, max_steps=8)
    assert module.seen == [1.2 * (1 - t / 8) for t in range(4, 8)]


def test_changed_schedule_and_budget_are_reported_once(tmp_path: Path, info_log: Any) -> None:
    momentum = HyperparameterScheduler("momentum", Constant())
    path = saved(tmp_path, HyperparameterScheduler("weight_decay", DOWN), momentum)
    schedulers = [
        HyperparameterScheduler("weight_decay", Constant(0.5), on_resume="extend"),
        HyperparameterScheduler("momentum", Constant(), on_resume="extend"),
    ]
    with pytest.warns(UserWarning, match=r"weight_decay jumps when .*: 0\.3 → 0\.2"):
        fit(decayed(0.4), *schedulers, ckpt=path, max_steps=16)
    assert not [text for text in reports(info_log) if "momentum" in text]
    (text,) = [text for text in reports(info_log) if "weight_decay" in text]
    assert "weight_decay schedule: Linear(start=1.0, end=0.0) → Constant(level=0.5)" in text
    assert sum("budget: 8 steps → 16 steps" in report for report in reports(info_log)) == 1


def test_checkpoint_without_the_scheduler_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    module = decayed(0.8)
    message = (
        r"without HyperparameterScheduler\('weight_decay'\): the schedule continues at 25\.0% of .*"
        r"base values of the weight_decay \(0\.8\)"
    )
    with pytest.warns(UserWarning, match=message):
        fit(module, HyperparameterScheduler("weight_decay", DOWN), ckpt=path, max_steps=8)
    assert module.seen == pytest.approx([0.8 * (1 - t / 8) for t in range(2, 8)], abs=1e-12)


def test_unknown_base_raises() -> None:
    with pytest.raises(ValueError, match="base must be 'checkpoint' or 'config', got 'user'"):
        HyperparameterScheduler("momentum", DOWN, base="user")  # type: ignore[arg-type]
