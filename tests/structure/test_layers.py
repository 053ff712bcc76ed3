"""Layers: a module imports only lower layers, types included; circles, depth and length."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.structure.import_graph import (
    PACKAGE,
    circles,
    graph,
    imports,
    inner_module,
    longest_chain,
    modules,
)

STANDARD_LIBRARY: frozenset[str] = frozenset()
TORCH = frozenset({"torch"})
LIGHTNING = TORCH | {"lightning", "torchmetrics", "tensorboard"}
# Only for types: a backport of the standard library.
FOR_TYPES = frozenset({"typing_extensions"})
# Only inside functions: optional packages.
ON_DEMAND = frozenset(
    {
        *("jinja2", "jsonargparse", "matplotlib", "optuna"),
        *("rich", "scipy", "shtab", "transformers", "yaml"),
    }
)

# From the lowest layer to the highest, each with the distributions that it may import.
LAYERS: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (
        frozenset(
            {
                *("argument_hints", "arguments", "checks", "config_values"),
                *("fabric_hooks", "removed", "type_checks", "version"),
            }
        ),
        STANDARD_LIBRARY,
    ),
    (frozenset({"durations"}), STANDARD_LIBRARY),
    (frozenset({"schedules"}), STANDARD_LIBRARY),
    (frozenset({"parameters"}), TORCH),
    (frozenset({"optimizers"}), TORCH),
    (frozenset({"gradients"}), TORCH),
    (frozenset({"batching"}), TORCH),
    (frozenset({"averaging"}), TORCH),
    (frozenset({"planning"}), TORCH | {"numpy", "scipy"}),  # scipy in functions only
    (frozenset({"trainer_access"}), LIGHTNING),
    (frozenset({"engine"}), LIGHTNING),
    (frozenset({"monitoring"}), LIGHTNING | {"numpy"}),  # which tensorboard needs
    (frozenset({"reporting"}), LIGHTNING),
    (frozenset({"callbacks"}), LIGHTNING),
    (frozenset({"mixins"}), LIGHTNING),
    (frozenset({"tuning"}), LIGHTNING),
    (frozenset({"cli", "examples", "__init__"}), LIGHTNING),
)
NOT_BUILT_YET: frozenset[str] = frozenset()
# Lightning's classes that a module may import otherwise than for types: the base of callbacks,
# and names in annotations. Objects are checked against, and made from, the classes of the Trainer's
# own package.
BASE_CLASSES = frozenset({"Callback", "LightningModule", "Trainer"})
CHECKS = ("isinstance", "issubclass", "check_instance", "find_callback")
# These modules make a Trainer of their own.
OWN_TRAINER = frozenset({"cli", "examples"})


def layer_of(module: str) -> int:
    part = module.split(".", maxsplit=1)[0]
    found = [number for number, (parts, _) in enumerate(LAYERS) if part in parts]
    assert found, f"{module} has no layer: add it to LAYERS"
    return found[0]


def forbidden_imports(name: str, path: Path) -> list[str]:
    line = layer_of(name)
    libraries, wrong = LAYERS[line][1], []
    for found in imports(path):
        library = found.target.split(".")[0]
        where = f"{name}:{found.line} imports {found.target}"
        if library == PACKAGE:
            target = inner_module(found.target)
            if layer_of(target) > line:
                wrong.append(f"{where}, a higher layer ({found.when})")
        elif not (
            library in sys.stdlib_module_names | libraries
            or (found.when != "import" and library in ON_DEMAND and libraries >= LIGHTNING)
            or (found.when == "types" and library in FOR_TYPES)
        ):
            wrong.append(f"{where}, which its layer may not import ({found.when})")
    return wrong


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=modules())
def test_module_imports_only_lower_layers(name: str, path: Path):
    assert not forbidden_imports(name, path)


def test_every_layer_is_listed():
    built = {name.split(".")[0] for name in modules()}
    assert built | NOT_BUILT_YET == frozenset().union(*(parts for parts, _ in LAYERS))


def test_no_modules_import_each_other():
    assert not circles(graph())


def test_longest_chain_of_imports_is_limited():
    chain = longest_chain(graph())
    assert len(chain) <= 16, " → ".join(chain)


def test_circle_is_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(edges) == [["b", "c"]]
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=modules())
def test_module_is_not_too_long(name: str, path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320


def classes_of_lightning(path: Path) -> set[str]:
    """Returns the classes of Lightning that a module imports to use them, not for types."""
    names = {
        found.target.rpartition(".")[2]
        for found in imports(path)
        if found.target.startswith("lightning.") and found.when != "types"
    }
    return {name for name in names if name.lstrip("_")[0].isupper()}


def checks_of_classes(path: Path) -> list[str]:
    """Returns the checks and handlers in a module that name a class of Lightning itself."""
    kinds, found = classes_of_lightning(path), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(CHECKS):
            parts: list[ast.AST] = list(node.args)
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            parts = [node.type]
        else:
            continue
        names = {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}
        found += [f"line {node.lineno}: {name}" for name in sorted(names & kinds)]
    return found


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=modules())
def test_classes_of_lightning_come_from_the_package_of_the_trainer(name: str, path: Path):
    if name.split(".", maxsplit=1)[0] in OWN_TRAINER:
        return
    advice = "use classes(...) or own(...) of trainer_access/packages.py"
    assert classes_of_lightning(path) <= BASE_CLASSES, advice
    assert not checks_of_classes(path), advice


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.callbacks import Timer\nisinstance(x, Timer)",
        "from lightning.pytorch.callbacks import Timer",
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "def f():\n    from lightning.pytorch.loggers import CSVLogger",
    ],
)
def test_a_class_of_one_package_is_found(source: str, tmp_path: Path):
    (tmp_path / "module.py").write_text(source)
    assert classes_of_lightning(tmp_path / "module.py") - BASE_CLASSES


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(x, Callback)",
        "issubclass(x, (str, Callback))",
        "check_instance('x', x, Callback | None)",
        "try:\n    f()\nexcept (ValueError, Callback):\n    raise",
    ],
)
def test_a_check_against_a_class_of_one_package_is_found(source: str, tmp_path: Path):
    imported = "from lightning.pytorch import Callback\n"
    (tmp_path / "module.py").write_text(imported + source)
    assert checks_of_classes(tmp_path / "module.py")


TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("durations", "import torch"),
        ("schedules.decays", "from lightning_bigopt.gradients import measure"),
        ("gradients.gradient_norms", "def f():\n    import lightning"),
        ("gradients.gradient_norms", "from lightning_bigopt import LearningRateScheduler"),
        ("engine.clock", "from lightning_bigopt.callbacks import monitor"),
        ("engine.clock", "if True:\n    from lightning_bigopt.tuning.curve import RangeTest"),
        ("callbacks.monitor", "import matplotlib.pyplot"),
        ("schedules.base", "import_module('lightning_bigopt.optimizers.lr_scheduler')"),
        ("durations.horizon", TYPES + "from lightning_bigopt.engine.budget import Simulate"),
        ("engine.stage", TYPES + "from lightning_bigopt.callbacks.monitor import XAxis"),
    ],
)
def test_forbidden_import_is_found(name: str, source: str, tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert forbidden_imports(name, path)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("durations", "import math"),
        ("gradients.measure", "import torch\nfrom lightning_bigopt.durations import Duration"),
        ("engine.clock", "from lightning_bigopt.trainer_access import loop"),
        ("callbacks.monitor", "def draw():\n    import matplotlib.pyplot"),
        ("callbacks.monitor", TYPES + "from lightning_bigopt.engine.stage import Fit"),
    ],
)
def test_allowed_import_is_accepted(name: str, source: str, tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert not forbidden_imports(name, path)
