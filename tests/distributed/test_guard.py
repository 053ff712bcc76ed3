"""StepGuard on two processes, one with bad batches, compared with one process."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import (
    GradientClipping,
    Groups,
    LossSpike,
    NonFinite,
    NormClip,
    NormSpike,
    StepGuard,
)
from tests.bad_batches import KINDS, BadBatchModule
from tests.distributed.scenarios import POISON, Norms
from tests.distributed.test_two_processes import BothProcessesInOrder
from tests.helpers import QUIET, cpu_precision, loader

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
]  # the first test starts the processes

# Lightning takes no precision="16-mixed" with ModelParallelStrategy, but takes the plugin.
CASES = list(
    itertools.product(("ddp", "fsdp2"), ("32-true", "bf16-mixed", "16-mixed"), KINDS, (1, 3))
)


def loss_scale(precision: str) -> float:
    """Returns the scale of the GradScaler after one overflow from 2 ** 8; 0 without one."""
    return 2.0**7 if precision == "16-mixed" else 0.0


@functools.cache
def one_process(precision: str, kind: str, accumulate: int) -> tuple[BadBatchModule, StepGuard]:
    """Trains one process on the batches of both."""
    model = BadBatchModule(POISON, rank=1, optimizer=torch.optim.AdamW, lr=0.01, **KINDS[kind])
    guard = StepGuard([NonFinite(), NormSpike(armed=3), LossSpike(armed=3, floor=2.0)])
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        callbacks=[guard, GradientClipping(NormClip(max_norm=0.5))],
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
    )
    size = 40 * accumulate
    trainer.fit(model, loader(size, 4, sampler=BothProcessesInOrder(size, 2)))
    return model, guard


@pytest.mark.parametrize(("strategy", "precision", "kind", "accumulate"), CASES)
def test_both_processes_skip_as_one_process(
    two_processes: Any, strategy: str, precision: str, kind: str, accumulate: int
) -> None:
    case = f"{strategy} {precision} {kind} {accumulate}"
    first, second = (result[case] for result in two_processes("guarded"))
    assert first["rejected"] == second["rejected"]
    assert first["state"] == second["state"]
    assert first["weights"] == second["weights"]
    model, guard = one_process(precision, kind, accumulate)
    for changed in (first["changed"], second["changed"], model.changed):
        assert [update for update, whether in enumerate(changed) if not whether] == [4, 7]
    seen = [(update, detector) for update, detector, *_ in first["rejected"]]
    # Under a GradScaler non-finite gradients are skipped by the scaler, not by the guard.
    broken = [] if precision == "16-mixed" else [(4, "NonFinite")]
    assert seen == [*broken, (7, "NormSpike")]
    if broken:
        assert first["rejected"][0][2] == 1  # the process whose loss was NaN
    assert [(r.update, r.detector) for r in guard.rejections] == seen
    # The mean over all processes and micro-batches, weighted by samples.
    mine = guard.saved_state()["guarded"][""]["detectors"]["LossSpike"]["accepted"]
    assert first["losses"] == pytest.approx(mine, rel=1e-5 if precision == "32-true" else 2e-2)
    assert (first["scale"], second["scale"]) == (loss_scale(precision),) * 2
    flat = torch.cat([p.detach().flatten() for p in model.net.parameters()]).tolist()
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    assert first["weights"] == pytest.approx(flat, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("sharding", "fused"), [("FULL_SHARD", False), ("FULL_SHARD", True), ("NO_SHARD", True)]
)
def test_fsdp1_clips_and_guards_by_the_global_norm(
    two_processes: Any, sharding: str, fused: bool
) -> None:
    case = f"{sharding}, fused={fused}"
    first, second = (result[case] for result in two_processes("flat_shards"))
    assert first["rejected"] == second["rejected"]
    assert first["rejected"] == [[4, "NonFinite", 1], [7, "NormSpike", None]]
    assert first["norms"] == pytest.approx(second["norms"], nan_ok=True, rel=0, abs=0)
    assert {"net.0.weight", "net.2.bias"} <= set(first["names"])
    model = BadBatchModule(POISON, rank=1, optimizer=torch.optim.AdamW, lr=0.01, fused=fused)
    totals = Norms()
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        callbacks=[
            StepGuard([NonFinite(), NormSpike(armed=3)]),
            GradientClipping(Groups({"net.0.*": None, "*": NormClip(max_norm=0.1)})),
            totals,
        ],
    )
    trainer.fit(model, loader(40, 4, sampler=BothProcessesInOrder(40, 2)))
    assert first["norms"] == pytest.approx(totals.norms, rel=1e-5, nan_ok=True)
    flat = torch.cat([p.detach().flatten() for p in model.net.parameters()]).tolist()
    assert first["weights"] == pytest.approx(flat, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_repeated_evaluation_that_is_bad_on_one_process_is_undone_on_both(
    strategy: str, two_processes: Any
) -> None:
    first, second = (result[strategy] for result in two_processes("repeated"))
    assert first["rejected"] == second["rejected"] == [0, 3, 4]
    assert first["weights"] == second["weights"] == first["plain"]


def test_noise_scale_reads_the_first_evaluation_of_an_update(two_processes: Any) -> None:
    for result in two_processes("repeated"):
        assert result["noise SAM"] == result["noise SGD"]
        assert result["noise SAM"]["updates"] == 4


def test_rejected_batches_have_the_index_of_their_data_after_a_resume(two_processes: Any) -> None:
    for straight, resumed in two_processes("rejected_batches"):
        assert straight[0] == list(range(12))
        assert resumed == [straight[0][3:], straight[1][3:]]
