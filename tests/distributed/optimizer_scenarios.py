"""Scenarios of combined optimizers on two processes: steps, resume, Muon of shards."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    StepGuard,
    UpdateClip,
    combine_optimizers,
    muon_adamw,
)
from lightning_bigopt.optimizers import Muon
from tests.distributed.scenarios import (
    FlatShards,
    SaveAtSteps,
    Sharded,
    fit,
    in_order,
    weights,
)
from tests.helpers import QUIET, Probe, ResumableLoader, full, loader

MUON = functools.partial(torch.optim.Muon, lr=0.02)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)


class Parts(Probe):
    """Muon for the first matrix and AdamW for the rest, as one optimizer."""

    def configure_optimizers(self) -> Any:
        return combine_optimizers(self, {"net.0.weight": MUON, "*": ADAMW})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])


class ByHand(Parts):
    """The same as two optimizers in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = self.net[0].weight
        return [MUON([first]), ADAMW([p for p in self.parameters() if p is not first])]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(self.loss(batch[0], batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()


class ShardedParts(Parts, Sharded): ...


class ShardedByHand(ByHand, Sharded): ...


def steps(out: Path) -> Any:
    """Trains with one combined optimizer, and with its parts by hand."""
    found = {}
    for name in ("ddp", "fsdp2"):
        kinds = (Parts, ByHand) if name == "ddp" else (ShardedParts, ShardedByHand)
        found[name] = []
        for kind in kinds:
            model = kind()
            data = loader(32, 4, sampler=in_order(32))
            fit(name, model, data, max_epochs=2, use_distributed_sampler=False)
            found[name].append(weights(model))
    return found


class Recipe(Parts):
    def configure_optimizers(self) -> Any:
        return muon_adamw(self, lr=1e-2, momentum_warmup=5)


class ShardedRecipe(Recipe, Sharded): ...


def resumes(out: Path) -> Any:
    """Compares an uninterrupted run with resumed ones, from both kinds of sharded checkpoints."""
    found = {}
    for name in ("ddp", "sharded", "whole"):

        def run(*callbacks: Any, ckpt: Any = None, name: str = name) -> list[Any]:
            options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
            if name != "ddp":
                options["strategy"] = ModelParallelStrategy(
                    data_parallel_size=2,
                    tensor_parallel_size=1,
                    save_distributed_checkpoint=name == "sharded",
                )
            model = Recipe() if name == "ddp" else ShardedRecipe()
            trainer = fit(
                "ddp",
                model,
                ResumableLoader(24, 2),
                LearningRateScheduler(Linear(), groups={"Muon": Linear(end=0.5)}),
                GradientClipping(UpdateClip()),
                StepGuard(),
                *callbacks,
                ckpt=ckpt,
                **options,
            )
            (optimizer,) = trainer.optimizers
            groups = optimizer.param_groups
            return [
                weights(model),
                [group["lr"] for group in groups],
                [groups[0]["updates"], groups[0]["momentum"]],
            ]

        found[name] = {"straight": run(SaveAtSteps(out / f"parts {name}", {2, 5}))}
        for step in (2, 5):
            found[name][str(step)] = run(ckpt=out / f"parts {name}" / f"{step}.ckpt")
    return found


def sharded_muon(out: Path) -> Any:
    """Compares Muon of sharded and replicated matrices with whole ones, to the bit."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for shape in ((8, 6), (5, 9), (1, 4)):
        for label, placement in {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}.items():
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(shape, generator=generator)
            whole = nn.Parameter(start.clone())
            split = nn.Parameter(distribute_tensor(start, mesh, [placement]))
            optimizers = [
                Muon([p], lr=0.1, momentum_warmup=2, adjust_lr_fn="match_rms_adamw")
                for p in (whole, split)
            ]
            for _ in range(4):
                gradient = torch.randn(shape, generator=generator)
                whole.grad = gradient
                split.grad = distribute_tensor(gradient, mesh, [placement])
                for optimizer in optimizers:
                    optimizer.step()
            found[f"{shape} {label}"] = torch.equal(full(split.detach()), whole.detach())
    return found


def flat_muon(out: Path) -> Any:
    """Returns the error of the recipe under FSDP1."""
    trainer = L.Trainer(**QUIET, devices=2, strategy=FlatShards(), max_steps=1)
    try:
        trainer.fit(Recipe(), loader(16, 4))
    except ValueError as error:
        return str(error)
    return ""


def clipped(out: Path) -> Any:
    """Trains with all processes' gradients clipped by one norm; returns the weights."""
    found = {}
    for name in ("ddp", "fsdp2"):
        model = Parts() if name == "ddp" else ShardedParts()
        data = loader(32, 4, sampler=in_order(32))
        clipping = GradientClipping(NormClip(0.1))
        fit(name, model, data, clipping, max_epochs=1, use_distributed_sampler=False)
        found[name] = weights(model)
    return found


NAMES = ("steps", "resumes", "sharded_muon", "flat_muon", "clipped")
