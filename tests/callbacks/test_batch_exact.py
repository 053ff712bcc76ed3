"""GlobalBatchLoader in real fits: exact sizes, one order, and resumes at any micro-batch."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader

from lightning_bigopt import (
    BatchSizePolicyMixin,
    BatchSizeRamp,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientNoiseScale,
    LearningRateScheduler,
    Linear,
    NoiseScaleBatchSize,
    OptimizationMonitor,
)
from tests.batch_kit import KILLED_POLICY, Recorder, SaveEvery, train_until_killed
from tests.callbacks.test_batch_size import fit
from tests.kit import QUIET, Probe, Regression, cpu_precision, loader

SIZES = BatchSizeSteps({"0%": 5, "2 steps": 11, "50%": 8, "3 epochs": 1})


def exact(size: int = 37, micro: int = 3, **options: Any) -> GlobalBatchLoader:
    return GlobalBatchLoader(Regression(size), micro_batch_size=micro, seed=5, **options)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_update_has_exactly_its_samples(precision: str, workers: int) -> None:
    module = Probe(lr=0.01)
    options: dict[str, Any] = {"max_epochs": 4, **cpu_precision(precision)}
    fit(module, exact(num_workers=workers), BatchSizeScheduler(SIZES), **options)
    sizes = [len(window) for window in module.windows]
    # 148 samples in all; half of them are trained in the third epoch's first update.
    assert sizes == [5, 5, 11, 11, 5, 11, 11, 11, 4, 8, 8, 8, 8, 5, *[1] * 37]
    assert max(module.errors) <= (1e-6 if precision == "32-true" else 2e-2)
    seen = [index for window in module.windows for index in window]
    for epoch in range(4):
        assert sorted(seen[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert seen[:37] != seen[37:74]


def test_schedules_count_its_epochs_and_samples() -> None:
    module = Probe(lr=1e-3)
    fit(
        module,
        exact(20),
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "1 epochs": 10})),
        max_epochs=2,
    )
    assert [len(w) for w in module.windows] == [5, 5, 5, 5, 10, 10]
    shares = [0, 5, 10, 15, 20, 30]
    assert module.lrs == pytest.approx([1e-3 * (1 - share / 40) for share in shares])


def test_the_mixin_and_a_coupled_learning_rate_work_with_it() -> None:
    class Owner(BatchSizePolicyMixin, Probe):
        def configure_batch_size_policy(self) -> Any:
            return BatchSizeScheduler(
                BatchSizeRamp(start=4, end=16, over="50%"), lr_scaling="linear"
            )

        def train_dataloader(self) -> Any:
            return exact(40)

    module = Owner(lr=1e-3)
    L.Trainer(**QUIET, max_epochs=2).fit(module)
    sizes = [len(w) for w in module.windows]
    tails = {position for position in range(1, len(sizes)) if sum(sizes[: position + 1]) % 40 == 0}
    assert sizes[0] == 4
    assert max(sizes) == 16
    for position, (size, lr) in enumerate(zip(sizes, module.lrs, strict=True)):
        if position not in tails:
            assert lr == pytest.approx(1e-3 * size / 4)


def run(folder: Path | None = None, *, ckpt: Any = None, **options: Any) -> Recorder:
    """A run with a ramp, a schedule and a coupled learning rate."""
    module = Recorder()
    callbacks: list[Any] = [
        LearningRateScheduler(Linear(start=1.0, end=0.1)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "30%": 11, "70%": 7}), lr_scaling="sqrt"),
        *([] if folder is None else [SaveEvery(folder)]),
    ]
    trainer = L.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": callbacks, **options})
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def same(one: L.LightningModule, other: L.LightningModule) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_every_micro_batch_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = run(tmp_path)
    count = len(list(tmp_path.glob("*.ckpt")))
    assert count > len(straight.seen)  # inside windows too
    for number in range(2, count, 4):
        resumed = run(ckpt=tmp_path / f"{number}.ckpt")
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :], number
        assert same(resumed, straight), number


class StopAt(L.Callback):
    """Ends the training inside an epoch, as a timer does, and saves."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_a_run_stopped_inside_an_epoch_goes_on_inside_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def go(*callbacks: Any, ckpt: Any = None) -> Recorder:
        module = Recorder()
        scheduler = BatchSizeScheduler(ConstantBatchSize(5))
        fit(module, None, scheduler, *callbacks, max_steps=12, ckpt_path=ckpt)
        return module

    stopped, resumed, whole = go(StopAt(path, 6)), go(ckpt=path), go()
    assert stopped.seen + resumed.seen == whole.seen
    assert same(resumed, whole)


MOMENTS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_save_checkpoint",
)


def killed_run(ckpt: Any = None) -> Recorder:
    """The run that is killed, to its end."""
    module = Recorder()
    scheduler = BatchSizeScheduler(BatchSizeSteps(KILLED_POLICY))
    trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=[scheduler])
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def goes_on_to_the_same_bits(ckpt: Path, straight: Recorder) -> None:
    resumed = killed_run(ckpt)
    done = len(straight.seen) - len(resumed.seen)
    assert 0 < done < len(straight.seen)
    assert resumed.seen == straight.seen[done:]
    assert same(resumed, straight)


@pytest.mark.slow
def test_kill_minus_nine_with_workers_and_resume_without_gives_the_same_bits(
    tmp_path: Path,
) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.batch_kit import train_until_killed; "
        "train_until_killed(Path(sys.argv[1]), 'on_train_batch_start', 10, 2)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    killed = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    goes_on_to_the_same_bits(tmp_path / "last.ckpt", killed_run())


@pytest.mark.slow
def test_kill_minus_nine_at_any_moment_and_resume_gives_the_same_bits(tmp_path: Path) -> None:
    straight, draw = killed_run(), random.Random(0)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.batch_kit"])  # one import for all
    for moment in MOMENTS:
        folder = tmp_path / moment
        # Once a micro-batch or once an update; the first checkpoint is that of the second update.
        latest = 8 if moment == "on_save_checkpoint" else 16
        number = draw.randint(latest // 2, latest)
        arguments = (folder, moment, number, 0)
        process = forks.Process(target=train_until_killed, args=arguments)
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL, moment
        goes_on_to_the_same_bits(folder / "last.ckpt", straight)


def test_validation_inside_a_window_changes_nothing() -> None:
    plain, validated = Recorder(), Recorder()
    validated.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    for module, options in ((plain, {}), (validated, {"val_check_interval": 3})):
        scheduler = BatchSizeScheduler(ConstantBatchSize(11))
        trainer = L.Trainer(**QUIET, max_epochs=2, callbacks=[scheduler], **options)
        trainer.fit(module, val_dataloaders=None if module is plain else loader(4, 2))
    assert plain.seen == validated.seen
    assert same(plain, validated)


def test_a_cap_on_the_micro_batch_cuts_smaller_ones_of_the_same_updates() -> None:
    plain, capped = Probe(lr=0.01), Probe(lr=0.01)
    for module, most in ((plain, None), (capped, 2)):
        scheduler = BatchSizeScheduler(SIZES, max_micro_batch_size=most)
        fit(module, exact(micro=8), scheduler, max_epochs=2)
    assert capped.windows == plain.windows
    assert max(capped.accumulations) == 6  # 11 samples by at most 2
    assert max(plain.errors + capped.errors) <= 1e-6


def test_an_epoch_smaller_than_the_batch_is_one_update() -> None:
    module = Probe(lr=0.01)
    fit(module, exact(7, 2), BatchSizeScheduler(ConstantBatchSize(64)), max_epochs=2)
    assert module.windows == [list(range(7))] * 2
    assert max(module.errors) <= 1e-6


def test_what_cannot_work_says_why() -> None:
    policy = ConstantBatchSize(8)
    with pytest.raises(ValueError, match="callbacks must hold BatchSizeScheduler"):
        fit(Probe(), exact(), OptimizationMonitor(), max_epochs=1)
    with pytest.raises(ValueError, match=r"limit_train_batches must be 1\.0.*got 3"):
        fit(Probe(), exact(), BatchSizeScheduler(policy), max_epochs=1, limit_train_batches=3)
    several = CombinedLoader({"a": exact(), "b": exact()})
    with pytest.raises(ValueError, match="one GlobalBatchLoader alone, got 2"):
        fit(Probe(), several, BatchSizeScheduler(policy), max_epochs=1)
    with pytest.raises(ValueError, match="train on a DataLoader"):
        fit(
            Probe(),
            exact(),
            BatchSizeScheduler(NoiseScaleBatchSize(4, high=16)),
            GradientNoiseScale(),
            max_epochs=1,
        )


def test_fast_dev_run_trains_one_micro_batch() -> None:
    module = Probe()
    fit(module, exact(), BatchSizeScheduler(ConstantBatchSize(12)), fast_dev_run=True)
    assert [len(w) for w in module.windows] == [3]
    assert max(module.errors) <= 1e-6


def test_loaders_made_anew_every_epoch_go_on_with_the_order() -> None:
    once, anew = Recorder(), Recorder()
    for module, every in ((once, 0), (anew, 1)):
        fit(
            module,
            None,
            BatchSizeScheduler(ConstantBatchSize(6)),
            max_epochs=2,
            reload_dataloaders_every_n_epochs=every,
        )
    assert anew.seen == once.seen
