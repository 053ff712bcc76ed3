"""Rollbacks together with averages, mixins, config files, checkpoints, kills and the report."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_bigopt import (
    EMA,
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchLoader,
    LearningRateScheduler,
    Merge,
    ModelAveraging,
    NonFinite,
    OptimizationMonitor,
    RollBack,
    StepGuard,
    StepGuardMixin,
    TailMean,
    TooManyRejectionsError,
    WarmupCosine,
)
from lightning_bigopt.examples import BytesGPT
from lightning_bigopt.monitoring.tensorboard import DASHBOARD
from lightning_bigopt.reporting.report import write_report
from lightning_bigopt.reporting.runs import read_run
from tests.helpers import Regression
from tests.rolled_back import (
    BATCH,
    LosesFiles,
    Ordered,
    Plain,
    Poisoned,
    differing,
    final,
    guard,
    order_of,
    train,
)

ROOT = Path(__file__).parents[3]
SAMPLES = 120  # 30 updates an epoch
ORDER = order_of(SAMPLES, 4)
BAD = ORDER[8 * BATCH : 10 * BATCH]  # the snapshots are taken after the updates 1, 6, 11, …


def clean_run(start: int, stop: int, *callbacks: Any, **options: Any) -> tuple[Any, L.Trainer]:
    """Trains on an order that never held the samples of some updates."""
    module = Poisoned()
    kept = [index for _, index in [*ORDER[: start * BATCH], *ORDER[stop * BATCH :]]]
    return module, train(module, Ordered(kept, SAMPLES), *callbacks, **options)


class Saves(L.Callback):
    """Saves checkpoints after some batches, and raises after the last of them or a later one."""

    def __init__(self, folder: Path, *batches: int, stop: int) -> None:
        self.folder, self.batches, self.stop, self.count = folder, batches, stop, 0

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.count += 1
        if self.count in self.batches:
            trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")
        if self.count == self.stop:
            raise StopError


class StopError(RuntimeError):
    pass


# ------------------------------------------------------------------------------------- averages


def averaging() -> ModelAveraging:
    averages = {
        "ema": EMA(half_life="10%"),
        "tail": TailMean(over="95%"),
        "merge": Merge(over=8, checkpoints=4, emulate="1-sqrt"),
    }
    return ModelAveraging(averages, use="ema")


class ReadsAverages(L.Callback):
    """Reads all averages after each batch, by global_step; the last reading of a step stays."""

    def __init__(self, owner: ModelAveraging) -> None:
        self.owner, self.found = owner, dict[int, dict[str, dict[str, Tensor]]]()

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        names = ("ema", "tail", "merge", "training")
        self.found[trainer.global_step] = {name: self.owner.average(name) for name in names}


@pytest.mark.parametrize(
    "way",
    [
        "memory",
        pytest.param("folder", marks=pytest.mark.slow),
        pytest.param("resumed", marks=pytest.mark.slow),
    ],
)
def test_averages_go_back(tmp_path: Path, way: str) -> None:
    to = str(tmp_path / "s") if way == "folder" else "memory"
    path = None
    if way == "resumed":
        parts = (averaging(), Saves(tmp_path, 8, stop=9))
        with pytest.raises(StopError):
            train(Poisoned(BAD), Plain(SAMPLES), guard(), *parts)
        path = tmp_path / "8.ckpt"
    mine, other = averaging(), averaging()
    reads, expected = ReadsAverages(mine), ReadsAverages(other)
    module, own = Poisoned(BAD), guard(to=to)
    trainer = train(module, Plain(SAMPLES), own, mine, reads, ckpt_path=path)
    assert [(r.update, r.to) for r in own.rollbacks] == [(9, 6)]
    clean, its_trainer = clean_run(6, 10, guard(), other, expected)
    assert not differing(final(module, trainer), final(clean, its_trainer))
    for step in range(6, 41):  # 6 is read at the end of the batch that rolls back
        for name, average in expected.found[step].items():
            assert not differing(reads.found[step][name], average), (step, name)
    assert differing(mine.average("ema"), mine.average("training"))


# --------------------------------------------------------------------------- mixins, config files


class Mixed(StepGuardMixin, Poisoned):
    def configure_step_guard(self) -> StepGuard:
        self.own = guard()
        return self.own


def test_the_mixin_rolls_back() -> None:
    module = Mixed(BAD)
    trainer = train(module, Plain(SAMPLES))
    assert [(r.update, r.to) for r in module.own.rollbacks] == [(9, 6)]
    clean, other = clean_run(6, 10, guard())
    assert not differing(final(module, trainer), final(clean, other))


CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: 20
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_bigopt.LearningRateScheduler
      init_args:
        schedule:
          class_path: lightning_bigopt.Constant
    - class_path: lightning_bigopt.StepGuard
      init_args:
        detectors:
          - class_path: lightning_bigopt.NonFinite
        max_consecutive: 1
        roll_back:
          class_path: lightning_bigopt.RollBack
          init_args:
            snapshot_every: 10%
            keep: 2
            lr_factor: 0.5
            recover: 4 steps
            to: {root}/snapshots
"""


class Configured(L.LightningModule):
    """Its loss is NaN in the batch with index 9."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        return loss * float("nan") if batch_idx == 9 else loss

    def train_dataloader(self) -> Any:
        return DataLoader(Regression(60), batch_size=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from LightningCLI
def test_a_saved_config_rolls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "written.yaml"
    config.write_text(CONFIG.format(root=tmp_path))
    runs = []
    for path in (config, tmp_path / "config.yaml"):
        options = {"save_config_kwargs": {"overwrite": True}}
        cli = LightningCLI(Configured, args=["fit", "--config", str(path)], **options)
        own = next(c for c in cli.trainer.callbacks if isinstance(c, StepGuard))
        assert own.roll_back == RollBack(
            snapshot_every="10%",
            keep=2,
            lr_factor=0.5,
            recover="4 steps",
            to=f"{tmp_path}/snapshots",
        )
        assert [(r.update, r.to, r.unit) for r in own.rollbacks] == [(9, 9, "samples")]
        runs.append({n: t.clone() for n, t in cli.model.state_dict().items()})
    assert not differing(*runs)


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(("save", "steps"), [(10, 6), (11, 7)])
def test_a_checkpoint_by_a_callback_before_the_engine_is_of_one_update(
    tmp_path: Path, save: int, steps: int
) -> None:
    """At the tenth batch the run goes back to update 6; the callback saves before the engine."""

    def run(module: Any, data: Any, *, batch: int, name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        callbacks = [
            Saves(tmp_path / name, batch, stop=batch + 1),
            LearningRateScheduler(WarmupCosine(warmup="10%")),
            BatchSizeScheduler(ConstantBatchSize(BATCH)),
            guard(),
        ]
        with pytest.raises(StopError):
            train(module, data, callbacks=callbacks)
        found: dict[str, Any] = torch.load(tmp_path / name / f"{batch}.ckpt", weights_only=True)
        return found

    saved = run(Poisoned(BAD), Plain(SAMPLES), batch=save, name="bad")
    kept = [index for _, index in [*ORDER[: 6 * BATCH], *ORDER[10 * BATCH :]]]
    expected = run(Poisoned(), Ordered(kept, SAMPLES), batch=steps, name="clean")
    for one in (saved, expected):
        (clock,) = [s["clock"] for s in one["callbacks"].values() if "clock" in s]
        batches = one["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        count = one["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
        found = (
            one["global_step"],
            clock["batches"],
            clock["samples"],
            batches["processed"],
            count["optimizer"]["step"]["total"]["completed"],
        )
        assert found == (steps, steps, steps * BATCH, steps, steps)
    assert not differing(saved["state_dict"], expected["state_dict"])
    states = [one["optimizer_states"][0]["state"] for one in (saved, expected)]
    for index, state in states[0].items():
        assert not differing(state, states[1][index])
    module, own = Poisoned(BAD), guard()
    path = tmp_path / "bad" / f"{save}.ckpt"
    trainer = train(module, Plain(SAMPLES), own, ckpt_path=path)
    assert [(r.update, r.to) for r in own.rollbacks] == [(9, 6)]
    assert not differing(final(module, trainer), final(*clean_run(6, 10, guard())))


@pytest.mark.parametrize("save", [12, 17, 22])
def test_a_resume_from_an_older_checkpoint_has_the_files_of_the_last_two(
    tmp_path: Path, save: int
) -> None:
    """Bad data follows directly: the run goes back to a snapshot from before the checkpoint."""
    to = str(tmp_path / "s")
    saves = Saves(tmp_path, 12, 17, 22, stop=30)
    with pytest.raises(StopError):
        train(Poisoned(), Plain(SAMPLES), guard(to=to, keep=1), saves)
    # Snapshot n has the number (n - 1) / 5. The two last checkpoints need 16 and 21, the run 26.
    numbers = [int(path.name.split("-")[1]) for path in Path(to).iterdir()]
    assert sorted(numbers) == [3, 4, 5]
    bad = ORDER[save * BATCH : (save + 2) * BATCH]
    module, own = Poisoned(bad), guard(to=to, keep=1)
    path = tmp_path / f"{save}.ckpt"
    if save == 12:  # its snapshot was taken after update 11, and is gone
        with pytest.raises(TooManyRejectionsError, match="must have a snapshot to roll back to"):
            train(module, Plain(SAMPLES), own, ckpt_path=path)
        return
    trainer = train(module, Plain(SAMPLES), own, ckpt_path=path)
    assert [(r.update, r.to) for r in own.rollbacks] == [(save + 1, save - 1)]
    expected = final(*clean_run(save - 1, save + 2, guard()))
    assert not differing(final(module, trainer), expected)


@pytest.mark.parametrize("numbers", [[1], [0, 1]])
def test_a_snapshot_whose_file_was_deleted_is_left_out(tmp_path: Path, numbers: list[int]) -> None:
    module, own = Poisoned(BAD), guard(to=str(tmp_path))
    loses = LosesFiles(tmp_path, *numbers)
    if 0 in numbers:
        with pytest.raises(TooManyRejectionsError, match="must have a snapshot to roll back to"):
            train(module, Plain(SAMPLES), own, loses)
        return
    trainer = train(module, Plain(SAMPLES), own, loses)
    assert [(r.update, r.to) for r in own.rollbacks] == [(9, 1)]
    assert not differing(final(module, trainer), final(*clean_run(1, 10, guard())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "point"),
    [
        ("memory", "weights"),
        ("memory", "clock"),
        ("folder", "weights"),
        ("folder", "clock"),
        ("folder", "file"),
    ],
)
def test_a_run_killed_within_a_rollback_ends_as_one_without_the_samples(
    tmp_path: Path, to: str, point: str
) -> None:
    """SIGKILL after the weights were restored, after the clock was, or while a file is written."""
    folder = str(tmp_path / "s") if to == "folder" else to
    targets = {
        "weights": "lightning_bigopt.optimizers.training_snapshot.TrainingSnapshot.restore",
        "clock": "lightning_bigopt.engine.clock.Clock.rewind",
        "file": "pathlib.Path.replace",
    }
    if to == "folder":
        targets["weights"] = "lightning_bigopt.optimizers.stored_training.StoredTraining.restore"
    script = f"""
        import os, signal
        import lightning as L
        from pathlib import Path
        from pkgutil import resolve_name
        from tests.callbacks.step_guard.test_recovery import BAD, Plain, Poisoned, SAMPLES
        from tests.rolled_back import guard, train

        owner, _, name = {targets[point]!r}.rpartition(".")
        owner = resolve_name(owner)
        original, calls = getattr(owner, name), []

        def kills(*arguments, **options):
            calls.append(0)
            if {point!r} != "file":
                original(*arguments, **options)
            if {point!r} != "file" or len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        class Saves(L.Callback):
            def on_train_batch_end(self, trainer, *arguments):
                if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 8:
                    trainer.save_checkpoint({str(tmp_path / "8.ckpt")!r})
                    setattr(owner, name, kills)

        train(Poisoned(BAD), Plain(SAMPLES), guard(to={folder!r}), Saves())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    module, own = Poisoned(BAD), guard(to=folder)
    trainer = train(module, Plain(SAMPLES), own, ckpt_path=tmp_path / "8.ckpt")
    assert [(r.update, r.to) for r in own.rollbacks] == [(9, 6)]
    assert not differing(final(module, trainer), final(*clean_run(6, 10, guard())))
    if to == "folder":
        assert not list(Path(folder).glob("*.part"))


# ------------------------------------------------------------------------------------ byte GPT


class Bytes(Dataset[Any]):
    """Random bytes with the place in the data set, in a given order."""

    def __init__(self, order: Any) -> None:
        rng = torch.Generator().manual_seed(0)
        self.data, self.order = torch.randint(256, (SAMPLES, 9), generator=rng), list(order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        index = self.order[place]
        return self.data[index], index


class GPT(BytesGPT):
    def __init__(self, bad: Any = ()) -> None:
        torch.manual_seed(0)
        super().__init__(width=16, layers=1, heads=2, length=8)
        self.bad = set(bad)

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch[0])
        found = {(self.trainer.train_dataloader.epoch, index) for index in batch[1].tolist()}
        return loss * float("nan") if found & self.bad else loss


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
@pytest.mark.parametrize("to", ["memory", "folder"])
def test_a_byte_gpt_ends_as_one_without_the_samples(tmp_path: Path, to: str) -> None:
    module, own = GPT(BAD), guard(to=str(tmp_path) if to == "folder" else to)
    data = GlobalBatchLoader(Bytes(range(SAMPLES)), micro_batch_size=BATCH)
    trainer = train(module, data, own, steps=20)
    assert [(r.update, r.to) for r in own.rollbacks] == [(9, 6)]
    kept = [index for _, index in [*ORDER[: 6 * BATCH], *ORDER[10 * BATCH :]]]
    loader = GlobalBatchLoader(Bytes(kept), micro_batch_size=BATCH, shuffle="sequential")
    clean = GPT()
    other = train(clean, loader, guard(), steps=20)
    assert not differing(final(module, trainer), final(clean, other))


# -------------------------------------------------------------------------- report and dashboard


class Logging(Poisoned):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


@pytest.mark.slow
def test_report_and_dashboard_draw_the_discarded_stretch(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    bad = ORDER[90 * BATCH : 94 * BATCH]
    module = Logging(bad, factor=30.0, lr=1e-3)
    own = StepGuard([NonFinite()], roll_back=RollBack(snapshot_every=5, updates=4, recover=0))
    parts = (own, OptimizationMonitor(every=1))
    train(module, Plain(SAMPLES), *parts, steps=110, logger=logger, log_every_n_steps=1)
    (report,) = own.rollbacks
    assert (report.update, report.to) == (93, 86)
    found = read_run(logger.log_dir)
    discarded = found.curves["rollback/discarded_loss"]
    assert [step for step, _ in discarded] == [*range(86, 94)]
    logged = dict(found.curves["train_loss"])
    assert [loss for _, loss in discarded] == pytest.approx([logged[s] for s, _ in discarded])
    page = write_report([logger.log_dir], tmp_path / "report.html").read_text()
    assert str(report) in page.replace("\n", " ")
    loss_chart = page[page.index("<h2>Loss") :].partition("</figure>")[0]
    assert "rollback/discarded_loss" in loss_chart
    assert "left out by them" in page
    (loss, *_), *_ = DASHBOARD["training"].values()
    for tag, drawn in {
        "train_loss": True,
        "rollback/discarded_loss": True,
        "rollback/loss_before": False,
    }.items():
        assert bool(re.fullmatch(loss, tag)) == drawn
