"""The faults of ``ranks``: each changes the run of the second of two processes."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    GradientNoiseScale,
    LearningRateScheduler,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    StepGuard,
    WarmupCosine,
)
from tests.helpers import cpu_precision

AT = 5  # the update of the fault
UPDATES = 9
ROWS = 4  # of one process in a batch


@dataclass
class Run:
    """The run of one process; a fault changes it before it is built.

    Args:
        rank: Rank of the process.
        folder: A folder of the run.
        with_callbacks: Whether the run has the callbacks of this package.
        sharded: Whether the strategy is FSDP2.

    Attributes:
        at: Functions that replace a value at update ``AT``, by place.
        options: Arguments of the Trainer.
        arguments: Arguments of the callbacks, by callback.
        without: Callbacks that the run does not have.
        first: Callbacks of the user before those of this package.
        others: Callbacks of the user after them.
        rows: Rows of the data set of both processes.
        batches: Changes the batches of the loader.
        validation: Runs in the validation steps.
        lr: Learning rate of the optimizer.
        ramp: Whether the batch size grows.
    """

    rank: int
    folder: Path
    with_callbacks: bool
    sharded: bool
    at: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    first: list[L.Callback] = field(default_factory=list)
    others: list[L.Callback] = field(default_factory=list)
    rows: int = 2 * ROWS * UPDATES
    batches: Callable[[Iterator[Any]], Iterator[Any]] | None = None
    validation: Callable[[Any], Any] | None = None
    lr: float = 0.05
    ramp: bool = False

    def callbacks(self) -> list[L.Callback]:
        """Returns the callbacks of this package."""
        if not self.with_callbacks:
            return []
        schedule = {"warmup": 2, **self.arguments.get("schedule", {})}
        warmup = schedule.pop("warmup")
        clip = {"max_norm": 0.5, **self.arguments.get("clip", {})}
        made: dict[str, Callable[[], L.Callback]] = {
            "schedule": lambda: LearningRateScheduler(WarmupCosine(warmup=warmup), **schedule),
            "guard": lambda: StepGuard(
                [NonFinite(), NormSpike(armed=3)], **self.arguments.get("guard", {})
            ),
            "clip": lambda: GradientClipping(NormClip(**clip)),
            "monitor": lambda: OptimizationMonitor(
                **{"every": 1, **self.arguments.get("monitor", {})}
            ),
        }
        if not self.sharded and not self.ramp:
            made["noise"] = lambda: GradientNoiseScale(minimum_updates=2)
        if self.ramp:
            sizes = self.arguments.get("batch", {}).get("sizes", {"0%": 8, "40%": 16})
            made["batch"] = lambda: BatchSizeScheduler(BatchSizeSteps(sizes))
        return [make() for name, make in made.items() if name not in self.without]


class Model(L.LightningModule):
    """A small network; the functions of ``at`` act at update ``AT``."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self._run = run

    def at(self, place: str, value: Any = None) -> Any:
        function = self._run.at.get(place)
        return value if function is None or self.trainer.global_step != AT else function(value)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = self.at("batch", batch)
        return self.at("loss", nn.functional.mse_loss(self.net(x), y))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self._run.validation is not None and self.trainer.global_step:
            self._run.validation(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return self.at("batch start")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.at("before step", optimizer)

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self.trainer.global_step == AT + 1 and "batch end" in self._run.at:
            self._run.at["batch end"](self.trainer)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self._run.lr)


class Loader:
    """A loader whose batches a fault may change."""

    batch_size = ROWS

    def __init__(self, run: Run, rows: Any) -> None:
        self._run, self._rows = run, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._rows)
        return batches if self._run.batches is None else self._run.batches(batches)


def data(run: Run, *, limit: int | None = None) -> Any:
    """Returns the loader of one process; batch n of the two processes has rows of its own."""
    size = run.rows // 2 if limit is None else limit * ROWS
    generator = torch.Generator().manual_seed(run.rank)
    rows = TensorDataset(
        torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator)
    )
    return Loader(run, DataLoader(rows, batch_size=ROWS))


Fault = Callable[[Run], None]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Case:
    """A fault and what it must lead to.

    Args:
        prepare: Changes the run of the second process.
        rejects: The updates that StepGuard must reject, on both processes.
        ends: How the two processes end, as patterns.
        before: Changes the runs of both processes first.
        diverges: Whether the fault itself makes the weights of the processes differ.
    """

    prepare: Fault
    rejects: tuple[int, ...] = ()
    ends: tuple[str, str] = ("finished", "finished")
    before: Fault = field(default=lambda run: None)
    diverges: bool = False


def at(place: str, function: Callable[[Any], Any]) -> Fault:
    """Replaces a value of update ``AT``."""
    return lambda run: run.at.__setitem__(place, function)


def option(**values: Any) -> Fault:
    """Sets arguments of the Trainer."""
    return lambda run: run.options.update(values)


def argument(callback: str, **values: Any) -> Fault:
    """Sets arguments of a callback."""
    return lambda run: run.arguments.__setitem__(callback, values)


def without(*callbacks: str) -> Fault:
    """Removes callbacks."""
    return lambda run: run.without.update(callbacks)


def set_(name: str, value: Any) -> Fault:
    """Sets an attribute of the run."""
    return lambda run: setattr(run, name, value)


def fails(error: BaseException) -> Callable[[Any], Any]:
    def function(value: Any) -> Any:
        raise error

    return function


def sends(number: signal.Signals) -> Callable[[Any], Any]:
    def function(value: Any) -> Any:
        os.kill(os.getpid(), number)
        return value

    return function


def scaled(factor: float) -> Callable[[Any], Any]:
    return lambda batch: [batch[0] * factor, batch[1]]


def slow(value: Any) -> Any:
    time.sleep(1.5)
    return value


def poisons_gradient(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].grad.mul_(NAN)


def ends_early(loaded: Iterator[Any]) -> Iterator[Any]:
    return itertools.islice(loaded, AT)


def goes_on(loaded: Iterator[Any]) -> Iterator[Any]:
    for batch in loaded:
        yield batch
    yield batch
    yield batch


def breaks(loaded: Iterator[Any]) -> Iterator[Any]:
    yield from itertools.islice(loaded, AT)
    raise OSError("the data set is gone")


def advance_clock(run: Run) -> None:
    """Moves the clock of the process by an hour during the run."""
    keep, offset = time.monotonic, [0.0]
    time.monotonic = lambda: keep() + offset[0]  # type: ignore[assignment]

    def move(batch: Any) -> Any:
        offset[0] = 3600.0
        return batch

    run.at["batch"] = move


class Raises(L.Callback):
    """A callback of the user that raises in one hook."""

    def __init__(self, hook: str) -> None:
        def function(trainer: L.Trainer, *arguments: Any) -> None:
            if trainer.global_step == AT:
                raise RuntimeError(f"the user's {hook} failed")

        setattr(self, hook, function)


def raises_in(hook: str) -> Fault:
    return lambda run: run.others.append(Raises(hook))


class PoisonsFirst(L.Callback):
    """A callback of the user that writes NaN into a reduced gradient."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step == AT:
            poisons_gradient(optimizer)


def removes(name: str) -> Callable[[L.Trainer], None]:
    """Takes a callback out of the Trainer's list."""

    def function(trainer: Any) -> None:
        trainer.callbacks[:] = [c for c in trainer.callbacks if type(c).__name__ != name]

    return function


def writes_lr(trainer: L.Trainer) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 0.001


def block_logs(run: Run) -> None:
    """Puts a file in the place of the folder of the logger."""
    (run.folder / f"logs{run.rank}").write_text("a file")


def block_forensics(run: Run) -> None:
    """Puts a file in the place of the folder of the batches of rejected updates."""
    path = run.folder / f"forensics{run.rank}"
    path.write_text("a file")
    run.arguments["guard"] = {"forensics": str(path)}


def both(*parts: Fault) -> Fault:
    def prepare(run: Run) -> None:
        for part in parts:
            part(run)

    return prepare


def on_first(fault: Fault) -> Fault:
    """Applies a fault to the first process instead; use it as ``before``."""
    return lambda run: fault(run) if run.rank == 0 else None


def nothing(run: Run) -> None:
    """No change."""


def scaler(run: Run) -> None:
    """Trains in 16-mixed with a GradScaler."""
    run.options.update(cpu_precision("16-mixed"))


ERROR = ("RuntimeError", "RuntimeError")
EXIT = ("RuntimeError", "SystemExit")
SETTINGS = ("ValueError", "ValueError")
ACCUMULATE = both(option(accumulate_grad_batches=2), set_("rows", 4 * ROWS * UPDATES))

VALIDATES = option(val_check_interval=3)

NUMBERS: dict[str, Case] = {
    "NaN in the inputs": Case(at("batch", scaled(NAN)), (AT,)),
    "inf in the inputs": Case(at("batch", scaled(INF)), (AT,)),
    "NaN in the loss": Case(at("loss", lambda x: x * NAN), (AT,)),
    "loss times 1e4": Case(at("loss", lambda x: x * 1e4), (AT,)),
    "loss overflows to inf": Case(at("loss", lambda x: x * 1e38 * 1e3), (AT,)),
    "loss times 0": Case(at("loss", lambda x: x * 0)),
    "an empty batch": Case(at("batch", lambda b: [b[0][:0], b[1][:0]])),
    "a batch of one row": Case(at("batch", lambda b: [b[0][:1], b[1][:1]])),
    "NaN with accumulation": Case(at("batch", scaled(NAN)), (AT,), before=ACCUMULATE),
    "NaN under a GradScaler": Case(at("loss", lambda x: x * NAN), before=scaler),
    "spike under a GradScaler": Case(at("loss", lambda x: x * 100), (AT,), before=scaler),
    "spike with a batch ramp": Case(
        at("loss", lambda x: x * 1e4), (AT,), before=set_("ramp", value=True)
    ),
    "a slow process": Case(at("batch", slow)),
    "a clock that is an hour late, max_time": Case(
        advance_clock, before=option(max_time={"minutes": 30})
    ),
    "the first clock is an hour late, max_time": Case(
        nothing,
        before=both(option(max_time={"minutes": 30}), on_first(advance_clock)),
    ),
    "a clock that is an hour late, schedule over a time": Case(
        advance_clock, before=argument("schedule", warmup="10 min", budget="30 minutes")
    ),
    "the folder of the logger is a file": Case(block_logs),
    "the folder of the first logger is a file": Case(
        nothing, before=on_first(block_logs), ends=("FileExistsError", "RuntimeError")
    ),
    "the folder of forensics is a file": Case(
        both(block_forensics, at("batch", scaled(NAN))),
        (AT,),
        ends=(r"\w+Error|finished", r"\w+Error|finished"),
    ),
}
STOPS: dict[str, Case] = {
    "training_step raises": Case(at("loss", fails(RuntimeError("of the user"))), ends=ERROR),
    "training_step returns None": Case(at("loss", lambda loss: None), ends=ERROR),
    "on_train_batch_start returns -1": Case(
        at("batch start", lambda value: -1), ends=("RuntimeError", "finished")
    ),
    "the loader raises": Case(set_("batches", breaks), ends=("RuntimeError", "OSError")),
    "validation_step raises": Case(
        set_("validation", fails(RuntimeError("of the user"))), ends=ERROR, before=VALIDATES
    ),
    **{
        f"a callback raises in {hook}": Case(raises_in(hook), ends=ERROR)
        for hook in (
            "on_train_batch_start",
            "on_before_zero_grad",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "on_train_batch_end",
        )
    },
    "sys.exit": Case(at("loss", fails(SystemExit(3))), ends=EXIT),
    "KeyboardInterrupt": Case(at("loss", fails(KeyboardInterrupt())), ends=EXIT),
    "SIGINT": Case(at("batch", sends(signal.SIGINT)), ends=EXIT),
    "SIGTERM": Case(at("batch", sends(signal.SIGTERM)), ends=ERROR),
    "SIGTERM to the first process": Case(
        nothing, before=on_first(at("batch", sends(signal.SIGTERM))), ends=ERROR
    ),
    "SIGKILL": Case(at("batch", sends(signal.SIGKILL)), ends=("RuntimeError", "SIGKILL")),
    "fewer batches than announced": Case(
        set_("batches", ends_early), ends=("RuntimeError", "finished")
    ),
    "more batches than announced": Case(set_("batches", goes_on)),
}
SETTINGS_THAT_DIFFER: dict[str, Case] = {
    "max_norm 1.0 and 2.0": Case(argument("clip", max_norm=2.0), ends=SETTINGS),
    "another warm-up": Case(argument("schedule", warmup=4), ends=SETTINGS),
    "another max_lr": Case(argument("schedule", max_lr=0.01), ends=SETTINGS),
    "another budget": Case(argument("schedule", budget="100 steps"), ends=SETTINGS),
    "other batch sizes": Case(
        argument("batch", sizes={"0%": 8, "60%": 16}),
        ends=SETTINGS,
        before=set_("ramp", value=True),
    ),
    "no StepGuard": Case(without("guard"), ends=SETTINGS),
    "no GradientClipping": Case(without("clip"), ends=SETTINGS),
    "no callback at all": Case(
        without("schedule", "guard", "clip", "monitor", "noise"),
        ends=("ValueError", "RuntimeError"),
    ),
    "no OptimizationMonitor": Case(without("monitor"), ends=SETTINGS),
    "another interval of the monitor": Case(argument("monitor", every=2), ends=SETTINGS),
    "only a monitor, on the first process": Case(
        without("monitor"),
        before=without("schedule", "guard", "clip", "noise"),
        ends=("ValueError", "RuntimeError"),
    ),
    "accumulate_grad_batches=2": Case(option(accumulate_grad_batches=2), ends=SETTINGS),
    "max_steps=3": Case(option(max_steps=3), ends=SETTINGS),
    "max_epochs=2": Case(option(max_epochs=2), ends=SETTINGS),
    "a data set of half the length": Case(set_("rows", ROWS * UPDATES), ends=SETTINGS),
    "a data set of twice the length": Case(set_("rows", 4 * ROWS * UPDATES), ends=SETTINGS),
}
# The fault writes to the weights or learning rates of one process: a bare run diverges.
OUTSIDE: dict[str, Case] = {
    "NaN in a reduced gradient, after the callbacks": Case(
        at("before step", poisons_gradient), diverges=True
    ),
    "NaN in a reduced gradient, before the callbacks": Case(
        lambda run: run.first.append(PoisonsFirst()), diverges=True
    ),
    "the learning rate is written": Case(at("batch end", writes_lr), diverges=True),
    "another learning rate of the optimizer": Case(set_("lr", 0.01), diverges=True),
    "StepGuard is removed during the run": Case(
        at("batch end", removes("StepGuard")), ends=ERROR, diverges=True
    ),
    "GradientClipping is removed during the run": Case(
        at("batch end", removes("GradientClipping")), diverges=True
    ),
}
CASES = {**NUMBERS, **STOPS, **SETTINGS_THAT_DIFFER, **OUTSIDE}
