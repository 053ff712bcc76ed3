"""Fits with optimizers that evaluate their closure several times per step: SAM and LBFGS."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GradientClipping,
    GradientNoiseScale,
    MaxUpdateRatio,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
    ValueClip,
)
from tests.helpers import Probe, ResumableLoader, SaveAt, cpu_precision, fit
from tests.repeated_evaluations import OPTIMIZERS, Evaluated, without


def assert_same_bits(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_run_with_rejected_evaluations_equals_the_run_without_their_batches(
    kind: str, precision: str
) -> None:
    bad = {(0, 1): math.nan, (2, 0): math.inf, (3, 1): math.nan, (7, 1): 1e6}
    guard = StepGuard([NonFinite(), NormSpike(armed=4, threshold=10.0)])
    guarded, plain = Evaluated(bad, **OPTIMIZERS[kind]), Evaluated(**OPTIMIZERS[kind])
    fit(guarded, ResumableLoader(20, 2), guard, max_epochs=1, precision=precision)
    fit(plain, without(20, {0, 2, 3, 7}), max_epochs=1, precision=precision)
    assert [rejected.update for rejected in guard.rejections] == [0, 2, 3, 7]
    assert_same_bits(guarded.state(), plain.state())


@pytest.mark.parametrize("rule", [NormClip(0.3), MaxUpdateRatio(1e-3)])
def test_rejected_evaluation_is_undone_beside_clipping_and_a_monitor(rule: Any) -> None:
    bad = {(0, 1): math.nan, (3, 1): math.nan}
    guarded, plain = Evaluated(bad, **OPTIMIZERS["SAM"]), Evaluated(**OPTIMIZERS["SAM"])
    others = [GradientClipping(rule), OptimizationMonitor(every=1)]
    fit(guarded, ResumableLoader(12, 2), StepGuard([NonFinite()]), *others, max_epochs=1)
    fit(plain, without(12, {0, 3}), GradientClipping(rule), max_epochs=1)
    assert_same_bits(guarded.state(), plain.state())


def test_rejections_of_repeated_evaluations_are_counted_in_a_row() -> None:
    module = Evaluated({(i, 1): math.nan for i in range(2, 10)}, **OPTIMIZERS["SAM"])
    with pytest.raises(RuntimeError, match="must not be rejected 3 times in a row"):
        fit(module, ResumableLoader(20, 2), StepGuard(max_consecutive=3), max_epochs=1)
    assert module.trainer.global_step == 4


def test_resume_before_a_rejected_repeated_evaluation(tmp_path: Path) -> None:
    path, bad = tmp_path / "x.ckpt", {(2, 1): math.nan}
    whole = Evaluated(bad, **OPTIMIZERS["SAM"])
    fit(whole, ResumableLoader(12, 2), StepGuard(), SaveAt(path, 2), max_epochs=1)
    resumed = Evaluated(bad, **OPTIMIZERS["SAM"])
    fit(resumed, ResumableLoader(12, 2), StepGuard(), max_epochs=1, ckpt_path=path)
    assert_same_bits(resumed.state(), whole.state())


@pytest.mark.parametrize(
    ("kind", "rule", "algorithm"),
    [
        ("SAM", NormClip(0.3), "norm"),
        ("SAM", ValueClip(0.05), "value"),
        # By value, because with norms LBFGS amplifies rounding errors: its s and y are almost
        # orthogonal if all gradients have one norm.
        ("LBFGS", ValueClip(0.05), "value"),
    ],
)
def test_each_evaluation_is_clipped_as_by_the_trainer(kind: str, rule: Any, algorithm: str) -> None:
    ours, theirs, free = (Evaluated(**OPTIMIZERS[kind]) for _ in range(3))
    fit(ours, ResumableLoader(12, 2), GradientClipping(rule), max_epochs=1)
    limit = {"norm": 0.3, "value": 0.05}[algorithm]
    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    fit(theirs, ResumableLoader(12, 2), max_epochs=1, **options)
    fit(free, ResumableLoader(12, 2), max_epochs=1)
    torch.testing.assert_close(ours.vector(), theirs.vector(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.vector(), free.vector(), rtol=1e-2)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_callbacks_that_measure_change_nothing(kind: str) -> None:
    ours, theirs = Evaluated(**OPTIMIZERS[kind]), Evaluated(**OPTIMIZERS[kind])
    callbacks = [OptimizationMonitor(every=1), StepGuard(), GradientNoiseScale()]
    callbacks.append(BatchSizeScheduler(ConstantBatchSize(2)))
    fit(ours, ResumableLoader(13, 2), *callbacks, max_epochs=1)
    fit(theirs, ResumableLoader(13, 2), max_epochs=1)
    assert_same_bits(ours.state(), theirs.state())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_monitor_logs_the_first_evaluation_and_the_whole_update(kind: str, tmp_path: Path) -> None:
    module, logger = Evaluated(**OPTIMIZERS[kind]), CSVLogger(tmp_path)
    monitor = OptimizationMonitor(every=1, layers={"all": "*"})
    fit(module, ResumableLoader(8, 2), monitor, max_epochs=1, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["grad_norm/total"]]
    norms, ratios = (
        [float(row[tag]) for row in rows] for tag in ("grad_norm/total", "layers/update_ratio/all")
    )
    assert norms == pytest.approx(module.first_norms, rel=1e-5)
    assert ratios == pytest.approx(module.ratios, rel=1e-4)


# -------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ([BatchSizeScheduler(ConstantBatchSize(4))], {}),
        ([StepGuard()], {"accumulate_grad_batches": 2}),
        ([OptimizationMonitor()], {"accumulate_grad_batches": 2}),
        ([GradientClipping(NormClip(1.0))], {"accumulate_grad_batches": 2}),
    ],
    ids=["scheduler", "guard", "monitor", "clipping"],
)
def test_repeated_evaluation_in_an_accumulation_window_raises_and_changes_nothing(
    kind: str, callbacks: list[L.Callback], options: dict[str, Any]
) -> None:
    module = Evaluated(**OPTIMIZERS[kind])
    before = module.vector()
    message = f"one batch .* got 2 batches and {OPTIMIZERS[kind]['optimizer'].__name__}; use larger"
    with pytest.raises(ValueError, match=message):
        fit(module, ResumableLoader(12, 2), *callbacks, max_epochs=1, **options)
    assert torch.equal(module.vector(), before)
    assert not any(module.trainer.optimizers[0].state_dict()["state"].values())


def test_accumulation_that_starts_later_raises_before_it_changes_the_weights() -> None:
    module = Evaluated(**OPTIMIZERS["SAM"])
    growing = BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4}))
    with pytest.raises(ValueError, match="got 2 batches and ClosureSam"):
        fit(module, ResumableLoader(12, 2), growing, max_epochs=1)
    plain = Evaluated(**OPTIMIZERS["SAM"])
    fit(plain, ResumableLoader(12, 2), max_steps=3)
    assert module.trainer.global_step == 3
    assert torch.equal(module.vector(), plain.vector())


def test_window_of_one_batch_at_the_end_of_an_epoch_is_no_accumulation() -> None:
    """Lightning clears the gradients in every evaluation of the first batch of a window."""
    ours, theirs = Evaluated(**OPTIMIZERS["SAM"]), Evaluated(**OPTIMIZERS["SAM"])
    fit(ours, ResumableLoader(2, 2), StepGuard(), max_epochs=3, accumulate_grad_batches=2)
    fit(theirs, ResumableLoader(2, 2), max_epochs=3, accumulate_grad_batches=2)
    assert_same_bits(ours.state(), theirs.state())


def test_optimizer_that_evaluates_once_accumulates_as_before() -> None:
    module = Probe(optimizer=torch.optim.AdamW)
    callbacks = [BatchSizeScheduler(ConstantBatchSize(4)), StepGuard()]
    fit(module, ResumableLoader(12, 2), *callbacks, max_epochs=1)
    assert max(module.errors) < 1e-5


def test_sixteen_bit_with_a_scaler_gives_lightnings_error() -> None:
    """Lightning gives no closure to the optimizer then, with and without our callbacks."""
    for callbacks in ([], [StepGuard()]):
        module = Evaluated(**OPTIMIZERS["SAM"])
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'closure'"):
            fit(
                module, ResumableLoader(4, 2), *callbacks, max_epochs=1, **cpu_precision("16-mixed")
            )
