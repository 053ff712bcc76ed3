"""Schedules of named optimizers and of named parameter groups."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    Constant,
    Cosine,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import QUIET, ManualLayers, ResumableLoader, SaveAt, loader

DOWN = Linear(start=1.0, end=0.0)


def fit(module: L.LightningModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def three_optimizers() -> ManualLayers:
    """Manual optimization of two optimizers of one class and a third."""
    return ManualLayers(
        lambda parameters: torch.optim.SGD([{"params": parameters, "name": "special"}], lr=1.0),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.SGD, lr=2.0),
    )


def test_named_optimizers_have_their_own_schedules() -> None:
    module = three_optimizers()
    fit(module, LearningRateScheduler(DOWN, optimizers={"Adam": Constant(), "SGD-1": Cosine()}))
    assert module.seen == [(1 - t / 8, 0.1, 2.0 * Cosine()(t / 8)) for t in range(8)]


def test_group_schedule_overrides_optimizer_schedule() -> None:
    module = three_optimizers()
    scheduler = LearningRateScheduler(
        Cosine(), optimizers={"SGD-0": DOWN}, groups={"special": Constant()}
    )
    fit(module, scheduler)
    assert [rates[0] for rates in module.seen] == [1.0] * 8


@pytest.mark.parametrize("name", ["SGD", "SGD-2", "AdamW"])
def test_unknown_optimizer_raises_and_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"optimizers must name optimizers of the.*'Adam', 'SGD-0', 'SGD-1'"
    ):
        fit(three_optimizers(), LearningRateScheduler(DOWN, optimizers={name: DOWN}))


def test_resume_under_manual_optimization_gives_the_same_learning_rates(tmp_path: Path) -> None:
    def scheduler() -> LearningRateScheduler:
        return LearningRateScheduler(DOWN, optimizers={"Adam": Cosine()})

    straight, resumed = three_optimizers(), three_optimizers()
    fit(straight, scheduler(), SaveAt(tmp_path / "nine.ckpt", 9))
    fit(resumed, scheduler(), ckpt=tmp_path / "nine.ckpt")  # three updates a batch
    assert resumed.seen == straight.seen[3:]


# ---------------------------------------------------------------------- names of one optimizer


class OneOptimizer(L.LightningModule):
    """Has one AdamW with two groups, which have the given names."""

    def __init__(self, *names: str | None) -> None:
        super().__init__()
        self.layer, self.names = nn.Linear(4, 3), names
        self.seen: list[tuple[float, ...]] = []

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [{"params": [p]} for p in self.layer.parameters()]
        for group, name in zip(groups, self.names, strict=False):
            if name is not None:
                group["name"] = name
        return torch.optim.AdamW(groups, lr=1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(tuple(group["lr"] for group in optimizer.param_groups))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])


RIGHT = [1 - t / 4 for t in range(4)]


def fit_one(module: L.LightningModule, *callbacks: Any) -> None:
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=list(callbacks))
    trainer.fit(module, loader(16, 4))


def test_one_optimizer_is_named_by_its_class() -> None:
    module = OneOptimizer()
    fit_one(module, LearningRateScheduler(Constant(), optimizers={"AdamW": DOWN}))
    assert module.seen == [(right, right) for right in RIGHT]


def test_another_name_of_one_optimizer_raises_with_its_name() -> None:
    message = r"^optimizers must name optimizers of the Trainer, got \['SGD'\]; .* \['AdamW'\]$"
    with pytest.raises(ValueError, match=message):
        fit_one(OneOptimizer(), LearningRateScheduler(DOWN, optimizers={"SGD": Constant()}))


@pytest.mark.parametrize("names", [(), ("body", None)])
def test_a_group_without_a_name_has_that_of_the_charts(names: tuple[str | None, ...]) -> None:
    module = OneOptimizer(*names)
    fit_one(module, LearningRateScheduler(DOWN, groups={"group1": Constant()}))
    assert module.seen == [(right, 1.0) for right in RIGHT]


def test_group_names_are_the_same_for_a_hyperparameter() -> None:
    class Decays(OneOptimizer):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.seen.append(tuple(group["weight_decay"] for group in optimizer.param_groups))

    module = Decays()
    scheduler = HyperparameterScheduler("weight_decay", DOWN, groups={"group0": Constant()})
    fit_one(module, scheduler)
    assert module.seen == [(0.01, 0.01 * right) for right in RIGHT]


@pytest.mark.parametrize(
    ("groups", "right"),
    [
        ({"head": Constant()}, (1.0, 1.0)),
        ({"head": Constant(), "head.no_decay": DOWN}, (1.0, 0.5)),
        ({"head.decay": Constant()}, (1.0, 0.5)),
        ({"head.decay": DOWN, "head": Constant()}, (0.5, 1.0)),
    ],
)
def test_a_name_refers_to_all_groups_that_begin_with_it_and_a_dot(
    groups: dict[str, Any], right: tuple[float, float]
) -> None:
    module = OneOptimizer("head.decay", "head.no_decay")
    fit_one(module, LearningRateScheduler(DOWN, groups=groups))
    assert module.seen[2] == right


def test_the_beginning_of_a_word_is_no_name_of_a_group() -> None:
    with pytest.raises(ValueError, match=r"groups must name .* got \['head'\]"):
        fit_one(
            OneOptimizer("header", "heads.x"),
            LearningRateScheduler(DOWN, groups={"head": Constant()}),
        )


def test_an_unknown_group_says_how_to_name_one() -> None:
    with pytest.raises(
        ValueError,
        match=r"got \['head'\]; the groups are named \['group0', 'group1'\]; name a group as "
        r"\{'params': \.\.\., 'name': 'head'\}$",
    ):
        fit_one(OneOptimizer(), LearningRateScheduler(DOWN, groups={"head": Constant()}))

    class OneGroup(OneOptimizer):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(ValueError, match=r"got \['head'\]; name a group as \{'params'"):
        fit_one(OneGroup(), LearningRateScheduler(DOWN, groups={"head": Constant()}))


# --------------------------------------------------------------- names of replaced optimizers


class Replaces(L.Callback):
    """Replaces the optimizers of the Trainer after two updates."""

    def __init__(self, *kinds: Any) -> None:
        self.kinds = kinds

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 2 and len(module.seen) == 2:
            parameters = list(module.parameters())
            shares = [parameters] if len(self.kinds) == 1 else [[p] for p in parameters]
            trainer.strategy.optimizers = [
                kind(share, lr=1.0) for kind, share in zip(self.kinds, shares, strict=True)
            ]


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_optimizer_of_another_class_does_not_drop_its_schedule(ours_first: bool) -> None:
    scheduler = LearningRateScheduler(Constant(), optimizers={"AdamW": DOWN})
    callbacks = [scheduler, Replaces(torch.optim.SGD)]
    module = OneOptimizer()
    with pytest.raises(
        ValueError, match=r"got \['AdamW'\]; .* \['SGD'\] since they were replaced; .* schedule="
    ):
        fit_one(module, *(callbacks if ours_first else callbacks[::-1]))
    assert len(module.seen) == 2


def test_an_optimizer_of_the_same_class_keeps_its_schedule() -> None:
    module = OneOptimizer()
    scheduler = LearningRateScheduler(Constant(), optimizers={"AdamW": DOWN})
    fit_one(module, scheduler, Replaces(torch.optim.AdamW))
    assert [rates[0] for rates in module.seen] == RIGHT


def test_groups_of_a_replaced_optimizer_do_not_drop_their_schedule() -> None:
    for scheduler in (
        LearningRateScheduler(DOWN, groups={"head": Constant()}),
        HyperparameterScheduler("weight_decay", DOWN, groups={"head": Constant()}),
    ):
        with pytest.raises(ValueError, match=r"groups must name .* got \['head'\]"):
            fit_one(OneOptimizer("body", "head"), scheduler, Replaces(torch.optim.AdamW))
