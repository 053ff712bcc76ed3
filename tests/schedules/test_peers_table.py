"""The table of other libraries' schedules is complete, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.optim import lr_scheduler
from transformers import SchedulerType

from lightning_bigopt import schedules
from lightning_bigopt.durations import Horizon
from lightning_bigopt.schedules import Schedule

PAGE = (Path(__file__).parents[2] / "docs" / "schedules_peers.md").read_text(encoding="utf-8")
TIMM = ["cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt"]
MEGATRON = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]

SYMBOLS = {"w": 10, "T": 1000, "k": 50, "e": 0.1, "s": 0.01}
NAMES = {name: getattr(schedules, name) for name in schedules.__all__}


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_scheduler_type_of_transformers_has_a_row():
    assert {kind.value for kind in SchedulerType} <= {
        row[0].strip("`") for row in rows("transformers")
    }


def test_every_class_of_torch_has_a_row():
    listed = {re.match(r"`?([\w.]+)", row[0])[1] for row in rows("torch.optim.lr_scheduler")}
    assert set(lr_scheduler.__all__) <= listed


@pytest.mark.parametrize("name", TIMM)
def test_every_sched_of_timm_has_a_row(name: str):
    assert any(row[0].startswith(f"`{name}`") for row in rows("timm"))


@pytest.mark.parametrize("name", MEGATRON)
def test_every_style_of_megatron_has_a_row(name: str):
    assert any(f'lr_decay_style="{name}"' in row[0] for row in rows("Megatron-LM"))


def own_schedules() -> list[str]:
    cells = [row[2] for row in rows("transformers")]
    for title in ("torch.optim.lr_scheduler", "timm", "Megatron-LM"):
        cells += [row[1] for row in rows(title)]
    code = [snippet for cell in cells for snippet in re.findall(r"`([^`]+)`", cell)]
    return sorted({snippet for snippet in code if re.match(r"[A-Z]\w*\(", snippet)})


@pytest.mark.parametrize(
    "snippet", [code for code in own_schedules() if "Hyperparameter" not in code]
)
def test_code_in_the_table_runs(snippet: str):
    schedule = eval(snippet, dict(NAMES), dict(SYMBOLS))
    assert isinstance(schedule, Schedule)
    resolved = schedule.resolve(Horizon.of_steps(1000, steps_per_epoch=100))
    assert 0.0 <= resolved(0.5) <= 1.0


def test_table_has_code_to_check():
    assert len(own_schedules()) > 30
