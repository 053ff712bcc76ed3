"""Resumes runs with a StreamingDataLoader of litdata, and prints what is trained as Markdown.

``make test-litdata`` installs litdata, which is not a dependency of this project.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import litdata
import torch

from lightning_bigopt import LearningRateScheduler, Linear
from tests.compatibility.test_loaders import BATCHES, EPOCHS, SAMPLES, WINDOW, Model, SavesAfter
from tests.helpers import QUIET

MOMENTS = {"between windows": WINDOW * 2, "inside a window": WINDOW * 2 + 1, "last batch": BATCHES}


def sample(index: int) -> dict[str, Any]:
    """Returns a sample that is known by its index."""
    return {"x": torch.full((4,), float(index)), "index": index}


def loader(folder: Path, workers: int) -> Any:
    """Returns a shuffling loader of the samples in a folder."""
    data = litdata.StreamingDataset(str(folder), shuffle=True, seed=3)
    return litdata.StreamingDataLoader(data, batch_size=2, num_workers=workers)


def train(data: Any, *callbacks: Any, ckpt: Path | None = None) -> Model:
    """Trains to the end, from a checkpoint if there is one."""
    model = Model()
    options = {**QUIET, "max_epochs": EPOCHS, "accumulate_grad_batches": WINDOW}
    trainer = L.Trainer(**options, callbacks=list(callbacks))
    resume: dict[str, Any] = {} if ckpt is None else {"ckpt_path": ckpt, "weights_only": False}
    trainer.fit(model, data, **resume)
    return model


def row(folder: Path, workers: int, moment: str) -> str:
    """Resumes after a number of batches, and returns a row of the table."""
    batches, path = MOMENTS[moment], folder / f"{workers}-{moment}.ckpt"
    own = [LearningRateScheduler(Linear())]
    straight = train(loader(folder / "data", workers), *own, SavesAfter(batches, path))
    second = train(loader(folder / "data", workers), LearningRateScheduler(Linear()), ckpt=path)
    bare = train(loader(folder / "data", workers), ckpt=path)
    rest = BATCHES - batches % BATCHES
    is_exact = second.batches[:rest] == straight.batches[batches : batches + rest]
    lost = len(straight.batches) - batches - len(second.batches)
    return (
        f"| {workers} | {moment} | {'exact' if is_exact else 'differs'} | {lost} "
        f"| {'the same' if bare.batches == second.batches else 'differs'} |"
    )


def main() -> None:
    """Writes the data and prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        litdata.optimize(
            fn=sample,
            inputs=list(range(SAMPLES)),
            output_dir=str(folder / "data"),
            chunk_size=4,
            num_workers=1,
        )
        print(f"litdata {litdata.__version__}, {EPOCHS} epochs of {BATCHES} batches\n")
        print(
            "| workers | checkpoint | rest of the epoch | batches lost later "
            "| without this package |"
        )
        print("|---|---|---|---|---|")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for workers in (0, 2):
                for moment in MOMENTS:
                    print(row(folder, workers, moment), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # worker processes of litdata would keep the interpreter from ending
