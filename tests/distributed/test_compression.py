"""Compressed gradients on two processes, against plain loops and torch's own hook."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bigopt import BatchSizeScheduler, GradientCompression, TopK
from tests.distributed.compression_scenarios import RAMP, Wide, data, residuals
from tests.helpers import Regression, fit
from tests.mean_gradients import first_element, mean_data, sum_of_means

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture
def found(two_processes: Any) -> Any:
    """Returns a function: scenario → its result on the first process."""
    return lambda name: two_processes("compression")[0][name]


def plain_top_k(keep: float, *, start: int = 0) -> list[float]:
    """Trains with the algorithm of Stich et al. on two workers, in a plain loop."""
    model, data = Wide().net, Regression(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parameters = list(model.parameters())
    memory = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for update in range(8):
        sums = [torch.zeros_like(p) for p in parameters]
        for worker in range(2):
            rows = [worker + 2 * (2 * update + i) for i in range(2)]
            y = data.y[rows] / (torch.tensor(rows) + 1).unsqueeze(1)
            loss = nn.functional.mse_loss(model(data.x[rows]), y)
            for index, gradient in enumerate(torch.autograd.grad(loss, parameters)):
                if update < start:
                    sums[index] += gradient
                    continue
                whole = memory[worker][index] + gradient
                count = math.ceil(keep * whole.numel())
                limit = whole.abs().flatten().sort(descending=True).values[count - 1]
                sent = torch.where(whole.abs() >= limit, whole, 0.0)
                memory[worker][index] = whole - sent
                sums[index] += sent
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total / 2
        optimizer.step()
    return [v for p in parameters for v in p.detach().flatten().tolist()]


@pytest.mark.parametrize(
    ("name", "keep", "start"), [("topk", 0.1, 0), ("all", 1.0, 0), ("late", 0.1, 5)]
)
def test_top_k_equals_a_plain_loop(found: Any, name: str, keep: float, start: int) -> None:
    weights = found("trained")[name]
    assert weights == pytest.approx(plain_top_k(keep, start=start), rel=1e-5, abs=1e-6)
    if name != "all":
        assert weights != pytest.approx(found("trained")["dense"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("name", "error"), [("fp16", 1e-4), ("bf16", 1e-3)])
def test_half_precision_is_close_to_dense_and_not_equal(
    found: Any, name: str, error: float
) -> None:
    trained = found("trained")
    assert trained[name] == pytest.approx(trained["dense"], abs=error)
    assert trained[name] != trained["dense"]


def test_power_sgd_equals_the_hook_of_torch(found: Any) -> None:
    runs = found("power_sgd")
    assert runs["ours"] == pytest.approx(runs["theirs"], rel=1e-4, abs=1e-6)
    assert runs["ours"] != pytest.approx(runs["dense"], rel=1e-3, abs=1e-3)


def test_both_processes_train_to_the_same_bits(two_processes: Any) -> None:
    first, second = (result for result in two_processes("compression"))
    for scenario in ("trained", "power_sgd"):
        assert first[scenario] == second[scenario]
    for name, result in first["graphs"].items():
        if "left" not in name:
            assert result["weights"] == second["graphs"][name]["weights"], name
    for name, result in first["resumed"].items():
        assert result["weights"] == second["resumed"][name]["weights"], name


def test_a_run_resumed_within_a_window_equals_the_uninterrupted_one(two_processes: Any) -> None:
    for result in two_processes("compression"):
        assert len(result["resumed"]) == 6
        for name, run in result["resumed"].items():
            assert (run["equal"], run["finite"]) == (True, True), name


def test_a_skipped_update_changes_nothing(two_processes: Any) -> None:
    for result in two_processes("compression"):
        for name, run in result["skipped"].items():
            assert (run["equal"], run["finite"]) == (True, True), name


def logged(path: str) -> list[tuple[float, float]]:
    with Path(path).open() as file:
        rows = list(csv.DictReader(file))
    names = ("communication/bytes", "communication/dense_bytes")
    return [(float(row[names[0]]), float(row[names[1]])) for row in rows]


@pytest.mark.parametrize("name", ["topk", "powersgd", "fp16", "bf16", "late"])
def test_logged_bytes_are_those_that_the_collectives_receive(found: Any, name: str) -> None:
    run = found("communicated")[name]
    bytes_ = logged(run["path"])
    # On two processes a ring sends what it receives: half of it in each of two rounds for a sum.
    assert [sent for sent, _ in bytes_] == run["handed"]
    elements = sum(p.numel() for p in Wide().parameters() if p.requires_grad)
    assert {dense for _, dense in bytes_} == {4 * elements}
    if name == "late":
        assert run["handed"][:4] == [4 * elements] * 4
        assert max(run["handed"][4:]) < elements
    if name in ("fp16", "bf16"):
        assert set(run["handed"]) == {2 * elements}


def test_the_noise_scale_and_a_compressor_share_the_hook(found: Any) -> None:
    runs = found("hooks")
    assert runs["noise"]["weights"] == runs["none"]["weights"]
    assert runs["fp16 and noise"]["weights"] == runs["fp16"]["weights"] != runs["none"]["weights"]
    # The norm of the mean is that of the gradient in half precision.
    noise, both = (runs[name]["noise"] for name in ("noise", "fp16 and noise"))
    assert runs["noise"]["measured"] == runs["fp16 and noise"]["measured"] == 8
    assert both == pytest.approx(noise, rel=1e-2)


def test_the_noise_scale_shares_the_hook_with_one_of_the_user(found: Any) -> None:
    runs = found("hooks")
    assert runs["user and noise"]["weights"] == runs["user"]["weights"] == runs["fp16"]["weights"]
    assert runs["user and noise"]["calls"] == runs["user"]["calls"] > 0
    assert runs["user and noise"]["measured"] == 8


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (0, "got GradientCompression and the hook of register_comm_hook; remove one of them"),
        (1, "ddp_comm_hook must be None with GradientCompression"),
        (2, "DDP must have no communication hook before GradientCompression"),
        (3, "DDP must have no communication hook before GradientNoiseScale"),
    ],
)
def test_two_hooks_that_average_are_refused(two_processes: Any, index: int, text: str) -> None:
    for result in two_processes("compression"):
        assert len(result["hooks"]["errors"]) == 4
        assert text in result["hooks"]["errors"][index]


def test_the_noise_scale_of_compressed_gradients_is_right_or_missing(found: Any) -> None:
    dense, half, late, never = (
        found("noise")[name] for name in ("dense", "fp16", "late top k", "top k")
    )
    assert half["scale"] == pytest.approx(dense["scale"], rel=1e-3)
    assert dense["updates"] == half["updates"] == 300
    assert (late["updates"], never["updates"]) == (150, 0)
    assert late["scale"] == pytest.approx(40 / 10, abs=3 * late["error"])
    assert never["scale"] is None


def test_parameters_without_gradient_keep_their_residual(found: Any) -> None:
    runs = found("graphs")
    for name in ("topk", "powersgd"):
        unused, one = runs[f"{name} unused"], runs[f"{name} one"]
        assert unused["grad"] is None
        assert set(unused["residual"] or [0.0]) == {0.0}
        assert one["grad"] == "some"
        is_equal, largest = runs[f"{name} left"]
        assert is_equal
        assert largest > 0


@pytest.mark.parametrize("name", ["topk", "powersgd"])
@pytest.mark.parametrize("case", ["views", "static", "small buckets"])
def test_options_of_ddp_do_not_change_the_result(found: Any, name: str, case: str) -> None:
    runs = found("graphs")
    assert runs[f"{name} {case}"]["weights"] == pytest.approx(
        runs[f"{name} everybody"]["weights"], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("name", ["topk", "powersgd"])
@pytest.mark.parametrize(("case", "weight"), [("samples", None), ("weights", first_element)])
def test_a_rescaled_window_adds_what_was_left(
    two_processes: Any, name: str, case: str, weight: Any
) -> None:
    """Updates and mean residual are the sum of the means of all windows; the last is smaller."""
    runs = [
        torch.tensor(r["rescaled"][f"{name} {case}"]["residual"])
        for r in two_processes("compression")
    ]
    weights = [r["rescaled"][f"{name} {case}"]["weight"] for r in two_processes("compression")]
    data = [mean_data(33 + 2 * rank, seed=rank) for rank in range(2)]
    truth = 2 * sum_of_means(data, window=2, weight=weight).flatten()
    assert weights[0] == weights[1]
    assert torch.allclose(torch.stack(runs).mean(0) - torch.tensor(weights[0]), truth, atol=1e-5)


def test_one_process_continues_with_the_mean_of_the_residuals(
    two_processes: Any, found: Any
) -> None:
    saved = torch.load(found("other_sizes")["path"], weights_only=True)
    first, second = saved["callbacks"]["GradientCompression"]["states"]
    callback = GradientCompression(TopK(keep=0.1))
    seen: dict[str, Any] = {}

    class Looks(Wide):
        def on_train_start(self) -> None:
            seen.update(callback.residuals)

    path = found("other_sizes")["path"]
    callbacks = [callback, BatchSizeScheduler(RAMP)]
    fit(Looks(), data(), *callbacks, max_steps=5, max_epochs=-1, ckpt_path=path)
    assert seen.keys() == first.keys() == second.keys()
    for name, value in seen.items():
        mean = (first[name]["residual"] + second[name]["residual"]) / 2
        assert torch.equal(value, mean)
        assert name.startswith("unused") or not torch.equal(first[name]["residual"], mean)
    assert residuals(callback).keys() == seen.keys()


def test_a_checkpoint_after_an_error_holds_the_first_process_only(found: Any) -> None:
    (path,) = Path(found("other_sizes")["folder"]).glob("*.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]["GradientCompression"]["states"]
    assert len(states) == 1
    own = {name: state["residual"].flatten().tolist() for name, state in states[0].items()}
    assert own == found("other_sizes")["residuals"]


def test_other_strategies_and_manual_optimization_are_refused(two_processes: Any) -> None:
    for result in two_processes("compression"):
        fsdp2, fsdp1, manual = result["refused"]["errors"]
        assert "strategy must be DDP with GradientCompression, got ModelParallelStrategy" in fsdp2
        assert "strategy must be DDP with GradientCompression, got FlatShards" in fsdp1
        assert "automatic_optimization must be True with TopK(keep=0.1" in manual


def test_half_precision_works_with_manual_optimization(found: Any) -> None:
    refused = found("refused")
    assert refused["manual fp16"] == pytest.approx(refused["manual dense"], abs=1e-4)
    assert refused["manual fp16"] != refused["manual dense"]
