"""compare(): pairs against plain runs, the searches, divergence, folders and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bigopt import (
    Comparison,
    Side,
    compare,
)
from lightning_bigopt.tuning import Log, study
from tests.helpers import QUIET
from tests.tuning.study_helpers import Network, samples

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Records(L.Callback):
    """Keeps the seed-dependent parts of each training: first weights and the batches."""

    def __init__(self) -> None:
        self.fits: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
        self.fits.append({"weights": weights, "lr": pl_module.lr, "inputs": []})

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        self.fits[-1]["inputs"].append(batch[0][:, 0].clone())


def shuffled(size: int = 8) -> Any:
    """Returns a loader that draws its order from the global random state."""
    return (
        DataLoader(samples(64, 0), batch_size=size, shuffle=True),
        DataLoader(samples(32, 1), batch_size=32),
    )


class Plain(L.Trainer):
    def __init__(self, *callbacks: Any, **options: Any) -> None:
        super().__init__(**{**QUIET, "max_steps": 12, **options, "callbacks": list(callbacks)})


def side(*callbacks: Any, **options: Any) -> Side:
    given: dict[str, Any] = {
        "make_module": partial(Network, lr=0.05),
        "make_data": shuffled,
        "make_trainer": lambda: Plain(*callbacks, val_check_interval=4),
        **options,
    }
    return Side(**given)


def test_losses_are_paired_and_the_test_is_that_of_scipy():
    found = compare(side(), side(make_module=partial(Network, lr=0.02)), seeds=4)
    assert isinstance(found, Comparison)
    assert found.seeds == (1, 2, 3, 4)
    oracle = ttest_rel(found.b.losses, found.a.losses)
    assert found.test is not None
    assert found.test.statistic == pytest.approx(oracle.statistic, rel=1e-12)
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-12)
    assert found.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)), rel=1e-12)
    assert found.updates_ratio == 1
    assert {run.updates for run in (*found.a.runs, *found.b.runs)} == {12}
    assert found.a.study is None
    assert (found.a.name, found.b.name) == ("a", "b")


class Wide(Network):
    """Draws more random numbers for its weights, and some in every step."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr=lr, width=16)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.rand(3)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Network, Wide])
def test_seed_sets_weights_and_the_order_of_samples_on_both_sides(kind: Callable[..., Any]):
    a, b = Records(), Records()
    compare(
        side(a),
        side(b, make_module=partial(kind, lr=0.01), make_trainer=lambda: Plain(b, max_steps=20)),
        seeds=[5, 7],
    )
    for first, second in zip(a.fits, b.fits, strict=True):
        if kind is Network:
            assert torch.equal(first["weights"], second["weights"])
        # Twelve updates on one side and twenty on the other: more than one and two epochs of 8.
        assert (len(first["inputs"]), len(second["inputs"])) == (12, 20)
        assert all(map(torch.equal, first["inputs"], second["inputs"][:12]))
    assert not torch.equal(a.fits[0]["weights"], a.fits[1]["weights"])
    assert not torch.equal(a.fits[0]["inputs"][0], a.fits[1]["inputs"][0])
    assert not torch.equal(a.fits[0]["inputs"][0], a.fits[0]["inputs"][8])  # another epoch


def test_other_batch_size_takes_the_samples_in_the_same_order():
    a, b = Records(), Records()
    compare(side(a), side(b, make_data=partial(shuffled, size=16)), seeds=2)
    for first, second in zip(a.fits, b.fits, strict=True):
        assert torch.equal(torch.cat(first["inputs"][:8]), torch.cat(second["inputs"][:4]))


def test_search_is_a_study_of_each_side_at_a_seed_of_its_own():
    records = Records()
    found = compare(
        side(),
        side(records, make_module=partial(Network, width=4)),
        tune="lr",
        trials=3,
        seeds=2,
        sampler="random",
        pruner=None,
    )
    # The defaults: 0.05 of make_module on a side, and of Network on the other.
    ranges = {"lr": Log(0.05 / 16, 0.05 * 16)}
    oracle = study(
        lambda: Plain(val_check_interval=4),
        partial(Network, width=4),
        make_data=shuffled,
        space=ranges,
        trials=3,
        sampler="random",
        pruner=None,
    )
    assert found.b.study is not None
    assert found.b.study.axes == oracle.axes
    assert [t.loss for t in found.b.study.trials] == [t.loss for t in oracle.trials]
    assert found.b.best_values == oracle.best_values
    assert found.a.study is not None
    assert [t.values for t in found.a.study.trials] == [t.values for t in oracle.trials]
    searched, trained = records.fits[:3], records.fits[3:]
    assert [fit["lr"] for fit in trained] == [oracle.best_values["lr"]] * 2
    # The weights of the search are those of seed 0, and those of the comparison of seeds 1 and 2.
    first = [fit["weights"] for fit in (searched[0], *trained)]
    for number, seen in enumerate(first):
        L.seed_everything(number, verbose=False)
        expected = nn.utils.parameters_to_vector(Network(width=4).parameters())
        assert torch.equal(seen, expected)
    assert all(torch.equal(fit["weights"], first[0]) for fit in searched)
