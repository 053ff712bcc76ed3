"""The contracts of eight optimizers on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.contracts.catalog import catalog
from benchmarks.contracts.processes import train_both

EIGHT = (
    "torch/Adafactor",
    "torch/AdamW",
    "torch/AdamW(lr=tensor, fused=True)",
    "torch/LBFGS",
    "torch/Muon",
    "torch/SGD, compiled step",
    "schedulefree/SGDScheduleFree",
    "torchao/AdamW8bit",
)


def contracts(out: Path) -> Any:
    """Returns the weights with and without callbacks, by optimizer; or the error."""
    with torch.compiler.set_stance("force_eager"):
        found = {entry.key: train_both(entry) for entry in catalog() if entry.key in EIGHT}
    return {
        key: {
            name: [weight.tolist() for weight in weights] if isinstance(weights, list) else weights
            for name, weights in results.items()
        }
        for key, results in found.items()
    }
