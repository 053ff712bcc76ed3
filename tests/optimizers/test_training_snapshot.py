"""TrainingSnapshot restores weights and optimizers to the bit, or raises before any change."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import prune
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.testing._internal.two_tensor import TwoTensor

from lightning_bigopt.optimizers.training_snapshot import TrainingSnapshot


class Lookahead(Optimizer):
    """Wraps another optimizer, as its paper: slow weights outside ``state``, and a counter."""

    def __init__(self, inner: Optimizer, *, every: int = 2) -> None:
        self.inner, self.every, self.count = inner, every, 0
        super().__init__(inner.param_groups, {})
        self.slow = [p.detach().clone() for g in inner.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            fast = [p for g in self.inner.param_groups for p in g["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)
        return loss


class Moment:
    """A moment in an object that is no dict."""

    def __init__(self, like: Tensor) -> None:
        self.value, self.count = torch.zeros_like(like), 0


class ObjectState(SGD):
    """Keeps a moment of each parameter in an object of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.moments = [Moment(p) for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for moment, parameter in zip(self.moments, self.param_groups[0]["params"], strict=True):
            moment.value = 0.9 * moment.value + parameter.grad
            moment.count += 1
            parameter.sub_(moment.value, alpha=0.1 / moment.count)
        return loss


class SharesMemory(TwoTensor):
    """Its copies share the memory of its parts, as those of torchao's optimizer states."""

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._to_copy.default:
            return cls(args[0].a, args[0].b)
        return super().__torch_dispatch__(function, types, args, kwargs)


class Quantized(SGD):
    """Keeps moments in tensors made of two others, as those of torchao."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                zeros = torch.zeros_like(parameter)
                state["moment"] = SharesMemory(zeros, zeros.clone())
            state["moment"].a.mul_(0.9).add_(parameter.grad)
            state["moment"].b.add_(1)
            parameter.sub_(0.1 * state["moment"].a / state["moment"].b)
        return loss


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def zero_redundancy(parameters: Any) -> Optimizer:
    with warnings.catch_warnings():
        # Of torch, when the module is imported: torch.jit.script is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(parameters, AdamW, lr=0.01)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "AdamW, tensor lr": lambda p: AdamW(p, lr=torch.tensor(0.01)),
    "AdamW, fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD, momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "LBFGS": lambda p: LBFGS(p, max_iter=3, history_size=3),
    "Lookahead": lambda p: Lookahead(AdamW(p, lr=0.01)),
    "ZeroRedundancyOptimizer": zero_redundancy,
    "object": ObjectState,
    "quantized": lambda p: Quantized(p, lr=0.1),
}


class Run:
    """Trains a small model; the batches depend on the number of the step only."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = OPTIMIZERS[name](list(self.module.parameters()))

    def train(self, steps: range) -> None:
        dtype = next(self.module.parameters()).dtype
        for step in steps:
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)).to(dtype)

            def closure(x: Tensor = x) -> Tensor:
                self.optimizer.zero_grad()
                loss = self.module(x).square().mean()
                loss.backward()
                return loss

            self.optimizer.step(closure)

    def weights(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.module.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def replace_parameter(run: Run) -> None:
    new = nn.Parameter(run.module[0].weight.detach() + 1)
    old, run.module[0].weight = run.module[0].weight, new
    optimizers = [run.optimizer, *filter(None, [getattr(run.optimizer, "inner", None)])]
    for group in (group for one in optimizers for group in one.param_groups):
        group["params"][:] = [new if p is old else p for p in group["params"]]


CHANGES: dict[str, Callable[[Run], object]] = {
    "nothing": lambda run: None,
    "a parameter replaced": replace_parameter,
    "a layer replaced": lambda run: setattr(run.module, "2", nn.Linear(4, 1)),
    "a buffer replaced": lambda run: setattr(run.module[1], "running_mean", torch.ones(4)),
    "groups changed": lambda run: run.optimizer.param_groups[0].update(lr=7.0, extra=1),
    "state cleared": lambda run: run.optimizer.state.clear(),
    "attribute added": lambda run: setattr(run.optimizer, "extra", 1),
}


@pytest.mark.parametrize("taken", [0, 3], ids=["before the first step", "after three steps"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_a_restore_equals_that_after_the_snapshot(
    name: str, change: str, taken: int, request: pytest.FixtureRequest
) -> None:
    """The right weights are those of a run that was never disturbed."""
    if name == "ZeroRedundancyOptimizer":
        request.getfixturevalue("process_group")
    straight, run = Run(name), Run(name)
    run.train(range(taken))
    before = run.weights()
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    for _ in range(2):
        run.train(range(10, 15))
        CHANGES[change](run)
        if change == "nothing":
            assert not equal(run.weights(), before)
        snapshot.restore()
        assert equal(run.weights(), before)
        assert not hasattr(run.optimizer, "extra")
        assert "extra" not in run.optimizer.param_groups[0]
    run.train(range(taken, 8))
    straight.train(range(8))
    assert equal(run.weights(), straight.weights())


def test_state_that_was_loaded_between_goes_back() -> None:
    straight, run = Run("AdamW"), Run("AdamW")
    run.train(range(3))
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    state = copy.deepcopy(run.optimizer.state_dict())
    run.train(range(10, 12))
    run.optimizer.load_state_dict(state)
    snapshot.restore()
    assert len(run.optimizer.param_groups) == 1
    run.train(range(3, 8))
    straight.train(range(8))
    assert equal(run.weights(), straight.weights())


@pytest.mark.parametrize("name", ["AdamW", "Lookahead"])
def test_a_group_that_was_added_stays_without_state(name: str) -> None:
    run = Run(name)
    run.train(range(2))
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    late = nn.Parameter(torch.ones(1))
    inner = getattr(run.optimizer, "inner", run.optimizer)
    inner.add_param_group({"params": [late], "lr": 0.5})
    inner.state[late]["step"] = torch.ones(())
    for _ in range(2):
        snapshot.restore()
        assert len(inner.param_groups) == 2
        assert inner.param_groups[1]["params"] == [late]
        assert late not in inner.state


def move(optimizer: Optimizer) -> None:
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": 0.5})


def move_without_a_check(optimizer: Optimizer) -> None:
    first = optimizer.param_groups[0]
    optimizer.param_groups.append({**first, "params": [first["params"].pop()], "lr": 0.5})


def move_between(optimizer: Optimizer) -> None:
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop(0))


def new_lists(optimizer: Optimizer) -> None:
    first, second = optimizer.param_groups
    first["params"], second["params"] = (
        second["params"][:1],
        [
            *first["params"],
            *second["params"][1:],
        ],
    )


def load_and_move(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    move(optimizer)


MOVES: dict[str, Callable[[Optimizer], object]] = {
    "to a new group": move,
    "to a new group, appended": move_without_a_check,
    "to another group": move_between,
    "new lists": new_lists,
    "loaded, then to a new group": load_and_move,
    "a group removed": lambda optimizer: optimizer.param_groups.pop(0),
    "groups reversed": lambda optimizer: optimizer.param_groups.reverse(),
    "all groups in one": lambda optimizer: optimizer.param_groups[0]["params"].extend(
        optimizer.param_groups.pop()["params"]
    ),
}


@pytest.mark.parametrize("name", ["AdamW", "Lookahead"])
@pytest.mark.parametrize("change", MOVES)
def test_each_parameter_goes_back_to_its_group(change: str, name: str) -> None:
    def grouped() -> Run:
        run = Run("AdamW")
        parts = [list(run.module[0].parameters()), list(run.module[2].parameters())]
        groups = [{"params": parts[0]}, {"params": parts[1], "lr": 0.1}]
        inner = AdamW(groups, lr=0.01)
        run.optimizer = Lookahead(inner) if name == "Lookahead" else inner
        run.train(range(3))
        return run

    straight, run = grouped(), grouped()
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    inner = getattr(run.optimizer, "inner", run.optimizer)
    before = [[id(p) for p in group["params"]] for group in inner.param_groups]
    MOVES[change](inner)
    if name == "AdamW":
        run.train(range(10, 12))
    for _ in range(2):
        snapshot.restore()
        for optimizer in (inner, run.optimizer):
            now = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
            assert now == before
    for each in (run, straight):
        each.train(range(3, 8))
    assert equal(run.weights(), straight.weights())


def test_an_added_group_keeps_its_new_parameters_only() -> None:
    run = Run("AdamW")
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    old, late = run.optimizer.param_groups[0]["params"].pop(), nn.Parameter(torch.ones(1))
    run.optimizer.add_param_group({"params": [old, late], "lr": 0.5})
    added = run.optimizer.param_groups[1]
    snapshot.restore()
    first, second = run.optimizer.param_groups
    assert first["params"][-1] is old
    assert second is added
    assert second["params"] == [late]


def test_hooks_that_were_added_stay() -> None:
    run, calls = Run("AdamW"), []
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    run.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    snapshot.restore()
    run.train(range(2))
    assert len(calls) == 2


REFUSED: dict[str, Callable[[Run], object]] = {
    "shape": lambda run: setattr(run.module[2].weight, "data", torch.ones(2, 4)),
    "dtype": lambda run: run.module[0].double(),
    "pruned": lambda run: prune.random_unstructured(run.module[0], "weight", 0.5),
    "removed layer": lambda run: run.module.__delitem__(1),
    "removed parameter": lambda run: run.module[0].register_parameter("bias", None),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_restored_is_refused_before_any_change(change: str) -> None:
    run = Run("AdamW")
    run.train(range(2))
    snapshot = TrainingSnapshot(run.module, [run.optimizer])
    run.train(range(2, 4))
    REFUSED[change](run)
    weights, state = run.weights(), copy.deepcopy(run.optimizer.state_dict())
    message = "must keep its shape and dtype" if change in {"shape", "dtype"} else "got none named"
    with pytest.raises(ValueError, match=message):
        snapshot.restore()
    assert equal(run.weights(), weights)
    for one, other in zip(
        state["state"].values(), run.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)
