"""The page of schedules has a picture of every schedule, drawn by code that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_bigopt
from lightning_bigopt import schedules
from lightning_bigopt.schedules import Schedule

PAGE = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")
PICTURES = re.findall(r"^```\{schedule\}\n(.*?)\n```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", PICTURES)
def test_code_of_a_picture_is_a_schedule(code: str):
    schedule = eval(code, vars(lightning_bigopt).copy())
    assert isinstance(schedule, Schedule)
    assert all(factor >= 0 for factor in schedule.values(1000))


def test_every_schedule_has_a_picture():
    drawn = " ".join(PICTURES)
    assert [n for n in schedules.__all__ if n != "Schedule" and f"{n}(" not in drawn] == []
