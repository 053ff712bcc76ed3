"""Every contract for eight optimizers; benchmarks/optimizers.py checks those of six libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.contracts.catalog import Entry, catalog, of_class
from benchmarks.contracts.checks import CHECKS, clipping, run_check
from benchmarks.contracts.training import fit
from tests.distributed.contract_scenarios import EIGHT

pytest.importorskip("torchao")
ENTRIES = {entry.key: entry for entry in catalog() if entry.key in EIGHT}
# Clipping sums the norm in another order than torch.
TO_ROUNDING = {"clip", "bf16-mixed"}
REFUSED = {
    ("torch/LBFGS", "batch coupling"): "accumulation windows must have one batch",
    ("schedulefree/SGDScheduleFree", "MaxUpdateRatio"): "which averages iterates",
}


@pytest.fixture(autouse=True)
def _without_compilation() -> Iterator[None]:
    """torchao compiles its step, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_all_eight_are_in_the_catalog() -> None:
    assert set(ENTRIES) == set(EIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("contract", CHECKS)
@pytest.mark.parametrize("key", EIGHT)
def test_contract(key: str, contract: str) -> None:
    found = run_check(ENTRIES[key], contract)
    if (key, contract) in REFUSED:
        assert found.startswith("refused")
        assert REFUSED[key, contract] in found
    else:
        assert found.startswith("≈") if contract in TO_ROUNDING else found == "y"


@pytest.mark.parametrize("key", [key for key in EIGHT if key != "torch/LBFGS"])
def test_loss_falls_in_bfloat16(key: str) -> None:
    losses = fit(ENTRIES[key], clipping(), precision="bf16-mixed", max_steps=18).losses
    assert sum(losses[-6:]) < sum(losses[:6])


class LateSam(torch.optim.SGD):
    """SAM of a loop that computes the gradients before the step, as pytorch_optimizer's."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr, momentum=0.9)

    def step(self, closure: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            moves = [p.grad * 0.05 / norm for p in parameters]
            torch._foreach_add_(parameters, moves)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            torch._foreach_sub_(parameters, moves)
        super().step()
        return loss


LATE = Entry(library="tests", name="LateSam", build=of_class(LateSam), is_manual=True)


@pytest.mark.parametrize("contract", ["schedule", "clip", "exact skip", "MaxUpdateRatio", "resume"])
def test_optimizer_that_moves_the_weights_before_its_only_evaluation(contract: str) -> None:
    assert run_check(LATE, contract) == ("≈" if contract == "clip" else "y")


@pytest.mark.parametrize(
    "name", ["AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"]
)
def test_max_update_ratio_refuses_means_of_iterates_without_a_mode(name: str) -> None:
    (entry,) = [entry for entry in catalog() if entry.name == name]
    assert "which averages iterates" in run_check(entry, "MaxUpdateRatio")
