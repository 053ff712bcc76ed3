"""The demo: trains one small GPT with the callbacks of this package and with a bare Trainer."""

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

from lightning_bigopt.batching.policies.steps_and_ramps import BatchSizeSteps
from lightning_bigopt.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from lightning_bigopt.callbacks.gradient_clipping import GradientClipping
from lightning_bigopt.callbacks.learning_rate import LearningRateScheduler
from lightning_bigopt.callbacks.monitor import OptimizationMonitor
from lightning_bigopt.callbacks.step_guard.step_guard import StepGuard
from lightning_bigopt.checks import shown
from lightning_bigopt.examples.comparison import (
    Run,
    draw_comparison,
    markdown_table,
    read_scalars,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText
from lightning_bigopt.gradients.rules.adaptive_norm_clip import ZClip
from lightning_bigopt.schedules.plateaus import WarmupStableDecay

__all__ = ["Demo"]

SMALL_BATCH, LARGE_BATCH = 32, 64
PEAK_LR = 3e-3
BARE_LRS = (1e-3, 2e-3, 4e-3)

_IGNORED_WARNINGS = (
    ".*does not have many workers",
    ".*recommended to use .*devices=1",
    ".*LeafSpec.* is deprecated",
)
_SHOWN_MESSAGES = ("Global batch", "Clipping", "StepGuard")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Trains with the callbacks of this package and with bare Trainers, and compares the runs.

    All runs train on the same number of samples. The three bare runs use a constant batch size, no
    clipping and one constant learning rate each; OptimizationMonitor, which changes nothing, logs
    them.

    Args:
        max_steps: Updates of the run with the callbacks, positive. The first half takes 32 samples
            per update and the second half 64; the bare runs always take 32.
        devices: Number of processes; a divisor of 32.
        strategy: Lightning's strategy, such as ``"ddp"``.
        accelerator: Lightning's accelerator.
        seed: Seed of weights and data order.
        logdir: Folder for the logs and the picture.

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
            raise ValueError(f"max_steps must be positive, got {shown(self.max_steps)}; write 500")
        if self.devices <= 0 or SMALL_BATCH % self.devices:
            raise ValueError(
                f"devices must divide {SMALL_BATCH}, got {shown(self.devices)}; write 2"
            )

    @property
    def samples(self) -> int:
        """Number of samples that every run trains on."""
        small_steps = math.ceil(self.max_steps / 2)
        return small_steps * SMALL_BATCH + (self.max_steps - small_steps) * LARGE_BATCH

    @property
    def bare_steps(self) -> int:
        """Number of updates of a bare run."""
        return self.samples // SMALL_BATCH

    def run(self) -> None:
        """Trains all runs, prints the table, and writes the picture."""
        _print(
            f"Trains a GPT of 0.4M parameters {1 + len(BARE_LRS)} times on {self.samples:,} "
            "samples of Python's own source code:\nonce with the callbacks of lightning_bigopt, "
            f"then with a bare Trainer and {len(BARE_LRS)} constant learning rates.\n"
            f"This takes about {math.ceil(self.bare_steps / 190)} minutes on two cores. The logs "
            f"are written to {self.logdir}."
        )
        with _silenced():
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
        _start_run(folder, f"\n{title}: {steps} updates, learning rate {lr:g}")
        seed_everything(self.seed, verbose=False)
        timer = Timer()
        trainer = Trainer(
            max_steps=steps,
            callbacks=[*callbacks, OptimizationMonitor(), timer, _BatchBar(self.bare_steps)],
            logger=TensorBoardLogger(
                folder.parent, name=folder.name, version="", default_hp_metric=False
            ),
            accelerator=self.accelerator,
            devices=self.devices,
            strategy=self.strategy,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            val_check_interval=self.bare_steps,  # in batches, which are as many in all runs
            check_val_every_n_epoch=None,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        model, data = BytesGPT(lr=lr), SourceText(micro_batch_size=SMALL_BATCH // self.devices)
        trainer.fit(model, datamodule=data)
        seconds = timer.time_elapsed("train") - timer.time_elapsed("validate")
        scalars = read_scalars(folder) if trainer.is_global_zero else {}
        return Run(title=title, seconds=seconds, scalars=scalars)

    @rank_zero_only
    def _show(self, runs: Sequence[Run]) -> None:
        scheduled, *bare = runs
        # NaN is neither smaller nor larger: diverged runs are moved to the end explicitly.
        bare.sort(key=lambda run: (math.isnan(run.validation_loss), run.validation_loss))
        picture = Path(self.logdir, "demo.png")
        draw_comparison([scheduled, *bare], picture)
        print(f"\n{markdown_table([scheduled, *bare])}\n")
        print(f"The picture:  {picture}")
        print(f"The charts:   tensorboard --logdir {self.logdir}")


class _BatchBar(TQDMProgressBar):
    """Shows progress in loader batches; Lightning's bar would end at ``max_steps``."""

    def __init__(self, total: int) -> None:
        super().__init__(refresh_rate=5)
        self.total = total

    @property
    def total_train_batches(self) -> int:
        return self.total


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)


@rank_zero_only
def _start_run(folder: Path, headline: str) -> None:
    """Prints a headline, and deletes the event files of an earlier demo."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    print(headline, flush=True)


@contextmanager
def _silenced() -> Iterator[None]:
    """Silences Lightning's information and performance advice, which do not apply to a demo."""
    handlers = [
        handler
        for name in ("pytorch", "fabric")
        for handler in logging.getLogger(f"lightning.{name}").handlers
    ]
    for handler in handlers:
        handler.addFilter(_is_shown)
    try:
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.getMessage().startswith(_SHOWN_MESSAGES)
