"""300 updates of a GPT of 0.1M parameters with bad batches; ``make bench`` runs 1,000."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from benchmarks.bad_batches import BadBatchGPT, Run, bad_updates, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

UPDATES = 300
BAD_FACTORS = bad_updates(UPDATES, share=0.04)
BURST = next(u for u in sorted(BAD_FACTORS) if u + 1 in BAD_FACTORS)
KILL = BURST + 2  # after two of the four bad batches in a row


@pytest.fixture(scope="module")
def clean() -> Run:
    return train(updates=UPDATES, bad={})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_batches") / "saved.ckpt"


@pytest.fixture(scope="module")
def guarded(checkpoint: Path) -> Run:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == KILL:
                trainer.save_checkpoint(checkpoint)

    return train(updates=UPDATES, bad=BAD_FACTORS, callbacks=(Save(),))


def test_data_has_all_kinds_of_bad_batches() -> None:
    assert len(BAD_FACTORS) == 12
    assert sum(math.isnan(factor) for factor in BAD_FACTORS.values()) > 0
    assert sum(math.isinf(factor) for factor in BAD_FACTORS.values()) > 0
    assert {10.0, 1000.0} <= set(BAD_FACTORS.values())
    updates = sorted(BAD_FACTORS)
    assert any(updates[i + 3] - updates[i] == 3 for i in range(len(updates) - 3))
    assert 90_000 < sum(p.numel() for p in BadBatchGPT({}).parameters()) < 110_000


def test_clean_data_is_not_rejected(clean: Run) -> None:
    assert len(clean.rejected) <= 1


def test_bad_batches_are_rejected_and_the_final_loss_equals_that_of_clean_data(
    clean: Run, guarded: Run
) -> None:
    assert guarded.finite
    caught = set(guarded.rejected) & set(BAD_FACTORS)
    assert len(caught) >= 0.95 * len(BAD_FACTORS)
    assert len(guarded.rejected) - len(caught) <= 1
    assert abs(guarded.loss - clean.loss) <= 0.03


def test_without_guard_the_same_run_fails(clean: Run) -> None:
    unguarded = train(updates=UPDATES, bad=BAD_FACTORS, guarded=False)
    assert not unguarded.finite
    assert not unguarded.loss <= clean.loss + 0.5  # true for NaN as well


def test_resume_in_mid_run_rejects_the_same_updates(guarded: Run, checkpoint: Path) -> None:
    resumed = train(updates=UPDATES, bad=BAD_FACTORS, ckpt_path=checkpoint)
    assert resumed.rejected == tuple(u for u in guarded.rejected if u >= KILL)
    assert {KILL, KILL + 1} <= set(resumed.rejected)
    pairs = zip(resumed.weights, guarded.weights, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert resumed.state["guarded"][""]["detectors"] == guarded.state["guarded"][""]["detectors"]
