"""Measures the structure of the code: imports, files that run in a step, comments, types.

``python benchmarks/structure.py`` prints the figures of this checkout; ``--write`` regenerates
docs/benchmarks/structure.md. ``PYTHONPATH=<other checkout>`` measures another checkout.
"""

from __future__ import annotations

import argparse
import ast
import io
import logging
import sys
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_bigopt
from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Cosine,
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    WarmupStableDecay,
)

# After the imports above: the tests' tools are of this checkout, the package may be another's.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.structure.import_graph import circles, graph, longest_chain, modules
from tests.structure.traced_fit import fit_trace, step_trace

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "structure.md"
PACKAGE = Path(lightning_bigopt.__file__).parent


def schedule() -> list[L.Callback]:
    """A LearningRateScheduler alone."""
    return [LearningRateScheduler(Cosine())]


def composed_schedule() -> list[L.Callback]:
    """A LearningRateScheduler alone, whose schedule is composed of others."""
    return [LearningRateScheduler(WarmupStableDecay(warmup="20%", decay="20%"))]


def schedule_and_clipping() -> list[L.Callback]:
    """With clipping by the global norm."""
    return [*composed_schedule(), GradientClipping(NormClip(max_norm=1.0))]


def readme() -> list[L.Callback]:
    """The list in README.md."""
    return [
        *schedule_and_clipping(),
        BatchSizeScheduler(BatchSizeSteps({"0%": 8, "50%": 16})),
        OptimizationMonitor(),
    ]


def figures() -> dict[str, str]:
    """Returns every figure by its description."""
    root = PACKAGE.parent
    paths, edges = list(modules(root).values()), graph(root)
    sources = [path.read_text(encoding="utf-8") for path in paths]
    lengths = [len(source.splitlines()) for source in sources]
    total, comments = sum(lengths), sum(map(comment_lines, sources))
    functions = [f for source in sources for f in functions_of(ast.parse(source))]
    typed = sum(map(is_typed, functions))
    circular = circles(edges)
    found = {
        "modules": f"{len(paths)}",
        "lines": f"{total:,}",
        "import circles, types included": ", ".join(f"{len(c)} modules" for c in circular) or "0",
        "longest chain of imports": "endless" if circular else f"{len(longest_chain(edges))}",
        "modules over 320 lines": f"{sum(length > 320 for length in lengths)}",
        "longest module": f"{max(lengths)} lines",
        "typed functions": f"{100 * typed / len(functions):.1f} %",
        "lines that hold a comment": f"{100 * comments / total:.1f} %",
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, callbacks in (
            ("LearningRateScheduler(Cosine()) alone", schedule),
            ("LearningRateScheduler(WarmupStableDecay()) alone", composed_schedule),
            ("WarmupStableDecay and NormClip", schedule_and_clipping),
            ("the README's list", readme),
        ):
            logger = TensorBoardLogger(folder) if callbacks is readme else False
            trace = step_trace(PACKAGE, callbacks, logger=logger)
            found[f"files that run in a step, {name}"] = f"{len(trace.files)}"
            found[f"deepest call chain in a step, {name}"] = f"{len(trace.chain)}"
        files = fit_trace(PACKAGE, schedule).files
        found["files that run in a whole fit, LearningRateScheduler(Cosine()) alone"] = (
            f"{len(files)}"
        )
    return found


def comment_lines(source: str) -> int:
    """Counts the lines that hold a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Returns whether every parameter and the result has a type."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return function.returns is not None and all(
        a.annotation is not None or a.arg in {"self", "cls"} for a in named
    )


def page(table: str) -> str:
    """Returns the page with the table."""
    return f"""# Structure of the code

{table}

A step is traced from one batch to the next, in the middle of a fit, without logging; files and
calls of other libraries are not counted. A file counts as run in a fit if one of its functions was
called. `tests/structure` asserts the limits: no circle, a chain of at most 16 imports, at most 7
files in a step with LearningRateScheduler alone, at most 320 lines in a module.

Regenerate this page with `python benchmarks/structure.py --write`.
"""


def main() -> None:
    """Prints the table, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [f"| {name} | {value} |" for name, value in figures().items()]
    table = "\n".join(["| | |", "|---|---|", *rows])
    print(table)
    if arguments.write:
        PAGE.write_text(page(table), encoding="utf-8")


if __name__ == "__main__":
    main()
