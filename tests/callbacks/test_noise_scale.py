"""GradientNoiseScale, compared with a model whose noise and signal are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
    NoiseScaleBatchSize,
    NormClip,
    OptimizationMonitor,
    Warmup,
)
from tests.batch_helpers import QuadraticNoise, noise_loader
from tests.helpers import QUIET, Probe, cpu_precision, loader

EXPECTED = QuadraticNoise.noise / QuadraticNoise.signal  # 4 samples


def measure(*callbacks: Any, micro: int = 2, **options: Any) -> GradientNoiseScale:
    scale = GradientNoiseScale(decay=0.999)
    trainer = L.Trainer(**{**QUIET, "max_steps": 150, "callbacks": [scale, *callbacks], **options})
    trainer.fit(QuadraticNoise(), noise_loader(micro))
    return scale


def check_estimate(scale: GradientNoiseScale) -> None:
    report = scale.report
    assert report.noise_scale is not None
    assert report.standard_error is not None
    assert report.standard_error < 0.2 * EXPECTED
    assert abs(report.noise_scale - EXPECTED) <= 2 * report.standard_error
    assert report.noise == pytest.approx(QuadraticNoise.noise, rel=0.1)
    assert report.signal == pytest.approx(QuadraticNoise.signal, rel=0.15)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_estimate_from_the_first_micro_batch_of_a_window(precision: str) -> None:
    planned = BatchSizeScheduler(ConstantBatchSize(8))
    check_estimate(measure(planned, **cpu_precision(precision)))


@pytest.mark.slow
def test_estimate_with_accumulate_grad_batches_and_with_clipping() -> None:
    check_estimate(measure(accumulate_grad_batches=4))
    clipped = [BatchSizeScheduler(ConstantBatchSize(8)), GradientClipping(NormClip(max_norm=0.1))]
    check_estimate(measure(*clipped))
    other_norm = [GradientClipping(NormClip(max_norm=0.1, norm_type=1.0))]
    check_estimate(measure(*other_norm, accumulate_grad_batches=4))


def test_loss_weights_do_not_bias_the_estimate() -> None:
    weighed = BatchSizeScheduler(ConstantBatchSize(8), weight=lambda batch: 96.0)
    check_estimate(measure(weighed))


def test_one_batch_size_only_gives_no_estimate_and_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        scale = measure(max_steps=5)
    assert scale.report.noise_scale is None
    messages = [r.getMessage() for r in caplog.records if "noise scale" in r.getMessage()]
    assert len(messages) == 1
    assert "at one batch size only" in messages[0]


def test_batch_that_grows_is_measured_later_without_a_false_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = BatchSizeSteps({"0%": 2, "50%": 8})
    with caplog.at_level("INFO"):
        scale = measure(BatchSizeScheduler(policy), max_steps=40)
    assert scale.estimator.updates == 20
    assert "cannot be measured" not in caplog.text


def test_short_window_at_the_end_of_an_epoch_gives_no_false_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        # Four batches of data: a window of three batches and one of a single batch.
        scale = measure(accumulate_grad_batches=3, limit_train_batches=4, max_epochs=3)
    assert scale.estimator.updates == 3
    assert "cannot be measured" not in caplog.text


def test_estimate_within_its_error_is_not_logged_and_the_reason_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class SmallGradient(QuadraticNoise):
        value = 0.001

    scale, logger = GradientNoiseScale(), CSVLogger(tmp_path)
    trainer = L.Trainer(
        **{**QUIET, "logger": logger},
        max_steps=60,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        callbacks=[scale],
    )
    with caplog.at_level("INFO"):
        trainer.fit(SmallGradient(), noise_loader(2))
    assert scale.report.noise_scale is None
    assert not Path(logger.log_dir, "metrics.csv").exists()
    assert "standard errors above zero" in caplog.text


@pytest.mark.parametrize("monitored", [True, False])
def test_estimate_is_logged_with_its_standard_error(tmp_path: Path, monitored: bool) -> None:
    logger = CSVLogger(tmp_path)
    callbacks: list[Any] = [GradientNoiseScale()]
    callbacks += [OptimizationMonitor()] if monitored else []
    trainer = L.Trainer(
        **{**QUIET, "logger": logger},
        max_steps=40,
        accumulate_grad_batches=4,
        log_every_n_steps=10,
        callbacks=callbacks,
    )
    trainer.fit(QuadraticNoise(), noise_loader(2))
    text = Path(logger.log_dir, "metrics.csv").read_text()
    for name in ("simple", "standard_error", "noise", "signal"):
        assert f"noise_scale/{name}" in text


def test_state_resumes(tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    scale = GradientNoiseScale()
    trainer = L.Trainer(**QUIET, max_steps=30, accumulate_grad_batches=2, callbacks=[scale])
    trainer.fit(QuadraticNoise(), noise_loader(2))
    trainer.save_checkpoint(path)
    again = GradientNoiseScale()
    state = torch.load(path, weights_only=True)["callbacks"]["GradientNoiseScale"]
    again.load_state_dict(state)
    assert again.state_dict() == state  # a loaded state is not lost before training consumes it
    resumed = L.Trainer(**QUIET, max_steps=30, accumulate_grad_batches=2, callbacks=[again])
    resumed.fit(QuadraticNoise(), noise_loader(2), ckpt_path=path, weights_only=True)
    assert again.report == scale.report


def test_noise_scale_batch_size_follows_the_estimate() -> None:
    class Large(QuadraticNoise):
        value = 0.2  # |w|² = 1.6: a noise scale of 25

    policy = NoiseScaleBatchSize(8, high=16)
    scheduler = BatchSizeScheduler(policy, lr_scaling="sqrt")
    module = Large()
    trainer = L.Trainer(
        **QUIET, max_steps=120, callbacks=[scheduler, GradientNoiseScale(decay=0.995)]
    )
    trainer.fit(module, noise_loader(4))
    assert scheduler.size == 16
    with pytest.raises(ValueError, match="callbacks must contain GradientNoiseScale"):
        L.Trainer(**QUIET, max_steps=4, callbacks=[BatchSizeScheduler(policy)]).fit(
            Large(), noise_loader(4)
        )


class FixedBatches:
    """Yields the same micro-batches of two in every run, from a saved position on."""

    batch_size = 2

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 5000

    def __iter__(self) -> Any:
        for number in range(self.position, len(self)):
            self.position = number + 1
            generator = torch.Generator().manual_seed(number)
            yield torch.randn(2, QuadraticNoise.dimensions, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class RecordsWindows(QuadraticNoise):
    value = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.used: list[tuple[int, float]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        window = int(self.trainer.accumulate_grad_batches)
        self.used.append((window, optimizer.param_groups[0]["lr"]))


@pytest.mark.slow
def test_resume_decides_the_same_batch_sizes(tmp_path: Path) -> None:
    def go(*callbacks: Any, ckpt: Any = None) -> RecordsWindows:
        module = RecordsWindows()
        ours = [
            BatchSizeScheduler(NoiseScaleBatchSize(4, high=32), lr_scaling="sqrt"),
            GradientNoiseScale(),
            LearningRateScheduler(Warmup("10%", Linear())),
        ]
        options = {**QUIET, "enable_checkpointing": bool(callbacks)}
        trainer = L.Trainer(**options, max_steps=100, callbacks=[*ours, *callbacks])
        trainer.fit(module, FixedBatches(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return module

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = go(save)
    windows = [window for window, _ in straight.used]
    changes = [step for step in range(1, 100) if windows[step] != windows[step - 1]]
    assert len(changes) > 1
    for step in (*changes, 90):  # at the updates where the batch size changes, and one other
        resumed = go(ckpt=tmp_path / f"step={step}.ckpt")
        assert resumed.used == straight.used[step:], step
        assert torch.equal(resumed.layer.w, straight.layer.w), step


def test_duration_in_steps_with_an_adaptive_batch_size_and_max_epochs_raises() -> None:
    policy = BatchSizeScheduler(NoiseScaleBatchSize(4, high=16))
    callbacks = [policy, GradientNoiseScale(), LearningRateScheduler(Warmup("10 steps", Linear()))]
    with pytest.raises(ValueError, match=r"got '10 steps'.*adaptive batch size.*percent"):
        L.Trainer(**QUIET, max_epochs=2, callbacks=callbacks).fit(Probe(), loader(32, 2))


def test_manual_optimization_raises() -> None:
    module = Probe()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization must be True"):
        L.Trainer(**QUIET, max_steps=1, callbacks=[GradientNoiseScale()]).fit(module, loader(4, 2))
