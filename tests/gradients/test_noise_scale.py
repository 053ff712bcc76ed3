"""The noise scale on a small network whose per-sample gradients are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bigopt import batching, gradients
from lightning_bigopt.gradients import NoiseScaleEstimator, noise_scale_terms


def test_terms_are_unbiased_over_all_draws():
    """The mean over every way to draw two of four gradients is exact."""
    gradients = np.random.default_rng(0).normal(size=(4, 3)) + 1.0
    mean = gradients.mean(0)
    noise_truth = ((gradients - mean) ** 2).sum(1).mean()
    noises, signals = [], []
    for first in range(4):
        for second in range(4):  # independent draws with replacement
            pair = gradients[[first, second]]
            small = (pair**2).sum(1).mean()
            big = (pair.mean(0) ** 2).sum()
            noise, signal = noise_scale_terms(small, big_square=big, small=1, big=2)
            noises.append(noise)
            signals.append(signal)
    assert np.mean(noises) == pytest.approx(noise_truth, rel=1e-12)
    assert np.mean(signals) == pytest.approx((mean**2).sum(), rel=1e-12)


@pytest.mark.parametrize(("k", "b"), [(2, 1), (4, 8), (7, 3)])
def test_terms_are_the_form_for_k_micro_batches(k, b):
    micro = np.random.default_rng(k).normal(size=(k, 5)) + 0.3
    mean_square, big_square = (micro**2).sum(1).mean(), (micro.mean(0) ** 2).sum()
    noise, signal = noise_scale_terms(mean_square, big_square=big_square, small=b, big=b * k)
    expected = (mean_square - big_square) * b * k / (k - 1)
    assert noise == pytest.approx(expected)
    assert signal == pytest.approx(big_square - expected / (b * k))


@pytest.mark.parametrize(("small", "big"), [(4, 4), (8, 4), (0, 4)])
def test_terms_need_two_batch_sizes(small, big):
    with pytest.raises(ValueError, match=r"big must be more than small .*at least two"):
        noise_scale_terms(1.0, big_square=1.0, small=small, big=big)


# --------------------------------------------------------------------------- the estimator


class PerSampleGradients:
    """The per-sample gradients of a small network, and their exact noise scale."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, 8, generator=generator)
        y = torch.randn(512, 4, generator=generator) + 0.5 * x[:, :4]
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 4), nn.Tanh()).double()
        x, y = x.double(), y.double()
        rows = []
        for sample in range(len(x)):
            loss = (model(x[sample]) - y[sample]).square().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        self.gradients = torch.stack(rows).numpy()
        mean = self.gradients.mean(0)
        self.noise = ((self.gradients - mean) ** 2).sum(1).mean()
        self.signal = (mean**2).sum()
        self.truth = self.noise / self.signal

    def terms(self, generator, *, micro, k, first_only):
        drawn = self.gradients[generator.integers(0, 512, size=micro * k)]
        parts = drawn.reshape(k, micro, -1).mean(1)
        squares = (parts**2).sum(1)
        big_square = (parts.mean(0) ** 2).sum()
        small = squares[0] if first_only else squares.mean()
        return noise_scale_terms(small, big_square=big_square, small=micro, big=micro * k)


@pytest.fixture(scope="module")
def small_network():
    return PerSampleGradients()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decay", "updates", "first_only"), [(0.99, 60, False), (0.98, 150, False), (0.99, 100, True)]
)
def test_standard_error_has_the_nominal_coverage(small_network, decay, updates, first_only):
    """Coverage over 200 runs: 68 % within one standard error, 95 % within two."""
    within, ratios = [], []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        estimator = NoiseScaleEstimator(decay=decay)
        for _ in range(updates):
            noise, signal = small_network.terms(generator, micro=8, k=4, first_only=first_only)
            estimator.update(noise, signal=signal)
        report = estimator.report()
        assert report.reason is None
        ratios.append(report.noise_scale)
        within.append(abs(report.noise_scale - small_network.truth) / report.standard_error)
    assert np.mean(ratios) == pytest.approx(small_network.truth, rel=0.1)
    assert 0.60 < np.mean(np.array(within) < 1) < 0.78
    assert 0.89 < np.mean(np.array(within) < 2) < 0.99


def test_ratio_of_means_is_right_and_mean_of_ratios_is_not(small_network):
    generator = np.random.default_rng(0)
    terms = [small_network.terms(generator, micro=1, k=2, first_only=False) for _ in range(4000)]
    estimator = NoiseScaleEstimator(decay=0.9999)
    for noise, signal in terms:
        estimator.update(noise, signal=signal)
    report = estimator.report()
    assert abs(report.noise_scale - small_network.truth) < 3 * report.standard_error
    of_ratios = np.mean([noise / signal for noise, signal in terms])
    assert abs(of_ratios - small_network.truth) > 10 * report.standard_error


def weighted(values, decay):
    weights = decay ** np.arange(len(values))[::-1]
    return weights / weights.sum()


def test_report_equals_the_weighted_formula():
    generator = np.random.default_rng(4)
    noises, signals = generator.normal(50, 9, size=70), generator.normal(2, 0.5, size=70)
    estimator = NoiseScaleEstimator(decay=0.95)
    for noise, signal in zip(noises, signals, strict=True):
        estimator.update(float(noise), signal=float(signal))
    report = estimator.report()
    w = weighted(noises, 0.95)
    noise, signal = w @ noises, w @ signals
    ratio = noise / signal
    residual = (noises - noise) - ratio * (signals - signal)
    variance = (w @ residual**2) / (1 / (w @ w) - 1)
    assert (report.noise, report.signal) == pytest.approx((noise, signal), rel=1e-12)
    assert report.noise_scale == pytest.approx(ratio, rel=1e-12)
    assert report.standard_error == pytest.approx(math.sqrt(variance) / signal, rel=1e-9)


# ------------------------------------------------------------- no estimate, and bad input


def test_report_without_an_estimate_holds_the_reason():
    estimator = NoiseScaleEstimator(minimum_updates=4)
    assert estimator.report().reason == "too few updates measured (0 of 4)"
    for signal in (1.0, -1.0, 1.2, -1.3):
        estimator.update(100.0, signal=signal)
    report = estimator.report()
    assert (report.noise_scale, report.standard_error) == (None, None)
    assert "not 2 standard errors above zero" in report.reason
    assert "use a larger batch" in report.reason
    estimator.reset()
    for noise in (-1.0, -1.1, -0.9, -1.0):
        estimator.update(noise, signal=5.0)
    assert "the noise S = -1 is not above zero" in estimator.report().reason


@pytest.mark.parametrize("decay", [0.0, 1e-30])
def test_decay_that_keeps_one_update_never_gives_an_estimate(decay):
    estimator = NoiseScaleEstimator(decay=decay)
    for _ in range(50):
        estimator.update(1.0, signal=1.0)
    reason = f"with decay = {decay:g} only one update counts, which has no scatter"
    assert estimator.report().reason == reason


def test_non_finite_terms_are_ignored():
    clean, dirty = NoiseScaleEstimator(), NoiseScaleEstimator()
    for turn in range(40):
        for bad in (math.nan, math.inf, -math.inf):
            dirty.update(bad, signal=1.0)
            dirty.update(1.0, signal=bad)
        for estimator in (clean, dirty):
            estimator.update(10.0 + turn % 3, signal=1.0 + 0.1 * (turn % 2))
    assert dirty.report() == clean.report()
    assert dirty.ignored == 240


def test_interrupted_equals_uninterrupted():
    generator = np.random.default_rng(1)
    terms = [(float(a), float(b)) for a, b in generator.normal((50, 3), 1, size=(60, 2))]
    straight = NoiseScaleEstimator()
    for at in (0, 1, 17, 59):
        straight.reset()
        resumed = NoiseScaleEstimator()
        for index, (noise, signal) in enumerate(terms):
            if index == at:
                state = json.loads(json.dumps(straight.state_dict()))
                resumed.load_state_dict(state)
            straight.update(noise, signal=signal)
            if index >= at:
                resumed.update(noise, signal=signal)
        assert resumed.report() == straight.report()
        assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay must be in"),
        ({"decay": math.nan}, r"decay must be in"),
        (
            {"minimum_updates": 1},
            r"minimum_updates must be a number of updates of at least 2, got 1",
        ),
        ({"confidence": 0}, r"confidence must be positive and finite, got 0"),
    ],
)
def test_invalid_arguments_of_the_estimator_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseScaleEstimator(**arguments)


def test_import_path_of_version_0_1_works():
    for name in ("NoiseScaleEstimator", "NoiseScaleReport", "noise_scale_terms"):
        assert getattr(batching, name) is getattr(gradients, name)
