"""Compressors alone, on one process and with two processes that a test imitates."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_bigopt import BF16, FP16, PowerSGD, TopK
from lightning_bigopt.gradients.communication_hook import CommunicationHook
from lightning_bigopt.gradients.compression.collectives import Collectives, bytes_of
from lightning_bigopt.gradients.compression.compressor import FeedbackCompressor
from lightning_bigopt.gradients.compression.error_feedback import ErrorFeedback
from lightning_bigopt.gradients.compression.saved_states import states_of_process
from lightning_bigopt.gradients.local_gradient_norm import LocalGradientNorm
from lightning_bigopt.trainer_access import ddp_hooks


class Together(Collectives):
    """One of several threads that sum and gather as processes do."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(None)
        self.rank, self.shared, self.barrier = rank, shared, barrier
        self.size = len(shared)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.shared[self.rank] = tensor.clone()
        self.barrier.wait(30)
        parts = list(self.shared)
        self.barrier.wait(30)
        return parts

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(0))


def together(
    compressor: FeedbackCompressor,
    gradients: list[dict[str, Tensor]],
    feedback: list[ErrorFeedback],
    scale: Tensor | float = 1.0,
) -> None:
    """Averages the gradients of several processes in place, and commits their states."""
    shared: list[Any] = [None] * len(gradients)
    barrier = threading.Barrier(len(gradients))
    threads = [
        threading.Thread(
            target=compressor.average_,
            args=(own, mine, Together(rank, shared, barrier), scale),
        )
        for rank, (own, mine) in enumerate(zip(gradients, feedback, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, mine in zip(gradients, feedback, strict=True):
        mine.commit(own)


def drawn(seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (12, 10), "bias": (12,), "kernel": (8, 3, 2, 2), "scalar": ()}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("compressor", [TopK(keep=0.1), PowerSGD(rank=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_lost(compressor: FeedbackCompressor, dtype: torch.dtype) -> None:
    """All that was sent, and the mean of what is left, are the sum of the mean gradients."""
    feedback = [ErrorFeedback() for _ in range(3)]
    sent: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for update in range(5):
        gradients = [drawn(10 * update + rank, dtype=dtype) for rank in range(3)]
        for name in gradients[0]:
            mean = torch.stack([g[name].double() for g in gradients]).mean(0)
            truth[name] = truth.get(name, 0) + mean
        together(compressor, gradients, feedback)
        for name, value in gradients[0].items():
            assert all(torch.equal(value, other[name]) for other in gradients)
            sent[name] = sent.get(name, 0) + value.double()
    # The mean itself is rounded to the dtype of the gradient.
    error = 1e-5 if dtype == torch.float32 else 0.05
    for name, total in truth.items():
        left = torch.zeros(())
        if name in feedback[0].states:
            left = torch.stack([f.states[name]["residual"].double() for f in feedback]).mean(0)
        assert torch.allclose(sent[name] + left, total, atol=error), name


def test_power_sgd_of_full_rank_is_the_mean() -> None:
    feedback, gradients = [ErrorFeedback(), ErrorFeedback()], []
    for seed in (0, 1):  # the sum of two matrices of rank 1 has rank 2
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(20, 1, generator=generator) for _ in range(2))
        gradients.append({"w": left @ right.T})
    mean = (gradients[0]["w"] + gradients[1]["w"]) / 2
    together(PowerSGD(rank=2), gradients, feedback)
    assert torch.allclose(gradients[0]["w"], mean, atol=1e-5)


def test_power_sgd_continues_after_gradients_of_zero() -> None:
    feedback = ErrorFeedback()
    for value in (0.0, 1.0):
        gradient = torch.full((20, 20), value)
        PowerSGD(rank=1).average_({"w": gradient}, feedback, Collectives(None))
        feedback.commit(["w"])
    assert torch.allclose(gradient, torch.ones(20, 20), atol=1e-5)


@pytest.mark.parametrize("compressor", [TopK(keep=0.01), PowerSGD(rank=2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_of_one_process_reaches_all_and_no_state(
    compressor: FeedbackCompressor, value: float
) -> None:
    feedback = [ErrorFeedback(), ErrorFeedback()]
    together(compressor, [drawn(0), drawn(1)], feedback)
    before = [f.copy_of_states() for f in feedback]
    gradients = [drawn(2), drawn(3)]
    gradients[1]["matrix"][4, 5] = value
    together(compressor, gradients, feedback)
    for gradient, mine, old in zip(gradients, feedback, before, strict=True):
        assert not gradient["matrix"].isfinite().all()
        assert mine.states.keys() == old.keys()
        for name, state in mine.states.items():
            assert all(torch.equal(state[key], old[name][key]) for key in state), name


@pytest.mark.parametrize("compressor", [TopK(keep=0.1), PowerSGD(rank=2)])
def test_states_do_not_contain_the_loss_scale(compressor: FeedbackCompressor) -> None:
    plain, scaled = ErrorFeedback(), ErrorFeedback()
    for update, scale in enumerate((256.0, 1024.0, 2.0)):
        one = drawn(update)
        two = {name: value * scale for name, value in drawn(update).items()}
        compressor.average_(one, plain, Collectives(None))
        compressor.average_(two, scaled, Collectives(None), torch.tensor(scale))
        for feedback in (plain, scaled):
            feedback.commit(one)
        for name, value in one.items():
            assert torch.allclose(two[name] / scale, value, rtol=1e-5, atol=1e-6)
    for name, state in plain.states.items():
        for key, value in state.items():
            assert torch.allclose(scaled.states[name][key], value, rtol=1e-4, atol=1e-5)


def test_top_k_sends_at_least_one_element_and_nothing_of_an_empty_tensor() -> None:
    feedback = ErrorFeedback()
    gradients = {"small": torch.tensor([1.0, -3.0]), "empty": torch.zeros(0, 3)}
    TopK(keep=0.001).average_(gradients, feedback, Collectives(None))
    assert gradients["small"].tolist() == [0.0, -3.0]
    TopK(keep=0.5).average_({}, feedback, Collectives(None))


def test_commit_follows_a_fused_kernel_and_drops_what_was_not_updated() -> None:
    feedback = ErrorFeedback()
    for name in ("a", "b"):
        feedback.states[name] = {"residual": torch.zeros(1)}
        feedback.propose(name, {"residual": torch.ones(1)}, torch.tensor(True))
    feedback.commit(["a"], torch.tensor(1.0))
    assert feedback.states["a"]["residual"].item() == 0
    feedback.propose("a", {"residual": torch.ones(1)}, torch.tensor(True))
    feedback.commit(["a", "b"], torch.tensor(0.0))
    assert [feedback.states[name]["residual"].item() for name in "ab"] == [1, 0]


def test_another_rank_starts_with_a_new_factor_and_keeps_the_residual() -> None:
    feedback = ErrorFeedback()
    PowerSGD(rank=1).average_(drawn(0), feedback, Collectives(None))
    feedback.commit(list(drawn(0)))
    residual = feedback.states["matrix"]["residual"].clone()
    gradients = drawn(1)
    whole = gradients["matrix"] + residual
    PowerSGD(rank=2).average_(gradients, feedback, Collectives(None))
    feedback.commit(list(gradients))
    assert feedback.states["matrix"]["factor"].shape == (10, 2)
    left = feedback.states["matrix"]["residual"]
    assert torch.allclose(gradients["matrix"] + left, whole, atol=1e-5)


def test_bytes_of_sparse_tensors_are_values_and_positions() -> None:
    sparse = torch.sparse_coo_tensor([[0, 2, 5]], [1.0, 2.0, 3.0], (7,), check_invariants=True)
    assert bytes_of(sparse) == 3 * 4 + 3 * 8


def test_more_processes_change_the_bytes_as_a_ring_does() -> None:
    collectives = Collectives(None)
    collectives.size = 4
    assert collectives.bytes_of_sum(100.0) == 150.0


def test_states_of_another_number_of_processes_are_the_mean() -> None:
    saved = [
        {"w": {"residual": torch.tensor([v, 0.0]), "factor": torch.ones(1)}} for v in (2.0, 4.0)
    ]
    for rank in range(3):
        found = states_of_process(saved, rank, 3)["w"]
        assert (found["residual"].tolist(), found["factor"].tolist()) == ([3.0, 0.0], [1.0])
    assert states_of_process(saved, 1, 2)["w"]["residual"].tolist() == [4.0, 0.0]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: TopK(keep=0.0), "keep must be positive.*write 0.01 to send 1 %"),
        (lambda: TopK(keep=1.5), "keep must be"),
        (lambda: TopK(start="soon"), "start must be a duration"),
        (lambda: PowerSGD(rank=0), "rank must be a positive"),
        (lambda: FP16(start=-1), "start must be"),
        (lambda: BF16(start=1.5), "start must be a fraction"),
    ],
)
def test_invalid_arguments_raise(build: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: PowerSGD(matrix_approximation_rank=4), "write rank=4"),
        (lambda: PowerSGD(start_powerSGD_iter=10), "write start=10: an int is a number"),
        (lambda: TopK(k=100), "write keep=0.01, a fraction"),
    ],
)
def test_arguments_of_other_libraries_are_answered(build: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        build()


# ------------------------------------------------------------------------------------ hooks


class Bucket:
    """A bucket of DDP."""

    def buffer(self) -> Tensor:
        return torch.tensor([3.0, 4.0])


@pytest.mark.parametrize("wrapper", [None, lambda hook: lambda state, bucket: -hook(state, bucket)])
def test_a_hook_that_lightning_registers_runs_inside_ours(wrapper: Any) -> None:
    """Lightning registers it on a GPU only; this test registers it as Lightning does."""
    strategy = DDPStrategy(
        ddp_comm_hook=lambda state, bucket: state * bucket.buffer(),
        ddp_comm_state=2.0,
        ddp_comm_wrapper=wrapper,
    )

    class Trainer:
        def __init__(self) -> None:
            self.strategy = strategy

    trainer: Any = Trainer()
    ddp_hooks.share_user_hook(trainer, "validate")
    assert strategy._ddp_comm_wrapper is wrapper
    ddp_hooks.share_user_hook(trainer, "fit")
    ddp_hooks.share_user_hook(trainer, "fit")  # of another callback
    registered: Any = strategy._ddp_comm_wrapper(strategy._ddp_comm_hook)  # type: ignore[misc]
    assert not registered.__annotations__
    shared: CommunicationHook = strategy._ddp_comm_wrapper.bigopt_communication_hook
    norm = LocalGradientNorm()
    shared.measure(norm)
    sign = 1 if wrapper is None else -1
    for _ in range(2):
        assert registered(2.0, Bucket()).tolist() == [sign * 6.0, sign * 8.0]
    assert norm.take().item() == 50.0
    ddp_hooks.restore_user_hook(trainer)
    assert strategy._ddp_comm_wrapper is wrapper
