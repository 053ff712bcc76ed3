"""LossLaw on curves generated from a law: the parameters, unseen schedules, the band, errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.optimize import curve_fit

from lightning_bigopt.planning import LossCurve, LossLaw, MultiPowerLaw
from lightning_bigopt.schedules import (
    CosineWithRestarts,
    MultiStep,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)

pytestmark = pytest.mark.slow

TRUE = MultiPowerLaw(
    floor=3.0, scale=0.52, alpha=0.5, drop=400.0, drop_speed=2.0, beta=0.6, gamma=0.6
)
PEAK = 3e-4
WARMUP = "1000 steps"


def measured(schedule, updates=12_000, *, noise=0.0, seed=0, peak=PEAK, law=TRUE, every=100):
    rates = schedule.values(updates, base=peak)
    ends = range(max(every, 2), updates + 1, every)  # the learning rate of the first update is 0
    losses = law.losses(rates, list(ends))
    losses = losses + noise * np.random.default_rng(seed).standard_normal(len(losses))
    return LossCurve(
        learning_rates=rates, updates=ends, losses=losses, name=type(schedule).__name__
    )


def pilots(**options):
    return [
        measured(WarmupCosine(warmup=WARMUP, end=0.1), seed=1, **options),
        measured(WarmupConstant(warmup=WARMUP), seed=2, **options),
        measured(MultiStep(milestones=[("8000 steps", 0.3)]), seed=3, **options),
    ]


UNSEEN = {
    "linear": WarmupLinear(warmup=WARMUP, end=0.0),
    "wsd": WarmupStableDecay(warmup=WARMUP, decay="20%"),
    "cosine": WarmupCosine(warmup=WARMUP, end=0.1),
    "constant": WarmupConstant(warmup=WARMUP),
}


@pytest.fixture(scope="module")
def exact():
    return LossLaw.fit(pilots(), draws=20)


@pytest.fixture(scope="module")
def noisy():
    return LossLaw.fit(pilots(noise=0.003))


def true_losses(schedule, updates):
    return TRUE.losses(schedule.values(updates, base=PEAK), [updates])[0]


@pytest.mark.parametrize("updates", [12_000, 36_000])
@pytest.mark.parametrize("name", list(UNSEEN))
def test_predicts_unseen_schedules_and_lengths(exact, name, updates):
    found = exact.predict(UNSEEN[name], learning_rate=PEAK, updates=updates)
    assert found.updates[-1] == updates
    assert found.final == pytest.approx(true_losses(UNSEEN[name], updates), abs=0.003)


def test_finds_the_law_of_a_constant_learning_rate(exact):
    """Floor, scale and alpha against a power law that scipy fits to the constant pilot alone."""
    constant = pilots()[1]
    sums = np.cumsum(constant.learning_rates)[np.asarray(constant.updates) - 1]
    (floor, scale, alpha), _ = curve_fit(
        lambda s, *p: p[0] + p[1] * s ** -p[2], sums[10:], constant.losses[10:], p0=(2.5, 1.0, 0.4)
    )
    assert exact.law.floor == pytest.approx(floor, abs=0.01)
    assert exact.law.scale == pytest.approx(scale, rel=0.02)
    assert exact.law.alpha == pytest.approx(alpha, abs=0.02)
    assert exact.unseen < 0.002


def test_ranks_schedules_as_the_true_law(noisy):
    ranked = noisy.rank(UNSEEN, learning_rate=PEAK, updates=24_000)
    truth = sorted(UNSEEN, key=lambda name: true_losses(UNSEEN[name], 24_000))
    assert [expected.name for expected in ranked] == truth
    assert [e.final for e in ranked] == sorted(e.final for e in ranked)


def test_band_contains_the_truth_and_widens_with_the_extrapolation(noisy):
    widths = []
    for updates in (12_000, 48_000, 192_000):
        found = noisy.predict(UNSEEN["wsd"], learning_rate=PEAK, updates=updates)
        low, high = found.final_band
        assert low < true_losses(UNSEEN["wsd"], updates) < high
        widths.append(high - low)
    assert widths == sorted(widths)
    assert widths[-1] > 1.5 * widths[0]


def test_band_contains_the_prediction_of_the_second_halves():
    """The first halves are too high by a step: the second ones alone give the true law."""

    def early_too_high(curve):
        losses = np.asarray(curve.losses)
        losses[: len(losses) // 2] += 0.2
        return dataclasses.replace(curve, losses=losses)

    law = LossLaw.fit([early_too_high(curve) for curve in pilots(every=200)], draws=20)
    assert law.late is not None
    for name, schedule in UNSEEN.items():
        rates = schedule.values(24_000, base=PEAK)
        truth = true_losses(schedule, 24_000)
        assert law.late.losses(rates, [24_000])[0] == pytest.approx(truth, abs=0.01)
        low, high = law.predict_learning_rates(rates, name=name).final_band
        assert low < truth < high


def test_too_few_losses_have_no_law_of_the_second_halves():
    assert LossLaw.fit(pilots(every=800), draws=20).late is None
    assert LossLaw.fit(pilots(every=700), draws=20).late is not None


def test_equal_losses_in_the_second_halves_have_no_law():
    """As in a log of few digits."""
    runs = []
    for curve in pilots():
        half = len(curve.losses) // 2 - 1
        losses = (*curve.losses[:half], *[curve.losses[half]] * (len(curve.losses) - half))
        runs.append(dataclasses.replace(curve, losses=losses))
    assert LossLaw.fit(runs, draws=20).late is None


def test_losses_that_are_equal_from_the_start_on_are_refused():
    runs = []
    for curve in pilots():
        points = zip(curve.updates, curve.losses, strict=True)
        losses = [loss if update < 6000 else 3.0 for update, loss in points]
        runs.append(dataclasses.replace(curve, losses=losses))
    with pytest.raises(ValueError, match=r"a loss that falls, got 3.0 from update 7,000 on in"):
        LossLaw.fit(runs, start=7000)


def test_margin_is_added_to_both_laws():
    late = dataclasses.replace(TRUE, floor=2.9)
    law = LossLaw(law=TRUE, late=late, unseen=0.01, peaks=(PEAK, PEAK), total=1.0)
    found = law.predict_learning_rates([PEAK] * 1000)
    low, high = found.final_band
    assert (found.final - low, high - found.final) == pytest.approx((0.12, 0.02))


@pytest.mark.parametrize(
    ("updates", "margin"),
    [
        (500, 2 * 0.01),  # shorter than the pilots
        (1000, 2 * 0.01),
        (2000, 2 * 0.01 * 2 + 0.003),
        (8000, 2 * 0.01 * 4 + 3 * 0.003),
    ],
)
def test_margin_of_the_band_counts_the_doublings_beyond_the_pilots(updates, margin):
    rate = PEAK
    law = LossLaw(law=TRUE, unseen=0.01, extrapolation=0.003, peaks=(rate, rate), total=1000 * rate)
    found = law.predict_learning_rates([rate] * updates)
    low, high = found.final_band
    assert (found.final - low, high - found.final) == pytest.approx((margin, margin))


def test_band_is_wider_for_learning_rates_below_those_of_the_pilots(noisy):
    """The exponent of the learning rate in the drop is not determined by the pilots."""
    bands = []
    for end in (0.1, 0.001):
        schedule = MultiStep(milestones=[("8000 steps", end)])
        low, high = noisy.predict(schedule, learning_rate=PEAK, updates=12_000).final_band
        bands.append(high - low)
    assert bands[1] > 1.1 * bands[0]


def test_band_contains_most_losses_of_a_law_with_other_exponents():
    """The true exponents of the drop differ, which the fit cannot express but the draws can."""
    true = dataclasses.replace(TRUE, beta=0.58, gamma=0.66)
    inside = []
    for seed in range(5):
        runs = [
            measured(schedule, noise=0.002, seed=3 * seed + index, law=true)
            for index, schedule in enumerate(
                (
                    WarmupCosine(warmup=WARMUP, end=0.1),
                    WarmupConstant(warmup=WARMUP),
                    MultiStep(milestones=[("8000 steps", 0.3)]),
                )
            )
        ]
        law = LossLaw.fit(runs, draws=20)
        for schedule in UNSEEN.values():
            found = law.predict(schedule, learning_rate=PEAK, updates=24_000)
            losses = true.losses(schedule.values(24_000, base=PEAK), found.updates)
            inside.append(np.mean((losses > found.low) & (losses < found.high)))
    assert np.mean(inside) > 0.9


def test_noise_of_single_batches_is_averaged():
    runs = [
        measured(schedule, 3000, noise=0.1, seed=seed, every=1)
        for seed, schedule in enumerate(
            (WarmupConstant(warmup=200), WarmupLinear(warmup=200, end=0.0))
        )
    ]
    found = LossLaw.fit(runs, draws=20).predict(
        WarmupCosine(warmup=200, end=0.1), learning_rate=PEAK, updates=3000
    )
    expected = TRUE.losses(WarmupCosine(warmup=200, end=0.1).values(3000, base=PEAK), [3000])[0]
    assert found.final == pytest.approx(expected, abs=0.03)


def test_equal_runs_give_equal_laws():
    runs = pilots(noise=0.003)
    assert LossLaw.fit(runs, draws=20) == LossLaw.fit(runs, draws=20)
    assert LossLaw.fit(runs, draws=20) != LossLaw.fit(runs, draws=20, seed=1)


def test_parameters_stay_bounded_when_the_runs_do_not_determine_them():
    """Two nearly equal runs: the predictions of a run ten times as long remain plausible."""
    runs = [
        measured(WarmupConstant(warmup=WARMUP), noise=0.01, seed=5),
        measured(MultiStep(milestones=[("11500 steps", 0.5)]), noise=0.01, seed=6),
    ]
    law = LossLaw.fit(runs, draws=20)
    found = law.predict(WarmupLinear(warmup=WARMUP, end=0.0), learning_rate=PEAK, updates=120_000)
    assert 0 < found.final < min(min(run.losses) for run in runs)
    low, high = found.final_band
    assert low < true_losses(WarmupLinear(warmup=WARMUP, end=0.0), 120_000) < high


def test_other_learning_rates_than_those_of_the_pilots_warn(exact):
    with pytest.warns(UserWarning, match=r"learning rate 0.001 is outside .* pilots, 0.0003"):
        found = exact.predict(UNSEEN["wsd"], learning_rate=1e-3, updates=12_000)
    assert "note: its peak learning rate 0.001" in str(found)


def test_schedules_that_rise_again_warn(exact):
    with pytest.warns(UserWarning, match="rises again"):
        exact.predict(CosineWithRestarts(), learning_rate=PEAK, updates=12_000)


def test_each_schedule_may_have_its_learning_rate(exact):
    names = ("linear", "wsd")
    schedules = {name: UNSEEN[name] for name in names}
    ranked = exact.rank(schedules, learning_rate=dict.fromkeys(names, PEAK), updates=12_000)
    assert {e.name for e in ranked} == set(names)
    with pytest.raises(ValueError, match=r"entry for each schedule, got none for \['wsd'\]"):
        exact.rank(schedules, learning_rate={"linear": PEAK}, updates=12_000)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (list, "runs must be"),
        (lambda: pilots()[:1], "runs must be at least two, got 1"),
        (lambda: [pilots()[0], pilots()[0]], "got the losses of WarmupCosine twice"),
        (
            lambda: [pilots()[0], dataclasses.replace(pilots()[1], losses=[2.0] * 120)],
            "must have a loss that falls, got 2.0 from update 1,100 on",
        ),
        (lambda: [pilots()[1], pilots(noise=0.01)[1]], "at least one whose learning rate decays"),
        (lambda: [*pilots(), "runs/a"], "runs"),
        (
            lambda: [
                pilots()[0],
                dataclasses.replace(pilots()[1], losses=[-1.0] * 120, name="negative"),
            ],
            "positive losses, got -1.0 in negative",
        ),
    ],
)
def test_invalid_runs(runs, message):
    with pytest.raises(ValueError, match=message):
        LossLaw.fit(runs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda law: law.predict("cosine", learning_rate=PEAK, updates=10), "schedule must be"),
        (lambda law: law.predict(UNSEEN["wsd"], learning_rate=0.0, updates=9000), "learning_rate"),
        (lambda law: law.predict(UNSEEN["wsd"], learning_rate=PEAK, updates=0), "updates must be"),
        (lambda law: law.rank({}, learning_rate=PEAK, updates=10), "schedules must not be empty"),
        (lambda law: LossLaw.fit(pilots(), draws=3), "draws must be"),
        (lambda law: dataclasses.replace(law, total=0.0), "total must be"),
        (lambda law: dataclasses.replace(law, peaks=3e-4), "peaks must be"),
        (lambda law: dataclasses.replace(law, law="law"), "law must be"),
    ],
)
def test_invalid_arguments(exact, call, message):
    with pytest.raises(ValueError, match=message):
        call(exact)
