"""Batch sizes on two processes, compared with exact gradients and with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.batch_helpers import (
    Noise,
    QuadraticNoise,
    Tokens,
    ramped,
    train_recorder,
    train_tail_recorder,
)

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("case", ["ddp 32-true", "ddp 16-mixed", "fsdp2 32-true"])
def test_every_gradient_is_the_mean_over_the_tokens_of_all_processes(
    two_with_batches: Any, case: str
) -> None:
    first, second = (result[case] for result in two_with_batches("token_means"))
    assert first["tokens"] == second["tokens"]
    assert sum(tokens for (tokens,) in first["tokens"]) == 2 * int(Tokens(50).mask.sum())
    assert max(first["errors"]) <= (3e-2 if "16" in case else 1e-6)


@pytest.fixture(scope="module")
def one_process() -> tuple[list[list[int]], list[float]]:
    """Returns the samples of every update and the final weights of one process."""
    module = train_recorder()
    return module.seen, flat(module)


def flat(module: Any) -> list[float]:
    return [v for p in module.net.parameters() for v in p.detach().flatten().tolist()]


@pytest.mark.parametrize("processes", ["two", "four"])
def test_order_is_the_same_on_any_number_of_processes_and_workers(
    processes: str, one_process: Any, request: pytest.FixtureRequest
) -> None:
    seen, weights = one_process
    results = request.getfixturevalue(f"{processes}_with_batches")("exact_order")
    assert len(results) == {"two": 2, "four": 4}[processes]
    for result in results:
        for workers in ("0", "2"):
            assert result[workers]["seen"] == seen
            assert result[workers]["weights"] == pytest.approx(weights, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_exact_loader_is_exact_and_resumes_to_the_bit(
    two_with_batches: Any, name: str, one_process: Any
) -> None:
    for found in (result[name] for result in two_with_batches("exact_loader")):
        assert max(found["errors"]) <= 1e-6
        assert found["seen"] == one_process[0]
        assert found["weights"] == pytest.approx(one_process[1], rel=1e-5, abs=1e-5)
        assert len(found["resumed"]) > 2
        for number, resumed in found["resumed"].items():
            left = len(resumed["seen"])
            assert resumed["seen"] == found["seen"][len(found["seen"]) - left :], number
            assert resumed["weights"] == found["weights"], number
        # Also inside windows: there are more checkpoints than updates.
        assert len(list(Path(found["folder"]).glob("*.ckpt"))) > len(found["seen"])


def test_epochs_of_other_sizes_end_on_the_budget(two_with_batches: Any) -> None:
    first, second = two_with_batches("exact_epochs")
    assert first == second
    straight, resumed = first
    rates, _ = ramped(12, 24, 48)
    assert straight == pytest.approx(rates, abs=1e-12)
    assert resumed == straight[6:]


@pytest.mark.parametrize("tail", ["keep", "merge", "drop"])
def test_tails_on_two_processes_are_those_of_one(two_with_batches: Any, tail: str) -> None:
    results = [result[tail] for result in two_with_batches("tails")]
    alone = train_tail_recorder(tail)
    for found in results:
        assert found["seen"] == alone.seen
        assert found["rates"] == alone.rates
        assert found["weights"] == pytest.approx(flat(alone), rel=1e-5, abs=1e-5)
        assert len(found["resumed"]) > 3
        for number, resumed in found["resumed"].items():
            assert resumed["seen"] == found["seen"][-len(resumed["seen"]) :], number
            assert resumed["weights"] == found["weights"], number
        assert max(found["errors"]) <= 1e-6
    both = [sum(sizes) for sizes in zip(*(found["windows"] for found in results), strict=True)]
    assert both == {"keep": [7, 7, 3], "merge": [7, 10], "drop": [7, 7]}[tail] * 2


def test_batch_norm_raises_on_both_processes_before_the_first_update(two_with_batches: Any) -> None:
    for result in two_with_batches("tails"):
        assert "got 1 in update 2, which has 3 samples" in result["keep"]["error"]
        assert "on 2 process(es)" in result["keep"]["error"]
        assert result["keep"]["updates"] == 0
        assert result["merge"]["error"] == result["drop"]["error"] == ""
        assert result["merge"]["updates"] == result["drop"]["updates"] == 4


def test_run_on_one_process_resumes_on_two(two_with_batches: Any, one_process: Any) -> None:
    for found in two_with_batches("resume_from_one_process"):
        assert len(found) > 4
        for number, resumed in found.items():
            assert (
                resumed["seen"] == one_process[0][len(one_process[0]) - len(resumed["seen"]) :]
            ), number
            assert resumed["weights"] == pytest.approx(one_process[1], rel=1e-5, abs=1e-5), number


def test_run_on_two_processes_resumes_on_one(two_with_batches: Any) -> None:
    found = two_with_batches("exact_loader")[0]["ddp"]
    paths = sorted(Path(found["folder"]).glob("*.ckpt"), key=lambda path: int(path.stem))
    assert len(paths) > len(found["seen"])
    for path in paths[3 : len(paths) - 1 : 7]:
        resumed = train_recorder(ckpt=path)
        assert resumed.seen == found["seen"][len(found["seen"]) - len(resumed.seen) :]
        assert flat(resumed) == pytest.approx(found["weights"], rel=1e-5, abs=1e-5)


def test_shards_that_differ_by_a_sample_have_the_same_windows(two_with_batches: Any) -> None:
    first, second = two_with_batches("uneven_shards")
    assert first["windows"] == [2, 2, 2, 2, 2, 2, 1, 4, 4, 4, 1]
    assert second["windows"] == [2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 2]
    assert max(first["errors"] + second["errors"]) <= 1e-6


def noise_and_signal_of_the_data(
    case: str, *, updates: int = 300, decay: float = 0.999
) -> tuple[float, float]:
    """Computes noise and signal from the samples that the two processes drew."""
    strategy, accumulate = case.split()
    streams = [iter(Noise(dimensions=QuadraticNoise.dimensions, rank=rank)) for rank in range(2)]
    noise = signal = total = 0.0
    for update in range(updates):
        drawn = [
            torch.stack([next(stream) for _ in range(2 * int(accumulate))]) for stream in streams
        ]
        parts = [mine[:2] for mine in drawn]  # each process's first micro-batch
        if strategy == "fsdp2":
            parts = [torch.cat(parts)]
        squares = [float((QuadraticNoise.value - part.mean(0)).square().sum()) for part in parts]
        small, small_square = len(parts[0]), sum(squares) / len(squares)
        big = 4 * int(accumulate)
        big_square = float((QuadraticNoise.value - torch.cat(drawn).mean(0)).square().sum())
        weight = decay ** (updates - 1 - update)
        noise += weight * (small_square - big_square) / (1 / small - 1 / big)
        signal += weight * (big * big_square - small * small_square) / (big - small)
        total += weight
    return noise / total, signal / total


@pytest.mark.parametrize("case", ["ddp 1", "ddp 4", "fsdp2 4"])
def test_noise_scale_equals_the_formula_and_is_close_to_the_known_one(
    two_with_batches: Any, case: str
) -> None:
    first, second = (result[case] for result in two_with_batches("noise_scales"))
    assert first == second
    scale, error, noise, signal = first
    expected = noise_and_signal_of_the_data(case)
    assert (noise, signal) == pytest.approx(expected, rel=1e-4)
    assert scale == pytest.approx(expected[0] / expected[1], rel=1e-4)
    truth = QuadraticNoise.noise / QuadraticNoise.signal
    assert error < 0.2 * truth
    assert abs(scale - truth) <= 2 * error


def test_the_noise_scale_works_beside_a_hook_of_the_user(two_with_batches: Any) -> None:
    for result in two_with_batches("noise_scales"):
        assert result["hook"] == [2, None]


def test_out_of_memory_on_one_process_stops_both(two_with_batches: Any) -> None:
    first, second = two_with_batches("finder")
    assert first[:3] == second[:3]
    size, trials, untouched = first[:3]
    assert size == 8  # the largest divisor of 48 / 2 up to 9
    assert [8, True] in trials
    assert [12, False] in trials
    assert untouched
    assert "because a trial failed on another process" in first[3]
    assert second[3] == "on purpose"
