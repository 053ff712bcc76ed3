"""The report of runs that ended well, were interrupted or killed, alone and side by side."""

from __future__ import annotations

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
from lightning_bigopt.cli import main
from lightning_bigopt.reporting.report import clip_audit, render_report, write_report
from lightning_bigopt.reporting.runs import Run, read_run
from tests.kit import QUIET, Probe, loader

ROOT = Path(__file__).parents[2]


class Logging(Probe):
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
    trainer.fit(Logging(lr=0.01), loader(24, 2))
    return trainer


class SelfContained(HTMLParser):
    """Collects what a page would fetch, and its headings."""

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


def look(page: str) -> SelfContained:
    parser = SelfContained()
    parser.feed(page)
    return parser


def test_the_report_is_one_file_with_every_chart(tmp_path: Path) -> None:
    trainer = train(TensorBoardLogger(tmp_path))
    page = render_report([read_run(trainer.log_dir)])
    found = look(page)
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
        "Clip audit",
        "Plan",
    ):
        assert heading in found.headings, heading
    assert page.count("<svg") >= 7
    assert not re.search(r"url\((?!#)", page)


def test_two_runs_stand_side_by_side_through_the_command(
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


def test_the_report_at_the_end_of_fit(tmp_path: Path) -> None:
    train(TensorBoardLogger(tmp_path), report=tmp_path / "report.html")
    assert "train_loss" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("logger", [False, DummyLogger()])
def test_a_report_without_logs_to_read_is_refused_before_training(
    logger: Any, tmp_path: Path
) -> None:
    stops = DiesAt(0, AssertionError)
    with pytest.raises(ValueError, match="logger must be a TensorBoardLogger or a CSVLogger"):
        train(logger, stops, report=tmp_path / "report.html")


def test_a_report_without_its_libraries_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_bigopt.callbacks.monitor.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"jinja2 must be installed .* 'lightning-bigopt\[plot\]'"
    ):
        train(CSVLogger(tmp_path), DiesAt(0, AssertionError), report=tmp_path / "report.html")


def test_a_trial_run_writes_no_report(tmp_path: Path) -> None:
    train(False, report=tmp_path / "report.html", fast_dev_run=True)
    assert not (tmp_path / "report.html").exists()


def test_the_first_logger_whose_files_can_be_read_is_reported(tmp_path: Path) -> None:
    train([DummyLogger(), CSVLogger(tmp_path)], report=tmp_path / "report.html")
    assert "train_loss" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_prefix_of_the_logger_is_no_part_of_the_tags(kind: Any, tmp_path: Path) -> None:
    plain, other = (train(kind(tmp_path, version=p, prefix=p), max_epochs=1) for p in ("", "x"))
    assert read_run(other.log_dir).curves.keys() == read_run(plain.log_dir).curves.keys()


def test_a_run_too_short_to_be_logged_says_that_it_has_no_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        train(CSVLogger(tmp_path), report=tmp_path / "r.html", max_epochs=1, log_every_n_steps=500)
    assert "No report was written: nothing had been logged" in caplog.text


def test_a_run_that_dies_at_once_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(CSVLogger(tmp_path), DiesAt(0, ZeroDivisionError), report=tmp_path / "report.html")


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_loggers_prefix_leaves_the_report_as_it_is(kind: Any, tmp_path: Path) -> None:
    plain, prefixed = (
        read_run(train(kind(tmp_path, name=f"run{prefix}", prefix=prefix)).log_dir)
        for prefix in ("", "my-model")
    )
    assert set(prefixed.curves) - {"epoch"} == set(plain.curves) - {"epoch"}
    assert prefixed.texts == plain.texts
    assert look(render_report([prefixed])).headings[1:] == look(render_report([plain])).headings[1:]


class Dies(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError


def into_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "report.html"


@pytest.mark.filterwarnings("ignore:The report .* could not be written")
def test_a_report_that_cannot_be_written_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(TensorBoardLogger(tmp_path), Dies(), report=into_a_file(tmp_path))


def test_a_report_that_cannot_be_written_does_not_end_the_script(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"could not be written .*bigopt report "):
        trainer = train(TensorBoardLogger(tmp_path), report=into_a_file(tmp_path))
    assert trainer.global_step == 24


def test_a_csv_is_in_its_file_at_every_logged_step(tmp_path: Path) -> None:
    class Reads(L.Callback):
        seen: tuple[int, ...] = ()

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step > 1:
                curve = read_run(trainer.log_dir).curves["grad_norm/total"]
                self.seen = tuple(step for step, _ in curve)
                last = (trainer.global_step - 2) // 2 * 2 + 1
                assert self.seen == tuple(range(1, last + 1, 2))

    reads = Reads()
    train(CSVLogger(tmp_path), reads, max_epochs=1)
    assert len(reads.seen) == 5


def test_the_plan_is_a_table_with_the_rates_that_the_schedule_multiplies(tmp_path: Path) -> None:
    run = read_run(train(TensorBoardLogger(tmp_path)).log_dir)
    page = render_report([run])
    assert "<td>SGD</td><td><code>lr 0.01, " in page  # not the warm-up's 0.0
    assert "<td>gradient clipping</td><td><code>NormClip(max_norm=9.0" in page
    assert "|---|" not in page


def test_the_share_of_clipped_updates_is_that_of_the_run(tmp_path: Path) -> None:
    module, threshold = Logging(lr=0.01), 9.0
    norms: list[float] = []

    class Notes(L.Callback):
        def on_after_backward(self, *args: Any) -> None:
            squares = [p.grad.double().square().sum() for p in module.parameters()]
            norms.append(float(sum(squares)) ** 0.5)

    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path), "log_every_n_steps": 4, "max_epochs": 2},
        callbacks=[Notes(), GradientClipping(NormClip(max_norm=threshold)), OptimizationMonitor()],
    )
    trainer.fit(module, loader(24, 2))
    share = sum(norm > threshold for norm in norms) / len(norms)
    assert 0 < share < 1
    (line, *_) = clip_audit(read_run(str(trainer.log_dir)))
    assert line.startswith(f"clip: {100 * share:.1f} % of the updates")


class DiesAt(L.Callback):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_an_interrupted_run_is_logged_up_to_its_last_logging_step(
    error: type[BaseException], kind: Any, tmp_path: Path
) -> None:
    logger = kind(tmp_path)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
        train(logger, DiesAt(9, error), report=tmp_path / "report.html")
    run = read_run(logger.log_dir)
    assert [step for step, _ in run.curves["grad_norm/total"]] == [1, 3, 5, 7]
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_killed_run_is_logged_up_to_its_last_logging_step(tmp_path: Path) -> None:
    script = f"""
        import os, signal, time
        from pathlib import Path
        import lightning as L
        from lightning.pytorch.loggers import TensorBoardLogger
        from tests.reporting.test_report import train

        class Kills(L.Callback):
            def on_train_batch_start(self, trainer, *args):
                if trainer.global_step == 9:
                    time.sleep(0.2)  # the writer's thread gets its turn, as in any longer step
                    os.kill(os.getpid(), signal.SIGKILL)

        train(TensorBoardLogger({str(tmp_path)!r}, version="killed"), Kills())
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
    file.write_bytes(file.read_bytes()[:-7])  # as if the disk had been full
    assert [s for s, _ in read_run(folder).curves["grad_norm/total"]][:3] == [1, 3, 5]


def test_a_folder_without_logs_is_an_error_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "logdir must hold TensorBoard events or a metrics.csv" in capsys.readouterr().err


def test_what_is_no_folder_says_so(tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1"
    file.touch()
    for path, what in ((file, "a file"), (tmp_path / "nowhere", "nothing there")):
        with pytest.raises(ValueError, match=rf"logdir must be a folder, got .*{what}; pass"):
            read_run(path)


def test_a_report_may_be_asked_for_by_one_path_and_not_by_none(tmp_path: Path) -> None:
    trainer = train(CSVLogger(tmp_path), max_epochs=1)
    page = write_report(str(trainer.log_dir), tmp_path / "report.html")
    assert "train_loss" in page.read_text()
    with pytest.raises(ValueError, match=r"folders must be .* got none"):
        write_report([], tmp_path / "none.html")


def test_a_report_into_a_folder_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report must be the name of a file, got the folder"):
        train(CSVLogger(tmp_path), DiesAt(0, AssertionError), report=tmp_path)
    with pytest.raises(ValueError, match=r"output must be the name of a file, got the folder"):
        write_report([tmp_path], tmp_path)


def test_the_folder_of_several_runs_names_them(tmp_path: Path) -> None:
    for version in ("a", "b"):
        train(CSVLogger(tmp_path, version=version), max_epochs=1)
    with pytest.raises(ValueError, match=r"one run, got 2 .*lightning_logs/a"):
        read_run(tmp_path)


def test_names_are_escaped_and_gaps_drawn() -> None:
    curve = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    run = Run(name="<b>&", curves={"grad_norm/total": curve, "loss<script>": curve})
    page = render_report([run])
    assert "<b>&<" not in page
    assert "<script>" not in page
    assert any("2 logged gradient norms were not finite" in line for line in clip_audit(run))


@pytest.mark.parametrize(
    ("share", "words"), [(1.0, "almost always"), (0.0, "never acted"), (0.3, "30.0 %")]
)
def test_the_clip_audit_says_what_clipping_was(share: float, words: str) -> None:
    curves = {
        "clip/coefficient": [(t, 1 - share / 2) for t in range(3)],
        "clip/fraction": [(t, share) for t in range(3)],
    }
    assert any(words in line for line in clip_audit(Run(name="a", curves=curves)))


def test_a_resumed_csv_goes_back() -> None:
    from lightning_bigopt.reporting.runs import _in_order

    assert _in_order([(0, 1.0), (2, 2.0), (4, 3.0), (2, 5.0), (3, 6.0)]) == [
        (0, 1.0),
        (2, 5.0),
        (3, 6.0),
    ]
