"""Models, data sets and a fit that the tests with a Trainer share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bigopt.optimizers import GroupField

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Regression(Dataset[tuple[Tensor, Tensor, int]]):
    """Samples with their index; the targets, and so the gradients, grow with the index."""

    def __init__(self, size: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = torch.randn(size, 3, generator=generator) * torch.arange(1, size + 1).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index


def loader(size: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(Regression(size), batch_size=batch_size, **options)


class ResumableLoader:
    """A loader with a saved position: a resumed run gets the batches of an uninterrupted one."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.dataset = Regression(size)
        self.batch_size = batch_size
        self._position = 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        start, self._position = self._position, 0
        for batch in range(start, len(self)):
            rows = range(
                batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.dataset))
            )
            self._position = (batch + 1) % len(self)
            yield [
                self.dataset.x[rows.start : rows.stop],
                self.dataset.y[rows.start : rows.stop],
                torch.tensor(list(rows)),
            ]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]


def cpu_precision(name: str) -> dict[str, Any]:
    """Returns Trainer arguments for a precision on the CPU; 16-mixed with a CPU GradScaler."""
    if name == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    return {"precision": name}


class Probe(L.LightningModule):
    """Records learning rate, norm and samples of every update, and the error of its gradient.

    The expected gradient is that of the mean loss over all samples of the accumulation window, of
    every process, computed by autograd in one pass.
    """

    def __init__(
        self,
        *,
        lr: float = 0.05,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.options = {"lr": lr, **options}
        self.optimizer_class = optimizer
        self.open: list[tuple[Tensor, Tensor, Tensor]] = []
        self.errors: list[float] = []
        self.windows: list[list[int]] = []
        self.lrs: list[float] = []
        self.accumulations: list[int] = []
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.optimizer_class(self.parameters(), **self.options)  # type: ignore[call-arg]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net(x), y)

    def on_train_start(self) -> None:
        self.open = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1 == getattr(
            self.trainer.accumulate_grad_batches, "start", batch_idx
        ):
            self.open = []
        self.open.append((x, y, index))
        self.accumulations.append(int(self.trainer.accumulate_grad_batches))
        return self.loss(x, y)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        x, y, index = (torch.cat(parts) for parts in zip(*self.open, strict=True))
        self.open = []
        self.windows.append(sorted(index.tolist()))
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        grads = [full(p.grad) for p in self.net.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        x, y = gather(x), gather(y)
        expected = self._expected_gradient(x, y)
        scale = max(float(t.abs().max()) for t in expected)
        self.errors.append(
            max(float((g - t).abs().max()) for g, t in zip(grads, expected, strict=True)) / scale
        )

    def _expected_gradient(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Returns the gradient of the mean loss on an unsharded float64 copy of the network."""
        copy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            for mine, theirs in zip(copy.parameters(), self.net.parameters(), strict=True):
                mine.copy_(full(theirs.detach()))
        loss = nn.functional.mse_loss(copy(x.double()), y.double())
        return [g.float() for g in torch.autograd.grad(loss, list(copy.parameters()))]


class FieldRecorder(Probe):
    """Records a field of the first parameter group at every update."""

    def __init__(self, field: str, **options: Any) -> None:
        super().__init__(**options)
        self.field, self.seen = GroupField(field), []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(self.field.read(optimizer.param_groups[0]))
        super().on_before_optimizer_step(optimizer)


class ManualUpdates(L.LightningModule):
    """Makes an update of each batch by manual optimization; list it before the module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class ManualLayers(L.LightningModule):
    """Manual optimization of one linear layer per optimizer, all of which step at every batch.

    Args:
        optimizers: Functions that make the optimizers from the parameters of their layers.
        field: The field of every optimizer's first group that is recorded before the steps.
    """

    def __init__(
        self,
        *optimizers: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        field: str = "lr",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in optimizers)
        self.makers, self.field = optimizers, field
        self.seen: list[tuple[float, ...]] = []

    def configure_optimizers(self) -> Any:
        pairs = zip(self.makers, self.layers, strict=True)
        return [make(layer.parameters()) for make, layer in pairs]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        self.seen.append(tuple(o.param_groups[0][self.field] for o in optimizers))
        for layer, optimizer in zip(self.layers, optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(layer(batch[0]), batch[1]))
            optimizer.step()


def gather(rows: Tensor) -> Tensor:
    """Concatenates the rows of all processes."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return rows
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows)
    return torch.cat(parts)


def full(tensor: Any) -> Tensor:
    """Returns the full tensor of one that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fit(
    module: L.LightningModule, data: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any
) -> L.Trainer:
    """Fits on this process; a checkpoint is loaded with ``weights_only=True``."""
    trainer = L.Trainer(**{**QUIET, "callbacks": list(callbacks), **options})
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class SaveAt(L.Callback):
    """Saves a checkpoint after one update."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class RaisesAtStep(L.Callback):
    """Raises an error after the given number of updates, when they have been logged."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error
