"""Compressed gradients on two processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from lightning_bigopt import (
    BF16,
    FP16,
    BatchSizeScheduler,
    BatchSizeSteps,
    GlobalBatchLoader,
    GradientClipping,
    GradientCompression,
    GradientNoiseScale,
    NonFinite,
    NormClip,
    PowerSGD,
    StepGuard,
    TopK,
)
from tests.distributed.scenarios import SaveAtSteps, fit, module
from tests.helpers import Regression, cpu_precision

COMPRESSORS = {
    "topk": TopK(keep=0.1),
    "powersgd": PowerSGD(rank=1),
    "fp16": FP16(),
    "bf16": BF16(),
}
RAMP = BatchSizeSteps({"0%": 4, "3 steps": 8, "6 steps": 12})


class Wide(L.LightningModule):
    """A network with matrices that PowerSGD compresses; keeps gradients and metrics."""

    def __init__(self, *, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 3))
        self.unused = nn.Linear(2, 9)
        self.uses_unused = 0  # bit 1: on the first process, bit 2: on the second one
        self.optimizer = optimizer
        self.bad: int | None = None
        self.bytes: list[tuple[float, float]] = []
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        if self.optimizer == "fused":
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = nn.functional.mse_loss(self.net(x), y / (index + 1).unsqueeze(1))
        if self.uses_unused & (1 << self.global_rank):
            loss = loss + self.unused(x[:, :2]).square().mean()
        return loss * math.nan if self.bad == batch_idx and self.global_rank else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(grads)) if grads else math.nan)


def flat(model: nn.Module) -> list[float]:
    return [v for p in model.parameters() for v in p.detach().float().flatten().tolist()]


def residuals(callback: GradientCompression) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in callback.residuals.items()}


def data(size: int = 64, micro: int = 2) -> GlobalBatchLoader:
    return GlobalBatchLoader(Regression(size), micro_batch_size=micro)


def unused() -> DDPStrategy:
    return DDPStrategy(find_unused_parameters=True)


def train(
    model: Wide, *callbacks: Any, ckpt: Any = None, policy: Any = RAMP, **options: Any
) -> L.Trainer:
    options = {"max_steps": 10, "strategy": unused(), "max_epochs": -1, **options}
    loader = options.pop("data", None) or data()
    extra = [] if policy is None else [BatchSizeScheduler(policy)]
    return fit("ddp", model, loader, *extra, *callbacks, ckpt=ckpt, **options)


def resumed(out: Path) -> Any:
    """Compares resumed runs with uninterrupted ones to the bit."""
    found = {}
    for name, compressor in COMPRESSORS.items():
        for precision in ("32-true", "bf16-mixed", "16-mixed"):
            case = f"{name} {precision}"
            runs = []
            folder = out / f"resumed {case}"
            for ckpt in (None, 4, 7):
                model, callback = Wide(), GradientCompression(compressor)
                path = None if ckpt is None else folder / f"{ckpt}.ckpt"
                saves = [SaveAtSteps(folder, {4, 7})] if ckpt is None else []
                options = cpu_precision(precision)
                if precision == "16-mixed":
                    options["plugins"][0].scaler._init_growth_tracker = 0
                    options["plugins"][0].scaler.set_growth_interval(3)
                clipping = GradientClipping(NormClip(max_norm=0.5))
                train(model, callback, clipping, *saves, ckpt=path, **options)
                runs.append((flat(model), residuals(callback)))
            found[case] = [run == runs[0] for run in runs[1:]], all(map(math.isfinite, runs[0][0]))
    return found


NAMES = ["resumed"]
