"""Combined optimizers with the callbacks: rules on updates, schedules, tags, coupling, plan."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    MaxUpdateRatio,
    OptimizationMonitor,
    UpdateClip,
    combine_optimizers,
    muon_adamw,
    plan,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, Probe, loader

MUON = partial(torch.optim.Muon, lr=0.02, weight_decay=0.0)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.9))
SGD = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


class Combined(Probe):
    """Muon for the first matrix, AdamW for the rest; records all groups after each batch."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.parts = {"net.0.weight": parts.get("first", MUON), "*": parts.get("rest", ADAMW)}
        self.seen: list[list[dict[str, Any]]] = []

    def configure_optimizers(self) -> Any:
        return combine_optimizers(self, self.parts, no_decay="*.bias")

    def on_train_batch_start(self, *args: Any) -> None:
        groups = self.trainer.optimizers[0].param_groups
        self.seen.append([{k: v for k, v in g.items() if k != "params"} for g in groups])


class ByHand(Probe):
    """The same with two optimizers in manual optimization; only AdamW's updates are limited."""

    def __init__(self, rule: UpdateClip) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.limit = rule.max_rms

    def configure_optimizers(self) -> Any:
        return [
            MUON([self.net[0].weight]),
            ADAMW([p for p in self.parameters() if p is not self.net[0].weight]),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        muon, adamw = (o.optimizer for o in self.optimizers())
        self.zero_grad()
        self.manual_backward(self.loss(batch[0], batch[1]))
        muon.step()
        others = adamw.param_groups[0]["params"]
        before = [p.detach().clone() for p in others]
        adamw.step()
        for p, old in zip(others, before, strict=True):
            state = adamw.state[p]
            v = state["exp_avg_sq"] / (1 - 0.9 ** state["step"])
            rms = (p.grad.square() / v.clamp(min=1e-16)).mean().sqrt()
            p.data = old + (p.detach() - old) * min(1.0, float(self.limit / rms))


def fit(module: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(module, loader(32, 4))
    return trainer


def test_update_clip_limits_the_adam_part_only():
    rule = UpdateClip(max_rms=0.7)
    ours, theirs, free = Combined(), ByHand(rule), Combined()
    fit(ours, GradientClipping(rule))
    fit(theirs)
    fit(free)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert not torch.allclose(ours.net[2].weight, free.net[2].weight)


def test_values_are_compared_with_the_defaults_of_their_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    decays = {"first": partial(MUON, weight_decay=0.1), "rest": partial(ADAMW, weight_decay=0.2)}
    module = Combined(**decays)
    with caplog.at_level(logging.INFO):
        fit(module, HyperparameterScheduler("weight_decay", Linear()))
    assert [group["weight_decay"] for group in module.seen[4]] == [0.05, 0.1, 0.0]
    assert "base values" not in caplog.text


def test_tensors_of_learning_rates_are_not_shared_with_the_defaults_of_a_part() -> None:
    module = Combined(rest=partial(torch.optim.AdamW, lr=torch.tensor(0.5)))
    trainer = fit(module, LearningRateScheduler(Linear()))
    parts = trainer.optimizers[0].parts
    assert parts["AdamW"].defaults["lr"] == 0.5


def test_update_clip_raises_without_an_adam_part():
    with pytest.raises(
        ValueError, match="must be of the Adam family for UpdateClip, got CombinedO"
    ):
        fit(Combined(rest=SGD), GradientClipping(UpdateClip()))


def test_max_update_ratio_limits_all_parts():
    class Watched(Combined):
        def on_train_batch_start(self, *args: Any) -> None:
            self.before = [p.detach().clone() for p in self.parameters()]

        def on_train_batch_end(self, *args: Any) -> None:
            for old, new in zip(self.before, self.parameters(), strict=True):
                limit = 0.01 * max(float(old.norm()), 1e-3)
                assert float((new.detach() - old).norm()) <= limit * 1.001

    fit(Watched(), GradientClipping(MaxUpdateRatio(0.01)))


def test_each_part_and_group_has_its_schedule_and_its_name(tmp_path: Path) -> None:
    module = Combined()
    fit(
        module,
        LearningRateScheduler(
            Constant(),
            optimizers={"AdamW": Linear(end=0.5)},
            groups={"AdamW.no_decay": Linear(end=0.0)},
        ),
        HyperparameterScheduler("betas[1]", Linear(end=0.5)),
        OptimizationMonitor(every=1),
        LearningRateMonitor(),
        logger=TensorBoardLogger(tmp_path),
        log_every_n_steps=1,
    )
    for update, groups in enumerate(module.seen):
        muon, adamw, biases = groups
        assert muon["lr"] == 0.02
        assert "betas" not in muon
        assert adamw["lr"] == pytest.approx(1e-2 * (1 - 0.5 * update / 8))
        assert biases["lr"] == pytest.approx(1e-2 * (1 - update / 8))
        assert adamw["betas"] == (0.9, pytest.approx(0.9 * (1 - 0.5 * update / 8)))
    curves = read_run(tmp_path).curves
    tags = {tag for tag in curves if tag.startswith("optim/lr")}
    assert tags == {"optim/lr/Muon", "optim/lr/AdamW", "optim/lr/AdamW.no_decay"}
    shown = {tag for tag in curves if tag.startswith("lr-CombinedOptimizer")}
    assert shown == {f"lr-CombinedOptimizer/{tag.removeprefix('optim/lr/')}" for tag in tags}


def test_unknown_part_raises_with_the_names():
    scheduler = LearningRateScheduler(Constant(), optimizers={"Adam": Linear()})
    with pytest.raises(
        ValueError, match=r"named \['AdamW', 'CombinedOptimizer', 'Muon'\]; did you"
    ):
        fit(Combined(), scheduler)


def test_resume_keeps_the_bases_of_a_field_that_one_part_has(tmp_path: Path) -> None:
    def run(*callbacks: Any, ckpt: Any = None) -> Combined:
        module = Combined()
        scheduler = HyperparameterScheduler("betas[0]", Linear(end=0.5))
        options = {**QUIET, "max_steps": 6, "enable_checkpointing": bool(callbacks)}
        trainer = L.Trainer(**options, callbacks=[scheduler, *callbacks])
        trainer.fit(module, loader(32, 4), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return module

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    straight = run(saver)
    assert straight.seen[3][1]["betas"] == (pytest.approx(0.9 * 0.75), 0.9)
    again = run(ckpt=tmp_path / "step=3.ckpt")
    assert [g[1]["betas"] for g in again.seen] == [g[1]["betas"] for g in straight.seen[3:]]


def test_field_that_no_part_has_raises():
    with pytest.raises(
        ValueError, match="must name a number of the parameter groups, got 'moment'"
    ):
        fit(Combined(), HyperparameterScheduler("moment", Linear()))


def test_beta_scaling_applies_to_the_part_that_has_it():
    module = Combined()
    scheduler = BatchSizeScheduler(
        BatchSizeSteps({"0%": 4, "4 steps": 8}), lr_scaling="sqrt", beta2_scaling="half-life"
    )
    fit(module, scheduler, max_steps=6, max_epochs=-1)
    first, last = module.seen[0], module.seen[-1]
    assert last[0]["lr"] == pytest.approx(first[0]["lr"] * 2**0.5)
    assert last[1]["betas"] == (0.9, pytest.approx(0.9**2))
    assert "betas" not in last[0]


@pytest.mark.parametrize(
    ("rest", "advice"),
    [
        (ADAMW, "lr_scaling='sqrt' is recommended for Muon and AdamW"),
        (
            SGD,
            "'sqrt' suits Adam and its variants, 'linear' SGD, and one rule applies to all parts",
        ),
    ],
)
def test_advice_on_the_learning_rate_names_the_parts(
    rest: Any, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(Combined(rest=rest), BatchSizeScheduler(BatchSizeSteps({"0%": 4, "4 steps": 8})))
    assert advice in caplog.text


def test_plan_shows_the_learning_rate_of_every_group():
    module = Combined()
    trainer = L.Trainer(
        **QUIET,
        max_steps=8,
        callbacks=[LearningRateScheduler(Linear(), groups={"Muon": Constant()})],
    )
    text = str(plan(trainer, module, loader(32, 4)))
    assert "Muon" in text
    assert "AdamW.no_decay" in text


class Recipe(Probe):
    def configure_optimizers(self) -> Any:
        return muon_adamw(self, lr=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recipe_trains_with_all_callbacks(tmp_path: Path, precision: Any) -> None:
    module, noise = Recipe(), GradientNoiseScale()
    trainer = fit(
        module,
        LearningRateScheduler(Linear()),
        GradientClipping(UpdateClip()),
        BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 8}), lr_scaling="sqrt"),
        noise,
        OptimizationMonitor(every=1, layers="parameters"),
        precision=precision,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    assert trainer.optimizers[0].param_groups[0]["updates"] == trainer.global_step
