"""``replay`` computes a rejected update again from its file."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import NormSpike, StepGuard, replay
from tests.bad_batches import BadBatchModule, fit


@pytest.mark.parametrize("accumulate", [1, 3])
def test_replay_gives_the_loss_and_gradient_of_the_rejected_update(
    accumulate: int, tmp_path: Path
) -> None:
    class ModuleWithRandomLoss(BadBatchModule):
        """The loss depends on dropout; ``self.log`` needs a Trainer."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, index = batch
            loss = self.even_loss([nn.functional.dropout(x), y, index])
            self.log("loss", loss)
            return loss * (1e4 if batch_idx // accumulate == 6 else 1.0)

    module = ModuleWithRandomLoss({}, lr=0.01)
    guard = StepGuard([NormSpike(armed=4)], forensics=str(tmp_path / "new"), max_consecutive=1)
    with pytest.raises(RuntimeError, match=r"update-00000006-rank0\.pt"):
        fit(module, guard, size=20 * accumulate, accumulate_grad_batches=accumulate)
    (rejected,) = guard.rejections
    before = torch.get_rng_state()
    again = replay(tmp_path / "new" / "update-00000006-rank0.pt", module)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(again.losses) == accumulate
    assert again.loss == pytest.approx(rejected.loss, rel=1e-6)
    assert again.norms.value == pytest.approx(rejected.norm, rel=1e-5)
    assert again.rejected["update"] == 6
    assert again.nonfinite == ()
    assert all(p.grad is None for p in module.parameters())
    size = Path(rejected.file).stat().st_size
    assert size < 30_000 * accumulate  # only the batch is written, not the storage of the data set


class Plain(BadBatchModule):
    """Compares nothing around its updates."""

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


def test_file_holds_the_batch_before_the_training_step_changed_it(tmp_path: Path) -> None:
    """A training step may change its batch in place and remove its entries."""

    class ChangesItsBatch(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].mul_(2.0)
            loss = super().training_step(batch, batch_idx)
            batch.clear()
            return loss

    module = ChangesItsBatch({4: 1e6}, lr=0.01)
    guard = StepGuard([NormSpike(armed=3)], forensics=str(tmp_path), max_consecutive=1)
    with pytest.raises(RuntimeError):
        fit(module, guard, size=12)
    (rejected,) = guard.rejections
    again = replay(rejected.file, module)
    assert again.loss == pytest.approx(rejected.loss, rel=1e-6)
    assert again.norms.value == pytest.approx(rejected.norm, rel=1e-5)


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_replay_draws_the_same_random_numbers(draw: Callable[[], float], tmp_path: Path) -> None:
    class ModuleWithRandomLoss(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.even_loss(batch) * (1 + draw()) * (1e9 if batch_idx == 4 else 1.0)

    module = ModuleWithRandomLoss({}, lr=0.01)
    guard = StepGuard([NormSpike(armed=2)], forensics=str(tmp_path), max_consecutive=1)
    with pytest.raises(RuntimeError):
        fit(module, guard, size=20)
    (rejected,) = guard.rejections
    before = random_states()
    assert replay(rejected.file, module).loss == pytest.approx(rejected.loss, rel=1e-6)
    assert random_states() == before


def random_states() -> tuple[str, Any]:
    return str(np.random.get_state()), random.getstate()  # noqa: NPY002


class Box:
    """A user's own class of batches."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


def test_batch_of_a_user_class_needs_pickle(tmp_path: Path) -> None:
    class Boxed(Plain):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"box": Box(batch), "rows": batch[0]}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.even_loss(batch["box"].batch) * (math.nan if batch_idx == 1 else 1.0)

    module = Boxed({})
    guard = StepGuard(forensics=str(tmp_path), max_consecutive=1)
    with pytest.raises(RuntimeError):
        fit(module, guard, size=8)
    (rejected,) = guard.rejections
    mode = module.training
    with pytest.raises(ValueError, match=r"load must be 'pickle' for .*trust"):
        replay(rejected.file, module)
    again = replay(rejected.file, module, load="pickle")
    assert again.nonfinite
    assert module.training is mode
