"""The step control beside GradScaler and LRScheduler; its installation and removal."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import types
import weakref

import pytest
import torch
from lightning import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_bigopt.gradients import (
    MaxUpdateRatio,
    NormClip,
    apply_,
    clear_,
    clip_gradients_,
    skip_update_,
    step_control,
)
from tests.gradients.helpers import with_norms
from tests.gradients.step_problems import (
    OPTIMIZERS,
    PlainDict,
    Problem,
    assert_same_bits,
)

# --------------------------------------------------------------------------------- GradScaler


def scaled_backward(problem, scaler, *, is_bad=False):
    problem.backward()
    for p in problem.parameters:
        p.grad *= scaler.get_scale()
    if is_bad:
        problem.parameters[0].grad[0] = math.inf


def new_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    return scaler


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("is_unscaled", [True, False])
@pytest.mark.parametrize("overflow", [True, False])
def test_clipping_under_a_grad_scaler(kind, is_unscaled, overflow):
    ours, theirs = Problem(OPTIMIZERS[kind]), Problem(OPTIMIZERS[kind])
    scaler = new_scaler()
    step_control(ours.optimizer)
    for is_bad in (False, overflow, False):
        scaled_backward(ours, scaler, is_bad=is_bad)
        if is_unscaled:
            scaler.unscale_(ours.optimizer)
        limit = 0.5 if is_unscaled else 0.5 * scaler.get_scale()
        clip_gradients_(ours.parameters, NormClip(limit), optimizer=ours.optimizer)
        scaler.step(ours.optimizer)
        scaler.update()
        assert not {"grad_scale", "found_inf"} & vars(ours.optimizer).keys()
        if not is_bad:
            theirs.backward()
            nn.utils.clip_grad_norm_(theirs.parameters, 0.5)
            theirs.optimizer.step()
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == (2.0 if overflow else 4.0)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused"])
@pytest.mark.parametrize("overflow", [True, False])
def test_skip_under_a_grad_scaler(kind, overflow):
    """Skips an update that the GradScaler would skip too, and one that it would make."""
    ours, theirs = Problem(OPTIMIZERS[kind]), Problem(OPTIMIZERS[kind])
    scaler = new_scaler()
    step_control(ours.optimizer)
    for skips in (False, True, False):
        scaled_backward(ours, scaler, is_bad=skips and overflow)
        scaler.unscale_(ours.optimizer)
        if skips:
            skip_update_(ours.optimizer)
        scaler.step(ours.optimizer)
        scaler.update()
        assert not {"grad_scale", "found_inf"} & vars(ours.optimizer).keys()
        if not skips:
            theirs.backward()
            theirs.optimizer.step()
    assert_same_bits(ours.everything(), theirs.everything())
    assert scaler.get_scale() == (2.0 if overflow else 4.0)


def test_skip_after_a_scale_under_a_grad_scaler():
    """The GradScaler deletes ``grad_scale`` itself and raises if it is missing."""
    problem = Problem(OPTIMIZERS["AdamW fused"])
    scaler = new_scaler()
    scaled_backward(problem, scaler)
    scaler.unscale_(problem.optimizer)
    before = problem.everything()
    control = step_control(problem.optimizer)
    control.scale_gradients(torch.tensor(0.5), torch.tensor(True))
    control.skip_next()
    scaler.step(problem.optimizer)
    scaler.update()
    assert_same_bits(problem.everything(), before)
    assert not {"grad_scale", "found_inf"} & vars(problem.optimizer).keys()


def test_grad_scaler_argument_of_a_custom_step_is_kept():
    class Custom(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, *, grad_scaler=None):
            return grad_scaler

    optimizer = Custom([nn.Parameter(torch.ones(1))])
    step_control(optimizer)
    assert "grad_scaler" in inspect.signature(optimizer.step).parameters
    marker = object()
    assert optimizer.step(grad_scaler=marker) is marker


# -------------------------------------------------------------------------------- LRScheduler


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("skips_first", [True, False])
def test_lr_scheduler_beside_the_control_gives_no_warning(scheduler_first, skips_first):
    """Its warnings about the order of calls are errors in the tests."""
    problem, twin = Problem(), Problem()
    reference = torch.optim.lr_scheduler.ExponentialLR(twin.optimizer, 0.5)
    if scheduler_first:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(problem.optimizer, 0.5)
        control = step_control(problem.optimizer)
    else:
        control = step_control(problem.optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(problem.optimizer, 0.5)
    torch.optim.lr_scheduler.ConstantLR(problem.optimizer, 1.0)  # a second scheduler
    for step in range(3):
        for one in (problem, twin):
            one.backward()
        if skips_first and step == 0:
            control.skip_next()
            twin.optimizer._opt_called = True
        else:
            twin.optimizer.step()
        problem.optimizer.step()
        scheduler.step()
        reference.step()
    assert_same_bits(problem.parameters, twin.parameters)
    assert problem.optimizer.param_groups[0]["lr"] == twin.optimizer.param_groups[0]["lr"]


# -------------------------------------------------------------------- installation and removal


def test_one_control_per_optimizer():
    problem = Problem()
    control = step_control(problem.optimizer)
    assert step_control(problem.optimizer) is control
    assert isinstance(problem.optimizer.step, types.MethodType)
    control.remove()
    assert step_control(problem.optimizer) is not control


def test_clipping_without_skips_installs_no_control():
    named = with_norms(8.0)
    optimizer = torch.optim.AdamW([named[0][1]])
    before = dict(vars(optimizer))
    clear_(optimizer)
    clip_gradients_(named, NormClip(1.0), optimizer=optimizer)
    assert vars(optimizer) == before


@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize("has_scheduler", [True, False])
def test_removal_restores_the_optimizer(is_used, has_scheduler):
    problem = Problem(OPTIMIZERS["SGD fused"])
    if has_scheduler:
        torch.optim.lr_scheduler.ConstantLR(problem.optimizer)
        problem.optimizer.step()
    before = dict(vars(problem.optimizer))
    hooks = dict(problem.optimizer._optimizer_step_post_hooks)
    control = step_control(problem.optimizer)
    if is_used:
        control.scale_gradients(torch.tensor(0.5), torch.tensor(False))
        control.after_step(lambda: pytest.fail("must not run"))
        control.skip_next()
    control.remove()
    control.remove()
    assert vars(problem.optimizer) == before
    assert problem.optimizer._optimizer_step_post_hooks == hooks
    problem.backward()
    problem.optimizer.step()


def test_removal_keeps_a_step_replaced_by_others():
    problem, calls = Problem(), []
    control = step_control(problem.optimizer)
    ours = problem.optimizer.step

    def theirs(*args, **kwargs):
        calls.append("theirs")
        return ours(*args, **kwargs)

    problem.optimizer.step = theirs
    control.remove()
    assert problem.optimizer.step is theirs
    control.skip_next()  # a removed control does nothing
    before = problem.everything()
    problem.backward()
    problem.optimizer.step()
    with pytest.raises(AssertionError):
        assert_same_bits(problem.everything(), before)
    again = step_control(problem.optimizer)
    before = problem.everything()
    again.skip_next()
    problem.optimizer.step()
    assert_same_bits(problem.everything(), before)
    problem.optimizer.step(problem.closure)
    assert calls == ["theirs", "theirs"]
    assert problem.evaluations == 1


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, PlainDict])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_no_control(make, how):
    problem = Problem(lambda p: make(p, lr=0.1))
    control = step_control(problem.optimizer)
    control.after_step(lambda: None)
    control.skip_next()
    other = how(problem.optimizer)
    (weight, *_) = other.param_groups[0]["params"]
    before, mine = weight.detach().clone(), problem.parameters[0].detach().clone()
    weight.grad = torch.ones_like(weight)
    other.step()
    assert (weight != before).all()
    assert torch.equal(problem.parameters[0], mine)
    problem.backward()
    problem.optimizer.step()  # the skip belongs to the original
    assert torch.equal(problem.parameters[0], mine)
    before = weight.detach().clone()
    assert step_control(other) is not control
    step_control(other).skip_next()
    other.step()
    assert torch.equal(weight, before)
    how(other).step()


def test_optimizer_with_a_control_is_freed():
    problem = Problem()
    step_control(problem.optimizer).after_step(lambda: None)
    reference = weakref.ref(problem.optimizer)
    del problem
    gc.collect()
    assert reference() is None


def test_wrapper_that_is_no_optimizer_is_unwrapped():
    """Lightning's wrapper forwards attribute reads, not writes."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

    problem = Problem(OPTIMIZERS["AdamW fused"])
    wrapper = Wrapper(problem.optimizer)
    assert step_control(wrapper) is step_control(problem.optimizer)
    problem.backward()
    before = problem.everything()
    clip_gradients_(problem.parameters, NormClip(0.1), optimizer=wrapper)
    assert "grad_scale" in vars(problem.optimizer)
    skip_update_(wrapper)
    assert "grad_scale" not in vars(problem.optimizer)
    wrapper.step()
    assert_same_bits(problem.everything(), before)


@pytest.mark.parametrize(
    "wrap", [LightningOptimizer, lambda o: Fabric(accelerator="cpu").setup_optimizers(o)]
)
def test_wrappers_of_lightning_and_fabric_are_unwrapped(wrap):
    """They are subclasses of the class that they wrap."""
    problem = Problem(OPTIMIZERS["AdamW fused"])
    wrapper = wrap(problem.optimizer)
    assert isinstance(wrapper, torch.optim.AdamW)
    assert step_control(wrapper) is step_control(problem.optimizer)
    problem.backward()
    clip_gradients_(problem.parameters, NormClip(0.1), optimizer=wrapper)
    assert "grad_scale" in vars(problem.optimizer)


def test_optimizer_that_wraps_another_is_controlled_itself():
    problem = Problem(OPTIMIZERS["wrapper"])
    assert step_control(problem.optimizer).optimizer is problem.optimizer


def test_optimizer_without_hooks():
    """Opacus' optimizer wraps another and does not call ``Optimizer.__init__``."""

    class Hookless(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        param_groups = property(lambda self: self.inner.param_groups)

        def step(self, closure=None):
            return self.inner.step(closure)

    problem = Problem()
    optimizer = Hookless(problem.optimizer)
    control = step_control(optimizer)
    before = problem.everything()
    control.skip_next()
    optimizer.step(problem.closure)
    assert_same_bits(problem.everything(), before)
    control.remove()
    assert vars(optimizer) == {"inner": problem.optimizer}


def test_decision_on_updates_is_applied_after_the_step():
    """The correction reads the weights after the optimizer's step."""
    problem = Problem(OPTIMIZERS["AdamW"])
    problem.backward()
    before = [p.detach().clone() for p in problem.parameters]
    decision = clip_gradients_(
        problem.parameters, MaxUpdateRatio(1e-3), optimizer=problem.optimizer
    )
    apply_(decision, optimizer=problem.optimizer)  # twice before one step is once
    problem.optimizer.step()
    for p, old in zip(problem.parameters, before, strict=True):
        assert (p - old).norm().item() == pytest.approx(1e-3 * old.norm().item(), rel=1e-3)
