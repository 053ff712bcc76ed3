"""Checks for the optimizers of seven libraries that a skipped update changes nothing.

    python benchmarks/skipped_updates.py            # prints the table
    python benchmarks/skipped_updates.py --write    # writes docs/benchmarks/skipped_updates.md

A small model is trained twice: with StepGuard on batches of which some are bad (a gradient of NaN,
infinity or 10⁶ times the size), and on the good batches alone, without callbacks. Weights, states,
fields of parameter groups and attributes of the optimizer are compared to the bit, around each
skipped update and at the end. The optimizers of torch and schedulefree are always tested, the
others if they are installed. ``make bench`` installs them beside the packages of .venv, for the
benchmarks only.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.contracts.catalog import LIBRARIES, Build, catalog
from benchmarks.contracts.training import seed_
from lightning_bigopt import StepGuard
from lightning_bigopt.gradients import Detector, Verdict

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "skipped_updates.md"
GOOD = 5
BAD = {0: math.nan, 3: 1e6, 4: math.inf}  # by index of the batch
# Attributes that belong to the control of its steps.
CONTROL = frozenset({"_bigopt_step_control", "step"})


# ------------------------------------------------------------------------------- the two runs


@dataclass(frozen=True)
class LargeNorm(Detector):
    """Rejects norms above a limit, and norms that are not finite."""

    def check(self, value: float, state: dict[str, Any]) -> Verdict | None:
        if value <= 1e3:
            return None
        return Verdict(
            detector="LargeNorm", quantity="norm", value=value, limit=1e3, reason="a large norm"
        )

    def accept(self, value: float, state: dict[str, Any]) -> None: ...

    def reject(self, value: float, state: dict[str, Any]) -> None: ...


class Model(L.LightningModule):
    """Two linear layers; compares the optimizer around the updates of bad batches."""

    def __init__(self, build: Build, *, second_order: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        # The states of a tensor with 4096 elements are quantized by low-bit optimizers.
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4))
        self.build, self.second_order = build, second_order
        self.before: Any = None
        self.changed: list[int] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build(self.net)

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if "train_mode" in optimizer.param_groups[0]:
                optimizer.train()

    def on_train_end(self) -> None:
        for optimizer in self.trainer.optimizers:
            if "train_mode" in optimizer.param_groups[0]:
                optimizer.eval()

    def backward(self, loss: Tensor) -> None:
        loss.backward(create_graph=self.second_order)  # type: ignore[no-untyped-call]

    def training_step(self, batch: Tensor) -> Tensor:
        number, factor = int(batch[0]), float(batch[1])
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 4, generator=generator)
        seed_(number)
        return (self.net(x) - x.roll(1, 1)).square().mean() * factor

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.before = None if batch[1] == 1 else self.everything()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.before is not None and self.before != self.everything():
            self.changed.append(batch_idx)

    def everything(self) -> Any:
        """Returns weights and the contents of the optimizer as comparable values."""
        weights = [contents(p.detach(), {}) for p in self.parameters()]
        return weights, contents(vars(self.trainer.optimizers[0]), {})


def contents(value: Any, seen: dict[int, Any]) -> Any:
    """Returns the bits of all tensors, numbers and containers in a value, recursively."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, types.FunctionType | types.MethodType | type):
        return type(value).__name__
    # A run without callbacks shares a learning-rate tensor between the group and the defaults.
    if id(value) in seen and not isinstance(value, Tensor):
        return "seen"
    seen[id(value)] = value  # keeps the object alive, so that no other gets its id
    found: Any
    if isinstance(value, Tensor) and type(value) not in {Tensor, nn.Parameter}:
        # A quantized tensor of torchao.
        found = [contents(getattr(value, name), seen) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        flat = value.detach().contiguous().view(-1)
        found = str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        found = [
            (k if isinstance(k, str) else type(k).__name__, contents(v, seen))
            for k, v in value.items()
            if k not in CONTROL
        ]
    elif isinstance(value, list | tuple | set | frozenset):
        found = [contents(item, seen) for item in value]
    else:
        found = type(value).__name__, contents(getattr(value, "__dict__", {}), seen)
    return found


class ManualModel(Model):
    """Computes gradients before the step, too, as SAM of pytorch_optimizer needs it."""

    def __init__(self, build: Build, *, second_order: bool = False) -> None:
        super().__init__(build, second_order=second_order)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = super(ManualModel, self).training_step(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        closure()
        optimizer.step(closure)


def fit(
    module: Model, batches: list[tuple[int, float]], *callbacks: L.Callback, **options: Any
) -> Model:
    """Trains on batches of a number and a factor on the loss."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        **options,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(map(torch.tensor, batches)), None))
    return module


def problem(
    new_module: Callable[[], Model],
    *,
    bad: Mapping[int, float] = BAD,
    options: Callable[[], dict[str, Any]] = dict,
) -> str:
    """Returns what a skipped update changes; empty if nothing.

    Args:
        new_module: Makes the module of a run.
        bad: Factor on the loss of the bad batches, by index.
        options: Makes further arguments of a Trainer.
    """
    numbered = [(index, bad.get(index, 1.0)) for index in range(GOOD + len(bad))]
    good = [pair for pair in numbered if pair[1] == 1.0]
    plain = fit(new_module(), good, **options())
    guard = StepGuard([LargeNorm()])
    guarded = fit(new_module(), numbered, guard, **options())
    rejected = [update.update for update in guard.rejections]
    if rejected != list(bad):
        return f"rejected updates {rejected}, not {list(bad)}"
    if guarded.changed:
        return f"the skipped updates {guarded.changed} change the optimizer or the weights"
    if guarded.everything() != plain.everything():
        return "the run does not equal the run without the bad batches"
    return ""


# ------------------------------------------------------------------------------------ the page


def results() -> Iterator[tuple[str, str, str]]:
    """Yields library, name and result of every optimizer: right, a problem, or an error."""
    for entry in catalog():
        library, name = entry.library, entry.name
        kind = ManualModel if entry.is_manual else Model
        new_module = partial(kind, entry.build, second_order=entry.second_order)
        try:
            fit(new_module(), [(number, 1.0) for number in range(2)])
        except Exception as error:  # noqa: BLE001 - some need more arguments, or another device
            yield library, name, f"does not train: {type(error).__name__}: {error}"
            continue
        try:
            found = problem(new_module)
        except Exception as error:  # noqa: BLE001 - the table shows it
            found = f"{type(error).__name__}: {error}"
        yield library, name, found or "right"


def page(rows: list[tuple[str, str, str]]) -> str:
    """Returns the page with the counts, and a row for each result that is not right."""
    tested = [row for row in rows if not row[2].startswith("does not train")]
    counts = ""
    for library in LIBRARIES:
        own = [row for row in tested if row[0] == library]
        if own:
            right = sum(row[2] == "right" for row in own)
            counts += f"| {library} {version(library.replace('_', '-'))} | {len(own)} | {right} |\n"
    grouped: dict[tuple[str, str], list[str]] = {}
    for library, name, text in rows:
        if text != "right":
            line = text.splitlines()[0][:100].replace("|", " ")
            grouped.setdefault((library, line), []).append(name)
    others = "".join(
        f"| {library} | {', '.join(names)} | {text} |\n"
        for (library, text), names in grouped.items()
    )
    return f"""\
# Skipped updates of every optimizer

Run with `python benchmarks/skipped_updates.py --write`. A small model is trained on {GOOD} good
and {len(BAD)} bad batches with `StepGuard`, and on the good batches alone without callbacks. A
result is right if no bit of the weights, of the optimizer's state, of its parameter groups and of
its attributes changes in a skipped update, and if both runs end with the same bits. The first bad
batch is the first batch of the run.

| library | optimizers and variants | right |
|---|---|---|
{counts}
Not counted above are optimizers that do not train this model without callbacks either. They and
those whose result is not right are:

| library | optimizers | result |
|---|---|---|
{others}"""


def main() -> None:
    """Prints every result, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for library, name, text in results():
        rows.append((library, name, text))
        print(f"{library:18} {name:28} {text}", flush=True)
    if arguments.write:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
