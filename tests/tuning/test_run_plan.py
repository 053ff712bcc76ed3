"""plan(): compared with the run that follows; boundaries, warnings and the command line."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    GradientClippingMixin,
    GradientNoiseScale,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    Linear,
    WarmupStableDecay,
    ZClip,
)
from lightning_bigopt.cli.__main__ import main
from lightning_bigopt.tuning import plan
from tests.helpers import QUIET, Probe, Regression, loader


def callbacks() -> list[Any]:
    return [
        LearningRateScheduler(WarmupStableDecay(warmup="20%", decay="30%")),
        BatchSizeScheduler(BatchSizeSteps({"0%": 4, "50%": 12})),
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_plan_leaves_the_generator_of_a_loader_as_it_was(workers: int) -> None:
    generator = torch.Generator().manual_seed(4)
    data = DataLoader(Regression(8), shuffle=True, generator=generator, num_workers=workers)
    before = generator.get_state()
    plan(L.Trainer(**QUIET, max_steps=3), Probe(lr=0.3), data)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_steps": 17}, {"limit_train_batches": 9, "max_epochs": 2}]
)
def test_plan_equals_the_run(limits: dict[str, Any]) -> None:
    trainer = L.Trainer(**QUIET, callbacks=callbacks(), **limits)
    module = Probe(lr=0.3)
    before = [p.detach().clone() for p in module.parameters()]
    found = plan(trainer, module, loader(26, 2), points=10_000)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    trainer.fit(module, loader(26, 2))
    assert found.totals["updates"] == trainer.global_step == len(found.rows)
    assert [row.learning_rates["lr"] for row in found.rows] == pytest.approx(module.lrs)
    assert [row.global_batch_size for row in found.rows] == [len(w) for w in module.windows]
    assert found.totals["samples"] == sum(len(w) for w in module.windows)


def test_plan_shows_boundaries_checkpoints_table_and_picture(tmp_path: Path) -> None:
    saves = ModelCheckpoint(every_n_train_steps=250)
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True}, callbacks=[*callbacks(), saves], max_steps=1000
    )
    found = plan(trainer, Probe(), loader(64, 4))
    assert [(b.name, b.update) for b in found.boundaries] == [
        ("warmup ends", 200),
        ("cooldown starts", 700),
    ]
    assert found.checkpoints == ("every 250 updates",)
    text = str(found)
    for piece in ("updates: 1,000", "warmup ends: update 200", "every 250 updates", "accum."):
        assert piece in text, piece
    for name in ("plan.png", "plan.svg"):
        assert found.picture(tmp_path / name).stat().st_size > 5_000


def test_budget_in_tokens_is_planned_by_fractions(tmp_path: Path) -> None:
    schedule = LearningRateScheduler(
        WarmupStableDecay(warmup="20%", decay="30%"),
        budget="1000 tokens",
        tokens=lambda batch: 10 * len(batch[0]),
    )
    trainer = L.Trainer(**QUIET, callbacks=[schedule], max_epochs=-1)
    found = plan(trainer, Probe(lr=1.0), loader(64, 5), points=20)
    assert found.totals == {"tokens": 1000}
    module = Probe(lr=1.0)
    trainer.fit(module, loader(64, 5))  # 50 tokens an update, fewer in the last of an epoch
    rates = {row.tokens: row.learning_rates["lr"] for row in found.rows}
    assert module.lrs[:12] == [pytest.approx(rates[50 * update]) for update in range(12)]
    text = str(found)
    for piece in (
        "warmup ends: 20.0 %",
        "cooldown starts: 70.0 %",
        "tokens  learning rate",
        "counted while training",
    ):
        assert piece in text, piece
    assert "update  " not in text
    assert found.picture(tmp_path / "plan.png").stat().st_size > 5_000


@pytest.mark.parametrize("limits", [{"max_epochs": 8}, {"max_steps": 100}])
def test_boundaries_are_where_the_learning_rate_turns(limits: dict[str, Any]) -> None:
    trainer = L.Trainer(**QUIET, callbacks=callbacks(), **limits)
    found = plan(trainer, Probe(lr=1.0), loader(64, 2), points=10_000)
    rates = [row.learning_rates["lr"] for row in found.rows]
    peak = [update for update, rate in enumerate(rates) if rate == 1.0]
    assert len(set(rates)) > 20  # it increases and decreases
    ends, starts = found.boundaries
    assert (ends.name, starts.name) == ("warmup ends", "cooldown starts")
    assert ends.update == peak[0]
    assert starts.update - peak[-1] in (0, 1)  # at the start of the cooldown the factor is still 1


def plan_warnings(trainer: L.Trainer, module: Any) -> str:
    return "\n".join(plan(trainer, module, loader(64, 4)).warnings)


def test_trainer_without_a_limit_gives_a_warning() -> None:
    assert "will run 1000 epochs" in plan_warnings(L.Trainer(**QUIET), Probe())


@pytest.mark.parametrize("limits", [{"max_epochs": 1000}, {"max_steps": 10}])
def test_trainer_with_a_limit_gives_no_warning(limits: dict[str, Any]) -> None:
    assert "1000 epochs" not in plan_warnings(L.Trainer(**QUIET, **limits), Probe())


def test_two_optimizers_of_one_class_have_separate_learning_rates() -> None:
    class TwoSGD(Probe):
        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            return (
                torch.optim.SGD(parameters[:2], lr=0.1),
                torch.optim.SGD(parameters[2:], lr=0.2),
            )

    schedule = LearningRateScheduler(Linear(start=1.0, end=0.0), optimizers={"SGD-1": Constant()})
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[schedule])
    module = TwoSGD()
    module.automatic_optimization = False
    rows = plan(trainer, module, loader(64, 4)).rows
    assert rows[2].learning_rates == {"SGD-0": 0.05, "SGD-1": 0.2}


class Adafactor(Probe):
    """Its groups hold no learning rate, as with relative steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer


def test_optimizer_without_a_learning_rate_has_none_in_the_plan() -> None:
    found = plan(L.Trainer(**QUIET, max_steps=10), Adafactor(), loader(16, 4))
    assert found.totals["updates"] == 10
    assert all(not row.learning_rates for row in found.rows)
    assert "updates: 10" in str(found)


def test_warmup_longer_than_the_run_gives_a_warning() -> None:
    schedule = LearningRateScheduler(WarmupStableDecay(warmup="500 steps", decay="10%"))
    trainer = L.Trainer(**QUIET, max_steps=100, callbacks=[schedule])
    assert "warmup" in plan_warnings(trainer, Probe())


def test_constant_learning_rate_gives_a_warning() -> None:
    trainer = L.Trainer(**QUIET, max_steps=100, callbacks=[LearningRateScheduler(Constant())])
    assert "never decays" in plan_warnings(trainer, Probe())
    decaying = LearningRateScheduler(Linear(start=1.0, end=0.0))
    trainer = L.Trainer(**QUIET, max_steps=100, callbacks=[decaying])
    assert "never decays" not in plan_warnings(trainer, Probe())


@pytest.mark.parametrize(("options", "expected"), [({}, True), ({"fused": True}, False)])
def test_optimizer_that_could_be_fused_gives_a_warning(options: Any, expected: bool) -> None:
    trainer = L.Trainer(**QUIET, max_steps=100)
    text = plan_warnings(trainer, Probe(optimizer=torch.optim.AdamW, **options))
    assert ("is not fused" in text) is expected


def test_max_micro_batch_size_is_planned_as_it_is_trained() -> None:
    def trainer() -> L.Trainer:
        capped = BatchSizeScheduler(ConstantBatchSize(16), max_micro_batch_size=4)
        return L.Trainer(**QUIET, max_epochs=1, callbacks=[capped])

    def data() -> GlobalBatchLoader:
        return GlobalBatchLoader(Regression(32), micro_batch_size=8)

    planned, module = plan(trainer(), Probe(), data()), Probe()
    trainer().fit(module, data())
    assert [row.accumulate for row in planned.rows] == [4] * len(planned.rows)
    assert module.accumulations == [4] * 8


def test_zero_points_and_a_folder_as_picture_raise(tmp_path: Path) -> None:
    trainer = L.Trainer(**QUIET, max_steps=3)
    with pytest.raises(ValueError, match="points must be a positive number of updates, got 0"):
        plan(trainer, Probe(), loader(8, 2), points=0)
    with pytest.raises(ValueError, match=r"path must be the name of a file, got the folder"):
        plan(trainer, Probe(), loader(8, 2)).picture(tmp_path)


def test_swapped_arguments_raise() -> None:
    trainer, module = L.Trainer(**QUIET, max_steps=3), Probe()
    with pytest.raises(
        ValueError, match=r"trainer must be a Trainer, got .*; write plan\(trainer, m"
    ):
        plan(module, trainer, loader(8, 2))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"module must be a Module, got a DataLoader; write plan\("
    ):
        plan(trainer, loader(8, 2))


def test_several_processes_are_planned_without_starting_them() -> None:
    trainer = L.Trainer(
        **QUIET, max_epochs=1, devices=2, strategy=DDPStrategy(), accumulate_grad_batches=2
    )
    found = plan(trainer, Probe(), DataLoader(Regression(64), batch_size=4))
    assert found.totals == {"updates": 4, "samples": 64, "epochs": 1}
    assert found.rows[0].global_batch_size == 16


def test_noise_scale_on_several_processes_is_planned() -> None:
    callbacks = [GradientNoiseScale(), LearningRateScheduler(Linear())]
    trainer = L.Trainer(
        **QUIET, max_steps=4, devices=2, strategy=DDPStrategy(), callbacks=callbacks
    )
    found = plan(trainer, Probe(), DataLoader(Regression(64), batch_size=4))
    assert found.rows[0].global_batch_size == 8


class ModuleWithData(Probe):
    def train_dataloader(self) -> Any:
        return loader(32, 4)


def test_command_plans_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
        trainer:
          max_epochs: 4
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          callbacks:
            - class_path: lightning_bigopt.LearningRateScheduler
              init_args:
                schedule:
                  class_path: lightning_bigopt.WarmupCosine
                  init_args: {warmup: 25%}
        model:
          class_path: tests.tuning.test_run_plan.ModuleWithData
        """
    )
    picture = tmp_path / "plan.png"
    assert main(["plan", str(config), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "updates: 32" in shown
    assert "warmup ends: update 8" in shown
    assert picture.exists()


def test_plan_gives_no_warnings_of_lightning() -> None:
    class Validated(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    trainer = L.Trainer(**QUIET, callbacks=callbacks(), max_steps=4)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        plan(trainer, Validated(), loader(26, 2))
    assert not [str(w.message) for w in given if issubclass(w.category, PossibleUserWarning)]


class WithMixins(LearningRateScheduleMixin, GradientClippingMixin, Probe):
    def configure_learning_rate_schedule(self) -> Linear:
        return Linear()

    def configure_clipping_rule(self) -> ZClip:
        return ZClip()


def test_plan_of_a_module_with_mixins_equals_the_run(tmp_path: Path) -> None:
    class Checkpointed(WithMixins):
        def configure_callbacks(self) -> list[Any]:
            saves = ModelCheckpoint(tmp_path, every_n_train_steps=3)
            return [*super().configure_callbacks(), saves]

    options = {**QUIET, "enable_checkpointing": True}
    trainer, module = L.Trainer(**options, max_steps=8), Checkpointed(lr=0.3)
    found = plan(trainer, module, loader(26, 2), points=100)
    assert found.checkpoints == ("every 3 updates",)
    trainer.fit(module, loader(26, 2))
    assert [row.learning_rates["lr"] for row in found.rows] == pytest.approx(module.lrs)


def test_plan_between_two_fits_does_not_change_the_second_fit() -> None:
    def run(planned: bool) -> tuple[list[float], list[Any]]:
        trainer, module = L.Trainer(**QUIET, max_epochs=1), WithMixins(lr=0.3)
        trainer.fit(module, loader(16, 2))
        trainer.fit_loop.max_epochs = 2
        if planned:
            plan(trainer, module, loader(16, 2))
        trainer.fit(module, loader(16, 2))
        state = [c.state_dict() for c in trainer.callbacks if isinstance(c, GradientClipping)]
        return module.lrs, state

    planned, plain = run(True), run(False)
    assert planned[0] == plain[0]
    assert str(planned[1]) == str(plain[1])


class SeveralOptimizers(Probe):
    """Steps four optimizers in every batch, and records the step and the learning rate before."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: dict[int, float] = {}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in self.net.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.seen[self.trainer.global_step] = optimizers[0].param_groups[0]["lr"]
        for optimizer in optimizers:
            optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Disabled: there are no gradients."""


def test_plan_of_several_optimizers_is_right_by_step_and_names_a_way_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler = LearningRateScheduler(Linear())
    trainer = L.Trainer(**QUIET, callbacks=[scheduler], max_steps=8)
    module, data = SeveralOptimizers(), loader(26, 2)
    found = plan(trainer, module, data)
    (text,) = [w for w in found.warnings if "max_steps counts the steps of all 4 optimizers" in w]
    assert "write durations in steps or percent, or limit the run by max_epochs" in text
    assert "max_steps=4 * N" in text
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    assert any(text in message for message in caplog.messages)
    planned = {row.update: next(iter(row.learning_rates.values())) for row in found.rows}
    assert module.seen == pytest.approx({0: 0.1, 4: 0.05})
    assert module.seen == pytest.approx({step: planned[step] for step in module.seen})


def test_plan_of_several_optimizers_under_max_epochs_is_right_by_fraction() -> None:
    scheduler = LearningRateScheduler(Linear())
    trainer = L.Trainer(**QUIET, callbacks=[scheduler], max_epochs=2)
    module, data = SeveralOptimizers(), loader(8, 2)
    found = plan(trainer, module, data)
    (text,) = [w for w in found.warnings if "steps of all 4 optimizers" in w]
    assert text.endswith("write durations in epochs or percent")
    trainer.fit(module, data)
    planned = [next(iter(row.learning_rates.values())) for row in found.rows]
    assert planned == pytest.approx([0.1 * (1 - batch / 8) for batch in range(8)])
    assert list(module.seen.values()) == pytest.approx(planned)


def test_columns_of_the_table_name_learning_rates_and_groups() -> None:
    class NamedGroups(Probe):
        def configure_optimizers(self) -> Any:
            first, last = self.net[0].parameters(), self.net[2].parameters()
            groups = [
                {"params": first, "name": "embedding of bytes"},
                {"params": last, "name": "head", "lr": 0.5},
            ]
            return torch.optim.SGD(groups, lr=0.25)

    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[LearningRateScheduler(Constant())])
    lines = str(plan(trainer, NamedGroups(), loader(8, 2))).splitlines()
    start = next(index for index, line in enumerate(lines) if "accum." in line)
    above, head, first = lines[start - 1 : start + 2]
    assert above.strip() == "learning rate of the parameter group"
    assert head.split("accum.")[1].split() == ["embedding", "of", "bytes", "head"]
    assert head.index("embedding") == above.index("learning rate") == first.index("2.500e-01")
    assert head.index("head") == first.index("5.000e-01")
    one = L.Trainer(**QUIET, max_steps=4, callbacks=[LearningRateScheduler(Constant())])
    assert "accum.  learning rate\n" in str(plan(one, Probe(), loader(8, 2)))


def test_trainer_that_has_reached_its_limit_raises() -> None:
    scheduler = LearningRateScheduler(Linear(start=1.0, end=0.0))
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[scheduler])
    module = Probe()
    trainer.fit(module, loader(16, 2))
    with pytest.raises(ValueError, match=r"made 4 updates with max_steps=4 and .*; use a new Trai"):
        plan(trainer, module, loader(16, 2))
