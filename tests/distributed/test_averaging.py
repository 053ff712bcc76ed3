"""ModelAveraging on two processes, under DDP and FSDP2: training, checkpoints and resumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from tests.distributed.torchrun import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
Values = dict[str, list[float]]

CASES = [
    f"{kind} {hook}"
    for kind in ("ddp whole", "fsdp2 sharded", "fsdp2 whole")
    for hook in ("on_train_batch_end", "on_validation_end")
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the results of the scenarios on each of two processes, which are started once."""
    return results_of("averaging_scenarios", tmp_path_factory.mktemp("averaging"))


def mean(weights: Sequence[Values], factors: Sequence[float]) -> Values:
    total = math.fsum(factors)
    return {
        name: [
            math.fsum(f * w[name][i] for f, w in zip(factors, weights, strict=True)) / total
            for i in range(len(weights[0][name]))
        ]
        for name in weights[0]
    }


def near(one: Values, other: Values) -> bool:
    return all(one[n] == pytest.approx(other[n], rel=1e-5, abs=1e-6) for n in one | other)


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_a_run_without_averages(two: Any, case: str) -> None:
    """Also after a validation, in which FSDP2 has gathered the average."""
    for found in (result["averaged"][case] for result in two):
        assert found["training"] == found["plain"]


@pytest.mark.parametrize("case", CASES)
def test_averages_are_those_of_the_whole_weights(two: Any, case: str) -> None:
    for found in (result["averaged"][case] for result in two):
        trained = found["training"]
        assert len(trained) == 8
        ema = mean(trained, [2 ** (i / 2) for i in range(8)])
        assert near(found["averages"]["ema"][0], ema)
        assert near(found["end"][0], ema)
        assert near(found["averages"]["tail"][0], mean(trained[4:], [1] * 4))
        half = 0.5**0.5
        assert near(found["averages"]["merge"][0], mean(trained[5::2], [half, 1 - half]))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(two: Any, case: str) -> None:
    for found in (result["averaged"][case] for result in two):
        assert found["resumed"] == found["training"][4:]
        for straight, resumed in found["averages"].values():
            assert straight == resumed
        assert found["end"][0] == found["end"][1]
        assert found["metrics"][0] == found["metrics"][1]


@pytest.mark.parametrize("case", CASES)
def test_validations_have_the_average_and_log_the_others(two: Any, case: str) -> None:
    first, second = (result["averaged"][case] for result in two)
    assert len(first["evaluated"]) == 2 + 2 * 2  # of the model, and of both others
    assert first["evaluated"] == second["evaluated"]
    assert near(
        first["evaluated"][0], mean(first["training"][:4], [2 ** (i / 2) for i in range(4)])
    )
    metrics = first["metrics"][0]
    assert {"val_loss", "averages/tail/val_loss", "averages/merge/val_loss"} <= metrics.keys()
    assert metrics["averages/tail/val_loss"] != metrics["val_loss"]


@pytest.mark.parametrize("case", CASES)
def test_a_bare_trainer_goes_on_from_the_average(two: Any, case: str) -> None:
    for found in (result["averaged"][case] for result in two):
        start, updates = found["bare"]
        assert start == found["evaluated"][0]
        assert updates == 4


def test_a_file_has_no_keys_but_those_of_the_module(two: Any) -> None:
    for kind in ("ddp whole", "fsdp2 whole"):
        for found in (two[0]["averaged"][f"{kind} {h}"] for h in ("on_train_batch_end",)):
            assert found["file"]["keys"] == sorted(found["training"][0])
            assert found["file"]["weights"] == found["evaluated"][0]


def test_shards_of_every_average_are_written(two: Any) -> None:
    pieces = two[0]["averaged"]["fsdp2 sharded on_train_batch_end"]["file"]["pieces"]
    owners = {key.rpartition(".net.")[0] for key in pieces}
    expected = {
        f"state_dict.lightning_bigopt.ModelAveraging.{n}"
        for n in ("ema.0", "merge.0", "merge.1", "training")
    }
    assert owners == {"state_dict"} | expected
    assert set(pieces.values()) == {2}


def test_precisions_a_skipped_update_and_accumulation(two: Any) -> None:
    for result in two:
        for case, found in result["precisions"].items():
            trained = found["trained"]
            assert len(trained) == 8, case
            assert trained[0] == trained[1], case
            assert near(found["average"], mean(trained, [1] * 8)), case
            assert found["dtypes"] == ["torch.float32"], case
    assert two[0]["precisions"] == two[1]["precisions"]


def test_sharded_and_whole_parameters_resume_together(two: Any) -> None:
    for straight, resumed in (result["mixed_shards"]["averages"] for result in two):
        assert straight == resumed


def test_training_weights_of_sharded_checkpoints_are_merged(two: Any) -> None:
    for found in (result["mixed_shards"] for result in two):
        assert near(found["merged"], mean(found["trained"], [1, 1]))
