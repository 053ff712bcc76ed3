"""Several callbacks in one fit: order, logged values, copies, state and short runs."""

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
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    WarmupCosine,
)
from tests.helpers import QUIET, Probe, loader

SCHEDULE = WarmupCosine(warmup="20%", end=0.1)
POLICY = BatchSizeSteps({"0%": 4, "50%": 6})
RULE = NormClip(max_norm=0.5)


def four_callbacks() -> list[Any]:
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


def logged_scalars(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(trainer.logger.log_dir)
    accumulator.Reload()
    return {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if not tag.startswith(("throughput/", "time/"))  # durations differ between runs
    }


@pytest.mark.slow
def test_callback_order_does_not_change_weights_or_logs(tmp_path: Path) -> None:
    results = []
    for order in itertools.permutations(range(4)):
        module, callbacks = Probe(optimizer=torch.optim.AdamW), four_callbacks()
        logger = TensorBoardLogger(tmp_path, name="-".join(map(str, order)))
        trainer = fit(module, [callbacks[i] for i in order], logger=logger, log_every_n_steps=2)
        results.append(([p.detach().clone() for p in module.parameters()], logged_scalars(trainer)))
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


def test_monitor_logs_the_values_that_updates_used(tmp_path: Path) -> None:
    module = Probe(lr=0.3)
    trainer = fit(module, four_callbacks(), logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    logged = logged_scalars(trainer)
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
    trainer = fit(Probe(), four_callbacks(), logger=loggers, log_every_n_steps=5)
    text = (Path(loggers[1].log_dir) / "metrics.csv").read_text()
    assert "grad_norm/total" in text.splitlines()[0]
    assert {"lr", "grad_norm"} <= set(trainer.progress_bar_metrics)


def test_copies_and_pickles_of_callbacks_do_not_hold_the_trainer() -> None:
    callbacks = four_callbacks()
    trainer = fit(Probe(), callbacks)
    for callback in callbacks:
        copied = copy.deepcopy(callback)
        assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
        assert trainer not in vars(copied).values()
    fit(Probe(), [copy.deepcopy(callback) for callback in callbacks])


def test_state_loads_with_weights_only(tmp_path: Path) -> None:
    trainer = fit(Probe(), four_callbacks())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert state["BatchSizeScheduler"]["version"] == 2
    (engine,) = (saved for key, saved in state.items() if "Engine" in key)
    assert engine["clock"]["samples"] == 54


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"max_epochs": 1, "limit_train_batches": 3},
        {"max_epochs": 1, "logger": False},
    ],
)
def test_short_runs_train(options: dict[str, Any], tmp_path: Path) -> None:
    module = Probe()
    fit(module, four_callbacks(), default_root_dir=tmp_path, **options)
    assert module.lrs


def test_validate_without_fit_runs() -> None:
    module = Probe()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    L.Trainer(**QUIET, callbacks=four_callbacks()).validate(module, loader(4, 2))
