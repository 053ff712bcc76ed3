"""compare(): pairs against plain runs, the searches, divergence, folders and errors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import optuna
import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

from lightning_bigopt import (
    BatchSizeScheduler,
    Comparison,
    ConstantBatchSize,
    LearningRateScheduler,
    Side,
    WarmupCosine,
    compare,
)
from lightning_bigopt.reporting.compared_side import SeedRun
from lightning_bigopt.tuning import Choice, Log, study
from lightning_bigopt.tuning.comparison_folder import ComparisonFolder
from lightning_bigopt.tuning.comparison_plan import ComparisonPlan
from lightning_bigopt.tuning.made_trainings import MadeTrainings
from tests.helpers import QUIET
from tests.tuning.study_helpers import Network, make_data, make_trainer, samples

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


class Unnamed(tuple[Any, ...]):
    """Callbacks that do not count as a change of the function that holds them."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "callbacks"


def side(*callbacks: Any, **options: Any) -> Side:
    callbacks = Unnamed(callbacks)
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


class Late(Network):
    """Draws random numbers after the data was made, as a module does that builds layers there."""

    def setup(self, stage: str) -> None:
        torch.rand(7)

    def configure_model(self) -> None:
        torch.rand(7)


@pytest.mark.parametrize("kind", [Network, Wide, Late])
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


def test_ranges_of_the_space_are_those_of_the_searches():
    found = compare(
        side(),
        side(),
        tune=["lr", "width"],
        tune_b="lr",
        space={"lr": Log(0.01, 0.1), "width": Choice([2, 4])},
        trials=2,
        seeds=2,
        direction="maximize",
    )
    assert found.a.study is not None
    assert found.b.study is not None
    assert [axis.name for axis in found.a.study.axes] == ["lr", "width"]
    assert [(axis.low, axis.high) for axis in found.b.study.axes] == [(0.01, 0.1)]
    assert found.a.study.direction == "maximize"
    assert found.a.best_values.keys() == {"lr", "width"}
    worst = max(t.loss for t in found.b.study.trials if t.loss is not None)
    assert found.b.study.best_loss == worst
    assert "lr:" in found.b.config


def test_best_value_at_an_edge_warns():
    grid = optuna.samplers.GridSampler({"lr": [1e-6, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5]}, seed=0)
    options = {"tune": "lr", "space": {"lr": Log(1e-6, 1e-5)}, "sampler": grid, "pruner": None}
    with pytest.warns(UserWarning, match="a: lr = 1e-05 is at the upper end of its range"):
        found = compare(side(), side(), trials=6, seeds=2, **options)
    assert len(found.edges()) == 2


class DivergesAtSeed(Network):
    """Its loss is NaN at one seed, which it recognizes by the first weights."""

    def __init__(self, lr: float = 0.05, seed: int = 2) -> None:
        super().__init__(lr=lr)
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.diverges = torch.equal(self.net[0].weight, Network(lr=lr).net[0].weight)
        torch.random.set_rng_state(state)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) * (math.nan if self.diverges else 1.0)


def test_diverged_seed_is_said_and_its_pair_is_not_dropped_in_silence():
    found = compare(side(), side(make_module=DivergesAtSeed), seeds=3)
    assert found.b.losses[1] is None
    assert [run.loss is None for run in found.b.runs] == [False, True, False]
    assert found.b.diverged() == [2]
    assert found.b.runs[1].reason == "val_loss was nan after 4 updates"
    assert found.b.runs[1].updates == 4
    assert found.verdict.startswith("b has diverged at 1 of 3 seeds (2); at the other 2 seeds: ")
    assert found.test is not None
    # The weights and the order are equal: so are the losses, and there is no test.
    assert math.isnan(found.p_value)
    assert "the sides are equal at every seed (n = 2)" in found.verdict


def test_equal_sides_have_equal_losses_and_no_verdict():
    found = compare(side(name="x"), side(name="x"), seeds=2)
    assert found.a.losses == found.b.losses
    assert found.winner is None
    assert found.verdict.startswith("no verdict: the sides are equal at every seed")
    assert (found.a.name, found.b.name) == ("x (a)", "x (b)")


def test_comparison_leaves_no_trace_in_the_random_states():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    compare(side(), side(), seeds=2)
    assert torch.equal(torch.rand(4), expected)


class Stops(L.Callback):
    """Raises in a fit after some others, as a process that is killed."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def tuned(folder: Path, *callbacks: Any, **options: Any) -> Comparison:
    return compare(
        side(*callbacks),
        side(*callbacks, make_module=partial(Network, width=4)),
        **{"tune": "lr", "trials": 2, "seeds": 3, "folder": folder, **options},
    )


@pytest.mark.parametrize("after", [1, 3, 6])
def test_interrupted_comparison_goes_on_to_the_same_result(tmp_path: Path, after: int):
    whole = tuned(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "part", Stops(after))
    counts = Records()
    again = tuned(tmp_path / "part", counts)
    assert len(counts.fits) == 2 * 2 + 2 * 3 - after  # trials and seeds; no one twice
    for one, other in ((whole.a, again.a), (whole.b, again.b)):
        assert one.losses == other.losses
        assert one.best_values == other.best_values
    assert whole.verdict == again.verdict


def test_finished_trainings_are_not_trained_again_and_more_seeds_are_added(tmp_path: Path):
    first, counts = tuned(tmp_path), Records()
    again = tuned(tmp_path, counts)
    assert counts.fits == []
    assert str(again) == str(first)
    more = tuned(tmp_path, counts, seeds=4)
    assert len(counts.fits) == 2
    assert more.a.losses[:3] == first.a.losses


def test_changed_side_is_trained_anew_with_a_warning(tmp_path: Path):
    def narrow() -> Any:
        return Network(width=2)

    compare(side(), side(), seeds=2, folder=tmp_path)
    counts = Records()
    with pytest.warns(UserWarning, match="contains 2 trainings of b with another config"):
        changed = compare(side(), side(counts, make_module=narrow), seeds=2, folder=tmp_path)
    assert len(counts.fits) == 2
    assert changed.b.losses != changed.a.losses
    plain = compare(side(), side(make_module=narrow), seeds=2)
    assert changed.b.losses == plain.b.losses


def test_other_best_values_are_trained_anew(tmp_path: Path):
    found = tuned(tmp_path)
    counts = Records()
    options = {"space": {"lr": Log(1e-4, 1e-3)}}
    with pytest.warns(UserWarning, match="other best values"):
        other = tuned(tmp_path, counts, **options)
    assert len(counts.fits) == 2 * 2 + 2 * 3
    assert other.a.best_values != found.a.best_values


def test_broken_record_raises(tmp_path: Path):
    compare(side(), side(), seeds=2, folder=tmp_path)
    (path, *_) = tmp_path.glob("*-seed-1.json")
    assert json.loads(path.read_text())["run"]["seed"] == 1
    path.write_text("{")
    with pytest.raises(
        ValueError, match=r"folder must contain records of trainings, got .* no JSON"
    ):
        compare(side(), side(), seeds=2, folder=tmp_path)


class Ignores(Network):
    """Has an argument that changes nothing."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=0.05)


def test_field_without_an_effect_raises():
    options = {"tune": "lr", "seeds": 2, "pruner": None}
    message = r"tune must name fields that change the training, got"
    with pytest.raises(ValueError, match=message):
        compare(side(), side(make_module=Ignores), trials=3, **options)
    for more in ({"trials": 2}, {"trials": 3, "direction": "maximize"}):
        with pytest.warns(UserWarning, match=message):
            compare(side(), side(make_module=Ignores), **options, **more)


class Split(L.LightningDataModule):
    """Splits at random where Lightning's documentation does."""

    def setup(self, stage: str) -> None:
        self.parts = random_split(samples(64, 0), [48, 16])

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], batch_size=16)


def split_at_once() -> Any:
    parts = random_split(samples(64, 0), [48, 16])
    return DataLoader(parts[0], batch_size=8, shuffle=True), DataLoader(parts[1], batch_size=16)


class Validations(L.Callback):
    """Keeps the first validation batch of each training."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_validation_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 4:
            self.seen.append(arguments[1][0].clone())


@pytest.mark.parametrize("make_data", [Split, split_at_once])
def test_random_split_is_the_same_on_both_sides(make_data: Callable[..., Any]):
    a, b = Validations(), Validations()
    compare(
        side(a, make_data=make_data),
        side(b, make_data=make_data, make_module=Wide),
        seeds=2,
    )
    assert len(a.seen) == 2
    assert all(map(torch.equal, a.seen, b.seen))
    assert not torch.equal(*a.seen)


def test_weights_and_data_do_not_have_equal_random_numbers():
    drawn: list[Tensor] = []

    def draws() -> Any:
        drawn.append(torch.rand(4))
        return shuffled()

    compare(side(make_data=draws), side(), seeds=[3, 4])
    L.seed_everything(3, verbose=False)
    assert not torch.equal(drawn[-2], torch.rand(4))


def closed(lr: float) -> Callable[[], Any]:
    return lambda: Network(lr=lr)


def with_default(lr: float) -> Callable[[], Any]:
    def make(*, value: float = lr) -> Any:
        return Network(lr=value)

    return make


def nested(lr: float) -> Callable[[], Any]:
    return partial(lambda make: make(), closed(lr))


@pytest.mark.parametrize("kind", [closed, with_default, nested])
def test_values_that_a_function_holds_count(kind: Callable[[float], Any]):
    texts = [MadeTrainings(Plain, kind(lr), None, seed=0).identity() for lr in (0.1, 0.1, 0.2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_missing_scipy_raises_before_the_first_training(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["lightning_bigopt.tuning.compare"]  # its name is also the function's
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    records = Records()
    with pytest.raises(ImportError, match=r"scipy must be installed .*lightning-bigopt\[laws\]"):
        compare(side(records), side(), seeds=2)
    assert records.fits == []


def test_search_that_has_gone_on_for_longer_raises(tmp_path: Path):
    options: dict[str, Any] = {"tune": "lr", "seeds": 2, "folder": tmp_path, "pruner": None}
    with pytest.raises(KeyboardInterrupt):
        compare(side(), side(Stops(0), make_module=closed(0.1)), trials=3, space=RANGE, **options)
    with pytest.raises(ValueError, match=r"got 3 of a and 2 of b, as .*; write trials=3, or"):
        compare(side(), side(make_module=closed(0.1)), trials=2, space=RANGE, **options)


RANGE = {"lr": Log(0.01, 0.1)}


@pytest.mark.parametrize(
    "content", ["[1, 2]", "3", '{"side": "a"}', '{"run": {"sead": 1}}', '{"run": {"seed": 1}}']
)
def test_record_of_another_shape_raises(tmp_path: Path, content: str):
    folder = ComparisonFolder(tmp_path)
    folder.write(SeedRun(seed=1, loss=2.0), name="a", values={}, trained="0" * 16)
    assert folder.read("0" * 16, 1) == SeedRun(seed=1, loss=2.0)
    (path,) = tmp_path.glob("*.json")
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"folder must contain .*{path.name}.*; delete this file"):
        folder.read("0" * 16, 1)


def test_number_of_seeds_may_be_of_numpy():
    assert ComparisonPlan(seeds=np.int64(3)).seed_numbers == (1, 2, 3)
    with pytest.raises(ValueError, match="got 1; write 8"):
        ComparisonPlan(seeds=np.int64(1))


def test_search_whose_trials_all_diverge_raises():
    with pytest.raises(ValueError, match="none was trained to its end"):
        compare(side(), side(), tune="lr", space={"lr": Log(1e20, 1e21)}, trials=2, seeds=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tune_b": "lr"},
            "tune must name the paths of the first side to tune, got None with tune",
        ),
        ({"seeds": 1}, "seeds must be an integer of at least 2, got 1; write 8"),
        ({"seeds": [3]}, r"seeds must be a number of seeds or a list of at least two, got \[3\]"),
        ({"seeds": [3, 3]}, "seeds must be different from each other"),
        ({"seeds": [1, -2]}, "every seed must be a non-negative integer, got -2"),
        ({"seeds": [0, 1], "tune": "lr"}, "seeds must not contain the seed of the search, got 0"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        ({"tune": []}, "tune must be the path of a field, a list of paths or None"),
        ({"tune": ["lr", "lr"]}, "tune must contain each path once"),
        ({"tune": "width"}, "space must contain a range for each path of tune, got none for 'wi"),
        ({"tune": "momentum_lr"}, "whose value in a is None; write space={'momentum_lr'"),
        ({"space": {"lr": Log(1, 2)}}, "tune must name the paths of the space to tune, got None"),
        ({"tune": "lr", "space": {"rl": Log(1, 2)}}, "space must contain paths of tune, got 'rl'"),
        ({"direction": "max"}, "direction must be 'minimize' or 'maximize'"),
        ({"relevant": 0.0}, "relevant must be positive"),
        ({"monitor": "val_los"}, "monitor must be the name of a value .* did you mean 'val_loss'"),
        ({"folder": ""}, "folder must be a path or None"),
        ({"trials": 0, "tune": "lr"}, "trials must be a positive number of trials"),
        ({"tune": "lr", "sampler": "TPF"}, "did you mean 'TPE'"),
    ],
)
def test_wrong_arguments_raise(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        compare(side(), side(), **{"seeds": 2, "trials": 2, **options})


def test_folder_that_is_a_file_raises(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be one that can be written to"):
        compare(side(), side(), seeds=2, folder=tmp_path / "file")


def test_sides_of_other_kinds_raise():
    with pytest.raises(ValueError, match=r"b must be a Side, got .*; write Side\(make_trainer"):
        compare(side(), Network, seeds=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="make_module must be a function, got 3"):
        side(make_module=3)


def test_refused_training_raises_with_its_reason():
    def refused() -> L.Trainer:
        return Plain(LearningRateScheduler(WarmupCosine(warmup=50)))

    with pytest.raises(ValueError, match="warmup"):
        compare(side(), side(make_trainer=refused), seeds=2)


def test_capabilities_of_this_package_are_compared():
    found = compare(
        side(BatchSizeScheduler(ConstantBatchSize(8))),
        side(make_trainer=lambda: make_trainer(max_steps=12), make_data=make_data),
        seeds=2,
    )
    assert all(loss is not None for loss in (*found.a.losses, *found.b.losses))
