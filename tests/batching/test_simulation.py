"""The simulated run, compared with loops over single batches and single samples."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_bigopt.batching import (
    BatchContext,
    BatchSizePolicy,
    BatchSizeRamp,
    BatchSizeSteps,
    ConstantBatchSize,
    FullBatch,
    NoiseScaleBatchSize,
    SchedulePolicy,
    SingleSample,
    plan_at,
    planned_sizes,
    simulate,
    simulate_exact,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.schedules import Linear


@dataclass
class Setting:
    """Arguments of a run, for ``simulate`` and for the loops."""

    policy: BatchSizePolicy
    clock: str
    budget: float
    micro: int
    world: int
    batches_per_epoch: int | None
    last: int | None

    @property
    def samples_per_epoch(self):
        if self.batches_per_epoch is None:
            return None
        last = self.last or self.micro
        return ((self.batches_per_epoch - 1) * self.micro + last) * self.world

    def simulate(self):
        return simulate(
            self.policy,
            clock=self.clock,
            budget=self.budget,
            micro_batch_size=self.micro,
            world_size=self.world,
            batches_per_epoch=self.batches_per_epoch,
            last_batch_samples=self.last,
        )


def progress_of(setting, steps, batches, samples, epochs):
    used = {"steps": steps, "batches": batches, "samples": samples}
    return Progress(
        fraction=used[setting.clock] / setting.budget,
        steps=steps,
        batches=batches,
        epochs=epochs,
        samples=samples,
    ), used[setting.clock] >= setting.budget


def loop_over_batches(setting):
    """Loops over single batches; returns (batches, samples) of each update."""
    updates, steps, batches, samples, place = [], 0, 0, 0, 0
    each = setting.batches_per_epoch
    while True:
        epochs = batches / each if each else 0.0
        progress, over = progress_of(setting, steps, batches, samples, epochs)
        if over:
            return updates
        plan = plan_at(
            setting.policy,
            progress=progress,
            micro_batch_size=setting.micro,
            world_size=setting.world,
            context=BatchContext(samples_per_epoch=setting.samples_per_epoch),
        )
        mine = [0, 0]
        for _ in range(plan.accumulate):
            place += 1
            is_last = place == each
            mine[0] += 1
            mine[1] += ((setting.last or setting.micro) if is_last else setting.micro) * (
                setting.world
            )
            if is_last:
                place = 0
                break
        updates.append(tuple(mine))
        steps, batches, samples = steps + 1, batches + mine[0], samples + mine[1]


def unrolled(horizon):
    return [(s.batches, s.samples) for s in horizon.spans for _ in range(s.updates)]


@st.composite
def run_settings(draw):
    micro, world = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))
    grain = micro * world
    each = draw(st.none() | st.integers(1, 40))
    last = draw(st.none() | st.integers(1, micro)) if each else None
    units = ["%", " steps", " samples"] + [" epochs"] * bool(each)
    clock = draw(st.sampled_from(["steps", "batches", "samples"]))
    scale = {"steps": 1, "batches": 1, "samples": grain}[clock]

    def duration():
        return f"{draw(st.integers(1, 100))}{draw(st.sampled_from(units))}"

    def size(most):
        return grain * draw(st.integers(1, most))

    kind = draw(st.sampled_from(["constant", "steps", "ramp", "full", "schedule"]))
    try:
        if kind == "constant":
            policy = ConstantBatchSize(size(9))
        elif kind == "steps":
            policy = BatchSizeSteps({"0%": size(3), **{duration(): size(9) for _ in range(3)}})
        elif kind == "ramp":
            policy = BatchSizeRamp(start=size(5), end=size(20), over=duration())
        elif kind == "full":
            policy = FullBatch()
        else:
            policy = SchedulePolicy(Linear(start=1.0, end=float(size(5))), base=grain)
    except ValueError:
        assume(False)
    assume(kind != "full" or each)
    budget = draw(st.integers(1, 300)) * scale + draw(st.sampled_from([0, 0.5]))
    return Setting(policy, clock, budget, micro, world, each, last)


@pytest.mark.slow
@given(run_settings())
@settings(max_examples=200, deadline=None)
def test_simulation_equals_the_loop_over_batches(setting):
    horizon = setting.simulate()
    assert unrolled(horizon) == loop_over_batches(setting)
    assert (horizon.clock, horizon.budget) == (setting.clock, setting.budget)
    assert horizon.batches_per_epoch == setting.batches_per_epoch
    assert all(span.tokens is None for span in horizon.spans)


@given(run_settings())
@settings(max_examples=100, deadline=None)
def test_windows_cover_every_batch_and_the_last_update_starts_inside_the_budget(setting):
    assume(setting.batches_per_epoch is not None)
    each, updates = setting.batches_per_epoch, unrolled(setting.simulate())
    place = 0
    for index, (batches, samples) in enumerate(updates):
        place += batches
        assert place <= each or index == 0, "a window crosses an epoch"
        full = batches * setting.micro * setting.world
        missing = (setting.micro - (setting.last or setting.micro)) * setting.world
        assert samples == full - (missing if place == each else 0)
        place %= each
    index = ["steps", "batches", "samples"].index(setting.clock)
    amounts = [(1, b, s)[index] for b, s in updates]
    assert sum(amounts[:-1]) < setting.budget <= sum(amounts)


# ------------------------------------------------------------------------------ exact loader


def loop_over_samples(setting):
    """Loops over single samples, as on the exact loader; returns (batches, samples)."""
    updates, steps, batches, samples, place = [], 0, 0, 0, 0
    length = setting.samples_per_epoch
    while True:
        progress, over = progress_of(setting, steps, batches, samples, samples / length)
        if over:
            return updates
        size = setting.policy(progress, context=BatchContext(samples_per_epoch=length))
        taken = 0
        while taken < size and place + taken < length:
            taken += 1
        place = (place + taken) % length
        most = setting.micro * setting.world
        mine = (sum(1 for _ in range(0, taken, most)), taken)
        updates.append(mine)
        steps, batches, samples = steps + 1, batches + mine[0], samples + taken


@given(run_settings(), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_exact_simulation_equals_the_loop_over_samples(setting, odd):
    assume(setting.clock != "batches" and setting.batches_per_epoch)
    if isinstance(setting.policy, ConstantBatchSize):
        setting.policy = ConstantBatchSize(odd)
    horizon = simulate_exact(
        setting.policy,
        clock=setting.clock,
        budget=setting.budget,
        micro_batch_size=setting.micro,
        world_size=setting.world,
        samples_per_epoch=setting.samples_per_epoch,
    )
    assert unrolled(horizon) == loop_over_samples(setting)


@given(run_settings(), st.data())
@settings(max_examples=50, deadline=None)
def test_planned_sizes_equal_the_simulated_run_from_any_update(setting, data):
    assume(setting.clock != "batches" and setting.batches_per_epoch)
    length = setting.samples_per_epoch
    updates = loop_over_samples(setting)
    first = data.draw(st.integers(0, len(updates) - 1))
    batches, samples = (sum(u[i] for u in updates[:first]) for i in (0, 1))
    start, _ = progress_of(setting, first, batches, samples, samples / length)
    place = samples % length
    sizes = list(
        planned_sizes(
            setting.policy,
            start=start,
            position=place,
            clock=setting.clock,
            budget=setting.budget,
            micro_batch_size=setting.micro,
            world_size=setting.world,
            samples_per_epoch=length,
        )
    )
    for size, (_, expected) in zip(sizes, updates[first:], strict=False):
        assert min(size, length - place) == expected
        place += expected
    assert sum(sizes[:-1]) < length - samples % length <= sum(sizes)


# ------------------------------------------------------------------------------------- speed


def best_seconds(function, *, times=5):
    def once():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return min(once() for _ in range(times))


def test_million_constant_updates_take_milliseconds():
    def run():
        horizon = simulate(
            ConstantBatchSize(32),
            clock="steps",
            budget=1_000_000,
            micro_batch_size=8,
            world_size=2,
            batches_per_epoch=100_001,
            last_batch_samples=3,
        )
        assert horizon.total("steps") == 1_000_000

    assert best_seconds(run) < 5e-3  # 0.2 ms on an idle machine


def test_ramp_takes_microseconds_per_update():
    updates = 100_000
    ramp = BatchSizeRamp(start=16, end=1024, over="30%")

    def run():
        simulate(
            ramp,
            clock="steps",
            budget=updates,
            micro_batch_size=8,
            world_size=2,
            batches_per_epoch=12_345,
        )

    assert best_seconds(run) / updates < 5e-6  # much less on an idle machine


def test_equal_updates_are_one_span():
    horizon = simulate(
        BatchSizeSteps({"0%": 16, "50%": 32}),
        clock="steps",
        budget=1000,
        micro_batch_size=16,
        world_size=1,
        batches_per_epoch=100,
    )
    assert [(s.updates, s.batches) for s in horizon.spans] == [(500, 1), (500, 2)]
    assert horizon.total("samples") == 500 * 48


# -------------------------------------------------------------------------------- bad input

GOOD = {
    "clock": "steps",
    "budget": 10,
    "micro_batch_size": 8,
    "world_size": 2,
    "batches_per_epoch": 10,
}


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        (
            NoiseScaleBatchSize(32, high=64),
            {},
            r"adaptive NoiseScaleBatchSize; write the durations",
        ),
        (ConstantBatchSize(40), {}, r"size must be a multiple .* got 40; write 32 or 48"),
        (SingleSample(), {}, r"SingleSample\(\) must be at least"),
        (ConstantBatchSize(32), {"budget": 0}, r"budget must be positive and finite, got 0"),
        (ConstantBatchSize(32), {"budget": float("inf")}, r"budget must be positive and finite"),
        (ConstantBatchSize(32), {"last_batch_samples": 9}, r"last_batch_samples must be from 1 to"),
        (ConstantBatchSize(32), {"last_batch_samples": 0}, r"last_batch_samples must be from 1 to"),
        (
            FullBatch(),
            {"batches_per_epoch": None},
            r"samples_per_epoch must be known for FullBatch",
        ),
    ],
)
def test_invalid_arguments_raise(policy, changes, message):
    with pytest.raises(ValueError, match=message):
        simulate(policy, **{**GOOD, **changes})


def test_policy_that_returns_no_positive_size_raises_in_the_run():
    class ReturnsZero(BatchSizePolicy):
        def __call__(self, progress, *, context=None):
            return 16 - 8 * progress.steps

    with pytest.raises(
        ValueError, match=r"the global batch of ReturnsZero must be a positive .* got 0"
    ):
        simulate(ReturnsZero(), **{**GOOD, "micro_batch_size": 4, "world_size": 1})


def test_run_in_tokens_holds_percentages_and_raises_for_other_units():
    for policy, clock in (
        (ConstantBatchSize(32), "tokens"),
        (BatchSizeSteps("0:16 1M:32"), "steps"),
    ):
        horizon = simulate(policy, **{**GOOD, "clock": clock})
        assert horizon.fraction("10%") == 0.1
        with pytest.raises(ValueError, match=r"warmup must be in .* or percent here"):
            horizon.fraction("3 samples", name="warmup")


def test_invalid_arguments_of_the_exact_loader_raise():
    arguments = {k: v for k, v in GOOD.items() if k != "batches_per_epoch"}
    arguments["samples_per_epoch"] = 50
    with pytest.raises(ValueError, match=r"clock must be .* got 'batches'; count epochs as"):
        simulate_exact(ConstantBatchSize(7), **{**arguments, "clock": "batches"})
    start = Progress(fraction=0.0)
    with pytest.raises(ValueError, match=r"adaptive NoiseScaleBatchSize"):
        planned_sizes(NoiseScaleBatchSize(8, high=9), start=start, position=0, **arguments)
    message = r"thresholds and budget must not be in tokens .* write them in samples or percent"
    with pytest.raises(ValueError, match=message):
        planned_sizes(BatchSizeSteps("0:8 1K:9"), start=start, position=0, **arguments)
    arguments["clock"] = "tokens"
    with pytest.raises(ValueError, match=message):
        planned_sizes(ConstantBatchSize(8), start=start, position=0, **arguments)
