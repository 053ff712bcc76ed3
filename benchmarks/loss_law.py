"""Compares laws of training with measurements: loss curves, and grids of runs.

``--curves FILE`` fits the loss law to three loss curves of each model in a CSV file with the
columns model, schedule, step, learning_rate and loss, and predicts the others. ``--gpt DIR`` trains
the GPT of the demo: pilots, and runs that they predict; DIR keeps the runs.
``--grids FILE`` fits the laws of learning rate and batch to the grids of a CSV file with the
columns parameters, tokens, learning_rate, batch_tokens and loss, and predicts other grids. Without
a file it does so for curves and grids generated from laws.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.laws.curves import FITTED, curves
from benchmarks.laws.gpt import gpt
from benchmarks.laws.grids import grids
from benchmarks.laws.page import PAGE


def main() -> None:
    """Runs the parts that are asked for; all of them on generated data without arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grids", type=Path, metavar="FILE", help="runs on grids, as CSV")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="grids to predict, as CSV")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="loss curves, as CSV")
    parser.add_argument("--fit", nargs="+", default=FITTED, help="schedules of --curves to fit")
    parser.add_argument("--gpt", type=Path, metavar="DIR", help="folder of the runs of the GPT")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the GPT")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}; needs files")
    parser.add_argument("--quick", action="store_true", help="small generated data only")
    arguments = parser.parse_args()
    if arguments.predict is not None and arguments.grids is None:
        parser.error("--predict needs --grids, whose smaller grids are fitted")
    is_generated = arguments.grids is arguments.curves is arguments.gpt is None
    quick, write = arguments.quick, arguments.write
    if write and (is_generated or arguments.predict is not None or quick):
        parser.error("--write needs --curves, --gpt or --grids, without --predict and --quick")
    if arguments.curves is not None or is_generated:
        curves(arguments.curves, fitted=arguments.fit, quick=quick, write=write)
    if arguments.grids is not None or is_generated:
        grids(arguments.grids, arguments.predict, quick=quick, write=write)
    if arguments.gpt is not None:
        gpt(arguments.gpt, seeds=arguments.seeds, quick=quick, write=write)


if __name__ == "__main__":
    main()
