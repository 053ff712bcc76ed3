"""OptimizationMonitor in fits: logged values, the progress bar, resume, and unusual runs."""

from __future__ import annotations

import json
import math
import pickle
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
)
from lightning_bigopt.monitoring.tags import find_tag
from tests.helpers import QUIET, RaisesAtStep, ResumableLoader, fit, loader
from tests.monitoring.helpers import (
    MEASURED_TIMES,
    TAG_PREFIXES,
    Blocks,
    TwoOptimizers,
    batch_tokens,
    curves,
    curves_in_tensorboard,
    total_norm,
)
from tests.older_lightning import fault_of_2_5_0


def test_total_norm_clip_coefficient_and_clipped_fraction(tmp_path: Path) -> None:
    module = Blocks(lr=0.01)
    trainer = fit(
        module,
        loader(44, 4),
        GradientClipping(NormClip(max_norm=6.0)),
        OptimizationMonitor(every=4, layers=None),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    norms = [total_norm(list(seen["grads"].values())) for seen in module.seen]
    clipped = [value > 6.0 for value in norms]
    assert 0 < sum(clipped[:8]) < 8
    assert logged["grad_norm/total"] == [(t, pytest.approx(norms[t])) for t in (3, 7)]
    assert logged["clip/threshold"] == [(3, 6.0), (7, 6.0)]
    assert logged["clip/coefficient"] == [
        (t, pytest.approx(min(1.0, 6.0 / (norms[t] + 1e-6)))) for t in (3, 7)
    ]
    shares = [sum(clipped[:4]) / 4, sum(clipped[4:8]) / 4]
    assert [value for _, value in logged["clip/fraction"]] == pytest.approx(shares)


@pytest.mark.parametrize("scheduled_by", ["callback", "torch"])
def test_logged_learning_rate_tensor_is_the_one_that_the_update_used(
    scheduled_by: str, tmp_path: Path
) -> None:
    class Tensors(Blocks):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.used.append(float(optimizer.param_groups[0]["lr"]))

        def configure_optimizers(self) -> Any:
            self.used: list[float] = []
            rate = torch.tensor(0.1)
            optimizer = torch.optim.Adam(self.parameters(), lr=rate, foreach=False)
            if scheduled_by == "callback":
                return optimizer
            inverse = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": inverse, "interval": "step"}]

    module, callbacks = Tensors(), [OptimizationMonitor(every=1, layers=None)]
    if scheduled_by == "callback":
        callbacks.append(LearningRateScheduler(Linear(start=1.0, end=0.0)))
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(module, loader(16, 4), *callbacks, max_steps=4, logger=logger)
    assert len(set(module.used)) == 4
    assert [v for _, v in curves(trainer)["optim/lr"]] == pytest.approx(module.used)


class SGDWithFields(torch.optim.SGD):
    """An optimizer whose groups lack fields, as Adafactor's with relative steps."""

    def __init__(self, params: Any, **fields: Any) -> None:
        super().__init__(params, lr=0.01)
        for group in self.param_groups:
            group.update(fields)
            for key in [key for key, value in fields.items() if value == "missing"]:
                del group[key]

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            return closure()


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"lr": None}, "optim/lr"),
        ({"lr": "missing"}, "optim/lr"),
        ({"weight_decay": None}, "optim/weight_decay"),
        ({"momentum": None, "betas": (None, 0.999)}, "optim/momentum"),
    ],
)
def test_fields_that_the_optimizer_lacks_are_not_logged(
    fields: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    trainer = fit(
        Blocks(kind=SGDWithFields, **fields),
        loader(8, 4),
        OptimizationMonitor(every=1),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = {tag for tag in curves(trainer) if tag.startswith("optim/")}
    assert logged == {"optim/lr", "optim/weight_decay", "optim/momentum"} - {missing}
    assert "grad_norm" in trainer.progress_bar_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a positive number of updates, got 0"),
        ({"histograms_every": 1.5}, "histograms_every must be a positive"),
        ({"x_axis": "epochs"}, "x_axis must be"),
        ({"layers": "block"}, "layers must be 'blocks', 'parameters'"),
        ({"layers": True}, "layers must be .* got True; write patterns as"),
        ({"layers": {"head": 3}}, "layers must be .* got {'head': 3}"),
        ({"per_layer": ["norm"]}, "per_layer must be a list of 'grad_norm', .* got 'norm'"),
        ({"per_layer": "grad_norm"}, "per_layer must be a list of .* got 'grad_norm'"),
        ({"per_layer": True}, "per_layer must be a list of .* got True; try"),
        ({"per_layer": 5}, "per_layer must be a list of .* got 5; try"),
        ({"tokens": 3}, "tokens must be a function of the batch, .* got 3"),
        ({"report": True}, "report must be a path or None, got True"),
        ({"report": ""}, "report must be a path or None, got ''"),
    ],
)
def test_invalid_arguments_raise_with_their_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizationMonitor(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "accumulate", "every", "saved"),
    [
        ("updates", 1, 1, 7),
        ("updates", 1, 1, 6),  # at the end of an epoch
        ("updates", 2, 1, 7),
        ("samples", 1, 1, 7),
        ("samples", 2, 2, 7),
        ("tokens", 1, 1, 6),
        ("tokens", 2, 2, 7),
    ],
)
def test_resumed_run_continues_its_curves(
    axis: Any, accumulate: int, every: int, saved: int, tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        return [
            LearningRateScheduler(Linear(start=1.0, end=0.1)),
            GradientClipping(NormClip(max_norm=6.0)),
            OptimizationMonitor(every=every, x_axis=axis, tokens=batch_tokens),
        ]

    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    data = (24 * accumulate, 2)
    straight = fit(
        Blocks(),
        ResumableLoader(*data),
        *callbacks(),
        logger=TensorBoardLogger(tmp_path, version="straight"),
        **options,
    )
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=saved, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(
            Blocks(),
            ResumableLoader(*data),
            *callbacks(),
            save,
            RaisesAtStep(12, ZeroDivisionError()),
            logger=TensorBoardLogger(tmp_path, version="failed"),
            enable_checkpointing=True,
            **options,
        )
    (checkpoint,) = (tmp_path / "saved").glob(f"*step={saved}.ckpt")
    # TensorBoard reads files by name, and names hold whole seconds; then a number as text.
    time.sleep(1 - time.time() % 1)
    resumed = fit(
        Blocks(),
        ResumableLoader(*data),
        *callbacks(),
        logger=TensorBoardLogger(tmp_path, version="failed"),
        ckpt_path=checkpoint,
        **options,
    )
    assert len(list(Path(resumed.log_dir).glob("events*"))) == 2
    expected, found = curves_in_tensorboard(straight), curves_in_tensorboard(resumed)
    compared = 0
    for tag, curve in expected.items():
        if not tag.startswith(MEASURED_TIMES) and tag.startswith(TAG_PREFIXES):
            assert found[tag] == curve, tag
            compared += 1
    assert compared > 25
    assert len(expected["grad_norm/total"]) == 24 // every


def test_last_window_of_an_epoch_logs_its_own_length(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(12, 2),
        OptimizationMonitor(every=1),
        max_epochs=2,
        accumulate_grad_batches=4,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    assert [value for _, value in logged["batch/accumulate"]] == [4, 2, 4, 2]
    assert [value for _, value in logged["batch/global_size"]] == [8, 4, 8, 4]


class FourUpdatesPerBatch(Blocks):
    """Four updates a batch; the last one's gradient is too small to be clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for factor in (1.0, 1.0, 1.0, 1e-9):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx) * factor)
            optimizer.step()


def test_clipped_fraction_counts_every_update_of_a_batch(tmp_path: Path) -> None:
    trainer = fit(
        FourUpdatesPerBatch(),
        loader(16, 4),
        GradientClipping(NormClip(max_norm=1e-3)),
        OptimizationMonitor(every=2),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    assert curves(trainer)["clip/fraction"] == [(1, 0.75), (3, 0.75)]


def test_several_optimizers_under_manual_optimization_are_logged(tmp_path: Path) -> None:
    trainer = fit(
        TwoOptimizers(),
        loader(8, 2),
        OptimizationMonitor(every=1),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    for tag in ("optim/lr/SGD", "grad_norm/total/AdamW", "layers/update_ratio/one/SGD"):
        assert [step for step, _ in logged[tag]] == [0, 1, 2, 3], tag
        assert find_tag(tag) is not None


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"fast_dev_run": True},
        {"limit_train_batches": 2, "log_every_n_steps": 1},
        {"limit_train_batches": 0},
        {"overfit_batches": 1},
        {"log_every_n_steps": 0},
    ],
)
def test_unusual_runs_train_to_the_same_bits_without_the_monitor(
    options: dict[str, Any], tmp_path: Path
) -> None:
    weights = []
    for callbacks in ([], [OptimizationMonitor(histograms_every=1)]):
        module = Blocks(lr=1e-3)
        logger = TensorBoardLogger(tmp_path, version=str(len(callbacks)))
        fit(module, loader(16, 4), *callbacks, max_epochs=2, **{"logger": logger, **options})
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_validate_without_fit_runs(tmp_path: Path) -> None:
    class Validating(Blocks):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path)}, callbacks=[OptimizationMonitor(every=1)]
    )
    assert trainer.validate(Validating(), loader(8, 4), verbose=False)


@pytest.mark.slow
@fault_of_2_5_0("RichProgressBar fails with rich 15", strict=False)
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_the_used_values(
    bar: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SetsGradientToNaN(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step == 1:
                next(module.parameters()).grad.fill_(math.nan)

    monkeypatch.setenv("COLUMNS", "300")
    trainer = fit(
        Blocks(lr=1.25e-4),
        loader(16, 4),
        SetsGradientToNaN(),
        StepGuard(),
        OptimizationMonitor(every=1),
        bar(refresh_rate=1),
        max_epochs=1,
        enable_progress_bar=True,
    )
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert float(trainer.progress_bar_metrics["global_batch"]) == 4.0
    for name, value in (("lr", "0.000125"), ("global_batch", "4"), ("skipped", "1")):
        assert re.search(rf"{name}(=|: ){value}[],\s]", shown), name
    assert "grad_norm" in shown


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path: Path) -> None:
    sizes = []
    for epochs in (10, 25):
        monitor = OptimizationMonitor(every=3)
        clip = GradientClipping(NormClip(max_norm=1.0))
        fit(Blocks(lr=1e-4), loader(64, 4), clip, monitor, max_epochs=epochs, logger=False)
        sizes.append(len(pickle.dumps(monitor)))
    assert abs(sizes[1] - sizes[0]) < 64


def test_skipped_updates_are_logged_only_with_a_guard(tmp_path: Path) -> None:
    for guards, expected in (([], None), ([StepGuard()], [(step, 0.0) for step in range(4)])):
        logger = TensorBoardLogger(tmp_path, name=f"{len(guards)}")
        callbacks = [*guards, OptimizationMonitor(every=1)]
        trainer = fit(Blocks(), loader(16, 4), *callbacks, max_epochs=1, logger=logger)
        assert curves(trainer).get("guard/skipped") == expected


def test_state_is_plain_data(tmp_path: Path) -> None:
    monitor = OptimizationMonitor(every=3)
    clipping = GradientClipping(NormClip(1.0))
    fit(Blocks(), loader(16, 4), clipping, monitor, max_epochs=1)
    for callback in (monitor, clipping):
        state = callback.saved_state()
        assert json.loads(json.dumps(state)) == state
    audit = state["audit"][""][""]
    assert (audit["updates"], audit["logged"][0]) == (
        4,
        3,
    )  # one update came after the last logged one


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_end"])
@pytest.mark.parametrize("batch", [0, 2])
def test_metrics_after_an_error_are_those_without_the_package(
    error: BaseException, hook: str, batch: int, tmp_path: Path
) -> None:
    """Metrics of the batch in which an error is raised do not stay in ``callback_metrics``."""

    class Fails(L.Callback):
        def fail(self, trainer: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.current.ready == batch + 1:
                raise error

    setattr(Fails, hook, lambda self, trainer, *arguments: self.fail(trainer))

    class Logs(Blocks):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"at": float(batch_idx), "bar": 1.0 + batch_idx}, prog_bar=True)
            return super().training_step(batch, batch_idx)

    found = []
    for callbacks in ([], [LearningRateScheduler(Linear()), OptimizationMonitor(), StepGuard()]):
        logger = TensorBoardLogger(tmp_path)
        trainer = L.Trainer(
            **{**QUIET, "logger": logger, "max_epochs": 1}, callbacks=[Fails(), *callbacks]
        )
        with pytest.raises((type(error), SystemExit)):
            trainer.fit(Logs(lr=0.01), loader(16, 4))
        connector = trainer._logger_connector
        bar = {k: v for k, v in connector._progress_bar_metrics.items() if k in ("at", "bar")}
        found.append((dict(connector._callback_metrics), dict(connector._logged_metrics), bar))
    bare, ours = found
    assert ours == bare
    assert ("at" in bare[0]) is bool(batch)
