"""Imports only point down: design rule of the package, read from the source of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_bigopt"


@dataclass(frozen=True)
class Floor:
    """Parts from the lowest to the highest, and the distributions that all of them may import."""

    parts: tuple[str, ...]
    libraries: frozenset[str]
    on_demand: frozenset[str] = frozenset()


TORCH = frozenset({"torch"})
LIGHTNING = TORCH | {"lightning", "torchmetrics", "tensorboard"}
BACKPORTS = frozenset({"typing_extensions"})
OPTIONAL = frozenset({"jinja2", "jsonargparse", "matplotlib", "rich", "shtab", "transformers"})

FLOORS = (
    Floor(("checks", "durations", "schedules"), frozenset()),
    Floor(("parameters", "gradients", "batching", "optimizers"), TORCH),
    Floor(
        (
            "trainer_access",
            "trial_runs",
            "counting",
            "clock",
            "reporting.plots",
            "reporting.tags",
            "reporting.tensorboard",
            "reporting.runs",
            "reporting.charts",
            "reporting.report",
            "controllers",
            "pipeline",
            "callbacks",
            "mixins",
            "tuning",
            "reporting",
            "__init__",
            "examples",
            "cli",
        ),
        LIGHTNING,
        on_demand=OPTIONAL,
    ),
)
# `schedule.as_lr_scheduler(optimizer, horizon)` reads better than a function of three arguments,
# and its caller holds an optimizer, hence has torch. The import waits for that call, so that
# schedules alone still cost no torch. Nothing else may point up, by whatever kind of import.
EXCEPTIONS = frozenset({("schedules.base", f"{PACKAGE}.optimizers.scheduler", "call")})
PARTS = tuple(part for floor in FLOORS for part in floor.parts)
PLANNED = frozenset({"optimizers", "reporting", "tuning"})


def part_of(module: str) -> str:
    """The part that a module below the package belongs to, the most exact one."""
    found = [part for part in PARTS if module == part or module.startswith(f"{part}.")]
    assert found, f"{module} has no place: give it one in FLOORS"
    return max(found, key=len)


def floor_of(part: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if part in floor.parts)


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


@dataclass(frozen=True)
class Import:
    """One imported module: at the top of the file, inside a function, or for types only."""

    target: str
    line: int
    when: str


def imported_by_call(node: ast.AST) -> str:
    """Our module that an ``import_module("…")`` names; a computed name is the user's own."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")):
        return ""
    name = str(getattr(node.args[0], "value", ""))
    return name if name.startswith(f"{PACKAGE}.") else ""


def imports(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, when)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: write the import absolutely"
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", child.lineno, when)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from walk(ast.Module(child.body, []), "types")
                yield from walk(ast.Module(child.orelse, []), when)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, "call" if when == "import" else when)
            elif name := imported_by_call(child):
                yield Import(name, child.lineno, when)
            else:
                yield from walk(child, when)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "import")


def inner_module(target: str) -> str:
    """``lightning_bigopt.a.Name`` → ``a``; a name of the package itself → ``__init__``."""
    names = target.split(".")[1:]
    while names:
        path = ROOT.joinpath(PACKAGE, *names)
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(names)
        names.pop()
    return "__init__"


def arrows_up(name: str, path: Path) -> list[str]:
    source = part_of(name)
    floor = FLOORS[floor_of(source)]
    wrong = []
    for found in imports(path):
        library = found.target.split(".")[0]
        where = f"{name}:{found.line} imports {found.target}"
        if library == PACKAGE:
            target = part_of(inner_module(found.target))
            if found.when == "types":
                if floor_of(target) > floor_of(source):
                    wrong.append(f"{where}, a floor up, even if for types only")
            elif (name, found.target, found.when) in EXCEPTIONS:
                continue
            elif PARTS.index(target) > PARTS.index(source):
                wrong.append(f"{where}: up from {source} to {target}")
        elif not (
            library in sys.stdlib_module_names | floor.libraries
            or (found.when != "import" and library in floor.on_demand)
            or (found.when == "types" and library in BACKPORTS)
        ):
            wrong.append(f"{where}, which does not belong to its floor ({found.when})")
    return wrong


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=modules())
def test_imports_only_point_down(name: str, path: Path):
    assert not arrows_up(name, path)


def test_every_part_exists():
    built = {part_of(name) for name in modules()}
    assert built | PLANNED == set(PARTS)


FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("durations", "import torch"),
        ("schedules.cosine", "from lightning_bigopt.gradients import measure"),
        ("gradients.norms", "def f():\n    import lightning"),
        ("gradients.norms", "from lightning_bigopt import LearningRateScheduler"),
        ("clock", "from lightning_bigopt import pipeline"),
        ("clock", "if True:\n    from lightning_bigopt.callbacks.base import OptimizationCallback"),
        ("callbacks.monitor", "import matplotlib.pyplot"),
        ("schedules.base", "from lightning_bigopt.optimizers.scheduler import ScheduleLR"),
        ("schedules.base", "import_module('lightning_bigopt.optimizers.scheduler')"),
        ("schedules.decays", "def f():\n    import_module('lightning_bigopt.optimizers.fields')"),
        (
            "durations",
            FOR_TYPES + "from lightning_bigopt.clock import Simulate",
        ),
    ],
)
def test_an_arrow_that_points_up_is_found(name: str, source: str, tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert arrows_up(name, path)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("durations", "import math"),
        ("gradients.norms", "import torch\nfrom lightning_bigopt.durations import Duration"),
        ("pipeline", "from lightning_bigopt import clock, trainer_access"),
        ("callbacks.monitor", "def draw():\n    import matplotlib.pyplot"),
        ("schedules.base", "def f():\n    import_module('lightning_bigopt.optimizers.scheduler')"),
        (
            "clock",
            FOR_TYPES + "from lightning_bigopt.pipeline import Pipeline",
        ),
    ],
)
def test_an_arrow_that_points_down_is_not(name: str, source: str, tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert not arrows_up(name, path)
