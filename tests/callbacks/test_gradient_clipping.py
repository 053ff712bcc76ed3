"""GradientClipping in fits: equal to torch's clipping in every precision; conflicts."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_bigopt import (
    AGC,
    ClippingRule,
    GradientClipping,
    GradientClippingMixin,
    Groups,
    Linear,
    NormClip,
    UpdateClip,
    ValueClip,
    ZClip,
)
from lightning_bigopt.gradients import clip_gradients_
from tests.helpers import Probe, cpu_precision, fit, loader


class RecordsUnclippedNorm(Probe):
    """Records the norm of the unclipped gradient, computed in float64."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unclipped_norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        x, y, _ = self.open[-1]
        truth = self._expected_gradient(x, y)
        self.unclipped_norms.append(float(torch.stack([t.norm() for t in truth]).norm()))
        super().on_before_optimizer_step(optimizer)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradient_norm_is_limited(precision: str) -> None:
    module = RecordsUnclippedNorm(lr=0.01)
    fit(
        module,
        loader(32, 2),
        GradientClipping(NormClip(max_norm=0.7)),
        max_epochs=1,
        **cpu_precision(precision),
    )
    tolerance = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 5e-3}[precision]
    assert max(module.unclipped_norms) > 1.4
    assert len(module.norms) == 16
    for norm, true in zip(module.norms, module.unclipped_norms, strict=True):
        assert norm == pytest.approx(min(true, 0.7), rel=tolerance)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_training_equals_torch_clip_grad_norm(precision: str, kind: str) -> None:
    """The reference clips in the module's hook, and unscales first for a fused optimizer."""
    options = {
        "for-loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }

    class Reference(Probe):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None and kind == "fused":
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)

    arguments = {"lr": 0.05, "optimizer": torch.optim.AdamW, **options[kind]}
    ours, theirs = Probe(**arguments), Reference(**arguments)
    fit(
        ours,
        loader(24, 2),
        GradientClipping(NormClip(max_norm=0.5)),
        max_epochs=2,
        **cpu_precision(precision),
    )
    fit(theirs, loader(24, 2), max_epochs=2, **cpu_precision(precision))
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)


def test_value_clip_limits_every_entry() -> None:
    class Entries(Probe):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.norms.append(max(float(p.grad.abs().max()) for p in self.parameters()))

    module = Entries(lr=0.0)
    fit(module, loader(16, 2), GradientClipping(ValueClip(max_abs=0.03)), max_epochs=1)
    assert module.norms == pytest.approx([0.03] * 8, rel=1e-6)


def test_fused_optimizer_keeps_no_scale_after_a_fit() -> None:
    module = Probe(optimizer=torch.optim.AdamW, fused=True)
    trainer = fit(module, loader(8, 2), GradientClipping(NormClip(max_norm=0.1)), max_epochs=1)
    optimizer = trainer.optimizers[0]
    assert getattr(optimizer, "grad_scale", None) is None
    assert getattr(optimizer, "found_inf", None) is None


def test_each_optimizer_is_clipped_separately_under_manual_optimization() -> None:
    class Manual(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
            self.norms: list[float] = []

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.0) for net in self.nets]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()
                self.norms.append(
                    float(nn.utils.get_total_norm([p.grad for p in net.parameters()]))
                )

    module = Manual()
    fit(module, loader(8, 2), GradientClipping(NormClip(max_norm=0.2)), max_epochs=1)
    assert module.norms == pytest.approx([0.2] * 8, rel=1e-4)


class ManualModuleWithMixin(GradientClippingMixin, L.LightningModule):
    """Manual optimization: one optimizer steps every batch, the other one every second batch."""

    def __init__(self, rule: ClippingRule) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rule = rule
        torch.manual_seed(0)
        self.nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def configure_clipping_rule(self) -> ClippingRule:
        return self.rule

    def configure_optimizers(self) -> Any:
        first, second = (net.parameters() for net in self.nets)
        return [
            torch.optim.AdamW(first, lr=0.1, fused=True),
            torch.optim.Adam(second, lr=0.1, foreach=True),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, (net, optimizer) in enumerate(zip(self.nets, self.optimizers(), strict=True)):
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            if index == 0 or batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    "rule",
    [NormClip(0.2), ZClip(warmup=2, z_threshold=0.1), AGC(0.02), UpdateClip(0.3)],
    ids=lambda rule: type(rule).__name__,
)
def test_mixin_clips_under_manual_optimization(rule: ClippingRule) -> None:
    module = ManualModuleWithMixin(rule)
    data = loader(16, 2)
    fit(module, data, max_epochs=1)
    plain = ManualModuleWithMixin(rule)
    optimizers = plain.configure_optimizers()
    states = [rule.initial_state() for _ in optimizers]
    for batch_idx, batch in enumerate(data):
        for index, (net, optimizer) in enumerate(zip(plain.nets, optimizers, strict=True)):
            nn.functional.mse_loss(net(batch[0]), batch[1]).backward()
            if index == 0 or batch_idx % 2:
                clip_gradients_(net, rule, state=states[index], optimizer=optimizer)
                optimizer.step()
                optimizer.zero_grad()
    untrained = ManualModuleWithMixin(rule)
    for mine, theirs, start in zip(
        module.parameters(), plain.parameters(), untrained.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, start)


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_clip_value_that_is_off_in_lightning_is_no_conflict(off: Any) -> None:
    clipped, bare = Probe(), Probe()
    rule = GradientClipping(NormClip(max_norm=1e9))
    fit(clipped, loader(8, 2), rule, max_epochs=1, gradient_clip_val=off)
    fit(bare, loader(8, 2), max_epochs=1, gradient_clip_val=off)
    for mine, other in zip(clipped.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_second_source_of_clipping_raises_at_fit_start() -> None:
    with pytest.raises(ValueError, match=r"gradient_clip_val must be None.*got 1.0"):
        fit(
            Probe(), loader(8, 2), GradientClipping(NormClip()), max_epochs=1, gradient_clip_val=1.0
        )

    class ClipsItself(Probe):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            """Clips by itself."""

    with pytest.raises(ValueError, match="configure_gradient_clipping"):
        fit(ClipsItself(), loader(8, 2), GradientClipping(NormClip()), max_epochs=1)


def test_the_same_callback_twice_raises() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"GradientClipping|gradient clipping"):
        fit(
            Probe(),
            loader(8, 2),
            GradientClipping(NormClip()),
            GradientClipping(NormClip()),
            max_epochs=1,
        )


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan")])
def test_invalid_limits_raise_with_their_names(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"max_norm must be .*got {bad}"):
        NormClip(max_norm=bad)
    with pytest.raises(ValueError, match=rf"max_abs must be .*got {bad}"):
        ValueClip(max_abs=bad)
    with pytest.raises(ValueError, match=r"rule must be a ClippingRule, got 1.0"):
        GradientClipping(1.0)  # type: ignore[arg-type]


def test_schedule_inside_groups_needs_the_horizon() -> None:
    rule = Groups({"net.0.*": NormClip(max_norm=0.2, schedule=Linear()), "*": None})
    module = Probe(lr=0.0)
    fit(module, loader(8, 2), GradientClipping(rule), max_epochs=1)
    assert GradientClipping(rule).needs_horizon
    assert not GradientClipping(NormClip()).needs_horizon
    assert len(module.norms) == 4
