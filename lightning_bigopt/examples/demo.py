"""The demo: one small GPT, trained by a Trainer with our callbacks and by a bare one."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    OptimizationMonitor,
    StepGuard,
    WarmupStableDecay,
    ZClip,
)
from lightning_bigopt.examples.comparison import (
    Run,
    draw_comparison,
    markdown_table,
    read_scalars,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

__all__ = ["Demo"]

SMALL_BATCH, LARGE_BATCH = 32, 64
PEAK_LR = 3e-3
BARE_LRS = (1e-3, 2e-3, 4e-3)

_ADVICE = (
    ".*does not have many workers",
    ".*recommended to use .*devices=1",
    ".*LeafSpec.* is deprecated",
)


_REPORTS = ("Global batch", "Clipping", "StepGuard")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Trains with our callbacks, then bare on as many samples, and shows the difference.

    The bare Trainer has a constant batch and no clipping, and gets the best of three constant
    learning rates. OptimizationMonitor is its only callback of ours, and only watches.

    Args:
        max_steps: Updates of the run with our callbacks; positive. Half of them take 32 samples
            and half 64, the bare runs always 32.
        devices: Processes; a divisor of 32.
        strategy: Lightning's strategy, such as ``"ddp"``.
        accelerator: Lightning's accelerator.
        seed: Seed of weights and data order.
        logdir: Where logs and picture go.

    Raises:
        ValueError: If ``max_steps`` is not positive or ``devices`` does not divide 32.

    Example:
        >>> demo = Demo(max_steps=500)
        >>> demo.samples, demo.bare_steps
        (24000, 750)
    """

    max_steps: int = 500
    devices: int = 1
    strategy: str = "auto"
    accelerator: str = "cpu"
    seed: int = 0
    logdir: str = "runs/demo"

    def __post_init__(self) -> None:
        if self.max_steps <= 0:
            raise ValueError(f"max_steps must be positive, got {self.max_steps!r}")
        if self.devices <= 0 or SMALL_BATCH % self.devices:
            raise ValueError(f"devices must divide {SMALL_BATCH}, got {self.devices!r}")

    @property
    def samples(self) -> int:
        """Samples that every run trains on."""
        small_steps = math.ceil(self.max_steps / 2)
        return small_steps * SMALL_BATCH + (self.max_steps - small_steps) * LARGE_BATCH

    @property
    def bare_steps(self) -> int:
        """Updates of a bare run."""
        return self.samples // SMALL_BATCH

    def run(self) -> None:
        """Trains all runs, and prints the table and where picture and charts are."""
        with _quiet():
            runs = [self._train("lightning_bigopt", PEAK_LR, self.max_steps, self._callbacks())]
            runs += [self._train("bare Trainer", lr, self.bare_steps, ()) for lr in BARE_LRS]
        self._show(runs)

    def _callbacks(self) -> Sequence[Callback]:
        return (
            LearningRateScheduler(WarmupStableDecay(warmup="5%", decay="20%")),
            GradientClipping(ZClip()),
            StepGuard(),
            BatchSizeScheduler(
                BatchSizeSteps({"0%": SMALL_BATCH, "50%": LARGE_BATCH}), lr_scaling="sqrt"
            ),
        )

    def _train(self, title: str, lr: float, steps: int, callbacks: Sequence[Callback]) -> Run:
        folder = Path(self.logdir, f"{title.replace(' ', '-')}-lr-{lr:g}")
        _begin(folder, f"\n{title}: {steps} updates, peak learning rate {lr:g}")
        seed_everything(self.seed, verbose=False)
        timer = Timer()
        trainer = Trainer(
            max_steps=steps,
            callbacks=[*callbacks, OptimizationMonitor(), timer, _BatchBar(self.bare_steps)],
            logger=TensorBoardLogger(folder.parent, name=folder.name, version=""),
            accelerator=self.accelerator,
            devices=self.devices,
            strategy=self.strategy,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        model, data = BytesGPT(lr=lr), SourceText(micro_batch_size=SMALL_BATCH // self.devices)
        trainer.fit(model, datamodule=data)
        trainer.validate(model, datamodule=data, verbose=False)
        seconds = timer.time_elapsed("train")
        scalars = read_scalars(folder) if trainer.is_global_zero else {}
        return Run(title=title, lr=lr, seconds=seconds, scalars=scalars)

    @rank_zero_only
    def _show(self, runs: Sequence[Run]) -> None:
        ours, *bare = runs
        bare.sort(key=lambda run: (math.isnan(run.validation_loss), run.validation_loss))
        picture = Path(self.logdir, "demo.png")
        draw_comparison([ours, *bare], picture)
        print(f"\n{markdown_table([ours, *bare])}\n")
        print(f"The picture:  {picture}")
        print(f"The charts:   tensorboard --logdir {self.logdir}")


class _BatchBar(TQDMProgressBar):
    """Counts loader batches to their true end: Lightning's bar would end at ``max_steps``."""

    def __init__(self, total: int) -> None:
        super().__init__(refresh_rate=5)
        self.total = total

    @property
    def total_train_batches(self) -> int:
        return self.total


@rank_zero_only
def _begin(folder: Path, headline: str) -> None:
    """Announces a run, and keeps an earlier demo's curves out of its charts."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    print(headline, flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Lightning's advice, none of which concerns a run of half a minute."""
    handlers = [
        handler
        for name in ("pytorch", "fabric")
        for handler in logging.getLogger(f"lightning.{name}").handlers
    ]
    for handler in handlers:
        handler.addFilter(_worth_reading)
    try:
        with warnings.catch_warnings():
            for message in _ADVICE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_worth_reading)


def _worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.getMessage().startswith(_REPORTS)
