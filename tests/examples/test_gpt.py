"""The GPT of the examples."""

from __future__ import annotations

import pytest
import torch

from lightning_bigopt.examples.gpt import BytesGPT, CausalSelfAttention


@pytest.fixture
def model() -> BytesGPT:
    return BytesGPT(width=16, layers=2, heads=2, length=12)


def test_attention_is_causal(model: BytesGPT):
    text = torch.randint(0, 256, (2, 12))
    changed = text.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-6)


def test_attention_depends_only_on_the_distance():
    attention = CausalSelfAttention(width=8, heads=1, length=20)
    query, key = torch.randn(2, 1, 1, 1, 8)
    scores = [
        [
            float((rotated(attention, query, i) * rotated(attention, key, j)).sum())
            for j in range(20)
        ]
        for i in range(20)
    ]
    for shift in range(1, 10):
        assert scores[10 + shift][5 + shift] == pytest.approx(scores[10][5], abs=1e-4)
    assert scores[10][5] != pytest.approx(scores[10][6], abs=1e-4)


def rotated(attention: CausalSelfAttention, x: torch.Tensor, position: int) -> torch.Tensor:
    return attention._rotate(x.expand(1, 1, 20, 8))[..., position, :]


def test_loss_of_an_untrained_model_is_that_of_guessing():
    model = BytesGPT()
    loss = model.loss(torch.randint(0, 256, (8, 65)))
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)


def test_model_has_the_stated_size():
    assert sum(parameter.numel() for parameter in BytesGPT().parameters()) == pytest.approx(
        0.4e6, rel=0.05
    )


def test_groups_hold_every_parameter_once_and_only_matrices_decay(model: BytesGPT):
    decay, no_decay = model.configure_optimizers().param_groups
    assert (decay["name"], no_decay["name"]) == ("decay", "no_decay")
    held = [*decay["params"], *no_decay["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert all(parameter.ndim >= 2 for parameter in decay["params"])
    assert all(parameter.ndim < 2 for parameter in no_decay["params"])
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


@pytest.mark.slow
def test_model_memorizes_a_sentence(model: BytesGPT):
    optimizer = model.configure_optimizers()
    batch = torch.tensor(list(b"hello, world!")).expand(4, -1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_heads_must_divide_the_width():
    with pytest.raises(
        ValueError, match=r"width must be a multiple of 2 \* heads = 2 \* 4 = 8, got 12"
    ):
        BytesGPT(width=12)
