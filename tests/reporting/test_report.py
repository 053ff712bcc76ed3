"""The report of runs that ended, were interrupted or killed; alone and side by side."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_bigopt import (
    GradientClipping,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    WarmupCosine,
)
from lightning_bigopt.cli.__main__ import main
from lightning_bigopt.reporting.report import clip_audit, render_report, write_report
from lightning_bigopt.reporting.runs import Run, read_run
from tests.helpers import QUIET, Probe, RaisesAtStep, loader

ROOT = Path(__file__).parents[2]


class LoggingModule(Probe):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def train(logger: Any, *more: Any, report: Path | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        **{**QUIET, "logger": logger, "log_every_n_steps": 2, "max_epochs": 2, **options},
        callbacks=[
            LearningRateScheduler(WarmupCosine(warmup="20%")),
            GradientClipping(NormClip(max_norm=9.0)),
            OptimizationMonitor(report=None if report is None else str(report)),
            *more,
        ],
    )
    trainer.fit(LoggingModule(lr=0.01), loader(24, 2))
    return trainer


class PageParser(HTMLParser):
    """Collects the URLs that a page would fetch, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self._in_heading = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag in {"h1", "h2"}
        for key, value in attributes:
            if key in {"src", "href", "xlink:href"} and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {key}={value}")

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def parse(page: str) -> PageParser:
    parser = PageParser()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: class and prefix of a logger → the logged run."""

    @functools.cache
    def of(kind: Any = TensorBoardLogger, prefix: str = "") -> Run:
        logger = kind(tmp_path_factory.mktemp("run"), name=f"run{prefix}", prefix=prefix)
        return read_run(train(logger).log_dir)

    return of


@pytest.mark.slow
def test_report_is_one_file_with_every_chart(logged_run: Any) -> None:
    page = render_report([logged_run()])
    found = parse(page)
    assert found.fetched == []
    for heading in (
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Clipping",
        "Global batch",
        "Update-to-weight ratio",
        "Throughput",
        "Seconds per step",
        "Clipping summary",
        "Plan",
    ):
        assert heading in found.headings, heading
    assert page.count("<svg") >= 7
    assert not re.search(r"url\((?!#)", page)


@pytest.mark.slow
def test_command_shows_two_runs_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = train(TensorBoardLogger(tmp_path, version="one"))
    two = train(CSVLogger(tmp_path, version="two"), max_epochs=1)
    output = tmp_path / "deep" / "both.html"
    arguments = [one.log_dir, "--beside", two.log_dir, "--output", str(output)]
    assert main(["report", *map(str, arguments)]) == 0
    assert str(output) in capsys.readouterr().out
    page = output.read_text()
    assert page.index("<th>one</th>") < page.index("<th>two</th>")
    assert "<td>23</td><td>11</td>" in page


def test_report_is_written_at_the_end_of_fit(tmp_path: Path) -> None:
    train(TensorBoardLogger(tmp_path), report=tmp_path / "report.html")
    assert "train_loss" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("logger", [False, DummyLogger()])
def test_report_without_readable_logs_raises_before_training(logger: Any, tmp_path: Path) -> None:
    stops = RaisesAtStep(0, AssertionError())
    with pytest.raises(ValueError, match="logger must be a TensorBoardLogger or a CSVLogger"):
        train(logger, stops, report=tmp_path / "report.html")


def test_report_without_its_libraries_raises_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_bigopt.callbacks.run_report.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"jinja2 must be installed .* 'lightning-bigopt\[plot\]'"
    ):
        train(
            CSVLogger(tmp_path), RaisesAtStep(0, AssertionError()), report=tmp_path / "report.html"
        )


def test_fast_dev_run_writes_no_report(tmp_path: Path) -> None:
    train(False, report=tmp_path / "report.html", fast_dev_run=True)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_first_logger_with_readable_files_is_reported(tmp_path: Path) -> None:
    train([DummyLogger(), CSVLogger(tmp_path)], report=tmp_path / "report.html")
    assert "train_loss" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_tags_are_read_without_the_prefix_of_the_logger(kind: Any, logged_run: Any) -> None:
    assert logged_run(kind, "x").curves.keys() == logged_run(kind).curves.keys()


def test_run_without_logged_values_logs_that_there_is_no_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        train(CSVLogger(tmp_path), report=tmp_path / "r.html", max_epochs=1, log_every_n_steps=500)
    assert "No report was written, because" in caplog.text


def test_error_in_the_first_batch_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(
            CSVLogger(tmp_path),
            RaisesAtStep(0, ZeroDivisionError()),
            report=tmp_path / "report.html",
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_prefix_of_the_logger_does_not_change_the_report(kind: Any, logged_run: Any) -> None:
    plain, prefixed = logged_run(kind), logged_run(kind, "my-model")
    assert set(prefixed.curves) - {"epoch"} == set(plain.curves) - {"epoch"}
    assert prefixed.texts == plain.texts
    pages = [parse(render_report([run])) for run in (prefixed, plain)]
    assert pages[0].headings[1:] == pages[1].headings[1:]


class BreaksFolder(L.Callback):
    """Puts a file in the place of a folder after some updates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            self.folder.touch()


@pytest.mark.filterwarnings("ignore:The report .* could not be written")
def test_report_that_cannot_be_written_does_not_hide_the_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(
            TensorBoardLogger(tmp_path),
            RaisesAtStep(5, ZeroDivisionError()),
            BreaksFolder(tmp_path / "reports"),
            report=tmp_path / "reports" / "report.html",
        )


def test_report_that_cannot_be_written_gives_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"could not be written .*bigopt report "):
        trainer = train(
            TensorBoardLogger(tmp_path),
            BreaksFolder(tmp_path / "reports"),
            report=tmp_path / "reports" / "report.html",
        )
    assert trainer.global_step == 24


def test_csv_file_is_complete_at_every_logged_step(tmp_path: Path) -> None:
    class ReadsItsFile(L.Callback):
        seen: tuple[int, ...] = ()

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step > 1:
                curve = read_run(trainer.log_dir).curves["grad_norm/total"]
                self.seen = tuple(step for step, _ in curve)
                last = (trainer.global_step - 2) // 2 * 2 + 1
                assert self.seen == tuple(range(1, last + 1, 2))

    reads = ReadsItsFile()
    train(CSVLogger(tmp_path), reads, max_epochs=1)
    assert len(reads.seen) == 5


def test_plan_in_the_report_is_a_table_with_base_learning_rates(logged_run: Any) -> None:
    page = render_report([logged_run()])
    assert "<td>SGD</td><td><code>lr 0.01, " in page  # not the 0.0 at the start of the warm-up
    assert "<td>gradient clipping</td><td><code>NormClip(max_norm=9.0" in page
    assert "|---|" not in page


def test_fraction_of_clipped_updates_is_that_of_the_run(tmp_path: Path) -> None:
    module, threshold = LoggingModule(lr=0.01), 9.0
    norms: list[float] = []

    class RecordsNorms(L.Callback):
        def on_after_backward(self, *args: Any) -> None:
            squares = [p.grad.double().square().sum() for p in module.parameters()]
            norms.append(float(sum(squares)) ** 0.5)

    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path), "log_every_n_steps": 4, "max_epochs": 2},
        callbacks=[
            RecordsNorms(),
            GradientClipping(NormClip(max_norm=threshold)),
            OptimizationMonitor(),
        ],
    )
    trainer.fit(module, loader(24, 2))
    share = sum(norm > threshold for norm in norms) / len(norms)
    assert 0 < share < 1
    (line, *_) = clip_audit(read_run(str(trainer.log_dir)))
    assert line.startswith(f"clip: {100 * share:.1f} % of the updates")


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_interrupted_run_is_logged_up_to_its_last_logging_step(
    error: type[BaseException], kind: Any, tmp_path: Path
) -> None:
    logger = kind(tmp_path)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
        train(logger, RaisesAtStep(9, error()), report=tmp_path / "report.html")
    run = read_run(logger.log_dir)
    assert [step for step, _ in run.curves["grad_norm/total"]] == [1, 3, 5, 7]
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_killed_run_is_logged_up_to_its_last_logging_step(tmp_path: Path) -> None:
    script = f"""
        import os, signal, time
        from pathlib import Path
        import lightning as L
        from lightning.pytorch.loggers import TensorBoardLogger
        from tests.reporting.test_report import train

        class KillsProcess(L.Callback):
            def on_train_batch_start(self, trainer, *args):
                if trainer.global_step == 9:
                    time.sleep(0.2)  # lets the writer thread run
                    os.kill(os.getpid(), signal.SIGKILL)

        train(TensorBoardLogger({str(tmp_path)!r}, version="killed"), KillsProcess())
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    folder = tmp_path / "lightning_logs" / "killed"
    assert [s for s, _ in read_run(folder).curves["grad_norm/total"]] == [1, 3, 5, 7]
    assert "<svg" in write_report([folder], tmp_path / "report.html").read_text()
    (file,) = folder.glob("events*")
    file.write_bytes(file.read_bytes()[:-7])  # a truncated file
    assert [s for s, _ in read_run(folder).curves["grad_norm/total"]][:3] == [1, 3, 5]


def test_folder_without_logs_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "logdir must contain TensorBoard events or a metrics.csv" in capsys.readouterr().err


def test_path_that_is_no_folder_raises(tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1"
    file.touch()
    for path, what in ((file, "is a file"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(ValueError, match=rf"logdir must be a folder, got .*{what}; pass"):
            read_run(path)


def test_report_of_one_path_and_of_none(tmp_path: Path) -> None:
    trainer = train(CSVLogger(tmp_path), max_epochs=1)
    page = write_report(str(trainer.log_dir), tmp_path / "report.html")
    assert "train_loss" in page.read_text()
    with pytest.raises(ValueError, match=r"folders must be .* got none"):
        write_report([], tmp_path / "none.html")


def test_folder_as_report_raises_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report must be the name of a file, got the folder"):
        train(CSVLogger(tmp_path), RaisesAtStep(0, AssertionError()), report=tmp_path)
    with pytest.raises(ValueError, match=r"output must be the name of a file, got the folder"):
        write_report([tmp_path], tmp_path)


def test_folder_of_several_runs_raises_and_lists_them(tmp_path: Path) -> None:
    for version in ("a", "b"):
        train(CSVLogger(tmp_path, version=version), max_epochs=1)
    with pytest.raises(ValueError, match=r"one run, got 2 .*lightning_logs/a"):
        read_run(tmp_path)


@pytest.mark.slow
def test_names_are_escaped_and_non_finite_values_are_counted() -> None:
    curve = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    run = Run(name="<b>&", curves={"grad_norm/total": curve, "loss<script>": curve})
    page = render_report([run])
    assert "<b>&<" not in page
    assert "<script>" not in page
    assert any("2 logged gradient norms were not finite" in line for line in clip_audit(run))


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "Almost every update"), (0.0, "No update was clipped"), (0.3, "30.0 %")],
)
def test_clip_audit_describes_the_clipped_fraction(share: float, words: str) -> None:
    curves = {
        "clip/coefficient": [(t, 1 - share / 2) for t in range(3)],
        "clip/fraction": [(t, share) for t in range(3)],
    }
    assert any(words in line for line in clip_audit(Run(name="a", curves=curves)))


def test_csv_of_a_resumed_run_is_put_in_order() -> None:
    from lightning_bigopt.reporting.runs import _in_order

    assert _in_order([(0, 1.0), (2, 2.0), (4, 3.0), (2, 5.0), (3, 6.0)]) == [
        (0, 1.0),
        (2, 5.0),
        (3, 6.0),
    ]


def test_runs_of_the_same_name_are_numbered(tmp_path: Path) -> None:
    folders = []
    for number in (1, 2):
        (tmp_path / str(number) / "run").mkdir(parents=True)
        folders.append(tmp_path / str(number) / "run")
        (folders[-1] / "metrics.csv").write_text(f"step,train_loss\n0,{number}\n1,{number}\n")
    page = write_report(folders, tmp_path / "report.html").read_text()
    assert "<th>run (1)</th><th>run (2)</th>" in page
    assert ">run (1)</text>" in page  # in the legend of the overlaid losses
    assert (
        "Not over samples: progress/samples is not logged over updates in run (1), run (2)" in page
    )


def test_run_without_clipping_says_so() -> None:
    run = Run(name="a", curves={"grad_norm/total": [(0, 1.0), (1, float("nan"))]})
    assert clip_audit(run) == [
        "1 logged gradient norms were not finite, the first at 1.",
        "Clipping was not logged.",
    ]


@pytest.mark.slow
def test_two_runs_share_one_chart_of_the_loss(logged_run: Any) -> None:
    with_clipping = logged_run()
    curves = {
        t: c for t, c in with_clipping.curves.items() if not t.startswith(("clip/", "update"))
    }
    page = render_report([with_clipping, Run(name="old", curves=curves)])
    assert "All runs over updates, and over samples." in page
    assert page.count(">not logged</text>") == 1  # the fraction of clipped updates
    # Names of the runs in the legend, the x axes, and the quantiles of the update-to-weight ratio.
    for text in (with_clipping.name, "old", "update", "samples", "min", "median", "max"):
        assert f">{text}</text>" in page, text
