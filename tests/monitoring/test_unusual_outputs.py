"""Activations of outputs that cannot be measured, of parameters, and of shared and silent parts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import OptimizationMonitor
from lightning_bigopt.monitoring.activations import ActivationMonitor, chosen_modules
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from tests.helpers import fit, loader
from tests.monitoring.helpers import Blocks


class Gives(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def measured(module: nn.Module, run: Callable[[], Any], **patterns: str) -> dict[str, float]:
    monitor = ActivationMonitor(patterns)
    monitor.start(module)
    monitor.attach()
    run()
    monitor.detach()
    values = MetricBuffer()
    monitor.add_values(into=values)
    return values.fetch()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.nested.nested_tensor([x[0], x[0, :1]], layout=torch.jagged),
        lambda x: x.to("meta"),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.long(),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_other_tensors_are_not_measured(make: Any) -> None:
    module = nn.ModuleDict({"part": Gives(make)})
    assert measured(module, lambda: module["part"](torch.ones(2, 3)), part="part") == {}


def test_calls_within_torch_func_are_not_measured() -> None:
    module = nn.ModuleDict({"part": nn.Linear(3, 2)})
    x = torch.ones(4, 3)

    def run() -> None:
        torch.func.vmap(module["part"])(x)
        torch.func.jacrev(module["part"])(x[0])

    assert measured(module, run, part="part") == {}
    assert "activations/rms/part" in measured(module, lambda: module["part"](x), part="part")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_left_out() -> None:
    scripted: Any = torch.jit.script(nn.Linear(3, 3))
    module = nn.ModuleDict({"scripted": scripted, "plain": nn.Linear(3, 3)})
    assert [label for label, _ in chosen_modules(module, "blocks")] == ["plain"]


def test_a_shared_module_may_be_named_by_each_of_its_names() -> None:
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": shared, "b": shared})
    assert [label for label, _ in chosen_modules(module, {"x": "b"})] == ["x"]
    assert [label for label, _ in chosen_modules(module, {"x": "b", "y": "a"})] == ["y"]
    assert len(chosen_modules(module, "blocks")) == 1


class Queries(nn.Module):
    """Returns a parameter, as learned queries do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self) -> Tensor:
        return self.weight


class WithQueries(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.queries = Queries()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        return super().training_step([x + self.queries(), y, index], batch_idx)


def test_a_parameter_that_is_an_output_keeps_neither_hooks_nor_the_trainer() -> None:
    module = WithQueries()
    monitor = OptimizationMonitor(every=2, activations={"queries": "queries"})
    trainer = fit(module, loader(16, 2), monitor, max_epochs=1)
    assert not module.queries.weight._backward_hooks
    reference = weakref.ref(trainer)
    del trainer, monitor
    module.trainer = None  # type: ignore[assignment]
    gc.collect()
    assert reference() is None


class Logged(L.pytorch.loggers.CSVLogger):
    """Keeps all values."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append((step, dict(metrics)))


def test_values_of_an_earlier_window_are_not_logged_again(tmp_path: Any, caplog: Any) -> None:
    class Stops(Blocks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 7:
                self.trainer.should_stop = True  # logs this update, too
            return super().training_step(batch, batch_idx)

    logger = Logged(tmp_path)
    monitor = OptimizationMonitor(activations={"embed": "embed"})
    with caplog.at_level("INFO"):
        fit(Stops(), loader(40, 2), monitor, max_epochs=1, log_every_n_steps=3, logger=logger)
    found = [step for step, row in logger.rows if "activations/rms/embed" in row]
    assert found == [2, 5]
    assert "has no values of" not in caplog.text


def test_modules_without_values_are_named_once(caplog: Any) -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    monitor = ActivationMonitor({"used": "used", "unused": "unused"})
    monitor.start(module)
    with caplog.at_level("INFO"):
        for _ in range(2):
            monitor.attach()
            module["used"](torch.ones(1, 2))
            monitor.detach()
            monitor.add_values(into=MetricBuffer())
    (line,) = [text for text in caplog.messages if "has no values of" in text]
    assert "has no values of unused:" in line


@pytest.mark.parametrize(
    ("labels", "message"),
    [(("a b", "a_b"), "give different tags, got 'a b' and 'a_b'"), (("",), "not empty, got ''")],
)
def test_labels_must_give_different_tags(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"activations must have labels that (are )?{message}"):
        OptimizationMonitor(activations=dict.fromkeys(labels, "*"))


def test_a_sparse_gradient_is_not_measured() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 2))

        def forward(self) -> Tensor:
            return self.weight

    module = nn.ModuleDict({"table": Table()})

    def look_up() -> None:
        weight = module["table"]()
        nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()

    found = measured(module, look_up, table="table")
    assert "activations/rms/table" in found
    assert not [tag for tag in found if "grad" in tag]
