"""The state of Trainer, module and callbacks after a fit that ended, raised, or was rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
)
from lightning_bigopt.engine.capability import Capability
from tests.helpers import QUIET, Probe, ResumableLoader, loader
from tests.older_lightning import fault_of_2_5_0


def four_callbacks() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        GradientClipping(NormClip(max_norm=0.5)),
        BatchSizeScheduler(ConstantBatchSize(4)),
        OptimizationMonitor(),
    ]


class FailsAtBatchThree(Probe):
    """Raises at batch 3 of a fit."""

    fails = True

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.fails and batch_idx == 3:
            raise ArithmeticError("on purpose")
        return super().training_step(batch, batch_idx)


def test_fit_that_raises_at_its_start_changes_nothing() -> None:
    module = Probe()
    trainer = L.Trainer(
        **QUIET, max_epochs=1, accumulate_grad_batches=2, callbacks=four_callbacks()
    )
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        trainer.fit(module, loader(12, 2))
    assert trainer.accumulate_grad_batches == 2
    assert "backward" not in vars(module)


def test_new_trainer_after_an_error_trains_to_the_same_bits() -> None:
    """They train to the same bits as new callbacks and a new module."""
    callbacks, module = four_callbacks(), FailsAtBatchThree()
    with pytest.raises(ArithmeticError):
        L.Trainer(**QUIET, max_epochs=1, callbacks=callbacks).fit(module, loader(12, 2))
    module.fails = False
    fresh = FailsAtBatchThree()
    fresh.fails = False
    module.load_state_dict(fresh.state_dict())
    module.lrs, module.windows = [], []
    L.Trainer(**QUIET, max_epochs=1, callbacks=callbacks).fit(module, loader(12, 2))
    L.Trainer(**QUIET, max_epochs=1, callbacks=four_callbacks()).fit(fresh, loader(12, 2))
    assert module.lrs == fresh.lrs == [1 * 0.05, 0.05 * (1 - 2 / 6), 0.05 * (1 - 4 / 6)]
    for mine, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_testing_a_checkpoint_between_two_fits_keeps_the_clock(tmp_path: Path) -> None:
    module = Probe(lr=1.0)
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = QUIET | {"enable_checkpointing": True}
    trainer = L.Trainer(**options, max_epochs=1, callbacks=[*four_callbacks(), checkpoint])
    trainer.fit(module, ResumableLoader(16, 2))
    trainer.test(module, loader(4, 2), ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, ResumableLoader(16, 2))
    assert module.lrs == [1 - t / 4 for t in range(4)] + [1 - t / 8 for t in range(4, 8)]


@fault_of_2_5_0("LearningRateFinder trains at the old learning rate")
def test_learning_rate_finder_of_lightning_sets_the_base_learning_rate(tmp_path: Path) -> None:
    class Tunable(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tunable()
    finder = LearningRateFinder(num_training_steps=60, early_stop_threshold=None)
    trainer = L.Trainer(
        **QUIET, max_epochs=2, callbacks=[*four_callbacks(), finder], default_root_dir=tmp_path
    )
    trainer.fit(module, loader(160, 2))
    found = module.lr
    assert found != 0.05
    assert module.lrs[-80:] == pytest.approx([found * (1 - t / 80) for t in range(80)])
    assert trainer.global_step == 80


@pytest.mark.parametrize("fails", [False, True])
def test_clipping_of_lightning_works_after_a_fit_with_gradient_clipping(fails: bool) -> None:
    clipping, module = GradientClipping(NormClip(max_norm=0.5)), FailsAtBatchThree()
    module.fails = fails
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[clipping])
    if fails:
        with pytest.raises(ArithmeticError):
            trainer.fit(module, loader(12, 2))
    else:
        trainer.fit(module, loader(12, 2))
    plugin = trainer.precision_plugin
    assert not [name for name in vars(plugin) if "clip" in name]

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.extend([torch.nn.utils.get_total_norm(gradients)] if gradients else [])

    norms: list[Any] = []
    module.fails = False
    again = L.Trainer(
        **QUIET, max_epochs=1, callbacks=[Norms()], plugins=[plugin], gradient_clip_val=1e-4
    )
    again.fit(module, loader(12, 2))
    assert norms
    assert max(norms) == pytest.approx(1e-4, rel=0.02)


class EndsWithAnError(Capability):
    """A capability of a user whose end fails."""

    owns, rank = "end", 1

    def end(self, fit: Any) -> None:
        raise OSError("no space left")


def test_error_at_the_end_of_a_capability_leaves_nothing_behind() -> None:
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[EndsWithAnError(), *four_callbacks()])
    with pytest.raises(OSError, match="no space left"):
        trainer.fit(Probe(), loader(12, 2))
    assert "lightning_module_state_dict" not in vars(trainer.strategy)
    assert "step" not in vars(trainer.optimizers[0])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        assert not (isinstance(callback, Capability) and callback.fit)


class LogsAndFails(FailsAtBatchThree):
    """Logs its loss; the files of the logger fail together with the module."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            self.logger.experiment._get_file_writer().add_summary = no_space  # type: ignore[union-attr]
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def no_space(*arguments: Any) -> None:
    raise OSError("no space left")


def test_full_disk_does_not_hide_the_error_that_ends_the_fit(tmp_path: Path) -> None:
    trainer = L.Trainer(
        **{**QUIET, "logger": TensorBoardLogger(tmp_path, default_hp_metric=False)},
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=four_callbacks(),
    )
    with (
        pytest.warns(UserWarning, match=r"TensorBoardLogger could not write \(OSError: no space"),
        pytest.raises(ArithmeticError),
    ):
        trainer.fit(LogsAndFails(), loader(12, 2))
    assert "step" not in vars(trainer.optimizers[0])
