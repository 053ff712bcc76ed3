"""Several optimizers, and parameter groups that arrive in mid-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_bigopt import Constant, Cosine, LearningRateScheduler, Linear
from tests.kit import QUIET, ResumableLoader

DOWN = Linear(start=1.0, end=0.0)


def fit(module: L.LightningModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


class Several(L.LightningModule):
    """Manual optimization of two optimizers of one class and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        self.seen: list[tuple[float, ...]] = []

    def configure_optimizers(self) -> Any:
        a, b, c = self.nets
        return [
            torch.optim.SGD([{"params": a.parameters(), "name": "special"}], lr=1.0),
            torch.optim.Adam(b.parameters(), lr=0.1),
            torch.optim.SGD(c.parameters(), lr=2.0),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.seen.append(tuple(o.param_groups[0]["lr"] for o in optimizers))
        for net, optimizer in zip(self.nets, optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()


def test_each_named_optimizer_may_have_a_schedule_of_its_own() -> None:
    module = Several()
    fit(module, LearningRateScheduler(DOWN, optimizers={"Adam": Constant(), "SGD-1": Cosine()}))
    assert module.seen == [(1 - t / 8, 0.1, 2.0 * Cosine()(t / 8)) for t in range(8)]


def test_the_name_of_a_group_goes_before_that_of_its_optimizer() -> None:
    module = Several()
    scheduler = LearningRateScheduler(
        Cosine(), optimizers={"SGD-0": DOWN}, groups={"special": Constant()}
    )
    fit(module, scheduler)
    assert [rates[0] for rates in module.seen] == [1.0] * 8


@pytest.mark.parametrize("name", ["SGD", "SGD-2", "AdamW"])
def test_an_unknown_optimizer_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"optimizers must name one of several.*'Adam', 'SGD-0', 'SGD-1'"
    ):
        fit(Several(), LearningRateScheduler(DOWN, optimizers={name: DOWN}))


def test_manual_optimization_resumes_with_the_same_rates(tmp_path: Path) -> None:
    def scheduler() -> LearningRateScheduler:
        return LearningRateScheduler(DOWN, optimizers={"Adam": Cosine()})

    straight, resumed = Several(), Several()
    fit(straight, scheduler(), SaveAt(tmp_path, step=9))
    fit(resumed, scheduler(), ckpt=tmp_path / "step=9.ckpt")  # three updates a batch
    assert resumed.seen == straight.seen[3:]


class SaveAt(L.Callback):
    def __init__(self, folder: Path, *, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / f"step={self.step}.ckpt")


class Backbone(L.LightningModule):
    """Starts with its head alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.seen: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=1.0)


def finetuning() -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.5, verbose=False)


@pytest.mark.parametrize("first", [True, False])
def test_a_group_that_arrives_is_scheduled_from_its_own_rate_in_any_order(first: bool) -> None:
    module, scheduler = Backbone(), LearningRateScheduler(DOWN)
    callbacks = [finetuning(), scheduler] if first else [scheduler, finetuning()]
    fit(module, *callbacks, max_epochs=4)
    assert module.seen[:8] == [[1 - t / 16] for t in range(8)]
    # BackboneFinetuning writes the rate of its group at every epoch's start; ours is the last word.
    assert module.seen[8:] == [[1 - t / 16, 0.5 * (1 - t / 16)] for t in range(8, 16)]


@pytest.mark.parametrize("base_lr", ["checkpoint", "config"])
@pytest.mark.parametrize("stop", [6, 9, 13])
def test_arrived_groups_survive_resume(tmp_path: Path, stop: int, base_lr: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, resumed = Backbone(), Backbone()
    fit(
        straight,
        LearningRateScheduler(DOWN),
        finetuning(),
        checkpoint,
        max_epochs=4,
        enable_checkpointing=True,
    )
    fit(
        resumed,
        LearningRateScheduler(DOWN, base_lr=base_lr),
        finetuning(),
        max_epochs=4,
        ckpt=tmp_path / f"step={stop}.ckpt",
    )
    # The rates only: on resume Lightning 2.6 leaves the weights of an unfrozen backbone frozen.
    assert resumed.seen == straight.seen[stop:]
