"""Arguments of other libraries that the recipes name exist."""

from __future__ import annotations

import re
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def test_arguments_of_hugging_face_exist():
    from transformers import TrainingArguments

    page = (RECIPES / "huggingface_trainer.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    names = {name for row in rows[1:] for name in re.findall(r"`(\w+)`", row)}
    assert len(names) > 20
    assert names <= set(TrainingArguments.__dataclass_fields__)
