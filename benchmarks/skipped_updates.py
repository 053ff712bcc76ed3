"""Checks for every optimizer of five libraries that a skipped update changes nothing.

    python benchmarks/skipped_updates.py            # prints the table
    python benchmarks/skipped_updates.py --write    # writes docs/benchmarks/skipped_updates.md

A small model is trained twice: with StepGuard on batches of which some are bad (a gradient of NaN,
infinity or 10⁶ times the size), and on the good batches alone, without callbacks. Weights, states,
fields of parameter groups and attributes of the optimizer are compared to the bit, around each
skipped update and at the end. The optimizers of torch and schedulefree are always tested, the
others if they are installed. ``make bench`` installs them beside the packages of .venv, for this
script only: ``pip install --no-deps --target .venv/optimizers prodigyopt pytorch_optimizer
torchao``.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
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

import lightning as L
import torch
from torch import Tensor, nn

from lightning_bigopt import StepGuard
from lightning_bigopt.gradients import Detector, Verdict

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "skipped_updates.md"
LIBRARIES = ("torch", "schedulefree", "prodigyopt", "pytorch_optimizer", "torchao")
GOOD = 5
BAD = {0: math.nan, 3: 1e6, 4: math.inf}  # by index of the batch
# Attributes that belong to the control of its steps.
SECOND_ORDER = frozenset({"AdaHessian", "SophiaH"})
CONTROL = frozenset({"_bigopt_step_control", "step"})
Build = Callable[[nn.Module], torch.optim.Optimizer]
MANUAL: list[Build] = []


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

    def __init__(self, build: Build) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.build = build
        self.before: Any = None
        self.changed: list[int] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build(self.net)

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if "train_mode" in optimizer.param_groups[0]:
                optimizer.train()

    def backward(self, loss: Tensor) -> None:
        kind = type(self.trainer.optimizers[0]).__name__
        loss.backward(create_graph=kind in SECOND_ORDER)  # type: ignore[no-untyped-call]

    def training_step(self, batch: Tensor) -> Tensor:
        number, factor = int(batch[0]), float(batch[1])
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 4, generator=generator)
        torch.manual_seed(number)  # some optimizers draw random numbers
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
    if id(value) in seen:
        return "seen"
    seen[id(value)] = value  # keeps the object alive, so that no other gets its id
    found: Any
    if isinstance(value, Tensor) and type(value) not in {Tensor, nn.Parameter}:
        # A quantized tensor of torchao.
        found = [contents(getattr(value, name), seen) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        flat = value.detach().contiguous().view(-1)
        found = str(value.dtype), tuple(value.shape), flat.view(torch.uint8).tolist()
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

    def __init__(self, build: Build) -> None:
        super().__init__(build)
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


# ------------------------------------------------------------------------------ the optimizers


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters with two dimensions."""
    return [parameter for parameter in net.parameters() if parameter.ndim == 2]


def muon_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Returns the parameter groups that the Muon of pytorch_optimizer needs."""
    vectors = [parameter for parameter in net.parameters() if parameter.ndim < 2]
    return [
        {"params": matrices(net), "use_muon": True},
        {"params": vectors, "use_muon": False},
    ]


def of_class(kind: Any, **options: Any) -> Build:
    """Returns a function that builds an optimizer of a class for a network."""
    return lambda net: kind(list(net.parameters()), **options)


def catalog() -> Iterator[tuple[str, str, Build]]:
    """Yields library, name and build function of every optimizer that is installed."""
    yield from torch_optimizers()
    for library, optimizers in (
        ("schedulefree", schedulefree_optimizers),
        ("prodigyopt", prodigy_optimizers),
        ("pytorch_optimizer", pytorch_optimizer_optimizers),
        ("torchao", torchao_optimizers),
    ):
        if importlib.util.find_spec(library) is not None:
            for name, build in optimizers():
                yield library, name, build


def torch_optimizers() -> Iterator[tuple[str, str, Build]]:
    """Yields the optimizers of torch, also with other kernels."""
    for name, kind in sorted(vars(torch.optim).items()):
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if name in {"Optimizer", "SparseAdam"}:  # SparseAdam needs sparse gradients
            continue
        if name == "Muon":
            yield "torch", name, lambda net, kind=kind: kind(matrices(net), lr=0.01)
            continue
        options = {"lr": 0.01} if name != "LBFGS" else {"lr": 0.1, "max_iter": 3}
        yield "torch", name, of_class(kind, **options)
        parameters = inspect.signature(kind).parameters
        for kernel in ("foreach", "fused"):
            if kernel in parameters:
                yield "torch", f"{name}({kernel}=True)", of_class(kind, lr=0.01, **{kernel: True})


def schedulefree_optimizers() -> Iterator[tuple[str, Build]]:
    """Yields the optimizers of schedulefree, wrapped ones included."""
    library = importlib.import_module("schedulefree")
    for name in sorted(n for n in vars(library) if n[0].isupper()):
        kind = getattr(library, name)
        if "Wrapper" in name:
            yield name, lambda net, kind=kind: kind(torch.optim.AdamW(net.parameters(), lr=0.01))
        else:
            yield name, of_class(kind, lr=0.01)


def prodigy_optimizers() -> Iterator[tuple[str, Build]]:
    """Yields the optimizer of prodigyopt."""
    yield "Prodigy", of_class(importlib.import_module("prodigyopt").Prodigy)


def pytorch_optimizer_optimizers() -> Iterator[tuple[str, Build]]:
    """Yields the optimizers of pytorch_optimizer, wrappers included."""
    library = importlib.import_module("pytorch_optimizer")
    special: dict[str, Build] = {
        "adammini": library.AdamMini,
        "spectralsphere": lambda net: library.load_optimizer("spectralsphere")(matrices(net)),
        "bsam": of_class(library.BSAM, num_data=GOOD),
        "ranger21": of_class(library.Ranger21, num_iterations=GOOD),
        "magma": lambda net: library.Magma(torch.optim.AdamW(net.parameters())),
    }
    for name in ("muon", "adamuon", "adago", "distributedmuon", "normuon", "muonclip"):
        kind = library.load_optimizer(name)
        special[name] = lambda net, kind=kind: kind(muon_groups(net))
    for name in library.get_supported_optimizers():
        if name not in {"lomo", "adalomo"}:  # they update in the backward pass
            yield name, special.get(name) or of_class(library.load_optimizer(name))
    wrapped = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}
    for name in ("SAM", "LookSAM", "FriendlySAM"):
        MANUAL.append(of_class(getattr(library, name), **wrapped))
        yield name, MANUAL[-1]
    yield "WSAM", lambda net: library.WSAM(net, list(net.parameters()), **wrapped)
    for name in ("Lookahead", "OrthoGrad"):
        kind = getattr(library, name)
        yield name, lambda net, kind=kind: kind(torch.optim.AdamW(net.parameters(), lr=0.01))


def torchao_optimizers() -> Iterator[tuple[str, Build]]:
    """Yields the optimizers of torchao, whose states are quantized tensors."""
    library = importlib.import_module("torchao.optim")
    for name in library.__all__:
        if "Offload" not in name:  # it needs a GPU
            yield name, of_class(getattr(library, name), lr=0.01)


# ------------------------------------------------------------------------------------ the page


def results() -> Iterator[tuple[str, str, str]]:
    """Yields library, name and result of every optimizer: right, a problem, or an error."""
    for library, name, build in catalog():
        new_module = partial(ManualModel if build in MANUAL else Model, build)
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
    others = "".join(
        f"| {library} | {name} | {text.splitlines()[0][:100].replace('|', ' ')} |\n"
        for library, name, text in rows
        if text != "right"
    )
    return f"""\
# Skipped updates of every optimizer

Run with `python benchmarks/skipped_updates.py --write`. A small model is trained on {GOOD} good
and {len(BAD)} bad batches with `StepGuard`, and on the good batches alone without callbacks. A
result is right if no bit of the weights, of the optimizer's state, of its parameter groups and of
its attributes changes in a skipped update, and if both runs end with the same bits. The first bad
batch is the first batch of the run.

| library | optimizers | right |
|---|---|---|
{counts}
Optimizers whose result is not right, or that do not train this model without callbacks either:

| library | optimizer | result |
|---|---|---|
{others}"""


def main() -> None:
    """Prints every result, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.path.append(str(Path(sys.prefix) / "optimizers"))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for library, name, text in results():
        rows.append((library, name, text))
        print(f"{library:18} {name:28} {text}", flush=True)
    if arguments.write:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
