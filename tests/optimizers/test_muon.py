"""MuonAdamW, compared with torch's Muon and AdamW by hand, and the warm-up of the momentum."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_bigopt import (
    Constant,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    MuonAdamW,
    ParameterGroup,
    StepGuard,
    muon_adamw,
)
from lightning_bigopt.gradients import skip_update_
from lightning_bigopt.optimizers import Muon
from lightning_bigopt.optimizers.muon_adamw import hidden_matrices
from tests.bad_batches import BadBatchModule
from tests.helpers import QUIET, Probe, ResumableLoader, loader
from tests.optimizers.test_combined import Net, assert_equal, backward


def momentum_at(update: int, *, length: int = 300) -> float:
    """The momentum of the speedrun: 0.85 to 0.95 over 300 updates."""
    frac = min(update / length, 1)
    return (1 - frac) * 0.85 + frac * 0.95


def by_hand(net: Net, *, lr: float) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    hidden = [net.blocks[0].weight, net.blocks[2].weight]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [net.embed.weight, net.head.weight]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return muon, torch.optim.AdamW(groups, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))


def test_recipe_is_muon_and_adamw_by_hand_with_the_warmup_of_the_speedrun():
    ours, theirs = Net(), Net()
    optimizer = muon_adamw(ours, lr=3e-3)
    muon, adamw = by_hand(theirs, lr=3e-3)
    for update in range(310):
        backward(ours, update)
        optimizer.step()
        backward(theirs, update)
        muon.param_groups[0]["momentum"] = momentum_at(update)
        muon.step()
        adamw.step()
        if update in (0, 1, 299, 300, 309):
            assert_equal(ours, theirs)
            assert optimizer.param_groups[0]["momentum"] == momentum_at(update)
    assert optimizer.param_groups[0]["momentum"] == 0.95


def test_update_has_the_root_mean_square_of_the_formula():
    weight = nn.Parameter(torch.zeros(8, 32))
    weight.grad = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    Muon(
        [weight],
        lr=0.1,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=30,
        ns_coefficients=(1.5, -0.5, 0.0),
    ).step()
    expected = -0.1 * 0.2 * 32**0.5 * u @ v  # rank 8 of 8 x 32
    torch.testing.assert_close(weight.detach(), expected, rtol=0.05, atol=2e-3)
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.02)


# ---------------------------------------------------------------------------------------- rule


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.table = nn.Parameter(torch.zeros(5, 4))
        self.bag = nn.EmbeddingBag(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


def members(optimizer: MuonAdamW) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def test_hidden_matrices_are_neither_tables_nor_heads_nor_kernels():
    net = Conv()
    assert hidden_matrices(net) == (
        "table",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    )
    assert members(muon_adamw(net, lr=0.1, adamw="table"))["Muon"] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    found = members(
        muon_adamw(
            net,
            lr=0.1,
            adamw=["table", "attention.in*"],
            muon="head.weight",
            no_decay="table",
            groups=[ParameterGroup("conv.*", name="conv", lr_factor=0.5)],
        )
    )
    assert found == {
        "Muon": ["attention.out_proj.weight", "head.weight"],
        "AdamW": ["bag.weight", "attention.in_proj_weight"],
        "AdamW.no_decay": ["table", "attention.in_proj_bias", "attention.out_proj.bias",
                           "norm.weight", "norm.bias", "head.bias"],
        "AdamW.conv": ["conv.weight"],
        "AdamW.conv.no_decay": ["conv.bias"],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_all_parameters_of_tables_and_heads_belong_to_adamw(normalize: Any) -> None:
    net = nn.Sequential(normalize(nn.Embedding(9, 4)), nn.Linear(4, 4), normalize(nn.Linear(4, 9)))
    assert hidden_matrices(net) == ("1.weight",)


def test_tied_head_and_frozen_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    block = "transformer.h.0"
    assert hidden_matrices(gpt2) == (
        f"{block}.attn.c_attn.weight",
        f"{block}.attn.c_proj.weight",
        f"{block}.mlp.c_fc.weight",
        f"{block}.mlp.c_proj.weight",
    )
    gpt2.transformer.h[0].attn.requires_grad_(requires_grad=False)
    assert hidden_matrices(gpt2) == (f"{block}.mlp.c_fc.weight", f"{block}.mlp.c_proj.weight")


def test_only_hidden_matrices_need_no_adamw():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    assert list(muon_adamw(net, lr=0.1, muon="1.weight").parts) == ["Muon"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adamw": "conv.x"}, "every pattern of adamw must match a parameter, got 'conv.x'"),
        ({"muon": "conv.weight"}, "muon must match matrices, got 'conv.weight' with 4 dimensions"),
        ({"muon": "head.weight", "adamw": "head.*"}, "must match different parameters, got 'head"),
        ({"momentum_warmup": -1}, "momentum_warmup must be"),
        ({"momentum_start": 1.0}, r"momentum_start must be in \[0, 1\), got 1.0"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        muon_adamw(Conv(), lr=0.1, **options)


def test_flat_shards_and_models_without_hidden_matrices_raise():
    with pytest.raises(
        ValueError, match="must have a hidden matrix for Muon, got a Linear without o"
    ):
        muon_adamw(nn.Linear(3, 3), lr=0.1)
    flat = nn.Module()
    flat.shard = nn.Parameter(torch.zeros(12))
    with pytest.raises(ValueError, match=r"FSDP1 has flat shards: use FSDP2"):
        muon_adamw(flat, lr=0.1)


# -------------------------------------------------------------------------------------- warm-up


def test_updates_that_are_skipped_do_not_count():
    net = Net()
    optimizer = muon_adamw(net, lr=1e-3, momentum_warmup=10)
    seen = []
    for update in range(6):
        backward(net, update)
        if update == 2:
            skip_update_(optimizer)
        if update == 4:
            optimizer.zero_grad()  # a step without gradients
        optimizer.step()
        seen.append(optimizer.param_groups[0]["momentum"])
    counts = [0, 1, 1, 2, 2, 3]  # updates made before
    assert seen == [momentum_at(count, length=10) for count in counts]
    assert optimizer.param_groups[0]["updates"] == 4


def test_constant_momentum_is_that_of_torch():
    group = muon_adamw(Net(), lr=1e-3, momentum_warmup=0, momentum=0.9).param_groups[0]
    torchs = torch.optim.Muon([torch.zeros(2, 2)], lr=1e-3).param_groups[0]
    assert group["momentum"] == 0.9
    assert group.keys() - torchs.keys() == {"name", "param_names"}


def test_new_group_joins_the_warmup():
    net, new = Net(), nn.Parameter(torch.ones(2, 2))
    optimizer = muon_adamw(net, lr=1e-3, momentum_warmup=10)
    backward(net, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [new], "name": "Muon.new"})
    backward(net, 1)
    new.grad = torch.ones(2, 2)
    optimizer.step()
    momenta = [g["momentum"] for g in optimizer.param_groups if g["name"].startswith("Muon")]
    assert momenta == [momentum_at(1, length=10)] * 2


def test_new_group_of_a_vector_raises():
    optimizer = muon_adamw(Net(), lr=1e-3)
    with pytest.raises(ValueError, match="Muon must be real matrices, got one of shape"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "name": "Muon.new"})
    assert len(optimizer.param_groups) == 3


def test_complex_matrices_and_sparse_gradients_raise_as_in_torch():
    with pytest.raises(
        ValueError, match=r"real matrices, got .* \(2, 2\) and dtype torch.complex64"
    ):
        Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    table = nn.Embedding(2, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="must have dense gradients for Muon, got a sparse one"):
        Muon(table.parameters()).step()


class MuonProbe(Probe):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.muon_options = {"momentum_warmup": 5, **options}
        self.momenta: list[float] = []

    def configure_optimizers(self) -> Any:
        return muon_adamw(self, lr=1e-2, **self.muon_options)

    def on_train_batch_end(self, *args: Any) -> None:
        self.momenta.append(self.trainer.optimizers[0].param_groups[0]["momentum"])


class GuardedMuon(BadBatchModule):
    def configure_optimizers(self) -> Any:
        return muon_adamw(self, lr=1e-2, momentum_warmup=5)


def test_resume_at_any_update_continues_the_warmup(tmp_path: Path) -> None:
    def fit(*callbacks: Any, ckpt: Any = None) -> MuonProbe:
        module = MuonProbe()
        trainer = L.Trainer(
            **{**QUIET, "enable_checkpointing": bool(callbacks)},
            max_epochs=2,
            callbacks=[LearningRateScheduler(Linear()), *callbacks],
        )
        trainer.fit(
            module, ResumableLoader(16, 4), ckpt_path=ckpt, weights_only=True if ckpt else None
        )
        return module

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight = fit(saver)
    assert straight.momenta == [momentum_at(update, length=5) for update in range(8)]
    for stop in (1, 3, 5, 7):
        again = fit(ckpt=tmp_path / f"step={stop}.ckpt")
        assert again.momenta == straight.momenta[stop:]
        assert_equal(again, straight)


def test_rejected_updates_do_not_count():
    module = GuardedMuon({1: float("nan")})
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[StepGuard()])
    trainer.fit(module, loader(16, 4))
    assert trainer.optimizers[0].param_groups[0]["updates"] == 3


def test_schedule_of_the_momentum_raises_unless_there_is_no_warmup():
    def fit(module: MuonProbe) -> None:
        scheduler = HyperparameterScheduler("momentum", Linear())
        L.Trainer(**QUIET, max_steps=4, callbacks=[scheduler]).fit(module, loader(16, 4))

    with pytest.raises(ValueError, match="momentum must have one writer, got MuonAdamW, which sch"):
        fit(MuonProbe())
    module = MuonProbe(momentum_warmup=0)
    fit(module)
    assert module.momenta == pytest.approx([0.95 * 3 / 4, 0.95 / 2, 0.95 / 4, 0.0])  # after each


def test_copies_count_on_their_own():
    net = Net()
    optimizer = muon_adamw(net, lr=1e-3)
    backward(net, 0)
    optimizer.step()
    twin, again = copy.deepcopy((net, optimizer))
    backward(twin, 1)
    again.step()
    assert (optimizer.param_groups[0]["updates"], again.param_groups[0]["updates"]) == (1, 2)


def test_constant_schedule_leaves_all_groups_alone():
    module = MuonProbe()
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[LearningRateScheduler(Constant())])
    trainer.fit(module, loader(16, 4))
    assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], float)
    assert {g["lr"] for g in trainer.optimizers[0].param_groups} == {1e-2}
