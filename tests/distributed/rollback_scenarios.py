"""Rollbacks on two processes of the CPU, one of which has bad samples.

Each function returns plain data that ``test_rollbacks.py`` compares. All run in one start-up::

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m \
        tests.distributed.rollback_scenarios FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_bigopt import GradientNoiseScale, StepGuard, TooManyRejectionsError
from tests.distributed.capability_scenarios import numbers
from tests.rolled_back import (
    BATCH,
    LosesFiles,
    Ordered,
    Plain,
    Poisoned,
    SavesAndStops,
    StopError,
    guard,
    order_of,
    train,
)

SAMPLES = 120
CASES = {
    "ddp memory": {"name": "ddp"},
    "ddp bf16 folder": {"name": "ddp", "precision": "bf16-mixed", "to": "folder"},
    "ddp 16 memory": {"name": "ddp", "precision": "16-mixed"},
    "fsdp2 memory": {"name": "fsdp2"},
    "fsdp2 folder": {"name": "fsdp2", "to": "folder"},
    "ddp lost file": {"name": "ddp", "to": "folder", "loses": True},
}


class Sharded(Poisoned):
    """The network under FSDP2."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.net[2] = nn.Identity()

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[3]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def weights(module: Any, trainer: Any) -> dict[str, Any]:
    (optimizer,) = trainer.optimizers
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for index, state in enumerate(optimizer.state.values()):
        found |= {f"{index} {name}": torch.as_tensor(value) for name, value in state.items()}
    return numbers(found)


def case(
    out: Path,
    *,
    name: str,
    precision: str = "32-true",
    to: str = "memory",
    loses: bool = False,
) -> Any:
    order = order_of(SAMPLES, 4)
    # Under 16-mixed the scaler skips NaN: the loss is high instead.
    scaled = precision == "16-mixed"
    first, updates = (90, 4) if scaled else (8, 2)
    bad = order[first * BATCH : (first + updates) * BATCH]
    kind = Poisoned if name == "ddp" else Sharded
    folder = str(out / "snapshots") if to == "folder" else to
    steps = 106 if scaled else 24
    snapshot = 1 if loses else 86 if scaled else 6

    def losses() -> list[Any]:
        return [LosesFiles(Path(folder), 1, rank=1)] if loses else []

    def own(**options: Any) -> StepGuard:
        if scaled:
            options |= {"updates": 4, "recover": 0}
        return guard(**{"to": folder, **options})

    def fitted(module: Any, data: Any, used: StepGuard, *more: Any, **options: Any) -> Any:
        return train(
            module,
            data,
            used,
            GradientNoiseScale(),
            *more,
            precision=precision,
            micro=2,
            steps=steps,
            strategy=strategy(name),
            devices=2,
            **options,
        )

    factor = {"factor": 30.0} if scaled else {}
    module, used = kind(bad, rank=None if scaled else 1, lr=1e-3, **factor), own()
    trainer = fitted(module, Plain(SAMPLES), used, *losses())
    clean = kind(lr=1e-3)
    kept = [*order[: snapshot * BATCH], *order[(first + updates) * BATCH :]]
    other = fitted(clean, Ordered([i for _, i in kept], SAMPLES), own(to="memory"))
    result = {
        "reports": [report.as_state() for report in used.rollbacks],
        "weights": weights(module, trainer),
        "clean": weights(clean, other),
        "steps": trainer.global_step,
        "snapshot": snapshot,
    }
    # Killed between the two bad updates, and resumed.
    path = out / "saved.ckpt"
    stopped = kind(bad, rank=None if scaled else 1, lr=1e-3, **factor)
    with contextlib.suppress(StopError):
        fitted(stopped, Plain(SAMPLES), own(), SavesAndStops(path, first + 1, first + 2), *losses())
    again, last = kind(bad, rank=None if scaled else 1, lr=1e-3, **factor), own()
    try:
        resumed = fitted(again, Plain(SAMPLES), last, ckpt_path=path)
    except TooManyRejectionsError as error:
        result["error"] = str(error)
        return result
    result["resumed reports"] = [report.as_state() for report in last.rollbacks]
    result["resumed"] = weights(again, resumed)
    return result


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    results = {key: case(out / key.replace(" ", "-"), **options) for key, options in CASES.items()}
    rank = os.environ["RANK"]
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
