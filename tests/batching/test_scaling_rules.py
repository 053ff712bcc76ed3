"""Scaling rules of hyperparameters and AdaScale's gain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    adascale_gain,
    learning_rate_factor,
    recommended_rule,
    scaled_beta,
    weight_decay_factor,
)

KAPPA = st.floats(0.01, 1000)


@given(kappa=KAPPA, cap=st.none() | st.floats(0.1, 100))
def test_rules_are_the_formulas_with_an_upper_bound(kappa, cap):
    capped = kappa if cap is None else min(kappa, cap)
    assert learning_rate_factor(kappa, rule="sqrt", max_kappa=cap) == math.sqrt(capped)
    assert learning_rate_factor(kappa, rule="linear", max_kappa=cap) == capped
    assert weight_decay_factor(kappa, max_kappa=cap) == math.sqrt(capped)
    assert scaled_beta(0.95, kappa=kappa, max_kappa=cap) == 0.95**capped


@given(kappa=st.integers(1, 64), beta=st.floats(0.5, 0.9999))
def test_scaled_beta_keeps_its_half_life_in_samples(kappa, beta):
    new = scaled_beta(beta, kappa=kappa)
    if new > 1e-300:
        half_life = math.log(0.5) / math.log(beta)
        assert math.log(0.5) / math.log(new) * kappa == pytest.approx(half_life, rel=1e-9)


def test_every_rule_is_the_identity_at_one():
    assert learning_rate_factor(1, rule="sqrt") == learning_rate_factor(1, rule="linear") == 1
    assert weight_decay_factor(1) == 1
    assert scaled_beta(0.999, kappa=1) == 0.999


def test_optimizers_of_torch_are_classified():
    kinds = {name: getattr(torch.optim, name) for name in dir(torch.optim)}
    names = {
        name
        for name, kind in kinds.items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    found = {name: recommended_rule(name) for name in names - {"Optimizer"}}
    assert {name for name, rule in found.items() if rule == "linear"} == {"SGD", "ASGD"}
    assert {name for name, rule in found.items() if rule is None} == {"LBFGS", "Rprop"}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("AdamW8bit", "sqrt"),
        ("AdamWScheduleFree", "sqrt"),
        ("SGDScheduleFree", "linear"),
        ("Lion", "sqrt"),
        ("LARS", "linear"),
        ("LBFGS", None),
        ("MyOptimizer", None),
    ],
)
def test_rules_by_name(name, rule):
    assert recommended_rule(name) == rule


def gain_of(rows):
    """Computes AdaScale's gain for two gradients from the unbiased estimates of the paper."""
    first, second = map(np.array, rows)
    variance = ((first - second) ** 2).sum() / 2
    mean_square = (((first + second) / 2) ** 2).sum()
    return adascale_gain(2, variance=variance, square_norm=mean_square - variance / 2)


def test_adascale_gain_equals_published_values():
    """The rows are gradients of a linear layer with a bias: the inputs and a 1."""
    assert gain_of([[1, 0, 1], [0, 1, 1]]) == pytest.approx(4 / 3, rel=1e-12)
    assert gain_of([[1, 4, 1], [5, 0.5, 1]]) == pytest.approx(1.4688796680497926, rel=1e-12)


@given(
    kappa=st.floats(1, 1000),
    variance=st.floats(-10, 1e6),
    square_norm=st.floats(-10, 1e6),
)
def test_adascale_gain_is_between_one_and_kappa(kappa, variance, square_norm):
    gain = adascale_gain(kappa, variance=variance, square_norm=square_norm)
    assert 1 - 1e-9 <= gain <= kappa * (1 + 1e-9)


def test_adascale_gain_at_its_limits():
    assert adascale_gain(8, variance=1.0, square_norm=0.0) == 8
    assert adascale_gain(8, variance=0.0, square_norm=1.0) == 1
    assert adascale_gain(8, variance=0.0, square_norm=0.0) == 1
    noise_scale, base = 96.0, 32
    gain = adascale_gain(4, variance=noise_scale / base, square_norm=1.0)
    assert gain == pytest.approx((noise_scale / 32 + 1) / (noise_scale / 128 + 1))


def test_rules_accept_numpy_scalars():
    assert learning_rate_factor(np.int64(4), rule="sqrt", max_kappa=np.float32(9)) == 2.0
    assert scaled_beta(np.float32(0.5), kappa=np.int64(2)) == 0.25
    assert adascale_gain(np.int64(2), variance=1.0, square_norm=0.0) == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learning_rate_factor(0, rule="sqrt"), r"kappa must be positive and finite, got 0"),
        (lambda: learning_rate_factor(math.nan, rule="sqrt"), r"kappa must be positive"),
        (lambda: learning_rate_factor(2, rule="cube"), r"rule must be 'sqrt' or 'linear'"),
        (lambda: weight_decay_factor(2, max_kappa=0), r"max_kappa must be positive"),
        (lambda: scaled_beta(1.0, kappa=2), r"beta must be in \[0, 1\), got 1.0"),
        (
            lambda: adascale_gain(0.5, variance=1, square_norm=1),
            r"kappa must be in \[1, inf\], got 0.5",
        ),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
