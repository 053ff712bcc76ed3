"""cooldown='best': the cooldown of an extended run, exact after kills, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bigopt import (
    LearningRateScheduler,
    WarmupCosine,
    WarmupStableDecay,
    cooldown_for_extension,
)
from tests.callbacks.resume_helpers import fit, save_every_update
from tests.helpers import Probe

SCHEDULE = WarmupStableDecay(warmup=0, decay="20%", cooldown="linear")


def best(schedule: Any = SCHEDULE, **options: Any) -> LearningRateScheduler:
    return LearningRateScheduler(schedule, on_resume="extend", cooldown="best", **options)


def expected(length: float, updates: int, first: int) -> list[float]:
    """Learning rates of a trapezoid without warm-up, from an update on."""
    starts = (1 - length) * updates
    return [
        1.0 if t < starts else (updates - t) / (updates - starts) for t in range(first, updates)
    ]


def test_run_of_twice_the_length_gets_the_cooldown_of_the_bound(
    tmp_path: Path, info_log: Any
) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(SCHEDULE))  # 20 updates
    module = Probe(lr=1.0)
    fit(module, best(), ckpt=folder / "step=8.ckpt", max_steps=40)
    length = cooldown_for_extension(2)
    assert length == pytest.approx(0.63, abs=0.005)
    assert module.lrs == pytest.approx(expected(length, 40, 8), abs=1e-6)
    assert "2 times as long" in info_log.text
    assert "instead of 20.0%" in info_log.text


def test_without_best_an_extension_keeps_the_configured_cooldown(tmp_path: Path) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(SCHEDULE))
    module = Probe(lr=1.0)
    fit(
        module,
        LearningRateScheduler(SCHEDULE, on_resume="extend"),
        ckpt=folder / "step=8.ckpt",
        max_steps=40,
    )
    assert module.lrs == pytest.approx(expected(0.2, 40, 8), abs=1e-9)


@pytest.mark.parametrize("options", [{"on_resume": "extend", "cooldown": "best"}, {}])
@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
def test_killed_extension_resumes_to_the_bit(tmp_path: Path, options: Any) -> None:
    """With the same arguments, and with a plain scheduler that continues the checkpoint."""
    stable = save_every_update(tmp_path / "a", LearningRateScheduler(SCHEDULE)) / "step=8.ckpt"
    save_every_update(tmp_path / "b", best(), ckpt=stable, max_steps=40)
    straight, resumed = Probe(lr=1.0), Probe(lr=1.0)
    fit(straight, best(), ckpt=stable, max_steps=40)
    again = LearningRateScheduler(SCHEDULE, **options)
    fit(resumed, again, ckpt=tmp_path / "b" / "step=27.ckpt", max_steps=40)
    assert resumed.lrs == straight.lrs[19:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
def test_second_extension_starts_from_the_cooldown_of_the_first(tmp_path: Path) -> None:
    """20 → 30 → 40 updates needs the same cooldown as 20 → 40."""
    stable = save_every_update(tmp_path / "a", LearningRateScheduler(SCHEDULE)) / "step=8.ckpt"
    second = save_every_update(tmp_path / "b", best(), ckpt=stable, max_steps=30) / "step=10.ckpt"
    module = Probe(lr=1.0)
    fit(module, best(), ckpt=second, max_steps=40)
    assert module.lrs == pytest.approx(expected(cooldown_for_extension(2), 40, 10), abs=0.01)


def test_what_is_left_of_the_run_bounds_the_cooldown_with_a_warning(tmp_path: Path) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(SCHEDULE))
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"60\.0% is all that is left .* 0\.98 times"):
        fit(module, best(), ckpt=folder / "step=16.ckpt", max_steps=40)
    assert module.lrs == pytest.approx(expected(0.6, 40, 16), abs=1e-9)


def test_each_group_gets_its_own_length(tmp_path: Path) -> None:
    """The schedules of named groups are extended, too; constant ones stay as they are."""
    scheduler = best(groups=None)
    assert scheduler.settings.cooldown is None
    short = WarmupStableDecay(warmup=0, decay="10%", cooldown="linear")
    lengths = []
    for schedule in (SCHEDULE, short):
        folder = save_every_update(tmp_path / str(schedule.decay), LearningRateScheduler(schedule))
        module = Probe(lr=1.0)
        fit(module, best(schedule), ckpt=folder / "step=4.ckpt", max_steps=40)
        lengths.append(sum(rate < 1.0 for rate in module.lrs))
    assert lengths[0] > lengths[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"cooldown='best' must be given with on_resume='extend', got on_resume=None"),
        ({"on_resume": "cooldown"}, "must be given with on_resume='extend'"),
    ],
)
def test_best_needs_an_extension(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateScheduler(SCHEDULE, cooldown="best", **arguments)


def test_best_needs_a_schedule_with_a_cooldown() -> None:
    with pytest.raises(ValueError, match=r"schedule must be a WarmupStableDecay .* WarmupCosine"):
        best(WarmupCosine())
    with pytest.raises(ValueError, match=r"groups\['head'\] must be a WarmupStableDecay"):
        best(groups={"head": WarmupCosine()})


@pytest.mark.filterwarnings("ignore:.*dirpath has changed")
def test_extension_that_is_resumed_with_other_arguments_keeps_the_cooldown(
    tmp_path: Path, info_log: Any
) -> None:
    """A plain "extend" of an unchanged budget, a shorter one, and another end of the schedule."""
    stable = save_every_update(tmp_path / "a", LearningRateScheduler(SCHEDULE)) / "step=8.ckpt"
    save_every_update(tmp_path / "b", best(), ckpt=stable, max_steps=40)
    inside = tmp_path / "b" / "step=30.ckpt"
    plain = LearningRateScheduler(SCHEDULE, on_resume="extend")
    info_log.clear()
    module = Probe(lr=1.0)
    fit(module, plain, ckpt=inside, max_steps=40)
    assert module.lrs == pytest.approx(expected(cooldown_for_extension(2), 40, 30), abs=1e-6)
    assert "cooldown" not in info_log.text
    higher = WarmupStableDecay(warmup=0, decay="20%", cooldown="linear", end=0.1)
    for scheduler, updates in ((best(), 39), (best(higher), 40)):
        module = Probe(lr=1.0)
        with pytest.warns(UserWarning, match="jumps when the run is resumed"):
            fit(module, scheduler, ckpt=inside, max_steps=updates)
        assert module.lrs[0] < 0.5


def test_new_run_with_the_callback_of_an_extended_one_has_the_configured_cooldown(
    tmp_path: Path,
) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(SCHEDULE))
    callback = best()
    fit(Probe(lr=1.0), callback, ckpt=folder / "step=8.ckpt", max_steps=40)
    module = Probe(lr=1.0)
    fit(module, callback, max_steps=20)
    assert module.lrs == pytest.approx(expected(0.2, 20, 0), abs=1e-9)
