"""Runs every scenario on one process of a job and writes the results."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from tests.distributed import (
    batch_scenarios,
    contract_scenarios,
    loader_scenarios,
    package_scenarios,
    scenarios,
)
from tests.older_lightning import accept_weights_only


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    accept_weights_only()
    out, names = Path(sys.argv[1]), sys.argv[2:]
    modules = (
        *(scenarios, batch_scenarios, package_scenarios, loader_scenarios),
        contract_scenarios,
    )
    known = {name: value for module in modules for name, value in vars(module).items()}
    results = {name: known[name](out) for name in names}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
