"""Compares find_learning_rate with the best of 9 learning rates that were trained in full.

    python benchmarks/learning_rate.py --runs /tmp/rate_runs --write  # docs/benchmarks/...
    python benchmarks/learning_rate.py --quick  # only tests that the script runs

Each training in full is stored as one file of the folder ``--runs``, so that an interrupted
benchmark continues, and several processes can share the work: ``--only full`` trains the 9 rates of
the given ``--models`` and ``--seeds`` and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    WarmupStableDecay,
)
from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import SourceText

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "learning_rate.md"
SEEDS = (0, 1, 2, 3, 4)
COUNT = 9


class ByteLSTM(LightningModule):
    """An LSTM that predicts the next byte, trained with Adam."""

    def __init__(self, lr: float, width: int = 64) -> None:
        super().__init__()
        self.lr = lr
        self.bytes = nn.Embedding(256, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def loss(self, batch: Tensor) -> Tensor:
        """Returns the mean cross-entropy of windows ``(batch, time + 1)``."""
        logits = self.head(self.lstm(self.bytes(batch[:, :-1]))[0])
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)


class DigitsCNN(LightningModule):
    """A small convolutional network, trained with SGD and momentum."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, digits = batch
        return functional.cross_entropy(self.net(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3, fused=True
        )


class ShiftedDigits(Dataset[tuple[Tensor, Tensor]]):
    """Two thirds of the digits of scikit-learn; an item is a batch, each image shifted anew."""

    def __init__(self) -> None:
        images, digits = digits_of(training=True)
        self.images, self.digits = functional.pad(images, (1, 1, 1, 1)), digits

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        down, right = torch.randint(0, 3, (2, len(indices), 1, 1))
        rows, columns = down + torch.arange(8).view(8, 1), right + torch.arange(8)
        images = self.images[chosen.view(-1, 1, 1), 0, rows, columns]
        return images.unsqueeze(1), self.digits[chosen]


def digits_of(*, training: bool) -> tuple[Tensor, Tensor]:
    """Returns images ``(N, 1, 8, 8)`` in [0, 1] and digits; every third image is for testing."""
    images, digits = load_digits(return_X_y=True)
    chosen = (torch.arange(len(digits)) % 3 != 0) == training
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return pixels[chosen], torch.tensor(digits)[chosen]


class Digits(LightningDataModule):
    """Shuffled batches of the shifted digits."""

    def train_dataloader(self) -> DataLoader[Any]:
        data = ShiftedDigits()
        batches = BatchSampler(RandomSampler(data), batch_size=64, drop_last=True)
        return DataLoader(data, sampler=batches, batch_size=None)


@torch.no_grad()
def test_error(model: Any) -> float:
    """Returns the percentage of wrong digits, over the 9 shifts of every image for testing."""
    images, digits = digits_of(training=False)
    padded = functional.pad(images, (1, 1, 1, 1))
    wrong = [
        (model.net(padded[..., i : i + 8, j : j + 8]).argmax(1) != digits).double().mean()
        for i in range(3)
        for j in range(3)
    ]
    return 100 * float(torch.stack(wrong).mean())


@torch.no_grad()
def validation_loss(model: Any) -> float:
    """Returns the loss in nats per byte on 8192 windows of the files for validation."""
    data = SourceText(length=16, validation_samples=8192)
    data.setup("fit")
    losses = [model.loss(batch) for batch in data.val_dataloader()]
    return float(torch.stack(losses).mean())


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with its data, the length of a training in full, and the middle of the 9 rates."""

    name: str
    make: Callable[[float], LightningModule]
    data: Callable[[], LightningDataModule]
    score: Callable[[Any], float]
    unit: str
    within: float  # the largest gap to the best of the 9 rates that counts as found
    steps: int
    middle: float

    @property
    def rates(self) -> tuple[float, ...]:
        """9 learning rates, a factor of two apart."""
        return tuple(self.middle * 2.0 ** (index - COUNT // 2) for index in range(COUNT))


def text() -> SourceText:
    """Returns batches of 32 windows of 16 bytes."""
    return SourceText(micro_batch_size=32, length=16)


MODELS = (
    Model(
        name="GPT",
        make=lambda lr: BytesGPT(lr=lr, width=32, layers=2, heads=2, length=16),
        data=text,
        score=validation_loss,
        unit="nats",
        within=0.01,
        steps=1000,
        middle=4e-3,
    ),
    Model(
        name="CNN",
        make=DigitsCNN,
        data=Digits,
        score=test_error,
        unit="points of error",
        within=0.3,
        steps=1500,
        middle=0.1,
    ),
    Model(
        name="LSTM",
        make=ByteLSTM,
        data=text,
        score=validation_loss,
        unit="nats",
        within=0.01,
        steps=1200,
        middle=2e-2,
    ),
)


def trainer(steps: int) -> Trainer:
    """Returns the Trainer of all runs."""
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[
            LearningRateScheduler(WarmupStableDecay(warmup="5%", decay="20%")),
            GradientClipping(NormClip(max_norm=1.0)),
        ],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(model: Model, lr: float, seed: int) -> float:
    """Trains in full; returns the score, infinite after a divergence."""
    seed_everything(seed, verbose=False)
    module = model.make(lr)
    trainer(model.steps).fit(module, datamodule=model.data())
    module.eval()
    score = model.score(module)
    return score if math.isfinite(score) else math.inf


class Runs:
    """Trains each combination once, and stores each score in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def score(self, model: Model, lr: float, seed: int) -> float:
        """Returns the score of a training in full, from its file if there is one."""
        path = self.folder / f"{model.name}-{model.steps}-{seed}-{lr:.6g}.json"
        if not path.exists():
            started = time.perf_counter()
            found = train(model, lr, seed)
            seconds = time.perf_counter() - started
            path.write_text(json.dumps({"score": found, "seconds": seconds}))
            print(f"{path.stem:40} {found:.4f} {seconds:.1f} s", flush=True)
        return float(json.loads(path.read_text())["score"])


def main() -> None:
    """Trains all runs, prints the tables, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    parser.add_argument("--runs", type=Path, help="folder of the runs in full")
    parser.add_argument("--only", choices=["full"], help="train the 9 rates and nothing else")
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = Runs(arguments.runs or Path(tempfile.mkdtemp()))
    models = [model for model in MODELS if model.name in arguments.models]
    # The rates in the middle first, so that an interrupted benchmark has the best ones.
    for distance in range(COUNT // 2 + 1):
        for seed in arguments.seeds:
            for model in models:
                for lr in model.rates[COUNT // 2 - distance :: 2 * distance or COUNT][:2]:
                    runs.score(model, lr, seed)


if __name__ == "__main__":
    main()
