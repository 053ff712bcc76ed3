"""DDP and FSDP2 on two CPU processes, compared with one process and exact gradients."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_bigopt import GradientClipping, NormClip
from tests.helpers import QUIET, Probe, cpu_precision, loader

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("case", ["ddp 32-true", "ddp 16-mixed", "fsdp2 32-true", "fsdp2 16-mixed"])
def test_every_gradient_is_the_mean_over_all_samples_of_its_window(
    two_processes: Any, case: str
) -> None:
    first, second = two_processes("gradient_means")
    found = first[case]
    assert found["windows"] == second[case]["windows"]
    assert len(found["errors"]) == found["steps"]
    # 25 samples per process in batches of 2: 13 batches an epoch, the last with one sample.
    assert found["windows"][:5] == [2, 4, 6, 10, 3]
    assert sum(found["windows"]) == 75
    assert max(found["errors"]) <= (3e-2 if "16" in case else 1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        f"{strategy} {precision}"
        for strategy in ("ddp", "fsdp2")
        for precision in ("32-true", "bf16-mixed", "16-mixed")
    ],
)
def test_clipped_norm_is_the_global_norm(two_processes: Any, case: str, fused: bool) -> None:
    results = [result[f"{case} fused={fused}"] for result in two_processes("global_norms")]
    assert results[0]["weights"] == results[1]["weights"]
    precision = case.split()[1]
    alone = Probe(lr=0.01, optimizer=torch.optim.AdamW, fused=fused)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        callbacks=[GradientClipping(NormClip(max_norm=0.5))],
        **cpu_precision(precision),
    )
    trainer.fit(alone, loader(32, 8, sampler=BothProcessesInOrder(32, 4)))
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    flat = torch.cat([p.detach().flatten() for p in alone.net.parameters()]).tolist()
    assert results[0]["weights"] == pytest.approx(flat, rel=tolerance, abs=tolerance)
    if not fused:  # a fused optimizer clips inside its kernel, after this measurement
        assert results[0]["norms"] == pytest.approx(alone.norms, rel=tolerance)
        assert max(results[0]["norms"]) <= 0.5 * (1 + 1e-5)


class BothProcessesInOrder(torch.utils.data.Sampler[int]):
    """Yields the samples that two processes get from a DistributedSampler, batch by batch."""

    def __init__(self, size: int, batch: int) -> None:
        super().__init__()
        ranks = [list(range(rank, size, 2)) for rank in range(2)]
        self.order = [
            i for s in range(0, size // 2, batch) for rank in ranks for i in rank[s : s + batch]
        ]

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


@pytest.mark.parametrize("step", ["2", "5"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_resume_is_exact(two_processes: Any, name: str, step: str) -> None:
    for result in two_processes("resume"):
        lrs, windows, weights = result[name]["straight"]
        resumed = result[name][step]
        assert resumed[0] == lrs[int(step) :]
        assert resumed[1] == windows[int(step) :]
        assert resumed[2] == weights


def test_another_rule_starts_without_the_state_of_the_first(two_processes: Any) -> None:
    first, second = two_processes("resume_with_another_rule")
    assert first == second
    changed, without_state = first
    assert changed == without_state
    assert changed[0] == 12 - 2


def test_a_batch_that_one_process_cannot_count_is_uncounted_on_both(two_processes: Any) -> None:
    for result in two_processes("uncounted"):
        # No collective operation for samples that no capability needs.
        assert result["needed by none"]["collectives"] == 0
        assert result["needed by none"]["rates"] == [0.05 * (1 - t / 8) for t in range(8)]
        optional = result["optional"]
        assert (optional["known"], optional["samples"]) == (False, 10)
        assert optional["rates"] == result["needed by none"]["rates"]
        assert optional["collectives"] == 3
        assert "samples must be given for batches without a tensor" in result["required"]["error"]
        assert len(result["required"]["rates"]) == 2
