"""Names of runs, tags, parameter groups and schedules that matplotlib would read as a formula."""

from __future__ import annotations

import html
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import lightning as L
import matplotlib as mpl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_bigopt import Chain, Constant, LearningRateScheduler, Linear, OptimizationMonitor
from lightning_bigopt.cli.schedules import draw as draw_schedules
from lightning_bigopt.reporting.report import render_report, write_report
from lightning_bigopt.reporting.runs import Run
from lightning_bigopt.schedules.base import Schedule
from lightning_bigopt.tuning import plan
from tests.helpers import QUIET, Probe, loader

# The name, and how a chart shows it if not as it is.
NAMES = {
    "a$b$c": None,
    r"$\frac$": None,
    "$": None,
    "$$": None,
    r"\$x": None,
    "_x": None,
    "__$_": None,
    "%": None,
    "%(name)s": None,
    "{x}": None,
    "<b>&amp;": None,
    "損失 ñ 🎉": None,
    "x" * 300: f"{'x' * 15}…{'x' * 15}",
    "two\nlines": "two lines",
    "tab\there": "tab here",
    "\ud800": "\ufffd",
}


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """Makes the warnings of matplotlib errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="matplotlib")
        warnings.filterwarnings("error", message="Glyph")
        yield


def texts_of(page: str) -> list[str]:
    """Returns the texts in all charts of a page, which must be valid XML."""
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert charts
    for chart in charts:
        ET.fromstring(chart)
    found = [html.unescape(t) for c in charts for t in re.findall(r"<text[^>]*>([^<]*)<", c)]
    return [text.strip() for text in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tags_are_drawn_as_they_are(name: str) -> None:
    shown = NAMES[name] or name
    curves = {
        tag: [(0, 1.0), (10_000_000, 2.0)]
        for tag in ("grad_norm/total", f"optim/lr/{name}", f"plan/lr/{name}", f"{name}loss")
    }
    texts = texts_of(render_report([Run(name="run", curves=curves)]))
    assert {shown, "planned"} <= {*texts, *(text.removeprefix("optim/lr/") for text in texts)}
    loss = "xxxxxxxxxxxxxxx…xxxxxxxxxxxloss" if len(name) == 300 else f"{shown}loss"
    assert loss in texts


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_are_drawn_as_they_are(name: str) -> None:
    curves = {tag: [(0, 1.0), (1, 2.0)] for tag in ("grad_norm/total", "loss", "progress/samples")}
    other = Run(name="other", curves=curves)
    page = render_report([Run(name=name, curves=curves), other])
    texts = texts_of(page)
    legend = NAMES[name] or name
    title = f"{'x' * 27}…{'x' * 27}" if len(name) == 300 else legend
    assert {legend, title, "other"} <= set(texts)
    assert html.escape(name, quote=False) in page


def test_settings_of_the_user_for_formulas_are_not_used(tmp_path: Path) -> None:
    runs = [Run(name=f"$_{name}$", curves={"a_$_loss": [(0, 1.0), (10**8, 2.0)]}) for name in "ab"]
    expected = texts_of(render_report(runs))
    with mpl.rc_context({"axes.formatter.use_mathtext": True, "text.usetex": True}):
        assert texts_of(render_report(runs)) == expected
        draw_schedules([Linear()], 10**8, str(tmp_path / "schedules.png"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_folder_of_a_run_may_have_any_name(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = kind(tmp_path, name=r"a$b$c_$\frac$", version="_x%$$")
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "max_steps": 4, "log_every_n_steps": 1},
        callbacks=[OptimizationMonitor(every=1)],
    )
    trainer.fit(Probe(), loader(16, 2))
    folder, shown = Path(logger.log_dir), "_x%$$"
    if kind is CSVLogger:  # TensorBoard neither writes nor reads a folder whose name is no UTF-8
        folder, shown = folder.rename(folder.with_name(os.fsdecode(b"\xff$_$"))), "\ufffd$_$"
    monkeypatch.chdir(folder)
    for path in (folder, "."):
        page = write_report([path, path], tmp_path / "report.html").read_text("utf-8")
        assert f"{shown} (2)" in texts_of(page)


class NamedGroups(Probe):
    """One parameter group for each name."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.extra = torch.nn.ParameterList(torch.ones(1) for _ in names)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + sum(weight.square().sum() for weight in self.extra)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [weight], "name": name, "lr": 0.01 * (i + 1)}
            for i, (name, weight) in enumerate(zip(self.names, self.extra, strict=True))
        ]
        return torch.optim.SGD([{"params": self.net.parameters(), "name": "net"}, *groups], lr=0.1)


GROUPS = ["a$b$c", r"$\frac$", "_x", "%", "left | right", "two\nlines"]


def test_groups_are_drawn_as_they_are_in_the_plan(tmp_path: Path) -> None:
    schedule = Chain([("50%", Constant()), Linear()])
    trainer = L.Trainer(**QUIET, max_steps=8, callbacks=[LearningRateScheduler(schedule)])
    found = plan(trainer, NamedGroups(GROUPS), loader(16, 2))
    texts = texts_of(found.picture(tmp_path / "plan.svg").read_text("utf-8"))
    assert {*GROUPS[:-1], "two lines"} <= set(texts)
    assert found.picture(tmp_path / "plan.png").stat().st_size > 5_000


def test_groups_stand_in_the_report(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "max_steps": 4, "log_every_n_steps": 1},
        callbacks=[OptimizationMonitor(every=1), LearningRateScheduler(Linear())],
    )
    trainer.fit(NamedGroups(GROUPS), loader(16, 2))
    page = write_report(logger.log_dir, tmp_path / "report.html").read_text("utf-8")
    table = [html.unescape(cell) for cell in re.findall(r"<tr><td>(.*?)</td><td><code>", page)]
    assert [cell for cell in table if cell.startswith("SGD")] == [
        f"SGD {name}" for name in ("net", *GROUPS[:-1], "two lines")
    ]


@dataclass(frozen=True)
class _Named(Linear):
    """A schedule of the user's own, whose representation has two dollar signs."""

    def __repr__(self) -> str:
        return r"_Named($\frac$)"


def test_schedules_are_drawn_as_they_are(tmp_path: Path) -> None:
    schedules: list[Schedule] = [_Named(), Linear()]
    draw_schedules(schedules, 100, str(tmp_path / "schedules.svg"))
    texts = texts_of((tmp_path / "schedules.svg").read_text("utf-8"))
    assert {r"_Named($\frac$)", repr(Linear())} <= set(texts)
