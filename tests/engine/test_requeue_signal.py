"""A signal of SLURM at any moment saves a checkpoint that resumes to the bit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GlobalBatchLoader,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.capability import Capability
from tests.helpers import QUIET, Probe, Regression, ResumableLoader, loader

AT = 8  # the update in which the signal arrives
Send = Callable[[], None]


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Sets the default handlers: Lightning registers none for a signal that already has one."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a job of SLURM, with an ``scontrol`` that records how it is called."""
    variables = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "NODEID": "0"}
    for name, value in {**variables, "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "calls"}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return tmp_path


def capabilities() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 5, "60%": 3}), lr_scaling="sqrt"),
        GradientClipping(ZClip(warmup=3)),
        StepGuard(),
    ]


class StepsInParts(torch.optim.SGD):
    """SGD that updates one parameter after the other, and sends a signal after the first."""

    send: Send | None = None

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        for index, parameter in enumerate(p for g in self.param_groups for p in g["params"]):
            parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])
            if index == 0 and self.send is not None:
                self.send()
        return loss


class Module(Probe):
    """Sends a signal at a moment of an update; every update is recorded."""

    def __init__(self, moment: str = "", number: signal.Signals = signal.SIGUSR1) -> None:
        super().__init__(lr=0.1)
        self.moment, self.number, self.was_sent = moment, number, False

    def send_in(self, moment: str, at: int = AT) -> None:
        if self.moment == moment and self.trainer.global_step == at and not self.was_sent:
            self.was_sent = True
            signal.raise_signal(self.number)

    def configure_optimizers(self) -> Any:
        optimizer = StepsInParts(self.parameters(), lr=0.1)
        optimizer.send = lambda: self.send_in("optimizer step")
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        is_later = self.trainer.accumulate_grad_batches > 1 and len(self.open) > 0
        if is_later:
            self.send_in("window")
        loss = super().training_step(batch, batch_idx)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self.send_in("backward pass"))
        return loss

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.send_in("before Lightning counts the update")

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.send_in("between batches", at=AT + 1)

    def on_train_epoch_end(self) -> None:
        self.send_in("between epochs", at=self.trainer.global_step)

    def on_validation_start(self) -> None:
        self.send_in("validation", at=self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch[0], batch[1])

    def on_train_start(self) -> None:
        super().on_train_start()
        self.send_in("start", at=0)


class SendsInStages(Capability):
    """Sends the signal while the engine runs the stages of an update."""

    owns, rank = "signals", 45  # between guard and clipping

    def decide(self, update: Any) -> None:
        assert self.fit is not None
        self.fit.module.send_in("decision")  # type: ignore[operator]

    def end_batch(self, batch: Any) -> None:
        batch.fit.module.send_in("end of the batch", at=AT + 1)


def fit(module: Module, folder: Path, data: Any, callbacks: list[Any], **options: Any) -> Any:
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 3, "default_root_dir": folder, **options},
        callbacks=[*callbacks, SendsInStages()],
    )
    trainer.fit(module, data(), loader(4, 2), weights_only=True)
    return trainer


def exact_loader() -> Any:
    return GlobalBatchLoader(Regression(23), micro_batch_size=2, seed=1)


def check_resume(first: Module, folder: Path, data: Any, callbacks: Any, **options: Any) -> int:
    """Resumes as a requeued job, and compares with the run that continued."""
    (saved,) = folder.glob("hpc_ckpt_*.ckpt")
    at: int = torch.load(saved, weights_only=True)["global_step"]
    assert (folder / "calls").read_text() == "requeue 4711\n"
    resumed = Module()
    fit(resumed, folder, data, callbacks(), **options)
    assert resumed.lrs == first.lrs[at:]
    assert resumed.windows == first.windows[at:]
    assert resumed.norms == first.norms[at:]
    for one, other in zip(first.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    return at


MOMENTS = {
    "start": 1,
    "window": AT + 1,
    "backward pass": AT + 1,
    "decision": AT + 1,
    "optimizer step": AT + 1,
    "before Lightning counts the update": AT + 1,
    "end of the batch": AT + 1,
    "between batches": AT + 2,
}


@pytest.mark.parametrize("moment", [*MOMENTS, "between epochs", "validation"])
def test_signal_at_any_moment_resumes_to_the_bit(folder: Path, moment: str) -> None:
    first = Module(moment)
    trainer = fit(first, folder, exact_loader, capabilities())
    assert first.was_sent
    assert "_slurm_sigusr_handler_fn" not in vars(trainer._signal_connector)
    at = check_resume(first, folder, exact_loader, capabilities)
    assert at == MOMENTS.get(moment, at)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["window", "optimizer step"])
def test_loader_with_a_position_loses_no_window(
    folder: Path, moment: str, number: signal.Signals
) -> None:
    def own() -> list[Any]:
        return [c for c in capabilities() if "BatchSize" not in type(c).__name__]

    def data() -> ResumableLoader:
        return ResumableLoader(24, 2)

    environment = SLURMEnvironment(requeue_signal=number)
    options = {"accumulate_grad_batches": 3, "max_epochs": 4, "plugins": [environment]}
    straight = Module()
    fit(straight, folder, data, own(), **options)
    ends = pytest.raises(SIGTERMException) if number == signal.SIGTERM else nullcontext()
    with ends:
        fit(Module(moment, number), folder, data, own(), **options)
    assert check_resume(straight, folder, data, own, **options) == AT + 1


@pytest.mark.parametrize("moment", ["window", "validation"])
def test_sigterm_as_the_signal_saves_before_lightning_ends_the_run(
    folder: Path, moment: str
) -> None:
    straight = Module()
    environment = {"plugins": [SLURMEnvironment(requeue_signal=signal.SIGTERM)]}
    fit(straight, folder, exact_loader, capabilities(), **environment)
    with pytest.raises(SIGTERMException):
        fit(Module(moment, signal.SIGTERM), folder, exact_loader, capabilities(), **environment)
    check_resume(straight, folder, exact_loader, capabilities, **environment)


def test_signal_in_the_last_update_is_handled(folder: Path) -> None:
    first = Module("optimizer step")
    fit(first, folder, exact_loader, capabilities(), max_steps=AT + 1, max_epochs=-1)
    (saved,) = folder.glob("hpc_ckpt_*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == AT + 1
    assert (folder / "calls").read_text() == "requeue 4711\n"


def test_auto_requeue_off_leaves_the_signal_alone(folder: Path) -> None:
    environment = {"plugins": [SLURMEnvironment(auto_requeue=False)]}
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        fit(Module("decision"), folder, exact_loader, capabilities(), **environment)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]
    assert not (folder / "calls").exists()


@pytest.mark.parametrize("moment", ["window", "optimizer step"])
def test_handler_that_saves_within_an_update_warns(tmp_path: Path, moment: str) -> None:
    module = Module(moment)

    def save(number: int, frame: Any) -> None:
        module.trainer.save_checkpoint(tmp_path / "saved.ckpt")

    before = signal.signal(signal.SIGUSR1, save)
    try:
        if moment == "window":  # the window is repeated
            fit(module, tmp_path, exact_loader, capabilities())
        else:
            with pytest.warns(UserWarning, match="A checkpoint is saved during an update"):
                fit(module, tmp_path, exact_loader, capabilities())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "saved.ckpt").exists()
