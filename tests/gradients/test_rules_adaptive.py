"""AutoClip, ZClip and AdaGC, compared with the formulas of their papers."""

from __future__ import annotations

import io
import math

import pytest
import torch

from lightning_bigopt.gradients import AdaGC, AutoClip, Groups, NormClip, ZClip, clip_gradients_
from lightning_bigopt.gradients.rules.clipping_rule import clip_coefficient
from tests.gradients.helpers import as_device_norms, gradients, run, with_norms
from tests.oracles import gradients as oracle


def norms_of_a_run(length, *, seed=0):
    """Log-normal norms with spikes."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(length, generator=generator).mul(0.3).exp()
    norms[torch.rand(length, generator=generator) < 0.05] *= 30
    return norms.tolist()


@pytest.mark.parametrize("window", [7, 1000])
@pytest.mark.parametrize("percentile", [0.5, 10, 50, 100])
def test_autoclip_equals_the_formula(window, percentile):
    rule, truth = AutoClip(percentile, window=window), oracle.AutoClip(percentile, window)
    state = rule.initial_state()
    for norm in norms_of_a_run(60):
        decision = run(rule, with_norms(norm), state)
        expected = truth.coefficient(decision.norms.value)
        assert decision.coefficient.item() == pytest.approx(expected, rel=1e-6)
    assert len(state["norms"]) == min(window, 60)
    assert state["ordered"] == sorted(state["norms"])


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(("z", "alpha", "warmup"), [(2.5, 0.97, 25), (1.0, 0.8, 3)])
def test_zclip_equals_the_formula(z, alpha, warmup, max_norm):
    rule = ZClip(z, alpha=alpha, warmup=warmup, max_norm=max_norm)
    truth, state = oracle.ZClip(z, alpha, warmup, max_norm), rule.initial_state()
    clipped = 0
    for norm in norms_of_a_run(300):
        named = with_norms(norm)
        decision = run(rule, named, state)
        expected = truth.coefficient(decision.norms.value)
        assert decision.coefficient.item() == pytest.approx(expected, rel=1e-6)
        assert gradients(named)[0].norm().item() == pytest.approx(norm * expected, rel=1e-5)
        clipped += expected < 1
    assert (state["mean"], state["variance"]) == pytest.approx((truth.mean, truth.var), rel=1e-9)
    assert 0 < clipped < 300


def test_zclip_threshold_is_the_norm_from_which_it_clips():
    rule = ZClip(max_norm=None, warmup=4)
    state = rule.initial_state()
    for norm in (1.0, 3.0, 1.0, 3.0):
        assert run(rule, with_norms(norm), state).threshold == math.inf
    assert run(rule, with_norms(2.0), state).threshold == pytest.approx(2 + 2.5, rel=1e-5)
    spike = run(rule, with_norms(100.0), state)
    assert spike.threshold < 100.0
    assert spike.coefficient.item() == pytest.approx(spike.threshold / 100.0, rel=1e-5)


@pytest.mark.parametrize("warmup", [5, 40])
def test_adagc_equals_the_formula(warmup):
    rule = AdaGC(1.05, beta=0.9, warmup=warmup, max_norm=1.0)
    truth, state = oracle.AdaGC(1.05, 0.9, warmup, 1.0), rule.initial_state()
    for norms in zip(norms_of_a_run(30), norms_of_a_run(30, seed=1), strict=True):
        named = with_norms(*norms)
        expected = truth.clip({name: p.grad.clone() for name, p in named})
        run(rule, named, state)
        for name, parameter in named:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-5, atol=1e-8)
    found = dict(zip(state["names"], state["gamma"].tolist(), strict=True))
    assert found == pytest.approx(truth.gamma, rel=1e-4)


def test_adagc_with_parameters_that_appear_and_disappear():
    rule = AdaGC(warmup=1, max_norm=1e6)
    state = rule.initial_state()
    first = with_norms(1.0, 2.0)
    run(rule, first, state)
    late = with_norms(10.0, 10.0, 10.0)
    late[0][1].grad = None
    run(rule, late, state)  # p0 is absent, p2 is new
    assert dict(zip(state["names"], state["gamma"].tolist(), strict=True)) == pytest.approx(
        {"p0": 1.0, "p1": 0.98 * 2 + 0.02 * 2.1, "p2": 10.0}, rel=1e-5
    )
    assert gradients(late)[1].norm() == pytest.approx(2.1, rel=1e-5)
    assert gradients(late)[2].norm() == pytest.approx(10.0, rel=1e-5)


def test_adagc_keeps_a_gradient_after_a_first_gradient_of_zero():
    rule = AdaGC(warmup=1)
    state = rule.initial_state()
    run(rule, with_norms(0.0, 1.0), state)
    named = with_norms(1.0, 1.0)
    run(rule, named, state)
    assert gradients(named)[0].norm() == pytest.approx(1.0, rel=1e-5)


def test_autoclip_keeps_a_gradient_after_gradients_of_zero():
    rule = AutoClip(10)
    state = rule.initial_state()
    for _ in range(5):
        run(rule, with_norms(0.0), state)
    assert run(rule, with_norms(1.0), state).coefficient.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("rule", [AutoClip(50), ZClip(warmup=4), AdaGC(warmup=4)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 2, 3, 4, 9])
def test_non_finite_norms_do_not_change_the_state(rule, bad, when):
    with_bad_norms, clean = rule.initial_state(), rule.initial_state()
    for step, norm in enumerate(norms_of_a_run(12)):
        if step == when:
            for _ in range(3):
                decision = run(rule, with_norms(bad, 1.0), with_bad_norms)
                assert (decision.coefficient is None) or decision.coefficient == 1.0
        a = run(rule, with_norms(norm, 1.0), with_bad_norms)
        b = run(rule, with_norms(norm, 1.0), clean)
        if not isinstance(rule, AdaGC):  # it counts updates without reading the norm
            assert torch.equal(a.coefficient, b.coefficient)
    if isinstance(rule, AdaGC):
        assert with_bad_norms["gamma"].isfinite().all()
    else:
        assert with_bad_norms == clean


@pytest.mark.parametrize(
    "rule",
    [
        AutoClip(50, window=5),
        ZClip(warmup=4),
        AdaGC(warmup=4),
        Groups({"p0": AutoClip(30), "*": ZClip(warmup=3)}),
    ],
)
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_state_loads_with_weights_only(rule, stop):
    norms = norms_of_a_run(12)
    straight, first = rule.initial_state(), rule.initial_state()
    results = []
    for norm in norms:
        named = with_norms(norm, 1.0)
        run(rule, named, straight)
        results.append(gradients(named))
    for norm in norms[:stop]:
        run(rule, with_norms(norm, 1.0), first)
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    resumed = torch.load(file, weights_only=True)
    for norm, expected in zip(norms[stop:], results[stop:], strict=True):
        named = with_norms(norm, 1.0)
        run(rule, named, resumed)
        assert all(torch.equal(a, b) for a, b in zip(gradients(named), expected, strict=True))


@pytest.mark.parametrize("rule", [AutoClip(), ZClip()])
def test_autoclip_and_zclip_read_only_the_total(rule):
    """With the total given as a number, all tensors may be on the meta device."""
    named = with_norms(3.0)
    norms = run(NormClip(), named).norms
    elsewhere = {
        field: getattr(norms, field).to("meta") for field in ("per_tensor", "total", "finite")
    }
    norms = as_device_norms(norms, **elsewhere)
    norms.take_value(3.0)
    from lightning_bigopt.gradients import ClipContext

    state = rule.initial_state()
    for _ in range(40):
        assert rule.decide(ClipContext(parameters=named, norms=norms), state).coefficient.is_meta


@pytest.mark.parametrize("rule", [AutoClip(), ZClip(), AdaGC(), Groups({"*": ZClip()})])
def test_missing_state_raises(rule):
    with pytest.raises(ValueError, match=r"state must be given to .* rule.initial_state"):
        clip_gradients_(with_norms(1.0), rule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoClip(0), r"percentile must be in \(0, 100\], got 0"),
        (lambda: AutoClip(101), r"percentile must be in \(0, 100\], got 101"),
        (lambda: AutoClip(math.nan), r"percentile must be in \(0, 100\], got nan"),
        (lambda: AutoClip(window=0), "window must be a positive integer, got 0"),
        (lambda: AutoClip(window=2.5), "window must be a positive integer, got 2.5"),
        (lambda: ZClip(0), "z_threshold must be positive and finite, got 0"),
        (lambda: ZClip(alpha=1.0), r"alpha must be in \(0, 1\), got 1.0"),
        (lambda: ZClip(alpha=math.nan), r"alpha must be in \(0, 1\), got nan"),
        (lambda: ZClip(warmup=True), "warmup must be a positive integer, got True"),
        (lambda: ZClip(max_norm=0), "max_norm must be positive and finite, got 0; None"),
        (lambda: AdaGC(0.9), r"relative must be in \[1, inf\), got 0.9"),
        (lambda: AdaGC(beta=-0.1), r"beta must be in \(0, 1\), got -0.1"),
        (lambda: AdaGC(warmup=-1), "warmup must be a positive integer, got -1"),
        (lambda: AdaGC(max_norm=math.inf), "max_norm must be positive and finite, got inf"),
    ],
)
def test_invalid_arguments_raise_with_constraint_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_zclip_ignores_gradients_of_zero():
    rule = ZClip(warmup=3, max_norm=None)
    state = rule.initial_state()
    for norm in (0.0, 0.0, 0.0, 1.0, 2.0, 1.5, 0.0, 0.0):
        run(rule, with_norms(norm), state)
    assert state["seed"] == pytest.approx([1.0, 2.0, 1.5])
    assert state["mean"] == pytest.approx(1.5)
    assert run(rule, with_norms(1.6), state).coefficient == 1.0


@pytest.mark.parametrize("rule", [AutoClip(), ZClip(max_norm=None)])
def test_finite_gradients_whose_norm_is_beyond_float32(rule):
    """The coefficient is 1, not inf / inf."""
    named = with_norms(3e38, 3e38, 3e38)
    decision = run(rule, named, rule.initial_state())
    assert decision.norms.finite
    assert decision.coefficient == 1.0
    # The same on an accelerator, where the norm is not read.
    each = clip_coefficient(torch.tensor([math.inf]), math.inf, finite=torch.tensor([True]))
    assert each.tolist() == [1.0]
