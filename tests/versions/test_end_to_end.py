"""A short end-to-end set, which ``make test-versions`` runs under every version of Lightning.

``BIGOPT_TEST_PACKAGES`` names the packages of the Trainer, separated by commas.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

from lightning_bigopt import learning_rate_range_test
from lightning_bigopt.cli.__main__ import main as bigopt
from lightning_bigopt.examples.comparison import read_scalars
from notebooks.run import free_port
from tests.versions import small_run
from tests.versions.small_run import QUIET, UPDATES, callbacks, module_of, plain_run, weights_of

ROOT = Path(__file__).parents[2]
PACKAGES = os.environ.get("BIGOPT_TEST_PACKAGES", "lightning.pytorch").split(",")


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> ModuleType:
    return import_module(request.param)


@pytest.fixture
def _accepts_callbacks(pl: ModuleType, request: pytest.FixtureRequest) -> None:
    """Expects the error of a Trainer that takes callbacks of its own package only."""
    if pl.__name__ == "pytorch_lightning" and Version(pl.__version__) < Version("2.6"):
        reason = "pytorch_lightning takes callbacks of lightning from 2.6 on"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def fit(pl: ModuleType, module: Any, added: list[Any], data: Any = None, **options: Any) -> Any:
    trainer = pl.Trainer(**QUIET | options, callbacks=added)
    trainer.fit(module, small_run.loader() if data is None else data)
    return trainer


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("_accepts_callbacks")
def test_readme_list_trains_as_a_plain_loop_does_and_the_report_shows_it(
    pl: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_run()
    logger = import_module(f"{pl.__name__}.loggers").TensorBoardLogger(tmp_path, "", "run")
    module = module_of(pl)
    fit(pl, module, callbacks(), logger=logger)
    assert module.rates == pytest.approx(plain.rates)
    assert_close(weights_of(module), plain.weights)

    logged = read_scalars(tmp_path / "run")
    assert list(logged["optim/lr"].values()) == pytest.approx(plain.rates)
    assert list(logged["grad_norm/total"].values()) == pytest.approx(plain.norms, rel=1e-4)
    assert list(logged["batch/global_size"].values()) == plain.sizes
    monkeypatch.chdir(tmp_path)
    assert bigopt(["report", "run"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 7
    assert all(text in page for text in ("train_loss", f"<td>{sum(plain.sizes)}</td>"))


@pytest.mark.usefixtures("_accepts_callbacks")
@pytest.mark.parametrize("step", [2, 6, 11])  # in the warm-up, as the batch grows, in epoch 2
def test_resumed_run_equals_an_uninterrupted_one(pl: ModuleType, tmp_path: Path, step: int) -> None:
    class Saves(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            path = tmp_path / "saved.ckpt"
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

    straight, resumed = module_of(pl), module_of(pl)
    fit(pl, straight, [*callbacks(), Saves()], small_run.ResumableLoader())
    trainer = pl.Trainer(**QUIET, callbacks=callbacks())
    trainer.fit(resumed, small_run.ResumableLoader(), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.rates == straight.rates[step:]
    assert same(weights_of(resumed), weights_of(straight))


@pytest.mark.usefixtures("_accepts_callbacks")
def test_mixins_train_as_the_callbacks_do(pl: ModuleType) -> None:
    module, reference = module_of(pl, small_run.OwnSettings), module_of(pl)
    fit(pl, module, [])
    fit(pl, reference, callbacks())
    assert module.rates == reference.rates
    assert same(weights_of(module), weights_of(reference))


def test_range_test_sweeps_and_restores(pl: ModuleType) -> None:
    module = module_of(pl)
    before = [w.clone() for w in weights_of(module)]
    trainer = pl.Trainer(**QUIET)
    found = learning_rate_range_test(
        trainer, module, small_run.loader(), start=1e-5, end=1.0, steps=40
    )
    ratios = [b / a for a, b in zip(found.learning_rates, found.learning_rates[1:], strict=False)]
    assert found.learning_rates[0] == pytest.approx(1e-5)
    assert ratios == pytest.approx([1e5 ** (1 / 39)] * len(ratios))
    assert same(weights_of(module), before)
    trainer.fit(module, small_run.loader())
    assert trainer.global_step == UPDATES


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("_accepts_callbacks")
def test_two_processes_train_as_a_plain_loop_does(pl: ModuleType, tmp_path: Path) -> None:
    job = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.versions.small_run", pl.__name__, str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | job | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    plain = plain_run()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["rates"] == pytest.approx(plain.rates)
        assert_close([torch.tensor(w) for w in found["weights"]], plain.weights)
