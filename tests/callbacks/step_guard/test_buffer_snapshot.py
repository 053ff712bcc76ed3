"""Buffers that the forward pass changes are restored after a rejected batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import NonFinite, StepGuard
from lightning_bigopt.engine import buffer_snapshot
from lightning_bigopt.engine.buffer_snapshot import BufferSnapshot
from tests.bad_batches import finite, fit
from tests.helpers import cpu_precision


class WithBatchNorm(L.LightningModule):
    """Batch normalization updates its statistics in the forward pass, before the rejection."""

    def __init__(self, bad: dict[int, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bad = bad
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.statistics: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] * self.bad.get(self.trainer.global_step, 1.0)
        return nn.functional.mse_loss(self.net(x), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self.statistics.append([b.clone() for b in self.net[1].buffers()])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_rejected_batch_does_not_change_running_statistics(precision: str, accumulate: int) -> None:
    module = WithBatchNorm({4: math.nan})
    options = {"accumulate_grad_batches": accumulate, **cpu_precision(precision)}
    fit(module, StepGuard(), size=16 * accumulate, **options)
    ends = module.statistics[accumulate - 1 :: accumulate]
    changed = [
        not torch.equal(a, b)
        for before, after in itertools.pairwise(ends)
        for a, b in zip(before[:2], after[:2], strict=True)
    ]
    assert changed == [update != 4 for update in range(1, 8) for _ in range(2)]
    assert finite(module.state_dict())


def test_lazy_layer_without_statistics_is_supported() -> None:
    module = WithBatchNorm({4: math.nan})
    module.net = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    fit(module, StepGuard(), size=16)
    assert module.net[1].num_batches_tracked == 7
    assert finite(module.state_dict())


class Codebook(nn.Module):
    """An exponential moving average of the inputs, started by the first batch."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("mask", torch.full((4,), -math.inf), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            new = torch.where(self.started, self.mean.lerp(x.mean(0), 0.1), x.mean(0))
            if self.write == "in place":
                self.mean.copy_(new)
            elif self.write == "data":
                self.mean.data.copy_(new)
            elif self.write == "new data":
                self.mean.data = new
            else:
                self.mean = new
            self.started.fill_(True)
        return x - self.mean


class Restored(WithBatchNorm):
    """Keeps the buffers after every update."""

    def __init__(self, layer: nn.Module, bad: dict[int, float]) -> None:
        super().__init__(bad)
        self.net = nn.Sequential(layer, nn.Linear(4, 3))

    def on_train_batch_end(self, *args: Any) -> None:
        self.statistics.append([b.clone() for b in self.net[0].buffers()])


def layers() -> dict[str, nn.Module]:
    normed = nn.Linear(4, 4)
    return {
        **{write: Codebook(write) for write in ("in place", "data", "new data", "new tensor")},
        "spectral norm": torch.nn.utils.parametrizations.spectral_norm(normed),
        "old spectral norm": torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    }


@pytest.mark.parametrize(("bad", "large"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("name", list(layers()))
def test_rejected_batch_changes_no_buffer(
    name: str, bad: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(buffer_snapshot, "_LARGE", 4)
    module = Restored(layers()[name], {bad: math.nan})
    start = [b.clone() for b in module.net[0].buffers()]
    guard = StepGuard([NonFinite()], max_consecutive=3)
    fit(module, guard, size=16)
    assert [rejected.update for rejected in guard.rejections] == [bad]
    for before, after in zip([start, *module.statistics][bad], module.statistics[bad], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(module.statistics[-1][0], start[0])
    assert not any(b.isnan().any() for b in module.statistics[-1])


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_equal_to_a_run_without_the_bad_batch() -> None:
    """The fifth batch is rejected, or left out of the data."""
    rejected = Restored(Codebook("in place"), {4: math.nan})
    fit(rejected, StepGuard([NonFinite()]), size=16)

    class LeftOut(Restored):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 4 else super().training_step(batch, batch_idx)

    without = LeftOut(Codebook("in place"), {})
    fit(without, size=16)
    for first, second in zip(rejected.parameters(), without.parameters(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(rejected.net[0].mean, without.net[0].mean)


def test_statistics_of_a_module_in_evaluation_mode_are_restored() -> None:
    class Teacher(Restored):
        def on_train_batch_start(self, *args: Any) -> None:
            self.net[0].eval()

    module = Teacher(Codebook("in place"), {2: math.nan})
    fit(module, StepGuard([NonFinite()], max_consecutive=3), size=16)
    assert module.net[0].mean.isfinite().all()
    assert torch.equal(module.statistics[1][0], module.statistics[2][0])


def test_nan_in_a_buffer_that_is_not_restored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_snapshot, "_TOO_LARGE", 3)
    module = Restored(Codebook("in place"), {2: math.nan})
    with pytest.raises(RuntimeError, match=r"net\.0\.mean contains NaN, so that every"):
        fit(module, StepGuard([NonFinite()], max_consecutive=3), size=16)


UNUSUAL = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(4),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "fp8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "fp4": lambda: torch.ones(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype", "ignore:.*Sparse")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", [*UNUSUAL, "inference"])
def test_unusual_buffers_are_no_obstacle(
    kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(buffer_snapshot, "_LARGE", 0)
    module = Restored(Codebook("in place"), {4: math.nan})
    with torch.inference_mode(kind == "inference"):
        buffer = torch.ones(4) if kind == "inference" else UNUSUAL[kind]()
    module.net[0].register_buffer("unusual", buffer, persistent=False)
    module.on_train_batch_end = lambda *args: None  # type: ignore[method-assign]
    fit(module, StepGuard([NonFinite()]), size=16)
    fit(module, StepGuard([NonFinite()]), size=16, **cpu_precision("16-mixed"))
    assert module.net[0].unusual is buffer
    assert module.net[0].mean.isfinite().all()


def test_failed_copy_leaves_no_copies_in_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, snapshot = nn.BatchNorm1d(4), BufferSnapshot()
    snapshot.watch(layer)
    snapshot.save()
    before, calls = dict(layer.named_buffers()), []
    original = buffer_snapshot._Entry.saved

    def saved(entry: Any) -> Any:
        calls.append(entry)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return original(entry)

    monkeypatch.setattr(buffer_snapshot._Entry, "saved", saved)
    with pytest.raises(torch.OutOfMemoryError), snapshot.in_place():
        raise AssertionError
    assert all(layer.get_buffer(name) is buffer for name, buffer in before.items())


def test_scaler_keeps_finite_entries_of_a_replaced_buffer() -> None:
    module = Restored(Codebook("new tensor"), {4: math.nan})
    fit(module, StepGuard(), size=16, **cpu_precision("16-mixed"))
    assert module.net[0].mean.isfinite().all()
    assert module.net[0].mask.isneginf().all()


def test_large_buffers_that_do_not_change_are_not_copied() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(buffer_snapshot._LARGE))
            self.register_buffer("queue", torch.zeros(buffer_snapshot._LARGE))

    layer, snapshot = Table(), BufferSnapshot()
    snapshot.watch(layer)
    for window in range(4):
        snapshot.save()
        layer.queue[window] = 1.0
    snapshot.restore_()
    assert layer.queue[:4].tolist() == [1.0, 1.0, 1.0, 0.0]
    copies = [entry.copy for entry in snapshot._entries]
    assert copies[0] is None
    assert copies[1] is not None
    # Torch does not count changes through ``data``; the next epoch finds them.
    snapshot.watch(layer)
    for _ in range(2):
        snapshot.save()
        layer.table.data.add_(1.0)
    snapshot.restore_()
    assert layer.table[0] == 1.0
