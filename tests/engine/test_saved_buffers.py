"""Checkpoints inside an accumulation window hold the buffers of the last update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    Constant,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    StepGuard,
)
from tests.helpers import QUIET, Regression, ResumableLoader, cpu_precision
from tests.older_lightning import fault_of_2_5_0

WINDOW = 3  # micro-batches of an update


class Codebook(nn.Module):
    """A moving average of the inputs, as a new tensor in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().float().mean(0), 0.1)
            self.calls += 1
        return x - self.mean


class Buffers(L.LightningModule):
    """A network whose forward pass changes buffers of four kinds; one layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            Codebook(),
            torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)),
            nn.BatchNorm1d(5),
            torch.nn.utils.spectral_norm(nn.Linear(5, 3)),
        )
        self.alias = self.net[2]
        self.after_updates: list[dict[str, Tensor]] = []
        self.rows: list[list[int]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rows.append(batch[2].tolist())
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class RecordsUpdates(L.Callback):
    """Copies the state dict and all buffers when the Trainer's count of updates has grown."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.states[trainer.global_step] = copied(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        if trainer.global_step not in self.states:
            self.states[trainer.global_step] = copied(module)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Saves(L.Callback):
    """Saves a full and a weights-only checkpoint in one hook at one loader batch of the run."""

    def __init__(self, folder: Path, hook: str, *, batch: int) -> None:
        self.full, self.weights = folder / "full.ckpt", folder / "weights.ckpt"
        self.started, self.step = 0, -1

        def save(trainer: Any, *arguments: Any) -> None:
            self.started += hook == "on_train_batch_start"
            ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if ready == batch and self.step < 0:
                self.step = trainer.global_step
                trainer.save_checkpoint(self.full)
                trainer.save_checkpoint(self.weights, weights_only=True)

        setattr(self, hook, save)


def callbacks() -> list[Any]:
    return [
        LearningRateScheduler(Constant(), on_resume="extend"),
        BatchSizeScheduler(ConstantBatchSize(4 * WINDOW)),
        GradientClipping(NormClip(1.0)),
    ]


def global_batches() -> GlobalBatchLoader:
    return GlobalBatchLoader(Regression(52), micro_batch_size=4, seed=1)


def train(
    module: L.LightningModule,
    *own: Any,
    data: Any = None,
    precision: str = "32-true",
    **options: Any,
) -> L.Trainer:
    resume = {"ckpt_path": options.pop("ckpt_path", None)}
    if resume["ckpt_path"]:
        resume["weights_only"] = True
    defaults = {**QUIET, "max_epochs": 2, "callbacks": list(own), **cpu_precision(precision)}
    trainer = L.Trainer(**{**defaults, **options})
    trainer.fit(module, global_batches() if data is None else data, **resume)
    return trainer


HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"]


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("batch", [4, 5, 6, 15])
def test_file_holds_the_last_update_and_the_run_continues_to_the_bit(
    tmp_path: Path, batch: int, hook: str, place: str
) -> None:
    straight, records = Buffers(), RecordsUpdates()
    train(straight, *callbacks(), records)
    saves, interrupted = Saves(tmp_path, hook, batch=batch), Buffers()
    own = [saves, *callbacks()] if place == "before" else [*callbacks(), saves]
    train(interrupted, *own)
    assert_equal(copied(interrupted), copied(straight))  # saving has changed nothing
    assert saves.step in records.states
    for path in (saves.full, saves.weights):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert_equal(saved, records.states[saves.step])
    resumed = Buffers()
    train(resumed, *callbacks(), ckpt_path=saves.full)
    assert_equal(copied(resumed), copied(straight))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("guard", [False, True])
def test_every_micro_batch_with_mixed_precision(
    tmp_path: Path, precision: str, guard: bool
) -> None:
    def own() -> list[Any]:
        return [*callbacks(), *([StepGuard()] if guard else [])]

    straight, records = Buffers(), RecordsUpdates()
    train(straight, *own(), records, precision=precision)
    for batch in range(3, 11):
        saves = Saves(tmp_path, "on_train_batch_end", batch=batch)
        train(Buffers(), *own(), saves, precision=precision)
        assert_equal(
            torch.load(saves.full, weights_only=True)["state_dict"], records.states[saves.step]
        )
        resumed = Buffers()
        train(resumed, *own(), ckpt_path=saves.full, precision=precision)
        assert_equal(copied(resumed), copied(straight))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_model_checkpoint_saves_the_same_file_again_after_a_resume(tmp_path: Path) -> None:
    """It saves ``step=2`` a second time, at the first micro-batch of the next window."""

    def checkpoint(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
        )

    def run(module: Buffers, folder: str, **options: Any) -> None:
        train(module, *callbacks(), checkpoint(folder), enable_checkpointing=True, **options)

    straight = Buffers()
    run(straight, "straight")
    first = tmp_path / "straight" / "step=2.ckpt"
    resumed = Buffers()
    run(resumed, "again", ckpt_path=first)
    again = tmp_path / "again" / "step=2.ckpt"
    assert again.exists()
    one, other = (torch.load(path, weights_only=True) for path in (first, again))
    assert_equal(one["state_dict"], other["state_dict"])
    assert_equal(copied(resumed), copied(straight))
    from_second = Buffers()
    run(from_second, "third", ckpt_path=again)
    assert_equal(copied(from_second), copied(straight))


class StopsAt(L.Callback):
    """Interrupts the run, or asks for its end, in one micro-batch."""

    def __init__(self, hook: str, *, batch: int, error: BaseException | None) -> None:
        self.is_over = False

        def stop(trainer: Any, *arguments: Any) -> None:
            ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if ready == batch and not self.is_over:
                self.is_over = True
                if error is not None:
                    raise error
                trainer.should_stop = True

        setattr(self, hook, stop)


@fault_of_2_5_0("no ModelCheckpoint(save_on_exception=)")
@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("batch", [4, 5])
@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("on_after_backward", ZeroDivisionError()),
        ("on_train_batch_end", ZeroDivisionError()),
        ("on_train_batch_end", None),
    ],
)
def test_run_that_ends_inside_a_window_continues(
    tmp_path: Path, hook: str, error: Any, batch: int, place: str
) -> None:
    straight, records = Buffers(), RecordsUpdates()
    train(straight, *callbacks(), records)
    ended = Buffers()
    stops = StopsAt(hook, batch=batch, error=error)
    own = [stops, *callbacks()] if place == "before" else [*callbacks(), stops]
    saves = ModelCheckpoint(
        tmp_path, filename="saved", save_on_exception=True, every_n_epochs=1, save_top_k=-1
    )
    options: dict[str, Any] = {"enable_checkpointing": True}
    if error is None:
        train(ended, *own, saves, min_epochs=0, **options)
    else:
        with pytest.raises(ZeroDivisionError):
            train(ended, *own, saves, **options)
    assert_equal(copied(ended), records.states[1])
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert_equal(saved, records.states[1])
    if error is not None:
        resumed = Buffers()
        train(resumed, *callbacks(), ckpt_path=tmp_path / "saved.ckpt")
        assert_equal(copied(resumed), copied(straight))


def test_second_fit_after_ctrl_c_inside_a_window(tmp_path: Path) -> None:
    class WithoutState(Buffers):  # a second fit creates new optimizers
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    straight = WithoutState()
    train(straight, *callbacks())
    module, data = WithoutState(), global_batches()
    stops = StopsAt("on_after_backward", batch=5, error=KeyboardInterrupt())
    trainer = L.Trainer(**QUIET, max_epochs=2, callbacks=[*callbacks(), stops])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, data)
    trainer.fit(module, data)
    assert_equal(copied(module), copied(straight))


def test_ordinary_loader_holds_weights_and_buffers_of_the_same_update(tmp_path: Path) -> None:
    """The window is lost: its micro-batches are neither in the weights nor in the buffers."""
    records, saves = RecordsUpdates(), Saves(tmp_path, "on_train_batch_end", batch=5)
    own = [LearningRateScheduler(Constant()), records, saves]
    train(Buffers(), *own, data=ResumableLoader(52, 4), accumulate_grad_batches=WINDOW)
    for path in (saves.full, saves.weights):
        assert_equal(torch.load(path, weights_only=True)["state_dict"], records.states[1])


def test_state_dict_of_the_module_s_own_is_used(tmp_path: Path) -> None:
    class Renames(Buffers):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            return {f"own.{key}": v for key, v in super().state_dict(*arguments, **options).items()}

    records, saves = RecordsUpdates(), Saves(tmp_path, "on_train_batch_end", batch=5)
    train(Renames(), *callbacks(), records, saves)
    saved = torch.load(saves.weights, weights_only=True)["state_dict"]
    assert_equal(saved, records.states[1])
    assert all(name.startswith("own.") for name in saved)


def test_guard_restores_buffers_after_a_resume_within_an_epoch(tmp_path: Path) -> None:
    """Lightning calls no ``on_train_epoch_start`` in the resumed epoch."""

    class Bad(Buffers):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            factor = float("nan") if self.trainer.global_step == 2 else 1.0
            return super().training_step([batch[0] * factor, *batch[1:]], batch_idx)

    saves = Saves(tmp_path, "on_train_batch_end", batch=3)
    straight = Bad()
    train(straight, *callbacks(), StepGuard(), saves)
    assert all(value.isfinite().all() for value in copied(straight).values())
    resumed = Bad()
    train(resumed, *callbacks(), StepGuard(), ckpt_path=saves.full)
    assert_equal(copied(resumed), copied(straight))


def test_manual_optimization_saves_the_buffers_of_its_batches(tmp_path: Path) -> None:
    """Each batch is its own window: only ``training_step`` knows when an update is complete."""

    class Manual(Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    saves, module = Saves(tmp_path, "on_train_batch_end", batch=5), Manual()
    ends: list[dict[str, Tensor]] = []

    class Records(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
            ends.append(copied(module))

    own = [LearningRateScheduler(Constant()), Records(), saves]
    train(module, *own, data=ResumableLoader(52, 4))
    for path in (saves.full, saves.weights):
        assert_equal(torch.load(path, weights_only=True)["state_dict"], ends[4])


class Threshold(Buffers):
    """Validation writes a buffer, and the training step that of a module in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.teacher = nn.BatchNorm1d(5).eval()
        self.register_buffer("first_seen", None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.teacher.running_mean.copy_(self.net[2].running_mean)
        if self.first_seen is None:
            self.first_seen = batch[0].mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.threshold.fill_(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready)


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 8, 9])
def test_values_that_validation_writes_are_kept(tmp_path: Path, batch: int) -> None:
    def run(module: Threshold, *own: Any, **resume: Any) -> None:
        options: dict[str, Any] = {**QUIET, "max_epochs": 2, "val_check_interval": 4}
        trainer = L.Trainer(**options, callbacks=[*callbacks(), *own])
        validation = torch.utils.data.DataLoader(Regression(4), batch_size=4)
        if resume:
            resume["weights_only"] = True
        trainer.fit(module, global_batches(), validation, **resume)

    straight, records = Threshold(), RecordsUpdates()
    saves = Saves(tmp_path, "on_train_batch_end", batch=batch)
    run(straight, records, saves)
    validated = torch.tensor(4.0 * ((batch - 1) // 4))  # before the validation of its own batch
    expected = records.states[saves.step]
    if validated > 0:
        expected["threshold"] = validated
    for path in (saves.full, saves.weights):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert_equal(saved, expected)
    fresh = Threshold()
    if saves.step:
        fresh.first_seen = torch.tensor(0.0)
    run(fresh, ckpt_path=saves.full)
    resumed, again = copied(fresh), copied(straight)
    for state in (resumed, again):
        state.pop("threshold")  # the resumed run may repeat no validation inside its window
    assert_equal(resumed, again)


def test_error_in_a_window_is_not_hidden_by_a_buffer_that_cannot_be_restored() -> None:
    class Expanded(Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ones", torch.ones(1).expand(4))

    module = Expanded()
    stops = StopsAt("on_after_backward", batch=5, error=ZeroDivisionError())
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[*callbacks(), stops])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, global_batches())
    assert "lightning_module_state_dict" not in vars(trainer.strategy)
