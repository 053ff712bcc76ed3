"""300 updates of a 0.1M GPT in a storm: the guard's promise, kept; make bench runs 1,000."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from benchmarks.storm import Run, StormyGPT, storm, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

UPDATES = 300
POISON = storm(UPDATES, share=0.04)
BURST = next(u for u in sorted(POISON) if u + 1 in POISON)
KILL = BURST + 2  # two of the burst's four are through


@pytest.fixture(scope="module")
def clean() -> Run:
    return train(updates=UPDATES, poison={})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storm") / "killed.ckpt"


@pytest.fixture(scope="module")
def stormy(checkpoint: Path) -> Run:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == KILL:
                trainer.save_checkpoint(checkpoint)

    return train(updates=UPDATES, poison=POISON, callbacks=(Save(),))


def test_the_storm_holds_all_kinds_of_bad_batches() -> None:
    assert len(POISON) == 12
    assert sum(math.isnan(factor) for factor in POISON.values()) > 0
    assert sum(math.isinf(factor) for factor in POISON.values()) > 0
    assert {10.0, 1000.0} <= set(POISON.values())
    updates = sorted(POISON)
    assert any(updates[i + 3] - updates[i] == 3 for i in range(len(updates) - 3))
    assert 90_000 < sum(p.numel() for p in StormyGPT({}).parameters()) < 110_000


def test_clean_data_is_left_alone(clean: Run) -> None:
    assert len(clean.rejected) <= 1


def test_bad_batches_are_caught_and_the_run_ends_as_if_they_had_not_been(
    clean: Run, stormy: Run
) -> None:
    assert stormy.finite
    caught = set(stormy.rejected) & set(POISON)
    assert len(caught) >= 0.95 * len(POISON)
    assert len(stormy.rejected) - len(caught) <= 1
    assert abs(stormy.loss - clean.loss) <= 0.03


def test_without_the_guard_the_same_run_is_ruined(clean: Run) -> None:
    ruined = train(updates=UPDATES, poison=POISON, guarded=False)
    assert not ruined.finite
    assert not ruined.loss <= clean.loss + 0.5  # NaN is not


def test_killed_in_mid_storm_it_decides_the_same(stormy: Run, checkpoint: Path) -> None:
    resumed = train(updates=UPDATES, poison=POISON, ckpt_path=checkpoint)
    assert resumed.rejected == tuple(u for u in stormy.rejected if u >= KILL)
    assert {KILL, KILL + 1} <= set(resumed.rejected)
    pairs = zip(resumed.weights, stormy.weights, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert resumed.state["guarded"][""]["detectors"] == stormy.state["guarded"][""]["detectors"]
