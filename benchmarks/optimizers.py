"""Checks what this package promises of an optimizer, for optimizers of six libraries.

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
from benchmarks.contracts.catalog import LIBRARIES, table
from benchmarks.contracts.checks import CHECKS, run_check

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "optimizers.md"
CONTRACTS = (*CHECKS, "2 processes")
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
        where = "all" if len(contracts) == len(CONTRACTS) else ", ".join(contracts)
        grouped.setdefault((where, note), []).append(name)
    return "\n".join(
        f"- {', '.join(names)} ({where}): {note}" for (where, note), names in grouped.items()
    )


def page(rows: Rows) -> str:
    """Returns the page."""
    used = [library for library in LIBRARIES if any(key.startswith(library) for key in rows)]
    versions = ", ".join(f"{name} {version(name.replace('_', '-'))}" for name in used)
    lines = [
        f"| {key.replace('/', ' | ')} | {' | '.join(mark(r) for r in results.values())} |"
        for key, results in rows.items()
    ]
    return f"""\
# Optimizers and contracts

Run with `python benchmarks/optimizers.py --write` on a CPU ({versions}).
A regression with a weight of 4096 elements, from which on low-bit optimizers quantize, is trained
for 12 updates.

- **schedule**: `WarmupLinear`. The learning rate of each update with the formula, and the weights
  with those of a plain loop that writes these rates.
- **clip**: `NormClip`. The weights with those of a loop with `torch.nn.utils.clip_grad_norm_`.
- **exact skip**: `StepGuard`. Weights, states, groups and attributes: {{doc}}`skipped_updates`.
- **MaxUpdateRatio**: the largest relative change of a tensor in a step, measured outside, with the
  limit of 0.001, which a run without it exceeds.
- **batch coupling**: a batch that grows from 8 to 32 samples with `lr_scaling="sqrt"`. The factors
  on the learning rate with 1 and 2.
- **resume**: a run from a checkpoint in the middle of an epoch with the uninterrupted run, with
  schedule and clipping.
- **bf16-mixed**: the weights with those of a plain loop with `torch.autocast` and clipping.
- **2 processes**: DDP with schedule and clipping. The processes with each other to the bit, and
  with one process on the whole batch.

`y` is equality to the bit, or a bound that holds. `≈` is equality up to rounding: torch's clipping
and this package sum the norm in another order. `refused` is an error before the first update that
names the reason. `own fault` is an error or a difference that a bare Trainer or a plain loop shows,
too. torchao's compiled step runs uncompiled here; "compiled step" is
`torch.compile(optimizer.step)` with the backend "eager", which traces it and generates no code.

| library | optimizer | {" | ".join(CONTRACTS)} |
|---|---|{"---|" * len(CONTRACTS)}
{chr(10).join(lines)}

{len(rows)} optimizers and variants. Refused:

{reasons(rows, "refused")}

Own faults of the optimizers, shown by a bare Trainer or a plain loop:

{reasons(rows, "own")}

These amplify rounding, by a sign, a quantized state, a difference of gradients or weights that are
rounded to bfloat16. The second figure is the largest difference of plain loops whose thresholds
differ by a few roundings:

{reasons(rows, "≈")}

Faults of this package: {reasons(rows, "fault") or "none."}
"""


def main() -> None:
    """Prints every result, and writes the page on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="optimizers; all by default")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    entries = [e for e in table() if not arguments.names or e.name in arguments.names]
    rows: Rows = {}
    for entry in entries:
        rows[entry.key] = {contract: run_check(entry, contract) for contract in CHECKS}
        marks = [mark(result) for result in rows[entry.key].values()]
        print(f"{entry.key:45} {'  '.join(marks)}", flush=True)
    found = processes.start([entry.key for entry in entries])
    for entry in entries:
        rows[entry.key]["2 processes"] = processes.compare(entry, found[entry.key])
        print(f"{entry.key:45} 2 processes: {rows[entry.key]['2 processes']}", flush=True)
    print(page(rows))
    if arguments.write and not arguments.names:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
