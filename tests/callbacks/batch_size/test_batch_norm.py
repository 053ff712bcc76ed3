"""Micro-batches of one sample, for which batch normalization in training mode fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
)
from lightning_bigopt.callbacks.batch_size.batch_norm_check import uses_statistics_of_process
from tests.batch_helpers import Normalizes, SaveInEpoch
from tests.helpers import Regression, fit

TAIL = r"tail='merge'\) or tail='drop'"


def train(
    module: L.LightningModule,
    *callbacks: Any,
    samples: int = 17,
    micro: int = 4,
    policy: Any = None,
    tail: Any = "keep",
    **options: Any,
) -> L.Trainer:
    """Trains 17 samples in updates of 8 by default: 8, 8 and 1."""
    loader = GlobalBatchLoader(Regression(samples), micro_batch_size=micro, tail=tail)
    scheduler = BatchSizeScheduler(policy or ConstantBatchSize(8))
    return fit(module, loader, scheduler, *callbacks, **{"max_epochs": 2, **options})


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())


class OnePixel(nn.Module):
    """Makes images of one pixel of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, None, None]


class Sequences(nn.Module):
    """Makes sequences of three steps of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, 3)


class Rows(nn.Module):
    """Makes several rows of a row, as a model of tokens does before a norm."""

    def __init__(self, number: int = 3) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.number, dim=0)


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm1d(6)],
        [nn.LazyBatchNorm1d()],
        [OnePixel(), nn.BatchNorm2d(6)],
        [nn.BatchNorm1d(6, track_running_stats=False).eval()],
    ],
    ids=["1d", "lazy", "one pixel", "without running statistics"],
)
def test_tail_of_one_sample_raises_before_the_first_update(layers: list[nn.Module]) -> None:
    module = Normalizes(*layers)
    with pytest.raises(ValueError, match=TAIL) as raised:
        train(module)
    assert "got 1 in update 2, which has 1 sample" in str(raised.value)
    assert f"'net.{len(layers)}'" in str(raised.value)
    assert (module.updates, module.forwards) == (0, 1)
    assert hooks(module) == 0


def test_torch_raises_without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_bigopt.callbacks.batch_size.batch_norm_check.BatchNormCheck._check",
        lambda *args, **kwargs: None,
    )
    module = Normalizes(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        train(module)
    assert module.updates == 2


@pytest.mark.parametrize("tail", ["merge", "drop"])
def test_other_tails_train(tail: str) -> None:
    module = Normalizes(nn.BatchNorm1d(6))
    train(module, tail=tail)
    assert module.updates == {"merge": 2, "drop": 2}[tail] * 2
    assert hooks(module) == 0


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize(
    "layers",
    [
        [Sequences(), nn.BatchNorm1d(6)],
        [Rows(), nn.BatchNorm1d(6)],
        [nn.BatchNorm1d(6).eval()],
        [nn.LayerNorm(6)],
        [nn.GroupNorm(2, 6)],
    ],
    ids=["sequences", "several rows of a sample", "frozen", "layer norm", "group norm"],
)
def test_layers_that_accept_one_sample_train(layers: list[nn.Module]) -> None:
    class KeepsMode(Normalizes):
        def on_train_epoch_start(self) -> None:
            for layer, training in zip(self.net[1:], modes, strict=True):
                layer.train(training)

    modes = [layer.training for layer in layers]
    module = KeepsMode(*layers)
    train(module)
    assert module.updates == 6
    assert hooks(module) == 0


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"max_steps": 2}, 2),  # ends before the tail
        ({"samples": 18}, 6),  # a tail of two samples
        ({"samples": 16}, 4),  # no tail
        ({"samples": 9, "policy": ConstantBatchSize(9)}, 2),  # 3 + 3 + 3, not 4 + 4 + 1
        ({"samples": 17, "policy": ConstantBatchSize(17)}, 2),
        ({"max_steps": 2, "reload_dataloaders_every_n_epochs": 1}, 2),
        ({"fast_dev_run": 2}, 2),
        ({"fast_dev_run": 2, "policy": ConstantBatchSize(1)}, 2),  # trains updates of 4
    ],
)
def test_runs_without_micro_batches_of_one_sample_train(
    arguments: dict[str, Any], sizes: int
) -> None:
    module = Normalizes(nn.BatchNorm1d(6))
    train(module, **arguments)
    assert module.updates == sizes


def test_only_the_first_forward_pass_is_watched() -> None:
    """The layer has as many values in the second update as samples were in the first one."""
    module = Normalizes(Rows(2), nn.BatchNorm1d(6))
    policy = BatchSizeSteps({"0%": 4, "1 steps": 2})
    train(module, samples=9, policy=policy, max_epochs=1)
    assert module.updates == 4


@pytest.mark.parametrize(
    ("arguments", "update"),
    [
        ({"micro": 1}, 0),
        ({"micro": 2, "policy": ConstantBatchSize(7)}, 0),  # 2 + 2 + 2 + 1
        ({"samples": 16, "policy": BatchSizeSteps({"0%": 4, "50%": 1})}, 4),
    ],
)
def test_updates_in_mid_epoch_raise_with_another_advice(
    arguments: dict[str, Any], update: int
) -> None:
    module = Normalizes(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="larger micro_batch_size") as raised:
        train(module, **arguments)
    assert f"got 1 in update {update}," in str(raised.value)
    assert "tail" not in str(raised.value)
    assert module.updates == 0


def test_a_tail_of_a_later_epoch_raises_at_the_start() -> None:
    """21 samples: tails of 5 with updates of 8, then of one sample with updates of 10."""
    module = Normalizes(nn.BatchNorm1d(6))
    policy = BatchSizeSteps({"0%": 8, "1 epochs": 10})
    with pytest.raises(ValueError, match="got 1 in update 5, which has 1 sample"):
        train(module, samples=21, policy=policy)
    assert module.updates == 0


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("limit", [{"max_epochs": -1, "max_steps": -1}, {"max_epochs": 2}])
def test_rest_of_the_epoch_is_checked_without_a_plan(limit: Any, reload: int) -> None:
    module = Normalizes(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match=TAIL):
        train(module, reload_dataloaders_every_n_epochs=reload, **limit)
    assert module.updates == 0


def test_reloaded_data_of_other_sizes_train() -> None:
    """The plan of the first epoch, repeated, would have a tail of one sample in the second."""

    class Reloads(Normalizes):
        def train_dataloader(self) -> Any:
            samples = (18, 16)[self.current_epoch]
            return GlobalBatchLoader(Regression(samples), micro_batch_size=4)

    module = Reloads(nn.BatchNorm1d(6))
    policy = BatchSizeSteps({"0%": 8, "1 epochs": 17})
    fit(
        module,
        None,
        BatchSizeScheduler(policy),
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
    )
    assert module.updates == 3 + 1


def test_resume_raises_before_its_first_update(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    save = SaveInEpoch(path, "on_train_batch_end", at=(0, 2))
    train(Normalizes(nn.BatchNorm1d(6)), save, max_steps=2)
    module = Normalizes(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="got 1 in update 2, which has 1 sample"):
        train(module, ckpt_path=path)
    assert module.updates == 0
    train(module, ckpt_path=path, tail="drop")
    assert module.updates == 3


def test_resume_with_other_sizes_checks_the_rest_of_the_epoch(tmp_path: Path) -> None:
    """The updates of the checkpoint's plan are not those of this run."""
    path = tmp_path / "one.ckpt"
    save = SaveInEpoch(path, "on_train_batch_end", at=(0, 2))
    train(Normalizes(nn.BatchNorm1d(6)), save, samples=18, max_steps=2)
    module = Normalizes(nn.BatchNorm1d(6))
    train(module, samples=18, policy=ConstantBatchSize(5), ckpt_path=path)
    assert module.updates == 2 + 4  # 8, 5, 5 and 5, 5, 5, 3
    with pytest.raises(ValueError, match="which has 1 sample"):
        train(module, samples=18, policy=ConstantBatchSize(3), ckpt_path=path)


def test_validation_of_one_sample_does_not_raise() -> None:
    class Validates(Normalizes):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Regression(3))

    module = Validates(nn.BatchNorm1d(6))
    train(module, samples=18, num_sanity_val_steps=2)
    assert module.updates == 6


def test_synchronized_statistics_accept_one_sample_on_each_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.SyncBatchNorm(6)
    assert uses_statistics_of_process(layer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    assert not uses_statistics_of_process(layer)
    assert uses_statistics_of_process(nn.BatchNorm1d(6))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)
    assert uses_statistics_of_process(layer)


@pytest.mark.slow
def test_compiled_layers_train() -> None:
    module = Normalizes(nn.BatchNorm1d(6))
    module.net.compile(backend="eager")
    train(module, tail="merge")
    assert module.updates == 4
