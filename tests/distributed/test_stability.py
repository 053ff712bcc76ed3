"""Spike scores, activations and warnings about clipping on two processes, compared with NumPy."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed.stability_scenarios import KEPT, LABELS, ROLLED_BACK, UPDATES
from tests.distributed.torchrun import results_of
from tests.monitoring.test_spike_score import oracle

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
SCORED = ["ddp 32-true 1", "ddp 16-mixed 2", "fsdp2 bf16-mixed 1"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the results of the scenarios on each of two processes, which are started once."""
    return results_of("stability_scenarios", tmp_path_factory.mktemp("stability"))


def losses(results: list[dict[str, Any]]) -> list[float]:
    """Returns the mean over the samples of each window and both processes."""
    means = []
    for parts in zip(*(result["windows"] for result in results), strict=True):
        together = [part for window in parts for part in window]
        total = sum(samples for _, samples in together)
        means.append(sum(loss * samples for loss, samples in together) / total)
    return means


def check(state: dict[str, Any], values: list[float], *, spikes: int) -> None:
    counted = oracle(values)
    assert (state["spikes"], state["compared"]) == counted
    assert counted[0] == spikes
    finite = [value for value in values if math.isfinite(value)]
    assert state["history"] == pytest.approx(finite[-128:], rel=1e-5)


@pytest.mark.parametrize("case", SCORED)
def test_scores_are_those_of_all_processes(case: str, two: Any) -> None:
    results = [result["scored"][case] for result in two]
    (state, resumed), second = results[0]["states"], results[1]["states"]
    assert state == second[0]
    assert state == resumed == second[1]
    made = losses(results)
    assert len(made) == UPDATES
    # An update of one process with a NaN is rejected by all of them.
    assert [i for i, loss in enumerate(made) if not math.isfinite(loss)] == [80]
    check(state["loss"][""], made, spikes=2)
    check(state["norm"][""], results[0]["norms"], spikes=2)


def test_rollback_restores_losses_that_were_not_summed(two: Any) -> None:
    results = [result["rolled_back"] for result in two]
    assert results[0]["state"] == results[1]["state"]
    assert results[0]["collectives"] == results[1]["collectives"] == []

    def kept(values: list[float]) -> list[float]:
        return [*values[:KEPT], *values[max(ROLLED_BACK) + 1 :]]

    state = results[0]["state"]
    check(state["loss"][""], kept(losses(results)), spikes=1)
    check(state["norm"][""], kept(results[0]["norms"]), spikes=1)


@pytest.mark.parametrize("name", ["ddp", "ddp static", "fsdp2"])
def test_activations_are_those_of_process_0(name: str, two: Any) -> None:
    first, second = (result["measured"][name] for result in two)
    for found in (first, second):
        assert found["weights"][0] == found["weights"][1]
    assert second["logged"] == {}
    assert len(first["logged"]) == 6 * len(LABELS)
    for tag, points in first["logged"].items():
        assert list(points) == ["1", "3", "5"]
        for step, value in points.items():
            assert value == pytest.approx(first["sizes"][int(step)][tag], rel=1e-5), (tag, step)


def test_findings_about_clipping_are_reported_once(two: Any) -> None:
    first, second = (result["warned"] for result in two)
    for case in ("ddp 0.3", "fsdp2 0.3"):
        (text,) = first[case]["warnings"]
        assert text.startswith("gradients must reach GradientClipping before they are clipped, ")
        assert second[case]["warnings"] == []
    assert first["ddp None"]["warnings"] == second["ddp None"]["warnings"] == []
    (line,) = first["ddp None"]["lines"]
    assert "No update was clipped: the largest norm was " in line
    assert second["ddp None"]["lines"] == []
