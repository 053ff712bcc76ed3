"""Which hooks Lightning dispatches to us, counted by a profiler of Lightning's own."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.reporting.runs import read_run
from tests.kit import QUIET, Probe, cpu_precision, loader


class Counting(PassThroughProfiler):
    """Counts what Lightning calls under which name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def start(self, action_name: str) -> None:
        self.calls[action_name] += 1

    def stop(self, action_name: str) -> None:
        pass


def three() -> list[Any]:
    return [
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        GradientClipping(NormClip(max_norm=1.0)),
        OptimizationMonitor(every=2),
    ]


def fit(callbacks: list[Any], **options: Any) -> tuple[L.Trainer, Probe, Counting]:
    counting, module = Counting(), Probe()
    trainer = L.Trainer(**{**QUIET, "max_steps": 8, **options}, callbacks=callbacks)
    trainer.profiler = counting
    trainer.fit(module, loader(32, 4))
    return trainer, module, counting


def in_batches(counting: Counting) -> Counter[str]:
    """Dispatches to callbacks, by hook, of hooks that come with every batch."""
    found: Counter[str] = Counter()
    for name, count in counting.calls.items():
        if name.startswith("[Callback]") and count >= 8:
            found[name.rpartition(".")[2]] += count
    return found


def test_one_of_three_callbacks_is_called_on_every_batch() -> None:
    _, _, counting = fit(three(), max_steps=24, max_epochs=3)
    counts = in_batches(counting)
    hooks = ("on_before_optimizer_step", "on_train_batch_end")
    assert counts == dict.fromkeys(hooks, 24)
    begun = {k: n for k, n in counting.calls.items() if k.endswith(".on_train_batch_start")}
    assert sum(n for name, n in begun.items() if name.startswith("[Callback]")) == 3  # an epoch


@pytest.mark.parametrize(
    "added",
    [
        lambda: BatchSizeScheduler(ConstantBatchSize(4)),
        StepGuard,
        lambda: OptimizationMonitor(every=2, tokens=lambda batch: batch[0].numel()),
        lambda: OptimizationMonitor(every=2, samples=lambda batch: len(batch[0])),
    ],
    ids=["batch size", "guard", "tokens", "samples"],
)
def test_who_looks_at_batches_is_called_when_each_begins(added: Any) -> None:
    _, _, counting = fit([added(), *three()[:2]])
    assert in_batches(counting)["on_train_batch_start"] == 8


class BeginsMidEpoch(L.Callback):
    """Adds a parameter group in the middle of an epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *arguments: Any) -> None:
        if trainer.global_step == 3:
            pl_module.late = torch.nn.Parameter(torch.ones(2))
            trainer.optimizers[0].add_param_group({"params": [pl_module.late], "lr": 0.5})


@pytest.mark.parametrize("first", [True, False])
def test_a_group_that_arrives_within_an_epoch_is_scheduled_at_its_first_update(first: bool) -> None:
    seen = []

    class Sees(Probe):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    scheduler = LearningRateScheduler(Linear(start=1.0, end=0.0))
    callbacks = [scheduler, BeginsMidEpoch()] if first else [BeginsMidEpoch(), scheduler]
    trainer = L.Trainer(**{**QUIET, "max_steps": 8}, callbacks=callbacks)
    module = Sees()
    trainer.fit(module, loader(32, 4))
    base = seen[0][0]
    assert seen[:3] == [[base * (1 - t / 8)] for t in range(3)]
    assert seen[3:] == [[base * (1 - t / 8), 0.5 * (1 - t / 8)] for t in range(3, 8)]


def test_losses_are_handed_over_where_somebody_wants_them() -> None:
    _, _, counting = fit([*three(), StepGuard()])
    assert in_batches(counting)["on_before_backward"] == 8


class Curious(OptimizationMonitor):
    """A user's subclass with hooks of its own."""

    def __init__(self) -> None:
        super().__init__(every=2)
        self.seen: list[str] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("backward")
        super().on_after_backward(trainer, pl_module)

    def on_train_batch_end(self, *arguments: Any, **options: Any) -> None:
        self.seen.append("end")
        super().on_train_batch_end(*arguments, **options)


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_a_subclass_are_called(first: bool) -> None:
    curious = Curious()
    others = three()[:2]
    fit([curious, *others] if first else [*others, curious])
    assert curious.seen == ["backward", "end"] * 8


class HandsOn(L.Callback):
    """Calls a callback that the Trainer does not know."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        handed_on = name.startswith("on_") or name in {"setup", "teardown"}
        return getattr(super().__getattribute__("inner"), name) if handed_on else found


def test_a_callback_inside_another_works() -> None:
    plain = fit(three())[1]
    nested = fit([HandsOn(callback) for callback in three()])[1]
    for one, other in zip(plain.parameters(), nested.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_it_is_left(fails: bool) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            for callback in callbacks[:3]:
                copied = pickle.loads(pickle.dumps(callback))
                assert callable(copied.on_train_batch_end)
                assert callable(copy.deepcopy(callback).on_before_optimizer_step)
            if fails:
                raise ZeroDivisionError

    callbacks: list[Any] = [*three(), Fails()]
    if fails:
        with pytest.raises(ZeroDivisionError):
            fit(callbacks)
    else:
        fit(callbacks)
    for callback in callbacks[:3]:
        assert not [name for name in vars(callback) if name.startswith("on_")]


def ignoring(hook: str) -> OptimizationMonitor:
    """A user's subclass with a hook that does not call ours."""
    kind = type("Ignoring", (OptimizationMonitor,), {hook: lambda *arguments, **options: None})
    callback: OptimizationMonitor = kind(every=2)
    return callback


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]
)
def test_a_subclass_that_keeps_a_hook_to_itself_silences_nobody(hook: str) -> None:
    seen = []
    for first in (OptimizationMonitor(every=2), ignoring(hook)):
        others = [
            BatchSizeScheduler(ConstantBatchSize(8)),
            GradientClipping(NormClip(max_norm=1e-3)),
            LearningRateScheduler(Linear(start=1.0, end=0.0), budget="24 samples"),
        ]
        module = fit([first, *others], max_steps=-1, max_epochs=1)[1]
        seen.append((module.lrs, module.norms, module.windows))
    assert seen[0] == seen[1]
    assert [len(window) for window in seen[0][2]] == [8, 8, 8]


def test_the_others_go_on_when_the_first_is_removed() -> None:
    class Removes(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.callbacks = [c for c in trainer.callbacks if c is not first]

    first = OptimizationMonitor(every=2)
    clipping = GradientClipping(NormClip(max_norm=1e-3))
    module = fit([first, clipping, Removes()], max_epochs=4, max_steps=16)[1]
    assert len(module.norms) == 16
    assert max(module.norms) < 1.001e-3


def test_a_callback_speaks_again_after_an_error_that_hid_the_end_of_its_fit() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            raise ZeroDivisionError

        def on_exception(self, *arguments: Any) -> None:
            raise ArithmeticError

    clipping = GradientClipping(NormClip(max_norm=1e-3))
    with pytest.raises(ArithmeticError):
        fit([Fails(), LearningRateScheduler(WarmupCosine(warmup="20%")), clipping])
    assert max(fit([clipping])[1].norms) < 1.001e-3


class Unloved(L.LightningModule):
    """Gives no loss for one batch of every epoch."""

    def __init__(self, *, without: int | None) -> None:
        super().__init__()
        self.layer, self.without = torch.nn.Linear(3, 1), without

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == self.without else self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("without", [None, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_nobody_hears_of_are_counted(
    tmp_path: Path, accumulate: int, without: int | None, precision: str
) -> None:
    """Batches of 4, 4 and 2 samples, in windows of ``accumulate``, twice."""
    down = Linear(start=1.0, end=0.0)
    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path), "max_epochs": 2, "max_steps": -1},
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
        callbacks=[
            LearningRateScheduler(down),
            GradientClipping(NormClip(max_norm=5.0, schedule=down)),
            OptimizationMonitor(layers=None),
        ],
    )
    data = TensorDataset(torch.randn(10, 3))
    trainer.fit(Unloved(without=without), DataLoader(data, batch_size=4))
    expected = []
    windows = [(0,), (1,), (2,)] if accumulate == 1 else [(0, 1), (2,)]
    for epoch in range(2):
        for number, window in enumerate(windows):
            # Without a gradient, and with a GradScaler where the last loss is missing, there is
            # no update.
            if window == (without,) or (precision == "16-mixed" and window[-1] == without):
                continue
            size = sum((4, 4, 2)[batch] for batch in window)
            before, left = 10 * epoch + 4 * window[0], 1 - (3 * epoch + window[0]) / 6
            step = len(windows) * epoch + number
            expected.append((step, size, before + size, left, 5 * left))
    curves = read_run(str(trainer.log_dir)).curves
    tags = ("batch/global_size", "progress/samples", "optim/lr", "clip/threshold")
    found = zip(*(curves[tag] for tag in tags), strict=True)
    assert [(points[0][0], *(value for _, value in points)) for points in found] == [
        pytest.approx(row) for row in expected
    ]


class EverySecond(Unloved):
    """Makes an update of every second batch only, in its own way."""

    def __init__(self) -> None:
        super().__init__(without=None)
        self.rates: list[float] = []

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        if batch_idx % 2:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


def test_the_rate_counts_batches_that_the_module_makes_no_update_of() -> None:
    module = EverySecond()
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 2, "max_steps": -1},
        callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert module.rates == [1 - batch / 8 for batch in range(8)]


class CutsShort(Unloved):
    """Leaves the first epoch where one of its batches begins."""

    def __init__(self, *, at: int) -> None:
        super().__init__(without=None)
        self.at = at
        self.rates: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if (self.current_epoch, batch_idx) == (0, self.at) else None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_batch_that_the_module_refuses_is_not_consumed(at: int) -> None:
    module = CutsShort(at=at)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 3, "max_steps": -1},
        callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert module.rates == [1 - batch / 12 for batch in range(at + 8)]


def test_a_batch_that_ended_in_an_error_is_not_consumed() -> None:
    class Fails(CutsShort):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            if len(self.rates) == 3:
                raise ZeroDivisionError

    module = Fails(at=-1)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 2, "max_steps": -1},
        callbacks=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
    )
    data = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data)
    trainer.fit(module, data)
    assert module.rates[:5] == [1 - batch / 8 for batch in (0, 1, 2, 2, 3)]


def test_a_rate_that_the_module_writes_for_its_update_stays() -> None:
    used = []

    class Warms(Unloved):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.125
            optimizer.step(closure=optimizer_closure)
            used.append(optimizer.param_groups[0]["lr"])

    trainer = L.Trainer(
        **{**QUIET, "max_steps": 4}, callbacks=[LearningRateScheduler(WarmupCosine(warmup=2))]
    )
    trainer.fit(Warms(without=None), DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert used == [0.125] * 4


def test_an_end_of_a_batch_that_reaches_nobody_is_an_error() -> None:
    class Silent(LearningRateScheduler):
        def on_train_batch_end(self, *arguments: Any) -> None: ...

    with pytest.raises(RuntimeError, match=r"on_train_batch_end must reach .* call super\(\)"):
        fit([Silent(Linear(start=1.0, end=0.0))])


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("added", [[], [StepGuard()]], ids=["unheard", "heard"])
def test_a_batch_that_the_loader_leaves_empty_is_one_of_the_budget(
    tmp_path: Path, added: list[Any]
) -> None:
    class Gaps(DataLoader[Any]):
        def __iter__(self) -> Any:
            for index, batch in enumerate(super().__iter__()):
                yield None if index == 1 else batch

    module = CutsShort(at=-1)
    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path), "max_epochs": 2, "max_steps": -1},
        log_every_n_steps=1,
        callbacks=[
            LearningRateScheduler(Linear(start=1.0, end=0.0)),
            *added,
            OptimizationMonitor(layers=None),
        ],
    )
    trainer.fit(module, Gaps(TensorDataset(torch.randn(16, 3)), batch_size=4))
    assert module.rates == [1 - batch / 8 for batch in (0, 2, 3, 4, 6, 7)]
    samples = read_run(str(trainer.log_dir)).curves["progress/samples"]
    assert [value for _, value in samples] == [4, 8, 12, 16, 20, 24]
