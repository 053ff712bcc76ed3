"""An ordinary step does not synchronize with the device, in a whole fit.

A tensor on the "meta" device holds no numbers: reading one raises, as does a copy to the host. Two
modes raise for copies in the other direction. On a real device CUDA itself raises for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bigopt import (
    AGC,
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    ValueClip,
    WarmupStableDecay,
    ZClip,
)
from lightning_bigopt.engine.step import StepHooks
from lightning_bigopt.engine.update import Update
from lightning_bigopt.gradients.optimizer_step import StepControl
from tests.engine.fake_averaging import FakeAveraging
from tests.helpers import QUIET

UPDATES = 20


# ------------------------------------------------------------------------- a device without numbers

DEVICE = torch.device("meta")


class NoBlockingCopies(TorchDispatchMode):
    """Raises for a copy between devices that blocks the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if func.overloadpacket.__name__ in {"_to_copy", "copy_", "_foreach_copy_"}:
            waits = not (kwargs.get("non_blocking") or any(x is True for x in args))
            devices = {tensor.device.type for tensor in tensors if tensor.numel()}
            if len(devices) > 1 and waits:
                raise AssertionError(f"{func} makes the host wait")
        return result


class NoNumbersToTheDevice(TorchFunctionMode):
    """Raises for ``torch.tensor(number, device=...)``: a copy that blocks the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_number = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if is_number and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise AssertionError(f"{func.__name__} makes the host wait; take torch.full")
        return func(*args, **kwargs)


class Accelerator(CPUAccelerator):
    """Lets a Trainer run on any device."""

    def setup_device(self, device: torch.device) -> None: ...


class OnMeta(SingleDeviceStrategy):
    """Moves nothing, because everything is on the device."""

    def __init__(self) -> None:
        super().__init__(accelerator=Accelerator(), device=DEVICE)

    def model_to_device(self) -> None: ...

    def batch_to_device(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        return batch

    def teardown(self) -> None: ...


class FusedSGD(torch.optim.SGD):
    """Reads ``grad_scale`` and ``found_inf`` as fused kernels do, on a device that has none."""

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, weight_decay=0.1)
        self.scaled = 0
        for group in self.param_groups:
            group["fused"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = None if closure is None else torch.enable_grad()(closure)()
        scale, found_inf = vars(self).get("grad_scale"), vars(self).get("found_inf")
        self.scaled += scale is not None
        for group in self.param_groups:
            for parameter in group["params"]:
                change = parameter.grad if scale is None else parameter.grad / scale
                if found_inf is not None:
                    change = torch.where(found_inf > 0, 0.0, change)
                parameter.sub_(change, alpha=group["lr"])
        return result


def adam(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, foreach=True)


class Batches:
    """Batches on the device; the last of an epoch has fewer samples."""

    batch_size = 4

    def __init__(self, batches: int) -> None:
        self.sampler = range(4 * batches - 1)

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / 4)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.sampler), 4):
            yield torch.zeros(len(self.sampler[start : start + 4]), 3, device=DEVICE)


class Blocks(L.LightningModule):
    """Two layers on the device."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer_class = optimizer
        self.blocks = nn.ModuleList(nn.Linear(3, 3, device=DEVICE) for _ in range(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for block in self.blocks:
            batch = block(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer_class(self.parameters(), lr=1e-3)


class Between(OptimizationMonitor):
    """Never at a logging update, nor at the first one, which the progress bar shows."""

    def start(self, fit: Any) -> None:
        super().start(fit)
        self._bar_is_empty = False


class Silent(GradientClipping):
    """Does not count up at the end of a fit."""

    def end(self, fit: Any) -> None: ...


class Guard(StepGuard):
    """A StepGuard without its one transfer per update."""

    def _read(self, trainer: Any, update: Any) -> Any:
        update.norms.take_value(1.0)
        return {"norm": 1.0}


def fit_on_meta(
    callbacks: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: Callable[..., torch.optim.Optimizer] = adam,
) -> L.Trainer:
    # Lightning reads numbers before it trains.
    monkeypatch.setattr(fit_loop, "has_len_all_ranks", lambda *_: True)
    trainer = L.Trainer(
        **{**QUIET, "accelerator": "auto"},
        strategy=OnMeta(),
        max_steps=UPDATES,
        callbacks=callbacks,
    )
    with NoBlockingCopies(), NoNumbersToTheDevice():
        trainer.fit(Blocks(optimizer), Batches(9))
    return trainer


def capabilities(clipping: GradientClipping) -> list[Any]:
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="20%")),
        HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 8}), lr_scaling="sqrt"),
        clipping,
        Between(),
        FakeAveraging(),
    ]


OPTIMIZERS = pytest.mark.parametrize("optimizer", [adam, FusedSGD])


@OPTIMIZERS
@pytest.mark.parametrize("rule", [NormClip(), ValueClip(), AGC()], ids=lambda r: type(r).__name__)
def test_a_fit_reads_no_number_between_logging_updates(
    rule: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fit_on_meta(capabilities(Silent(rule)), monkeypatch, optimizer)
    assert trainer.global_step == UPDATES
    (used,) = trainer.optimizers
    if isinstance(used, FusedSGD):
        assert used.scaled == (UPDATES if isinstance(rule, NormClip) else 0)


@OPTIMIZERS
def test_a_guard_reads_nothing_but_its_norm(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fit_on_meta([*capabilities(Silent(NormClip())), Guard()], monkeypatch, optimizer)
    assert trainer.global_step == UPDATES


@OPTIMIZERS
def test_weighing_by_tokens_reads_their_unit_once(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weigh(batch: Tensor) -> Tensor:
        return batch.square().sum()

    scheduler = BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 8}), weight=weigh)
    scheduler._weights._reference = 1.0  # the unit, read from the first batch of a run
    clipping = Silent(NormClip())
    trainer = fit_on_meta(
        [LearningRateScheduler(Linear()), scheduler, clipping], monkeypatch, optimizer
    )
    assert trainer.global_step == UPDATES


@pytest.mark.parametrize(
    "reads", [StepGuard(), Silent(ZClip()), OptimizationMonitor()], ids=lambda r: type(r).__name__
)
def test_a_read_is_noticed(reads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the tests above can fail: each of these reads a number."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        fit_on_meta([LearningRateScheduler(Linear()), reads], monkeypatch)


def to_host(update: Update) -> Any:
    return update.parameters[0][1].detach().to("cpu", non_blocking=True)


def read(update: Update) -> Any:
    return bool(update.parameters[0][1].detach().sum() > 0)


def to_device(update: Update) -> Any:
    return torch.ones(1).to(DEVICE)


def number_to_device(update: Update) -> Any:
    return torch.tensor(1.0, device=DEVICE)


@pytest.mark.parametrize("what", [to_host, read, to_device, number_to_device])
@pytest.mark.parametrize("stage", ["rescale", "clip", "observe", "after_step"])
def test_any_way_to_wait_is_noticed_in_any_stage(
    stage: str, what: Callable[[Update], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = type("Waiting", (FakeAveraging,), {stage: lambda self, update: what(update)})
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=r"wait|meta"):
        fit_on_meta([LearningRateScheduler(Linear()), waiting()], monkeypatch)


# ---------------------------------------------------------------------------------- a real device


def readme_callbacks() -> list[Any]:
    """The list at the top of the README."""
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="2%", decay="20%")),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 32, "50%": 64})),
        OptimizationMonitor(),
    ]


class OnDevice(L.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **self.options)


LOOPS = {"fused": {"fused": True}, "foreach": {"foreach": True}}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("guarded", [False, True])
def test_twenty_updates_on_a_device_never_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str, precision: str, guarded: bool
) -> None:
    """All stages run in the mode in which CUDA raises for a synchronization.

    The first update is left out: the progress bar shows it. The guard may read one number.
    """
    strict: dict[str, int] = {}

    def watched(owner: Any, name: str, mode: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            if mode == "default" or trainer.fit_loop.epoch_loop._batches_that_stepped > 0:
                torch.cuda.set_sync_debug_mode(mode)
                strict[name] = strict.get(name, 0) + (mode == "error")
            try:
                return original(self, *arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        monkeypatch.setattr(owner, name, run)

    hooks = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step")
    for name in (*hooks, "on_train_batch_end"):
        watched(StepHooks, name, "error")
    for name in ("_call_original", "_finish"):
        watched(StepControl, name, "error")
    watched(StepGuard, "_read", "default")
    data = torch.utils.data.TensorDataset(torch.randn(480, 8), torch.randn(480, 4))
    guard = [StepGuard()] if guarded else []
    trainer = L.Trainer(
        **{**QUIET, "accelerator": "gpu", "logger": TensorBoardLogger(tmp_path)},
        devices=1,
        max_steps=1 + UPDATES,
        precision=precision,
        callbacks=[*readme_callbacks(), *guard],
    )
    loader = torch.utils.data.DataLoader(data, batch_size=32, pin_memory=True)
    trainer.fit(OnDevice(**LOOPS[loop]), loader)
    assert trainer.global_step == 1 + UPDATES
    assert strict["on_before_optimizer_step"] == UPDATES
    for name in (*hooks, "on_train_batch_end"):
        assert strict[name] >= UPDATES, name
