"""Claims of the README about other libraries are true; its commands and paths exist."""

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

from lightning_bigopt.cli import __main__ as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    assert f"Lightning {lightning.__version__} " in README
    assert f"transformers {transformers.__version__}." in README


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


def test_every_command_and_path_exists():
    targets = (ROOT / "Makefile").read_text()
    shown = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    commands = [line.partition("#")[0] for block in shown for line in block.splitlines()]
    commands += re.findall(r"`((?:make|pytest|python|bigopt) [^`]+)`", README)
    assert len(commands) > 12
    for command in map(shlex.split, commands):
        if command[0] == "make":
            assert f"\n{command[1]}:" in targets
        elif command[0] in {"pytest", "python"}:
            assert all((ROOT / path).exists() for path in command[1:])
        elif command[0] == "bigopt":
            assert cli._parse(command[1:])[0] == command[1]


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert not [link for link in links if link.startswith("http")]


def test_every_row_has_a_command_and_every_footnote_is_used():
    rows = re.findall(r"^\| [A-Z].*\|$", README, re.MULTILINE)
    assert len(rows) > 8
    assert all(re.search(r"\| `[^`]+` \|$", row) for row in rows)
    noted, named = (
        set(re.findall(p, README, re.MULTILINE)) for p in (r"\[\^(\w+)\](?!:)", r"^\[\^(\w+)\]:")
    )
    assert noted == named


def test_python_of_the_readme_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert isinstance(namespace["trainer"], Trainer)
