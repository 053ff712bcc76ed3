"""Schedules under DDP and FSDP2 on two processes."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bigopt import cooldown_for_extension

pytestmark = pytest.mark.distributed


@pytest.fixture
def found(two_processes: Any) -> list[Any]:
    return two_processes("schedules")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_end_of_the_budget_is_exact(found: Any, name: str) -> None:
    first, second = (result["end_of_budget"] for result in found)
    assert first == second
    spent = {
        case.removeprefix(f"{name} "): [1 - rate for rate in rates]
        for case, (rates, _) in first.items()
        if case.startswith(name)
    }
    # 11 samples per process: 6 batches an epoch, in windows of 4 and 2.
    assert spent["accumulated epochs"] == pytest.approx([0, 4 / 12, 6 / 12, 10 / 12])
    assert spent["steps"] == pytest.approx([t / 5 for t in range(5)])
    assert spent["stream"] == pytest.approx([s / 18 for s in range(0, 18, 4)])
    sizes = [2 * window for window in first[f"{name} ramp in samples"][1]]
    before = [sum(sizes[:t]) for t in range(len(sizes))]
    assert set(sizes) >= {4, 12}
    assert spent["ramp in samples"] == pytest.approx([b / 80 for b in before])
    assert before[-1] < 80 <= before[-1] + sizes[-1]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_resume_at_any_step_is_exact_and_the_plateau_agrees_on_both(found: Any, name: str) -> None:
    first, second = (result["every_resume"][name] for result in found)
    assert first == second  # learning rates, betas and full weights
    rates, betas, weights = first["straight"]
    assert len(rates) == 8
    for stop in range(1, 8):
        again = first[str(stop)]
        if stop != 4:  # saved before the validation of the epoch, which is not repeated
            assert again == [rates[stop:], betas, weights]
    assert first["cooldown"] == pytest.approx([1 - t / 4 for t in range(4)])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_extended_run_has_the_best_cooldown_and_resumes_exactly(found: Any, name: str) -> None:
    first, second = (result["extensions"][name] for result in found)
    assert first == second
    rates, weights = first["straight"]
    assert len(rates) == 13
    starts = 16 * (1 - cooldown_for_extension(2, decay=0.25))
    assert starts < 8  # instead of 12
    expected = [0.01 * min(1, (16 - t) / (16 - starts)) for t in range(3, 16)]
    assert rates == pytest.approx(expected, rel=1e-3)  # the length is searched to 1e-4
    assert first["resumed"] == first["plain"] == [rates[8:], weights]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_range_test_agrees_on_both_and_restores_everything(found: Any, name: str) -> None:
    first, second = (result["range_tests"][name] for result in found)
    assert first == second
    assert len(first["losses"]) > 8
    assert first["tested"] == first["plain"]


def test_found_learning_rate_agrees_on_both_and_restores_everything(found: Any) -> None:
    first, second = (result["found_rates"] for result in found)
    assert first == second
    assert len(first["losses"]) == 4
    assert 40 < first["updates"] <= 60
    assert first["searched"] == first["plain"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_both_follow_the_time_of_process_0(found: Any, name: str) -> None:
    first, second = (result["times"][name] for result in found)
    assert first == second
    assert first[0] == 1.0
    assert first == sorted(first, reverse=True)
    assert 2 <= len(set(first)) == len(first) < 100  # the run ends when the time is over
    assert first[-1] > 0


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_both_follow_what_other_code_changes(found: Any, name: str) -> None:
    (first, norms), (second, _) = (result["changes"][name] for result in found)
    assert first == second
    bases = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]
    assert first == pytest.approx([base * (1 - t / 8) for t, base in enumerate(bases)])
    assert all(norm <= 0.5 + 1e-6 for norm in norms)
