"""Spike scores, activations and warnings about clipping on two processes of the CPU.

Each function returns plain data that ``test_stability.py`` compares. All run in one start-up::

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m \
        tests.distributed.stability_scenarios FOLDER
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_bigopt import GradientClipping, NonFinite, NormClip, OptimizationMonitor, StepGuard
from lightning_bigopt.reporting.runs import read_run
from tests.distributed.capability_scenarios import Saves, numbers, trainer
from tests.engine.test_rollback import FakeRollback
from tests.helpers import Probe, ResumableLoader, cpu_precision, full

UPDATES, SAVED = 100, 70
# By update and process: factors on the loss.
FACTORS = {(66, 1): 60.0, (80, 1): math.nan, (90, 0): 90.0}
KEPT, ROLLED_BACK = 69, (77, 95)  # see FakeRollback
LABELS = ("first", "tanh", "last")


def rank() -> int:
    return int(os.environ["RANK"])


class Split(ResumableLoader):
    """Gives two of three rows to the first process, and one to the second."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        mine = slice(0, 2) if rank() == 0 else slice(2, 3)
        return ([part[mine] for part in batch] for batch in super().__iter__())


class Recorded(Probe):
    """Records loss, size and norm of each window, and may clip by itself."""

    def __init__(self, limit: float | None = None, **options: Any) -> None:
        super().__init__(**{"lr": 1e-4, "optimizer": torch.optim.AdamW, **options})
        self.limit = limit
        self.parts: list[list[float]] = []
        self.batches: list[list[list[float]]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = self.loss(x, y / (1 + index).unsqueeze(1))
        update, micro_batch = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        loss = loss * (1.0 if micro_batch else FACTORS.get((update, rank()), 1.0))
        self.parts.append([loss.item(), float(len(x))])
        return loss

    def on_after_backward(self) -> None:
        if self.limit is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.limit)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        squares = [float(full(gradient).double().square().sum()) for gradient in gradients]
        # A rejected update has no gradients.
        self.norms.append(math.sqrt(math.fsum(squares)) if squares else math.nan)
        self.batches.append(self.parts)
        self.parts = []


class Measured(Probe):
    """Records outputs of the layers, and their gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"optimizer": torch.optim.AdamW, **options})
        self.kept: dict[str, list[Tensor]] = {}
        self.sizes: list[dict[str, float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h = batch[0]
        for label, layer in zip(LABELS, self.net, strict=True):
            h = layer(h)
            h.retain_grad()
            self.kept.setdefault(label, []).append(h)
        return nn.functional.mse_loss(h, batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        sizes = {}
        for label, outputs in self.kept.items():
            gradients: Any = [output.grad for output in outputs]
            for prefix, tensors in (("", outputs), ("grad_", gradients)):
                flat = torch.cat([t.detach().double().flatten() for t in tensors])
                sizes[f"activations/{prefix}rms/{label}"] = float(flat.square().mean().sqrt())
                sizes[f"activations/{prefix}max/{label}"] = float(flat.abs().max())
                sizes[f"activations/{prefix}zeros/{label}"] = float((flat == 0).double().mean())
        self.sizes.append(sizes)
        self.kept = {}


class Sharding:
    """FSDP2 for a Probe; list it before the module."""

    def configure_model(self: Any) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class ShardedRecorded(Sharding, Recorded):
    pass


class ShardedMeasured(Sharding, Measured):
    pass


def recorded(name: str, **options: Any) -> Recorded:
    return (Recorded if name == "ddp" else ShardedRecorded)(**options)


def scored(out: Path) -> Any:
    """Trains with spikes on single processes, and resumes between two logged updates."""
    found = {}
    for name, precision, accumulate in (
        ("ddp", "32-true", 1),
        ("ddp", "16-mixed", 2),
        ("fsdp2", "bf16-mixed", 1),
    ):
        path = out / f"{name} {precision} {accumulate}.ckpt"
        models, states = [], []
        for resume in ({}, {"ckpt_path": path, "weights_only": False}):
            model, monitor = recorded(name), OptimizationMonitor(every=40, layers=None)
            # The scaler handles the NaN itself.
            guard = [] if precision == "16-mixed" else [StepGuard([NonFinite()])]
            callbacks = [*guard, GradientClipping(NormClip(1e6)), monitor]
            if not resume:
                callbacks.append(Saves(path, at=SAVED))
            options = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
            options |= cpu_precision(precision)
            data = Split(3 * UPDATES * accumulate, 3)
            trainer(name, *callbacks, **options).fit(model, data, **resume)
            models.append(model)
            states.append(monitor.saved_state()["stability"])
        found[f"{name} {precision} {accumulate}"] = {
            "states": states,
            "windows": models[0].batches,
            "norms": models[0].norms,
        }
    return found


def rolled_back(out: Path) -> Any:
    """Restores a snapshot that was taken between two logged updates."""
    model, monitor = Recorded(), OptimizationMonitor(every=40, layers=None)
    taken, reductions = monitor.snapshot, []
    reduce = torch.distributed.all_reduce

    def snapshot() -> Any:
        torch.distributed.all_reduce = lambda *args, **kwargs: reductions.append("all_reduce")
        try:
            return taken()
        finally:
            torch.distributed.all_reduce = reduce

    monitor.snapshot = snapshot  # type: ignore[method-assign]
    guards = [StepGuard([NonFinite()]), FakeRollback(keep=KEPT, at=ROLLED_BACK)]
    clipping = GradientClipping(NormClip(1e6))
    trainer("ddp", *guards, clipping, monitor, max_epochs=1).fit(model, Split(3 * UPDATES, 3))
    return {
        "state": monitor.saved_state()["stability"],
        "windows": model.batches,
        "norms": model.norms,
        "collectives": reductions,
    }


def measured(out: Path) -> Any:
    """Logs activations, and trains without the monitor for comparison."""
    found = {}
    patterns = {"first": "net.0", "tanh": "net.1", "last": "net.2"}
    for name in ("ddp", "ddp static", "fsdp2"):
        weights, logged, sizes = [], {}, []
        for callbacks in ([], [OptimizationMonitor(every=2, layers=None, activations=patterns)]):
            model = ShardedMeasured() if name == "fsdp2" else Measured()
            # torch's static graph does not allow windows of several micro-batches.
            windows = 1 if name == "ddp static" else 2
            options: dict[str, Any] = {"accumulate_grad_batches": windows, "max_epochs": 1}
            if name == "ddp static":
                options["strategy"] = DDPStrategy(static_graph=True)
            logger = TensorBoardLogger(out / name, version=str(len(callbacks)))
            trainer(name, *callbacks, logger=logger, **options).fit(model, Split(18 * windows, 3))
            weights.append(numbers(dict(model.named_parameters())))
            if callbacks and rank() == 0:
                read = read_run(logger.log_dir).curves  # Trainer.log_dir is a collective
                logged = {tag: dict(read[tag]) for tag in read if "activations" in tag}
            sizes = model.sizes
        found[name] = {"weights": weights, "logged": logged, "sizes": sizes}
    return found


class Lines(logging.Handler):
    """Keeps the lines of a logger."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def warned(out: Path) -> Any:
    """Clips in the module before GradientClipping, or never."""
    found = {}
    for name, limit in (("ddp", 0.3), ("fsdp2", 0.3), ("ddp", None)):
        lines = Lines()
        rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        rank_zero.addHandler(lines)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, clipping = recorded(name, limit=limit), GradientClipping(NormClip(1e6))
            trainer(name, clipping, max_epochs=1).fit(model, Split(3 * 50, 3))
        rank_zero.removeHandler(lines)
        texts = [str(w.message) for w in caught]
        found[f"{name} {limit}"] = {
            "warnings": [text for text in texts if "GradientClipping" in text],
            "lines": [line for line in lines.lines if line.startswith("NormClip")],
        }
    return found


NAMES = ["scored", "rolled_back", "measured", "warned"]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    results = {name: globals()[name](out) for name in NAMES}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
