"""Checks what this package promises of an optimizer, for its own and those of six libraries.

    python benchmarks/optimizers.py          # prints the table
    python benchmarks/optimizers.py --write  # writes docs/benchmarks/optimizers.md
    python benchmarks/optimizers.py AdamW    # one optimizer

The contracts and their oracles are in benchmarks/contracts. The optimizers of torch and
schedulefree are always tested, the others if they are installed, as ``make bench`` does it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.contracts import processes
from benchmarks.contracts.catalog import LIBRARIES, compilation, table
from benchmarks.contracts.checks import CHECKS, run_check

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "optimizers.md"
COLUMNS = {  # a short heading for each contract
    "schedule": "schedule",
    "clip": "clip",
    "exact skip": "skip",
    "MaxUpdateRatio": "ratio",
    "batch coupling": "batch",
    "resume": "resume",
    "bf16-mixed": "bf16",
    "2 processes": "DDP",
}
MARKS = {"y": "y", "≈": "≈", "refused": "refused", "own": "own fault", "fault": "**fault**"}
Rows = dict[str, dict[str, str]]


def mark(result: str) -> str:
    """Returns the word of a result that stands in the table."""
    return MARKS[result.partition(":")[0].partition(" ")[0]]


def reasons(rows: Rows, wanted: str) -> str:
    """Returns a list of the notes of results of one kind, each with its optimizers."""
    found: dict[str, list[str]] = {}
    for key, results in rows.items():
        for contract, result in results.items():
            note = result.partition(": ")[2]
            if mark(result) == MARKS[wanted] and note:
                name = key.partition("/")[2]
                note = note.replace(name, "…").replace("|", " ")
                found.setdefault(f"{contract}: {note}", []).append(name)
    whole = {}  # an optimizer that cannot train at all is listed once
    for text, names in found.items():
        contract, _, note = text.partition(": ")
        for name in names:
            whole.setdefault((name, note), []).append(contract)
    grouped: dict[tuple[str, str], list[str]] = {}
    for (name, note), contracts in whole.items():
        columns = [COLUMNS[contract] for contract in contracts]
        where = "all" if len(columns) == len(COLUMNS) else ", ".join(columns)
        grouped.setdefault((where, note), []).append(name)
    return "\n".join(
        f"- {', '.join(names)} ({where}): {note}" for (where, note), names in grouped.items()
    )


def tables(marks: Rows) -> str:
    """Returns a table for each library."""
    heading = f"| optimizer | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}"
    found = []
    for library in LIBRARIES:
        lines = [
            f"| {key.partition('/')[2]} | {' | '.join(row[contract] for contract in COLUMNS)} |"
            for key, row in marks.items()
            if key.partition("/")[0] == library
        ]
        if lines:
            name = f"{library} {version(library.replace('_', '-'))}"
            found.append("\n".join([f"## {name}", "", heading, *lines]))
    return "\n\n".join(found)


def page(marks: Rows, *, refused: str, own: str, rounding: str, faults: str) -> str:
    """Returns the page, from a word for each result and the notes on each kind of result."""
    return f"""\
# Optimizers and contracts

Run with `python benchmarks/optimizers.py --write` on a CPU. Each of {len(marks)} optimizers and
variants trains a regression for 12 updates. One weight has 4096 elements, the size from which
low-bit optimizers quantize their states. Each column compares a run with an independent result:

- **schedule**, `WarmupLinear`: the learning rate of each update is compared with the formula, and
  the weights with a plain loop that writes these learning rates.
- **clip**, `NormClip`: the weights are compared with a plain loop that calls
  `torch.nn.utils.clip_grad_norm_`.
- **skip**, `StepGuard`: weights, states, groups and attributes are compared before and after each
  skipped update, and with a run without the bad batches ({{doc}}`skipped_updates`).
- **ratio**, `MaxUpdateRatio(ratio=0.001)`: the module measures the largest relative change of a
  tensor in a step. It must be at most 0.001, and larger in a run without the rule.
- **batch**, `BatchSizeScheduler` from 8 to 32 samples with `lr_scaling="sqrt"`: the factors on the
  learning rate must be 1 and 2.
- **resume**, with schedule and clipping: a run from a checkpoint in the middle of an epoch is
  compared with the uninterrupted run.
- **bf16**, bf16-mixed with `NormClip`: the weights are compared with a plain loop that uses
  `torch.autocast` and clips.
- **DDP**, two processes with schedule and clipping: the weights of both must be equal to the bit,
  and are compared with one process on the whole batch.

The results are:

- **y**: equal to the bit, or within the limit.
- **≈**: equal up to rounding, because torch's clipping and this package sum the norm in another
  order. Optimizers that amplify rounding are listed with figures below.
- **refused**: an error before the optimizer changes a weight. It names the reason and what to do.
- **own fault**: an error or a difference that a bare Trainer or a plain loop shows, too.
- **fault**: any other error or difference.

`SparseAdam` needs sparse gradients and is left out. Of pytorch_optimizer and bitsandbytes a part is
shown; {{doc}}`skipped_updates` covers more of them. The step of torchao, which compiles itself,
runs uncompiled here. "compiled step" is `torch.compile(optimizer.step)` with the backend "eager",
which traces the step and generates no code.

{tables(marks)}

## Refused

{refused}

## Own faults of the optimizers

{own}

## Amplified rounding

A sign, a quantized state, a difference of gradients, and weights that are rounded to bfloat16
amplify rounding. The first figure is the relative difference of the weights. The second is the
largest difference between plain loops whose thresholds of clipping differ by a few roundings, or
for the column DDP that of a bare Trainer. Less than 30 times the second figure counts as rounding.
Where the second figure is 0.1 or more (LBFGS, soap), the comparison can find only large faults.

{rounding}

## Faults of this package

{faults or "None."}
"""


def page_of(rows: Rows) -> str:
    """Returns the page of the results."""
    return page(
        {key: {c: mark(result) for c, result in row.items()} for key, row in rows.items()},
        refused=reasons(rows, "refused"),
        own=reasons(rows, "own"),
        rounding=reasons(rows, "≈"),
        faults=reasons(rows, "fault"),
    )


def main() -> None:
    """Prints every result, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="optimizers; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    entries = [e for e in table() if not arguments.names or e.name in arguments.names]
    rows: Rows = {}
    for entry in entries:
        with compilation(entry):
            rows[entry.key] = {contract: run_check(entry, contract) for contract in CHECKS}
        marks = [mark(result) for result in rows[entry.key].values()]
        print(f"{entry.key:45} {'  '.join(marks)}", flush=True)
    found = processes.start([entry.key for entry in entries])
    for entry in entries:
        with compilation(entry):
            rows[entry.key]["2 processes"] = processes.compare(entry, found[entry.key])
        print(f"{entry.key:45} 2 processes: {rows[entry.key]['2 processes']}", flush=True)
    text = page_of(rows)
    print(text)
    if arguments.write and not arguments.names:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
