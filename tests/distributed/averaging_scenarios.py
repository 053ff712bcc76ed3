"""ModelAveraging on two processes: torchrun -m tests.distributed.averaging_scenarios FOLDER."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bigopt import EMA, Merge, ModelAveraging, NonFinite, StepGuard, TailMean
from lightning_bigopt.averaging import merge_checkpoints
from lightning_bigopt.callbacks.averaging.averaged_tensors import AveragedTensors
from tests.distributed.capability_scenarios import (
    Saves,
    Sharded,
    WeightsAtStart,
    describe,
    numbers,
    trainer,
    weights,
)
from tests.engine.fake_averaging import Looked
from tests.helpers import ResumableLoader, cpu_precision, loader

CASES = (("ddp", True), ("fsdp2", False), ("fsdp2", True))


def averages() -> dict[str, Any]:
    return {
        "ema": EMA(2),
        "tail": TailMean("50%"),
        "merge": Merge(over=4, emulate="1-sqrt", checkpoints=2),
    }


class Scored:
    """Logs the validation loss."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        Looked.validation_step(self, batch, batch_idx)
        self.log("val_loss", self.loss(*batch[:2]).detach(), sync_dist=True)


class Replicated(Scored, Looked):
    pass


class Shards(Scored, Sharded):
    pass


def make(name: str) -> Looked:
    return Replicated() if name == "ddp" else Shards()


def whole_average(module: Looked, averaging: ModelAveraging, name: str) -> dict[str, list[float]]:
    """Returns an average with whole tensors; a collective."""
    tensors = AveragedTensors(module, buffers=True)
    return numbers(tensors.whole(averaging.average(name)))


def averaged(out: Path) -> Any:
    """Averages, saves and resumes; a bare Trainer resumes from the same file."""
    found = {}
    for name, whole in CASES:
        for hook in ("on_train_batch_end", "on_validation_end"):
            case = f"{name} {'whole' if whole else 'sharded'} {hook}"
            path = out / f"{case}.ckpt"
            options: dict[str, Any] = {"whole": whole, "val_check_interval": 4}

            def fit(*callbacks: Any, name: str = name, **resume: Any) -> Looked:
                module, given = make(name), {**options, "num_sanity_val_steps": 0}  # noqa: B023
                run = trainer(name, *callbacks, **given)
                run.fit(module, ResumableLoader(8, 2), loader(4, 2), **resume)
                module.metrics = {n: float(v) for n, v in run.callback_metrics.items()}
                return module

            plain = fit()
            averaging, again = (ModelAveraging(averages(), use="ema") for _ in range(2))
            straight = fit(Saves(path, at=4, hook=hook), averaging)
            resumed = fit(again, ckpt_path=path, weights_only=False)
            start = WeightsAtStart()
            bare = fit(start, ckpt_path=path, weights_only=False)
            found[case] = {
                "plain": [numbers(each) for each in plain.trained],
                "training": [numbers(each) for each in straight.trained],
                "evaluated": [numbers(each) for each in straight.evaluated],
                "resumed": [numbers(each) for each in resumed.trained],
                "averages": {
                    key: [
                        whole_average(straight, averaging, key),
                        whole_average(resumed, again, key),
                    ]
                    for key in averages()
                },
                "end": [weights(straight), weights(resumed)],
                "metrics": [straight.metrics, resumed.metrics],
                "bare": [start.seen, len(bare.trained)],
                "file": describe(path),
            }
    return found


def precisions(out: Path) -> Any:
    """Averages of float32 with other precisions, a skipped update and accumulation."""
    found = {}
    for name in ("ddp", "fsdp2"):
        for precision in ("bf16-mixed", "16-mixed", "bf16-true"):
            if name == "fsdp2" and precision == "16-mixed":
                continue  # ModelParallelStrategy has no GradScaler on the CPU
            module = Looked(bad=(1,)) if name == "ddp" else Sharded(bad=(1,))
            averaging = ModelAveraging(TailMean("100%"))
            guard = [] if precision == "16-mixed" else [StepGuard([NonFinite()])]
            options = {"accumulate_grad_batches": 2, "max_epochs": 1, **cpu_precision(precision)}
            trainer(name, *guard, averaging, **options).fit(module, ResumableLoader(32, 2))
            found[f"{name} {precision}"] = {
                "trained": [numbers(each) for each in module.trained[1::2]],
                "average": whole_average(module, averaging, "tail_mean"),
                "dtypes": sorted({str(t.dtype) for t in averaging.average().values()}),
            }
    return found


class HalfSharded(Sharded):
    """FSDP2 around layers and a parameter that is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(self.net(x) * self.scale, y)


def mixed_shards(out: Path) -> Any:
    """A sharded checkpoint of a model with sharded and whole parameters resumes."""
    path, result = out / "mixed.ckpt", []
    for resume in ({}, {"ckpt_path": path, "weights_only": False}):
        module, averaging = HalfSharded(), ModelAveraging(averages(), use="merge")
        later = out / "mixed later.ckpt"
        saves = [] if resume else [Saves(path, at=4), Saves(later, at=6)]
        run = trainer("fsdp2", *saves, averaging)
        run.fit(module, ResumableLoader(8, 2), **resume)
        result.append({n: whole_average(module, averaging, n) for n in averages()})
        if not resume:
            torch.distributed.barrier()
            merged = numbers(merge_checkpoints([later, path])["state_dict"])
            whole = [numbers(module.trained[i]) for i in (3, 5)]
    return {"averages": result, "merged": merged, "trained": whole}


NAMES = ["averaged", "precisions", "mixed_shards"]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    results = {name: globals()[name](out) for name in NAMES}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
