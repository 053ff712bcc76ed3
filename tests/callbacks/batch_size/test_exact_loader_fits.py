"""GlobalBatchLoader in fits: exact sizes, one order, and resume at any micro-batch."""

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
from tests.batch_helpers import KILLED_POLICY, Recorder, train_recorder, train_until_killed
from tests.helpers import QUIET, Probe, Regression, cpu_precision, fit, loader

SIZES = BatchSizeSteps({"0%": 5, "2 steps": 11, "50%": 8, "3 epochs": 1})


def exact_loader(size: int = 37, micro: int = 3, **options: Any) -> GlobalBatchLoader:
    return GlobalBatchLoader(Regression(size), micro_batch_size=micro, seed=5, **options)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_update_has_exactly_its_samples(precision: str, workers: int) -> None:
    module = Probe(lr=0.01)
    options: dict[str, Any] = {"max_epochs": 4, **cpu_precision(precision)}
    fit(module, exact_loader(num_workers=workers), BatchSizeScheduler(SIZES), **options)
    sizes = [len(window) for window in module.windows]
    # 148 samples; the first update of the third epoch starts at half of them.
    assert sizes == [5, 5, 11, 11, 5, 11, 11, 11, 4, 8, 8, 8, 8, 5, *[1] * 37]
    assert max(module.errors) <= (1e-6 if precision == "32-true" else 2e-2)
    seen = [index for window in module.windows for index in window]
    for epoch in range(4):
        assert sorted(seen[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert seen[:37] != seen[37:74]


def test_schedule_counts_epochs_and_samples_of_the_exact_loader() -> None:
    module = Probe(lr=1e-3)
    fit(
        module,
        exact_loader(20),
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "1 epochs": 10})),
        max_epochs=2,
    )
    assert [len(w) for w in module.windows] == [5, 5, 5, 5, 10, 10]
    shares = [0, 5, 10, 15, 20, 30]
    assert module.lrs == pytest.approx([1e-3 * (1 - share / 40) for share in shares])


def test_mixin_and_lr_scaling_with_the_exact_loader() -> None:
    class ModuleWithMixin(BatchSizePolicyMixin, Probe):
        def configure_batch_size_policy(self) -> Any:
            return BatchSizeScheduler(
                BatchSizeRamp(start=4, end=16, over="50%"), lr_scaling="linear"
            )

        def train_dataloader(self) -> Any:
            return exact_loader(40)

    module = ModuleWithMixin(lr=1e-3)
    L.Trainer(**QUIET, max_epochs=2).fit(module)
    sizes = [len(w) for w in module.windows]
    tails = {position for position in range(1, len(sizes)) if sum(sizes[: position + 1]) % 40 == 0}
    assert sizes[0] == 4
    assert max(sizes) == 16
    for position, (size, lr) in enumerate(zip(sizes, module.lrs, strict=True)):
        if position not in tails:
            assert lr == pytest.approx(1e-3 * size / 4)


def equal_weights(one: L.LightningModule, other: L.LightningModule) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_resume_at_every_micro_batch_gives_the_same_bits(tmp_path: Path) -> None:
    straight = train_recorder(tmp_path)
    count = len(list(tmp_path.glob("*.ckpt")))
    assert count > len(straight.seen)  # inside windows too
    for number in range(2, count, 4):
        resumed = train_recorder(ckpt=tmp_path / f"{number}.ckpt")
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :], number
        assert equal_weights(resumed, straight), number


class StopAtStep(L.Callback):
    """Ends the training inside an epoch, as a Timer does, and saves."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_run_stopped_inside_an_epoch_resumes_inside_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def train(*callbacks: Any, ckpt: Any = None) -> Recorder:
        module = Recorder()
        scheduler = BatchSizeScheduler(ConstantBatchSize(5))
        fit(module, None, scheduler, *callbacks, max_steps=12, ckpt_path=ckpt)
        return module

    stopped, resumed, whole = train(StopAtStep(path, 6)), train(ckpt=path), train()
    assert stopped.seen + resumed.seen == whole.seen
    assert equal_weights(resumed, whole)


HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_save_checkpoint",
)


def train_to_the_end(ckpt: Any = None) -> Recorder:
    """Runs the killed training to its end."""
    module = Recorder()
    scheduler = BatchSizeScheduler(BatchSizeSteps(KILLED_POLICY))
    trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=[scheduler])
    trainer.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def check_resume(ckpt: Path, straight: Recorder) -> None:
    resumed = train_to_the_end(ckpt)
    done = len(straight.seen) - len(resumed.seen)
    assert 0 < done < len(straight.seen)
    assert resumed.seen == straight.seen[done:]
    assert equal_weights(resumed, straight)


@pytest.mark.slow
def test_resume_after_sigkill_with_workers_gives_the_same_bits_without_workers(
    tmp_path: Path,
) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.batch_helpers import train_until_killed; "
        "train_until_killed(Path(sys.argv[1]), 'on_train_batch_start', 10, 2)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    killed = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    check_resume(tmp_path / "last.ckpt", train_to_the_end())


@pytest.mark.slow
def test_resume_after_sigkill_in_any_hook_gives_the_same_bits(tmp_path: Path) -> None:
    straight, draw = train_to_the_end(), random.Random(0)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.batch_helpers"])  # one import for all
    for hook in HOOKS:
        folder = tmp_path / hook
        # Once a micro-batch or once an update; the first checkpoint is that of the second update.
        latest = 8 if hook == "on_save_checkpoint" else 16
        number = draw.randint(latest // 2, latest)
        arguments = (folder, hook, number, 0)
        process = forks.Process(target=train_until_killed, args=arguments)
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL, hook
        check_resume(folder / "last.ckpt", straight)


def test_validation_inside_a_window_changes_nothing() -> None:
    plain, validated = Recorder(), Recorder()
    validated.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    for module, options in ((plain, {}), (validated, {"val_check_interval": 3})):
        scheduler = BatchSizeScheduler(ConstantBatchSize(11))
        trainer = L.Trainer(**QUIET, max_epochs=2, callbacks=[scheduler], **options)
        trainer.fit(module, val_dataloaders=None if module is plain else loader(4, 2))
    assert plain.seen == validated.seen
    assert equal_weights(plain, validated)


def test_max_micro_batch_size_splits_the_same_updates() -> None:
    plain, capped = Probe(lr=0.01), Probe(lr=0.01)
    for module, most in ((plain, None), (capped, 2)):
        scheduler = BatchSizeScheduler(SIZES, max_micro_batch_size=most)
        fit(module, exact_loader(micro=8), scheduler, max_epochs=2)
    assert capped.windows == plain.windows
    assert max(capped.accumulations) == 6  # 11 samples by at most 2
    assert max(plain.errors + capped.errors) <= 1e-6


def test_epoch_smaller_than_the_batch_is_one_update() -> None:
    module = Probe(lr=0.01)
    with pytest.warns(UserWarning, match="64 samples is larger than an epoch of 7 samples"):
        fit(module, exact_loader(7, 2), BatchSizeScheduler(ConstantBatchSize(64)), max_epochs=2)
    assert module.windows == [list(range(7))] * 2
    assert max(module.errors) <= 1e-6


def test_unsupported_uses_raise() -> None:
    policy = ConstantBatchSize(8)
    with pytest.raises(ValueError, match="callbacks must contain BatchSizeScheduler"):
        fit(Probe(), exact_loader(), OptimizationMonitor(), max_epochs=1)
    with pytest.raises(ValueError, match=r"limit_train_batches must be 1\.0.*got 3"):
        fit(
            Probe(), exact_loader(), BatchSizeScheduler(policy), max_epochs=1, limit_train_batches=3
        )
    several = CombinedLoader({"a": exact_loader(), "b": exact_loader()})
    with pytest.raises(ValueError, match="must be the only training loader, got 2"):
        fit(Probe(), several, BatchSizeScheduler(policy), max_epochs=1)
    with pytest.raises(ValueError, match="train on a DataLoader"):
        fit(
            Probe(),
            exact_loader(),
            BatchSizeScheduler(NoiseScaleBatchSize(4, high=16)),
            GradientNoiseScale(),
            max_epochs=1,
        )


def test_fast_dev_run_trains_one_micro_batch() -> None:
    module = Probe()
    fit(module, exact_loader(), BatchSizeScheduler(ConstantBatchSize(12)), fast_dev_run=True)
    assert [len(w) for w in module.windows] == [3]
    assert max(module.errors) <= 1e-6


def test_loader_recreated_every_epoch_keeps_the_order() -> None:
    once, recreated = Recorder(), Recorder()
    for module, every in ((once, 0), (recreated, 1)):
        fit(
            module,
            None,
            BatchSizeScheduler(ConstantBatchSize(6)),
            max_epochs=2,
            reload_dataloaders_every_n_epochs=every,
        )
    assert recreated.seen == once.seen
