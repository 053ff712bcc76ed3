"""Extending, branching and changing a run: what is used, and what is said about it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    Cosine,
    LearningRateScheduler,
    Linear,
    WarmupStableDecay,
)
from tests.kit import QUIET, Probe, ResumableLoader

WSD = WarmupStableDecay(warmup="10%", decay="20%", cooldown="linear")


def fit(
    module: L.LightningModule, scheduler: Any, *others: Any, ckpt: Any = None, **options: Any
) -> L.Trainer:
    callbacks = [*([] if scheduler is None else [scheduler]), *others]
    trainer = L.Trainer(**{**QUIET, "max_steps": 20, "callbacks": callbacks, **options})
    trainer.fit(module, ResumableLoader(8, 2), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def saved(
    tmp_path: Path, scheduler: Any, *, lr: float = 1.0, ckpt: Any = None, **options: Any
) -> Path:
    """A run saved after every update."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Probe(lr=lr), scheduler, checkpoint, ckpt=ckpt, enable_checkpointing=True, **options)
    return tmp_path


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if "Changed" in r.getMessage())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return caplog


# ------------------------------------------------------------------------------------- cooldown


@pytest.mark.parametrize(
    ("cooldown", "updates"), [("20%", 4), ("5 steps", 5), (3, 3), ("16 samples", 8)]
)
@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_a_cooldown_starts_where_the_checkpoint_stopped_and_ends_the_run(
    tmp_path: Path, cooldown: Any, updates: int, shape: Any, log: Any
) -> None:
    folder = saved(tmp_path, LearningRateScheduler(WSD))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(
        WSD, on_resume="cooldown", cooldown=cooldown, cooldown_shape=shape, cooldown_end=0.1
    )
    trainer = fit(module, scheduler, ckpt=folder / "step=7.ckpt", max_steps=1000)
    shapes = {"linear": lambda r: 1 - r, "1-sqrt": lambda r: 1 - r**0.5}
    wanted = [0.1 + 0.9 * shapes[shape](t / updates) for t in range(updates)]
    assert module.lrs == pytest.approx(wanted, abs=1e-12)
    assert trainer.global_step == 7 + updates
    assert f"cooldown: from 0.35 to {0.35 + updates / 20:.4g} of the budget" in said(log)


def test_a_cooldown_may_end_beyond_the_budget_of_the_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, LearningRateScheduler(Constant()))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(
        Constant(), on_resume="cooldown", cooldown="50%", cooldown_shape="linear"
    )
    trainer = fit(module, scheduler, ckpt=folder / "step=15.ckpt", max_steps=-1, max_epochs=-1)
    assert module.lrs == pytest.approx([1 - t / 10 for t in range(10)], abs=1e-12)
    assert trainer.global_step == 25


def test_the_trainers_own_limit_still_ends_the_run_and_that_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path, LearningRateScheduler(Constant()))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(Constant(), on_resume="cooldown", cooldown="8 steps")
    with pytest.warns(UserWarning, match="stops at 18 steps, before the cooldown ends at 23"):
        fit(module, scheduler, ckpt=folder / "step=15.ckpt", max_steps=18)
    assert len(module.lrs) == 3


@pytest.mark.parametrize("mode", ["cooldown", "continue"])
def test_an_interrupted_cooldown_goes_on_to_the_bit(tmp_path: Path, mode: Any) -> None:
    stable = saved(tmp_path / "stable", LearningRateScheduler(WSD)) / "step=8.ckpt"

    def branch(mode: Any = "cooldown") -> LearningRateScheduler:
        more = {"cooldown": "30%"} if mode == "cooldown" else {}
        return LearningRateScheduler(WSD, on_resume=mode, **more)

    with pytest.warns(UserWarning, match="dirpath has changed"):
        saved(tmp_path / "branch", branch(), ckpt=stable)
    straight, resumed = Probe(lr=1.0), Probe(lr=1.0)
    fit(straight, branch(), ckpt=stable)
    fit(resumed, branch(mode), ckpt=tmp_path / "branch" / "step=11.ckpt")
    assert len(straight.lrs) == 6
    assert resumed.lrs == straight.lrs[3:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_checkpoint_nothing_cools_down() -> None:
    module = Probe(lr=1.0)
    fit(module, LearningRateScheduler(WSD, on_resume="cooldown", cooldown="20%"))
    assert module.lrs == pytest.approx(WSD.values(20))


@pytest.mark.parametrize("options", [{"on_resume": "cooldown"}, {"cooldown": "10%"}])
def test_a_cooldown_needs_its_length_and_its_mode(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cooldown must be given with on_resume='cooldown'"):
        LearningRateScheduler(WSD, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cooldown": "0 steps"}, "cooldown must be positive"),
        ({"cooldown": "soon"}, "cooldown must be a duration"),
        ({"cooldown": "9%", "cooldown_shape": "x"}, "cooldown_shape must be one of 'linear'"),
        ({"cooldown": "9%", "cooldown_end": 2.0}, "cooldown_end must be from 0 to 1, got 2.0"),
    ],
)
def test_bad_cooldowns_name_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateScheduler(WSD, on_resume="cooldown", **options)


# --------------------------------------------------------------------------------------- extend


def test_a_stable_run_extends_without_a_jump_and_cools_down_at_the_new_end(
    tmp_path: Path, log: Any
) -> None:
    folder = saved(tmp_path, LearningRateScheduler(WSD))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(WSD, on_resume="extend")
    fit(module, scheduler, ckpt=folder / "step=12.ckpt", max_steps=40)
    assert module.lrs == WSD.values(40)[12:]
    assert "budget: 20 steps → 40 steps" in said(log)


def test_extending_a_run_that_has_cooled_down_says_by_how_much_it_jumps(tmp_path: Path) -> None:
    folder = saved(tmp_path, LearningRateScheduler(WSD))
    module = Probe(lr=2.0)
    with pytest.warns(UserWarning, match=r"jumps where the run is resumed: 0\.5 → 1 \(× 2\)"):
        fit(
            module,
            LearningRateScheduler(WSD, on_resume="extend"),
            ckpt=folder / "step=18.ckpt",
            max_steps=40,
        )
    assert module.lrs == WSD.values(40)[18:]


# --------------------------------------------------------------------------------- what changed


def test_another_schedule_is_used_from_here_on_and_named(tmp_path: Path, log: Any) -> None:
    folder = saved(tmp_path, LearningRateScheduler(Constant()))
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"jumps where the run is resumed: 1 → 0\.5"):
        fit(module, LearningRateScheduler(Linear()), ckpt=folder / "step=10.ckpt")
    assert module.lrs == [1 - t / 20 for t in range(10, 20)]
    assert "schedule: Constant(" in said(log)
    assert "→ Linear(start=1.0, end=0.0)" in said(log)


@pytest.mark.parametrize("owner", ["checkpoint", "config"])
def test_who_owns_the_base_learning_rate(tmp_path: Path, owner: Any, log: Any) -> None:
    folder = saved(tmp_path, LearningRateScheduler(Cosine()), lr=1.0)
    module = Probe(lr=3.0)
    scheduler = LearningRateScheduler(Cosine(), base_lr=owner)
    if owner == "config":
        with pytest.warns(UserWarning, match=r"jumps .* \(× 3\)"):
            fit(module, scheduler, ckpt=folder / "step=5.ckpt")
        assert "base_lrs: 1 → 3" in said(log)
    else:
        fit(module, scheduler, ckpt=folder / "step=5.ckpt")
        assert not said(log)
    base = 3.0 if owner == "config" else 1.0
    assert module.lrs == [base * factor for factor in Cosine().values(20)[5:]]


def test_nothing_is_said_where_nothing_changed(tmp_path: Path, log: Any) -> None:
    folder = saved(tmp_path, LearningRateScheduler(WSD))
    fit(Probe(lr=1.0), LearningRateScheduler(WSD), ckpt=folder / "step=13.ckpt")
    assert not said(log)


def test_a_checkpoint_without_our_scheduler_goes_on_with_the_configured_rate(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, None, lr=9.0)
    module = Probe(lr=1.0)
    with pytest.warns(UserWarning, match=r"without LearningRateScheduler.* at 25\.0%.*\(1\)"):
        fit(module, LearningRateScheduler(Linear()), ckpt=folder / "step=5.ckpt")
    assert module.lrs == [1 - t / 20 for t in range(5, 20)]


def test_a_checkpoint_of_ours_resumes_without_us(tmp_path: Path) -> None:
    folder = saved(tmp_path, LearningRateScheduler(Linear()), lr=1.0)
    module = Probe(lr=9.0)
    fit(module, None, ckpt=folder / "step=5.ckpt")
    assert module.lrs == [0.75] * 15  # the optimizer's own state


def test_a_ramp_resumes_in_its_cooldown_with_the_batch_it_had(tmp_path: Path) -> None:
    policy = BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4}))
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 4, "max_steps": -1}
    fit(
        Probe(lr=1.0),
        LearningRateScheduler(Constant()),
        policy,
        checkpoint,
        enable_checkpointing=True,
        **options,
    )
    module = Probe(lr=1.0)
    # 16 batches: eight updates of one batch, then four of two.
    scheduler = LearningRateScheduler(
        Constant(), on_resume="cooldown", cooldown="8 samples", cooldown_shape="linear"
    )
    fit(
        module,
        scheduler,
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4})),
        ckpt=tmp_path / "step=9.ckpt",
        **options,
    )
    assert [len(window) for window in module.windows] == [4, 4]
    assert module.lrs == [1.0, 0.5]
