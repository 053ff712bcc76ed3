"""ObjectSnapshot restores modules, optimizers and other objects in place."""

from __future__ import annotations

import collections
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot


class ChangesEverything(nn.Module):
    """A module with every kind of state that training may change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.register_buffer("count", torch.zeros(1), persistent=False)
        self.metric = MeanMetric()
        self.history: list[float] = []
        self.table: dict[str, Any] = {"inner": {"seen": [1]}}
        self.number = 3

    def work(self, optimizer: torch.optim.Optimizer) -> None:
        loss = self.net(torch.randn(5, 3)).square().mean()
        loss.backward()
        optimizer.step()
        self.metric.update(loss.detach())
        self.count = self.count + 1
        self.history.append(float(loss.detach()))
        self.table["inner"]["seen"].append(2)
        self.table["more"] = 1
        self.number += 1
        self.eval()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("after_a_step", [False, True])
def test_restore_puts_everything_back_in_place(optimizer: Any, after_a_step: bool):
    module = ChangesEverything()
    opt = optimizer(module.parameters(), lr=torch.tensor(0.1) if after_a_step else 0.1)
    if after_a_step:
        module.work(opt)
        module.train()
    copied, state = copy.deepcopy(module), copy.deepcopy(opt.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    weights, rate = list(module.parameters()), opt.param_groups[0]["lr"]
    snapshot = ObjectSnapshot(*module.modules(), opt)
    for _ in range(3):
        opt.zero_grad()
        module.work(opt)
    opt.param_groups[0]["lr"] = 7.0
    snapshot.restore()
    assert all(a is b for a, b in zip(module.parameters(), weights, strict=True))
    assert opt.param_groups[0]["lr"] is rate
    for mine, theirs in zip(module.parameters(), copied.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(module.buffers(), copied.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    assert module.metric.metric_state.keys() == copied.metric.metric_state.keys()
    for name, value in copied.metric.metric_state.items():
        assert torch.equal(module.metric.metric_state[name], value)
    assert module.metric.update_count == copied.metric.update_count
    assert (module.history, module.table, module.number) == (
        copied.history,
        copied.table,
        copied.number,
    )
    assert module.training
    torch.testing.assert_close(opt.state_dict(), state, rtol=0, atol=0)


class HoldsObjects:
    """Holds a queue, a set, an array and random generators."""

    def __init__(self) -> None:
        self.recent = collections.deque([1.0, 2.0], maxlen=2)
        self.seen = {1}
        self.mean = np.zeros(2)
        self.torch = torch.Generator().manual_seed(1)
        self.random = random.Random(2)
        self.numpy = np.random.default_rng(3)

    def step(self) -> list[object]:
        self.recent.append(3.0)
        self.seen.add(2)
        self.mean += 1
        draws = (torch.rand(1, generator=self.torch), self.random.random(), self.numpy.random())
        return [list(self.recent), set(self.seen), self.mean.tolist(), *map(float, draws)]


def test_queues_sets_arrays_and_generators_are_restored() -> None:
    first, holder = HoldsObjects().step(), HoldsObjects()
    recent, mean = holder.recent, holder.mean
    snapshot = ObjectSnapshot(holder)
    assert holder.step() == first
    holder.step()
    snapshot.restore()
    assert holder.recent is recent
    assert holder.mean is mean
    assert holder.step() == first


def test_tensors_in_queues_are_restored_beside_a_generator_without_state() -> None:
    class Holder:
        def __init__(self) -> None:
            self.recent = collections.deque([torch.zeros(2)])
            self.random = random.SystemRandom()

    holder = Holder()
    snapshot = ObjectSnapshot(holder)
    holder.recent[0].add_(1.0)
    snapshot.restore()
    assert holder.recent[0].tolist() == [0.0, 0.0]


def test_gradients_and_tensors_in_tuples_are_restored() -> None:
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    layer.pair = (torch.zeros(2), [1])
    gradient, pair = layer.weight.grad, layer.pair
    snapshot = ObjectSnapshot(layer)
    gradient.zero_()
    layer.weight.grad = None
    pair[0].add_(1.0)
    pair[1].append(2)
    snapshot.restore()
    assert layer.weight.grad is gradient
    assert gradient.tolist() == [[1.0, 1.0]]
    assert layer.pair is pair
    assert pair[0].tolist() == [0.0, 0.0]
    assert pair[1] == [1]


def test_a_tensor_of_another_shape_is_refused_before_any_change():
    layer = nn.Linear(2, 1)
    snapshot = ObjectSnapshot(layer)
    nn.init.ones_(layer.weight)
    layer.bias.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"got \(3,\) of torch.float32 instead of \(1,\) of "):
        snapshot.restore()
    assert layer.weight.tolist() == [[1.0, 1.0]]
