"""The directive ``chart``: a chart of the report for two runs that are trained for the page.

Both train the same small network. *well* follows a schedule, and a StepGuard skips its corrupted
batches. The gradients of *badly* are clipped to a tenth of their usual norm; its head has ten times
the learning rate of the other layers, and its first block a learning rate of 0.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from docutils import nodes
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import disable_possible_user_warnings
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    WarmupStableDecay,
)
from lightning_bigopt.reporting.charts import CHARTS
from lightning_bigopt.reporting.drawing import draw
from lightning_bigopt.reporting.runs import Run, read_run

FOLDER = "_build/pictures"
STEPS = 300
BAD = (131, 190, 262)


class Batches:
    """Noisy samples of a function; a few batches are corrupted."""

    batch_size = 16

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(0)
        for index in range(10 * STEPS):
            x = torch.randn(self.batch_size, 8, generator=draws)
            y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(
                self.batch_size, 1, generator=draws
            )
            yield x, y * 40 if index in BAD else y


class Network(L.LightningModule):
    """Three blocks and a head."""

    def __init__(self, *, is_well: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        widths = (8, 32, 32, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)
        )
        self.head = nn.Linear(32, 1)
        self.is_well = is_well

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.mse_loss(self.head(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        pace = (1.0, 1.0) if self.is_well else (0.0, 10.0)
        rate = 2e-3
        groups = [
            {"params": self.blocks[0].parameters(), "lr": rate * pace[0], "name": "first"},
            {"params": self.blocks[1:].parameters(), "name": "middle"},
            {"params": self.head.parameters(), "lr": rate * pace[1], "name": "head"},
        ]
        return torch.optim.AdamW(groups, lr=rate)


def train(*, is_well: bool, folder: str) -> Run:
    callbacks: list[L.Callback] = [
        LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="30%")),
        GradientClipping(NormClip(max_norm=3.0 if is_well else 0.05)),
        OptimizationMonitor(every=3, per_layer=["update_ratio"], tokens=lambda b: b[0].numel()),
    ]
    if is_well:
        callbacks += [StepGuard(), BatchSizeScheduler(BatchSizeSteps({"0%": 16, "50%": 32}))]
    name = "well" if is_well else "badly"
    logger = TensorBoardLogger(folder, name="", version=name)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=logger,
        log_every_n_steps=3,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(is_well=is_well), Batches())
    return read_run(logger.log_dir)


@cache
def runs() -> tuple[Run, Run]:
    """Trains both runs, once for all pages."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        disable_possible_user_warnings()
        return train(is_well=True, folder=folder), train(is_well=False, folder=folder)


def picture(title: str) -> str:
    """Draws a chart of both runs as SVG.

    Raises:
        ValueError: If there is no such chart, or it is empty.
    """
    chart = next((chart for chart in CHARTS if chart.title == title), None)
    if chart is None:
        titles = ", ".join(chart.title for chart in CHARTS)
        raise ValueError(f"chart must be one of {titles}, got {title!r}")
    with mpl.rc_context({"svg.hashsalt": title}):
        drawn = draw(chart, runs())
    if drawn is None:
        raise ValueError(f"chart must have something to show, got {title!r}")
    return drawn


class ChartPicture(SphinxDirective):
    """Shows a chart of the report for the runs *well* and *badly*."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        title = self.arguments[0]
        path = Path(self.env.srcdir, FOLDER, f"chart_{title.lower().replace(' ', '_')}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture(title), encoding="utf-8")
        return [nodes.image(uri=f"/{FOLDER}/{path.name}", alt=f"{title}, of both runs")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("chart", ChartPicture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
