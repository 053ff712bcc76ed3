"""``bigopt compare``: configs with other numbers of updates, searches, files and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import pytest
import torch
import yaml
from scipy.stats import ttest_rel
from torch.utils.data import DataLoader, random_split

from lightning_bigopt.cli import __main__ as cli
from lightning_bigopt.cli.config_trainings import ConfigTrainings
from lightning_bigopt.tuning import Log
from lightning_bigopt.tuning.compare import run_comparison
from lightning_bigopt.tuning.comparison_plan import ComparisonPlan
from lightning_bigopt.tuning.tuned_ranges import tuned_ranges
from tests.cli.small_gpt import DATA, TRAINER
from tests.cli.small_gpt import MODEL as SMALL

ROOT = Path(__file__).parents[2]
# BytesGPT asks for a logger, and the configs have none.
pytestmark = pytest.mark.filterwarnings("ignore:You called `self.log:UserWarning")

MODEL = {**SMALL, "init_args": {**SMALL["init_args"], "lr": 0.004}}
CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": MODEL,
    "data": DATA,
    "trainer": {**TRAINER, "logger": False, "enable_checkpointing": False},
}
MUON = {"class_path": "MuonAdamW", "init_args": {"lr": 0.01}}


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainer = {**CONFIG["trainer"], "max_steps": 4, "callbacks": [scheduler()]}
    init_args = {**MODEL["init_args"], "optimizer": MUON}
    shorter = {**CONFIG, "model": {**MODEL, "init_args": init_args}, "trainer": trainer}
    del shorter["seed_everything"]
    write("a.yaml", CONFIG)
    write("b.yaml", shorter)


def scheduler() -> dict[str, Any]:
    return {"class_path": "LearningRateScheduler", "init_args": {"schedule": "WarmupLinear"}}


def write(name: str, config: dict[str, Any]) -> None:
    Path(name).write_text(yaml.safe_dump(config, sort_keys=False))


def losses(text: str) -> list[list[float]]:
    """Returns the printed losses of both sides."""
    rows = [line.split() for line in text.splitlines()]
    found = [row for row in rows if len(row) == 4 and row[0].isdigit()]
    return [[float(row[column]) for row in found] for column in (1, 2)]


@pytest.mark.slow
def test_two_configs_are_compared(capsys: pytest.CaptureFixture[str]):
    command = ["compare", "a.yaml", "b.yaml", "--seeds", "3", "--folder", "runs/ab"]
    command += ["--tune", "lr", "--tune-b", "model.optimizer.lr", "--trials", "2"]
    files = ["--report", "out/c.html", "--picture", "out/c.png"]
    assert cli.main([*command, *files]) == 0
    printed = capsys.readouterr().out
    a, b = losses(printed)
    assert len(a) == 3
    oracle = ttest_rel(b, a)  # of the printed losses, which have five digits
    kept = [json.loads(path.read_text()) for path in Path("runs/ab").glob("*.json")]
    by_side = {name: [r["run"] for r in kept if r["side"] == name] for name in ("a.yaml", "b.yaml")}
    assert {run["updates"] for run in by_side["a.yaml"]} == {8}
    assert {run["updates"] for run in by_side["b.yaml"]} == {4}
    assert sorted(run["seed"] for run in by_side["b.yaml"]) == [1, 2, 3]  # not 3, and not 0
    assert "updates       8       4" in printed
    assert "0.50 × the updates of a.yaml" in printed or "2.00 × the updates of b.yaml" in printed
    p_value = float(printed.partition("p = ")[2].split(",")[0])
    assert p_value == pytest.approx(oracle.pvalue, rel=0.1)
    assert "a.yaml: lr=" in printed
    assert "b.yaml: model.optimizer.lr=" in printed
    assert "<svg" in Path("out/c.html").read_text()
    assert Path("out/c.png").read_bytes()[:4] == b"\x89PNG"
    # The same command has nothing left to do.
    before = {path: path.stat().st_mtime_ns for path in Path("runs/ab").glob("*.json")}
    assert cli.main(command) == 0
    assert losses(capsys.readouterr().out) == [a, b]
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/ab").glob("*.json")}


@pytest.mark.slow
def test_configs_are_compared_as_they_are_and_their_seeds_do_not_matter(
    capsys: pytest.CaptureFixture[str],
):
    write("c.yaml", {**CONFIG, "seed_everything": 11})
    assert cli.main(["compare", "a.yaml", "c.yaml", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    a, c = losses(printed)
    assert a == c
    assert a[0] != a[1]
    assert "the sides are equal at every seed (n = 2)" in printed


@pytest.mark.slow
def test_space_and_direction_are_those_of_the_command(capsys: pytest.CaptureFixture[str]):
    Path("space.yaml").write_text("weight_decay: Uniform(0, 0.5)\nlr: Log(1e-3, 1e-2)\n")
    command = ["compare", "a.yaml", "a.yaml", "--seeds", "2", "--tune", "lr, weight_decay"]
    assert cli.main([*command, "--space", "space.yaml", "--trials", "1"]) == 0
    printed = capsys.readouterr().out
    assert "a.yaml (a): lr=" in printed
    assert ", weight_decay=" in printed


def test_learning_rate_of_a_config_has_a_range_around_its_value():
    sides = [ConfigTrainings(name, seed=0) for name in ("a.yaml", "b.yaml")]
    assert sides[0].value("lr") == 0.004
    assert sides[1].value("model.optimizer.lr") == 0.01
    assert sides[1].value("schedule.warmup") == "2%"
    ranges = tuned_ranges(sides[1], ["optimizer.lr"], None, name="b.yaml")
    assert ranges == {"optimizer.lr": Log(0.01 / 16, 0.16)}


@pytest.mark.slow
def test_examples_are_what_the_benchmark_compares():
    bare, ours = (
        yaml.safe_load((ROOT / "examples" / name).read_text())
        for name in ("bare_adamw.yaml", "half_the_updates.yaml")
    )
    assert (bare["trainer"]["max_steps"], ours["trainer"]["max_steps"]) == (750, 360)
    for config in (bare, ours):
        # One validation, after the last update, on the same data; as many samples in an update.
        assert config["trainer"]["val_check_interval"] == config["trainer"]["max_steps"]
        assert config["data"] == bare["data"]
    assert "callbacks" not in bare["trainer"]
    for name, path in (("bare_adamw", "lr"), ("half_the_updates", "model.optimizer.lr")):
        side = ConfigTrainings(ROOT / "examples" / f"{name}.yaml", seed=0)
        side.prepare({path: Log(1e-3, 1e-1)})
        built = side.build({path: 0.02})
        made = built.module.configure_optimizers()
        assert {group["lr"] for group in made.param_groups} == {0.02}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "missing.yaml"], "config must be a file, got 'missing.yaml'"),
        (["a.yaml", "b.yaml", "--seeds", "1"], "seeds must be an integer of at least 2, got 1"),
        (["a.yaml", "b.yaml", "--tune", "l"], "space must contain paths of fields that exist"),
        (["a.yaml", "b.yaml", "--tune", "weight_decay"], "a range for each path of tune"),
        (["a.yaml", "b.yaml", "--tune", "length"], "write one of 'model.length', 'data.length'"),
        (["a.yaml", "b.yaml", "--report", "."], "report must be the name of a file"),
        (["a.yaml", "b.yaml", "--space", "no.yaml", "--tune", "lr"], "space must be a file"),
        (["a.yaml", "b.yaml", "--direction", "down"], "direction must be 'minimize' or"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["compare", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bigopt: error: ")
    assert message in error


class SplitText(L.LightningDataModule):
    """Splits random bytes at random in its setup."""

    def setup(self, stage: str) -> None:
        texts = torch.randint(0, 256, (64, 9), generator=torch.Generator().manual_seed(0))
        self.parts = random_split(texts, [48, 16])

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], batch_size=16)


@pytest.mark.slow
def test_split_in_setup_is_that_of_the_seed_and_not_of_the_model():
    splits = []
    for width, seed in ((16, 5), (32, 5), (16, 6)):
        init_args = {**MODEL["init_args"], "width": width}
        data = {"class_path": f"{__name__}.SplitText"}
        write("c.yaml", {**CONFIG, "data": data, "model": {**MODEL, "init_args": init_args}})
        side = ConfigTrainings("c.yaml", seed=0)
        side.reseed(seed, is_paired=True)
        module = side.build({}).data["datamodule"]
        module.setup("fit")  # the next that Trainer.fit does
        splits.append(list(module.parts[1].indices))
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


@pytest.mark.slow
def test_config_of_the_result_has_the_seed_of_the_user():
    sides = tuple(ConfigTrainings("a.yaml", seed=0) for _ in "ab")
    found = run_comparison(sides, names=("a", "b"), plan=ComparisonPlan(seeds=2))
    assert yaml.safe_load(found.a.config)["seed_everything"] == 3


def test_config_that_resumes_is_refused(capsys: pytest.CaptureFixture[str]):
    write("c.yaml", {**CONFIG, "ckpt_path": "last.ckpt"})
    assert cli.main(["compare", "a.yaml", "c.yaml", "--seeds", "2"]) == 1
    assert "ckpt_path must be null in 'c.yaml', got 'last.ckpt'" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_bigopt.examples.gpt.BytesGPT.training_step", interrupt)
    assert cli.main(["compare", "a.yaml", "b.yaml", "--seeds", "2", "--folder", "ab"]) == 130
    assert list(Path("ab").glob("*.json")) == []
