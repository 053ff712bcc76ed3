"""Combined optimizers and Muon under DDP and FSDP2 on two processes."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.distributed


@pytest.fixture
def found(two_processes: Any) -> list[Any]:
    return two_processes("optimizers")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_steps_are_those_of_the_parts_by_hand(found: Any, name: str) -> None:
    for result in found:
        ours, by_hand = result["steps"][name]
        assert ours == by_hand


@pytest.mark.parametrize("name", ["ddp", "sharded", "whole"])
def test_resume_is_exact_from_every_kind_of_checkpoint(found: Any, name: str) -> None:
    first, second = (result["resumes"][name] for result in found)
    assert first == second
    weights, rates, (updates, momentum) = first["straight"]
    assert updates == 12
    assert momentum == 0.95
    assert len(rates) == 3
    for step in ("2", "5"):
        assert first[step] == [weights, rates, [updates, momentum]]


def test_muon_of_sharded_matrices_is_that_of_whole_ones(found: Any) -> None:
    for result in found:
        assert len(result["sharded_muon"]) == 9
        assert all(result["sharded_muon"].values()), result["sharded_muon"]


def test_flat_shards_raise_with_the_way_out(found: Any) -> None:
    for result in found:
        assert "must have a hidden matrix for Muon, got a Recipe without one" in result["flat_muon"]
        assert "use FSDP2" in result["flat_muon"]


def test_clipped_training_agrees_between_strategies(found: Any) -> None:
    first, second = (result["clipped"] for result in found)
    assert first == second
    # Muon computes in bfloat16, and gradients of the strategies differ in the last bits.
    assert first["ddp"] == pytest.approx(first["fsdp2"], abs=2e-2)
