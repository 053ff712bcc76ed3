"""Every clipping rule in real fits: it resumes to the same bits and leaves nothing behind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    AGC,
    AdaGC,
    AutoClip,
    BatchSizeScheduler,
    BatchSizeSteps,
    ClippingRule,
    GradientClipping,
    Groups,
    Linear,
    MaxUpdateRatio,
    NormClip,
    PerParameterNormClip,
    StepGuard,
    UpdateClip,
    ValueClip,
    ZClip,
)
from lightning_bigopt.controllers.base import Controller
from lightning_bigopt.gradients import GradientNorms, clip_gradients_, measure
from lightning_bigopt.pipeline import Pipeline
from lightning_bigopt.pipeline import step as pipeline_step
from tests.kit import QUIET, ResumableLoader, cpu_precision
from tests.poison import KINDS, Poisoned, finite

RULES: dict[str, ClippingRule] = {
    "norm": NormClip(max_norm=0.5),
    "norm-inf": NormClip(max_norm=0.1, norm_type=math.inf),
    "norm-1": NormClip(max_norm=2.0, norm_type=1.0),
    "scheduled": NormClip(max_norm=0.5, schedule=Linear(start=1.0, end=0.1)),
    "value": ValueClip(max_abs=0.05),
    "per-parameter": PerParameterNormClip(max_norm=0.2),
    "agc": AGC(clip_factor=0.02, exclude="net.2.*"),
    "autoclip": AutoClip(percentile=30, window=5),
    "zclip": ZClip(warmup=3, z_threshold=0.3, max_norm=None),
    "adagc": AdaGC(warmup=4),
    "update": UpdateClip(max_rms=0.5),
    "ratio": MaxUpdateRatio(ratio=1e-3),
    "groups": Groups(
        {"net.0.*": ZClip(warmup=3), "net.2.bias": None, "*": AdaGC(warmup=3)},
    ),
    "groups-mixed": Groups({"*.bias": MaxUpdateRatio(ratio=1e-3), "*": NormClip(max_norm=0.3)}),
}
each_rule = pytest.mark.parametrize("name", RULES)
# A fused kernel takes one coefficient; what is written entry by entry takes no other way there.
IN_KERNEL = ("norm", "scheduled", "zclip", "adagc", "update")
each_rule_and_kind = pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "foreach") for name in RULES] + [(name, "fused") for name in IN_KERNEL],
)


def module(**options: Any) -> Poisoned:
    return Poisoned({}, optimizer=torch.optim.AdamW, lr=0.02, **options)


def fit(model: L.LightningModule, *callbacks: Any, size: int = 24, **options: Any) -> L.Trainer:
    ckpt = options.pop("ckpt_path", None)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(model, ResumableLoader(size, 2), ckpt_path=ckpt)
    return trainer


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def by_hand(rule: ClippingRule, kind: str, *, accumulate: int = 1, size: int = 24) -> list[Tensor]:
    """The plain loop of the documentation: backward, clip_gradients_, step."""
    model = module()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, **KINDS[kind])
    state = rule.initial_state()
    windows = size // 2 // accumulate
    for index, batch in enumerate(ResumableLoader(size, 2)):
        (model.even_loss(batch) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            clip_gradients_(
                model,
                rule,
                state=state,
                optimizer=optimizer,
                fraction=(index + 1 - accumulate) / accumulate / windows,
            )
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@each_rule_and_kind
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_fit_equals_the_plain_loop(name: str, kind: str, accumulate: int) -> None:
    model = module(**KINDS[kind])
    untouched = module(**KINDS[kind])
    fit(model, GradientClipping(RULES[name]), accumulate_grad_batches=accumulate)
    fit(untouched, accumulate_grad_batches=accumulate)
    assert not equal(weights(model), weights(untouched)), "the rule must act, or it tests nothing"
    expected = by_hand(RULES[name], kind, accumulate=accumulate)
    for mine, theirs in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@each_rule_and_kind
def test_kill_and_resume_gives_the_same_bits(name: str, kind: str, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step in (2, 7):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    straight = module(**KINDS[kind])
    fit(straight, GradientClipping(RULES[name]), Save())
    for step in (2, 7):
        torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        resumed = module(**KINDS[kind])
        fit(resumed, GradientClipping(RULES[name]), ckpt_path=tmp_path / f"{step}.ckpt")
        assert equal(weights(resumed), weights(straight))


@each_rule
def test_a_checkpoints_state_does_not_move_with_the_run(name: str) -> None:
    """What an asynchronous writer still holds must not change under it."""
    kept: list[Any] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                state = clipping.state_dict()
                kept.extend([state, copy.deepcopy(state)])

    clipping = GradientClipping(RULES[name])
    fit(module(), clipping, Keep())
    assert plain(kept[0]) == plain(kept[1])


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


@each_rule_and_kind
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_beside_the_guard_bad_batches_leave_no_mark(name: str, kind: str, precision: str) -> None:
    """NaN at the start and in mid-run: nothing broken in weights, histories or what is left."""
    model = module(**KINDS[kind])
    model.poison = dict.fromkeys((0, 5, 6, 11), math.nan)
    clipping = GradientClipping(RULES[name])
    trainer = fit(model, StepGuard(), clipping, **cpu_precision(precision))
    assert [u for u, changed in enumerate(model.changed) if not changed] == [0, 5, 6, 11]
    assert all(finite(w) for w in weights(model))
    state = clipping.controller.state_dict()["rule"]
    assert finite({k: v for k, v in state.items() if "gamma" not in str(v)})
    assert no_trace(trainer)


@each_rule
def test_overflow_leaves_histories_alone(name: str) -> None:
    """Under a GradScaler without the guard: the rule sees what is not finite, and forgets it."""
    found: list[Any] = []

    class Around(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step in (7, 8):  # before and after the poisoned update
                found.append(plain(copy.deepcopy(clipping.controller.state_dict()["rule"])))

    model = module()
    model.poison = {7: math.nan}
    clipping = GradientClipping(RULES[name])
    fit(model, clipping, Around(), **cpu_precision("16-mixed"))
    before, after = found
    assert without_counts(after) == without_counts(before)
    assert finite(after)


def without_counts(state: Any) -> Any:
    """AdaGC counts updates of its warm-up on the host, which does not look at the device."""
    if isinstance(state, dict):
        return {k: without_counts(v) for k, v in state.items() if k != "updates"}
    return state


# ------------------------------------------------------------------------------ leaving no trace


def no_trace(trainer: L.Trainer) -> bool:
    return all(
        "grad_scale" not in vars(optimizer)
        and "found_inf" not in vars(optimizer)
        and not optimizer._optimizer_step_post_hooks
        for optimizer in trainer.optimizers
    )


class StopError(Exception):
    """Ends a fit between clipping and the step."""


@each_rule_and_kind
def test_an_error_between_clipping_and_the_step_leaves_nothing(name: str, kind: str) -> None:
    class Fails(Poisoned):
        armed = True

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            if self.armed and self.trainer.global_step == 4:
                raise StopError  # the callbacks have clipped, the optimizer has not stepped

    model = Fails({}, optimizer=torch.optim.AdamW, lr=0.02, **KINDS[kind])
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[GradientClipping(RULES[name])])
    with pytest.raises(StopError):
        trainer.fit(model, ResumableLoader(24, 2))
    assert no_trace(trainer)
    before = weights(model)
    optimizer = trainer.optimizers[0]
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()
    assert equal(weights(model), before)


@each_rule
def test_a_second_fit_of_the_same_trainer(name: str) -> None:
    model, twin = module(), module()
    first, second = (GradientClipping(RULES[name]) for _ in range(2))
    trainer = fit(model, first)
    assert no_trace(trainer)
    fit(twin, second)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, ResumableLoader(24, 2))
    assert no_trace(trainer)
    assert all(finite(w) for w in weights(model))
    assert not equal(weights(model), weights(twin))


# --------------------------------------------------------------------------- several optimizers


class TwoNets(L.LightningModule):
    """Two optimizers under manual optimization; the second's gradients are 1000 times larger."""

    def __init__(self, *, together: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.small, self.large = nn.Linear(4, 3), nn.Linear(4, 3)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=0.02) for net in (self.small, self.large)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, index = batch
        y = y / (index + 1).unsqueeze(1)
        nets = (self.small, 1.0), (self.large, 1000.0)
        for (net, factor), optimizer in zip(nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(x), y) * factor)
            optimizer.step()


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("agc", "groups", "groups-mixed")])
def test_two_optimizers_have_histories_of_their_own(name: str, tmp_path: Path) -> None:
    rule = RULES[name]

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "k.ckpt")

    straight = TwoNets()
    trainer = fit(straight, GradientClipping(rule), Save())
    assert no_trace(trainer)
    plain_loop = TwoNets()
    for net, factor in ((plain_loop.small, 1.0), (plain_loop.large, 1000.0)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        state = rule.initial_state()
        for update, (x, y, index) in enumerate(ResumableLoader(24, 2)):
            optimizer.zero_grad()
            (nn.functional.mse_loss(net(x), y / (index + 1).unsqueeze(1)) * factor).backward()
            clip_gradients_(net, rule, state=state, optimizer=optimizer, fraction=update / 12)
            optimizer.step()
    if name != "scheduled":  # the clock counts batches here, but steps of both optimizers there
        for mine, theirs in zip(weights(straight), weights(plain_loop), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    resumed = TwoNets()
    fit(resumed, GradientClipping(rule), ckpt_path=tmp_path / "k.ckpt")
    assert equal(weights(resumed), weights(straight))


def test_patterns_may_name_parameters_of_either_optimizer() -> None:
    rule = Groups({"small.*": NormClip(max_norm=0.1), "large.*": None})
    model = TwoNets()
    fit(model, GradientClipping(rule))
    with pytest.raises(ValueError, match=r"'smal\.\*'"):
        fit(TwoNets(), GradientClipping(Groups({"smal.*": None, "*": NormClip()})))


# ------------------------------------------------------------------------------ together


@each_rule
def test_under_a_batch_size_policy_the_rule_sees_the_windows_mean(name: str) -> None:
    """Windows of one, two and three micro-batches against the plain loop on the same windows."""
    rule = RULES[name]
    model = module()
    policy = BatchSizeSteps({"0%": 2, "2 steps": 4, "4 steps": 6})
    fit(model, GradientClipping(rule), BatchSizeScheduler(policy), size=36)
    plain_loop = module()
    optimizer = torch.optim.AdamW(plain_loop.parameters(), lr=0.02)
    state, batches = rule.initial_state(), list(ResumableLoader(36, 2))
    windows, at = [1, 1, 2, 2, 3, 3, 3, 3], 0
    for length in windows:
        for batch in batches[at : at + length]:
            (plain_loop.even_loss(batch) / length).backward()
        clip_gradients_(plain_loop, rule, state=state, optimizer=optimizer, fraction=at / 18)
        at += length
        optimizer.step()
        optimizer.zero_grad()
    assert at == 18
    for mine, theirs in zip(weights(model), weights(plain_loop), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_guard_and_adaptive_rules_share_one_read_of_the_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item, seen = Tensor.item, []
    totals: list[Tensor] = []

    def count(tensor: Tensor) -> Any:
        seen.append(tensor)
        return item(tensor)

    def as_on_a_device(*arguments: Any, **options: Any) -> GradientNorms:
        return replace(measure(*arguments, **options))  # tensors, and no numbers beside them

    class Listener(Controller):
        role, rank = "test", 99

        def observe(self, step: Any) -> None:
            totals.append(step.norms.total)

    class Attach(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
            Pipeline.of(trainer).add(Listener())

    monkeypatch.setattr(Tensor, "item", count)
    monkeypatch.setattr(pipeline_step, "measure", as_on_a_device)
    for guards, reads in (([], 12), ([StepGuard()], 0)):  # the guard reads with one tolist
        seen.clear()
        totals.clear()
        fit(module(), *guards, GradientClipping(ZClip(warmup=3)), Attach())
        assert len(totals) == 12
        assert sum(any(t is total for total in totals) for t in seen) == reads
