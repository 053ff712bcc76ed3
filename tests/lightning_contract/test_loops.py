"""Private names of Lightning's loops, and assumptions of the package about their counters."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.lightning_contract.private_names import asserts
from tests.lightning_contract.small import Small, batches, trainer


class Steps(DummyLogger):
    """Records the steps at which metrics are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        self.steps.append(options["step"])


@asserts("_batches_that_stepped")
def test_metrics_are_logged_at_the_number_of_batches_that_stepped(tmp_path: Path) -> None:
    """The curves of the package use Lightning's x axis, and a rewind restores it.

    Without it the monitor's curves would be shifted against those of ``self.log``.
    """
    seen: list[int] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            if trainer.global_step > len(seen):
                seen.append(loop._batches_that_stepped)
            if trainer.global_step == 2 and not (tmp_path / "two.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    logger = Steps()
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
    one = trainer(Looks(), **options, max_steps=-1, accumulate_grad_batches=2)
    one.fit(Small(), batches(8))
    assert seen == [0, 1, 2, 3]
    assert logger.steps == seen
    # A checkpoint holds the count of the update before it; a resume adds one when it begins.
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    loop = saved["loops"]["fit_loop"]["epoch_loop.state_dict"]
    assert loop["_batches_that_stepped"] == 1


@asserts("_data_source")
def test_the_source_of_the_training_data_is_known() -> None:
    """GlobalBatchFinder finds the object whose ``batch_size`` it sets, and its plain loaders."""

    class Owns(Small):
        def train_dataloader(self) -> Any:
            return data

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return data

    found: list[Any] = []

    class Looks(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            source = trainer.fit_loop._data_source
            found.append((source.instance, source.dataloader()))

    data, module, datamodule = batches(), Owns(), Data()
    trainer(Looks()).fit(module)
    trainer(Looks()).fit(Small(), datamodule=datamodule)
    trainer(Looks()).fit(Small(), data)
    assert found[0] == (module, data)
    assert found[1] == (datamodule, data)
    assert found[2] == (data, data)


@asserts("_data_fetcher")
@pytest.mark.parametrize("has_length", [True, False])
def test_the_iterator_of_an_epoch_can_begin_anew(has_length: bool) -> None:
    """A rewind within an epoch needs a new iterator: Lightning creates one per epoch."""

    class Data:
        start = 0

        def __iter__(self) -> Any:
            return iter([torch.tensor([float(i)]) for i in range(self.start, 4)])

    class Sized(Data):
        def __len__(self) -> int:
            return 4

    class Keeps(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((int(batch), batch_idx, self.trainer.is_last_batch))
            return super().training_step(batch, batch_idx)

    class GoesBack(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if len(seen) == 3:
                data.start = 1
                progress = trainer.fit_loop.epoch_loop.batch_progress
                progress.current.ready = 1
                fetcher = trainer.fit_loop._data_fetcher
                iter(fetcher)
                fetcher.fetched += 1

    seen: list[tuple[int, int, bool]] = []
    data = Sized() if has_length else Data()
    trainer(GoesBack(), max_epochs=1, max_steps=-1).fit(Keeps(), data)
    first = [(i, i, False) for i in range(3)]
    assert seen == [*first, (1, 1, False), (2, 2, False), (3, 3, True)]


@asserts("_FitLoop", "_TrainingEpochLoop", "_DataLoaderSource")
def test_a_loop_of_its_own_trains_beside_the_trainers() -> None:
    """The learning-rate range test trains in a loop that leaves the Trainer's counters alone."""
    seen: list[int] = []

    class Beside(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            own = trainer.fit_loop
            data = own._data_source.dataloader()
            beside = _FitLoop(trainer, min_epochs=None, max_epochs=-1)
            beside.epoch_loop = _TrainingEpochLoop(trainer, min_steps=None, max_steps=6)
            beside._data_source = _DataLoaderSource(data, "")
            trainer.fit_loop = beside
            beside.run()
            beside.teardown()
            trainer.fit_loop = own
            seen.extend([beside.epoch_loop.global_step, trainer.global_step])

        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            seen.append(trainer.global_step)

    one, module = trainer(Beside()), Small()
    before = module.layer.weight.item()
    one.fit(module, batches())
    assert seen == [*range(6), 6, 0, *range(4)]
    assert one.global_step == 4
    assert module.layer.weight.item() != before


@asserts(
    "_EvaluationLoop",
    "_trainer_fn",
    "_stage",
    "_combined_loader",
    "_max_batches",
    "_last_val_dl_reload_epoch",
    "_callback_metrics",
)
def test_a_validation_loop_of_its_own_runs_after_an_ordinary_one() -> None:
    """ModelAveraging validates other weights without new loaders, callbacks and loggers."""
    seen: list[Any] = []

    class Validates(Small):
        def validation_step(self, batch: Any) -> None:
            self.log("score", batch.sum())

    class Again(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            usual = trainer.fit_loop.epoch_loop.val_loop
            beside = _EvaluationLoop(trainer, usual._trainer_fn, usual._stage, verbose=False)
            beside._data_source = usual._data_source
            beside._combined_loader = copy.copy(usual._combined_loader)
            beside._max_batches = usual._max_batches
            beside._last_val_dl_reload_epoch = usual._last_val_dl_reload_epoch
            connector = trainer._logger_connector
            connector.reset_results()
            first = dict(connector._callback_metrics)
            trainer.callbacks, trainer.fit_loop.epoch_loop.val_loop = [], beside
            seen.append((first, beside.run(), usual.batch_progress.current.completed))
            trainer.callbacks, trainer.fit_loop.epoch_loop.val_loop = [self], usual

    one = trainer(Again(), num_sanity_val_steps=0, max_steps=-1, max_epochs=2)
    one.fit(Validates(), batches(), batches())
    assert len(seen) == 2
    for first, again, completed in seen:
        assert first["score"] == again[0]["score"]
        assert completed == 4


@asserts("_TunerExitException")
def test_one_exception_ends_a_fit_as_if_it_had_finished() -> None:
    """``plan()`` and the finders end a fit with it; other exceptions reach ``on_exception``."""
    calls: list[str] = []

    class Exits(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            raise _TunerExitException

        def on_exception(self, *arguments: Any) -> None:
            calls.append("exception")

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            calls.append("teardown")

    one = trainer(Exits())
    one.fit(Small(), batches())
    assert calls == ["teardown"]
    assert one.state.status == TrainerStatus.FINISHED
    assert one.global_step == 0


@asserts("_SubprocessScriptLauncher")
def test_one_launcher_starts_the_script_again_for_every_process() -> None:
    """A study starts its processes once with it, and refuses launchers that fork or spawn."""
    launchers = {
        name: L.Trainer(
            accelerator="cpu", devices=2, strategy=name, logger=False, barebones=True
        ).strategy.launcher
        for name in ("ddp", "ddp_spawn", "ddp_fork")
    }
    is_script = {n: isinstance(one, _SubprocessScriptLauncher) for n, one in launchers.items()}
    assert is_script == {"ddp": True, "ddp_spawn": False, "ddp_fork": False}
    calls: list[Any] = []
    one: Any = launchers["ddp"]
    one._call_children_scripts = lambda: calls.append("started")
    assert one.launch(lambda: calls.append("called"), trainer=None) is None
    assert calls == ["started", "called"]


@asserts("_logger_connector")
def test_the_logger_connector_holds_the_metrics_of_the_trainer() -> None:
    """A range test restores its attributes, so that the Trainer does not keep its losses."""
    one = trainer()
    before = {k: copy.copy(v) for k, v in vars(one._logger_connector).items() if k != "trainer"}
    one.fit(Small(), batches())
    assert "loss" in one.callback_metrics
    assert "loss" in one.logged_metrics
    vars(one._logger_connector).update(before)
    assert one.callback_metrics == one.logged_metrics == {}


@asserts("_logged_metrics", "_progress_bar_metrics")
def test_public_metrics_add_those_of_a_batch_that_has_not_ended() -> None:
    """The final metrics of a run must not contain those of a batch in which an error was raised.

    The progress bar of the monitor writes to the same dictionary as the public property returns.
    """

    class Fails(Small):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise ZeroDivisionError

    one = trainer()
    with pytest.raises(ZeroDivisionError):
        one.fit(Fails(), batches())
    assert one._logger_connector._logged_metrics == {}

    class Reads(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append("loss" in trainer.logged_metrics)

    seen: list[bool] = []
    other = trainer(Reads())
    with pytest.raises(ZeroDivisionError):
        other.fit(Fails(), batches())
    assert seen == [True]
    assert "loss" in other._logger_connector._logged_metrics
    assert other.progress_bar_metrics is other._logger_connector._progress_bar_metrics


@asserts("_current_fx_name")
def test_the_module_has_the_name_of_the_current_hook() -> None:
    """A save before the optimizer's step differs from one during it.

    The hook before the step is called within the step, by its closure.
    """
    seen: list[str | None] = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            result = super().step(closure)
            seen.append(one.lightning_module._current_fx_name)
            return result

    class Module(Small):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self._current_fx_name)

        def configure_optimizers(self) -> Any:
            return Optimizer(self.parameters(), lr=0.1)

    one = trainer(max_steps=1)
    one.fit(Module(), batches())
    assert seen == ["on_before_optimizer_step", "optimizer_step"]


@asserts("_DataLoaderIterDataFetcher")
@pytest.mark.filterwarnings("ignore:(Found|You are using the) `dataloader_iter`")
@pytest.mark.parametrize("fetches", [True, False])
def test_the_fetcher_of_a_step_that_fetches_has_its_own_class(fetches: bool) -> None:
    """Hooks before such a step receive the batch before, whose samples are not those to count."""

    class Fetches(Small):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return self.layer(batch).square().mean()

    class Looks(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher))

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            received.append(batch)

    seen: list[bool] = []
    received: list[Any] = []
    trainer(Looks()).fit((Fetches if fetches else Small)(), batches())
    assert seen == [fetches]
    assert (received[0] is None) is fetches
    if fetches:
        assert float(received[1]) == 0.0  # the first batch, before the second is trained


@asserts("_accelerator_connector")
def test_the_strategy_is_the_connectors() -> None:
    """``plan()`` simulates several processes in one, with its own strategy."""
    one = trainer()
    connector, original = one._accelerator_connector, one.strategy
    assert connector.strategy is original
    other = copy.copy(original)
    connector.strategy = other
    assert one.strategy is other
    assert one.lightning_module is other.lightning_module


# ----------------------------------------------------------- public or undocumented, without tests


class Counts(L.Callback):
    """The counters of batches in the hooks of a batch."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, ...]]] = {}

    def _look(self, hook: str, trainer: Any) -> None:
        now = trainer.fit_loop.epoch_loop.batch_progress.current
        counts = (now.ready, now.started, now.processed, now.completed)
        self.seen.setdefault(hook, []).append(counts)

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        self._look("start", trainer)

    def on_before_backward(self, trainer: Any, *arguments: Any) -> None:
        self._look("backward", trainer)

    def on_before_optimizer_step(self, trainer: Any, *arguments: Any) -> None:
        self._look("step", trainer)

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        self._look("end", trainer)


def test_batches_are_counted_in_four_stages() -> None:
    """The clock and ``finish_batch`` read them: which batch is trained, and which has ended."""
    counts = Counts()
    trainer(counts).fit(Small(), batches(2))
    for index in range(2):
        assert counts.seen["start"][index] == (index + 1, index, index, index)
        assert counts.seen["backward"][index] == (index + 1, index + 1, index, index)
        assert counts.seen["step"][index] == (index + 1, index + 1, index, index)
        assert counts.seen["end"][index] == (index + 1, index + 1, index + 1, index)


def test_a_batch_that_is_refused_counts_as_processed_and_not_as_started() -> None:
    """``finish_batch`` must not count a batch for which ``on_train_batch_start`` returns -1."""
    seen: list[tuple[int, int]] = []

    class Refuses(Small):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 1 else None

    class Looks(L.Callback):
        def on_train_epoch_end(self, trainer: Any, *arguments: Any) -> None:
            now = trainer.fit_loop.epoch_loop.batch_progress.current
            seen.append((now.started, now.processed))

    trainer(Looks(), max_epochs=1).fit(Refuses(), batches())
    assert seen == [(1, 2)]


def test_the_counters_can_be_put_back() -> None:
    """A snapshot restores them: ``global_step`` and the position in the epoch follow."""

    class Rewinds(L.Callback):
        seen: list[int]

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            trackers = [
                trainer.fit_loop.epoch_progress,
                loop.batch_progress,
                loop.automatic_optimization.optim_progress,
                loop.manual_optimization.optim_step_progress,
            ]
            if trainer.global_step == 1:
                self.states = [copy.deepcopy(tracker.state_dict()) for tracker in trackers]
            if trainer.global_step == 3:
                for tracker, state in zip(trackers, self.states, strict=True):
                    tracker.load_state_dict(state)
                self.seen = [trainer.global_step, loop.batch_progress.current.ready]
                trainer.should_stop = True

    rewinds = Rewinds()
    trainer(rewinds).fit(Small(), batches())
    assert rewinds.seen == [1, 1]


def test_a_scheduler_that_is_added_in_on_fit_start_is_saved_shown_and_never_stepped(
    tmp_path: Path,
) -> None:
    """The engine writes learning rates at the end of an update; Lightning must not step too."""
    stepped: list[int] = []

    class Scheduler(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *arguments: Any) -> None:
            stepped.append(1)

    class Adds(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            (optimizer,) = trainer.optimizers
            scheduler = Scheduler(optimizer, lambda _: 1.0)
            stepped.clear()  # torch's constructor makes one
            trainer.strategy.lr_scheduler_configs.append(
                LRSchedulerConfig(scheduler=scheduler, interval="step", frequency=sys.maxsize)
            )

    one = trainer(Adds(), max_epochs=2, max_steps=-1)
    one.fit(Small(), batches())
    one.save_checkpoint(tmp_path / "saved.ckpt")
    assert stepped == []
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert len(saved["lr_schedulers"]) == 1


def test_the_strategy_is_asked_through_its_own_attributes(tmp_path: Path) -> None:
    """Loaders and saved weights pass through two public methods that the package replaces."""
    calls: list[str] = []
    one = trainer()

    def replaced(name: str) -> Any:
        original = getattr(one.strategy, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    for name in ("process_dataloader", "lightning_module_state_dict", "optimizer_state"):
        vars(one.strategy)[name] = replaced(name)
    one.fit(Small(), batches())
    for weights_only in (False, True):
        one.save_checkpoint(tmp_path / "saved.ckpt", weights_only=weights_only)
    weights = "lightning_module_state_dict"
    assert calls == ["process_dataloader", weights, "optimizer_state", weights]


def test_the_hook_of_the_strategy_runs_after_those_of_callbacks_and_module() -> None:
    """Also in a loop whose callbacks were replaced, as in a trial of LearningRateFinder."""
    calls: list[str] = []

    class RecordsHooks(L.Callback):
        def on_train_batch_start(self, *arguments: Any) -> None:
            calls.append("callback")

    class Module(Small):
        def on_train_batch_start(self, *arguments: Any) -> None:
            calls.append("module")

        def training_step(self, *arguments: Any) -> Any:
            calls.append("step")
            return super().training_step(*arguments)

    one = trainer(RecordsHooks(), max_steps=1)
    vars(one.strategy)["on_train_batch_start"] = lambda *arguments: calls.append("strategy")
    one.fit(Module(), batches())
    assert calls == ["callback", "module", "strategy", "step"]


def test_a_callback_that_is_inserted_in_setup_is_a_full_one(tmp_path: Path) -> None:
    """An engine added to ``trainer.callbacks`` in ``setup`` is set up, saved and restored."""
    calls: list[Any] = []

    class Inserted(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            calls.append("setup")

        def on_train_start(self, *arguments: Any) -> None:
            calls.append("start")

        def state_dict(self) -> dict[str, Any]:
            return {"value": 3}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            calls.append(state_dict)

    class Inserts(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.callbacks.insert(trainer.callbacks.index(self) + 1, Inserted())

    one = trainer(Inserts())
    one.fit(Small(), batches())
    one.save_checkpoint(tmp_path / "saved.ckpt")
    assert calls == ["setup", "start"]
    calls.clear()
    trainer(Inserts(), max_steps=5).fit(
        Small(), batches(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
    )
    assert calls == ["setup", {"value": 3}, "start"]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_the_loop_state_contains_the_stage_in_which_it_was_saved(tmp_path: Path, hook: str) -> None:
    """``next_logger_step`` repeats the rule by which a resume adds one to the x axis."""
    seen: list[tuple[bool, bool, bool]] = []

    class Validates(Small):
        def validation_step(self, *arguments: Any) -> None: ...

    class Saves(L.Callback):
        def __init__(self) -> None:
            setattr(self, hook, self.save)

        def save(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    class Looks(L.Callback):
        def on_train_start(self, trainer: Any, *arguments: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            seen.append(
                (loop.restarting, loop.restarted_on_train_batch_end, loop.restarted_on_last)
            )

    options: dict[str, Any] = {"val_check_interval": 1, "num_sanity_val_steps": 0}
    trainer(Saves(), **options).fit(Validates(), batches(), batches(1))
    trainer(Looks(), **options).fit(
        Validates(), batches(), batches(1), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
    )
    assert seen == [(True, hook == "on_train_batch_end", hook == "on_validation_end")]


@asserts("_should_check_val_epoch")
def test_the_epoch_loop_says_whether_an_epoch_has_a_validation() -> None:
    """A resume at the end of an epoch with a validation loses an epoch with an unsized loader."""
    seen: list[bool] = []

    class Validates(Small):
        def validation_step(self, *arguments: Any) -> None: ...

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer: Any, *arguments: Any) -> None:
            seen.append(bool(trainer.fit_loop.epoch_loop._should_check_val_epoch()))

    options: dict[str, Any] = {"max_epochs": 3, "max_steps": -1, "num_sanity_val_steps": 0}
    trainer(Looks(), check_val_every_n_epoch=2, **options).fit(Validates(), batches(), batches(1))
    trainer(Looks(), **options).fit(Small(), batches())
    assert seen == [False, True, False] + [False] * 3


@asserts("_should_check_val_fx")
def test_the_epoch_loop_says_whether_a_validation_follows_the_batch() -> None:
    """After a resume from that validation Lightning adds 1 to the step of its logs."""
    seen: list[bool] = []

    class Validates(Small):
        def validation_step(self, *arguments: Any) -> None: ...

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            loop = trainer.fit_loop
            seen.append(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))

    options: dict[str, Any] = {"max_epochs": 1, "max_steps": -1, "num_sanity_val_steps": 0}
    trainer(Looks(), val_check_interval=2, **options).fit(Validates(), batches(), batches(1))
    assert seen == [False, True, False, True]


@asserts("_Stateful")
def test_a_loader_with_a_state_is_stateful() -> None:
    """The first epoch of a stateful loader after a resume may be the rest of an epoch only."""

    class WithState:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    assert isinstance(WithState(), _Stateful)
    assert not isinstance(batches(), _Stateful)


def test_processes_meet_between_the_starts_of_the_fit_and_of_training() -> None:
    """Every process has published its settings when one of them reads those of the others."""
    seen: list[str] = []

    class Notes(L.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            seen.append("fit")
            barrier = trainer.strategy.barrier
            trainer.strategy.barrier = lambda *names: (seen.append("barrier"), barrier(*names))

        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.append("train")

    trainer(Notes()).fit(Small(), batches(2))
    assert "barrier" in seen[seen.index("fit") : seen.index("train")]


@pytest.mark.parametrize("resets", [False, True])
def test_the_epoch_after_a_resumed_last_batch_begins_only_after_a_reset(
    tmp_path: Path, resets: bool
) -> None:
    """Without its beginning, Lightning does not count the epoch in the checkpoints of it."""
    begun: list[int] = []

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    class Looks(L.Callback):
        def on_train_start(self, trainer: Any, *arguments: Any) -> None:
            epochs: Any = trainer.fit_loop.epoch_progress.total
            assert trainer.fit_loop.restarted_mid_epoch
            assert epochs.ready == epochs.processed == epochs.started == 1
            if resets:
                trainer.fit_loop.reset_restart_stage()

        def on_train_epoch_start(self, trainer: Any, *arguments: Any) -> None:
            begun.append(trainer.current_epoch)

    options: dict[str, Any] = {"max_epochs": 3, "max_steps": -1}
    trainer(Saves(), **options).fit(Small(), batches())
    path = tmp_path / "saved.ckpt"
    trainer(Looks(), **options).fit(Small(), batches(), ckpt_path=path, weights_only=True)
    assert begun == ([1, 2] if resets else [2])


@asserts("_on_before_batch_transfer")
def test_a_batch_is_prepared_as_the_loop_prepares_it() -> None:
    """A branch evaluates the next batches itself: with the hooks of the datamodule, if it has any.

    Without it the batches would be evaluated without the user's augmentation on the device.
    """

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch * 0 + 7

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 1

    class Looks(L.Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, out: Any, batch: Any, i: int
        ) -> None:
            by_loop.append(batch)
            data = module._on_before_batch_transfer(torch.ones(3), dataloader_idx=0)
            by_hand.append(trainer.strategy.batch_to_device(data, dataloader_idx=0))

    by_loop: list[Any] = []
    by_hand: list[Any] = []
    trainer(Looks(), max_steps=1).fit(Small(), datamodule=Data())
    assert torch.equal(by_loop[0].unique(), torch.tensor([8.0]))
    assert torch.equal(by_hand[0], torch.full((3,), 8.0))


@asserts("_initial_iter_for_state_dict")
def test_a_stateful_loader_that_was_asked_for_its_state_has_an_iterator() -> None:
    """A branch iterates a copy without this mark, which refers to the iterator of the original.

    Without it the copy would fail, because it has no iterator.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        loader = StatefulDataLoader(range(8), batch_size=2)
    state = loader.state_dict()
    assert loader._initial_iter_for_state_dict
    copied = copy.copy(loader)
    vars(copied).update(_iterator=None, next_iter_state=None, _initial_iter_for_state_dict=False)
    assert [batch.tolist() for batch in copied] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert loader.state_dict() == state


@asserts("_iterator")
def test_a_loader_with_persistent_workers_has_one_iterator() -> None:
    """A branch iterates a copy of the loader without this iterator.

    Without it the branch would restart the iterator of the epoch that continues after the branch.
    """
    loader = DataLoader(range(8), batch_size=2, num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    assert next(iterator).tolist() == [0, 1]
    assert loader._iterator is iterator
    copied = copy.copy(loader)
    copied._iterator = None
    assert next(iter(copied)).tolist() == [0, 1]
    assert next(iterator).tolist() == [2, 3]
    assert iter(loader) is iterator  # begins again
