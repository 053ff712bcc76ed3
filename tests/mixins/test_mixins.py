"""Mixins: a LightningModule that brings its own callbacks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import (
    BatchSizePolicyMixin,
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    GradientClippingMixin,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    NormClip,
    WarmupCosine,
)
from tests.callbacks.test_shared_clipping import Pair
from tests.callbacks.test_shared_clipping import fit as fit_pair
from tests.helpers import QUIET, Probe, loader

SCHEDULE = WarmupCosine(warmup="20%", end=0.1)
POLICY = BatchSizeSteps({"0%": 4, "50%": 6})
RULE = NormClip(max_norm=0.5)


def fit(module: L.LightningModule, callbacks: list[Any], **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": callbacks, **options})
    trainer.fit(module, loader(27, 2))
    return trainer


class AllMixins(LearningRateScheduleMixin, GradientClippingMixin, BatchSizePolicyMixin, Probe):
    def configure_learning_rate_schedule(self) -> WarmupCosine:
        return SCHEDULE

    def configure_clipping_rule(self) -> NormClip:
        return RULE

    def configure_batch_size_policy(self) -> BatchSizeSteps:
        return POLICY


def test_mixins_train_to_the_same_bits_as_callbacks() -> None:
    mixed, plain = AllMixins(optimizer=torch.optim.AdamW), Probe(optimizer=torch.optim.AdamW)
    fit(mixed, [])
    fit(
        plain,
        [LearningRateScheduler(SCHEDULE), GradientClipping(RULE), BatchSizeScheduler(POLICY)],
    )
    assert mixed.lrs == plain.lrs
    assert mixed.windows == plain.windows
    for mine, theirs in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_mixin_and_the_same_callback_raise() -> None:
    with pytest.raises(ValueError, match=r"GradientClipping.*mixin of AllMixins"):
        fit(AllMixins(), [GradientClipping(RULE)])


def test_configure_callbacks_without_super_and_a_missing_method_raise() -> None:
    class WithoutSuper(AllMixins):
        def configure_callbacks(self) -> list[Any]:
            return []

    with pytest.raises(RuntimeError, match=r"super\(\).configure_callbacks"):
        fit(WithoutSuper(), [])

    class Undefined(GradientClippingMixin, Probe):
        pass

    with pytest.raises(TypeError, match="Undefined must define configure_clipping_rule"):
        fit(Undefined(), [])


def test_module_with_mixins_fits_twice() -> None:
    module = AllMixins()
    trainer = fit(module, [], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(27, 2))
    assert len(module.lrs) == trainer.global_step


def test_module_returns_the_callback_with_its_arguments() -> None:
    class OneNorm(GradientClippingMixin, Pair):
        def configure_clipping_rule(self) -> GradientClipping:
            return GradientClipping(NormClip(max_norm=0.1), scope="all")

    mixed, plain, default = OneNorm(), Pair(), Pair()
    fit_pair(mixed)
    fit_pair(plain, GradientClipping(NormClip(max_norm=0.1), scope="all"))
    fit_pair(default, GradientClipping(NormClip(max_norm=0.1)))
    for mine, theirs in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(mixed.head.weight, default.head.weight)
