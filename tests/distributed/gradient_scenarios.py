"""Unusual gradients on two processes: not averaged, of replaced parameters."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.fsdp import fully_shard

from lightning_bigopt import (
    AutoClip,
    BatchSizeScheduler,
    BatchSizeSteps,
    ClipToMedian,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
    MaxUpdateRatio,
    NonFinite,
    NormClip,
    NormSpike,
    StepGuard,
    UpdateClip,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from tests.distributed.scenarios import Sharded, fit, in_order, weights
from tests.helpers import Probe, full, loader


class Own(Probe):
    """Keeps the norm of the gradient of this process after clipping."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [full(p.grad) for p in self.net.parameters() if p.grad is not None]
        if grads:  # not if the update is rejected
            self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))


class LocalSGD(Own):
    """Every process keeps its own gradient, as in the local phase of post-local SGD."""

    spike = False

    def on_fit_start(self) -> None:
        alone, _ = torch.distributed.new_subgroups(1)
        state = local_sgd.PostLocalSGDState(None, alone, start_localSGD_iter=0)
        self.trainer.strategy.model.register_comm_hook(state, local_sgd.post_localSGD_hook)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        loss = self.loss(x, y / (index + 1).unsqueeze(1))  # targets of equal size
        return loss * 100 if self.spike and self.global_rank and batch_idx == 6 else loss


class Unclipped(Capability):
    """Keeps the norm of this process, before clipping."""

    owns, rank = "test", 30

    def __init__(self) -> None:
        self.norms: list[float] = []

    def needs_norms(self, update: Any) -> bool:
        self.norms.append(update.measure().value)
        return False


def local_gradients(out: Path) -> Any:
    """Clips gradients that the processes do not average, with and without a guard."""
    found = {}
    rules = {"fixed": NormClip(max_norm=0.5), "adaptive": ZClip(warmup=2, z_threshold=0.1)}
    for name, rule in rules.items():
        for guards in ([], [StepGuard()]):
            model, before = LocalSGD(lr=0.01), Unclipped()
            fit("ddp", model, loader(32, 2), *guards, GradientClipping(rule), before, max_epochs=1)
            key = f"{name} {'with' if guards else 'without'} guard"
            found[key] = {"before": before.norms, "after": model.norms, "weights": weights(model)}
    model, before = LocalSGD(lr=0.01), Unclipped()
    model.spike = True
    guard = StepGuard([NormSpike(armed=3)], actions=[ClipToMedian()])
    fit("ddp", model, loader(32, 2), guard, before, max_epochs=1)
    rejected = [r.update for r in guard.rejections]
    found["spike"] = {"before": before.norms, "after": model.norms, "rejected": rejected}
    return found


class Replaces(Own):
    """Replaces a parameter after the second update, in the module and in the optimizer."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 2:
            old = self.net[2].weight
            self.net[2].weight = nn.Parameter(full(old.detach()).clone())
            (group,) = self.trainer.optimizers[0].param_groups
            group["params"] = [self.net[2].weight if p is old else p for p in group["params"]]


class ShardedReplaces(Sharded, Replaces):
    """The same under FSDP2."""

    on_before_optimizer_step = Own.on_before_optimizer_step


def replaced(out: Path) -> Any:
    """Collects the warnings about a replaced parameter."""
    found = {}
    for name in ("ddp", "fsdp2"):
        model = (Replaces if name == "ddp" else ShardedReplaces)(lr=0.01)
        options: dict[str, Any] = {"max_epochs": 1, "use_distributed_sampler": False}
        if name == "ddp":
            options["strategy"] = DDPStrategy(find_unused_parameters=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = loader(32, 4, sampler=in_order(32))
            fit(name, model, data, GradientClipping(NormClip(max_norm=0.5)), **options)
        texts = [str(one.message) for one in caught]
        found[name] = [text for text in texts if "got new ones" in text]
    return found


class Partitioned(Own):
    """Every process keeps the moments of a part of the parameters."""

    def configure_optimizers(self) -> Any:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=0.5)

    def on_train_start(self) -> None:
        self.ratios: list[float] = []
        self.before = weights(self)

    def on_train_batch_end(self, *args: Any) -> None:
        before, self.before = torch.tensor(self.before), weights(self)
        self.ratios.append(float((torch.tensor(self.before) - before).norm() / before.norm()))


def partitioned(out: Path) -> Any:
    """Limits updates whose moments are not in the state of the optimizer."""
    data, model = loader(32, 4), Partitioned()
    fit("ddp", model, data, GradientClipping(MaxUpdateRatio(0.01)), max_epochs=1)
    try:
        fit("ddp", Partitioned(), data, GradientClipping(UpdateClip()), max_epochs=1)
    except ValueError as error:
        return {"ratios": model.ratios, "weights": weights(model), "error": str(error)}
    return None


class MovingMean(Own):
    """A buffer that the forward pass moves; the fourth batch of the second process is a NaN."""

    def __init__(self) -> None:
        super().__init__(lr=0.01)
        self.register_buffer("mean", torch.zeros(4))
        self.means: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, _ = batch
        x = x * math.nan if self.global_rank and batch_idx == 3 else x
        self.mean.lerp_(x.mean(0), 0.1)
        return self.loss(x - self.mean, y)

    def on_train_batch_start(self, *args: Any) -> None:
        self.means.append(self.mean.tolist())


def buffers(out: Path) -> Any:
    """Rejects a batch that spoils a buffer of one process."""
    model, guard = MovingMean(), StepGuard([NonFinite()])
    fit("ddp", model, loader(48, 4), guard, max_epochs=1)
    rejected = [r.update for r in guard.rejections]
    return {"means": model.means, "rejected": rejected, "end": model.mean.tolist()}


class Words(Own):
    """An embedding with sparse or dense gradients before the network."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__(lr=0.01)
        self.table = nn.Embedding(48, 4, sparse=sparse)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _, index = batch
        factor = math.nan if self.global_rank and batch_idx == 3 else 1.0
        return self.net(x + self.table(index)).square().mean() * factor


def sparse(out: Path) -> Any:
    """Clips, guards and measures sparse gradients that DDP averages, and dense ones."""
    found = {}
    for is_sparse in (True, False):
        model, noise = Words(sparse=is_sparse), GradientNoiseScale(minimum_updates=2)
        guard, before = StepGuard([NonFinite()]), Unclipped()
        callbacks = [GradientClipping(NormClip(max_norm=0.05)), guard, noise, before]
        fit("ddp", model, loader(48, 4), *callbacks, max_epochs=1)
        found["sparse" if is_sparse else "dense"] = {
            "norms": before.norms,
            "rejected": [r.update for r in guard.rejections],
            "noise": noise.saved_state()["estimator"],
            "weights": [*weights(model), *model.table.weight.detach().flatten().tolist()],
        }
    return found


def static_graph(out: Path) -> Any:
    """Accumulates under DDP with a static graph, from the first window on and after it."""
    errors = []
    rate = LearningRateScheduler(Linear(start=1.0, end=0.0))
    policy = BatchSizeScheduler(BatchSizeSteps({"0%": 16, "50%": 32}))
    for callback, accumulate in ((rate, 2), (policy, 1)):
        options: dict[str, Any] = {"strategy": DDPStrategy(static_graph=True), "max_epochs": 1}
        try:
            model, data = Own(lr=0.01), loader(32, 4)
            fit("ddp", model, data, callback, accumulate_grad_batches=accumulate, **options)
        except ValueError as error:
            errors.append(str(error))
    trained = []
    for strategy in (DDPStrategy(static_graph=True), DDPStrategy()):
        later = BatchSizeScheduler(BatchSizeSteps({"0%": 8, "1 steps": 16}))
        model = Own(lr=0.01)
        fit("ddp", model, loader(48, 4), later, strategy=strategy, max_epochs=2)
        trained.append(weights(model))
    return {"errors": errors, "trained": trained}


class TwoOptimizers(Probe):
    """Two optimizers that step together; keeps torch's norm of all whole gradients."""

    adversarial = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, second = (self.net[index].parameters() for index in (0, 2))
        return [
            torch.optim.SGD(first, lr=0.01, momentum=0.9),
            torch.optim.AdamW(second, lr=0.01, fused=True),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, index = batch
        y = y / (index + 1).unsqueeze(1)  # targets of equal size
        self.manual_backward(nn.functional.mse_loss(self.net(x), y))
        self.norms.append(self.total())
        for optimizer in self.optimizers():
            optimizer.step()
            if self.adversarial:
                self.manual_backward(nn.functional.mse_loss(self.net(x), y))
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def total(self) -> float:
        found = [full(p.grad) for p in self.net.parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(found))

    on_before_optimizer_step = L.LightningModule.on_before_optimizer_step


class FlatTwoOptimizers(TwoOptimizers):
    """The same under FSDP1, where every process has a part of each gradient, or none."""

    def total(self) -> float:
        found = [p.grad for p in self.net.parameters() if p.grad is not None]
        squares = nn.utils.get_total_norm(found) ** 2
        torch.distributed.all_reduce(squares)
        return float(squares**0.5)


class ShardedTwoOptimizers(TwoOptimizers):
    """The same under FSDP2: each layer is sharded by itself, or both together in one buffer."""

    together = False

    def configure_model(self) -> None:
        parts = [self.net] if self.together else [self.net[0], self.net[2]]
        for part in parts:
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class ShardedTogether(ShardedTwoOptimizers):
    """Both layers in one buffer, whose gradients are views with a common version."""

    together = True


SHARED = {
    "ddp": TwoOptimizers,
    "ddp views": TwoOptimizers,
    "fsdp2": ShardedTwoOptimizers,
    "fsdp2 together": ShardedTogether,
    "fsdp1": FlatTwoOptimizers,
}


def shared_norm(out: Path) -> Any:
    """Clips two optimizers by one norm; a backward pass between their steps is an error."""
    found: dict[str, Any] = {}
    rules = {"fixed": NormClip(max_norm=0.2), "adaptive": AutoClip(50), "error": NormClip()}
    for (case, build), (name, rule) in itertools.product(SHARED.items(), rules.items()):
        model, clipping = build(), GradientClipping(rule, scope="all")
        model.adversarial = name == "error"
        options: dict[str, Any] = {"max_epochs": 2, "use_distributed_sampler": False}
        if case == "ddp views":
            options["strategy"] = DDPStrategy(gradient_as_bucket_view=True)
        results = found.setdefault(case, {})
        try:
            data = loader(32, 4, sampler=in_order(32))
            fit(case.split()[0], model, data, clipping, **options)
        except ValueError as error:
            results[name] = str(error)
        else:
            state = clipping.saved_state()["rule"][""]
            results[name] = {"weights": weights(model), "torch": model.norms, **state}
    return found


NAMES = [
    "local_gradients",
    "replaced",
    "partitioned",
    "buffers",
    "sparse",
    "static_graph",
    "shared_norm",
]
