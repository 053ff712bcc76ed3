"""The gradient as a weighted mean: over tokens, for micro-batches of any content."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_bigopt import BatchSizeScheduler, BatchSizeSteps, ConstantBatchSize
from tests.batch_helpers import RAMP, TokenProbe, Tokens, tokens_of
from tests.helpers import Probe, cpu_precision, fit, loader


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("weight", ["mask", tokens_of, "tests.batch_helpers.tokens_of"])
def test_every_gradient_is_the_mean_over_tokens(precision: str, weight: Any) -> None:
    module = TokenProbe(lr=0.001)
    scheduler = BatchSizeScheduler(RAMP, weight=weight)
    data = DataLoader(Tokens(27), batch_size=2)
    fit(module, data, scheduler, max_epochs=3, **cpu_precision(precision))
    assert max(module.errors) <= (1e-6 if precision == "32-true" else 2e-2)
    assert sum(tokens for (tokens,) in module.windows) == 3 * int(Tokens(27).mask.sum())


def test_mean_over_samples_differs_from_the_mean_over_tokens() -> None:
    module = TokenProbe(lr=0.001)
    fit(module, DataLoader(Tokens(27), batch_size=2), BatchSizeScheduler(RAMP), max_epochs=1)
    assert max(module.errors) > 1e-2


@pytest.mark.parametrize("unit", [1.0, 2.0**20, 2.0**-20])
def test_weights_times_a_constant_give_the_same_bits(unit: float) -> None:
    def weights(scale: float) -> torch.Tensor:
        module = TokenProbe(lr=0.001)
        scheduler = BatchSizeScheduler(RAMP, weight=lambda batch: batch["mask"].sum() * scale)
        fit(module, DataLoader(Tokens(27), batch_size=2), scheduler, max_epochs=2)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(unit), weights(1.0))


def test_equal_weights_change_nothing() -> None:
    plain, weighed = Probe(), Probe()
    policy = BatchSizeSteps({"0%": 4, "50%": 8})
    fit(plain, loader(32, 2), BatchSizeScheduler(policy), max_epochs=2)
    scheduler = BatchSizeScheduler(policy, weight=lambda batch: 8)
    fit(weighed, loader(32, 2), scheduler, max_epochs=2)
    for mine, theirs in zip(plain.parameters(), weighed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_batch_of_weight_zero_adds_nothing() -> None:
    module = Probe(lr=0.01)
    scheduler = BatchSizeScheduler(
        ConstantBatchSize(4), weight=lambda batch: float(batch[2][0] % 4 == 0)
    )
    fit(module, loader(8, 2), scheduler, max_epochs=1)
    alone = Probe(lr=0.01)
    keep = torch.utils.data.Subset(loader(8, 2).dataset, [0, 1, 4, 5])
    fit(alone, DataLoader(keep, batch_size=2), max_epochs=1)
    for mine, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_window_of_weight_zero_has_a_zero_gradient() -> None:
    module = Probe(lr=0.01)
    before = [p.detach().clone() for p in module.parameters()]
    scheduler = BatchSizeScheduler(
        ConstantBatchSize(4), weight=lambda batch: float((batch[2] >= 4).sum())
    )
    fit(module, loader(8, 2), scheduler, max_epochs=1)
    assert module.norms[0] == 0
    assert module.errors[1] <= 1e-6
    alone = Probe(lr=0.01)  # trained without the first window
    rest = torch.utils.data.Subset(loader(8, 2).dataset, range(4, 8))
    fit(alone, DataLoader(rest, batch_size=4), max_epochs=1)
    for first, mine, theirs in zip(before, module.parameters(), alone.parameters(), strict=True):
        assert not torch.equal(first, mine)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, torch.tensor(-2.0)])
def test_negative_or_non_finite_weight_raises(weight: Any) -> None:
    scheduler = BatchSizeScheduler(ConstantBatchSize(4), weight=lambda batch: weight)
    with pytest.raises(ValueError, match="weight must be non-negative and finite"):
        fit(Probe(), loader(8, 2), scheduler, max_epochs=1)


def test_unknown_function_names_raise(tmp_path: Path) -> None:
    for argument in ("weight", "samples", "tokens"):
        with pytest.raises(ValueError, match=rf"{argument} must be a function.*no.such.function"):
            BatchSizeScheduler(ConstantBatchSize(4), **{argument: "no.such.function"})
        with pytest.raises(ValueError, match=f"{argument} must name a function"):
            BatchSizeScheduler(ConstantBatchSize(4), **{argument: "math.pi"})
    with pytest.raises(ValueError, match=r"weight must be a function of the batch.*'nothing'"):
        fit(
            TokenProbe(),
            DataLoader(Tokens(8), batch_size=2),
            BatchSizeScheduler(ConstantBatchSize(4), weight="nothing"),
            max_epochs=1,
        )
