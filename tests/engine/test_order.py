"""The order of a step, with fake capabilities and a fake Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt.engine.batch_counter import BatchCounter
from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.engine.stage import Batch, Fit, Stages
from lightning_bigopt.engine.update import Rejection, Update
from lightning_bigopt.gradients.optimizer_step import step_control
from lightning_bigopt.optimizers.group_schedule import GroupSchedule


class FakeTrainer:
    """The part of a Trainer that a step reads, with the counters moved as Lightning moves them."""

    def __init__(self, batches: int, *, accumulate: int = 1) -> None:
        self.progress = SimpleNamespace(ready=0, started=0, processed=0)
        epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(current=self.progress))
        epochs = SimpleNamespace(current=SimpleNamespace(processed=0))
        self.fit_loop = SimpleNamespace(
            epoch_loop=epoch_loop, epoch_progress=epochs, _data_fetcher=None
        )
        self.num_training_batches = batches
        self.accumulate_grad_batches = accumulate
        self.is_last_batch = False
        self.global_step = 0
        self.world_size = 1
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        self.precision_plugin = SimpleNamespace()
        self.train_dataloader = None
        self.should_stop = False
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []
        self.lightning_module = SimpleNamespace(automatic_optimization=True)


class Recorder(Stages):
    """Records every stage by its name."""

    def __init__(self, owns: str, rank: int, calls: list[tuple[str, str]]) -> None:
        self.owns, self._place, self._calls = owns, rank, calls
        self.factor: float = 1.0
        self.rejects: set[int] = set()

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self._place

    def _record(self, stage: str) -> None:
        self._calls.append((stage, self.owns))

    def begin_batch(self, batch: Batch) -> None:
        self._record("begin_batch")

    def weigh_loss(self, batch: Batch) -> float | Tensor:
        self._record("weigh_loss")
        return self.factor

    def observe_loss(self, batch: Batch, loss: Tensor) -> None:
        self._record("observe_loss")

    def rescale(self, update: Update) -> None:
        self._record("rescale")

    def needs_norms(self, update: Update) -> bool:
        self._record("needs_norms")
        return False

    def decide(self, update: Update) -> Rejection | None:
        self._record("decide")
        return Rejection(reason="bad") if update.progress.batches in self.rejects else None

    def clip(self, update: Update) -> None:
        self._record("clip")

    def observe(self, update: Update) -> None:
        self._record("observe")

    def after_step(self, update: Update) -> None:
        self._record("after_step")

    def end_batch(self, batch: Batch) -> None:
        self._record(f"end_batch {'closes' if batch.closes_window else 'open'}")


class Run:
    """Drives an engine through batches as Lightning does, with SGD on one weight."""

    def __init__(self, *stages: Stages, batches: int = 4, accumulate: int = 1) -> None:
        self.trainer: Any = FakeTrainer(batches, accumulate=accumulate)
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.trainer.optimizers = [self.optimizer]
        self.module: Any = nn.Module()
        self.module.weight = self.weight
        self.module.automatic_optimization = True
        self.engine = Engine()
        self.trainer.callbacks = [*stages, self.engine]
        fit = Fit(
            trainer=self.trainer,
            module=self.module,
            clock=self.engine.clock,
            groups=GroupSchedule([("", self.optimizer)]),
            known_optimizers=[self.optimizer],
            start_clock=lambda: self.engine.clock,
            rewrite_groups=lambda: None,
            finish_batch=self.engine.finish_batch,
            take_snapshot=lambda: SimpleNamespace(restore=lambda **_: None),
        )
        self.engine._fit = fit
        self.engine.clock._trainer = self.trainer
        self.engine._counter = BatchCounter(self.trainer, self.engine.clock, needs_samples=None)
        self.engine._set_capabilities(fit, sorted(stages, key=lambda stage: stage.rank))
        step_control(self.optimizer)

    def batch(self, index: int) -> None:
        trainer, data = self.trainer, torch.ones(2)
        trainer.progress.ready = index + 1
        self.engine.on_train_batch_start(trainer, self.module, data, index)
        trainer.progress.started += 1
        loss = (self.weight * data).sum() / trainer.accumulate_grad_batches
        self.engine.on_before_backward(trainer, self.module, loss)
        loss.backward()
        if trainer.progress.ready % trainer.accumulate_grad_batches == 0:
            self.engine.on_before_optimizer_step(trainer, self.module, self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
            trainer.global_step += 1
        trainer.progress.processed += 1
        self.engine.on_train_batch_end(trainer, self.module, None, data, index)


def test_stages_run_in_order_and_capabilities_by_rank() -> None:
    calls: list[tuple[str, str]] = []
    run = Run(Recorder("second", 2, calls), Recorder("first", 1, calls))
    run.batch(0)
    stages = [
        "begin_batch",
        "weigh_loss",
        "observe_loss",
        "rescale",
        "needs_norms",
        "decide",
        "clip",
        "observe",
        "after_step",
        "end_batch closes",
    ]
    assert calls == [(stage, owns) for stage in stages for owns in ("first", "second")]


def test_window_of_two_batches_has_one_update() -> None:
    calls: list[tuple[str, str]] = []
    run = Run(Recorder("a", 1, calls), accumulate=2)
    for index in range(4):
        run.batch(index)
    counts = {stage: sum(name == stage for name, _ in calls) for stage, _ in calls}
    assert counts["begin_batch"] == 4
    assert counts["decide"] == counts["after_step"] == 2
    assert (counts["end_batch open"], counts["end_batch closes"]) == (2, 2)


def test_rejected_update_is_neither_clipped_nor_applied() -> None:
    calls: list[tuple[str, str]] = []
    guard = Recorder("guard", 1, calls)
    guard.rejects = {1}
    run = Run(guard, Recorder("clipping", 2, calls))
    weights = []
    for index in range(3):
        calls.clear()
        run.batch(index)
        weights.append(run.weight.item())
        if index == 1:
            names = [name for name, _ in calls]
            assert "clip" not in names
            assert "after_step" not in names
            assert names.count("decide") == 1  # the first rejection ends the decision
            assert names.count("observe") == 2
    assert weights == [-1.0, -1.0, -3.0]


def test_loss_is_multiplied_by_the_product_of_all_factors() -> None:
    calls: list[tuple[str, str]] = []
    one, two = Recorder("one", 1, calls), Recorder("two", 2, calls)
    one.factor, two.factor = 0.5, 3.0
    run = Run(one, two)
    run.batch(0)
    assert run.weight.item() == 1.0 - 2 * 1.5


def test_norms_are_measured_before_the_decision_if_one_capability_reads_them() -> None:
    seen: list[float] = []

    class Needs(Stages):
        owns, rank = "needs", 1

        def needs_norms(self, update: Update) -> bool:
            return True

        def decide(self, update: Update) -> Rejection | None:
            assert update._norms is not None
            seen.append(update.norms.value)
            return None

    Run(Needs()).batch(0)
    assert seen == [2.0]


def test_saving_before_the_engine_ends_the_batch_once() -> None:
    calls: list[tuple[str, str]] = []
    run = Run(Recorder("a", 1, calls))

    original = run.engine.on_train_batch_end

    def save_first(*arguments: Any) -> None:
        """Stands for a callback, listed before the engine, that saves when a batch has ended."""
        assert run.engine.clock.batches == 0
        run.engine.finish_batch()
        assert run.engine.clock.batches == 1
        original(*arguments)

    run.engine.on_train_batch_end = save_first  # type: ignore[method-assign]
    run.batch(0)
    assert run.engine.clock.batches == 1
    assert [name for name, _ in calls].count("end_batch closes") == 1


def test_batch_is_not_ended_before_lightning_has_counted_it() -> None:
    run = Run(Recorder("a", 1, []))
    trainer = run.trainer
    trainer.progress.ready = 1
    run.engine.on_train_batch_start(trainer, run.module, torch.ones(2), 0)
    run.engine.finish_batch()
    assert run.engine.clock.batches == 0
    trainer.progress.processed += 1  # on_train_batch_start returned -1: processed, never started
    run.engine.finish_batch()
    assert run.engine.clock.batches == 0


def test_removed_capability_takes_part_until_its_window_ends() -> None:
    calls: list[tuple[str, str]] = []
    leaving, staying = Recorder("leaving", 1, calls), Recorder("staying", 2, calls)
    run = Run(leaving, staying, batches=6, accumulate=2)
    ended: list[Fit] = []
    leaving.end = ended.append  # type: ignore[method-assign]
    run.batch(0)
    run.trainer.callbacks.remove(leaving)
    run.batch(1)
    assert ("decide", "leaving") in calls
    assert not ended
    calls.clear()
    run.batch(2)
    assert {owns for _, owns in calls} == {"staying"}
    assert len(ended) == 1


def test_snapshot_of_a_rejection_is_restored_after_the_batch() -> None:
    restored: list[Any] = []

    class RollsBack(Stages):
        owns, rank = "guard", 1

        def decide(self, update: Update) -> Rejection | None:
            snapshot = SimpleNamespace(restore=lambda **options: restored.append(options))
            return Rejection(reason="bad", roll_back=snapshot)

    Run(RollsBack()).batch(0)
    assert restored == [{"rewind": False, "replay": False}]


@pytest.mark.parametrize("exception", [ZeroDivisionError, KeyboardInterrupt])
def test_error_in_a_stage_reaches_the_caller(exception: type[BaseException]) -> None:
    class Fails(Stages):
        owns, rank = "fails", 1

        def clip(self, update: Update) -> None:
            raise exception

    with pytest.raises(exception):
        Run(Fails()).batch(0)
