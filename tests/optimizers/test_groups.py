"""Parameter groups, compared with those of Hugging Face and with given learning rates."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigopt import (
    LearningRateScheduler,
    Linear,
    OptimizationMonitor,
    ParameterGroup,
    parameter_groups,
)
from lightning_bigopt.examples import BytesGPT
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET


def names_of(module: nn.Module, group: dict[str, Any]) -> set[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return {known[id(parameter)] for parameter in group["params"]}


@pytest.fixture
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=3, n_head=2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 3)
        self.blocks = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)


def test_weight_decay_is_that_of_the_hugging_face_trainer(gpt2):
    from transformers import Trainer

    everything = dict(gpt2.named_parameters(remove_duplicate=False))  # lm_head is tied to wte
    decayed = {id(everything[n]) for n in Trainer.get_decay_parameter_names(None, gpt2)}
    groups = parameter_groups(gpt2, weight_decay=0.1)
    decay, others = groups
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert (others["name"], others["weight_decay"]) == ("no_decay", 0.0)
    assert set(map(id, decay["params"])) == decayed
    assert names_of(gpt2, decay) | names_of(gpt2, others) == set(dict(gpt2.named_parameters()))
    assert all("lr" not in group for group in groups)


def test_tied_weights_count_once(gpt2):
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    groups = parameter_groups(gpt2, weight_decay=0.1, lr=1.0, layer_decay=0.5)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)) == len(list(gpt2.parameters()))
    torch.optim.AdamW(groups)  # raises for a parameter in two groups


def test_layers_of_a_gpt2_from_embedding_to_head(gpt2):
    groups = parameter_groups(gpt2, weight_decay=0.1, lr=2.0, layer_decay=0.8, min_factor=0.5)
    rates = {name: group["lr"] for group in groups for name in names_of(gpt2, group)}
    by_hand = {
        "transformer.wte.weight": 2.0 * 0.5,  # 0.8⁴ = 0.41 is below min_factor
        "transformer.wpe.weight": 2.0 * 0.5,
        "transformer.h.0.attn.c_attn.weight": 2.0 * 0.8 * 0.8 * 0.8,
        "transformer.h.0.ln_1.weight": 2.0 * 0.8 * 0.8 * 0.8,
        "transformer.h.1.mlp.c_fc.bias": 2.0 * 0.8 * 0.8,
        "transformer.h.2.mlp.c_fc.weight": 2.0 * 0.8,
        "transformer.ln_f.weight": 2.0,
    }
    assert {name: rates[name] for name in by_hand} == pytest.approx(by_hand)
    decays = {name: g["weight_decay"] for g in groups for name in names_of(gpt2, g)}
    assert decays["transformer.h.1.ln_1.weight"] == 0.0
    assert decays["transformer.h.1.mlp.c_fc.weight"] == 0.1


def test_update_moves_each_layer_by_its_learning_rate():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD(
        parameter_groups(net, lr=1.0, weight_decay=0.25, layer_decay=0.5), momentum=0.0
    )
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        rate = {"0": 0.25, "2": 0.5, "4": 1.0}[name[0]]
        decay = 0.25 if name.endswith("weight") else 0.0
        expected = before[name] - rate * (parameter.grad + decay * before[name])
        torch.testing.assert_close(parameter.detach(), expected)


def test_patterns_for_layers_and_for_decay():
    net = Net()
    groups = parameter_groups(
        net, lr=1.0, weight_decay=0.1, no_decay="embed.*", layer_decay=0.5, layers=["embed.*", "*"]
    )
    found = {group["name"]: (group["lr"], names_of(net, group)) for group in groups}
    assert found == {
        "layer_0.no_decay": (0.5, {"embed.weight", "embed.bias"}),
        "layer_1.decay": (1.0, {"blocks.0.weight", "head.weight"}),
        "layer_1.no_decay": (
            1.0,
            {"blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "head.bias"},
        ),
    }


def test_bias_with_two_dimensions_has_no_weight_decay():
    net = nn.Sequential(nn.Linear(2, 2))
    net.bias = nn.Parameter(torch.zeros(2, 2))
    _, others = parameter_groups(net, weight_decay=0.1)
    assert names_of(net, others) == {"bias", "0.bias"}


def test_frozen_parameters_are_left_out():
    net = Net()
    net.embed.requires_grad_(requires_grad=False)
    groups = parameter_groups(net, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert not {n for g in groups for n in names_of(net, g)} & {"embed.weight", "embed.bias"}
    assert groups[0]["name"] == "layer_0.decay"  # the first block


def test_compiled_module_has_the_same_groups():
    net, compiled = Net(), nn.Module()
    compiled._orig_mod = net  # as torch.compile does, without its import of several seconds
    options = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5, "layers": ["embed.*", "*"]}
    plain, compiled = parameter_groups(net, **options), parameter_groups(compiled, **options)
    assert [g["name"] for g in plain] == [g["name"] for g in compiled]
    assert [list(map(id, g["params"])) for g in plain] == [
        list(map(id, g["params"])) for g in compiled
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be non-negative and finite, got -0.1"),
        ({"lr": -1.0}, "lr must be non-negative and finite, got -1.0"),
        ({"lr": 1.0, "layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"layer_decay": 0.8}, "lr must be given with layer_decay, got None"),
        ({"min_factor": 2.0}, r"min_factor must be in \[0, 1\], got 2.0"),
        (
            {"no_decay": "nothing.*"},
            "every pattern of no_decay must match .*, got 'nothing",
        ),
        (
            {"lr": 1.0, "layer_decay": 0.8, "layers": ["*", "head.*"]},
            r"got 'head\.\*'.*an earlier pattern matches head.weight first",
        ),
        (
            {"lr": 1.0, "layer_decay": 0.8, "layers": ["embed.*", "head.*"]},
            "layers must contain a pattern for every parameter, got none for 'blocks.0.weight'",
        ),
    ],
)
def test_invalid_arguments_raise_with_their_names(options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(Net(), **{"weight_decay": 0.1, **options})


def test_module_without_trainable_parameters_or_matrices_raises():
    with pytest.raises(ValueError, match="module must have a parameter to train, got none"):
        parameter_groups(nn.Tanh(), weight_decay=0.1)
    with pytest.raises(ValueError, match="module must be a Module, got a generator; pass the mod"):
        parameter_groups(nn.Linear(1, 1).parameters(), weight_decay=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_decay must be 0 if no parameter has two dim"):
        parameter_groups(nn.BatchNorm1d(3), weight_decay=0.1)
    (group,) = parameter_groups(nn.BatchNorm1d(3), weight_decay=0.0)
    assert group["name"] == "no_decay"


class LayerWise(BytesGPT):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self, lr=self.lr, weight_decay=0.1, layer_decay=0.5)
        return torch.optim.AdamW(groups)


def test_monitor_logs_the_learning_rate_of_every_layer(tmp_path):
    L.seed_everything(0, verbose=False)
    module = LayerWise(lr=1e-2, width=8, layers=2, heads=2, length=8)
    trainer = L.Trainer(
        **{
            **QUIET,
            "logger": TensorBoardLogger(tmp_path),
            "max_steps": 4,
            "callbacks": [LearningRateScheduler(Linear()), OptimizationMonitor(every=1)],
        }
    )
    text = torch.randint(256, (16, 9))
    trainer.fit(module, DataLoader(text, batch_size=2), DataLoader(text, batch_size=2))
    curves = read_run(tmp_path).select("optim/lr")
    assert set(curves) == {
        f"optim/lr/layer_{layer}.{kind}"
        for layer, kinds in enumerate(
            [["decay"], *[["decay", "no_decay"]] * 2, ["decay", "no_decay"]]
        )
        for kind in kinds
    }
    for layer in range(4):
        seen = [value for _, value in curves[f"optim/lr/layer_{layer}.decay"]]
        peak = 1e-2 * 0.5 ** (3 - layer)
        assert seen == pytest.approx([peak, peak * 3 / 4, peak / 2, peak / 4])


def test_all_arguments_but_the_module_are_keyword_only():
    parameters = list(inspect.signature(parameter_groups).parameters.values())
    assert {p.kind for p in parameters[1:]} == {inspect.Parameter.KEYWORD_ONLY}


def test_groups_by_pattern_have_factors_and_weight_decays():
    net = Net()
    groups = parameter_groups(
        net,
        lr=1.0,
        weight_decay=0.1,
        no_decay="embed.*",
        groups=[
            ParameterGroup(["head.*", "embed.bias"], name="ends", lr_factor=0.5),
            ParameterGroup("blocks.1.* if ndim == 1", name="norm", weight_decay=0.2),
        ],
    )
    found = {g["name"]: (g["lr"], g["weight_decay"], names_of(net, g)) for g in groups}
    assert found == {
        "decay": (1.0, 0.1, {"blocks.0.weight"}),
        "no_decay": (1.0, 0.0, {"embed.weight", "blocks.0.bias"}),
        "ends.decay": (0.5, 0.1, {"head.weight"}),
        "ends.no_decay": (0.5, 0.0, {"head.bias", "embed.bias"}),
        "norm": (1.0, 0.2, {"blocks.1.weight", "blocks.1.bias"}),
    }
    torch.optim.AdamW(groups)


def test_factor_of_a_group_multiplies_that_of_its_layer():
    groups = parameter_groups(
        Net(),
        lr=1.0,
        weight_decay=0.1,
        layer_decay=0.5,
        groups=[ParameterGroup("blocks.*", name="blocks", lr_factor=0.1)],
    )
    assert {group["name"]: group["lr"] for group in groups} == {
        "layer_0.decay": 0.125,
        "layer_0.no_decay": 0.125,
        "layer_1.blocks.decay": pytest.approx(0.25 * 0.1),
        "layer_1.blocks.no_decay": pytest.approx(0.25 * 0.1),
        "layer_2.blocks.no_decay": pytest.approx(0.5 * 0.1),
        "layer_3.decay": 1.0,
        "layer_3.no_decay": 1.0,
    }


def test_factor_without_a_learning_rate_raises():
    groups = [ParameterGroup("head.*", name="head", lr_factor=0.5)]
    with pytest.raises(
        ValueError, match="lr must be given with lr_factor, got None with lr_factor=0"
    ):
        parameter_groups(Net(), weight_decay=0.1, groups=groups)
