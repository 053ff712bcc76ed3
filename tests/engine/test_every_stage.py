"""Every stage of the protocol in whole runs: its order among the others, and its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_bigopt import BatchSizeScheduler, ConstantBatchSize, GlobalBatchLoader
from lightning_bigopt.durations.horizon import Horizon
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.overridden_stages import overriding
from lightning_bigopt.engine.stage import Batch, Fit, Stages
from lightning_bigopt.engine.update import Rejection, Update
from tests.helpers import QUIET, Probe, Regression, ResumableLoader, loader

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

EVERY = list(overriding([], Stages))
# Called where something else asks for them: a monitor, several processes, a snapshot, a second run.
ON_DEMAND = {"metrics", "specification", "settings_as_code", "snapshot", "restore", "reset"}


class Records(Capability):
    """Records every stage with its arguments."""

    owns, rank = "records", 30
    logs_without_monitor = True

    def __init__(self, *, rejects: int | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.rejects = rejects
        self.loaded: list[dict[str, Any]] = []

    @property
    def stages(self) -> list[str]:
        return [stage for stage, _ in self.calls]

    def arguments(self, stage: str) -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name == stage]

    def _record(self, stage: str, *arguments: Any) -> None:
        self.calls.append((stage, arguments))

    # The stages that return something; the others are added below.

    def simulator(self, fit: Fit) -> Any:
        self._record("simulator", fit)
        return lambda unit, budget: Horizon(clock=unit, budget=budget)

    def weigh_loss(self, batch: Batch) -> float:
        self._record("weigh_loss", batch)
        return 1.0

    def needs_norms(self, update: Update) -> bool:
        self._record("needs_norms", update)
        return False

    def decide(self, update: Update) -> Rejection | None:
        self._record("decide", update)
        if update.progress.steps != self.rejects:
            return None
        update.announce_rejection(update, "a sentence")
        return Rejection(reason="a reason")

    def metrics(self, fit: Fit) -> dict[str, float]:
        self._record("metrics", fit)
        return {"records/value": 1.0}

    def specification(self) -> str:
        self._record("specification")
        return "as written"

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._record("saved_weights", state_dict)
        return state_dict

    def take_loaded_state(self) -> dict[str, Any] | None:
        self._record("take_loaded_state")
        return super().take_loaded_state()

    def saved_state(self) -> dict[str, Any]:
        self._record("saved_state")
        return {"value": 3}

    def snapshot(self) -> dict[str, Any]:
        self._record("snapshot")
        return {"value": torch.ones(1)}


def _recording(stage: str) -> Any:
    def record(self: Records, *arguments: Any) -> None:
        self._record(stage, *arguments)

    return record


for _stage in EVERY:
    if _stage not in vars(Records):
        setattr(Records, _stage, _recording(_stage))


class Validated(Probe):
    def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.zeros(1)


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_epochs": 1, **options}, callbacks=list(callbacks))


BATCH = ["begin_batch", "weigh_loss", "observe_loss"]
UPDATE = ["rescale", "needs_norms", "decide", "clip", "observe", "after_step"]
START = ["check_fit", "check_optimizers", "loader_ready", "take_loaded_state", "simulator", "start"]
START += ["announce", "begin_epoch"]
END = ["end_epoch", "take_loaded_state", "end"]


def test_a_whole_fit() -> None:
    records, module = Records(), Validated()
    trainer = trainer_with(records, accumulate_grad_batches=2)
    trainer.fit(module, ResumableLoader(8, 2), loader(2, 2))
    sanity = validation = ["begin_evaluation", "end_evaluation"]
    window = [*BATCH, "end_batch", *BATCH, *UPDATE, "end_batch", "end_window"]
    # The sanity check comes before training starts.
    start = [*START[:2], *sanity, *START[2:]]
    assert records.stages == [*start, *window, *window, *validation, *END]
    (fit,) = records.arguments("check_fit")[0]
    assert isinstance(fit, Fit)
    assert (fit.trainer, fit.module) == (trainer, module)
    for stage in ("simulator", "start", "announce", "begin_epoch", "end_epoch", "end"):
        assert records.arguments(stage) == [(fit,)]
    assert records.arguments("begin_evaluation") == [(trainer, module)] * 2
    assert records.arguments("end_evaluation") == [(trainer, module)] * 2


def test_the_batches_of_a_fit() -> None:
    records, module = Records(), Validated()
    trainer_with(records, accumulate_grad_batches=2).fit(module, ResumableLoader(8, 2))
    batches = [batch for (batch,) in records.arguments("begin_batch")]
    assert [batch.index for batch in batches] == [0, 1, 2, 3]
    assert [batch.opens_window for batch in batches] == [True, False, True, False]
    assert [batch.closes_window for batch in batches] == [False, True, False, True]
    assert [batch.samples for batch in batches] == [2] * 4
    assert [batch.data[2].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(batch.micro_batch is None for batch in batches)
    assert (
        records.arguments("weigh_loss")
        == records.arguments("end_batch")
        == [(batch,) for batch in batches]
    )
    for batch, loss in records.arguments("observe_loss"):
        assert batch in batches
        assert (loss.shape, loss.requires_grad) == ((), False)


def test_the_updates_of_a_fit() -> None:
    records, module = Records(rejects=1), Validated()
    trainer = trainer_with(records, accumulate_grad_batches=2)
    trainer.fit(module, ResumableLoader(12, 2))
    updates = [update for (update,) in records.arguments("rescale")]
    assert [update.progress.steps for update in updates] == [0, 1, 2]
    assert [update.progress.fraction for update in updates] == [0, 2 / 6, 4 / 6]
    for update in updates:
        assert update.optimizer is trainer.optimizers[0]
        assert [name for name, _ in update.parameters] == [n for n, _ in module.named_parameters()]
        assert (update.label, update.norm_order, update.shard_group) == ("", 2.0, None)
        assert not update.scaler_skips_overflow
    first, second, third = ((update,) for update in updates)
    for stage in ("needs_norms", "decide", "observe"):
        assert records.arguments(stage) == [first, second, third]
    for stage in ("clip", "after_step"):
        assert records.arguments(stage) == [first, third]
    assert records.arguments("observe_rejection") == [(updates[1], "a sentence")]
    assert updates[1].rejection == Rejection(reason="a reason")
    assert [update.is_made for update in updates] == [True, False, True]
    rejected = records.stages.index("observe_rejection")
    assert records.stages[rejected - 1 : rejected + 3] == [
        "decide",
        "observe_rejection",
        "observe",
        "end_batch",
    ]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_without_a_fit(stage: str) -> None:
    records, module = Records(), Validated()
    trainer = trainer_with(records)
    silent = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(module, loader(2, 2), **silent)
    assert records.stages == ["begin_evaluation", "end_evaluation", "take_loaded_state"]
    assert records.arguments("begin_evaluation") == [(trainer, module)]


def test_saving_and_resuming(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 2:
                before = len(records.calls)
                trainer.save_checkpoint(tmp_path / "two.ckpt")
                saving.extend(records.calls[before:])

    saving: list[tuple[str, tuple[Any, ...]]] = []
    records = Records()
    trainer_with(Saves(), records).fit(Probe(), ResumableLoader(8, 2))
    # The batch is ended first, then the weights are collected, then the callbacks' states.
    ended = ["end_batch", "end_window"]
    assert [stage for stage, _ in saving] == [*ended, "saved_weights", "saved_state"]
    (weights,) = saving[2][1]
    assert weights.keys() == Probe().state_dict().keys()
    resumed = Records()
    trainer_with(resumed).fit(
        Probe(), ResumableLoader(8, 2), ckpt_path=tmp_path / "two.ckpt", weights_only=True
    )
    assert resumed.stages[:7] == [
        "check_fit",
        "check_optimizers",
        "loader_ready",
        "take_loaded_state",
        "load_saved_state",
        "simulator",
        "start",
    ]
    assert resumed.arguments("load_saved_state") == [({"value": 3},)]
    assert len(resumed.arguments("begin_batch")) == 2


def test_a_snapshot_and_its_restoration() -> None:
    class Acts(Capability):
        owns, rank = "acts", 20

        def end_batch(self, batch: Batch) -> None:
            step = batch.fit.trainer.global_step
            if step == 1:
                self.taken = batch.fit.take_snapshot()
            elif step == 3:
                self.taken.restore(rewind=False)
                self.taken.restore(rewind=False)

    records = Records()
    trainer_with(records, Acts()).fit(Probe(), ResumableLoader(8, 2))
    found = [stage for stage in records.stages if stage in {"snapshot", "restore", "end_batch"}]
    assert found == [
        "snapshot",
        "end_batch",
        "end_batch",
        "restore",
        "restore",
        "end_batch",
        "end_batch",
    ]
    one, other = (state["value"] for (state,) in records.arguments("restore"))
    assert torch.equal(one, torch.ones(1))
    assert one is not other  # a capability may keep and change what it is given


def test_a_loader_before_its_first_iteration() -> None:
    class Notes(ResumableLoader):
        def __iter__(self) -> Any:
            records.calls.append(("iterated", ()))
            return super().__iter__()

    records, data = Records(), Notes(8, 2)
    trainer_with(records).fit(Validated(), data, loader(2, 2))
    ready = [stage for stage in records.stages if stage in {"check_fit", "loader_ready"}]
    assert ready == ["check_fit", "loader_ready"]
    stages = records.stages
    # Lightning calls iter() once before, to see that the loader is iterable.
    assert "iterated" in stages[stages.index("loader_ready") : stages.index("begin_batch")]
    (arguments,) = records.arguments("loader_ready")
    assert arguments == (records.arguments("check_fit")[0][0], data)


def test_metrics_are_asked_for_when_an_update_is_logged(tmp_path: Path) -> None:
    records, logger = Records(), CSVLogger(tmp_path)
    trainer_with(records, logger=logger, log_every_n_steps=2).fit(Probe(), ResumableLoader(8, 2))
    assert records.arguments("metrics") == records.arguments("check_fit") * 2
    written = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert written == ["records/value,step", "1.0,1", "1.0,3"]


def test_fit_collects_the_specification_of_every_capability() -> None:
    class Describes(Capability):
        owns, rank = "describes", 40
        found: dict[str, str]

        def announce(self, fit: Fit) -> None:
            self.found = fit.specifications()

    describes = Describes()
    trainer_with(Records(), describes).fit(Probe(), ResumableLoader(4, 2))
    assert describes.found == {"records": "as written"}


def test_a_capability_is_reset_for_another_trainer_alone() -> None:
    records = Records()
    trainer = trainer_with(records)
    trainer.fit(Probe(), ResumableLoader(4, 2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Probe(), ResumableLoader(4, 2))
    assert "reset" not in records.stages
    trainer_with(records).fit(Probe(), ResumableLoader(4, 2))
    assert records.stages.count("reset") == 1
    last = [stage for stage in records.stages if stage in {"reset", "check_fit"}]
    assert last == ["check_fit", "check_fit", "reset", "check_fit"]


def test_an_error_ends_the_fit() -> None:
    class Fails(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    records = Records()
    with pytest.raises(ZeroDivisionError):
        trainer_with(records).fit(Fails(), ResumableLoader(8, 2))
    assert records.stages[-3:] == ["begin_batch", "weigh_loss", "end"]
    assert records.fit is None


def test_no_stage_is_left_out() -> None:
    """The tests above see every stage that the protocol has."""
    seen = {*START, *END, *BATCH, *UPDATE, *ON_DEMAND, "end_batch", "end_window"}
    seen |= {
        "observe_rejection",
        "begin_evaluation",
        "end_evaluation",
        "saved_weights",
        "saved_state",
    }
    assert seen | {"load_saved_state"} == set(EVERY)


def test_an_exact_loader_describes_its_batches() -> None:
    records = Records()
    data = GlobalBatchLoader(Regression(8), micro_batch_size=2)
    trainer_with(records, BatchSizeScheduler(ConstantBatchSize(4))).fit(Probe(), data)
    batches = [batch for (batch,) in records.arguments("begin_batch")]
    described = [batch.micro_batch for batch in batches]
    assert [(one.window.position, one.index, one.samples) for one in described] == [
        (0, 0, 2),
        (0, 1, 2),
        (4, 0, 2),
        (4, 1, 2),
    ]
