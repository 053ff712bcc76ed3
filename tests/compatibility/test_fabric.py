"""Callbacks and mixins of this package raise under Fabric, which would not run them."""

from __future__ import annotations

import lightning.fabric
import lightning_fabric
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import lightning_bigopt as bigopt
from lightning_bigopt import GradientClippingMixin, NormClip, StepGuardMixin
from tests.faults.constructor_targets import targets

CALLBACKS = {
    t.name: t.call(**{name: value() for name, value in t.valid.items()})
    for t in targets()
    if isinstance(t.call, type) and issubclass(t.call, lightning.pytorch.Callback)
}
ADVICE = {
    "LearningRateScheduler": r"as_lr_scheduler\(",
    "GradientClipping": r"clip_gradients_\(",
    "StepGuard": r"inspect\(.*skip_update_",
    "GlobalBatchFinder": r"use lightning\.Trainer",
    "LearningRateRangeTest": r"use lightning\.Trainer",
}
PACKAGES = (lightning.fabric, lightning_fabric)


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(1, 1)
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


def train_one_step(fabric, module, optimizer, wrapped=None) -> None:
    wrapped = wrapped or module
    fabric.backward(wrapped(torch.ones(1, 1)).sum())
    optimizer.step()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_raises_before_the_first_batch(package, name):
    fabric = package.Fabric(accelerator="cpu", callbacks=[CALLBACKS[name]])
    with pytest.raises(ValueError, match=f"got {name} in Fabric; .*{ADVICE.get(name, '')}"):
        fabric.setup(*parts())


def test_every_public_callback_is_tested_and_has_an_advice():
    assert CALLBACKS.keys() >= {"GlobalBatchFinder", "LearningRateRangeTest", "StepGuard"}
    assert len(CALLBACKS) == 13
    for name, callback in CALLBACKS.items():
        with pytest.raises(ValueError) as caught:
            callback.on_after_setup()
        if not name.startswith(("GlobalBatch", "LearningRateRange")):
            assert "in the loop, use" in str(caught.value)


class Own(bigopt.GradientClipping):
    """A subclass of a user."""


def test_subclass_has_the_advice_of_its_base():
    fabric = lightning.fabric.Fabric(accelerator="cpu", callbacks=[Own(NormClip())])
    with pytest.raises(ValueError, match=r"got Own in Fabric; in the loop, use clip_gradients_"):
        fabric.setup(parts()[0])


def test_parts_that_are_set_up_alone_raise_in_the_first_step():
    fabric = lightning.fabric.Fabric(accelerator="cpu", callbacks=[bigopt.StepGuard()])
    module, optimizer = parts()
    module, optimizer = fabric.setup_module(module), fabric.setup_optimizers(optimizer)
    with pytest.raises(ValueError, match=r"got StepGuard in Fabric; in the loop, use inspect"):
        train_one_step(fabric, module, optimizer)


class Module(GradientClippingMixin, StepGuardMixin, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs):
        return self.layer(inputs)

    def configure_clipping_rule(self):
        return NormClip(max_norm=1.0)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_module_with_mixins_is_evaluated_but_not_trained(package):
    module = Module()
    assert package.Fabric(accelerator="cpu").setup(module)(torch.ones(1, 1)).shape == (1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    advice = r"got Module in Fabric; in the loop, use clip_gradients_.* and inspect"
    with pytest.raises(ValueError, match=advice):
        package.Fabric(accelerator="cpu").setup(module, optimizer)


@pytest.mark.parametrize(
    ("specification", "advice"),
    [
        (NormClip(max_norm=1.0), r"clip_gradients_\("),
        (bigopt.Cosine(), r"as_lr_scheduler\("),
        (bigopt.NonFinite(), r"inspect\("),
        (bigopt.Skip(), r"inspect\("),
        (bigopt.ConstantBatchSize(8), r"GlobalBatchLoader\("),
    ],
    ids=lambda value: type(value).__name__,
)
def test_specification_raises(specification, advice):
    fabric = lightning.fabric.Fabric(accelerator="cpu", callbacks=[specification])
    name = type(specification).__name__
    with pytest.raises(ValueError, match=rf"got {name}\(.*\) in Fabric; in the loop, use {advice}"):
        fabric.setup(parts()[0])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_fabric_itself_would_not_have_raised(package):
    """The hooks exist, and Fabric calls nothing else of a callback."""
    called = []

    class Silent(lightning.pytorch.Callback):
        def on_after_setup(self, fabric, module):
            called.append("setup")

        def on_after_optimizer_step(self, strategy, optimizer):
            called.append("step")

    fabric = package.Fabric(accelerator="cpu", callbacks=[Silent()])
    train_one_step(fabric, *fabric.setup(*parts()))
    assert called == ["setup", "step"]
