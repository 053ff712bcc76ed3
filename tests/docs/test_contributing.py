"""CONTRIBUTING.md: its paths exist, its tables match the code, and its capability runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bigopt
from lightning_bigopt import OptimizationMonitor
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Stages
from lightning_bigopt.reporting.runs import read_run
from tests.structure.test_layers import LAYERS, NOT_BUILT_YET

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def named_paths() -> list[str]:
    quoted = [name for name in re.findall(r"`([^`\n]+)`", PROSE) if not re.search(r"[ (<]", name)]
    paths = [name for name in quoted if "/" in name or re.search(r"\.(py|md|txt|cff)$", name)]
    return sorted({path for path in paths if "NN_" not in path})


@pytest.mark.parametrize("path", named_paths())
def test_every_path_exists(path: str):
    in_table = ROOT / "lightning_bigopt"  # the table of packages names modules of its rows
    assert (ROOT / path).exists() or any(in_table.glob(f"*/{path}"))


def test_there_are_paths_to_check():
    assert len(named_paths()) > 25


def test_the_table_of_packages_has_the_lines_of_the_layer_test():
    rows = re.findall(r"^\| (`[^|]*) \|.*\|$", section("Architecture"), re.MULTILINE)
    tabled = [frozenset(re.findall(r"`(\w+)`", row)) for row in rows]
    lines = [parts - {"__init__"} for parts, _ in LAYERS if not parts <= NOT_BUILT_YET]
    assert tabled == lines


def test_the_table_of_ranks_holds_every_capability():
    rows = re.findall(r"^\| ([\d, ]+) \| (.*) \|$", section("How a step runs"), re.MULTILINE)
    tabled = {
        name: int(rank)
        for ranks, names in rows
        for rank, name in zip(ranks.split(", "), re.findall(r"`(\w+)`", names), strict=True)
    }
    public = [getattr(lightning_bigopt, name) for name in lightning_bigopt.__all__]
    found = [c for c in public if isinstance(c, type) and issubclass(c, Capability)]
    assert tabled == {capability.__name__: capability.rank for capability in found}


def test_the_stages_that_are_named_exist():
    quoted = re.findall(r"`([a-z_]+)(?:\(\))?`", section("How a step runs"))
    hooks = {name for name in quoted if name.startswith("on_")}
    stages = set(quoted) - hooks - {"rank", "callbacks"}
    assert len(stages) > 15
    assert {name for name in stages if not callable(getattr(Stages, name, None))} == set()
    assert {name for name in hooks if not hasattr(L.Callback, name)} == set()


class Model(L.LightningModule):
    """Records the ratio that the capability must log, by plain torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.ratios: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(self.net.parameters())
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in parameters])
        self.ratios.append(float(gradient.norm() / weights.norm()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("others", [[], [OptimizationMonitor(layers=None)]])
def test_the_capability_of_the_page_is_short_and_runs(others: list[L.Callback], tmp_path: Path):
    page = section("How to add a capability")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    (name,) = [node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    module, logger = Model(), CSVLogger(str(tmp_path), name="", version="run")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[namespace[name](), *others],
    )
    data = TensorDataset(torch.randn(8, 4), torch.randn(8, 3))
    trainer.fit(module, DataLoader(data, batch_size=4))
    logger.save()
    logged = read_run(logger.log_dir).curves["grad_norm/relative"]
    assert [step for step, _ in logged] == [0, 1]
    assert [value for _, value in logged] == pytest.approx(module.ratios, rel=1e-5)
