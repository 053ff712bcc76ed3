"""StepGuard in fits: rejected updates change nothing, actions, state and conflicts."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import schedulefree
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_bigopt import (
    Backoff,
    ClipToMedian,
    Constant,
    GradientClipping,
    LearningRateScheduler,
    LossSpike,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    Skip,
    StepGuard,
    ZClip,
)
from lightning_bigopt.reporting.report import render_report
from lightning_bigopt.reporting.runs import read_run
from tests.bad_batches import KINDS, BadBatchModule, finite, fit
from tests.helpers import Probe, ResumableLoader, SaveAt, cpu_precision


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_spike_changes_no_parameter_or_state(precision: str, kind: str, accumulate: int) -> None:
    module = BadBatchModule(
        {6: 100.0}, optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.5, **KINDS[kind]
    )
    guard = StepGuard([NonFinite(), NormSpike(armed=4, threshold=3.0)])
    fit(
        module,
        guard,
        GradientClipping(NormClip(max_norm=0.5)),
        size=20 * accumulate,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
    )
    assert module.changed == [update != 6 for update in range(10)]
    assert [(r.update, r.detector) for r in guard.rejections] == [(6, "NormSpike")]
    assert guard.rejections[0].batches == tuple(range(6 * accumulate, 7 * accumulate))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nan_and_infinity_change_no_parameter_or_state(precision: str, kind: str) -> None:
    bad_factors = {0: math.nan, 3: math.inf, 4: -math.inf}
    module = BadBatchModule(
        bad_factors, optimizer=torch.optim.AdamW, weight_decay=0.5, **KINDS[kind]
    )
    guard = StepGuard()
    fit(module, guard, GradientClipping(ZClip(warmup=2)), size=16, **cpu_precision(precision))
    assert module.changed == [update not in bad_factors for update in range(8)]
    assert [r.update for r in guard.rejections] == [0, 3, 4]
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["sgd", "schedulefree", "schedulefree-foreach"])
def test_skip_changes_nothing_with_other_optimizers(kind: str) -> None:
    optimizer, options = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        "schedulefree": (schedulefree.AdamWScheduleFree, {"foreach": False, "warmup_steps": 4}),
        "schedulefree-foreach": (schedulefree.AdamWScheduleFree, {"weight_decay": 0.1}),
    }[kind]
    module = BadBatchModule({2: math.nan, 3: math.nan}, optimizer=optimizer, lr=0.01, **options)
    fit(module, StepGuard(), size=12)
    assert module.changed == [True, True, False, False, True, True]


def test_skipped_update_equals_a_loop_without_its_batch() -> None:
    """Compares with a plain loop that does not step for these batches."""
    ours = BadBatchModule({3: math.nan, 5: math.inf}, optimizer=torch.optim.AdamW, lr=0.02)
    fit(ours, StepGuard(), size=20)
    plain = Probe()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for index, (x, y, rows) in enumerate(ResumableLoader(20, 2)):
        if index not in (3, 5):
            optimizer.zero_grad()
            plain.loss(x, y / (rows + 1).unsqueeze(1)).backward()
            optimizer.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_monitor_logs_rejections_of_each_detector_with_their_reasons(tmp_path: Path) -> None:
    module = BadBatchModule({2: math.nan, 6: 100.0, 8: math.inf}, lr=0.01)
    guard = StepGuard(
        [NonFinite(), NormSpike(armed=4, threshold=3.0)], actions=[ClipToMedian(), Skip()]
    )
    logger = TensorBoardLogger(tmp_path)
    fit(module, guard, OptimizationMonitor(every=1), size=20, logger=logger)
    run = read_run(logger.log_dir)
    expected = {
        "guard/skipped": [0, 0, 1, 1, 1, 1, 1, 1, 2, 2],
        "guard/rejected/NonFinite": [0, 0, 1, 1, 1, 1, 1, 1, 2, 2],
        "guard/rejected/NormSpike": [
            0,
            0,
            0,
            0,
            0,
            0,
            1,
            1,
            1,
            1,
        ],  # applied with a smaller gradient
    }
    for tag, counts in expected.items():
        assert run.curves[tag] == list(enumerate(counts)), tag
    assert [why.split(":")[0] for why in run.refusals] == [
        f"Update {update} (epoch 0, batch {update}) rejected" for update in (2, 6, 8)
    ]
    events = EventAccumulator(logger.log_dir).Reload()
    places = [event.step for event in events.Tensors("guard/rejected/text_summary")]
    assert places == [2, 6, 8]
    assert "step guard | `NonFinite(), NormSpike(" in run.texts["plan"]
    page = render_report([run])
    assert "<li>Update 2 (epoch 0, batch 2) rejected: the gradient norm is nan" in page


# ------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [NormClip(max_norm=0.5), ZClip(warmup=2)])
def test_overflow_under_a_grad_scaler_is_not_counted_as_a_rejection(kind: str, rule: Any) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = BadBatchModule({}, optimizer=torch.optim.AdamW, **KINDS[kind])
    guard, clipping = StepGuard(max_consecutive=2), GradientClipping(rule)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(module, guard, clipping, size=100, plugins=[plugin])
    overflows = module.changed.count(False)
    assert overflows > 2
    assert scaler.get_scale() == 2.0 ** (40 - overflows)
    assert guard.rejections == ()
    state = guard.saved_state()["guarded"][""]
    assert state["rejected"] == state["consecutive"] == 0
    assert len(state["detectors"]["NormSpike"]["accepted"]) == 50 - overflows
    assert finite(state)
    assert finite(clipping.saved_state()["rule"])


def test_nan_under_a_grad_scaler_is_skipped_by_the_scaler() -> None:
    module = BadBatchModule({4: math.nan}, optimizer=torch.optim.AdamW)
    guard = StepGuard()
    fit(module, guard, size=16, **cpu_precision("16-mixed"))
    assert module.changed == [update != 4 for update in range(8)]
    assert guard.rejections == ()


# ------------------------------------------------------------------- without the guard


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_without_guard_skips_nan_only_in_a_fused_kernel(kind: str) -> None:
    module = BadBatchModule({2: math.nan}, optimizer=torch.optim.AdamW, **KINDS[kind])
    fit(module, GradientClipping(NormClip(max_norm=0.5)), size=8)
    healthy = all(bool(p.isfinite().all()) for p in module.parameters())
    assert healthy == (kind == "fused")


# ------------------------------------------------------------------------------- detectors


class AddsToLoss(BadBatchModule):
    """Adds a constant, which has no gradient, to the loss of a batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.even_loss(batch) * 1e-3 + self.bad_factors.get(batch_idx, 1.0)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_loss_spike_uses_the_mean_loss_of_the_window(accumulate: int, precision: str) -> None:
    """One micro-batch of a window is large: enough for a rejection, or not enough."""
    spikes = {6 * accumulate: 1.0 + 0.4 * accumulate, 8 * accumulate: 1.0 + 0.2 * accumulate}
    module = AddsToLoss(spikes, lr=0.0)
    guard = StepGuard([LossSpike(armed=4, floor=0.05)])
    fit(
        module,
        guard,
        size=20 * accumulate,
        accumulate_grad_batches=accumulate,
        **cpu_precision(precision),
    )
    assert [r.update for r in guard.rejections] == [6]
    assert guard.rejections[0].loss == pytest.approx(1.4, abs=0.1)
    accepted = guard.saved_state()["guarded"][""]["detectors"]["LossSpike"]["accepted"]
    assert len(accepted) == 9
    assert accepted[7] == pytest.approx(1.2, abs=0.1)


def test_loss_spike_uses_the_mean_loss_of_a_partial_window() -> None:
    module = AddsToLoss({7: 1.9}, lr=0.0)
    guard = StepGuard([LossSpike(armed=2, floor=0.01)])
    fit(module, guard, size=16, accumulate_grad_batches=3)  # windows of 3, 3 and 2 micro-batches
    assert [r.update for r in guard.rejections] == [2]
    assert guard.rejections[0].loss == pytest.approx(1.45, abs=0.1)


def test_larger_norms_are_accepted_after_five_rejections() -> None:
    module = BadBatchModule(dict.fromkeys(range(10, 40), 1e3), lr=0.0)
    guard = StepGuard([NonFinite(), NormSpike(armed=5)])
    fit(module, guard, size=48)
    assert [r.update for r in guard.rejections] == [10, 11, 12, 13, 14]


# --------------------------------------------------------------------------------- actions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, NormClip(max_norm=1e3), ZClip(warmup=3, max_norm=None)])
def test_clip_to_median_scales_the_gradient_to_the_median_norm(kind: str, clip: Any) -> None:
    class RecordsScaledNorm(BadBatchModule):
        """Records the norm that the optimizer uses, with the scale of the fused kernel."""

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            self.norms[-1] /= float(getattr(optimizer, "grad_scale", None) or 1.0)

    module = RecordsScaledNorm({6: 1e4}, optimizer=torch.optim.AdamW, lr=0.0, **KINDS[kind])
    guard = StepGuard(
        [NonFinite(), NormSpike(armed=4, threshold=3.0)], actions=[ClipToMedian(), Skip()]
    )
    fit(module, guard, *([GradientClipping(clip)] if clip else []), size=20)
    middle = sorted(module.norms[:6])
    assert [r.update for r in guard.rejections] == [6]
    assert module.norms[6] == pytest.approx((middle[2] * middle[3]) ** 0.5, rel=0.02)
    states = guard.saved_state()["guarded"][""]["detectors"]
    assert len(states["NormSpike"]["accepted"]) == 9


def test_clip_to_median_skips_non_finite_gradients() -> None:
    module = BadBatchModule({3: math.nan}, optimizer=torch.optim.AdamW)
    fit(module, StepGuard(actions=[ClipToMedian()]), size=12)
    assert module.changed == [update != 3 for update in range(6)]


def test_backoff_lowers_the_learning_rate_and_restores_it() -> None:
    module = BadBatchModule({2: math.nan}, lr=0.1)
    fit(
        module,
        StepGuard(actions=[Skip(), Backoff(factor=0.5, recover=4)]),
        LearningRateScheduler(Constant()),
        size=20,
    )
    # The rejected update keeps its learning rate; the next one gets the lower one.
    assert module.lrs == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.0625, 0.075, 0.0875, 0.1, 0.1, 0.1])


def test_backoff_without_a_scheduler_raises() -> None:
    with pytest.raises(ValueError, match=r"LearningRateScheduler with Backoff.*Constant"):
        fit(Probe(), StepGuard(actions=[Backoff()]))


def test_accepted_update_resets_the_count_of_consecutive_rejections() -> None:
    module = BadBatchModule({u: math.nan for u in range(16) if u % 3})
    guard = StepGuard(max_consecutive=3)
    fit(module, guard)
    assert len(guard.rejections) == 10


# ------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("stop", [5, 7, 8, 12])
def test_resume_rejects_the_same_updates(stop: int, tmp_path: Path) -> None:
    bad_factors = {3: math.nan, 7: 1e4, 8: 1e4, 9: math.inf, 13: 1e4, 14: 3.0}

    def parts() -> tuple[BadBatchModule, StepGuard, list[Any]]:
        guard = StepGuard(
            [NonFinite(), NormSpike(armed=3), LossSpike(armed=3, floor=50.0)],
            actions=[Backoff(factor=0.5, recover=5)],
        )
        rest = [
            LearningRateScheduler(Constant()),
            GradientClipping(ZClip(warmup=2)),
            SaveAt(tmp_path / "k.ckpt", stop),
        ]
        return (
            BadBatchModule(bad_factors, optimizer=torch.optim.AdamW, lr=0.01),
            guard,
            [guard, *rest],
        )

    straight, first, callbacks = parts()
    fit(straight, *callbacks)
    assert {7, 8, 9, 13} <= {r.update for r in first.rejections}
    resumed, second, callbacks = parts()
    saved = torch.load(tmp_path / "k.ckpt", weights_only=True)
    mine = next(v for k, v in saved["callbacks"].items() if k.startswith("StepGuard"))
    assert finite(mine["guarded"])
    fit(resumed, *callbacks, ckpt_path=tmp_path / "k.ckpt")
    assert [r.update for r in second.rejections] == [
        r.update for r in first.rejections if r.update >= stop
    ]
    assert resumed.lrs == straight.lrs[stop:]
    states = [g.saved_state() for g in (first, second)]
    for state in states:
        del state["guarded"][""]["checkpoint"]  # only the resumed run has one
    assert states[0] == states[1]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_detector_added_at_a_resume_starts_empty(tmp_path: Path) -> None:
    before = StepGuard([NonFinite(), NormSpike(armed=3)])
    fit(BadBatchModule({}), before, SaveAt(tmp_path / "a.ckpt", 4), size=16)
    guard = StepGuard([LossSpike(armed=3), NormSpike(armed=3)])
    fit(BadBatchModule({}), guard, size=16, ckpt_path=tmp_path / "a.ckpt")
    states = guard.saved_state()["guarded"][""]["detectors"]
    assert len(states["NormSpike"]["accepted"]) == 8
    assert len(states["LossSpike"]["accepted"]) == 4


def test_second_fit_keeps_the_state_and_a_new_trainer_resets_it() -> None:
    guard = StepGuard()
    module = BadBatchModule({2: math.nan}, optimizer=torch.optim.AdamW, fused=True)
    trainer = fit(module, guard, size=8)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, ResumableLoader(8, 2))
    state = guard.saved_state()["guarded"][""]
    assert len(state["detectors"]["NormSpike"]["accepted"]) == 7
    fit(BadBatchModule({}), guard, size=8)
    assert guard.rejections == ()
    assert len(guard.saved_state()["guarded"][""]["detectors"]["NormSpike"]["accepted"]) == 4


def test_copies_and_pickles_in_mid_fit() -> None:
    class Copies(BadBatchModule):
        def on_train_batch_end(self, *args: Any) -> None:
            self.copies = [copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))]

    guard = StepGuard()
    module = Copies({1: math.nan})
    fit(module, guard, size=8)
    for copied in module.copies:
        assert [r.update for r in copied.rejections] == [1]


# -------------------------------------------------------------------------- several optimizers


def test_each_optimizer_is_guarded_separately_under_manual_optimization() -> None:
    class Manual(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
            self.weights: list[list[Tensor]] = [[], []]

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(net.parameters(), lr=0.01) for net in self.nets]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for which, (net, optimizer) in enumerate(
                zip(self.nets, self.optimizers(), strict=True)
            ):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(batch[0]), batch[1]) * 10.0 ** (3 * which)
                if (which, batch_idx) in {(0, 4), (1, 6)}:
                    loss = loss * 1e4
                self.manual_backward(loss)
                optimizer.step()
                self.weights[which].append(net.weight.detach().clone())

    module = Manual()
    # The norms of these few updates differ by factors of six: only the spread limits them.
    spike = NormSpike(armed=3, margin=math.inf)
    guard = StepGuard([NonFinite(), spike, LossSpike(armed=3, floor=1e5)])
    fit(module, guard, size=20)
    unchanged = [
        [i for i, (a, b) in enumerate(itertools.pairwise(weights), 1) if torch.equal(a, b)]
        for weights in module.weights
    ]
    assert unchanged == [[4], [6]]
    assert [r.optimizer for r in guard.rejections] == ["AdamW-0", "AdamW-1"]
    assert all(r.loss > 1e5 or r.optimizer == "AdamW-0" for r in guard.rejections)


# ------------------------------------------------------------------------------- conflicts


def test_optimizer_of_opacus_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Private(torch.optim.SGD): ...

    class Inherited(Private): ...

    # Undone by monkeypatch: the command line imports the subclasses of Optimizer by module.
    monkeypatch.setattr(Private, "__module__", "opacus.optimizers.optimizer")
    for kind in (Private, Inherited):
        with pytest.raises(ValueError, match=r"Opacus.*StepGuard.*privacy"):
            fit(Probe(optimizer=kind), StepGuard())
        with pytest.raises(ValueError, match=r"Opacus.*GradientClipping.*max_grad_norm"):
            fit(Probe(optimizer=kind), GradientClipping(NormClip()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detectors": []}, r"detectors(\[0\])? must be"),
        ({"detectors": [Skip()]}, r"detectors(\[0\])? must be"),
        ({"actions": [NonFinite()]}, r"actions(\[0\])? must be"),
        ({"max_consecutive": 0}, r"max_consecutive must be .*got 0"),
        ({"max_consecutive": True}, r"max_consecutive must be .*got True"),
    ],
)
def test_invalid_arguments_raise_with_their_names(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepGuard(**arguments)


YAML = """
callback:
  class_path: lightning_bigopt.StepGuard
  init_args:
    detectors:
      - class_path: lightning_bigopt.NonFinite
      - class_path: lightning_bigopt.NormSpike
        init_args: {window: 64, armed: 16}
    actions:
      - class_path: lightning_bigopt.ClipToMedian
      - class_path: lightning_bigopt.Backoff
        init_args: {factor: 0.25, recover: 50}
    max_consecutive: 4
    forensics: rejected
"""


def test_yaml_config_and_its_saved_copy_build_the_same_guard() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.Callback, "callback")
    for text in (YAML, parser.dump(parser.parse_string(YAML))):
        build = (
            getattr(parser, "instantiate", None) or parser.instantiate_classes
        )  # the name in older jsonargparse
        guard = build(parser.parse_string(text))["callback"]
        assert guard.detectors == (NonFinite(), NormSpike(64, armed=16))
        assert guard.actions == (ClipToMedian(), Backoff(factor=0.25, recover=50))
        assert repr(guard) == "StepGuard([NonFinite(), NormSpike(...)])"
