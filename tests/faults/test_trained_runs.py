"""Random configurations that are trained, and those whose differences were found before."""

from __future__ import annotations

from collections import Counter

import lightning as L
import pytest

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    LearningRateScheduler,
    StepDecay,
)
from tests.faults.run_oracle import Length, Limit, Part, simulate
from tests.faults.trained_runs import Configuration, Recorder, check, configuration
from tests.helpers import QUIET, Regression

pytestmark = pytest.mark.slow
SEEDS = range(2000, 2040)
KNOWN = (
    2045,  # periods of a schedule in epochs of a GlobalBatchLoader
    2047,  # the same, in a chain
)


@pytest.mark.parametrize("seed", [*KNOWN, *SEEDS])
def test_every_update_has_the_samples_and_learning_rates_of_the_oracle(seed: int) -> None:
    assert check(seed) == "", configuration(seed)


def test_period_of_one_epoch_of_a_global_batch_loader() -> None:
    """It counted every sample as an epoch."""
    module = Recorder((1.0,), frozenset())
    callbacks = [
        LearningRateScheduler(StepDecay(decay=0.5, every="1 epochs")),
        BatchSizeScheduler(ConstantBatchSize(4)),
    ]
    trainer = L.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": callbacks})
    trainer.fit(module, GlobalBatchLoader(Regression(8), micro_batch_size=4))
    assert [module.seen[step][0] for step in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_the_sample_of_configurations_is_varied() -> None:
    configurations = [configuration(seed) for seed in SEEDS]

    def count(trait: str) -> Counter[object]:
        return Counter(str(getattr(c, trait)) for c in configurations)

    assert len({type(c.schedule) for c in configurations}) >= 12
    assert len({type(c.policy) for c in configurations}) == 4
    assert len(count("limit_by")) == 5
    assert len(count("precision")) == 3
    assert len(count("scaling")) == 3
    assert sum(c.resume is not None for c in configurations) >= 8
    assert sum(bool(c.bad) for c in configurations) >= 8


def wrong_learning_rate(config: Configuration) -> str:
    config.curve = lambda tau, part: 0.5
    return "has the rates"


def wrong_samples(config: Configuration) -> str:
    config.updates[3] = config.updates[2]
    return "has the samples"


def wrong_number_of_updates(config: Configuration) -> str:
    del config.updates[-1]
    return "has the samples"


@pytest.mark.parametrize("change", [wrong_learning_rate, wrong_samples, wrong_number_of_updates])
def test_check_finds_a_difference(change, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(2001)
    found = change(config)
    monkeypatch.setattr("tests.faults.trained_runs.configuration", lambda seed: config)
    assert found in check(2001)


def test_oracle_simulates_an_epoch_with_a_smaller_last_batch() -> None:
    updates, axis = simulate(7, 2, limit=Limit(2, "epochs"), size=None, accumulate=3, exact=False)
    assert [u.rows for u in updates] == [(0, 1, 2, 3, 4, 5), (6,)] * 2
    assert [u.fraction for u in updates] == [0.0, 3 / 8, 4 / 8, 7 / 8]
    assert axis["samples"] == [0, 6, 7, 13, 14]


def test_oracle_converts_durations_along_a_run_with_a_growing_batch() -> None:
    updates, axis = simulate(
        30,
        1,
        limit=Limit(4, "steps"),
        size=lambda consumed: 2 if consumed("steps") < 2 else 6,
        accumulate=1,
        exact=True,
    )
    assert [len(u.rows) for u in updates] == [2, 2, 6, 6]
    assert Part(axis).share(Length(10, "samples")) == 0.75
    assert Part(axis).share(Length(10, "samples"), stop=1.0) == pytest.approx(5 / 12)
    assert Part(axis).sub(0.5, 0.5).share(Length(6, "samples")) == 0.5
