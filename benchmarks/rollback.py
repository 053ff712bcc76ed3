"""Trains a GPT with persistently bad data, with and without rollbacks; and kills such a run.

    python benchmarks/rollback.py                       # three seeds of seven runs, and 20 kills
    python benchmarks/rollback.py --write               # writes docs/benchmarks/rollback.md
    python benchmarks/rollback.py --seeds 1 --kills 3
    python benchmarks/rollback.py --results runs.json   # keeps finished runs, and continues there
    python benchmarks/rollback.py --results runs.json --finished --kills 0 --write

5 % of the samples are random bytes, in bursts of 50 updates. The variants take turns. Runs without
bad samples, also at twice the learning rate, show whether a rollback is triggered by good data. Two
processes train on data in which one process gets NaN, are killed with SIGKILL at random moments and
resumed, and end with the weights of a run whose order never held the bad samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    RollBack,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import ByteWindows, read_sources

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "rollback.md"
LENGTH, BATCH, BURST = 32, 32, 50
VARIANTS = ("clean", "rollback", "guard", "clip", "nothing")
FALSE_TRIGGERS = {"clean, with RollBack": 1.0, "clean, with RollBack, twice the rate": 2.0}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Text(Dataset[Tensor]):
    """Windows of text in a random order, of which some places hold random bytes instead."""

    def __init__(self, samples: int, bad: Sequence[range] = (), *, seed: int = 0) -> None:
        self.windows = ByteWindows(read_sources("train"), length=LENGTH)
        rng = torch.Generator().manual_seed(seed)
        self.order = torch.randint(len(self.windows), (samples,), generator=rng).tolist()
        self.bad = {place for part in bad for place in part}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Tensor:
        if place not in self.bad:
            return self.windows[self.order[place]]
        rng = torch.Generator().manual_seed(place)
        return torch.randint(256, (LENGTH + 1,), generator=rng)


class Model(BytesGPT):
    """The example's GPT with 0.1M parameters."""

    def __init__(self, *, seed: int = 0, width: int = 56) -> None:
        torch.manual_seed(seed)
        super().__init__(width=width, layers=2, heads=4, length=LENGTH)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run."""

    loss: float
    seconds: float
    rejected: int
    rollbacks: int
    left_out: int


def bursts(updates: int, seed: int) -> list[range]:
    """Draws the places of the bad samples: 5 % of the updates, in bursts of 50."""
    rng = random.Random(seed)  # noqa: S311
    count = max(1, round(0.05 * updates / BURST))
    firsts = [rng.randrange(updates // 5, updates - 2 * BURST) for _ in range(count)]
    return [range(first * BATCH, (first + BURST) * BATCH) for first in firsts]


def train(variant: str, *, updates: int, seed: int) -> Result:
    """Trains one variant, from the same weights on the same order of data."""
    bad = [] if variant.startswith("clean") else bursts(updates, seed)
    roll_back = RollBack(at_most=20) if "rollback" in variant.lower() else None
    guard = StepGuard(roll_back=roll_back)
    callbacks: list[Callback] = [
        LearningRateScheduler(WarmupCosine(warmup="10%", end=0.1)),
        BatchSizeScheduler(ConstantBatchSize(BATCH)),
    ]
    if variant != "nothing":
        callbacks.append(GradientClipping(NormClip(max_norm=1.0)))
    if variant not in ("clip", "nothing"):
        callbacks.append(guard)
    loader = GlobalBatchLoader(
        Text(2 * updates * BATCH, bad, seed=seed), micro_batch_size=BATCH, shuffle="sequential"
    )
    trainer = Trainer(**QUIET, max_steps=updates, max_epochs=-1, callbacks=callbacks)
    model, start = Model(seed=seed), time.perf_counter()
    model.lr *= FALSE_TRIGGERS.get(variant, 1.0)
    trainer.fit(model, loader)
    seconds = time.perf_counter() - start
    found = trainer.validate(model, validation_loader(), verbose=False)
    return Result(
        loss=found[0]["val_loss"],
        seconds=seconds,
        rejected=guard.rejected,
        rollbacks=len(guard.rollbacks),
        left_out=sum(report.left_out for report in guard.rollbacks),
    )


def validation_loader() -> DataLoader[Tensor]:
    """Returns a loader of 512 windows, evenly spaced over the validation files."""
    windows = ByteWindows(read_sources("val"), length=LENGTH)
    picks = [index * len(windows) // 512 for index in range(512)]
    return DataLoader(Subset(windows, picks), batch_size=512)


HEADER = """\
| seed | variant | loss | minus clean run | rejected | rollbacks | samples left out |
|---|---|---|---|---|---|---|
"""


def run_all(updates: int, seeds: int, path: Path | None, *, finished: bool) -> dict[str, Result]:
    """Returns the results by seed and variant; finished ones come from the file."""
    found: dict[str, Result] = {}
    if path is not None and path.exists():
        found = {key: Result(**run) for key, run in json.loads(path.read_text()).items()}
    for seed in range(0 if finished else seeds):
        for variant in (*VARIANTS, *FALSE_TRIGGERS):
            if (key := f"{seed} {variant}") not in found:
                found[key] = train(variant, updates=updates, seed=seed)
                print(key, found[key], flush=True)
            if path is not None:
                path.write_text(json.dumps({key: asdict(run) for key, run in found.items()}))
    return found


def table(found: dict[str, Result], seeds: int, variants: Sequence[str]) -> str:
    """Returns a table with a row for each finished run."""
    rows = []
    for seed in range(seeds):
        # A run whose RollBack never acts has the weights of the run without it.
        clean = found.get(f"{seed} clean", found.get(f"{seed} {next(iter(FALSE_TRIGGERS))}"))
        for variant in variants:
            run = found.get(f"{seed} {variant}")
            if run is None or clean is None:
                continue
            rows.append(
                f"| {seed} | {variant} | {run.loss:.4f} | {run.loss - clean.loss:+.4f} "
                f"| {run.rejected} | {run.rollbacks} | {run.left_out:,} |\n"
            )
    return HEADER + "".join(rows)


# ------------------------------------------------------------------------------------- the kills

KILLED_UPDATES = 150
NAN = [range(40 * BATCH, 43 * BATCH), range(100 * BATCH, 102 * BATCH)]


class Poisoned(Model):
    """Its loss is NaN on the last process for samples of bad places."""

    def __init__(self) -> None:
        super().__init__(width=32)

    def training_step(self, batch: Any) -> Tensor:
        windows, places = batch
        loss = self.loss(windows)
        bad = any(int(place) in part for place in places for part in NAN)
        return loss * float("nan") if bad and self.global_rank == 1 else loss


class Placed(Dataset[Any]):
    """Windows with their places; some places may be missing."""

    def __init__(self, places: Sequence[int]) -> None:
        self.text, self.places = Text(2 * KILLED_UPDATES * BATCH), list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.text[self.places[index]], self.places[index]


class Saves(Callback):
    """Saves a checkpoint every 4 updates, and the weights at the end; one that is whole or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready % 4 == 0:
            trainer.save_checkpoint(self.folder / "part.ckpt")
            if trainer.is_global_zero:
                (self.folder / "part.ckpt").replace(self.folder / "last.ckpt")

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            reports = [report.as_state() for report in trainer.callbacks[0].rollbacks]
            torch.save([module.state_dict(), reports], self.folder / "part.pt")
            (self.folder / "part.pt").replace(self.folder / "final.pt")


def kept_places(reports: Sequence[Any] = ()) -> list[int]:
    """Returns the places of all samples without those that a run has left out."""
    places = list(range(2 * KILLED_UPDATES * BATCH))
    for report in reports:  # each continues behind what earlier ones have left out
        first = report["to"] * BATCH
        del places[first : first + report["left_out"]]
    return places


def work(folder: Path, places: Sequence[int], precision: str) -> None:
    """Trains on one of two processes, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    roll_back = RollBack(snapshot_every=5, at_most=20)
    guard = StepGuard([NonFinite()], max_consecutive=1, roll_back=roll_back)
    saved = folder / "last.ckpt"
    trainer = Trainer(
        **QUIET,
        max_steps=KILLED_UPDATES,
        max_epochs=-1,
        devices=2,
        strategy="ddp",
        precision=precision,
        callbacks=[
            guard,
            LearningRateScheduler(WarmupCosine(warmup="10%", end=0.1)),
            BatchSizeScheduler(ConstantBatchSize(BATCH)),
            GradientClipping(NormClip(max_norm=1.0)),
            Saves(folder),
        ],
    )
    loader = GlobalBatchLoader(Placed(places), micro_batch_size=BATCH // 2, shuffle="sequential")
    path = saved if saved.exists() else None
    trainer.fit(Poisoned(), loader, ckpt_path=path, weights_only=True if path else None)


def start(folder: Path, mode: str, port: int) -> list[subprocess.Popen[bytes]]:
    """Starts two processes."""
    workers = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "kills",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--work", str(folder), mode]
        workers.append(
            subprocess.Popen(  # noqa: S603
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
    return workers


def kill_at_random(kills: int, *, seed: int = 0) -> tuple[int, int, bool]:
    """Returns the kills, the rollbacks, and whether the weights equal those without the samples."""
    rng, done = random.Random(seed), 0  # noqa: S311
    with TemporaryDirectory() as name:
        folder = Path(name)
        port = 20_000 + rng.randrange(20_000)
        while not (folder / "final.pt").exists():
            port += 1
            before = (
                (folder / "last.ckpt").stat().st_mtime if (folder / "last.ckpt").exists() else 0
            )
            workers = start(folder, "bad", port)
            if done < kills:
                # After the first new checkpoint, so that every start makes some progress.
                while all(worker.poll() is None for worker in workers):
                    last = folder / "last.ckpt"
                    if last.exists() and last.stat().st_mtime > before:
                        break
                    time.sleep(0.01)
                time.sleep(rng.expovariate(4))
                alive = [worker for worker in workers if worker.poll() is None]
                for worker in alive:
                    worker.send_signal(signal.SIGKILL)
                done += bool(alive)
            if any(worker.wait() > 0 for worker in workers):  # a signal is negative
                raise RuntimeError("the processes must not end with an error; run one by hand")
        weights, reports = torch.load(folder / "final.pt", weights_only=True)
        clean = folder / "clean"
        clean.mkdir()
        torch.save(reports, clean / "reports.pt")
        for worker in start(clean, "clean", port + 1):
            worker.wait()
        expected, none = torch.load(clean / "final.pt", weights_only=True)
        same = all(torch.equal(weights[name], expected[name]) for name in expected)
        return done, len(reports), same and not none


def page(found: dict[str, Result], killed: str, updates: int, seeds: int) -> str:
    """Returns the page with the results."""
    return f"""\
# Training with persistently bad data, with and without rollbacks

Measured with `python benchmarks/rollback.py --write` on {os.cpu_count()} cores, torch
{torch.__version__}. A GPT with 0.1M parameters is trained for {updates:,} updates of {BATCH}
samples. One burst of {BURST} updates ({BURST / updates:.0%} of the samples) consists of random
bytes; a seed determines weights, data and the place of the burst. The loss is the validation loss
in nats per byte. `clean` has the same data without the bad samples. `guard` is `StepGuard()` with
clipping, `rollback` is `StepGuard(roll_back=RollBack(at_most=20))` with clipping, and `clip` and
`nothing` have no guard.

{table(found, seeds, VARIANTS)}
A rollback trains other data in place of what it leaves out, so that the run has as many updates as
the clean run, on partly other samples; the difference includes that. The benchmark has one small
model, at most {seeds} seeds and one kind of bad data. A variant that is missing for a seed was not
run. Without a `clean` run the difference is that to the run with `RollBack` on the same good data,
which has no rollback.

## False triggers

The same runs without bad samples, with `StepGuard(roll_back=RollBack(at_most=20))`, once at the
usual and once at twice the learning rate.

{table(found, seeds, [*FALSE_TRIGGERS])}
## Killed at random moments

Two processes train {KILLED_UPDATES} updates; one of them gets NaN for {len(NAN)} stretches of
samples. Both are killed with SIGKILL at random moments and resumed from the last checkpoint. The
final weights are compared with those of a run whose data never contained the left-out samples.

{killed}
"""


def main() -> None:
    """Prints the results, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--results", type=Path, help="JSON file of finished runs; continues there")
    parser.add_argument("--finished", action="store_true", help="only the runs of --results")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Lightning asks for more workers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.work:
        folder, mode = Path(arguments.work[0]), arguments.work[1]
        reports = torch.load(folder / "reports.pt") if mode == "clean" else []
        work(folder, kept_places(reports), "32-true")
        return
    found = run_all(
        arguments.updates, arguments.seeds, arguments.results, finished=arguments.finished
    )
    killed = "These runs were not made for this page."
    if arguments.kills:
        kills, rollbacks, same = kill_at_random(arguments.kills)
        equal = "equal to the bit" if same else "NOT equal"
        killed = f"After {kills} kills and {rollbacks} rollbacks the final weights are {equal}."
        print(killed, flush=True)
    if arguments.write:
        text = page(found, killed, arguments.updates, arguments.seeds)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
