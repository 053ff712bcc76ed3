"""The checkpoint that is named when StepGuard ends a run, and what checkpoints hold."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_bigopt import Abort, StepGuard, TooManyRejectionsError
from tests.bad_batches import BadBatchModule, finite, fit
from tests.helpers import SaveAt
from tests.older_lightning import fault_of_2_5_0


def test_max_consecutive_raises_and_names_the_last_healthy_checkpoint(
    tmp_path: Path,
) -> None:
    module = BadBatchModule(dict.fromkeys(range(7, 99), math.nan))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    with pytest.raises(TooManyRejectionsError) as error:
        fit(module, StepGuard(max_consecutive=3), saving, enable_checkpointing=True)
    assert "3 times in a row" in str(error.value)
    named = re.search(r"checkpoint before the bad updates is (\S+);", str(error.value)).group(1)
    assert Path(named) == tmp_path / "step=6.ckpt"
    weights = torch.load(named, weights_only=True)["state_dict"]
    assert finite(weights)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert len(module.changed) == 9  # the third rejected update raised


def test_checkpoint_resumed_from_is_named_if_none_was_written(tmp_path: Path) -> None:
    fit(BadBatchModule({}), StepGuard(), SaveAt(tmp_path / "first.ckpt", 4))
    with pytest.raises(TooManyRejectionsError, match=r"first\.ckpt"):
        fit(
            BadBatchModule(dict.fromkeys(range(4, 99), math.nan)),
            StepGuard(actions=[Abort(after=2)]),
            ckpt_path=tmp_path / "first.ckpt",
        )
    with pytest.raises(RuntimeError, match="No checkpoint was saved before"):
        fit(BadBatchModule({0: math.nan}), StepGuard(max_consecutive=1))


@fault_of_2_5_0("no ModelCheckpoint(save_on_exception=)")
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path")  # Lightning warns about OnExceptionCheckpoint
def test_named_checkpoint_exists_and_all_checkpoints_hold_finite_weights(tmp_path: Path) -> None:
    """ModelCheckpoint also saves between rejections, and removes earlier files."""
    module = BadBatchModule(dict.fromkeys(range(7, 99), math.nan), optimizer=torch.optim.AdamW)
    saving = ModelCheckpoint(
        tmp_path,
        every_n_train_steps=1,
        save_top_k=1,
        save_last=True,
        save_on_exception=True,
        filename="{step}",
    )
    with pytest.raises(RuntimeError) as error:
        fit(
            module,
            StepGuard(max_consecutive=4),
            saving,
            OnExceptionCheckpoint(tmp_path / "exception"),
            SaveAt(tmp_path / "before.ckpt", 7),
            enable_checkpointing=True,
        )
    named = re.search(r"checkpoint before the bad updates is (\S+);", str(error.value)).group(1)
    before = torch.load(tmp_path / "before.ckpt", weights_only=True)
    for path in {Path(named), *tmp_path.rglob("*.ckpt")}:
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] >= 7
        torch.testing.assert_close(saved["state_dict"], before["state_dict"], rtol=0, atol=0)
        assert finite(saved["optimizer_states"])


def test_count_of_consecutive_rejections_continues_after_a_resume(tmp_path: Path) -> None:
    bad_factors = dict.fromkeys(range(5, 99), math.nan)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    killed = SaveAt(tmp_path / "killed.ckpt", 7)
    with pytest.raises(RuntimeError):
        fit(
            BadBatchModule(bad_factors),
            StepGuard(max_consecutive=4),
            saving,
            killed,
            enable_checkpointing=True,
        )
    guard = StepGuard(max_consecutive=4)
    with pytest.raises(RuntimeError, match=r"4 times in a row.*step=4\.ckpt"):
        fit(BadBatchModule(bad_factors), guard, ckpt_path=tmp_path / "killed.ckpt")
    assert [r.update for r in guard.rejections] == [7, 8]
