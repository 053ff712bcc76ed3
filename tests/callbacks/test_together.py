"""All callbacks at once: order, mixins, monitor, YAML, and what a fit leaves behind."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bigopt import (
    BatchSizePolicyMixin,
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    GradientClippingMixin,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    WarmupCosine,
)
from tests.kit import QUIET, Probe, loader

SCHEDULE = WarmupCosine(warmup="20%", end=0.1)
POLICY = BatchSizeSteps({"0%": 4, "50%": 6})
RULE = NormClip(max_norm=0.5)


def four() -> list[Any]:
    return [
        LearningRateScheduler(SCHEDULE),
        GradientClipping(RULE),
        BatchSizeScheduler(POLICY),
        OptimizationMonitor(),
    ]


def fit(module: L.LightningModule, callbacks: list[Any], **options: Any) -> L.Trainer:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": callbacks, **options})
    trainer.fit(module, loader(27, 2))
    return trainer


def rows(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(trainer.logger.log_dir)
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if not tag.startswith(("throughput/", "time/"))  # the clock on the wall never repeats
    }


def test_the_order_of_the_callbacks_changes_nothing(tmp_path: Path) -> None:
    results = []
    for order in itertools.permutations(range(4)):
        module, callbacks = Probe(optimizer=torch.optim.AdamW), four()
        logger = TensorBoardLogger(tmp_path, name="-".join(map(str, order)))
        trainer = fit(module, [callbacks[i] for i in order], logger=logger, log_every_n_steps=2)
        results.append(([p.detach().clone() for p in module.parameters()], rows(trainer)))
    weights, logged = results[0]
    assert {
        "optim/lr",
        "grad_norm/total",
        "clip/coefficient",
        "batch/global_size",
        "progress/samples",
    } <= set(logged)
    for others, theirs in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
        assert logged == theirs


def test_the_monitor_logs_what_the_updates_used(tmp_path: Path) -> None:
    module = Probe(lr=0.3)
    trainer = fit(module, four(), logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    logged = rows(trainer)
    updates = range(len(module.lrs))
    assert logged["optim/lr"] == [(t, pytest.approx(module.lrs[t])) for t in updates]
    assert logged["batch/global_size"] == [(t, len(module.windows[t])) for t in updates]
    consumed = list(itertools.accumulate(map(len, module.windows)))
    assert logged["progress/samples"] == [(t, consumed[t]) for t in updates]
    for (_, norm), (_, coefficient), clipped in zip(
        logged["grad_norm/total"], logged["clip/coefficient"], module.norms, strict=True
    ):
        assert norm * coefficient == pytest.approx(clipped, rel=1e-5)
        assert coefficient == pytest.approx(min(1.0, 0.5 / (norm + 1e-6)), rel=1e-5)


def test_every_logger_gets_the_values_and_the_progress_bar_shows_two(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    trainer = fit(Probe(), four(), logger=loggers, log_every_n_steps=5)
    text = (Path(loggers[1].log_dir) / "metrics.csv").read_text()
    assert "grad_norm/total" in text.splitlines()[0]
    assert {"lr", "grad_norm"} <= set(trainer.progress_bar_metrics)


class Owning(LearningRateScheduleMixin, GradientClippingMixin, BatchSizePolicyMixin, Probe):
    def configure_learning_rate_schedule(self) -> WarmupCosine:
        return SCHEDULE

    def configure_clipping_rule(self) -> NormClip:
        return RULE

    def configure_batch_size_policy(self) -> BatchSizeSteps:
        return POLICY


def test_mixins_train_to_the_same_bits_as_callbacks() -> None:
    mixed, plain = Owning(optimizer=torch.optim.AdamW), Probe(optimizer=torch.optim.AdamW)
    fit(mixed, [])
    fit(plain, four()[:3])
    assert mixed.lrs == plain.lrs
    assert mixed.windows == plain.windows
    for mine, theirs in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_mixin_beside_the_same_callback_raises() -> None:
    with pytest.raises(ValueError, match=r"GradientClipping.*mixin of Owning"):
        fit(Owning(), [GradientClipping(RULE)])


def test_a_mixin_that_was_left_out_raises() -> None:
    class Forgetful(Owning):
        def configure_callbacks(self) -> list[Any]:
            return []

    with pytest.raises(RuntimeError, match=r"super\(\).configure_callbacks"):
        fit(Forgetful(), [])

    class Undefined(GradientClippingMixin, Probe):
        pass

    with pytest.raises(TypeError, match="Undefined must define configure_clipping_rule"):
        fit(Undefined(), [])


def test_a_module_with_mixins_fits_twice() -> None:
    module = Owning()
    trainer = fit(module, [], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(27, 2))
    assert len(module.lrs) == trainer.global_step


def test_callbacks_copy_and_pickle_without_the_trainer() -> None:
    callbacks = four()
    trainer = fit(Probe(), callbacks)
    for callback in callbacks:
        twin = copy.deepcopy(callback)
        assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
        assert trainer not in vars(twin).values()
    fit(Probe(), [copy.deepcopy(callback) for callback in callbacks])


def test_state_loads_with_weights_only(tmp_path: Path) -> None:
    trainer = fit(Probe(), four())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert state["BatchSizeScheduler"]["version"] == 1
    assert state["BatchSizeScheduler"]["clock"]["samples"] == 54


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"max_epochs": 1, "limit_train_batches": 3},
        {"max_epochs": 1, "logger": False},
    ],
)
def test_short_runs_work(options: dict[str, Any], tmp_path: Path) -> None:
    module = Probe()
    fit(module, four(), default_root_dir=tmp_path, **options)
    assert module.lrs


def test_validate_alone_does_nothing() -> None:
    module = Probe()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    L.Trainer(**QUIET, callbacks=four()).validate(module, loader(4, 2))
