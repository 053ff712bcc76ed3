"""LearningRateScheduler(min_lr=, max_lr=): absolute bounds of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigopt import (
    Backoff,
    BatchSizeScheduler,
    BatchSizeSteps,
    Chain,
    Constant,
    CosineWithRestarts,
    InverseSquareRoot,
    LearningRateScheduler,
    Linear,
    ReduceOnPlateau,
    Schedule,
    StepGuard,
    TriStage,
    Warmup,
    WarmupConstant,
    WarmupCosine,
    WarmupStableDecay,
    plan,
)
from lightning_bigopt.durations import Progress
from lightning_bigopt.optimizers.group_schedule import GroupSchedule
from tests.bad_batches import BadBatchModule
from tests.helpers import Probe, ResumableLoader, fit, loader
from tests.schedules import strategies as some

BASES = (1.0, 0.1, 3.0)
UPDATES = 12


class ThreeGroups(Probe):
    """Records the learning rate of each of three groups."""

    def __init__(self, bases: Sequence[float] = BASES, *, tensors: bool = False) -> None:
        super().__init__()
        self.bases, self.tensors = bases, tensors
        self.group_lrs: list[tuple[float, ...]] = []

    def configure_optimizers(self) -> Any:
        parts = (self.net[0].weight, self.net[0].bias, [*self.net[2].parameters()])
        groups = [
            {"params": part, "lr": torch.tensor(base) if self.tensors else base, "name": name}
            for part, base, name in zip(parts, self.bases, "abc", strict=True)
        ]
        return torch.optim.AdamW(groups, foreach=False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.group_lrs.append(tuple(float(group["lr"]) for group in optimizer.param_groups))


def bounded(
    schedule: Schedule,
    fraction: float,
    base: float,
    *,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """Computes base × factor within the bounds; ``low`` does not apply during the warm-up."""
    value = base * schedule(fraction)
    if high is not None and value > high:
        value = high
    if low is not None and value < low and fraction >= schedule.warmup_end():
        value = low
    return value


SCHEDULES = {
    "linear": Linear(start=1.0, end=0.0),
    "warmup_cosine": WarmupCosine(warmup="25%"),
    "wsd": WarmupStableDecay(warmup="25%", decay="50%", cooldown="linear"),
    "tri_stage": TriStage(warmup="25%", decay="25%"),
    "restarts": CosineWithRestarts(first_cycle="25%"),
    "inverse_sqrt": Warmup("25%", InverseSquareRoot(timescale="25%")),
    "chain": Chain([("25%", Linear(start=0.0, end=1.0)), Linear(start=1.0, end=0.0)]),
}


@pytest.mark.parametrize(
    "bounds",
    [{"min_lr": 0.25}, {"max_lr": 0.5}, {"min_lr": 0.25, "max_lr": 0.5}],
    ids="-".join,
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_update_is_within_the_bounds(name: str, bounds: dict[str, float]) -> None:
    schedule, module = SCHEDULES[name], ThreeGroups()
    fit(module, loader(48, 4), LearningRateScheduler(schedule, **bounds), max_steps=UPDATES)
    low, high = bounds.get("min_lr"), bounds.get("max_lr")
    expected = [
        tuple(bounded(schedule, t / UPDATES, base, low=low, high=high) for base in BASES)
        for t in range(UPDATES)
    ]
    assert module.group_lrs == expected
    values = [value for row in expected for value in row]
    assert (low in values) == ("min_lr" in bounds)  # the bound has an effect
    assert (high in values) == ("max_lr" in bounds)
    after = [value for row in module.group_lrs[UPDATES // 4 :] for value in row]
    assert min(after) >= (low or 0.0)
    assert max(values) <= (high or 3.0)


@given(
    some.anything,
    st.floats(0.0, 1.2),
    st.floats(1e-6, 10.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_bounds_hold_at_every_fraction_of_any_schedule(
    schedule: Schedule, fraction: float, base: float, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    groups = GroupSchedule([("", optimizer)])
    groups.claim("lr")
    groups.follow("lr", lambda *_: schedule, owner=None, minimum=low, maximum=high)
    groups.write(Progress(fraction=fraction))
    found = optimizer.param_groups[0]["lr"]
    assert found == bounded(schedule, fraction, base, low=low, high=high)
    assert found <= high
    assert found >= low or fraction < schedule.warmup_end()


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(warmup="25%"),
        Warmup("25%", Linear()),
        Chain([("25%", Linear(start=0.0, end=1.0)), Constant()]),
        WarmupStableDecay(warmup=3, decay="50%"),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_min_lr_does_not_lift_a_warmup(schedule: Schedule) -> None:
    module = Probe(lr=1.0)
    fit(module, loader(48, 4), LearningRateScheduler(schedule, min_lr=0.5), max_steps=UPDATES)
    assert module.lrs[:3] == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert module.lrs[3] == 1.0
    assert min(module.lrs[3:]) >= 0.5


def test_a_group_whose_peak_is_below_min_lr_gets_min_lr_after_the_warmup() -> None:
    module = Probe(lr=0.1)
    scheduler = LearningRateScheduler(WarmupConstant(warmup="50%"), min_lr=0.3)
    fit(module, loader(48, 4), scheduler, max_steps=UPDATES)
    assert module.lrs == pytest.approx([0.1 * t / 6 for t in range(6)] + [0.3] * 6)


def test_equal_bounds_fix_the_learning_rate() -> None:
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(Linear(), min_lr=0.3, max_lr=0.3)
    fit(module, loader(48, 4), scheduler, max_steps=UPDATES)
    assert module.lrs == [0.3] * UPDATES


def test_bounds_apply_to_named_groups_with_their_own_schedules() -> None:
    module = ThreeGroups((1.0, 1.0, 1.0))
    own = {"a": WarmupCosine(warmup="50%"), "b": Constant()}
    scheduler = LearningRateScheduler(Linear(), groups=own, min_lr=0.4, max_lr=0.8)
    fit(module, loader(48, 4), scheduler, max_steps=UPDATES)
    schedules = (own["a"], own["b"], Linear())
    assert module.group_lrs == [
        tuple(bounded(s, t / UPDATES, 1.0, low=0.4, high=0.8) for s in schedules)
        for t in range(UPDATES)
    ]


def test_a_learning_rate_tensor_is_bounded_in_place() -> None:
    module = ThreeGroups(tensors=True)
    scheduler = LearningRateScheduler(Linear(), min_lr=0.25, max_lr=0.5)
    trainer = fit(module, loader(48, 4), scheduler, max_steps=UPDATES)
    for t, row in enumerate(module.group_lrs):
        expected = [bounded(Linear(), t / UPDATES, base, low=0.25, high=0.5) for base in BASES]
        assert row == pytest.approx(expected, rel=1e-6)
    groups = trainer.optimizers[0].param_groups
    assert all(isinstance(group["lr"], torch.Tensor) for group in groups)


# -------------------------------------------------------------------------- with other callbacks


@pytest.mark.parametrize("rewarmup", [None, "2 steps"])
def test_bounds_apply_after_lr_scaling(rewarmup: str | None) -> None:
    policy = BatchSizeSteps({"0%": 2, "4 steps": 8, "8 steps": 4})

    def run(**bounds: float) -> list[float]:
        module = Probe(lr=0.01)
        scheduler = LearningRateScheduler(Linear(), **bounds)
        batches = BatchSizeScheduler(policy, lr_scaling="linear", rewarmup=rewarmup)
        fit(module, loader(100, 2), scheduler, batches, max_steps=UPDATES)
        return module.lrs

    free, limited = run(), run(min_lr=0.004, max_lr=0.013)
    assert max(free) > 0.013
    assert min(free) < 0.004
    assert limited == [min(max(value, 0.004), 0.013) for value in free]


def test_min_lr_bounds_a_backoff() -> None:
    module = BadBatchModule({2: float("nan"), 3: float("nan")}, lr=1.0)
    guard = StepGuard(actions=[Backoff(factor=0.5, recover=4)])
    fit(
        module,
        ResumableLoader(32, 2),
        LearningRateScheduler(Constant(), min_lr=0.4),
        guard,
        max_epochs=1,
    )
    assert [rejection.update for rejection in guard.rejections] == [2, 3]
    assert module.lrs[3] == 0.5
    assert min(module.lrs) == 0.4
    assert module.lrs[-1] == 1.0


def test_min_lr_bounds_a_plateau() -> None:
    class NeverBetter(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    module = NeverBetter(lr=1.0)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=6,
        callbacks=[
            LearningRateScheduler(Constant(), min_lr=0.3),
            ReduceOnPlateau("val_loss", patience=0, factor=0.5),
        ],
    )
    trainer.fit(module, loader(4, 4), loader(2, 2))
    assert module.lrs == [1.0, 1.0, 0.5, 0.3, 0.3, 0.3]


def test_the_plan_shows_the_bounded_learning_rates() -> None:
    def trainer() -> L.Trainer:
        schedule = WarmupCosine(warmup="25%")
        return L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=UPDATES,
            callbacks=[LearningRateScheduler(schedule, min_lr=0.25, max_lr=0.5)],
        )

    module = ThreeGroups()
    rows = plan(trainer(), module, loader(48, 4)).rows
    trainer().fit(module, loader(48, 4))
    assert [tuple(row.learning_rates.values()) for row in rows] == module.group_lrs


# -------------------------------------------------------------------------- resume and arguments


@pytest.mark.parametrize("base_lr", ["checkpoint", "config"])
@pytest.mark.parametrize("stop", [1, 3, 7, 11])
def test_bounds_resume_to_the_bit(tmp_path: Path, stop: int, base_lr: Any) -> None:
    """Checkpoints inside the warm-up, at its end, and where the lower bound applies."""

    def scheduler() -> LearningRateScheduler:
        schedule = WarmupCosine(warmup="25%")
        return LearningRateScheduler(schedule, min_lr=0.25, max_lr=0.8, base_lr=base_lr)

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, resumed = ThreeGroups(), ThreeGroups()
    data = ResumableLoader(48, 4)
    options: dict[str, Any] = {"max_steps": UPDATES}
    fit(straight, data, scheduler(), checkpoint, enable_checkpointing=True, **options)
    path = tmp_path / f"step={stop}.ckpt"
    fit(resumed, ResumableLoader(48, 4), scheduler(), ckpt_path=path, **options)
    assert 0.25 in straight.group_lrs[-1]
    assert resumed.group_lrs == straight.group_lrs[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("owner", ["checkpoint", "config"])
def test_bounds_of_a_resumed_run_apply_to_the_chosen_bases(tmp_path: Path, owner: Any) -> None:
    path = tmp_path / "six.ckpt"
    trainer = fit(
        ThreeGroups((1.0, 0.1, 3.0)),
        ResumableLoader(48, 4),
        LearningRateScheduler(Constant()),
        max_steps=6,
    )
    trainer.save_checkpoint(path)
    module = ThreeGroups((0.4, 0.6, 0.8))
    scheduler = LearningRateScheduler(
        Constant(), base_lr=owner, on_resume="extend", min_lr=0.3, max_lr=0.7
    )
    with pytest.warns(UserWarning, match="jumps when the run is resumed"):
        fit(module, ResumableLoader(48, 4), scheduler, max_steps=UPDATES, ckpt_path=path)
    expected = (0.7, 0.3, 0.7) if owner == "checkpoint" else (0.4, 0.6, 0.7)
    assert module.group_lrs == [expected] * 6


@pytest.mark.parametrize("name", ["min_lr", "max_lr"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), True, "1e-3", {"a": 0.1}])
def test_invalid_bounds_raise_with_their_names(name: str, value: Any) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^{name} must be (non-negative and finite|a non-negative and finite number), got ",
    ):
        LearningRateScheduler(Linear(), **{name: value})


def test_min_lr_above_max_lr_raises() -> None:
    with pytest.raises(ValueError, match=r"min_lr must be at most max_lr, got min_lr=0\.2 and"):
        LearningRateScheduler(Linear(), min_lr=0.2, max_lr=0.1)


def test_bounds_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LearningRateScheduler, "scheduler")
    text = "scheduler: {schedule: {class_path: Linear}, min_lr: 1.0e-05, max_lr: 0.5}"
    again = parser.parse_string(parser.dump(parser.parse_string(text)))
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    scheduler = build(again).scheduler
    assert (scheduler.min_lr, scheduler.max_lr) == (1e-5, 0.5)
