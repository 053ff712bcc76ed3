"""Faults on one of two processes; each runs with and without the callbacks of this package."""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_bigopt import StepGuard
from tests.faults import rank_faults as faults
from tests.faults.forked import GROUP_TIMEOUT, Outcome, Recording, run_forked
from tests.faults.rank_faults import AT, CASES, SETTINGS, UPDATES, Model, Run

MUST_AGREE = "must be the same on every process"

TEXT = f"""\
{{faults}} faults on one of two processes, in update {AT} of {UPDATES}, under DDP and FSDP2, with
LearningRateScheduler, StepGuard, GradientClipping, GradientNoiseScale (DDP) and
OptimizationMonitor, and without them. "A / B" is the end of process 0 and that of process 1. The
last column counts the updates that are equal on both processes: the learning rate, the rejections
and whether the weights changed; under DDP also the norm of the clipped gradient and the weights, to
the bit. A collective raises after {GROUP_TIMEOUT:g} s. The longest run with callbacks took
{{longest:.0f}} s.

- If callbacks, their arguments or the length of the run differ between processes, the fit raises an
  error before the first batch, on every process that has callbacks.
- Lightning's handler of SIGTERM starts a collective: a signal to one process ends the run after the
  timeout of the process group, with and without callbacks.
- Not detected: a callback that one process removes from the list during the run, and values that
  other code writes on one process only. These values also change runs without callbacks.

Unexpected: {{problems}}

| fault | strategy | without callbacks | with callbacks | alike |
|---|---|---|---|---|
{{rows}}
"""


class ShardedModel(Model):
    """Model under FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "set_requires_gradient_sync"):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Recorder(L.Callback):
    """Records the decisions and the weights after every update."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._weights = ""
        self._used: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        parts = [getattr(g, "_local_tensor", g) for g in grads]
        norm = torch.stack([part.norm() for part in parts] or [torch.zeros(())]).norm()
        self._used = {"lr": optimizer.param_groups[0]["lr"], "norm": repr(norm.item())}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *arguments: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        parts = [getattr(p, "_local_tensor", p).detach() for p in module.parameters()]
        data = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        weights = hashlib.sha1(data).hexdigest()[:12]
        guards = [c for c in trainer.callbacks if isinstance(c, StepGuard)]
        rejections = [r.update for guard in guards for r in guard.rejections]
        self._recording.add(
            update=trainer.global_step,
            rejected=rejections,
            changed=weights != self._weights,
            weights=weights,
            **self._used,
        )
        self._weights = weights


def train(
    name: str, variant: tuple[bool, bool], rank: int, folder: Path, recording: Recording
) -> None:
    """Trains one process of a case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = CASES[name]
    sharded, with_callbacks = variant
    run = Run(rank, folder, with_callbacks, sharded)
    case.before(run)
    if rank == 1:
        case.prepare(run)
    timeout = timedelta(seconds=GROUP_TIMEOUT)
    strategy: Any = DDPStrategy(timeout=timeout)
    if sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, timeout=timeout
        )
    logger = TensorBoardLogger(folder, name=f"logs{rank}", version="")
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 2,
            "strategy": strategy,
            "logger": logger,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
            "use_distributed_sampler": False,
            "callbacks": [*run.first, *run.callbacks(), *run.others, Recorder(recording)],
            **run.options,
        }
    )
    validation = faults.data(run, limit=1) if "val_check_interval" in run.options else None
    trainer.fit((ShardedModel if sharded else Model)(run), faults.data(run), validation)


@dataclass(frozen=True)
class Result:
    """The outcomes of a case on both processes."""

    name: str
    sharded: bool
    outcomes: tuple[Outcome, Outcome]

    @property
    def ends(self) -> str:
        """How the processes end."""
        first, second = (outcome.kind for outcome in self.outcomes)
        return first if first == second else f"{first} / {second}"

    def differing(self) -> list[int]:
        """Returns the updates of both processes that they did not make alike."""
        # A process has its own shards: their weights and the norms of their gradients differ.
        compared = ("update", "lr", "rejected", "changed")
        if not self.sharded:
            compared += ("norm", "weights")
        pairs = zip(*(outcome.records for outcome in self.outcomes), strict=False)
        return [
            index
            for index, (first, second) in enumerate(pairs)
            if any(first[key] != second[key] for key in compared)
        ]

    def problems(self) -> list[str]:
        """Compares the outcomes with what the case must lead to."""
        case = CASES[self.name]
        found = [
            f"ends with {outcome.end!r} instead of {pattern}"
            for outcome, pattern in zip(self.outcomes, case.ends, strict=True)
            if not re.fullmatch(pattern, outcome.kind)
        ]
        for outcome in self.outcomes:
            if case.ends == SETTINGS and not (MUST_AGREE in outcome.end and not outcome.records):
                found.append("does not raise for differing settings before the first batch")
            if outcome.end == "finished" and not case.diverges:
                rejected = outcome.records[-1]["rejected"]
                found += [f"rejects {rejected}"] if rejected != [*case.rejects] else []
        if self.differing() and not case.diverges:
            found.append(f"the processes differ in updates {self.differing()}")
        return found


def run_case(name: str, *, sharded: bool = False, with_callbacks: bool = True) -> Result:
    """Runs a case on two processes."""
    first, second = run_forked(train, name, (sharded, with_callbacks))
    return Result(name, sharded, (first, second))


def measure() -> str:
    """Runs every case with and without the callbacks, under DDP and FSDP2."""
    rows, problems, longest = [], [], 0.0
    for name, sharded in itertools.product(CASES, (False, True)):
        bare = run_case(name, sharded=sharded, with_callbacks=False)
        ours = run_case(name, sharded=sharded)
        problems += [f"{name}, {'FSDP2' if sharded else 'DDP'}: {p}" for p in ours.problems()]
        longest = max(longest, ours.outcomes[0].seconds)
        count = min(len(outcome.records) for outcome in ours.outcomes)
        alike = f"{count - len(ours.differing())} of {count}" if count else "none"
        cells = (name, "FSDP2" if sharded else "DDP", bare.ends, ours.ends, alike)
        rows.append(f"| {' | '.join(cells)} |")
    return TEXT.format(
        faults=len(CASES),
        problems="\n".join(f"- {problem}" for problem in problems) or "none.",
        longest=longest,
        rows="\n".join(rows),
    )
