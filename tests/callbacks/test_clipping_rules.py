"""Every clipping rule in fits: equal to a plain loop, exact on resume, no state left behind."""

from __future__ import annotations

import copy
import math
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
from lightning_bigopt.engine import update as engine_update
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.gradients import GradientNorms, clip_gradients_, measure
from tests.bad_batches import KINDS, BadBatchModule, finite
from tests.gradients.helpers import as_device_norms
from tests.helpers import QUIET, ResumableLoader, cpu_precision

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
# These rules clip by one coefficient, which a fused kernel applies itself.
CLIPPED_IN_KERNEL = ("norm", "scheduled", "zclip", "adagc", "update")
each_rule_and_kind = pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "foreach") for name in RULES] + [(name, "fused") for name in CLIPPED_IN_KERNEL],
)


def module(**options: Any) -> BadBatchModule:
    return BadBatchModule({}, optimizer=torch.optim.AdamW, lr=0.02, **options)


def fit(model: L.LightningModule, *callbacks: Any, size: int = 24, **options: Any) -> L.Trainer:
    ckpt = options.pop("ckpt_path", None)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": list(callbacks), **options})
    trainer.fit(model, ResumableLoader(size, 2), ckpt_path=ckpt)
    return trainer


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def plain_loop_weights(
    rule: ClippingRule, kind: str, *, accumulate: int = 1, size: int = 24
) -> list[Tensor]:
    """Trains with the plain loop of the documentation: backward, clip_gradients_, step."""
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
def test_fit_equals_the_plain_loop(name: str, kind: str, accumulate: int) -> None:
    model = module(**KINDS[kind])
    untouched = module(**KINDS[kind])
    fit(model, GradientClipping(RULES[name]), accumulate_grad_batches=accumulate)
    fit(untouched, accumulate_grad_batches=accumulate)
    assert not equal(weights(model), weights(untouched)), "the rule must change the training"
    expected = plain_loop_weights(RULES[name], kind, accumulate=accumulate)
    for mine, theirs in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@each_rule_and_kind
def test_resume_gives_the_same_bits(name: str, kind: str, tmp_path: Path) -> None:
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
def test_saved_state_is_not_changed_by_later_updates(name: str) -> None:
    """An asynchronous checkpoint writer may still hold the state."""
    kept: list[Any] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                state = clipping.state_dict()
                kept.extend([state, copy.deepcopy(state)])

    clipping = GradientClipping(RULES[name])
    fit(module(), clipping, Keep())
    assert as_plain_data(kept[0]) == as_plain_data(kept[1])


def as_plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_plain_data(entry) for key, entry in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


@each_rule_and_kind
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_with_guard_bad_batches_change_no_weights_and_no_history(
    name: str, kind: str, precision: str
) -> None:
    """NaN at the start and later in the run: weights and histories stay finite."""
    model = module(**KINDS[kind])
    model.bad_factors = dict.fromkeys((0, 5, 6, 11), math.nan)
    clipping = GradientClipping(RULES[name])
    trainer = fit(model, StepGuard(), clipping, **cpu_precision(precision))
    assert [u for u, changed in enumerate(model.changed) if not changed] == [0, 5, 6, 11]
    assert all(finite(w) for w in weights(model))
    state = clipping.saved_state()["rule"]
    assert finite({k: v for k, v in state.items() if "gamma" not in str(v)})
    assert optimizers_are_clean(trainer)


@each_rule
def test_overflow_does_not_change_histories(name: str) -> None:
    """Under a GradScaler without the guard, the rule gets non-finite norms and ignores them."""
    found: list[Any] = []

    class RecordsState(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step in (7, 8):  # before and after the bad update
                found.append(as_plain_data(copy.deepcopy(clipping.saved_state()["rule"])))

    model = module()
    model.bad_factors = {7: math.nan}
    clipping = GradientClipping(RULES[name])
    fit(model, clipping, RecordsState(), **cpu_precision("16-mixed"))
    before, after = found
    assert without_counts(after) == without_counts(before)
    assert finite(after)


def without_counts(state: Any) -> Any:
    """Removes AdaGC's count of warm-up updates, which includes skipped ones."""
    if isinstance(state, dict):
        return {k: without_counts(v) for k, v in state.items() if k != "updates"}
    return state


# ---------------------------------------------------------------------------------- cleaning up


def optimizers_are_clean(trainer: L.Trainer) -> bool:
    return all(
        "grad_scale" not in vars(optimizer)
        and "found_inf" not in vars(optimizer)
        and not optimizer._optimizer_step_post_hooks
        for optimizer in trainer.optimizers
    )


class StopError(Exception):
    """Ends a fit between clipping and the step."""


@each_rule_and_kind
def test_error_between_clipping_and_step_leaves_no_skip_or_scale(name: str, kind: str) -> None:
    class RaisesBeforeStep(BadBatchModule):
        armed = True

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            if self.armed and self.trainer.global_step == 4:
                raise StopError  # after clipping, before the optimizer's step

    model = RaisesBeforeStep({}, optimizer=torch.optim.AdamW, lr=0.02, **KINDS[kind])
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[GradientClipping(RULES[name])])
    with pytest.raises(StopError):
        trainer.fit(model, ResumableLoader(24, 2))
    assert optimizers_are_clean(trainer)
    before = weights(model)
    optimizer = trainer.optimizers[0]
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()
    assert equal(weights(model), before)


@each_rule
def test_second_fit_of_the_same_trainer(name: str) -> None:
    model, once = module(), module()
    first, second = (GradientClipping(RULES[name]) for _ in range(2))
    trainer = fit(model, first)
    assert optimizers_are_clean(trainer)
    fit(once, second)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, ResumableLoader(24, 2))
    assert optimizers_are_clean(trainer)
    assert all(finite(w) for w in weights(model))
    assert not equal(weights(model), weights(once))


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
def test_two_optimizers_have_separate_histories(name: str, tmp_path: Path) -> None:
    rule = RULES[name]

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "k.ckpt")

    straight = TwoNets()
    trainer = fit(straight, GradientClipping(rule), Save())
    assert optimizers_are_clean(trainer)
    plain_loop = TwoNets()
    for net, factor in ((plain_loop.small, 1.0), (plain_loop.large, 1000.0)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        state = rule.initial_state()
        for update, (x, y, index) in enumerate(ResumableLoader(24, 2)):
            optimizer.zero_grad()
            (nn.functional.mse_loss(net(x), y / (index + 1).unsqueeze(1)) * factor).backward()
            clip_gradients_(net, rule, state=state, optimizer=optimizer, fraction=update / 12)
            optimizer.step()
    if name != "scheduled":  # one clock counts batches, the other one steps of both optimizers
        for mine, theirs in zip(weights(straight), weights(plain_loop), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    resumed = TwoNets()
    fit(resumed, GradientClipping(rule), ckpt_path=tmp_path / "k.ckpt")
    assert equal(weights(resumed), weights(straight))


def test_patterns_may_match_parameters_of_either_optimizer() -> None:
    rule = Groups({"small.*": NormClip(max_norm=0.1), "large.*": None})
    model = TwoNets()
    fit(model, GradientClipping(rule))
    with pytest.raises(ValueError, match=r"'smal\.\*'"):
        fit(TwoNets(), GradientClipping(Groups({"smal.*": None, "*": NormClip()})))


# --------------------------------------------------------------------- with other callbacks


@each_rule
def test_with_a_batch_size_policy_the_rule_clips_the_mean_of_the_window(name: str) -> None:
    """Compares windows of one, two and three micro-batches with a plain loop."""
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


def test_guard_and_adaptive_rule_read_the_norm_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item, seen = Tensor.item, []
    totals: list[Tensor] = []

    def count(tensor: Tensor) -> Any:
        seen.append(tensor)
        return item(tensor)

    def measure_on_device(*arguments: Any, **options: Any) -> GradientNorms:
        return as_device_norms(measure(*arguments, **options))

    class RecordsTotals(Capability):
        owns, rank = "test", 99

        def observe(self, update: Any) -> None:
            totals.append(update.norms.total)

    monkeypatch.setattr(Tensor, "item", count)
    monkeypatch.setattr(engine_update, "measure", measure_on_device)
    for guards, reads in (([], 12), ([StepGuard()], 0)):  # the guard reads with one tolist
        seen.clear()
        totals.clear()
        fit(module(), *guards, GradientClipping(ZClip(warmup=3)), RecordsTotals())
        assert len(totals) == 12
        assert sum(any(t is total for total in totals) for t in seen) == reads
