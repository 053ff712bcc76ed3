"""Traces which files of the package run in a fit, and in one of its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

TRACED_BATCH = 4
"""The batch whose step is traced: every lookup of the first step is over."""


@dataclass
class Trace:
    """What ran of a package.

    Attributes:
        files: Paths below the package's folder.
        chain: The longest chain of nested calls, as ``file:function``; calls of other libraries in
            between are left out.
    """

    package: Path
    files: set[str] = field(default_factory=set)
    chain: list[str] = field(default_factory=list)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records the calls of this thread."""
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not (place := self._place(frame)):
            return
        self.files.add(place.split(":")[0])
        chain: list[str] = []
        caller: FrameType | None = frame
        while caller is not None:
            if place := self._place(caller):
                chain.append(place)
            caller = caller.f_back
        if len(chain) > len(self.chain):
            self.chain = chain[::-1]

    def _place(self, frame: FrameType) -> str:
        path = frame.f_code.co_filename
        if not path.startswith(f"{self.package}/"):
            return ""
        return f"{Path(path).relative_to(self.package)}:{frame.f_code.co_name}"


class _OneStep(L.Callback):
    """Traces from the start of one batch to the start of the next."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._stack = ExitStack()
        self._batches = 0

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._batches += 1
        if self._batches == TRACED_BATCH:
            self._stack.enter_context(self._trace.record())
        elif self._batches > TRACED_BATCH:
            self._stack.close()


class _Model(BoringModel):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def step_trace(package: Path, callbacks: Callable[[], list[L.Callback]], **options: Any) -> Trace:
    """Traces one steady step of a fit with the callbacks; no value is logged in it."""
    trace = Trace(package)
    fit([_OneStep(trace), *callbacks()], **options)
    return trace


def fit_trace(package: Path, callbacks: Callable[[], list[L.Callback]], **options: Any) -> Trace:
    """Traces a whole fit with the callbacks."""
    trace = Trace(package)
    with trace.record():
        fit(callbacks(), **options)
    return trace


def fit(callbacks: list[L.Callback], **options: Any) -> None:
    """Trains a linear layer for ten updates."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=10,
        callbacks=callbacks,
        log_every_n_steps=50,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )
    trainer.fit(_Model(), DataLoader(RandomDataset(32, 80), batch_size=8))
