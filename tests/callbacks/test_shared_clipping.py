"""GradientClipping(scope="all"), compared with plain loops that call torch's clip_grad_norm_."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_bigopt import (
    AGC,
    AdaGC,
    AutoClip,
    ClipToMedian,
    GradientClipping,
    Groups,
    Linear,
    MaxUpdateRatio,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    PerParameterNormClip,
    StepGuard,
    UpdateClip,
    ValueClip,
    ZClip,
)
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import QUIET, Probe, Regression, ResumableLoader, cpu_precision

SMALL = NormClip(max_norm=0.1)
SIZE, BATCH = 16, 2


class Pair(L.LightningModule):
    """One backward pass, then a step of each of two optimizers. Records the gradients of steps."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.fused = fused
        self.stepped: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.head(self.body(x).tanh()) - y).square().mean()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.body.parameters(), lr=0.5, momentum=0.9, fused=self.fused),
            torch.optim.AdamW(self.head.parameters(), lr=0.01, fused=self.fused),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch[0], batch[1]))
        self.step_all()

    def step_all(self) -> None:
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        found = [g.norm() for g in gradients if g is not None]
        self.stepped.append(float(torch.stack(found).norm()) if found else 0.0)


def fit(module: L.LightningModule, *callbacks: Any, ckpt: Any = None, **options: Any) -> Any:
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    loader = ResumableLoader(SIZE, BATCH)
    trainer.fit(module, loader, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def batches() -> list[tuple[Tensor, Tensor]]:
    data = Regression(SIZE)
    return list(zip(data.x.split(BATCH), data.y.split(BATCH), strict=True))


def expected(module: Any, *, max_norm: float = 0.1, norm_type: float = 2.0) -> list[Tensor]:
    optimizers = module.configure_optimizers()
    for x, y in batches():
        module.loss(x, y).backward()
        nn.utils.clip_grad_norm_(module.parameters(), max_norm, norm_type)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return weights(module)


def assert_equal(found: list[Tensor], other: list[Tensor], *, atol: float = 1e-6) -> None:
    for mine, theirs in zip(found, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------ one norm


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_all_optimizers_share_one_norm(fused: bool, norm_type: float) -> None:
    module = Pair(fused=fused)
    fit(module, GradientClipping(NormClip(max_norm=0.1, norm_type=norm_type), scope="all"))
    assert_equal(weights(module), expected(Pair(), norm_type=norm_type))
    separate = Pair(fused=fused)
    fit(separate, GradientClipping(NormClip(max_norm=0.1, norm_type=norm_type)))
    assert max((a - b).abs().max() for a, b in zip(weights(module), weights(separate), strict=True))


def test_the_shared_norm_is_that_of_torch() -> None:
    norms: list[float] = []

    class Records(Pair):
        def on_after_backward(self) -> None:
            gradients = [p.grad for p in self.parameters()]
            norms.append(float(nn.utils.get_total_norm(gradients)))

    module, clipping = Records(), GradientClipping(AutoClip(percentile=100), scope="all")
    fit(module, clipping)
    assert clipping.saved_state()["rule"][""]["norms"] == pytest.approx(norms, rel=1e-6)
    assert len(norms) == SIZE // BATCH


def test_one_optimizer_is_clipped_as_by_default() -> None:
    for rule in (SMALL, AutoClip(percentile=40), ZClip(warmup=2, z_threshold=0.1)):
        default, shared = Probe(), Probe()
        first, second = GradientClipping(rule), GradientClipping(rule, scope="all")
        fit(default, first)
        fit(shared, second)
        for mine, other in zip(weights(shared), weights(default), strict=True):
            assert torch.equal(mine, other)
        for part in ("rule", "audit"):
            assert second.saved_state()[part] == first.saved_state()[part]


def test_several_backward_passes_before_the_first_step() -> None:
    class TwoLosses(Pair):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch[0], batch[1])
            self.manual_backward(loss / 4, retain_graph=True)
            self.manual_backward(loss * 3 / 4)
            self.step_all()

    module = TwoLosses()
    fit(module, GradientClipping(SMALL, scope="all"))
    assert_equal(weights(module), expected(Pair()))


def test_a_closure_of_the_first_step_computes_all_gradients() -> None:
    class Closure(Pair):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            body, head = self.optimizers()

            def closure() -> None:
                self.manual_backward(self.loss(batch[0], batch[1]))

            body.step(closure=closure)
            head.step()
            body.zero_grad()
            head.zero_grad()

    module = Closure()
    fit(module, GradientClipping(SMALL, scope="all"))
    assert_equal(weights(module), expected(Pair()))


def test_a_scheduled_threshold_holds_for_all_optimizers() -> None:
    module = Pair()
    rule = NormClip(max_norm=0.1, schedule=Linear(start=1.0, end=0.5))
    fit(module, GradientClipping(rule, scope="all"), max_steps=2 * SIZE // BATCH)
    pairs = list(zip(module.stepped[::2], module.stepped[1::2], strict=True))
    totals = [math.hypot(*pair) for pair in pairs]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == pytest.approx(0.1, rel=0.1)
    assert totals[-1] == pytest.approx(0.05, rel=0.15)


def test_accumulated_gradients_count_when_the_optimizers_step() -> None:
    class Accumulates(Pair):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch[0], batch[1]) / 2)
            if batch_idx % 2:
                self.step_all()

    module, other = Accumulates(), Pair()
    fit(module, GradientClipping(SMALL, scope="all"))
    optimizers = other.configure_optimizers()
    for index, (x, y) in enumerate(batches()):
        (other.loss(x, y) / 2).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(weights(module), weights(other))


def test_every_round_of_steps_in_a_batch_has_its_own_norm() -> None:
    class Twice(Pair):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                super().training_step(batch, batch_idx)

    module, other = Twice(), Pair()
    clipping = GradientClipping(AutoClip(percentile=100), scope="all")
    fit(module, clipping)
    assert len(clipping.saved_state()["rule"][""]["norms"]) == 2 * SIZE // BATCH
    module = Twice()
    fit(module, GradientClipping(SMALL, scope="all"))
    optimizers = other.configure_optimizers()
    for x, y in batches():
        for _ in range(2):
            other.loss(x, y).backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(weights(module), weights(other))


# ------------------------------------------------------- optimizers that step apart, or overlap


class EverySecond(Pair):
    """The head steps in every second batch; its gradient is set to zero in every batch or not."""

    def __init__(self, *, zeroes: bool) -> None:
        super().__init__()
        self.zeroes = zeroes

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        if self.zeroes and batch_idx % 2:
            self.toggle_optimizer(body)
        self.manual_backward(self.loss(batch[0], batch[1]))
        if self.zeroes and batch_idx % 2:
            self.untoggle_optimizer(body)
        body.step()
        body.zero_grad()
        if batch_idx % 2 == 0:
            head.step()
            head.zero_grad()


@pytest.mark.parametrize("zeroes", [True, False])
def test_gradients_that_are_none_do_not_count_and_old_ones_do(zeroes: bool) -> None:
    norms: list[float] = []

    class Records(EverySecond):
        def on_after_backward(self) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            assert len(gradients) == (2 if self.zeroes and len(norms) % 2 else 4)
            norms.append(float(nn.utils.get_total_norm(gradients)))

    clipping = GradientClipping(AutoClip(percentile=100), scope="all")
    fit(Records(zeroes=zeroes), clipping)
    assert clipping.saved_state()["rule"][""]["norms"] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("zero_early", [False, True])
def test_a_parameter_of_two_optimizers_counts_once_and_is_clipped_once(
    fused: bool, zero_early: bool
) -> None:
    class Overlap(Pair):
        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            both = [*self.body.parameters(), self.head.weight]
            return [
                torch.optim.SGD(both, lr=0.5, fused=self.fused),
                torch.optim.SGD(self.head.parameters(), lr=0.1, fused=self.fused),
            ]

        def step_all(self) -> None:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.step()
                if zero_early:
                    optimizer.zero_grad()
            for optimizer in optimizers:
                optimizer.zero_grad()

    module, other = Overlap(fused=fused), Overlap()
    fit(module, GradientClipping(SMALL, scope="all"))
    optimizers = other.configure_optimizers()
    for x, y in batches():
        other.loss(x, y).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
            if zero_early:
                optimizer.zero_grad()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_equal(weights(module), weights(other))


def test_a_parameter_of_the_second_and_third_optimizer_counts_once() -> None:
    class Overlap(Pair):
        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            parts = (self.body, self.head, self.head)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch[0], batch[1]))
            norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))
            for optimizer in self.optimizers():
                optimizer.step()
            self.zero_grad()

    norms: list[float] = []
    clipping = GradientClipping(AutoClip(percentile=50), scope="all")
    fit(Overlap(), clipping)
    assert clipping.saved_state()["rule"][""]["norms"] == pytest.approx(norms, rel=1e-6)


# ---------------------------------------------------------------------- backward pass in between


class Adversarial(Pair):
    """The gradients of the head are complete only after the body has stepped."""

    def __init__(self, second: Callable[[Any, Tensor], None], *, zeroes: bool) -> None:
        super().__init__()
        self.second, self.zeroes = second, zeroes

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        self.manual_backward(self.loss(batch[0], batch[1]))
        body.step()
        if self.zeroes:
            head.zero_grad()
        self.second(self, self.loss(batch[0], batch[1]))
        head.step()
        body.zero_grad()
        head.zero_grad()


SECOND: dict[str, Callable[[Any, Tensor], None]] = {
    "manual_backward": lambda module, loss: module.manual_backward(loss),
    "backward": lambda module, loss: loss.backward(),
}


@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize("second", SECOND)
def test_a_backward_pass_between_the_steps_raises(second: str, zeroes: bool) -> None:
    module = Adversarial(SECOND[second], zeroes=zeroes)
    text = r"got another gradient of head\.weight and 1 more after the first step; run all"
    with pytest.raises(ValueError, match=text):
        fit(module, GradientClipping(SMALL, scope="all"))
    fit(Adversarial(SECOND[second], zeroes=zeroes), GradientClipping(SMALL, scope="optimizer"))


def test_a_gradient_that_appears_between_the_steps_raises() -> None:
    class Toggled(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.toggle_optimizer(self.optimizers()[0])
            self.manual_backward(self.loss(batch[0], batch[1]))
            self.untoggle_optimizer(self.optimizers()[0])
            assert self.head.weight.grad is None
            self.optimizers()[0].step()
            self.manual_backward(self.loss(batch[0], batch[1]))
            self.optimizers()[1].step()

    with pytest.raises(ValueError, match=r"head\.weight and 1 more"):
        fit(Toggled(SECOND["backward"], zeroes=False), GradientClipping(SMALL, scope="all"))


def test_a_change_for_a_third_optimizer_raises_although_the_second_is_unchanged() -> None:
    class Three(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 1)

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            parts = (self.body, self.head, self.other)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch[0], batch[1]) + self.other(batch[0]).mean())
            body, head, other = self.optimizers()
            body.step()
            self.manual_backward(self.other(batch[0]).mean())
            head.step()
            other.step()

    with pytest.raises(ValueError, match=r"another gradient of other\.weight and 1 more"):
        fit(Three(), GradientClipping(SMALL, scope="all"))


def test_zeroing_gradients_of_an_optimizer_that_does_not_step_is_no_change() -> None:
    class Zeroes(Pair):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            body, head = self.optimizers()
            self.manual_backward(self.loss(batch[0], batch[1]))
            body.step()
            if batch_idx == 0:  # an optimizer that never steps is reported
                head.step()
            head.zero_grad()
            body.zero_grad()

    module, other = Zeroes(), Pair()
    fit(module, GradientClipping(SMALL, scope="all"))
    body, head = other.configure_optimizers()
    for index, (x, y) in enumerate(batches()):
        other.loss(x, y).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        body.step()
        if index == 0:
            head.step()
        other.zero_grad()
    assert_equal(weights(module), weights(other))


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "rule",
    [
        ValueClip(),
        AGC(),
        AdaGC(),
        PerParameterNormClip(),
        UpdateClip(),
        MaxUpdateRatio(),
        Groups({"*": NormClip()}),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_rules_without_a_common_coefficient_are_refused(rule: Any) -> None:
    text = rf"scope='all', got {type(rule).__name__}; use NormClip, AutoClip or ZClip, or scope"
    with pytest.raises(ValueError, match=text):
        GradientClipping(rule, scope="all")
    assert GradientClipping(rule).scope == "optimizer"


def test_another_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope must be 'optimizer' or 'all', got 'both'"):
        GradientClipping(SMALL, scope="both")  # type: ignore[arg-type]


def test_a_grad_scaler_is_refused_with_several_optimizers_only() -> None:
    module, before = Pair(), weights(Pair())
    text = r"must not be 16-mixed .* use bf16-mixed, or scope='optimizer'"
    with pytest.raises(ValueError, match=text):
        fit(module, GradientClipping(SMALL, scope="all"), **cpu_precision("16-mixed"))
    for mine, other in zip(weights(module), before, strict=True):
        assert torch.equal(mine, other)  # before the first batch
    fit(Probe(), GradientClipping(SMALL, scope="all"), **cpu_precision("16-mixed"))
    fit(Pair(), GradientClipping(SMALL), **cpu_precision("16-mixed"))
    fit(Pair(), GradientClipping(SMALL, scope="all"), **cpu_precision("bf16-mixed"))


# ----------------------------------------------------------------------- guard, monitor, summary


class BadHead(Pair):
    """Multiplies the gradient of one part by a factor in batch 3."""

    def __init__(self, part: str, factor: float, **options: Any) -> None:
        super().__init__(**options)
        self.part, self.factor = part, factor
        self.total = 0.0
        self.parts: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch[0], batch[1]))
        if batch_idx == 3:
            for parameter in getattr(self, self.part).parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(self.factor)
        norms = [
            float(nn.utils.get_total_norm([p.grad for p in part.parameters()]))
            for part in (self.body, self.head)
        ]
        self.parts.append((norms[0], norms[1]))
        self.step_all()


@pytest.mark.parametrize(("part", "rejected"), [("body", 0), ("head", 1)])
def test_a_guard_rejects_the_step_of_one_optimizer_only(part: str, rejected: int) -> None:
    module, guard = BadHead(part, math.nan), StepGuard([NonFinite()])
    fit(module, GradientClipping(SMALL, scope="all"), guard)
    labels = ["SGD", "AdamW"]
    assert [(r.update, r.optimizer) for r in guard.rejections] == [
        (2 * 3 + rejected, labels[rejected])
    ]
    pairs = list(zip(module.stepped[::2], module.stepped[1::2], strict=True))
    for index, (found, norms) in enumerate(zip(pairs, module.parts, strict=True)):
        if index != 3:
            coefficient = min(1.0, 0.1 / math.hypot(*norms))
            assert found == pytest.approx([n * coefficient for n in norms], rel=1e-5)
    # The other optimizer is clipped by the norm of its own gradients, which is the finite part.
    assert pairs[3][rejected] == 0.0
    assert pairs[3][1 - rejected] == pytest.approx(0.1, rel=1e-4)
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("part", "bad"), [("body", 0), ("head", 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fused_kernel_skips_the_optimizer_with_a_gradient_that_is_not_finite(
    part: str, bad: int, value: float
) -> None:
    module = BadHead(part, value, fused=True)
    fit(module, GradientClipping(SMALL, scope="all"), limit_train_batches=3)
    before = weights(module)
    module = BadHead(part, value, fused=True)
    fit(module, GradientClipping(SMALL, scope="all"), limit_train_batches=4)
    # Two tensors for each part.
    same = [torch.equal(a, b) for a, b in zip(weights(module), before, strict=True)]
    assert same == [bad == 0] * 2 + [bad == 1] * 2
    assert all(tensor.isfinite().all() for tensor in weights(module))


@pytest.mark.parametrize(("part", "bad"), [("body", 0), ("head", 1)])
def test_a_gradient_that_is_not_finite_does_not_disable_clipping_of_the_others(
    part: str, bad: int
) -> None:
    module, clipping = BadHead(part, math.inf), GradientClipping(SMALL, scope="all")
    fit(module, clipping, limit_train_batches=4)
    last = module.stepped[-2:]
    assert last[1 - bad] == pytest.approx(0.1, rel=1e-4)
    assert not math.isfinite(last[bad])


def test_a_rejected_step_belongs_to_its_round() -> None:
    class Twice(BadHead):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                super().training_step(batch, batch_idx)

    module, guard = Twice("body", math.nan), StepGuard([NonFinite()])
    fit(module, GradientClipping(SMALL, scope="all"), guard)
    assert [r.optimizer for r in guard.rejections] == ["SGD", "SGD"]
    pairs = list(zip(module.stepped[::2], module.stepped[1::2], strict=True))
    assert [index for index, pair in enumerate(pairs) if pair[0] == 0.0] == [6, 7]
    for index, pair in enumerate(pairs):
        assert math.hypot(*pair) == pytest.approx(0.1, rel=1e-4), index


def test_gradients_that_a_guard_scales_are_no_change() -> None:
    module = BadHead("head", 1e4)
    guard = StepGuard([NormSpike(armed=2)], actions=[ClipToMedian()])
    fit(module, GradientClipping(SMALL, scope="all"), guard)
    first = guard.rejections[0]
    assert (first.update, first.optimizer) == (2 * 3 + 1, "AdamW")
    # The shared norm is measured before the guard decides on the second optimizer.
    body, head = module.stepped[6:8]
    coefficient = 0.1 / math.hypot(*module.parts[3])
    assert body == pytest.approx(module.parts[3][0] * coefficient, rel=1e-4)
    assert head < 1e-2 * module.parts[3][1] * coefficient


def test_monitor_and_summary_have_the_shared_decision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = BadHead("body", 1.0)
    clipping = GradientClipping(NormClip(max_norm=12.0), scope="all")
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit(module, clipping, OptimizationMonitor(every=1), logger=logger)
    totals = [math.hypot(*norms) for norms in module.parts]
    run = read_run(logger.log_dir)

    def logged(tag: str) -> list[float]:
        (values,) = [points for name, points in run.select(tag).items() if name == tag]
        return [value for _, value in values]

    assert logged("grad_norm/total") == pytest.approx(totals, rel=1e-5)
    assert logged("grad_norm/total/SGD") == pytest.approx([n for n, _ in module.parts], rel=1e-5)
    assert logged("grad_norm/total/AdamW") == pytest.approx([n for _, n in module.parts], rel=1e-5)
    coefficients = [min(1.0, 12.0 / total) for total in totals]
    for label in ("SGD", "AdamW"):
        assert logged(f"clip/coefficient/{label}") == pytest.approx(coefficients, rel=1e-4)
    assert logged("clip/fraction") == [float(c < 1) for c in coefficients]
    assert run.select("clip/fraction").keys() == {"clip/fraction"}
    clipped = sum(c < 1 for c in coefficients)
    assert 0 < clipped < len(coefficients)
    ((key, report),) = clipping.reports().items()
    assert (key, report.updates, report.clipped) == (("", ""), len(totals), clipped)
    lines = [r.getMessage() for r in caplog.records if "updates clipped" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("NormClip: ")


# ----------------------------------------------------------------------------------------- state


class Saves(L.Callback):
    """Saves a checkpoint after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batches = folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.batches += 1
        trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")


@pytest.mark.parametrize(
    "rule", [AutoClip(percentile=40), ZClip(warmup=3, z_threshold=0.1)], ids=["AutoClip", "ZClip"]
)
def test_resume_is_exact_with_one_norm_per_batch(rule: Any, tmp_path: Path) -> None:
    whole, clipping = Pair(), GradientClipping(rule, scope="all")
    fit(whole, clipping, Saves(tmp_path), max_epochs=2)
    updates = 2 * SIZE // BATCH
    state = clipping.saved_state()
    assert state["rule"].keys() == {""}
    assert state["audit"][""][""]["updates"] == updates
    for batches in (2, 5, 11):
        module, resumed = Pair(), GradientClipping(rule, scope="all")
        fit(module, resumed, ckpt=tmp_path / f"{batches}.ckpt", max_epochs=2)
        for mine, other in zip(weights(module), weights(whole), strict=True):
            assert torch.equal(mine, other)
        assert resumed.saved_state() == state


@pytest.mark.parametrize("before", ["optimizer", "all"])
def test_resume_with_another_scope_starts_anew_and_logs_it(
    before: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    after: Any = "all" if before == "optimizer" else "optimizer"
    rule, at, updates = AutoClip(percentile=40), 5, 2 * SIZE // BATCH
    fit(Pair(), GradientClipping(rule, scope=before), Saves(tmp_path), max_epochs=2)
    resumed = GradientClipping(rule, scope=after)
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(Pair(), resumed, ckpt=tmp_path / f"{at}.ckpt", max_epochs=2)
    assert f"scope: {before} → {after}" in caplog.text
    labels = resumed.reports().keys()
    assert labels == ({("", "")} if after == "all" else {("SGD", ""), ("AdamW", "")})
    assert {report.updates for report in resumed.reports().values()} == {updates - at}


def test_nothing_is_kept_after_the_batch() -> None:
    class Stops(EverySecond):
        def on_train_batch_end(self, *args: Any) -> None:
            assert clipping._shared is None

    clipping = GradientClipping(SMALL, scope="all")
    fit(Stops(zeroes=False), clipping)
    with pytest.raises(ValueError, match="got another gradient"):
        fit(Adversarial(SECOND["backward"], zeroes=True), clipping)
    assert (clipping._shared, clipping._joint_norm) == (None, None)
    module = Pair()
    fit(module, clipping)
    assert_equal(weights(module), expected(Pair()))
