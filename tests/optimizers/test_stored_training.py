"""A stored training state restores what a snapshot in memory does."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_bigopt.optimizers.object_snapshot import ObjectSnapshot
from lightning_bigopt.optimizers.stored_training import StoredTraining, training_state
from lightning_bigopt.optimizers.training_snapshot import TrainingSnapshot
from tests.optimizers.test_training_snapshot import OPTIMIZERS, Run, equal


class Counting(SGD):
    """Counts its steps in an attribute."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.steps, self.history = 0, [0.5]

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        self.history.append(self.history[-1] * 0.9)
        self.param_groups[0]["lr"] = 0.1 / self.steps + self.history[-1]
        return super().step(closure)


class WideMomentum(Optimizer):
    """Keeps a float32 momentum for weights of any data type."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros(p.shape))
                momentum.mul_(0.9).add_(p.grad.float())
                p.sub_((group["lr"] * momentum).to(p.dtype))


class Wrapped(Optimizer):
    """Steps another optimizer, whose state its own state_dict does not contain."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.inner = Counting(self.param_groups)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


PORTABLE: dict[str, Callable[[Any], Optimizer]] = {
    **{n: make for n, make in OPTIMIZERS.items() if n not in {"object", "quantized"}},
    "counting": Counting,
    "wide momentum": WideMomentum,
    "wrapped": Wrapped,
}
del PORTABLE["ZeroRedundancyOptimizer"]  # RollBack refuses it


class HalfRun(Run):
    """A :class:`Run` with an optimizer of this file, and weights in bfloat16."""

    def __init__(self, name: str) -> None:
        super().__init__("SGD")
        if name == "wide momentum":
            self.module.bfloat16()
        self.optimizer = PORTABLE[name](list(self.module.parameters()))


def stored(run: Run) -> dict[str, Any]:
    """Returns the state after a round trip through a file."""
    snapshot = TrainingSnapshot(run.module, [run.optimizer], portable=True)
    file = io.BytesIO()
    torch.save(snapshot.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "another process"])
@pytest.mark.parametrize("taken", [0, 3], ids=["before the first step", "after three steps"])
@pytest.mark.parametrize("name", PORTABLE)
def test_training_goes_on_as_one_that_was_never_disturbed(
    name: str, taken: int, fresh: bool
) -> None:
    straight, run = HalfRun(name), HalfRun(name)
    run.train(range(taken))
    before, state = run.weights(), stored(run)
    if fresh:
        run = HalfRun(name)
    snapshot = StoredTraining(run.module, [run.optimizer], state)
    for _ in range(2):
        run.train(range(10, 15))
        assert not equal(run.weights(), before)
        snapshot.restore()
        assert equal(run.weights(), before)
    run.train(range(taken, 8))
    straight.train(range(8))
    assert equal(run.weights(), straight.weights())


def test_a_group_that_was_added_stays_without_state() -> None:
    run = Run("AdamW")
    run.train(range(3))
    state = stored(run)
    added = nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [added]})
    run.optimizer.state[added] = {"step": torch.tensor(5.0)}
    StoredTraining(run.module, [run.optimizer], state).restore()
    assert run.optimizer.param_groups[1]["params"] == [added]
    assert added not in run.optimizer.state
    assert int(run.optimizer.state[run.module[0].weight]["step"]) == 3


@pytest.mark.parametrize("change", ["groups", "shape"])
def test_another_model_is_refused_before_any_change(change: str) -> None:
    run = Run("AdamW")
    run.train(range(3))
    state = stored(run)
    other = Run("AdamW")
    if change == "groups":
        other.optimizer = AdamW(list(other.module.parameters())[:2])
    else:
        other.module[2] = nn.Linear(4, 2)
    before = other.weights()
    match = "must have the numbers of parameters" if change == "groups" else "must have a tensor 2"
    with pytest.raises(ValueError, match=match):
        StoredTraining(other.module, [other.optimizer], state).restore()
    assert equal(other.weights(), before)


class Rotary(nn.Module):
    """Computes a table for the longest sequence so far, like rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.length = nn.Parameter(torch.ones(1)), 2
        self.register_buffer("table", torch.arange(2.0), persistent=False)

    def grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("table", torch.arange(float(length)), persistent=False)


@pytest.mark.parametrize("portable", [False, True])
def test_a_computed_buffer_of_another_size_stays(portable: bool) -> None:
    module = Rotary()
    optimizer = SGD(module.parameters(), lr=0.1)
    snapshot: Any = TrainingSnapshot(module, [optimizer], portable=portable)
    if portable:
        copies = ObjectSnapshot([*module.parameters()], optimizer, device="cpu")
        state = training_state(module, [optimizer], copies)
        snapshot = StoredTraining(module, [optimizer], state)
    module.grow(3)
    module.weight.data.fill_(7.0)
    snapshot.restore()
    assert module.weight.item() == 1.0
    assert len(module.table) == module.length == 3
