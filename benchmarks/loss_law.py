"""Compares laws of training with measurements: learning rate and batch on grids of runs.

``--grids FILE`` fits the laws of learning rate and batch to the grids of a CSV file with the
columns parameters, tokens, learning_rate, batch_tokens and loss, and predicts other grids. Without
a file it does so for grids generated from a law.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.laws.grids import grids
from benchmarks.laws.page import PAGE


def main() -> None:
    """Runs the parts that are asked for; all of them on generated data without arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grids", type=Path, metavar="FILE", help="runs on grids, as CSV")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="grids to predict, as CSV")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}; needs --grids")
    parser.add_argument("--quick", action="store_true", help="small generated data only")
    arguments = parser.parse_args()
    if arguments.predict is not None and arguments.grids is None:
        parser.error("--predict needs --grids, whose smaller grids are fitted")
    if arguments.write and (
        arguments.grids is None or arguments.predict is not None or arguments.quick
    ):
        parser.error("--write needs --grids without --predict and --quick")
    grids(arguments.grids, arguments.predict, quick=arguments.quick, write=arguments.write)


if __name__ == "__main__":
    main()
