"""What is kept of a rejected update, and looking at it again."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import NonFinite, NormSpike, StepGuard, replay
from tests.poison import Poisoned, fit


def test_a_rejection_says_which_parameters(caplog: pytest.LogCaptureFixture) -> None:
    class OneLayer(Poisoned):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                self.net[2].bias.grad[1] = math.inf
            if self.trainer.global_step == 6:
                self.net[0].weight.grad.mul_(1e5)

    module = OneLayer({})
    guard = StepGuard([NonFinite(), NormSpike(armed=3)])
    with caplog.at_level(logging.INFO):
        fit(module, guard, size=16)
    broken, large = guard.rejections
    assert (broken.nonfinite, [name for name, _ in broken.parameters]) == (1, ["net.2.bias"])
    assert (large.nonfinite, large.parameters[0][0]) == (0, "net.0.weight")
    assert broken.rank is None
    assert math.isfinite(broken.loss)
    assert "Update 3 (epoch 0, batch 3) rejected" in caplog.text
    assert "not finite in 1 parameter: net.2.bias" in caplog.text


@pytest.mark.parametrize("accumulate", [1, 3])
def test_replay_gives_the_loss_and_the_gradient_of_then(accumulate: int, tmp_path: Path) -> None:
    class Random(Poisoned):
        """Dropout and a field of the batch decide; ``self.log`` needs a Trainer."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, index = batch
            loss = self.even_loss([nn.functional.dropout(x), y, index])
            self.log("loss", loss)
            return loss * (1e4 if batch_idx // accumulate == 6 else 1.0)

    module = Random({}, lr=0.01)
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
    assert size < 30_000 * accumulate  # a view of the data set is not written with its storage


def test_no_more_than_twenty_files_are_written(tmp_path: Path) -> None:
    module = Poisoned(dict.fromkeys(range(30), math.nan))
    fit(module, StepGuard(forensics=str(tmp_path), max_consecutive=99), size=64)
    assert len(list(tmp_path.iterdir())) == 20


def test_batches_are_kept_only_on_request(tmp_path: Path) -> None:
    class Looks(Poisoned):
        kept: Any = None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            self.kept = guard.controller._window._batch

    for folder, expected in ((None, True), (str(tmp_path), False)):
        guard = StepGuard(forensics=folder)
        module = Looks({})
        fit(module, guard, size=4)
        assert (module.kept is None) is expected
        assert guard.controller._window._batch is None


class Plain(Poisoned):
    """Looks at nothing around its updates."""

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


def test_the_file_holds_the_batch_as_it_came(tmp_path: Path) -> None:
    """A training step may write to its batch, and take fields out of it."""

    class Greedy(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].mul_(2.0)
            loss = super().training_step(batch, batch_idx)
            batch.clear()
            return loss

    module = Greedy({4: 1e6}, lr=0.01)
    guard = StepGuard([NormSpike(armed=3)], forensics=str(tmp_path), max_consecutive=1)
    with pytest.raises(RuntimeError):
        fit(module, guard, size=12)
    (rejected,) = guard.rejections
    again = replay(rejected.file, module)
    assert again.loss == pytest.approx(rejected.loss, rel=1e-6)
    assert again.norms.value == pytest.approx(rejected.norm, rel=1e-5)


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_replay_draws_the_random_numbers_of_then(draw: Callable[[], float], tmp_path: Path) -> None:
    class Random(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.even_loss(batch) * draw() * (1e9 if batch_idx == 4 else 1.0)

    module = Random({}, lr=0.01)
    guard = StepGuard([NormSpike(armed=2)], forensics=str(tmp_path), max_consecutive=1)
    with pytest.raises(RuntimeError):
        fit(module, guard, size=20)
    (rejected,) = guard.rejections
    before = states()
    assert replay(rejected.file, module).loss == pytest.approx(rejected.loss, rel=1e-6)
    assert states() == before


def states() -> tuple[str, Any]:
    return str(np.random.get_state()), random.getstate()  # noqa: NPY002


class Box:
    """A batch of no kind that anybody knows."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


def test_a_batch_of_an_unknown_class_asks_for_pickle(tmp_path: Path) -> None:
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
