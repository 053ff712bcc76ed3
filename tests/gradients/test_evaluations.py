"""Steps with several evaluations of the closure: a skip in any of them changes nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lightning_bigopt.gradients import (
    MaxUpdateRatio,
    NormClip,
    clip_gradients_,
    skip_update_,
    step_control,
)
from tests.gradients.step_problems import (
    OPTIMIZERS,
    SEVERAL,
    ClosureSam,
    Problem,
    SometimesTwice,
    assert_same_bits,
)


def closure_that_skips(problem, *, at, how="skip_next", error=None):
    """Returns a closure that skips the step, or raises, in its n-th evaluation."""
    evaluations = []

    def closure():
        loss = problem.closure()
        evaluations.append(loss)
        if len(evaluations) == at:
            if error is not None:
                raise error
            if how == "skip_next":
                step_control(problem.optimizer).skip_next()
            else:
                skip_update_(problem.optimizer)
        return loss

    return closure


@pytest.mark.parametrize(
    ("kind", "at"), [("SAM", 1), ("SAM", 2), *(("LBFGS", n) for n in range(1, 5))]
)
@pytest.mark.parametrize("how", ["skip_next", "skip_update_"])
@pytest.mark.parametrize("after", [0, 2])
def test_skip_in_any_evaluation_changes_no_bit(kind, at, how, after):
    problem = Problem(OPTIMIZERS[kind])
    step_control(problem.optimizer)
    for _ in range(after):
        problem.optimizer.step(problem.closure)
    before, evaluations = problem.everything(), problem.evaluations
    for _ in range(2):
        loss = problem.optimizer.step(closure_that_skips(problem, at=at, how=how))
        assert loss.item() > 0
        assert_same_bits(problem.everything(), before)
    assert problem.evaluations == evaluations + 2 * at


@pytest.mark.parametrize("kind", SEVERAL)
def test_run_with_skips_equals_the_run_without_those_steps(kind):
    skipping, plain = Problem(OPTIMIZERS[kind]), Problem(OPTIMIZERS[kind])
    step_control(skipping.optimizer)
    for skip_at in (2, None, 1, None, 2, None, None):
        if skip_at is None:
            skipping.optimizer.step(skipping.closure)
            plain.optimizer.step(plain.closure)
        else:
            skipping.optimizer.step(closure_that_skips(skipping, at=skip_at))
    assert_same_bits(skipping.everything(), plain.everything())


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_error_in_a_repeated_evaluation_changes_no_bit(kind, error):
    problem = Problem(OPTIMIZERS[kind])
    step_control(problem.optimizer)
    problem.optimizer.step(problem.closure)
    before = problem.everything()
    with pytest.raises(type(error)):
        problem.optimizer.step(closure_that_skips(problem, at=2, error=error))
    assert_same_bits(problem.everything(), before)


@pytest.mark.parametrize("how", ["skip", "error"])
def test_scale_of_the_first_evaluation_is_removed(how):
    """The kernel of a fused optimizer clips; the attributes for it must not return."""
    problem = Problem(lambda p: ClosureSam(p, fused=True))
    control = step_control(problem.optimizer)
    evaluations = []

    def closure():
        loss = problem.closure()
        evaluations.append(loss)
        if len(evaluations) == 1:
            clip_gradients_(problem.parameters, NormClip(0.1), optimizer=problem.optimizer)
            assert "grad_scale" in vars(problem.optimizer)
        elif how == "error":
            raise ValueError
        else:
            control.clear()
            control.skip_next()
        return loss

    before = problem.everything()
    with pytest.raises(ValueError) if how == "error" else contextlib.nullcontext():
        problem.optimizer.step(closure)
    assert_same_bits(problem.everything(), before)
    assert not {"grad_scale", "found_inf"} & vars(problem.optimizer).keys()


def test_functions_after_the_step_do_not_run_if_a_repeated_evaluation_skips_it():
    problem = Problem(ClosureSam)
    step_control(problem.optimizer).after_step(lambda: pytest.fail("must not run"))
    problem.optimizer.step(closure_that_skips(problem, at=2))
    problem.optimizer.step(problem.closure)


def test_first_repeated_evaluation_after_single_ones_cannot_be_skipped_silently():
    problem = Problem(SometimesTwice)
    step_control(problem.optimizer)
    problem.optimizer.step(problem.closure)
    with pytest.raises(RuntimeError, match=r"a step of SometimesTwice .* resume from the last"):
        problem.optimizer.step(closure_that_skips(problem, at=2))
    before = problem.everything()
    problem.optimizer.step(closure_that_skips(problem, at=2))
    before[2]["steps"] += 1  # a class attribute until the first step
    assert_same_bits(problem.everything()[:2], before[:2])


def test_copies_are_made_only_for_optimizers_that_evaluate_several_times(monkeypatch):
    made = []
    monkeypatch.setattr(
        "lightning_bigopt.gradients.evaluations.ObjectSnapshot",
        lambda optimizer, **options: made.append(optimizer),
    )
    once, several, never = (Problem(OPTIMIZERS[kind]) for kind in ("AdamW", "SAM", "SAM"))
    for problem in (once, several, never):
        step_control(problem.optimizer).evaluations.are_undone = problem is not never
        for _ in range(3):
            problem.optimizer.step(problem.closure)
    assert [made.count(p.optimizer) for p in (once, several, never)] == [1, 3, 0]


@pytest.mark.parametrize("kind", SEVERAL)
def test_rule_on_updates_limits_the_whole_step(kind):
    """Relative to the weights before the step, not before its last evaluation."""
    problem = Problem(OPTIMIZERS[kind])
    step_control(problem.optimizer)

    def closure():
        loss = problem.closure()
        clip_gradients_(problem.parameters, MaxUpdateRatio(1e-3), optimizer=problem.optimizer)
        return loss

    for _ in range(3):
        before = [p.detach().clone() for p in problem.parameters]
        problem.optimizer.step(closure)
        for p, old in zip(problem.parameters, before, strict=True):
            assert (p.detach() - old).norm().item() == pytest.approx(1e-3 * old.norm().item(), 1e-3)


def test_wrapped_optimizers_and_gradients_from_before_the_step_are_restored():
    """A wrapper moves the weights of an inner optimizer by a gradient from before its step."""

    class Late(torch.optim.Optimizer):
        def __init__(self, params):
            self.inner = torch.optim.AdamW(params, lr=0.1)
            super().__init__(self.inner.param_groups, {})

        def step(self, closure):
            self.inner.step()
            with torch.enable_grad():
                loss = closure()
            self.inner.step()
            return loss

    problem = Problem(Late)
    step_control(problem.optimizer)
    for _ in range(2):
        problem.backward()
        problem.optimizer.step(problem.closure)
    problem.backward()
    gradients = [p.grad.clone() for p in problem.parameters]
    before = problem.everything()[0], problem.optimizer.inner.state_dict()
    before = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, before)
    problem.optimizer.step(closure_that_skips(problem, at=1))
    assert_same_bits((problem.everything()[0], problem.optimizer.inner.state_dict()), before)
    assert_same_bits([p.grad for p in problem.parameters], gradients)
