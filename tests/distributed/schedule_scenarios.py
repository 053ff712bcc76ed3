"""Scenarios of schedules on two processes: the end of the budget, resume, plateau, range test."""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GradientClipping,
    HyperparameterScheduler,
    LearningRateRangeTest,
    LearningRateScheduler,
    Linear,
    NormClip,
    ReduceOnPlateau,
    WarmupCosine,
    WarmupStableDecay,
)
from lightning_bigopt.tuning.find_learning_rate import find_learning_rate
from tests.distributed.scenarios import SaveAtSteps, Sharded, fit, module, strategy, weights
from tests.helpers import QUIET, Probe, Regression, ResumableLoader, loader

DOWN = Linear(start=1.0, end=0.0)


class EndlessStream(IterableDataset[Any]):
    """A stream that is the same on every process."""

    def __iter__(self) -> Any:
        return itertools.cycle(Regression(8))


def end_of_budget(out: Path) -> Any:
    """Returns the fraction at the start of every update, from a linear schedule."""
    found = {}
    for name in ("ddp", "fsdp2"):
        cases: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
            "accumulated epochs": (
                loader(22, 2),
                [LearningRateScheduler(DOWN)],
                {"max_epochs": 2, "accumulate_grad_batches": 4},
            ),
            "steps": (loader(22, 2), [LearningRateScheduler(DOWN)], {"max_steps": 5}),
            "stream": (
                DataLoader(EndlessStream(), batch_size=2),
                [LearningRateScheduler(DOWN, budget="18 samples")],
                {"max_epochs": -1},
            ),
            "ramp in samples": (
                loader(48, 2),
                [
                    LearningRateScheduler(DOWN, budget="80 samples"),
                    BatchSizeScheduler(BatchSizeSteps({"0%": 4, "40%": 12})),
                ],
                {"max_epochs": -1},
            ),
        }
        for case, (data, callbacks, options) in cases.items():
            model = module(name, lr=1.0)
            fit(name, model, data, *callbacks, **options)
            found[f"{name} {case}"] = [model.lrs, [len(window) for window in model.windows]]
    return found


class WithValidation(Probe):
    """Logs a metric that differs between the processes, and whose mean never improves."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        self.log("val", float(step if self.global_rank else -step), sync_dist=False)


class ShardedWithValidation(WithValidation, Sharded):
    """The same module under FSDP2."""


def every_resume(out: Path) -> Any:
    """Compares an uninterrupted run with runs resumed at every update."""

    def callbacks() -> list[Any]:
        return [
            LearningRateScheduler(WarmupCosine(warmup="30%", end=0.1)),
            HyperparameterScheduler("betas[0]", Linear(start=1.0, end=0.5)),
            ReduceOnPlateau("val", factor=0.5, patience=0),
        ]

    def run(name: str, *extra: Any, ckpt: Any = None) -> list[Any]:
        kind = WithValidation if name == "ddp" else ShardedWithValidation
        model = kind(lr=0.01, optimizer=torch.optim.AdamW, betas=(0.8, 0.9))
        trainer = fit(
            name,
            _with_validation(model),
            ResumableLoader(8, 2),
            *callbacks(),
            *extra,
            max_epochs=2,
            ckpt=ckpt,
        )
        return [model.lrs, trainer.optimizers[0].param_groups[0]["betas"], weights(model)]

    found = {}
    for name in ("ddp", "fsdp2"):
        stops = range(1, 8)
        found[name] = {"straight": run(name, SaveAtSteps(out / f"s{name}", set(stops)))}
        for stop in stops:
            found[name][str(stop)] = run(name, ckpt=out / f"s{name}" / f"{stop}.ckpt")
        branch = functools.partial(
            LearningRateScheduler,
            Constant(),
            on_resume="cooldown",
            cooldown="50%",
            cooldown_shape="linear",
        )
        stable = module(name, lr=1.0)
        save = SaveAtSteps(out / f"c{name}", {5})
        fit(
            name,
            stable,
            ResumableLoader(8, 2),
            LearningRateScheduler(Constant()),
            save,
            max_epochs=2,
        )
        cooled = module(name, lr=1.0)
        fit(
            name,
            cooled,
            ResumableLoader(8, 2),
            branch(),
            max_epochs=9,
            ckpt=out / f"c{name}" / "5.ckpt",
        )
        found[name]["cooldown"] = cooled.lrs
    return found


def extensions(out: Path) -> Any:
    """Extends a run of 8 updates to 16 with the best cooldown, and resumes that run."""
    schedule = WarmupStableDecay(warmup=0, decay="25%", cooldown="linear")

    def run(name: str, *extra: Any, ckpt: Any = None, steps: int = 16, **options: Any) -> list[Any]:
        model = module(name, lr=0.01, optimizer=torch.optim.AdamW)
        rule = LearningRateScheduler(schedule, **options)
        limits = {"max_steps": steps, "max_epochs": -1}
        fit(name, model, ResumableLoader(8, 2), rule, *extra, ckpt=ckpt, **limits)
        return [model.lrs, weights(model)]

    best: dict[str, Any] = {"on_resume": "extend", "cooldown": "best"}
    found = {}
    for name in ("ddp", "fsdp2"):
        folder = out / f"e{name}"
        run(name, SaveAtSteps(folder, {3}), steps=8)
        start = folder / "3.ckpt"
        found[name] = {"straight": run(name, SaveAtSteps(folder, {11}), ckpt=start, **best)}
        found[name]["resumed"] = run(name, ckpt=folder / "11.ckpt", **best)
        found[name]["plain"] = run(name, ckpt=folder / "11.ckpt")
    return found


def _with_validation(model: Probe) -> Probe:
    data = loader(2, 2)
    model.val_dataloader = lambda: data  # type: ignore[method-assign]
    return model


def range_tests(out: Path) -> Any:
    """Runs a range test, and compares the training after it with one without it."""
    found = {}
    for name in ("ddp", "fsdp2"):
        runs = []
        for tested in (False, True):
            test = LearningRateRangeTest(then="report", steps=24, start=1e-4, skip=4)
            model = module(name, lr=0.01, optimizer=torch.optim.AdamW)
            trainer = fit(
                name,
                model,
                loader(24, 2),
                *([test] if tested else []),
                LearningRateScheduler(DOWN),
                GradientClipping(NormClip(max_norm=0.5)),
                max_epochs=1,
            )
            runs.append([model.lrs[-trainer.global_step :], weights(model)])
        assert test.result is not None
        found[name] = {
            "plain": runs[0],
            "tested": runs[1],
            "losses": test.result.losses,
            "suggestion": test.result.suggestion,
        }
    return found


def found_rates(out: Path) -> Any:
    """Finds a learning rate, and compares the training after it with one without it."""
    runs = []
    for searches in (False, True):
        model = module("ddp", lr=0.01, optimizer=torch.optim.AdamW)
        trainer = L.Trainer(
            **QUIET,
            devices=2,
            strategy=strategy("ddp"),
            max_steps=12,
            callbacks=[LearningRateScheduler(DOWN), GradientClipping(NormClip(max_norm=0.5))],
        )
        if searches:
            found = find_learning_rate(trainer, model, loader(24, 2), budget=60, branches=4)
        trainer.fit(model, loader(24, 2))
        runs.append([model.lrs[-12:], weights(model)])
    return {
        "plain": runs[0],
        "searched": runs[1],
        "losses": found.losses,
        "suggestion": found.suggestion,
        "updates": found.updates,
    }


class Slow(Probe):
    """Takes longer on the second process."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.09 if self.trainer.global_rank else 0.03)
        return super().training_step(batch, batch_idx)


class SlowSharded(Slow, Sharded):
    """The same with FSDP2."""


def times(out: Path) -> Any:
    """Returns the learning rates over a budget in time, on processes of different speed."""
    found = {}
    for name, build in (("ddp", Slow), ("fsdp2", SlowSharded)):
        model = build(lr=1.0)
        scheduler = LearningRateScheduler(DOWN, budget="1.5 s")
        fit(name, model, loader(400, 2), scheduler, max_epochs=-1)
        found[name] = model.lrs
    return found


class Changes(L.Callback):
    """Writes a learning rate after two updates, and replaces the optimizer after four."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.optimizers[0].param_groups[0]["lr"] = 2.0
        if trainer.global_step == 4 and trainer.optimizers[0].defaults["lr"] != 4.0:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=4.0)]


def changes(out: Path) -> Any:
    """Returns the learning rates of a run in which a callback changes them and the optimizer."""
    found = {}
    for name in ("ddp", "fsdp2"):
        model = module(name, lr=1.0)
        scheduler, clipping = LearningRateScheduler(DOWN), GradientClipping(NormClip(0.5))
        fit(name, model, loader(32, 2), Changes(), scheduler, clipping, max_steps=8)
        found[name] = [model.lrs, model.norms]
    return found
