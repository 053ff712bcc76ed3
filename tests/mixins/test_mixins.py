"""Mixins: a LightningModule that brings its own callbacks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

import lightning_bigopt as bigopt
from lightning_bigopt import (
    BatchSizePolicyMixin,
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GradientClipping,
    GradientClippingMixin,
    GradientNoiseScale,
    GradientNoiseScaleMixin,
    HyperparameterScheduleMixin,
    HyperparameterScheduler,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    OptimizationMonitorMixin,
    ReduceOnPlateau,
    ReduceOnPlateauMixin,
    StepGuard,
    StepGuardMixin,
    WarmupCosine,
)
from lightning_bigopt.engine.capability import Capability
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


def test_every_capability_has_a_mixin() -> None:
    capabilities = {c for c in vars(bigopt).values() if is_capability(c)}
    # BatchSizePolicyMixin accepts it as a BatchSizeScheduler.
    capabilities.remove(bigopt.MeasuredBatchSize)
    owned = {mixin.owns[0] for name, mixin in vars(bigopt).items() if name.endswith("Mixin")}
    assert owned == capabilities
    assert len(capabilities) == 10


def is_capability(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Capability)


def test_batch_size_mixin_accepts_a_measured_batch_size() -> None:
    class Measured(bigopt.BatchSizePolicyMixin, L.LightningModule):
        def configure_batch_size_policy(self) -> Any:
            return bigopt.MeasuredBatchSize(8, high=32)

    module = Measured()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    (callback,) = module.configure_callbacks()
    assert isinstance(callback, bigopt.MeasuredBatchSize)


class OtherMixins(
    StepGuardMixin,
    OptimizationMonitorMixin,
    HyperparameterScheduleMixin,
    ReduceOnPlateauMixin,
    GradientNoiseScaleMixin,
    LearningRateScheduleMixin,
    Probe,
):
    """Defines what has no default, and logs the metric that ReduceOnPlateau reads."""

    def configure_hyperparameter_schedules(self) -> dict[str, Any]:
        return {"weight_decay": Linear(end=0.5), "eps": Linear(end=0.1)}

    def configure_learning_rate_schedule(self) -> Constant:
        return Constant()

    def configure_reduce_on_plateau(self) -> ReduceOnPlateau:
        return ReduceOnPlateau("size", patience=0, check="train_epoch")

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        self.log("size", 1.0)


def test_other_mixins_train_to_the_same_bits_as_callbacks() -> None:
    mixed, plain = OtherMixins(optimizer=torch.optim.AdamW), Probe(optimizer=torch.optim.AdamW)
    plain.on_train_batch_end = lambda *_: plain.log("size", 1.0)
    ours = fit(mixed, [], max_epochs=4)
    theirs = fit(
        plain,
        [
            StepGuard(),
            OptimizationMonitor(),
            HyperparameterScheduler("weight_decay", Linear(end=0.5)),
            HyperparameterScheduler("eps", Linear(end=0.1)),
            ReduceOnPlateau("size", patience=0, check="train_epoch"),
            GradientNoiseScale(),
            LearningRateScheduler(Constant()),
        ],
        max_epochs=4,
    )
    assert [type(c) for c in ours.callbacks if is_capability(type(c))] == [
        StepGuard,
        OptimizationMonitor,
        HyperparameterScheduler,
        HyperparameterScheduler,
        ReduceOnPlateau,
        GradientNoiseScale,
        LearningRateScheduler,
    ]
    assert mixed.lrs == plain.lrs
    assert mixed.lrs[-1] < mixed.lrs[0]  # the plateau was found
    group, expected = ours.optimizers[0].param_groups[0], theirs.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["eps"]) == (expected["weight_decay"], expected["eps"])
    for mine, other in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("mixin", [GradientClippingMixin, StepGuardMixin])
def test_mixin_listed_after_a_module_raises_with_the_right_order(mixin: type) -> None:
    with pytest.raises(
        TypeError,
        match=rf"must list {mixin.__name__} before .*write class Wrong\({mixin.__name__}, Probe\)",
    ):
        type("Wrong", (Probe, mixin), {})
    with pytest.raises(TypeError, match=rf"class Wrong\({mixin.__name__}, LightningModule\)"):
        type("Wrong", (L.LightningModule, mixin), {})


def test_order_is_right_if_a_base_class_of_the_user_has_mixins_too() -> None:
    class Base(StepGuardMixin, Probe):
        pass

    class Model(GradientClippingMixin, Base):
        def configure_clipping_rule(self) -> NormClip:
            return RULE

    trainer = fit(Model(), [])
    assert {StepGuard, GradientClipping} <= {type(c) for c in trainer.callbacks}

    class Reversed(Base, GradientClippingMixin):  # Python places the mixin before LightningModule
        def configure_clipping_rule(self) -> NormClip:
            return RULE

    trainer = fit(Reversed(), [])
    assert {StepGuard, GradientClipping} <= {type(c) for c in trainer.callbacks}


def test_configure_callbacks_of_any_base_class_without_super_raises() -> None:
    class Drops:
        def configure_callbacks(self) -> list[Any]:
            return []

        def on_fit_start(self) -> None:
            """Calls no super either."""

    class Model(Drops, StepGuardMixin, Probe):
        pass

    with pytest.raises(RuntimeError, match="must keep the StepGuard of its mixin"):
        fit(Model(), [])


def test_configure_callbacks_may_return_one_callback_or_add_some() -> None:
    class Own(L.Callback):
        pass

    class Model(StepGuardMixin, Probe):
        def configure_callbacks(self) -> list[Any]:
            return [*super().configure_callbacks(), Own()]

    assert sum(isinstance(c, StepGuard | Own) for c in fit(Model(), []).callbacks) == 2

    class Single(StepGuardMixin, Probe):
        guard = StepGuard()

        def configure_step_guard(self) -> StepGuard:
            return self.guard

        def configure_callbacks(self) -> Any:
            return self.guard

    assert sum(isinstance(c, StepGuard) for c in fit(Single(), []).callbacks) == 1


def test_second_module_of_the_class_brings_its_own_callbacks() -> None:
    first = OtherMixins(optimizer=torch.optim.AdamW)
    trainer = fit(first, [], max_epochs=1)
    old = {id(c) for c in trainer.callbacks if is_capability(type(c))}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(OtherMixins(optimizer=torch.optim.AdamW), loader(27, 2))
    new = [c for c in trainer.callbacks if is_capability(type(c))]
    assert len(new) == 7
    assert not old & {id(c) for c in new}


def test_mixins_return_a_list_of_hyperparameter_schedulers() -> None:
    class Model(HyperparameterScheduleMixin, Probe):
        def configure_hyperparameter_schedules(self) -> list[HyperparameterScheduler]:
            return [
                HyperparameterScheduler("weight_decay", Linear(end=0.5)),
                HyperparameterScheduler("momentum", Linear(end=0.5)),
            ]

    trainer = fit(Model(optimizer=lambda p, lr: torch.optim.SGD(p, lr, 0.9)), [])
    fields = [c.field for c in trainer.callbacks if isinstance(c, HyperparameterScheduler)]
    assert fields == ["weight_decay", "momentum"]
