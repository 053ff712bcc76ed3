"""Counts and weights of batches by the name of a field."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bigopt.engine.batch_contents import count, weigh

BATCH: dict[str, Any] = {
    "ids": torch.zeros(4, 7),
    "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    "text": ["one", "two"],
}


@pytest.mark.parametrize(("field", "expected"), [("ids", 28), ("mask", 3)])
def test_field_is_counted_by_entries_and_a_mask_by_its_sum(field: str, expected: int) -> None:
    assert count(BATCH, field, name="tokens") == expected
    assert float(weigh(BATCH, field, name="loss_weight")) == expected


@pytest.mark.parametrize("name", ["tokens", "loss_weight"])
def test_field_that_is_no_tensor_raises(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must name a field .* tensor, got 'text'.* list"):
        weigh(BATCH, "text", name=name)


def test_missing_field_raises() -> None:
    with pytest.raises(ValueError, match=r"tokens must be a function .* got 'label'"):
        count(BATCH, "label", name="tokens")
