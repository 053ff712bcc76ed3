"""Optimizers of this package, torch and five other libraries, as functions that build them.

Those of libraries that are not installed are left out. ``make bench`` installs them beside the
packages of .venv, for the benchmarks only.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_bigopt import optimizers

__all__ = ["LIBRARIES", "Build", "Entry", "catalog", "compilation", "of_class", "table"]

LIBRARIES = (
    *("lightning_bigopt", "torch", "schedulefree", "prodigyopt", "pytorch_optimizer", "torchao"),
    "bitsandbytes",
)
UPDATES = 5  # some optimizers ask for the length of the run
Build = Callable[[nn.Module], Any]

sys.path.append(str(Path(sys.prefix) / "optimizers"))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An optimizer, and how a module must call it."""

    library: str
    name: str
    build: Build
    is_manual: bool = False  # computes gradients before the step, which needs manual optimization
    second_order: bool = False  # needs backward(create_graph=True)
    is_variant: bool = False  # another kernel, or another form of an argument

    @property
    def key(self) -> str:
        """Library and name."""
        return f"{self.library}/{self.name}"


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters with two dimensions."""
    return [parameter for parameter in net.parameters() if parameter.ndim == 2]


def of_class(kind: Any, **options: Any) -> Build:
    """Returns a function that builds an optimizer of a class for a network."""
    return lambda net: kind(list(net.parameters()), **options)


@contextmanager
def compilation(entry: Entry) -> Iterator[None]:
    """Runs the compiled step of torchao as it is; it takes long to compile. Others are compiled."""
    with torch.compiler.set_stance("force_eager" if entry.library == "torchao" else "default"):
        yield


def catalog() -> Iterator[Entry]:
    """Yields every optimizer that is installed."""
    if hasattr(optimizers, "muon_adamw"):
        build = partial(optimizers.muon_adamw, lr=0.01)
        yield Entry(library="lightning_bigopt", name="muon_adamw", build=build)
    yield from torch_optimizers()
    for library, entries in (
        ("schedulefree", schedulefree_optimizers),
        ("prodigyopt", prodigy_optimizers),
        ("pytorch_optimizer", pytorch_optimizer_optimizers),
        ("torchao", torchao_optimizers),
        ("bitsandbytes", bitsandbytes_optimizers),
    ):
        if importlib.util.find_spec(library) is not None:
            yield from entries()


def torch_optimizers() -> Iterator[Entry]:
    """Yields the optimizers of torch, also with other kernels and forms of arguments."""
    new = partial(Entry, library="torch")
    for name, kind in sorted(vars(torch.optim).items()):
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if name in {"Optimizer", "SparseAdam"}:  # SparseAdam needs sparse gradients
            continue
        if name == "Muon":
            yield new(name=name, build=lambda net, kind=kind: kind(matrices(net), lr=0.01))
            continue
        options = {"lr": 0.01} if name != "LBFGS" else {"lr": 0.1, "max_iter": 3}
        yield new(name=name, build=of_class(kind, **options))
        parameters = inspect.signature(kind).parameters
        for kernel in ("foreach", "fused", "capturable", "differentiable"):
            if kernel in parameters:
                build = of_class(kind, lr=0.01, **{kernel: True})
                yield new(name=f"{name}({kernel}=True)", build=build, is_variant=True)
        if name in {"Adam", "AdamW", "SGD"}:
            for options in ({}, {"fused": True}):
                text = ", ".join(["lr=tensor", *(f"{key}=True" for key in options)])
                build = partial(with_tensor_rate, kind, **options)
                yield new(name=f"{name}({text})", build=build, is_variant=True)
            yield new(name=f"{name}, compiled step", build=partial(compiled, kind), is_variant=True)


def with_tensor_rate(kind: Any, net: nn.Module, **options: Any) -> Any:
    """Builds an optimizer whose learning rate is a tensor."""
    return kind(list(net.parameters()), lr=torch.tensor(0.01), **options)


def compiled(kind: Any, net: nn.Module) -> Any:
    """Builds an optimizer whose step is compiled; "eager" traces it without generating code."""
    torch.compiler.reset()  # torch stops compiling a function after a number of versions
    optimizer = kind(list(net.parameters()), lr=torch.tensor(0.01))
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    return optimizer


def schedulefree_optimizers() -> Iterator[Entry]:
    """Yields the optimizers of schedulefree, wrapped ones included."""
    library = import_module("schedulefree")
    for name in sorted(n for n in vars(library) if n[0].isupper()):
        kind = getattr(library, name)
        build = of_class(kind, lr=0.01)
        if "Wrapper" in name:
            build = partial(wrapped_adamw, kind)
        yield Entry(library="schedulefree", name=name, build=build)


def wrapped_adamw(kind: Any, net: nn.Module) -> Any:
    """Builds a class that contains another optimizer, here AdamW."""
    return kind(torch.optim.AdamW(net.parameters(), lr=0.01))


def prodigy_optimizers() -> Iterator[Entry]:
    """Yields the optimizer of prodigyopt."""
    build = of_class(import_module("prodigyopt").Prodigy)
    yield Entry(library="prodigyopt", name="Prodigy", build=build)


def muon_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Returns the parameter groups that the Muon of pytorch_optimizer needs."""
    vectors = [parameter for parameter in net.parameters() if parameter.ndim < 2]
    return [
        {"params": matrices(net), "use_muon": True},
        {"params": vectors, "use_muon": False},
    ]


def pytorch_optimizer_optimizers() -> Iterator[Entry]:
    """Yields the optimizers of pytorch_optimizer, wrappers included."""
    library = import_module("pytorch_optimizer")
    new = partial(Entry, library="pytorch_optimizer")
    special: dict[str, Build] = {
        "adammini": partial(library.AdamMini, lr=0.01),  # its default of 1 diverges
        "spectralsphere": lambda net: library.load_optimizer("spectralsphere")(matrices(net)),
        "bsam": of_class(library.BSAM, num_data=UPDATES),
        "ranger21": of_class(library.Ranger21, num_iterations=UPDATES),
        "magma": lambda net: library.Magma(torch.optim.AdamW(net.parameters())),
    }
    for name in ("muon", "adamuon", "adago", "distributedmuon", "normuon", "muonclip"):
        kind = library.load_optimizer(name)
        special[name] = lambda net, kind=kind: kind(muon_groups(net))
    for name in library.get_supported_optimizers():
        if name not in {"lomo", "adalomo"}:  # they update in the backward pass
            build = special.get(name) or of_class(library.load_optimizer(name))
            yield new(name=name, build=build, second_order=name in {"adahessian", "sophiah"})
    wrapped = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}
    for name in ("SAM", "LookSAM", "FriendlySAM"):
        yield new(name=name, build=of_class(getattr(library, name), **wrapped), is_manual=True)
    yield new(
        name="WSAM",
        build=lambda net: library.WSAM(net, list(net.parameters()), **wrapped),
    )
    for name in ("Lookahead", "OrthoGrad"):
        yield new(name=name, build=partial(wrapped_adamw, getattr(library, name)))


def torchao_optimizers() -> Iterator[Entry]:
    """Yields the optimizers of torchao, whose states are quantized tensors."""
    library = import_module("torchao.optim")
    for name in library.__all__:
        if "Offload" not in name:  # it needs a GPU
            build = of_class(getattr(library, name), lr=0.01)
            yield Entry(library="torchao", name=name, build=build)


def bitsandbytes_optimizers() -> Iterator[Entry]:
    """Yields the optimizers of bitsandbytes; the paged ones are the others on a CPU."""
    library = import_module("bitsandbytes").optim
    for name in sorted(n for n in vars(library) if n[0].isupper()):
        if name == "GlobalOptimManager" or name.startswith("Paged"):
            continue
        momentum = {"momentum": 0.9} if name.startswith(("SGD", "LARS", "PytorchLARS")) else {}
        rate = 1e-3 if name.startswith("RMSprop") else 0.01
        build = of_class(getattr(library, name), lr=rate, **momentum)
        yield Entry(library="bitsandbytes", name=name, build=build)


# The rows of the table of contracts. Others behave as one of these.
CHOSEN = {
    "pytorch_optimizer": (
        *(
            "adabelief",
            "adafactor",
            "adan",
            "adopt",
            "adahessian",
            "ademamix",
            "came",
            "dadaptadam",
        ),
        *(
            "kron",
            "lamb",
            "lars",
            "lion",
            "madgrad",
            "mars",
            "muon",
            "novograd",
            "ranger21",
            "soap",
        ),
        *("sophiah", "shampoo", "tiger", "SAM", "WSAM", "Lookahead"),
    ),
    "bitsandbytes": (
        *("Adam8bit", "AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Adagrad8bit", "LAMB8bit"),
        *("Lion8bit", "RMSprop8bit", "SGD8bit"),
    ),
}


def table() -> Iterator[Entry]:
    """Yields the optimizers of the table of contracts.

    Those of pytorch_optimizer and bitsandbytes are a selection, and variants of other classes than
    AdamW and SGD are left out unless they are fused.
    """
    for entry in catalog():
        chosen = CHOSEN.get(entry.library)
        kinds = ("AdamW", "SGD")
        other_kernel = entry.is_variant and not entry.name.startswith(kinds)
        if other_kernel and "fused" not in entry.name:
            continue
        if chosen is None or entry.name in chosen:
            yield entry
