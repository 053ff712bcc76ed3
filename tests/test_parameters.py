"""Lists of endless iterables, and patterns for parameters that are tied."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import AGC, GradientClipping, Groups, NormClip, OptimizationMonitor
from lightning_bigopt.optimizers import parameter_groups
from lightning_bigopt.parameters import listed
from tests.helpers import QUIET


class Tied(L.LightningModule):
    """A language model whose head is the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.lm_head(self.body(self.embed(batch)))
        return nn.functional.cross_entropy(logits, batch)


def fit(callback: L.Callback) -> None:
    data = torch.arange(10).view(5, 2)
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[callback])
    trainer.fit(Tied(), torch.utils.data.DataLoader(data, batch_size=None))


USES: dict[str, Callable[[str], object]] = {
    "layers": lambda pattern: fit(OptimizationMonitor(layers={"head": pattern})),
    "groups of rules": lambda pattern: fit(GradientClipping(Groups({pattern: NormClip()}))),
    "excluded": lambda pattern: fit(GradientClipping(AGC(exclude=pattern))),
    "no decay": lambda pattern: parameter_groups(Tied(), weight_decay=0.1, no_decay=pattern),
}


@pytest.mark.parametrize("use", list(USES))
def test_a_pattern_for_a_tied_parameter_names_the_one_that_is_used(use: str) -> None:
    message = r"got 'lm_head\.\*'.*; lm_head\.weight is tied to embed\.weight: write a pattern for"
    with pytest.raises(ValueError, match=message):
        USES[use]("lm_head.*")
    USES[use]("embed.*")


def test_a_layer_of_a_tied_parameter_names_the_one_that_is_used() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to embed\.weight"):
        parameter_groups(
            Tied(), weight_decay=0.1, lr=0.1, layer_decay=0.5, layers=["embed.*", "body.*", "lm_*"]
        )


@pytest.mark.parametrize("use", list(USES))
def test_a_pattern_that_matches_nothing_is_not_called_tied(use: str) -> None:
    with pytest.raises(ValueError, match=r"got 'haed\.\*'.*; correct or remove the pattern$"):
        USES[use]("haed.*")


def test_no_more_elements_are_taken_than_needed():
    numbers = itertools.count()
    assert listed(numbers, str) is None
    assert next(numbers) == 1
    assert listed(numbers, int, most=3) == [2, 3, 4]
