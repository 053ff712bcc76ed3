"""Capabilities on two processes: second weights in checkpoints, snapshots, and saving."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.torchrun import results_of
from tests.engine.fake_averaging import Looked

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
NAMES = [name for name, _ in Looked().named_parameters()]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the results of the scenarios on each of two processes, which are started once."""
    return results_of("capability_scenarios", tmp_path_factory.mktemp("capabilities"))


# ------------------------------------------------------------------------ second weights

CASES = ["ddp whole", "fsdp2 sharded", "fsdp2 whole"]


@pytest.mark.parametrize("case", CASES)
def test_average_and_training_weights_are_both_saved_and_read_back(two: Any, case: str) -> None:
    for found in (result["averaged"][case] for result in two):
        assert found["resumed"] == found["training"][4:]
        assert found["averages"][0] == found["averages"][1]
        assert found["updates"] == [8, 8]
        assert found["was read"] == (case == "fsdp2 sharded")


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_in_a_fit_sees_the_average(two: Any, case: str) -> None:
    first, second = (result["averaged"][case] for result in two)
    assert first["evaluated"] == second["evaluated"]
    # The sanity check, and a validation after every second of eight updates.
    assert len(first["evaluated"]) == 5
    assert first["evaluated"][-1] == first["averages"][0]
    assert first["evaluated"][-1] != first["training"][-1]


@pytest.mark.parametrize("case", CASES)
def test_a_bare_trainer_goes_on_from_the_average_and_ignores_the_rest(two: Any, case: str) -> None:
    for found in (result["averaged"][case] for result in two):
        average = found["evaluated"][2]  # after four updates
        start, updates = found["bare"]
        assert start == average
        assert updates == 4
        assert found["validated"] == average


def test_second_weights_are_written_as_shards(two: Any) -> None:
    pieces = two[0]["averaged"]["fsdp2 sharded"]["file"]["pieces"]
    second = "lightning_bigopt.training weights."
    assert pieces == {f"state_dict.{owner}{name}": 2 for owner in ("", second) for name in NAMES}


def test_a_consolidated_file_holds_the_second_weights_under_their_reserved_keys(two: Any) -> None:
    """Without them it is the average; Lightning's tool for whole files keeps every key."""
    found = two[0]["averaged"]["fsdp2 sharded"]
    consolidated = found["file"]["consolidated"]
    assert {name: consolidated[name] for name in NAMES} == found["evaluated"][2]
    second = "lightning_bigopt.training weights."
    assert {
        key.removeprefix(second): value
        for key, value in consolidated.items()
        if key.startswith(second)
    } == found["training"][3]
    assert len(consolidated) == 2 * len(NAMES)


@pytest.mark.parametrize("case", ["ddp whole", "fsdp2 whole"])
def test_a_whole_file_has_the_keys_of_the_module_and_no_others(two: Any, case: str) -> None:
    found = two[0]["averaged"][case]
    assert found["file"]["keys"] == sorted(NAMES)
    assert found["file"]["weights"] == found["evaluated"][2]


def test_a_checkpoint_without_second_weights_has_none_to_be_read(two: Any) -> None:
    for result in two:
        assert result["no_second_weights"] == [False, False]


# ------------------------------------------------------------------------ optimizer modes


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_with_modes_resumes_to_the_bit(two: Any, case: str, hook: str) -> None:
    for found in (result["with_modes"][f"{case} {hook}"] for result in two):
        assert len(found["training"]) == 8
        assert found["resumed"] == found["training"][4:]
        assert found["ends"][0] == found["ends"][1]
        assert found["ends"][0] == found["evaluated"][-1] != found["training"][-1]
        file = found["file"]
        saved = file["weights" if "whole" in case else "consolidated"]
        assert {name: saved[name] for name in NAMES} == found["evaluated"][1]
        if case == "fsdp2 sharded":
            owners = ("", "lightning_bigopt.training_weights.")
            assert file["pieces"] == {f"state_dict.{o}{n}": 2 for o in owners for n in NAMES}
        else:
            assert file["keys"] == sorted(NAMES)
        if case != "ddp whole":
            start, updates = found["bare"]
            assert (start, updates) == (found["evaluated"][1], 4)


# ------------------------------------------------------------------------------ snapshots


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero"])
def test_a_rollback_restores_the_local_shards_of_every_process(two: Any, name: str) -> None:
    first, second = (result["rolled_back"][name] for result in two)
    for found in (first, second):
        for part, taken in found["taken"].items():
            assert found["restored"][part] == taken
        assert found["before"]["weights"] != found["taken"]["weights"]
        assert found["before"]["states"] != found["taken"]["states"]
        assert found["steps"] == 8
    assert first["end"] == second["end"]
    sharded = first["taken"]["weights"] != second["taken"]["weights"]
    assert sharded == (name == "fsdp2")
    if name == "zero":  # the states of each process are others, and none are missing
        owned = [[bool(state) for state in one["taken"]["states"]] for one in (first, second)]
        assert all(mine != theirs for mine, theirs in zip(*owned, strict=True))


# -------------------------------------------------------------- saves in any hook, on any process


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_early_checkpoint_contains_the_update_that_global_step_counts(
    two: Any, name: str, hook: str
) -> None:
    for found in (result["saved_first"][f"{name} {hook}"] for result in two):
        lrs, resumed = found["lrs"]
        assert lrs == [0.05 * (1 - t / 8) for t in range(8)]
        assert resumed == lrs[4:]
        trained, again = found["trained"]
        assert again == trained[4:]
        assert found["states"][0] == found["states"][1]


@pytest.mark.parametrize("limit", ["epochs", "steps"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_checkpoint_of_a_bare_trainer_resumes_with_ours_beside_it(
    two: Any, name: str, limit: str
) -> None:
    for found in (result["bare_resumed"][f"{name} {limit}"] for result in two):
        assert found["lrs"] == [0.05 * (1 - t / 8) for t in range(3, 8)]
        assert found["steps"] == 8


# -------------------------------------------------------------- buffers of the window's start


@pytest.mark.parametrize("case", CASES)
def test_buffers_of_the_last_update_are_saved_inside_a_window(two: Any, case: str) -> None:
    """Three micro-batches are an update; both kinds of files are saved after the fifth."""
    first, second = (result["saved_buffers"][case] for result in two)
    assert first["files"] == second["files"]
    full, weights_only = first["files"]
    assert full == weights_only
    ends = [[found["ends"][batch] for found in (first, second)] for batch in range(5)]
    # Without SyncBatchNorm each process has its own statistics; a sharded file holds those of one.
    assert full in (ends[2] if case == "fsdp2 sharded" else ends[2][:1])
    assert full not in ends[4]
    for found in (first, second):
        tracked = "net.1.num_batches_tracked"
        assert found["resumed"][tracked] == found["straight"][tracked] == [24]
        if case == "ddp whole":  # before each forward pass DDP sends those of the first process
            assert found["resumed"] == found["straight"]
