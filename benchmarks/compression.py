"""Trains a small GPT on two processes with compressed gradients: loss, bytes and CPU time.

    python benchmarks/compression.py            # prints the table
    python benchmarks/compression.py --write    # writes docs/benchmarks/compression.md

All runs have the same number of updates, learning rates and data. The processes communicate by gloo
on one machine, where communication is cheap: the CPU time is the cost of the compression, and what
it saves on a slow network is not measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_bigopt import (
    BF16,
    FP16,
    Compressor,
    GradientClipping,
    GradientCompression,
    LearningRateScheduler,
    NormClip,
    PowerSGD,
    TopK,
    WarmupStableDecay,
)
from lightning_bigopt.examples import BytesGPT
from lightning_bigopt.examples.text import SourceText
from lightning_bigopt.gradients.compression.collectives import Collectives
from lightning_bigopt.gradients.compression.compressor import FeedbackCompressor
from lightning_bigopt.gradients.compression.error_feedback import ErrorFeedback
from lightning_bigopt.reporting.runs import read_run

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "compression.md"
VARIANTS: dict[str, Compressor | None] = {
    "none": None,
    "FP16()": FP16(),
    "BF16()": BF16(),
    "PowerSGD(rank=1)": PowerSGD(rank=1),
    "PowerSGD(rank=4)": PowerSGD(rank=4),
    'PowerSGD(rank=4, start="10%")': PowerSGD(rank=4, start="10%"),
    "TopK(keep=0.1)": TopK(keep=0.1),
    "TopK(keep=0.01)": TopK(keep=0.01),
    'TopK(keep=0.01, start="10%")': TopK(keep=0.01, start="10%"),
}
SEEDS = (0, 1)
UPDATES = 400
ROUNDS = 30


class GPT(BytesGPT):
    """Logs the validation loss of both processes together."""

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch))


def train(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Trains one variant on this process and the other one."""
    L.seed_everything(seed, verbose=False)
    compressor = VARIANTS[name]
    logger = CSVLogger(folder, name=f"{list(VARIANTS).index(name)}-{seed}", version="")
    trainer = L.Trainer(
        max_steps=UPDATES,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(),
        callbacks=[
            LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="30%")),
            GradientClipping(NormClip(max_norm=1.0)),
            *([] if compressor is None else [GradientCompression(compressor)]),
        ],
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=UPDATES,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    model = GPT(width=64, layers=2, heads=2, length=64)
    trainer.fit(model, SourceText(micro_batch_size=8, length=64))
    logger.finalize("success")
    size = 4 * sum(p.numel() for p in model.parameters())
    found = {
        "loss": float(trainer.callback_metrics["val"]),
        "bytes": float(size),
        "dense": float(size),
    }
    if compressor is not None and trainer.is_global_zero:
        curves = read_run(Path(logger.log_dir)).curves
        found["bytes"] = statistics.mean(v for _, v in curves["communication/bytes"])
        found["dense"] = statistics.mean(v for _, v in curves["communication/dense_bytes"])
    return found


def work(out: Path) -> None:
    """Runs all variants on one of the two processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        for name in VARIANTS:
            results[name].append(train(name, seed, out))
            if os.environ["RANK"] == "0":
                print(name, seed, results[name][-1], flush=True)
    if os.environ["RANK"] == "0":
        (out / "results.json").write_text(json.dumps(results))


def measure() -> dict[str, list[dict[str, float]]]:
    """Starts two processes that run all variants."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        command = [sys.executable, *launch, __file__, "--work", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)  # noqa: S603
        results: dict[str, list[dict[str, float]]]
        results = json.loads((Path(folder) / "results.json").read_text())
    return results


def cost(compressor: Compressor | None) -> float:
    """Returns the lowest CPU time in milliseconds that one process needs to compress a gradient.

    For None, that of the forward and backward pass of a micro-batch of one process.
    """
    torch.set_num_threads(1)
    model, seconds = GPT(width=64, layers=2, heads=2, length=64), []
    batch = torch.randint(0, 256, (8, 65))
    feedback, parameters = ErrorFeedback(), dict(model.named_parameters())
    for _ in range(ROUNDS):
        begin = time.thread_time()
        loss = model.loss(batch)
        model.zero_grad()
        loss.backward()
        if compressor is not None:
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            begin = time.thread_time()
            if isinstance(compressor, FeedbackCompressor):
                compressor.average_(gradients, feedback, Collectives(None))
                feedback.commit(gradients)
            else:
                half = torch.float16 if isinstance(compressor, FP16) else torch.bfloat16
                flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
                begin = time.thread_time()
                flat.copy_(flat.to(half).div_(2))
        seconds.append(time.thread_time() - begin)
    return 1e3 * min(seconds)


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns the table of all variants."""
    dense = results["none"]
    columns = ("compressor", "KB", "bytes, relative to none", "loss of each seed")
    columns += ("loss minus that of none", "CPU time")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in results.items():
        each = ", ".join(f"{run['loss']:.3f}" for run in runs)
        more = statistics.mean(r["loss"] - d["loss"] for r, d in zip(runs, dense, strict=True))
        sent = statistics.mean(run["bytes"] for run in runs)
        whole = statistics.mean(run["dense"] for run in runs)
        time_ = "" if VARIANTS[name] is None else f"{cost(VARIANTS[name]):.1f} ms"
        lines.append(
            f"| `{name}` | {sent / 1e3:.1f} | {sent / whole:.1%} | {each} | {more:+.3f} | {time_} |"
        )
    return "\n".join(lines).replace("`none`", "none")


def page(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns the page."""
    count = "1 seed" if len(results["none"]) == 1 else f"{len(results['none'])} seeds"
    return f"""# Compressed gradients

Run with `python benchmarks/compression.py --write`. The small GPT of the demo (width 64, 2 layers)
trains on two processes with DDP and gloo on the CPU: {UPDATES} updates of 16 sequences of 64 bytes,
AdamW with the same learning rates for all variants, `NormClip(max_norm=1.0)`, {count}.
The validation loss is measured after the last update. Every variant sees the same data in the same
order.

{table(results)}

- **KB** is the number of kilobytes that one process sends per update
  ({{ref}}`explained here <compressed-gradients>`). With a late start it is the mean over the run.
  TopK sends values and positions, 8 bytes per element. With more than two processes the bytes of
  TopK grow in proportion to w - 1, where w is the number of processes; those of the others at most
  double.
- **Loss** is compared after the same number of updates, at learning rates chosen for dense
  gradients.
- **CPU time** is the time to compress one gradient on one process, the lowest of {ROUNDS}. The
  forward and backward pass of a micro-batch takes {cost(None):.1f} ms. The time of whole updates is
  not shown: both processes share the cores of one machine, whose load changed it more than the
  compressor did.

This page does not show that compression saves time: the processes are on one machine, and no slow
network was available. DDP sends dense gradients while the backward pass continues; PowerSGD and
TopK wait for each bucket. They can save time only if sending the dense gradient takes longer than
this waiting and the CPU time together.
"""


def main() -> None:
    """Runs all variants, prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # one of the two processes
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return
    results = measure()
    print(table(results))
    if arguments.write:
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
