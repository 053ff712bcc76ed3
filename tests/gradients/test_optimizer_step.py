"""The control of an optimizer's step: skips, closures, functions after a step, scales."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_bigopt.gradients import (
    MaxUpdateRatio,
    NormClip,
    UpdateClip,
    after_step_once,
    clear_,
    clip_gradients_,
    skip_update_,
    step_control,
)
from tests.gradients.helpers import with_norms
from tests.gradients.step_problems import (
    ONCE,
    OPTIMIZERS,
    Counting,
    Problem,
    Sam,
    assert_same_bits,
)

# ------------------------------------------------------------------------------------ skips


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("how", ["skip_next", "skip_update_"])
def test_skip_inside_the_closure_changes_no_bit(kind, after, how):
    problem = Problem(OPTIMIZERS[kind])
    control = step_control(problem.optimizer)
    for _ in range(after):
        problem.optimizer.step(problem.closure)
    before, evaluations = problem.everything(), problem.evaluations

    def closure():
        loss = problem.closure()
        if how == "skip_next":
            control.skip_next()
        else:
            skip_update_(problem.optimizer)
        return loss

    for _ in range(2):
        assert problem.optimizer.step(closure).item() > 0
    assert problem.evaluations == evaluations + 2
    assert_same_bits(problem.everything(), before)


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("how", ["skip_next", "skip_update_"])
def test_skip_before_the_step_changes_no_bit(kind, how):
    problem = Problem(OPTIMIZERS[kind])
    for _ in range(2):
        problem.backward()
        problem.optimizer.step()
    before = problem.everything()
    problem.backward()
    if how == "skip_next":
        step_control(problem.optimizer).skip_next()
    else:
        skip_update_(problem.optimizer)
    assert problem.optimizer.step() is None
    assert_same_bits(problem.everything(), before)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_run_with_skips_equals_the_run_without_those_steps(kind):
    skipping, plain = Problem(OPTIMIZERS[kind]), Problem(OPTIMIZERS[kind])
    control = step_control(skipping.optimizer)
    for step in range(6):
        is_bad = step in (0, 3, 4)

        def closure(is_bad=is_bad):
            if is_bad:
                control.skip_next()
            return skipping.closure()

        skipping.optimizer.step(closure)
        if not is_bad:
            plain.optimizer.step(plain.closure)
    assert_same_bits(skipping.everything(), plain.everything())


def test_skip_unless_gradients_is_dropped_by_a_step_with_gradients():
    problem = Problem()
    control = step_control(problem.optimizer)
    before = problem.everything()
    control.skip_next(unless_gradients=True)
    problem.backward()
    problem.optimizer.step()  # stands for a step that a GradScaler skipped
    with pytest.raises(AssertionError):
        assert_same_bits(problem.everything(), before)
    before = problem.everything()
    control.skip_next()
    problem.backward()
    problem.optimizer.step()
    assert_same_bits(problem.everything(), before)


def test_other_step_hooks_do_not_run_in_a_skipped_step():
    problem, calls = Problem(), []
    problem.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    problem.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step_control(problem.optimizer).skip_next()
    problem.optimizer.step()
    assert not calls
    problem.optimizer.step()
    assert calls == ["before", "after"]


# ----------------------------------------------------------------------------------- closures


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("as_keyword", [True, False])
def test_step_with_a_closure_equals_the_original(kind, as_keyword):
    ours, theirs = Problem(OPTIMIZERS[kind]), Problem(OPTIMIZERS[kind])
    step_control(ours.optimizer)
    for _ in range(3):
        losses = [
            problem.optimizer.step(closure=problem.closure)
            if as_keyword
            else problem.optimizer.step(problem.closure)
            for problem in (ours, theirs)
        ]
        assert_same_bits(*losses)
    assert ours.evaluations == theirs.evaluations
    assert_same_bits(ours.everything(), theirs.everything())


def test_closure_runs_with_grad_enabled_before_the_original_step():
    problem, calls = Problem(), []
    problem.optimizer.register_step_pre_hook(lambda *_: calls.append("original"))
    step_control(problem.optimizer)

    def closure():
        calls.append(f"closure, grad {torch.is_grad_enabled()}")
        return problem.closure()

    with torch.no_grad():
        problem.optimizer.step(closure)
    assert calls == ["closure, grad True", "original"]


def test_closure_that_returns_none_is_evaluated_once():
    problem, calls = Problem(), []
    step_control(problem.optimizer)
    assert problem.optimizer.step(lambda: calls.append(1)) is None
    assert calls == [1]


@pytest.mark.parametrize("clips", [False, True])
def test_optimizer_that_moves_the_weights_first_evaluates_the_closure_itself(clips):
    """SAM, as in manual optimization: the gradient at the weights comes before the step."""
    ours, theirs = (Problem(lambda p: Sam(p, lr=0.1)) for _ in range(2))
    step_control(ours.optimizer)
    for step in range(3):
        for problem in (ours, theirs):
            problem.backward()

            def closure(problem=problem):
                loss = problem.closure()
                if clips:
                    clip_gradients_(problem.parameters, NormClip(0.5))
                return loss

            problem.optimizer.step(closure)
        assert ours.evaluations == step + 2  # one extra evaluation in the first step
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-6, atol=1e-7)


def test_skip_inside_a_running_step_restores_the_groups():
    """If the optimizer evaluates the closure itself, or the control is installed during a step."""

    class EvaluatesLate(Counting):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_mul_(group["params"], 1.0)  # a new version of the same weights
            return super().step(closure)

    problem = Problem(EvaluatesLate)
    step_control(problem.optimizer)
    problem.optimizer.step(problem.closure)  # the control notices that it evaluates itself
    before = (problem.everything()[0], problem.optimizer.param_groups[0]["steps"])

    def closure():
        loss = problem.closure()
        skip_update_(problem.optimizer)
        return loss

    problem.optimizer.step(closure)
    after = (problem.everything()[0], problem.optimizer.param_groups[0]["steps"])
    assert_same_bits(after, before)


# ------------------------------------------------------- installed while the original is running

# Their steps change something before the closure, in which the control is installed, or end with an
# error without gradients.
CHANGED_BEFORE_THE_CLOSURE = {"LBFGS", "SAM", "own schedule", "wrapper", "fails without gradients"}


@pytest.mark.parametrize(
    "kind", [kind for kind in OPTIMIZERS if kind not in CHANGED_BEFORE_THE_CLOSURE]
)
def test_first_skip_inside_the_closure_changes_no_bit(kind):
    problem = Problem(OPTIMIZERS[kind])
    before = problem.everything()

    def closure():
        loss = problem.closure()
        skip_update_(problem.optimizer)
        return loss

    for _ in range(2):
        problem.optimizer.step(closure)
        assert_same_bits(problem.everything(), before)


def test_first_skip_inside_the_closure_of_a_subclass_restores_before_and_after():
    problem = Problem(Counting)

    def closure():
        skip_update_(problem.optimizer)

    problem.optimizer.step(closure)
    assert "steps" not in problem.optimizer.param_groups[0]
    problem.optimizer.step()
    assert problem.optimizer.param_groups[0]["steps"] == 1


@pytest.mark.parametrize("rule", [NormClip(0.5), MaxUpdateRatio(1e-3), UpdateClip(1e-3)])
def test_first_clip_inside_the_closure_applies_to_this_step(rule):
    ours, theirs = (Problem(OPTIMIZERS["AdamW fused"]) for _ in range(2))
    for problem in (ours, theirs):

        def closure(problem=problem):
            loss = problem.closure()
            clip_gradients_(problem.parameters, rule, optimizer=problem.optimizer)
            return loss

        if problem is theirs:
            step_control(problem.optimizer)
        for _ in range(3):
            problem.optimizer.step(closure)
            assert not {"grad_scale", "found_inf"} & vars(problem.optimizer).keys()
    assert_same_bits(ours.everything(), theirs.everything())


# ------------------------------------------------------------------------- functions and scales


def test_function_runs_once_after_the_next_step():
    problem, calls = Problem(), []
    control = step_control(problem.optimizer)
    control.after_step(lambda: calls.append(1))
    control.after_step(lambda: calls.append(2))
    problem.optimizer.step()
    problem.optimizer.step()
    assert calls == [1, 2]


@pytest.mark.parametrize("how", ["skipped", "cleared", "removed", "raised"])
def test_function_of_a_skipped_step_is_removed(how):
    problem = Problem()
    control = step_control(problem.optimizer)
    control.after_step(lambda: pytest.fail("must not run"))
    if how == "skipped":
        control.skip_next()
        problem.optimizer.step()
    elif how == "cleared":
        clear_(problem.optimizer)
    elif how == "removed":
        control.remove()
    else:
        with pytest.raises(ZeroDivisionError):
            problem.optimizer.step(lambda: 1 / 0)
    problem.optimizer.step()


def test_nested_step_counts_as_one_step():
    problem, calls = Problem(Counting), []
    step_control(problem.optimizer).after_step(
        lambda: calls.append(problem.optimizer.param_groups[0]["steps"])
    )
    problem.backward()
    problem.optimizer.step()
    assert calls == [1]


def test_deprecated_function_works():
    problem, calls = Problem(), []
    with pytest.deprecated_call(match=r"write step_control\(optimizer\).after_step\(run\)"):
        after_step_once(problem.optimizer, lambda: calls.append(1))
    problem.optimizer.step()
    problem.optimizer.step()
    assert calls == [1]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_scale_lasts_for_one_step(bad):
    named = with_norms(8.0)
    optimizer = torch.optim.SGD([named[0][1]], lr=0.1, fused=True)
    if bad is not None:
        named[0][1].grad[0] = bad
    clip_gradients_(named, NormClip(1.0), optimizer=optimizer)
    assert ("found_inf" in vars(optimizer)) == (bad is not None)
    before = named[0][1].detach().clone()
    optimizer.step()
    moved = (named[0][1].detach() - before).norm().item()
    assert moved == pytest.approx(0.1 if bad is None else 0.0, rel=1e-5)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


@pytest.mark.parametrize("where", ["closure", "original", "function"])
def test_exception_removes_pending_functions_and_scales(where):
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            loss = super().step(closure)
            return 1 / 0 if self.fails else loss

    problem = Problem(lambda p: Failing(p, lr=0.1, fused=True))
    control = step_control(problem.optimizer)
    control.scale_gradients(torch.tensor(0.5), torch.tensor(False))
    problem.optimizer.fails = where == "original"
    if where == "function":
        control.after_step(lambda: 1 / 0)

    def closure():
        if where == "closure":
            control.skip_next()
            return 1 / 0
        return problem.closure()

    with pytest.raises(ZeroDivisionError):
        problem.optimizer.step(closure)
    assert not {"grad_scale", "found_inf"} & vars(problem.optimizer).keys()
    problem.optimizer.fails = False
    before = problem.everything()
    problem.optimizer.step(problem.closure)
    with pytest.raises(AssertionError):
        assert_same_bits(problem.everything(), before)
