"""Combined optimizers, compared to the bit with the same optimizers stepped one after another."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_bigopt import (
    CombinedOptimizer,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    ParameterGroup,
    StepGuard,
    combine_optimizers,
    learning_rate_range_test,
    parameter_groups,
)
from lightning_bigopt.gradients import skip_update_, step_control
from lightning_bigopt.optimizers.training_snapshot import TrainingSnapshot
from tests.bad_batches import BadBatchModule
from tests.helpers import QUIET, Probe, ResumableLoader, cpu_precision, loader

MUON = partial(torch.optim.Muon, lr=0.02)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))  # type: ignore[no-any-return]


def combined(net: nn.Module, **options: Any) -> CombinedOptimizer:
    return combine_optimizers(net, {"blocks.* if ndim == 2": MUON, "*": ADAMW}, **options)


def by_hand(net: Net) -> list[torch.optim.Optimizer]:
    matrices = [net.blocks[0].weight, net.blocks[2].weight]
    others = [p for p in net.parameters() if all(p is not m for m in matrices)]
    return [MUON(matrices), ADAMW(others)]


def backward(net: nn.Module, seed: int) -> Tensor:
    x = torch.randint(7, (5,), generator=torch.Generator().manual_seed(seed))
    for parameter in net.parameters():
        parameter.grad = None
    loss = nn.functional.cross_entropy(net(x), x.flip(0))
    loss.backward()
    return loss.detach()


def train(net: nn.Module, optimizers: list[Any], seeds: range = range(4)) -> None:
    for seed in seeds:
        backward(net, seed)
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def contents(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns copies of all states and group values, by names."""
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    states = {
        name: copy.deepcopy(dict(optimizer.state.get(parameter, {})))
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    return {"groups": copy.deepcopy(groups), "states": states}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# -------------------------------------------------------------------------------------- steps


def test_steps_are_those_of_the_parts_by_hand():
    ours, theirs = Net(), Net()
    optimizer = combined(ours)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(ours, [optimizer])
    train(theirs, by_hand(theirs))
    assert_equal(ours, theirs)


def test_groups_have_names_factors_and_weight_decays():
    net = Net()
    optimizer = combined(
        net,
        groups=[
            ParameterGroup("head.*", name="head", lr_factor=0.1),
            ParameterGroup(["embed.*", "blocks.0.bias"], name="input", weight_decay=0.5),
        ],
        no_decay="* if ndim <= 1",
    )
    found = {
        g["name"]: (g["lr"], g["weight_decay"], g["param_names"]) for g in optimizer.param_groups
    }
    assert found == {
        "Muon": (0.02, 0.1, ["blocks.0.weight", "blocks.2.weight"]),
        "AdamW.input": (1e-2, 0.5, ["embed.weight", "blocks.0.bias"]),
        "AdamW.no_decay": (1e-2, 0.0, ["blocks.2.bias"]),
        "AdamW.head": (pytest.approx(1e-3), 0.1, ["head.weight"]),
        "AdamW.head.no_decay": (pytest.approx(1e-3), 0.0, ["head.bias"]),
    }


def test_parts_of_one_class_are_numbered():
    optimizer = combine_optimizers(Net(), {"head.*": ADAMW, "*": torch.optim.AdamW})
    assert list(optimizer.parts) == ["AdamW-0", "AdamW-1"]
    assert [group["name"] for group in optimizer.param_groups] == ["AdamW-0", "AdamW-1"]


def test_closure_is_evaluated_once_and_hooks_run_once():
    net, calls = Net(), []
    optimizer = combined(net)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        return backward(net, 0)

    loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert loss.item() > 0
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_torch_scheduler_writes_the_groups_of_the_parts():
    ours, theirs = Net(), Net()
    optimizer, others = combined(ours), by_hand(theirs)
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, total_iters=3) for o in (optimizer, *others)]
    for seed in range(4):
        backward(ours, seed)
        optimizer.step()
        backward(theirs, seed)
        for other in others:
            other.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_equal(ours, theirs)
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 1e-2]


# -------------------------------------------------------------------------------------- state


def test_state_dict_has_the_format_of_torch_and_loads_in_any_order():
    net = Net()
    optimizer = combined(net)
    train(net, [optimizer])
    saved = copy.deepcopy(optimizer.state_dict())
    assert sorted(saved["state"]) == list(range(7))
    reference = torch.optim.SGD(list(net.named_parameters())).state_dict()
    assert saved.keys() == reference.keys()
    saved["param_groups"].reverse()
    for group in saved["param_groups"]:
        group["params"].reverse()
        group["param_names"].reverse()
    twin = copy.deepcopy(net)
    again = combined(twin)
    again.load_state_dict(saved)
    assert same(contents(again), contents(optimizer))
    train(net, [optimizer], range(4, 7))
    train(twin, [again], range(4, 7))
    assert_equal(net, twin)


def test_state_without_names_loads_by_position():
    net = Net()
    optimizer = combined(net)
    train(net, [optimizer])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    again = combined(copy.deepcopy(net))
    again.load_state_dict(saved)
    assert same(contents(again), contents(optimizer))


def test_state_keeps_the_dtypes_of_each_part():
    net = Net().bfloat16()
    optimizer = combined(net)
    train(net, [optimizer])
    before = contents(optimizer)
    assert before["states"]["head.bias"]["step"].dtype == torch.float32
    again = combined(copy.deepcopy(net))
    again.load_state_dict(optimizer.state_dict())
    assert same(contents(again), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(net, "head", nn.Linear(4, 7, bias=False)), "head.bias unexpected"),
        (lambda net: setattr(net, "extra", nn.Linear(2, 2)), "extra.weight missing, extra.bias mi"),
        (lambda net: setattr(net, "blocks", nn.Tanh()), None),
    ],
)
def test_other_parameters_raise_with_their_names_and_change_nothing(change, message):
    net, other = Net(), Net()
    optimizer = combined(net)
    train(net, [optimizer])
    change(other)
    if message is None:
        again = combine_optimizers(other, {"*": ADAMW})
        message = "must have the parameter groups AdamW, got Muon, AdamW; make the optimizer as in"
    else:
        again = combined(other)
    before = contents(again)
    with pytest.raises(ValueError, match=message):
        again.load_state_dict(optimizer.state_dict())
    assert same(contents(again), before)


def test_state_of_other_parts_raises_with_their_names():
    net = Net()
    saved = combine_optimizers(net, {"blocks.* if ndim == 2": SGD, "*": ADAMW}).state_dict()
    with pytest.raises(
        ValueError, match="must have the parameter groups Muon, AdamW, got SGD, Ada"
    ):
        combined(net).load_state_dict(saved)


def test_copies_and_pickles_continue_as_the_original():
    net = Net()
    optimizer = combined(net)
    train(net, [optimizer])
    for twin, again in (
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ):
        assert same(contents(again), contents(optimizer))
        reference, other = copy.deepcopy((net, optimizer))
        train(twin, [again], range(4, 6))
        train(reference, [other], range(4, 6))
        assert_equal(twin, reference)


def test_state_is_that_of_the_parts():
    net = Net()
    optimizer = combined(net)
    assert not optimizer.state
    assert optimizer.state.get(net.head.bias) is None
    train(net, [optimizer])
    assert set(optimizer.state) == set(net.parameters())
    assert optimizer.state[net.head.bias] is optimizer.parts["AdamW"].state[net.head.bias]
    optimizer.state[net.head.bias]["extra"] = 1
    assert optimizer.state_dict()["state"][6]["extra"] == 1  # the last parameter
    del optimizer.state[net.head.bias]
    assert len(optimizer.state) == 6
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.zeros(1))]
    optimizer.state = {net.head.bias: {"step": torch.zeros(())}}
    assert list(optimizer.state) == [net.head.bias]


def test_hooks_of_state_dicts_run():
    net, calls = Net(), []
    optimizer = combined(net)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(state["more"]))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [1, "after"]


def test_new_group_goes_to_the_part_that_its_name_begins_with():
    net, new = Net(), nn.Parameter(torch.ones(2))
    optimizer = combined(net)
    optimizer.add_param_group({"params": [new], "name": "AdamW.new", "lr": 0.5})
    group = optimizer.parts["AdamW"].param_groups[-1]
    assert group is optimizer.param_groups[-1]
    assert (group["lr"], group["betas"], group["param_names"]) == (
        0.5,
        (0.9, 0.999),
        ["AdamW.new.0"],
    )
    with pytest.raises(ValueError, match="must begin with one of Muon, AdamW, got None; write na"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="a parameter must be in one group, got one that the opt"):
        optimizer.add_param_group({"params": [net.head.bias], "name": "Muon.more"})
    with pytest.raises(ValueError, match=r"must be new, got 'AdamW\.new'; write na"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "name": "AdamW.new"})


# --------------------------------------------------------------------------------------- skips


def test_skipped_update_changes_nothing_in_any_part():
    net = Net()
    optimizer = combined(net)
    train(net, [optimizer])
    before, weights = contents(optimizer), copy.deepcopy(net)
    backward(net, 9)
    skip_update_(optimizer)
    optimizer.step()
    backward(net, 9)
    step_control(optimizer).skip_next()
    optimizer.step()
    assert same(contents(optimizer), before)
    assert_equal(net, weights)


@pytest.mark.parametrize(
    ("of_sgd", "of_adamw"), [(False, False), (True, True), (True, False), (False, True)]
)
def test_grad_scaler_scales_and_skips_all_parts(of_sgd: bool, of_adamw: bool) -> None:
    parts = {"blocks.*": partial(torch.optim.SGD, lr=0.1, fused=of_sgd)}
    parts["*"] = partial(torch.optim.AdamW, lr=1e-2, fused=of_adamw)
    net, reference = Net(), Net()
    optimizer, plain = combine_optimizers(net, parts), combine_optimizers(reference, parts)
    assert optimizer._step_supports_amp_scaling is (of_sgd and of_adamw)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for seed in range(3):
        backward(net, seed)
        for parameter in net.parameters():
            parameter.grad *= scaler.get_scale()
        scaler.scale(torch.ones(()))
        if seed == 1:
            net.head.bias.grad[0] = math.inf
            before, weights = contents(optimizer), copy.deepcopy(net)
        scaler.step(optimizer)
        scaler.update()
        if seed == 1:
            assert same(contents(optimizer), before)
            assert_equal(net, weights)
            assert scaler.get_scale() == 2.0
        else:
            train(reference, [plain], range(seed, seed + 1))
        assert not any(
            {"grad_scale", "found_inf"} & vars(p).keys() for p in optimizer.parts.values()
        )
    assert_equal(net, reference)


def test_clipping_in_fused_kernels_is_that_of_the_gradients():
    weights = []
    for fused in (False, True):
        parts = {"net.0.*": partial(torch.optim.SGD, lr=0.1, fused=fused)}
        parts["*"] = partial(torch.optim.AdamW, lr=1e-2, fused=fused)
        module = Combined(parts)
        trainer = L.Trainer(**QUIET, max_steps=5, callbacks=[GradientClipping(NormClip(0.1))])
        trainer.fit(module, loader(20, 4))
        weights.append([p.detach() for p in module.parameters()])
    for plain, kernel in zip(*weights, strict=True):
        torch.testing.assert_close(plain, kernel)


# ------------------------------------------------------------------------------------- Trainer

PARTS: dict[str, Any] = {"*.weight": MUON, "*": ADAMW}


class Combined(Probe):
    def __init__(self, parts: dict[str, Any] = PARTS) -> None:
        super().__init__()
        self.parts = parts

    def configure_optimizers(self) -> Any:
        return combine_optimizers(self, self.parts, no_decay="*.bias")


class Guarded(BadBatchModule):
    def configure_optimizers(self) -> Any:
        return combine_optimizers(self, PARTS)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resume_is_exact_within_an_epoch_and_a_window(tmp_path: Path, precision: str) -> None:
    def fit(*callbacks: Any, ckpt: Any = None) -> Combined:
        module = Combined()
        scheduler = LearningRateScheduler(Linear(), groups={"Muon": Linear(end=0.5)})
        options = {"accumulate_grad_batches": 2, "max_epochs": 2}
        options["enable_checkpointing"] = bool(callbacks)
        trainer = L.Trainer(
            **{**QUIET, **options, **cpu_precision(precision)},
            callbacks=[scheduler, GradientClipping(NormClip(0.5)), StepGuard(), *callbacks],
        )
        trainer.fit(
            module,
            ResumableLoader(24, 4),
            ckpt_path=ckpt,
            weights_only=True if ckpt else None,
        )
        return module

    straight = fit(
        ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    )
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 6
    for file in files[:-1]:
        assert_equal(fit(ckpt=file), straight)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_guard_skips_an_update_in_all_parts(precision: str) -> None:
    module = Guarded({2: math.nan})
    guard = StepGuard()
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[guard], **cpu_precision(precision))
    trainer.fit(module, loader(20, 4))
    assert len(module.changed) == 5
    assert [bool(changed) for changed in module.changed] == [True, True, False, True, True]


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ({"head.*": ADAMW}, "must have a pattern for every parameter, got none for 'embed.weigh"),
        ({}, "optimizers must not be empty, got {}; write"),
        ({"nothing": ADAMW, "*": ADAMW}, "every key of optimizers must match a param.*'nothing'"),
        ({"*": ADAMW, "head.*": SGD}, "an earlier pattern matches head.weight first"),
        ({"blocks.* if ndim > 1": MUON, "*": ADAMW}, "must compare ndim with a number, got 'blo"),
        ({"blocks.* if ndim == 3": MUON, "*": ADAMW}, "must match a parameter, got 'blocks.* if"),
        ({"*": torch.optim.SGD([torch.ones(1)])}, "must make an optimizer, got SGD, which is one"),
        ({"*": 3}, r"optimizers\['\*'\] must be a function, got 3; write"),
        ({"*": lambda groups: 3}, "must be an Optimizer, got 3; it must return an optimizer"),
        (
            {"*": lambda _: ADAMW([torch.ones(1)])},
            "got AdamW with others; use a class of optimizer",
        ),
        (
            {"*": partial(torch.optim.LBFGS, lr=1.0)},
            "step without a closure, got LBFGS; use it alo",
        ),
        (
            {"*": MUON},
            "got 'embed.weight' and others, and the error 'Muon only sup",
        ),
        ([ADAMW], "optimizers must be a Mapping, got .*; write {'"),
    ],
)
def test_invalid_parts_raise(optimizers: Any, message: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False)) if "LBFGS" in message else Net()
    with pytest.raises(ValueError, match=message):
        combine_optimizers(net, optimizers)


def test_frozen_and_tied_parameters():
    net = Net()
    net.embed.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match=r"got 'embed.*', which matches frozen ones only"):
        combine_optimizers(net, {"embed.*": SGD, "*": ADAMW})
    assert "embed.weight" not in combined(net).param_groups[1]["param_names"]
    net.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="module must have a parameter to train, got none that re"):
        combined(net)
    tied = Net()
    tied.head.weight = tied.embed.weight
    with pytest.raises(ValueError, match=r"head.weight is tied to embed.weight: write a patt"):
        combine_optimizers(tied, {"head.weight": SGD, "*": ADAMW})
    names = [n for g in combined(tied).param_groups for n in g["param_names"]]
    assert names.count("embed.weight") == 1
    assert "head.weight" not in names


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([ParameterGroup("x", name="x")], "every pattern of groups must match a parameter, got 'x"),
        (
            [ParameterGroup("*", name="a"), ParameterGroup("*", name="a")],
            "got 'a' twice; write one",
        ),
        (ParameterGroup("*", name="a"), "groups must be a list of ParameterGroup objects, got"),
        ([{"pattern": "*"}], r"groups\[0\] must be a ParameterGroup, got"),
    ],
)
def test_invalid_groups_raise(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combined(Net(), groups=groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"name": 3}, "name must be a str, got 3"),
        ({"name": "a", "lr_factor": 0.0}, "lr_factor must be positive and finite, got 0.0"),
        ({"name": "a", "weight_decay": -1.0}, "weight_decay must be non-negative and finite"),
        ({"name": "no_decay"}, "name must not end in 'no_decay' or 'decay', .* got 'no_decay'"),
        ({"name": "head.decay"}, "name must not end in 'no_decay' or 'decay', .* got 'head.d"),
    ],
)
def test_invalid_specifications_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterGroup("*", **options)


def test_a_group_without_patterns_raises():
    with pytest.raises(ValueError, match=r"pattern must not be empty, got \[\]; write 'head"):
        ParameterGroup([], name="head")


@pytest.mark.parametrize("make", [combined, partial(parameter_groups, weight_decay=0.1)])
def test_lazy_parameters_raise(make: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"initialized parameters, got '1.weight' without a shape"):
        make(net)


def test_weight_decay_of_an_optimizer_without_one_raises():
    groups = [ParameterGroup("head.*", name="head", weight_decay=0.1)]
    rprop = {"*": partial(torch.optim.Rprop, lr=0.1)}
    with pytest.raises(
        ValueError, match="weight_decay must be None for Rprop, which has none, got"
    ):
        combine_optimizers(Net(), rprop, groups=groups)


# ------------------------------------------------------------------------------------ snapshots


def test_snapshot_restores_every_part():
    net = Net()
    optimizer = combined(net)
    train(net, [optimizer])
    weights, before = copy.deepcopy(net), contents(optimizer)
    snapshot = TrainingSnapshot(net, [optimizer])
    train(net, [optimizer], range(4, 6))
    optimizer.param_groups[0]["lr"] = 9.0
    optimizer.load_state_dict(optimizer.state_dict())
    new = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [new], "name": "AdamW.new"})
    snapshot.restore()
    assert optimizer.param_groups[-1]["name"] == "AdamW.new"
    del optimizer.parts["AdamW"].param_groups[-1]
    assert same(contents(optimizer), before)
    assert_equal(net, weights)


def test_range_test_restores_every_part():
    weights = []
    for is_tested in (False, True):
        module = Combined()
        trainer = L.Trainer(**QUIET, max_steps=4)
        if is_tested:
            learning_rate_range_test(trainer, module, ResumableLoader(16, 4), steps=15)
            assert not trainer.optimizers or not trainer.optimizers[0].state
        trainer.fit(module, ResumableLoader(16, 4))
        weights.append(module)
    assert_equal(*weights)


def test_groups_that_are_assigned_go_to_their_parts():
    optimizer = combined(Net())
    groups = [dict(group) for group in reversed(optimizer.param_groups)]
    optimizer.param_groups = groups
    assert optimizer.parts["AdamW"].param_groups == [groups[0]]
    assert optimizer.parts["Muon"].param_groups == [groups[1]]
