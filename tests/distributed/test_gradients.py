"""Unusual gradients on two processes: not averaged, of replaced parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_bigopt import AutoClip, GradientClipping, NormClip
from tests.distributed.gradient_scenarios import TwoOptimizers
from tests.distributed.scenarios import weights
from tests.distributed.test_two_processes import BothProcessesInOrder
from tests.helpers import fit, loader

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
]  # the first test starts the processes


def test_each_process_is_clipped_by_the_norm_of_its_own_gradient(two_processes: Any) -> None:
    for result in two_processes("gradients"):
        for guard in ("with", "without"):
            found = result["local_gradients"][f"fixed {guard} guard"]
            assert found["after"] == pytest.approx([min(0.5, n) for n in found["before"]], rel=1e-5)


@pytest.mark.parametrize("rule", ["fixed", "adaptive"])
def test_a_guard_that_rejects_nothing_does_not_change_clipping(
    two_processes: Any, rule: str
) -> None:
    first, second = (result["local_gradients"] for result in two_processes("gradients"))
    for found in (first, second):
        assert found[f"{rule} with guard"] == found[f"{rule} without guard"]
    norms = [found[f"{rule} with guard"]["before"] for found in (first, second)]
    assert norms[0] != pytest.approx(norms[1], rel=0.01)  # the gradients are not averaged


def test_clip_to_median_scales_each_process_by_its_own_norm(two_processes: Any) -> None:
    first, second = (result["local_gradients"]["spike"] for result in two_processes("gradients"))
    assert first["rejected"] == second["rejected"] == [6]
    # The history holds the mean norm of both processes.
    means = sorted((a + b) / 2 for a, b in zip(first["before"][:6], second["before"], strict=False))
    median = (means[2] * means[3]) ** 0.5  # of logarithms
    for found in (first, second):
        assert found["after"][6] == pytest.approx(min(median, found["before"][6]), rel=1e-4)
        assert found["after"][:6] == pytest.approx(found["before"][:6], rel=1e-5)
    assert second["before"][6] > 20 * median


@pytest.mark.parametrize(
    ("strategy", "text"),
    [("ddp", "DDP does not average their gradients"), ("fsdp2", "under FSDP2 a parameter cannot")],
)
def test_a_parameter_that_the_strategy_does_not_know_is_reported(
    two_processes: Any, strategy: str, text: str
) -> None:
    first, second = (result["replaced"][strategy] for result in two_processes("gradients"))
    (warning,) = first
    assert text in warning
    assert ("net.2.weight" if strategy == "ddp" else "group0.2") in warning
    assert second == []  # only the first process warns


def test_zero_redundancy_optimizer_is_limited_by_its_weights_or_refused(two_processes: Any) -> None:
    first, second = (result["partitioned"] for result in two_processes("gradients"))
    assert first == second
    assert first["ratios"] == pytest.approx([0.01] * 4, rel=0.1)
    assert "got ZeroRedundancyOptimizer, which has changed a parameter without" in first["error"]


def test_no_process_keeps_the_buffer_of_a_rejected_batch(two_processes: Any) -> None:
    results = [result["buffers"] for result in two_processes("gradients")]
    for found in results:
        assert found["rejected"] == [3]
        assert found["means"][4] == found["means"][3]
        assert found["means"][5] != found["means"][4]
        assert all(map(math.isfinite, found["end"]))
    assert results[0]["means"][3] != results[1]["means"][3]  # each from its own data


def test_sparse_gradients_are_treated_as_dense_ones(two_processes: Any) -> None:
    first, second = (result["sparse"] for result in two_processes("gradients"))
    assert first["sparse"]["weights"] == second["sparse"]["weights"]
    for found in (first, second):
        sparse, dense = found["sparse"], found["dense"]
        assert sparse["rejected"] == dense["rejected"] == [3]
        assert sparse["norms"] == pytest.approx(dense["norms"], rel=1e-5, nan_ok=True)
        assert sparse["weights"] == pytest.approx(dense["weights"], rel=1e-5, abs=1e-7)
        assert sparse["noise"] == pytest.approx(dense["noise"], rel=1e-4)


def test_static_graph_needs_a_first_window_of_one_micro_batch(two_processes: Any) -> None:
    for result in two_processes("gradients"):
        found = result["static_graph"]
        text = (
            "must have one micro-batch with DDPStrategy(static_graph=True), got 2; accumulate later"
        )
        assert [text in error for error in found["errors"]] == [True, True]
        static, usual = found["trained"]
        assert static == pytest.approx(usual, rel=1e-6, abs=1e-7)


SHARED = ["ddp", "ddp views", "fsdp2", "fsdp2 together"]


@pytest.mark.parametrize("case", [*SHARED, "fsdp1"])
def test_several_optimizers_share_the_norm_of_whole_gradients(
    two_processes: Any, case: str
) -> None:
    first, second = (
        result["shared_norm"][case]["adaptive"] for result in two_processes("gradients")
    )
    assert len(first["norms"]) == 8
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(first["torch"], rel=1e-6)


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize(("name", "rule"), [("fixed", NormClip(0.2)), ("adaptive", AutoClip(50))])
def test_several_optimizers_train_as_on_one_process(
    two_processes: Any, case: str, name: str, rule: Any
) -> None:
    found = two_processes("gradients")[0]["shared_norm"][case][name]
    alone = TwoOptimizers()
    data = loader(32, 8, sampler=BothProcessesInOrder(32, 4))
    fit(alone, data, GradientClipping(rule, scope="all"), max_epochs=2)
    assert min(found["torch"]) > 0.2
    assert found["torch"] == pytest.approx(alone.norms, rel=1e-5)
    assert found["weights"] == pytest.approx(weights(alone), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", [*SHARED, "fsdp1"])
def test_a_backward_pass_between_the_steps_raises_on_every_process(
    two_processes: Any, case: str
) -> None:
    for result in two_processes("gradients"):
        error = result["shared_norm"][case]["error"]
        assert "got another gradient of net.2." in error  # FSDP1: the shard of one process
