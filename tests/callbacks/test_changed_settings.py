"""A resume with another clipping rule, guard or batch-size policy: what is kept, what is logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bigopt import (
    Abort,
    AdaGC,
    AutoClip,
    Backoff,
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GradientClipping,
    Groups,
    LearningRateScheduler,
    LossSpike,
    NonFinite,
    NormClip,
    NormSpike,
    StepGuard,
    ZClip,
)
from lightning_bigopt.checks import as_code
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Batch
from lightning_bigopt.gradients import ClipDecision, ClippingRule, Detector
from tests.bad_batches import BadBatchModule
from tests.bad_batches import fit as fit_bad_batches
from tests.callbacks.resume_helpers import fit, resume_report
from tests.helpers import Probe, SaveAt

AT, UPDATES = 9, 20


def interrupted(path: Path, *callbacks: Any) -> Path:
    """Fits 20 updates; returns the checkpoint after 9 of them."""
    fit(Probe(), None, *callbacks, SaveAt(path / "at.ckpt", AT))
    return path / "at.ckpt"


def without(ckpt: Path, key: str, *, name: str | None = None) -> Path:
    """Writes the checkpoint without the state of a callback, or without an entry of the state."""
    state = torch.load(ckpt, weights_only=True)
    if name is None:
        del state["callbacks"][key]
    else:
        del state["callbacks"][key][name]
    target = ckpt.with_name("without.ckpt")
    torch.save(state, target)
    return target


def bits(module: nn.Module) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in module.parameters()]


def plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


# ------------------------------------------------------------------------------------- clipping

CHANGES = [
    (AutoClip(percentile=10), AutoClip(percentile=60)),
    (AutoClip(percentile=10), ZClip(warmup=3)),
    (ZClip(warmup=3), AdaGC(warmup=3)),
    (NormClip(max_norm=1e-3), NormClip(max_norm=5.0)),
    (Groups({"net.0.*": AutoClip(), "*": None}), Groups({"net.2.*": AutoClip(), "*": None})),
    (AutoClip(), Groups({"*": AutoClip()})),
]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=[f"{b} to {a}" for b, a in CHANGES])
def test_another_rule_starts_without_the_state_of_the_first(
    before: ClippingRule, after: ClippingRule, tmp_path: Path, info_log: Any
) -> None:
    """As with a checkpoint that contains no state of GradientClipping."""
    ckpt = interrupted(tmp_path, GradientClipping(before))
    resumed, reference = Probe(), Probe()
    clipping, fresh = GradientClipping(after), GradientClipping(after)
    fit(resumed, None, clipping, ckpt=ckpt)
    assert f"gradient clipping: {before} → {after}" in resume_report(info_log)
    fit(reference, None, fresh, ckpt=without(ckpt, "GradientClipping"))
    assert bits(resumed) == bits(reference)
    assert plain(clipping.saved_state()) == plain(fresh.saved_state())
    assert clipping.reports() == fresh.reports()
    for report in clipping.reports().values():
        assert report.updates == UPDATES - AT


@pytest.mark.parametrize(
    "rule",
    [
        AutoClip(percentile=40),
        ZClip(warmup=3),
        NormClip(2.0),
        Groups({"net.0.*": ZClip(warmup=3), "*": NormClip(2.0)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_settings", [True, False])
def test_unchanged_rule_keeps_its_history_and_reports_nothing(
    rule: ClippingRule, has_settings: bool, tmp_path: Path, info_log: Any
) -> None:
    straight, whole = Probe(), GradientClipping(rule)
    fit(straight, None, whole, SaveAt(tmp_path / "at.ckpt", AT))
    ckpt = tmp_path / "at.ckpt"
    if not has_settings:  # as an earlier version saved it
        ckpt = without(ckpt, "GradientClipping", name="settings")
    resumed, clipping = Probe(), GradientClipping(rule)
    fit(resumed, None, clipping, ckpt=ckpt)
    assert bits(resumed) == bits(straight)
    assert clipping.saved_state() == whole.saved_state()
    assert not resume_report(info_log)


OTHER_STATES = [
    (NormClip(1.0), AutoClip(percentile=40)),
    (ZClip(warmup=3), AutoClip(percentile=40)),
    (ZClip(warmup=3), AdaGC(warmup=3)),
    (AutoClip(percentile=40), ZClip(warmup=3)),
    (ZClip(warmup=3), NormClip(1.0)),
    (AutoClip(), Groups({"*": AutoClip()})),
    (Groups({"net.0.*": AutoClip(), "*": None}), Groups({"net.2.*": AutoClip(), "*": None})),
    (Groups({"*": NormClip(1.0)}), Groups({"*": AutoClip()})),
]


@pytest.mark.parametrize(
    ("before", "after"), OTHER_STATES, ids=[f"{b} to {a}" for b, a in OTHER_STATES]
)
def test_rule_with_another_state_starts_anew_from_a_checkpoint_of_an_earlier_version(
    before: ClippingRule, after: ClippingRule, tmp_path: Path, info_log: Any
) -> None:
    """Such a checkpoint does not name its rule: the keys of the state tell them apart."""
    ckpt = interrupted(tmp_path, GradientClipping(before))
    old = without(ckpt, "GradientClipping", name="settings")
    resumed, reference = Probe(), Probe()
    clipping, fresh = GradientClipping(after), GradientClipping(after)
    fit(resumed, None, clipping, ckpt=old)
    assert f"gradient clipping: another rule, whose history is not used → {after}" in resume_report(
        info_log
    )
    fit(reference, None, fresh, ckpt=without(ckpt, "GradientClipping"))
    assert bits(resumed) == bits(reference)
    assert plain(clipping.saved_state()) == plain(fresh.saved_state())
    assert [report.updates for report in clipping.reports().values()] == [UPDATES - AT]


def test_second_resume_keeps_the_history_of_the_new_rule(tmp_path: Path, info_log: Any) -> None:
    first = interrupted(tmp_path, GradientClipping(NormClip(1.0)))
    straight, whole = Probe(), GradientClipping(AutoClip(percentile=40))
    fit(straight, None, whole, SaveAt(tmp_path / "second.ckpt", 15), ckpt=first)
    info_log.clear()
    resumed, clipping = Probe(), GradientClipping(AutoClip(percentile=40))
    fit(resumed, None, clipping, ckpt=tmp_path / "second.ckpt")
    assert not resume_report(info_log)
    assert bits(resumed) == bits(straight)
    assert clipping.saved_state() == whole.saved_state()


def test_rollback_after_a_change_keeps_the_history_of_the_new_rule(tmp_path: Path) -> None:
    class TakesAndRestores(Capability):
        owns, rank = "a rollback", 90
        states: list[Any]

        def end_batch(self, batch: Batch) -> None:
            step = batch.fit.trainer.global_step
            if step == 13:
                self.taken = batch.fit.take_snapshot()
                self.states = [clipping.saved_state()]
            elif step == 16:
                self.taken.restore(rewind=False)
                self.states.append(clipping.saved_state())

    ckpt = interrupted(tmp_path, GradientClipping(NormClip(1.0)))
    clipping, rollback = GradientClipping(AutoClip()), TakesAndRestores()
    fit(Probe(), None, clipping, rollback, ckpt=ckpt)
    before, after = rollback.states
    assert before == after
    assert len(before["rule"][""]["norms"]) == 13 - AT


def test_change_is_logged_once(tmp_path: Path, info_log: Any) -> None:
    ckpt = interrupted(tmp_path, GradientClipping(NormClip(1.0)))
    trainer = fit(Probe(), None, GradientClipping(NormClip(2.0)), ckpt=ckpt)
    assert resume_report(info_log).count("gradient clipping") == 1
    trainer.fit_loop.epoch_loop.max_steps = 30
    trainer.fit(Probe(), trainer.train_dataloader)
    assert resume_report(info_log).count("gradient clipping") == 1


class OwnRule(ClippingRule):
    """A rule without a repr of its own, whose repr contains an address."""

    norm_order = None

    def initial_state(self) -> dict[str, Any]:
        return {"updates": 0}

    def decide(self, context: Any, state: dict[str, Any]) -> ClipDecision:
        state["updates"] += 1
        return NormClip(1.0).decide(context, {})


def test_address_in_a_repr_is_no_change(tmp_path: Path, info_log: Any) -> None:
    first, second = OwnRule(), OwnRule()
    assert repr(first) != repr(second)
    ckpt = interrupted(tmp_path, GradientClipping(first))
    clipping = GradientClipping(second)
    fit(Probe(), None, clipping, ckpt=ckpt)
    assert not resume_report(info_log)
    assert clipping.saved_state()["rule"] == {"": {"updates": UPDATES}}


def test_own_schedule_without_a_repr_is_no_change(tmp_path: Path, info_log: Any) -> None:
    class Own(Constant):
        __repr__ = object.__repr__

    fit(Probe(), LearningRateScheduler(Own()), SaveAt(tmp_path / "at.ckpt", AT))
    fit(Probe(), LearningRateScheduler(Own()), ckpt=tmp_path / "at.ckpt")
    assert not resume_report(info_log)


def test_code_has_no_addresses() -> None:
    own = OwnRule()
    assert hex(id(own)) in repr([own, 1])
    assert as_code([own, 1]) == f"[<{OwnRule.__module__}.OwnRule object>, 1]"


# ---------------------------------------------------------------------------------------- guard


def guard_state(guard: StepGuard) -> dict[str, Any]:
    record: dict[str, Any] = guard.saved_state()["guarded"][""]
    return record


def test_changed_detectors_and_actions_are_reported(tmp_path: Path, info_log: Any) -> None:
    ckpt = interrupted(tmp_path, StepGuard([NonFinite()]))
    fit(Probe(), None, StepGuard([NonFinite(), LossSpike()], actions=[Abort(3)]), ckpt=ckpt)
    report = resume_report(info_log)
    assert f"step guard detectors: NonFinite() → NonFinite(), {LossSpike()}" in report
    assert "step guard actions: Skip() → Abort(after=3)" in report


@pytest.mark.parametrize("has_settings", [True, False])
def test_unchanged_guard_resumes_exactly(has_settings: bool, tmp_path: Path, info_log: Any) -> None:
    bad = {6: 1e4, 13: 1e4}
    detectors = [NonFinite(), NormSpike(16, armed=4), NormSpike(8, armed=4, threshold=3.0)]
    straight, whole = BadBatchModule(bad), StepGuard(detectors)
    fit_bad_batches(straight, whole, SaveAt(tmp_path / "at.ckpt", AT))
    ckpt = tmp_path / "at.ckpt"
    if not has_settings:
        ckpt = without(ckpt, "StepGuard", name="settings")
    resumed, guard = BadBatchModule(bad), StepGuard(detectors)
    fit_bad_batches(resumed, guard, ckpt_path=ckpt)
    assert guard.rejected == whole.rejected >= 2
    assert guard_state(guard) | {"checkpoint": None} == guard_state(whole) | {"checkpoint": None}
    assert bits(resumed) == bits(straight)
    assert not resume_report(info_log)


def test_history_follows_its_detector_to_another_position(tmp_path: Path) -> None:
    long, short = NormSpike(16, armed=4), NormSpike(4, armed=4)
    ckpt = interrupted(tmp_path, StepGuard([long, short]))
    saved = torch.load(ckpt, weights_only=True)["callbacks"]["StepGuard"]["guarded"][""]
    guard = StepGuard([short, long])
    fit(Probe(), None, guard, ckpt=ckpt, max_steps=AT + 1)
    histories = guard_state(guard)["detectors"]
    assert (
        histories["NormSpike"]["accepted"][:-1] == saved["detectors"]["NormSpike-1"]["accepted"][1:]
    )
    assert histories["NormSpike-1"]["accepted"][:-1] == saved["detectors"]["NormSpike"]["accepted"]


def test_changed_spike_detector_keeps_measured_norms_but_no_rejections(tmp_path: Path) -> None:
    bad = {AT - 1: 1e4}
    first = StepGuard([NonFinite(), NormSpike(16, armed=4)])
    fit_bad_batches(BadBatchModule(bad), first, SaveAt(tmp_path / "at.ckpt", AT))
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)["callbacks"]["StepGuard"]
    before = saved["guarded"][""]
    assert (before["detected"], len(before["detectors"]["NormSpike"]["rejected"])) == (
        {"NormSpike": 1},
        1,
    )
    guard = StepGuard([NonFinite(), NormSpike(4, armed=4)])
    guard.load_saved_state(saved)
    after = guard_state(guard)
    assert after["detectors"]["NormSpike"] == {
        "accepted": before["detectors"]["NormSpike"]["accepted"][-4:],
        "rejected": [],
    }
    assert after["detected"] == {}
    assert (guard.rejected, after["consecutive"]) == (1, 1)  # of the run


class Own(Detector):
    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __repr__(self) -> str:
        return f"Own({self.limit})"

    def initial_state(self) -> dict[str, Any]:
        return {"seen": 0}

    def check(self, value: float, state: dict[str, Any]) -> None:
        return None

    def accept(self, value: float, state: dict[str, Any]) -> None:
        state["seen"] += 1

    def reject(self, value: float, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(("limit", "seen"), [(1.0, UPDATES), (2.0, UPDATES - AT)])
def test_own_detector_with_other_arguments_starts_again(
    limit: float, seen: int, tmp_path: Path
) -> None:
    ckpt = interrupted(tmp_path, StepGuard([Own(1.0)]))
    guard = StepGuard([Own(limit)])
    fit(Probe(), None, guard, ckpt=ckpt)
    assert guard_state(guard)["detectors"] == {"Own": {"seen": seen}}


@pytest.mark.parametrize(("factor", "level"), [(0.5, 0.5), (0.1, 1.0)])
def test_level_of_another_backoff_is_not_restored(
    factor: float, level: float, tmp_path: Path
) -> None:
    first = StepGuard([NonFinite()], actions=[Backoff(factor=0.5, recover=100)])
    scheduler = LearningRateScheduler(Constant())
    bad = {AT - 1: math.nan}
    fit_bad_batches(BadBatchModule(bad), scheduler, first, SaveAt(tmp_path / "at.ckpt", AT))
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["callbacks"]["StepGuard"]
    guard = StepGuard([NonFinite()], actions=[Backoff(factor=factor, recover=100)])
    guard.load_saved_state(state)
    assert guard.saved_state()["backoffs"] == [{"level": level}]


# ----------------------------------------------------------------------------------- batch size


def tokens(batch: Any) -> int:
    return 1


def test_changed_policy_and_scaling_are_reported(tmp_path: Path, info_log: Any) -> None:
    before, after = BatchSizeSteps({"0%": 2, "50%": 4}), BatchSizeSteps({"0%": 2, "60%": 4})
    ckpt = interrupted(tmp_path, BatchSizeScheduler(before))
    module = Probe()
    scheduler = BatchSizeScheduler(after, lr_scaling="sqrt", weight=tokens, rewarmup="5%")
    fit(module, None, scheduler, ckpt=ckpt)
    report = resume_report(info_log)
    assert f"batch size: {before} → {after}" in report
    assert "lr_scaling: None → 'sqrt'" in report
    assert "rewarmup: None → 5%" in report
    assert "weight: None → <function tokens>" in report
    assert "max_kappa" not in report
    assert [len(window) for window in module.windows] == [2] * (12 - AT) + [4] * (UPDATES - 12)


@pytest.mark.parametrize("has_settings", [True, False])
def test_unchanged_policy_reports_nothing(
    has_settings: bool, tmp_path: Path, info_log: Any
) -> None:
    def scheduler() -> BatchSizeScheduler:
        policy = BatchSizeSteps({"0%": 2, "50%": 4})
        return BatchSizeScheduler(policy, lr_scaling="sqrt", weight=tokens)

    ckpt = interrupted(tmp_path, scheduler())
    if not has_settings:
        ckpt = without(ckpt, "BatchSizeScheduler", name="settings")
    fit(Probe(), None, scheduler(), ckpt=ckpt)
    assert not resume_report(info_log)
