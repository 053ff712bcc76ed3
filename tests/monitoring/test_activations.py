"""Sizes of activations and their gradients, compared with autograd in float64."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bigopt import (
    GradientClipping,
    NormClip,
    OptimizationMonitor,
    OptimizationMonitorMixin,
    StepGuard,
)
from lightning_bigopt.monitoring.activations import ActivationMonitor, chosen_modules
from lightning_bigopt.monitoring.metric_buffer import MetricBuffer
from tests.helpers import ManualUpdates, cpu_precision, fit, loader
from tests.monitoring.helpers import Blocks, curves

FIGURES = ("rms", "max", "zeros", "grad_rms", "grad_max", "grad_zeros")
LABELS = ("embed", "blocks.0", "blocks.1", "blocks.2", "head")


class Recorded(Blocks):
    """Keeps outputs and their gradients of every update, and may checkpoint its blocks."""

    def __init__(self, checkpointing: bool | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.checkpointing = checkpointing  # use_reentrant, or None for none
        self.open: dict[str, list[Tensor]] = {}
        self.windows: list[dict[str, list[Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = {"embed": self.embed, "head": self.head}
        parts |= {f"blocks.{index}": block for index, block in enumerate(self.blocks)}
        h = batch[0]
        for label in LABELS:
            if label.startswith("blocks") and self.checkpointing is not None:
                h = checkpoint(parts[label], h, use_reentrant=self.checkpointing)
            else:
                h = parts[label](h)
            self.open.setdefault(label, []).append(h)
            if h.requires_grad:
                h.retain_grad()
        return nn.functional.mse_loss(h.float(), batch[1] / (1 + batch[2]).unsqueeze(1))

    def on_after_backward(self) -> None:
        pass

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % int(self.trainer.accumulate_grad_batches) == 0:
            self.windows.append(self.open)
            self.open = {}


def sizes(tensors: list[Tensor], prefix: str = "") -> dict[str, float]:
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return {
        f"{prefix}rms": float(flat.square().mean().sqrt()),
        f"{prefix}max": float(flat.abs().max()),
        f"{prefix}zeros": float((flat == 0).double().mean()),
    }


@pytest.mark.parametrize(
    ("checkpointing", "precision", "accumulate"),
    [
        (None, "32-true", 1),
        (None, "32-true", 3),
        (False, "32-true", 2),
        (True, "32-true", 2),
        (None, "bf16-mixed", 1),
        (None, "16-mixed", 2),
    ],
)
def test_figures_equal_a_calculation_in_float64(
    checkpointing: bool | None, precision: str, accumulate: int, tmp_path: Path
) -> None:
    module = Recorded(checkpointing, lr=0.01)
    trainer = fit(
        module,
        loader(24 * accumulate, 4),
        OptimizationMonitor(every=3, activations="blocks", layers=None),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=TensorBoardLogger(tmp_path),
        **cpu_precision(precision),
    )
    logged = curves(trainer)
    assert len(module.windows) == 6
    scale = 2.0**8 if precision == "16-mixed" else 1.0
    for label in LABELS:
        for step in (2, 5):
            outputs = module.windows[step][label]
            assert len(outputs) == accumulate
            expected = sizes(outputs)
            expected |= sizes([output.grad / scale for output in outputs], "grad_")
            found = {name: dict(logged[f"activations/{name}/{label}"])[step] for name in FIGURES}
            assert found == pytest.approx(expected, rel=1e-5)
            assert set(dict(logged[f"activations/rms/{label}"])) == {2, 5}
    assert logged["activations/zeros/blocks.1"][0][1] >= 0.5  # dead units


@pytest.mark.parametrize("kind", ["plain", "manual"])
def test_monitored_run_trains_to_the_same_bits(kind: str) -> None:
    class Manual(ManualUpdates, Blocks):
        pass

    weights = []
    for callbacks in ([], [OptimizationMonitor(every=1, activations={"all": "*"})]):
        module = Blocks(lr=1e-3) if kind == "plain" else Manual()
        fit(module, loader(16, 4), *callbacks, max_epochs=2)
        weights.append([p.detach().clone() for p in module.parameters()])
        assert not any(part._forward_hooks for part in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_hooks_exist_in_logged_updates_only() -> None:
    seen = []

    class Looks(Blocks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(len(self.head._forward_hooks))
            return super().training_step(batch, batch_idx)

    monitor = OptimizationMonitor(every=2, activations="blocks")
    fit(Looks(lr=1e-3), loader(32, 4), monitor, max_epochs=1, accumulate_grad_batches=2)
    assert seen == [0, 0, 1, 1, 0, 0, 1, 1]


def test_validation_within_a_window_and_a_frozen_module(tmp_path: Path) -> None:
    class Validates(Recorded):
        def __init__(self) -> None:
            super().__init__(lr=0.01)
            self.embed.requires_grad_(requires_grad=False)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.head(self.embed(batch[0] * 1e6))

    module = Validates()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        val_check_interval=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=1,
        logger=TensorBoardLogger(tmp_path),
        callbacks=[OptimizationMonitor(every=1, activations="blocks")],
    )
    trainer.fit(module, loader(16, 4), loader(4, 4))
    logged = curves(trainer)
    for step, window in enumerate(module.windows):
        expected = sizes(window["embed"])["max"]
        assert logged["activations/max/embed"][step][1] == pytest.approx(expected, rel=1e-5)
    assert "activations/grad_rms/embed" not in logged
    assert len(logged["activations/grad_rms/head"]) == 2


def test_rejected_update_is_measured(tmp_path: Path) -> None:
    class Infinite(Blocks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("inf")

        def on_after_backward(self) -> None:
            pass

        def on_train_batch_end(self, *args: Any) -> None:
            pass

    monitor = OptimizationMonitor(every=1, activations={"last": "head"})
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(Infinite(), loader(8, 4), StepGuard(), monitor, max_epochs=1, logger=logger)
    assert len(curves(trainer)["activations/rms/last"]) == 2


def test_repeated_evaluations_are_not_measured(tmp_path: Path) -> None:
    calls = []

    class Counts(Blocks):
        def on_after_backward(self) -> None:
            pass

        def on_train_batch_end(self, *args: Any) -> None:
            pass

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(float(self.head.weight.detach().abs().max()))
            self.first = self.first if self.first is not None else self.head(self.embed(batch[0]))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            self.first: Tensor | None = None
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module = Counts()
    monitor = OptimizationMonitor(every=1, activations={"last": "head"}, layers=None)
    batch, logger = loader(4, 4), TensorBoardLogger(tmp_path)
    trainer = fit(module, batch, monitor, max_epochs=1, logger=logger)
    assert len(calls) > 1
    again = Counts()
    with torch.no_grad():
        x = next(iter(batch))[0]
        h = again.embed(x)
        for block in again.blocks:
            h = block(h)
        expected = sizes([again.head(h), again.head(again.embed(x))])
    logged = curves(trainer)["activations/rms/last"]
    assert logged == [(0, pytest.approx(expected["rms"], rel=1e-5))]


@dataclasses.dataclass
class Output:
    loss: Any
    hidden: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (torch.arange(3), x),
        lambda x: {"cache": None, "states": [x, x * 0]},
        lambda x: Output(loss=None, hidden=x),
    ],
)
def test_first_floating_tensor_of_an_output_is_measured(wrap: Any) -> None:
    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(x)

    model = nn.Sequential(Wraps())
    monitor, values = ActivationMonitor({"a": "0"}), MetricBuffer()
    monitor.start(model)
    monitor.attach()
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    model(x)
    monitor.add_values(into=values)
    assert values.fetch()["activations/max/a"] == 3.0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_repeated_forward_of_checkpointing_counts_once(use_reentrant: bool) -> None:
    """In a label with a module that is not checkpointed a second count would change the mean."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    monitor, values = ActivationMonitor({"both": "?"}), MetricBuffer()
    monitor.start(model)
    monitor.attach()
    x = torch.randn(4, 3, requires_grad=True)
    first = checkpoint(model[0], x, use_reentrant=use_reentrant)
    second = model[1](first)
    second.sum().backward()
    monitor.add_values(into=values)
    expected = sizes([first, second])["rms"]
    assert values.fetch()["activations/rms/both"] == pytest.approx(expected, rel=1e-5)


def test_activations_are_not_kept_alive() -> None:
    monitor, model = ActivationMonitor("blocks"), nn.Sequential(nn.Linear(2, 2))
    monitor.start(model)
    monitor.attach()
    output = model(torch.ones(1, 2))
    output.sum().backward()
    kept = weakref.ref(output)
    del output
    gc.collect()
    assert kept() is None


def test_copies_of_module_and_monitor_are_inert() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    monitor = ActivationMonitor("blocks")
    monitor.start(model)
    monitor.attach()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made(torch.ones(1, 2))
    again = pickle.loads(pickle.dumps(monitor))
    values = MetricBuffer()
    assert not monitor.add_values(into=values)
    assert not again.add_values(into=values)
    assert not values


COMPILED = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:`torch.jit")


@COMPILED
@pytest.mark.parametrize("place", ["module", "blocks"])
def test_compiled_modules_train_to_the_same_bits(place: str, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [OptimizationMonitor(every=1, activations="blocks")]):
        module = Blocks(lr=1e-3)
        if place == "blocks":
            for index, block in enumerate(module.blocks):
                module.blocks[index] = torch.compile(block, backend="eager", fullgraph=True)
        else:
            inner = torch.compile(module.embed.forward, backend="eager", fullgraph=True)
            module.embed.forward = inner
        logger = TensorBoardLogger(tmp_path, version=str(len(callbacks)))
        trainer = fit(module, loader(16, 4), *callbacks, max_epochs=1, logger=logger)
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert len(curves(trainer)["activations/rms/blocks.0"]) == 4


@COMPILED
def test_inside_of_a_compiled_function_is_not_measured() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    monitor = ActivationMonitor({"linear": "0"})
    monitor.start(model)
    monitor.attach()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    compiled(torch.ones(1, 2)).sum().backward()
    assert not monitor.add_values(into=MetricBuffer())


def test_mixin_logs_what_the_callback_logs(tmp_path: Path) -> None:
    class Mixed(OptimizationMonitorMixin, Blocks):
        def configure_optimization_monitor(self) -> OptimizationMonitor:
            return OptimizationMonitor(every=2, activations={"last": "head"})

    logged = []
    for kind in (Mixed, Blocks):
        module = kind(lr=0.01)
        own = [] if kind is Mixed else [OptimizationMonitor(every=2, activations={"last": "head"})]
        logger = TensorBoardLogger(tmp_path, name=kind.__name__)
        trainer = fit(module, loader(16, 4), *own, max_epochs=1, logger=logger)
        found = curves(trainer).items()
        logged.append({tag: points for tag, points in found if tag.startswith("activations")})
    assert logged[0] == logged[1]
    assert len(logged[0]) == 6


def test_arguments_are_checked() -> None:
    for wrong in ("block", 3, True, {"a": 1}, ["*"]):
        with pytest.raises(ValueError, match=r"activations must be 'blocks', patterns .* got"):
            OptimizationMonitor(activations=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pattern of activations must match .* got '\*\.attn'"):
        fit(
            Blocks(),
            loader(4, 4),
            OptimizationMonitor(activations={"a": "*.attn"}),
            GradientClipping(NormClip()),
            max_epochs=1,
        )


@COMPILED
def test_blocks_of_wrapped_modules_have_plain_names() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([torch.compile(nn.Linear(2, 2))])})
    assert [label for label, _ in chosen_modules(model, "blocks")] == ["blocks.0"]
