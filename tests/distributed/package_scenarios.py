"""Runs on two processes under both packages of Lightning, compared by ``test_packages.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_bigopt import (
    GlobalBatchFinder,
    GradientNoiseScale,
    LearningRateRangeTest,
    OptimizationMonitor,
)
from tests.compatibility.lightning_packages import NAMES, logged, module_class, package, plain
from tests.compatibility.runs_of_both_packages import readme
from tests.helpers import QUIET, Regression, full

NAMES_OF_SCENARIOS = ["packages"]


def _shard(self: Any) -> None:
    for layer in (self.net[0], self.net[2]):
        if not hasattr(layer, "set_requires_gradient_sync"):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def _fit(root: Any, folder: Path, strategy: Any, callbacks: list[Any], **members: Any) -> Any:
    module = module_class(root, **members)()
    trainer = root.Trainer(
        **{**QUIET, "logger": root.loggers.TensorBoardLogger(folder, name=None, version="")},
        max_steps=12,
        devices=2,
        strategy=strategy,
        callbacks=callbacks,
        log_every_n_steps=1,
    )
    trainer.fit(module, None if "train_dataloader" in members else loader(module))
    trainer.strategy.barrier()
    state = {
        type(callback).__name__: plain(callback.state_dict(), folder) for callback in callbacks
    }
    return {
        "weights": [full(p.detach()).tolist() for p in module.parameters()],
        "rates": module.rates,
        "states": state,
        "micro": module.micro_batch_size,
        "logged": plain(logged(folder)) if trainer.is_global_zero else {},
    }


def loader(module: Any) -> DataLoader[Any]:
    return DataLoader(Regression(24), batch_size=module.micro_batch_size)


def packages(out: Path) -> Any:
    """Returns the results of each package, with DDP and with FSDP2."""
    return {name: _results(package(name), out / name) for name in NAMES}


def _results(root: Any, out: Path) -> Any:
    ddp = root.strategies.DDPStrategy
    fsdp = root.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    sharded = [c for c in readme() if not isinstance(c, GradientNoiseScale)]
    tested = LearningRateRangeTest(start=1e-4, steps=20, skip=3)
    finder = GlobalBatchFinder(global_batch_size=8, smallest=4)
    found = {
        "ddp": _fit(root, out / "ddp", ddp(), readme()),
        "fsdp2": _fit(root, out / "fsdp2", fsdp, sharded, configure_model=_shard),
        "range test": _fit(root, out / "test", ddp(), [tested, OptimizationMonitor()]),
        "finder": _fit(root, out / "finder", ddp(), [finder], train_dataloader=loader),
    }
    try:
        refused = GlobalBatchFinder(global_batch_size=8)
        fsdp = root.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        _fit(root, out / "refused", fsdp, [refused], configure_model=_shard)
    except ValueError as error:
        found["refused"] = str(error)
    return found
