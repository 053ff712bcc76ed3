"""LearningRateScheduler(on_resume=): cooldown from a checkpoint, and an extended budget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

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
)
from tests.callbacks.resume_helpers import WSD, fit, resume_report, save_every_update
from tests.helpers import Probe

# ------------------------------------------------------------------------------------- cooldown


@pytest.mark.parametrize(
    ("cooldown", "updates"), [("20%", 4), ("5 steps", 5), (3, 3), ("16 samples", 8)]
)
@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_cooldown_starts_at_the_checkpoint_and_ends_the_run(
    tmp_path: Path, cooldown: Any, updates: int, shape: Any, info_log: Any
) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(WSD))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(
        WSD, on_resume="cooldown", cooldown=cooldown, cooldown_shape=shape, cooldown_end=0.1
    )
    trainer = fit(module, scheduler, ckpt=folder / "step=7.ckpt", max_steps=1000)
    shapes = {"linear": lambda r: 1 - r, "1-sqrt": lambda r: 1 - r**0.5}
    wanted = [0.1 + 0.9 * shapes[shape](t / updates) for t in range(updates)]
    assert module.lrs == pytest.approx(wanted, abs=1e-12)
    assert trainer.global_step == 7 + updates
    assert f"cooldown: from 0.35 to {0.35 + updates / 20:.4g} of the budget" in resume_report(
        info_log
    )


def test_cooldown_may_end_beyond_the_budget_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Constant()))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(
        Constant(), on_resume="cooldown", cooldown="50%", cooldown_shape="linear"
    )
    trainer = fit(module, scheduler, ckpt=folder / "step=15.ckpt", max_steps=-1, max_epochs=-1)
    assert module.lrs == pytest.approx([1 - t / 10 for t in range(10)], abs=1e-12)
    assert trainer.global_step == 25


def test_limit_of_the_trainer_ends_the_cooldown_early_with_a_warning(tmp_path: Path) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Constant()))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(Constant(), on_resume="cooldown", cooldown="8 steps")
    with pytest.warns(UserWarning, match="stops at 18 steps, before the cooldown ends at 23"):
        fit(module, scheduler, ckpt=folder / "step=15.ckpt", max_steps=18)
    assert len(module.lrs) == 3


@pytest.mark.parametrize("mode", ["cooldown", "continue"])
def test_interrupted_cooldown_resumes_to_the_bit(tmp_path: Path, mode: Any) -> None:
    stable = save_every_update(tmp_path / "stable", LearningRateScheduler(WSD)) / "step=8.ckpt"

    def branch(mode: Any = "cooldown") -> LearningRateScheduler:
        more = {"cooldown": "30%"} if mode == "cooldown" else {}
        return LearningRateScheduler(WSD, on_resume=mode, **more)

    with pytest.warns(UserWarning, match="dirpath has changed"):
        save_every_update(tmp_path / "branch", branch(), ckpt=stable)
    straight, resumed = Probe(lr=1.0), Probe(lr=1.0)
    fit(straight, branch(), ckpt=stable)
    fit(resumed, branch(mode), ckpt=tmp_path / "branch" / "step=11.ckpt")
    assert len(straight.lrs) == 6
    assert resumed.lrs == straight.lrs[3:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("schedule", "at", "end", "flat"),
    [
        (WSD, 20, 0.0, "0"),
        (Linear(), 20, 0.0, "0"),
        (Linear(end=0.1), 20, 0.1, "0.1"),
        (Linear(), 16, 0.3, "0.2"),
        (WSD, 17, 0.0, None),
        (Linear(end=0.1), 20, 0.0, None),
        (Constant(), 20, 0.0, None),
    ],
)
def test_cooldown_from_its_end_value_warns(
    tmp_path: Path, schedule: Any, at: int, end: float, flat: str | None
) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(schedule))
    module, options = Probe(), {"cooldown": "4 steps", "cooldown_end": end}
    scheduler = LearningRateScheduler(schedule, on_resume="cooldown", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, scheduler, ckpt=folder / f"step={at}.ckpt", max_steps=40)
    found = [str(w.message) for w in caught if "the whole cooldown" in str(w.message)]
    assert len(module.lrs) == 4
    assert (len(set(module.lrs)) == 1) == (flat is not None) == bool(found)
    if flat is not None:
        assert module.lrs == pytest.approx([float(flat)] * 4)
        assert f"uses {flat} times the base learning rate" in found[0]


def test_cooldown_of_groups_of_which_one_has_not_decayed_does_not_warn(tmp_path: Path) -> None:
    class Groups(Probe):
        def configure_optimizers(self) -> Any:
            parts = {"body": self.net[0], "head": self.net[2]}
            groups = [{"params": part.parameters(), "name": name} for name, part in parts.items()]
            return torch.optim.SGD(groups, lr=1.0)

    path = tmp_path / "end.ckpt"
    options: dict[str, Any] = {"groups": {"head": Constant()}}
    schedulers = [
        LearningRateScheduler(Linear(), **options, **more)
        for more in ({}, {"on_resume": "cooldown", "cooldown": "4 steps"})
    ]
    fit(Groups(), schedulers[0]).save_checkpoint(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The schedule has decayed")
        fit(Groups(), schedulers[1], ckpt=path, max_steps=40)


@pytest.mark.parametrize("limits", [{"max_steps": -1, "max_epochs": 50}, {"max_steps": 30}])
@pytest.mark.parametrize(("at", "budget"), [(20, 24), (20, 12), (8, 24), (8, 12)])
def test_checkpoint_that_continues_under_an_explicit_budget(
    tmp_path: Path, at: int, budget: int, limits: dict[str, Any]
) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Linear()))
    module, scheduler = Probe(), LearningRateScheduler(Linear(), budget=f"{budget} steps")
    outcome = "this budget is spent, so that no update is trained"
    if at == 8:
        outcome = "the run ends after 20 steps, or at a limit of the Trainer if that is earlier"
    with pytest.warns(UserWarning, match=f"for 20 steps, .* set to {budget} steps.*: {outcome}"):
        fit(module, scheduler, ckpt=folder / f"step={at}.ckpt", **limits)
    assert module.lrs == pytest.approx([1 - step / 20 for step in range(at, 20)])


def test_resume_into_a_time_reports_its_changes(tmp_path: Path, info_log: Any) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(Linear()))
    scheduler = LearningRateScheduler(
        Cosine(), budget="1 hour", on_resume="extend", base_lr="config"
    )
    with pytest.warns(UserWarning, match=r"learning rate jumps .*: 0.75 → "):
        fit(Probe(lr=3.0), scheduler, ckpt=folder / "step=5.ckpt", max_steps=7)
    report = resume_report(info_log)
    assert "base_lrs: 1 → 3" in report
    assert "budget: 20 steps → 3600 seconds" in report


def test_without_a_checkpoint_there_is_no_cooldown() -> None:
    module = Probe(lr=1.0)
    fit(module, LearningRateScheduler(WSD, on_resume="cooldown", cooldown="20%"))
    assert module.lrs == pytest.approx(WSD.values(20))


@pytest.mark.parametrize("options", [{"on_resume": "cooldown"}, {"cooldown": "10%"}])
def test_cooldown_must_be_given_with_its_mode(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cooldown must be given with on_resume='cooldown'"):
        LearningRateScheduler(WSD, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cooldown": "0 steps"}, "cooldown must be positive"),
        ({"cooldown": "soon"}, "cooldown must be a duration"),
        ({"cooldown": "9%", "cooldown_shape": "x"}, "cooldown_shape must be 'linear'"),
        ({"cooldown": "9%", "cooldown_end": 2.0}, "cooldown_end must be in \\[0, 1\\], got 2.0"),
    ],
)
def test_invalid_cooldowns_raise_with_their_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateScheduler(WSD, on_resume="cooldown", **options)


# --------------------------------------------------------------------------------------- extend


def test_run_extended_before_its_decay_has_no_jump(tmp_path: Path, info_log: Any) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(WSD))
    module = Probe(lr=1.0)
    scheduler = LearningRateScheduler(WSD, on_resume="extend")
    fit(module, scheduler, ckpt=folder / "step=12.ckpt", max_steps=40)
    assert module.lrs == WSD.values(40)[12:]
    assert "budget: 20 steps → 40 steps" in resume_report(info_log)


def test_run_extended_during_its_decay_warns_of_the_jump(tmp_path: Path) -> None:
    folder = save_every_update(tmp_path, LearningRateScheduler(WSD))
    module = Probe(lr=2.0)
    with pytest.warns(UserWarning, match=r"jumps when the run is resumed: 0\.5 → 1 \(× 2\)"):
        fit(
            module,
            LearningRateScheduler(WSD, on_resume="extend"),
            ckpt=folder / "step=18.ckpt",
            max_steps=40,
        )
    assert module.lrs == WSD.values(40)[18:]


def test_cooldown_keeps_the_batch_size_of_the_checkpoint(tmp_path: Path) -> None:
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
