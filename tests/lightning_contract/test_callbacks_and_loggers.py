"""Private names of Lightning's ModelCheckpoint, loggers, hyperparameters and DDP strategy."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.tensorboard import SummaryWriter

from tests.lightning_contract.private_names import asserts
from tests.lightning_contract.small import Small, batches, trainer


def read(folder: str | Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


# ---------------------------------------------------------------------------------- callbacks


@asserts("_last_checkpoint_saved", "_last_global_step_saved")
def test_a_checkpoint_callback_has_the_path_of_its_newest_file(tmp_path: Path) -> None:
    """StepGuard's error names the last checkpoint before the bad updates.

    The public paths are not sufficient: ``best_model_path`` may be older, and ``last_model_path``
    requires ``save_last``.
    """
    seen: list[tuple[str, int]] = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            (callback,) = trainer.checkpoint_callbacks
            path = callback._last_checkpoint_saved
            seen.append((Path(path).name, callback._last_global_step_saved))

    class Logs(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("score", float(batch_idx))  # the first is the best
            return self.layer(batch).square().mean()

    saves = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=2, monitor="score", save_top_k=2
    )
    trainer(Looks(), saves, enable_checkpointing=True, max_steps=6).fit(Logs(), batches(6))
    assert seen[:2] == [("", 0)] * 2
    assert seen[2:] == [("step=2.ckpt", 2)] * 2 + [("step=4.ckpt", 4)] * 2
    assert Path(saves.best_model_path).name == "step=2.ckpt"


@asserts("_every_n_train_steps", "_train_time_interval")
def test_a_checkpoint_callback_keeps_its_intervals() -> None:
    """``plan()`` says how often checkpoints are written."""
    default = ModelCheckpoint()
    assert (default._every_n_train_steps, default._train_time_interval) == (0, None)
    assert default.every_n_epochs == 1
    assert ModelCheckpoint(every_n_train_steps=7)._every_n_train_steps == 7
    interval = timedelta(minutes=3)
    assert ModelCheckpoint(train_time_interval=interval)._train_time_interval == interval
    assert ModelCheckpoint(every_n_epochs=3).every_n_epochs == 3


# ------------------------------------------------------------------------------------ loggers


@asserts("_prefix")
@pytest.mark.parametrize("prefix", ["", "run"])
def test_tensorboard_tags_have_the_prefix(tmp_path: Path, prefix: str) -> None:
    """Events and dashboard are written without the logger, and must have its tag prefix."""
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    assert logger._prefix == prefix
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    expected = f"{prefix}{logger.LOGGER_JOIN_CHAR}loss" if prefix else "loss"
    assert read(logger.log_dir).Tags()["scalars"] == [expected]


@asserts("_get_file_writer")
def test_whole_events_can_be_appended(tmp_path: Path) -> None:
    """One event with 300 values takes 0.6 ms; one event for each value takes 13 ms."""
    writer = SummaryWriter(str(tmp_path))
    summary = Summary()
    summary.value.add(tag="a", simple_value=1.0)
    summary.value.add(tag="b", simple_value=2.0)
    writer._get_file_writer().add_summary(summary, 7)
    event = Event(step=8, session_log=SessionLog(status=SessionLog.START))
    writer._get_file_writer().add_event(event, 8)
    writer.close()
    found = read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("a")] == [(7, 1.0)]
    assert [(e.step, e.value) for e in found.Scalars("b")] == [(7, 2.0)]


@asserts("_async_writer", "_writer")
def test_the_method_that_writes_records_can_be_replaced(tmp_path: Path) -> None:
    """Without it the checksum of an event of 1,200 values takes 17 ms instead of 1 ms."""
    writer = SummaryWriter(str(tmp_path))
    written = writer._get_file_writer().event_writer._async_writer._writer
    assert type(written).__name__ == "RecordWriter"
    records: list[bytes] = []

    def write(data: bytes) -> None:
        records.append(data)
        type(written).write(written, data)

    written.write = write
    writer.add_scalar("a", 1.0, 7)
    writer.flush()
    assert [Event.FromString(record).step for record in records] == [7]
    del written.write
    with (tmp_path / "raw").open("wb") as file:
        written._writer, usual = file, written._writer
        written.write(records[0])
        written._writer = usual
    assert records[0] in (tmp_path / "raw").read_bytes()
    writer.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("a")] == [(7, 1.0)]


class WithHyperparameters(Small):
    def __init__(self, width: int = 3, *, logger: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters("width", logger=logger)


@asserts("_log_hyperparams")
@pytest.mark.parametrize("logged", [True, False])
def test_a_module_has_a_flag_for_logged_hyperparameters(tmp_path: Path, logged: bool) -> None:
    """The monitor warns if a row written by Lightning hides its metrics."""
    module = WithHyperparameters(logger=logged)
    assert module._log_hyperparams is logged
    assert dict(module.hparams_initial) == {"width": 3}
    assert Small()._log_hyperparams is False
    logger = CSVLogger(tmp_path)
    trainer(logger=logger).fit(module, batches())
    assert bool(logger.experiment.hparams) is logged


@asserts("_default_hp_metric")
@pytest.mark.parametrize("default", [True, False])
def test_a_row_of_hyperparameters_gets_a_metric_of_its_own(tmp_path: Path, default: bool) -> None:
    """The row contains only ``hp_metric``, unless the logger omits it."""
    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    assert logger._default_hp_metric is default
    trainer(logger=logger).fit(WithHyperparameters(), batches())
    assert ("hp_metric" in read(logger.log_dir).Tags()["scalars"]) is default


def test_values_put_into_the_progress_bars_metrics_stay_there() -> None:
    """The package shows values without ``self.log``, which costs 0.4 ms per key on every step."""
    seen: list[dict[str, Any]] = []

    class Shows(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.progress_bar_metrics.update({"own": trainer.global_step})

        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            seen.append(dict(trainer.progress_bar_metrics))

    trainer(Shows()).fit(Small(), batches())
    assert [shown.get("own") for shown in seen] == [None, 1, 2, 3]


# ----------------------------------------------------------------------------------- strategy


@asserts("_ddp_comm_hook")
def test_ddp_keeps_a_communication_hook_and_ignores_it_on_a_cpu() -> None:
    """GradientCompression rejects a second hook. On a CPU Lightning does not pass it to torch."""
    assert DDPStrategy()._ddp_comm_hook is None
    strategy = DDPStrategy(ddp_comm_hook=fp16_compress_hook)
    assert strategy._ddp_comm_hook is fp16_compress_hook
    registered: list[int] = []

    class Registers(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            model = trainer.strategy.model
            model.register_comm_hook(None, fp16_compress_hook)
            registered.append(1)
            with pytest.raises(RuntimeError, match="can only be called once"):
                model.register_comm_hook(None, fp16_compress_hook)

    with mock.patch.dict(os.environ):  # Lightning sets rank and port for child processes
        try:
            one = trainer(Registers(), strategy=strategy, devices=1, max_steps=0)
            one.fit(Small(), batches())
        finally:
            torch.distributed.destroy_process_group()
    assert registered == [1]


@asserts("_ddp_comm_wrapper")
def test_lightning_passes_the_hook_of_ddp_to_the_wrapper_and_registers_the_result() -> None:
    """On GPUs a hook of the user then runs inside that of GradientNoiseScale."""
    registered: list[Any] = []

    class Model:
        def register_comm_hook(self, state: Any, hook: Any) -> None:
            registered.append((state, hook))

    def wrapped(state: Any, bucket: Any) -> Any: ...

    def wrapper(hook: Any) -> Any:
        registered.append(hook)
        return wrapped

    assert DDPStrategy()._ddp_comm_wrapper is None
    strategy = DDPStrategy(
        ddp_comm_hook=fp16_compress_hook, ddp_comm_state="state", ddp_comm_wrapper=wrapper
    )
    strategy.parallel_devices = [torch.device("cuda", 0)]
    strategy.cluster_environment = LightningEnvironment()
    strategy.model = Model()  # type: ignore[assignment]
    with mock.patch("lightning.pytorch.strategies.ddp.DistributedDataParallel", Model):
        strategy._register_ddp_hooks()
    assert registered == [fp16_compress_hook, ("state", wrapped)]


@asserts("_duration")
@pytest.mark.parametrize("duration", ["00:00:01:30", {"minutes": 1.5}, timedelta(seconds=90)])
def test_a_timer_has_its_duration_in_seconds(duration: Any) -> None:
    """Schedules over ``max_time`` divide by it; the public names give only what remains of it."""
    assert Timer(duration)._duration == 90.0
    assert Timer()._duration is None


@asserts("_interval")
def test_a_timer_has_the_interval_at_which_it_ends_a_run() -> None:
    """Only such a Timer drives schedules: the end of an epoch is not known in seconds."""
    assert Timer("00:00:01:30")._interval == "step"
    assert Timer("00:00:01:30", interval="epoch")._interval == "epoch"


@asserts("_signal_connector", "_slurm_sigusr_handler_fn", "_sigterm_notifier_fn")
def test_handlers_of_slurm_are_registered_after_on_fit_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handlers on the instance are those that are registered, if the environment is SLURM's.

    Without it a signal of SLURM saves a checkpoint in the middle of an update, and SIGTERM starts a
    collective there.
    """
    for name in ("JOB_ID", "NTASKS", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name == "NTASKS" else "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    received: list[str] = []

    class Replaces(L.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            assert trainer._accelerator_connector.cluster_environment.auto_requeue
            for handler in ("_slurm_sigusr_handler_fn", "_sigterm_notifier_fn"):
                assert callable(getattr(trainer._signal_connector, handler))
                record = partial(lambda name, *arguments: received.append(name), handler)
                vars(trainer._signal_connector)[handler] = record

        def on_train_start(self, trainer: Any, module: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    environment = SLURMEnvironment(requeue_signal=signal.SIGTERM)
    try:
        trainer(Replaces(), plugins=[environment]).fit(Small(), batches(2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == ["_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"]
