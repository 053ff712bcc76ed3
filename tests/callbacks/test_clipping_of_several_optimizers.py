"""Clipping with several optimizers, and with Muon, compared with plain loops and torch's clip."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bigopt import GradientClipping, MaxUpdateRatio, NormClip
from lightning_bigopt.gradients import clip_gradients_
from tests.helpers import QUIET

ROWS: Any = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class TwoOptimizers(L.LightningModule):
    """One backward pass, then a step of each of two optimizers."""

    def __init__(self, *, clips_itself: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.clips_itself = clips_itself

    def loss(self, batch: Tensor) -> Tensor:
        return self.head(self.body(batch).tanh()).square().sum()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.body.parameters(), lr=0.5, momentum=0.9),
            torch.optim.AdamW(self.head.parameters(), lr=0.01),
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.manual_backward(self.loss(batch))
        if self.clips_itself:
            clip_gradients_(self, NormClip(max_norm=0.1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def trained(module: Any, *callbacks: Any) -> list[Tensor]:
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(ROWS, batch_size=2))
    return [parameter.detach() for parameter in module.parameters()]


def expected(*, jointly: bool) -> list[Tensor]:
    module = TwoOptimizers(clips_itself=False)
    optimizers = module.configure_optimizers()
    for batch in ROWS.split(2):
        module.loss(batch).backward()
        parts = [module] if jointly else [module.body, module.head]
        for part in parts:
            nn.utils.clip_grad_norm_(part.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in module.parameters()]


def test_each_optimizer_is_clipped_by_its_own_norm() -> None:
    callback = GradientClipping(NormClip(max_norm=0.1))
    found = trained(TwoOptimizers(clips_itself=False), callback)
    for mine, theirs in zip(found, expected(jointly=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert any(
        (mine - other).abs().max() > 1e-3
        for mine, other in zip(found, expected(jointly=True), strict=True)
    )


def test_one_norm_over_all_optimizers_is_clipped_after_the_backward_pass() -> None:
    found = trained(TwoOptimizers(clips_itself=True))
    for mine, theirs in zip(found, expected(jointly=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------- Muon


def muon_run(
    *, momentum: float, scale: float = 1.0, max_norm: float | None = None, spike: float = 1.0
) -> Tensor:
    """Trains one matrix with Muon; the gradient of update 2 is multiplied by ``spike``."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Muon([weight], lr=0.1, weight_decay=0.0, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    for update in range(5):
        weight.grad = scale * torch.randn(6, 4, generator=generator)
        if update == 2:
            weight.grad *= spike
        if max_norm is not None:
            clip_gradients_(weight, NormClip(max_norm=max_norm), optimizer=optimizer)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_muon_removes_the_scale_of_the_gradient(momentum: float) -> None:
    plain = muon_run(momentum=momentum)
    assert torch.equal(muon_run(momentum=momentum, scale=2.0**-8), plain)


def test_clipping_changes_only_the_weights_in_the_momentum_of_muon() -> None:
    # Without momentum a spike and its clipping have no effect. Muon computes in bfloat16: five
    # updates of length 0.1 per row differ by about 0.1 * 5 * 2**-8 in rounding.
    for max_norm in (None, 0.5):
        clipped = muon_run(momentum=0.0, max_norm=max_norm, spike=2.0**10)
        torch.testing.assert_close(clipped, muon_run(momentum=0.0), rtol=0, atol=1e-2)
    # With momentum a spike dominates the buffer for many updates; clipped, it counts as one of
    # them. A clip that acts on every update is a normalization of the gradients in the buffer.
    clean = muon_run(momentum=0.95)
    spiked = muon_run(momentum=0.95, spike=2.0**10)
    clipped = muon_run(momentum=0.95, spike=2.0**10, max_norm=6.0)
    assert (clipped - clean).norm() < 0.2 * (spiked - clean).norm()


def test_max_update_ratio_limits_the_step_of_muon() -> None:
    class Matrix(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4, bias=False)
            self.ratios: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).square().sum()

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            self.before = self.layer.weight.detach().clone()

        def on_train_batch_end(self, *arguments: Any) -> None:
            change = (self.layer.weight.detach() - self.before).norm()
            self.ratios.append(float(change / self.before.norm()))

        def configure_optimizers(self) -> Any:
            return torch.optim.Muon(self.parameters(), lr=0.1)

    limited, free = Matrix(), Matrix()
    trained(limited, GradientClipping(MaxUpdateRatio(0.01)))
    trained(free, GradientClipping(NormClip(max_norm=1e-3)))
    assert max(limited.ratios) <= 0.0101
    assert min(free.ratios) > 0.02  # the norm of the gradient does not limit the step
