"""Parts of a config that trains a very small GPT for eight updates on the CPU."""

from __future__ import annotations

from typing import Any

MODEL: dict[str, Any] = {
    "class_path": "BytesGPT",
    "init_args": {"width": 16, "layers": 1, "heads": 2, "length": 8},
}
DATA: dict[str, Any] = {
    "class_path": "SourceText",
    "init_args": {"micro_batch_size": 8, "length": 8, "validation_samples": 64},
}
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 8,
    "max_epochs": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
