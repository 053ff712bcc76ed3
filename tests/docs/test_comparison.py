"""Claims about other libraries on the page Comparison are true for their installed versions."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import lightning
import pytest
import transformers
from lightning.pytorch import Trainer, callbacks, utilities
from transformers.trainer_utils import SchedulerType

from tests.docs.commands import exists

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
ADAPTIVE = re.compile(r"\bagc\b|adaptive.?grad\w*.?clip|auto_?clip|z_?clip|ada_?gc", re.IGNORECASE)


def sources(package: object, *paths: str) -> str:
    root = Path(inspect.getfile(package)).parent
    files = [file for path in paths for file in sorted(root.glob(path))]
    assert files
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


TRAINER_OF_LIGHTNING = sources(lightning, "pytorch/**/*.py", "fabric/**/*.py")
TRAINER_OF_HUGGING_FACE = sources(
    transformers, "trainer*.py", "training_args.py", "optimization.py"
)


def test_compared_versions_are_those_installed():
    assert f"Lightning {lightning.__version__} " in PAGE
    assert f"transformers {transformers.__version__}." in PAGE


@pytest.mark.parametrize("source", [TRAINER_OF_LIGHTNING, TRAINER_OF_HUGGING_FACE])
def test_other_libraries_have_no_adaptive_clipping_noise_scale_or_plan(source: str):
    assert not ADAPTIVE.search(source)
    assert not re.search("noise.?scale", source, re.IGNORECASE)
    assert not re.search(r"def plan\b|update_ratio|update_to_weight", source)


def test_claims_about_lightning():
    parameters = inspect.signature(Trainer).parameters
    assert {"gradient_clip_val", "gradient_clip_algorithm"} <= set(parameters)
    assert not {"max_samples", "max_tokens", "lr_scheduler"} & set(parameters)
    assert "TrainingSpikeException" in TRAINER_OF_LIGHTNING
    assert "on_train_batch_end" in vars(callbacks.SpikeDetection)
    assert "on_train_epoch_start" in vars(callbacks.GradientAccumulationScheduler)
    assert utilities.grad_norm
    assert "torch.gradient(losses, spacing=[lrs])" in TRAINER_OF_LIGHTNING


def test_claims_about_hugging_face():
    fields = transformers.TrainingArguments.__dataclass_fields__
    assert {"max_grad_norm", "warmup_steps", "lr_scheduler_type"} <= set(fields)
    assert not [name for name in fields if "clip_value" in name or "max_tokens" in name]
    assert "clip_grad_value" not in TRAINER_OF_HUGGING_FACE
    assert fields["gradient_accumulation_steps"].type in (int, "int")
    assert "warmup_stable_decay" in {kind.value for kind in SchedulerType}
    assert not re.search("lr_find|range_test", TRAINER_OF_HUGGING_FACE)
    assert "grad_norm" in TRAINER_OF_HUGGING_FACE


def test_every_row_has_a_command_and_every_footnote_is_used():
    rows = re.findall(r"^\| [A-Z].*\|$", PAGE, re.MULTILINE)
    assert len(rows) > 8
    assert all(re.search(r"\| `[^`]+` \|$", row) for row in rows)
    noted, named = (
        set(re.findall(p, PAGE, re.MULTILINE)) for p in (r"\[\^(\w+)\](?!:)", r"^\[\^(\w+)\]:")
    )
    assert noted == named


def test_every_command_exists():
    commands = re.findall(r"`((?:make|pytest|python|bigopt) [^`]+)`", PAGE)
    assert len(commands) > 8
    assert [command for command in commands if not exists(shlex.split(command))] == []
