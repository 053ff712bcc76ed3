"""The page of schedules draws every one, from code that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_bigopt
from lightning_bigopt import schedules
from lightning_bigopt.schedules import Schedule

PAGE = (Path(__file__).parent.parent / "docs" / "schedules.md").read_text(encoding="utf-8")
PICTURES = re.findall(r"^```\{schedule\}\n(.*?)\n```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", PICTURES)
def test_what_is_drawn_is_a_schedule(code: str):
    schedule = eval(code, vars(lightning_bigopt).copy())
    assert isinstance(schedule, Schedule)
    assert all(factor >= 0 for factor in schedule.values(1000))


def test_every_schedule_has_its_picture():
    drawn = " ".join(PICTURES)
    assert [n for n in schedules.__all__ if n != "Schedule" and f"{n}(" not in drawn] == []
