"""The command line as a whole: help, exit codes, messages."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_bigopt import __version__
from lightning_bigopt.cli import __main__ as cli
from lightning_bigopt.cli import command
from tests.helpers import Probe, Regression


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return exit_.value.code


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown and found.summary in shown for name, found in cli.COMMANDS.items())
    assert "130 Ctrl-C" in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_subcommand_ends_with_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert exit_code(name, "--help") == 0
    shown = capsys.readouterr().out
    assert cli.COMMANDS[name].summary in " ".join(shown.split())
    written = [line for line in shown.splitlines() if line.startswith("  bigopt ")]
    assert len(written) == len(cli.COMMANDS[name].examples)
    monkeypatch.chdir(Path(__file__).parents[2])
    for line, _ in cli.COMMANDS[name].examples:
        assert any(line in shown_line for shown_line in written)
        arguments = shlex.split(line.partition(" >")[0])[1:]
        configs = [word for word in arguments if word.endswith(".yaml")]
        if any(word.endswith("help") or word == "--print_config" for word in arguments):
            assert exit_code(*arguments) == 0
        elif name != "fit" or all(Path(config).exists() for config in configs):
            assert cli._parse(arguments)[0] == name


def test_help_of_the_demo_shows_options_and_defaults(capsys: pytest.CaptureFixture[str]):
    assert exit_code("demo", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--max-steps", "--devices", "--strategy", "--seed", "--logdir"):
        assert option in shown
    assert "default: runs/demo" in shown


def test_version(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--version") == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("demo", "--steps", "3"),
        ("demo", "--max-steps", "many"),
        ("completion", "fish"),
        ("fit",),
        ("fit", "--config", "nowhere.yaml"),
        ("fit", "--model", "NoSuchModel"),
    ],
)
def test_invalid_command_line_exits_with_2(arguments: tuple[str, ...]):
    assert exit_code(*arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--devices", "3"], "devices must divide 32, got 3; write 2"),
        (["schedules", "--max-steps", "0"], "max-steps must be positive, got 0; write 1000"),
        (
            ["schedules", "WarmupCosin"],
            (
                "schedule must be one of those that bigopt schedules lists, got 'WarmupCosin'; did "
                "you mean WarmupCosine?"
            ),
        ),
        (
            ["fit", "my.yaml"],
            "config must be given as --config, got 'my.yaml'; write bigopt fit --config my.yaml",
        ),
        (
            ["plan", "nowhere.yaml"],
            (
                "config must be a file, got 'nowhere.yaml', which does not exist; pass one such as "
                "examples/gpt.yaml"
            ),
        ),
    ],
)
def test_invalid_value_prints_one_line_and_exits_with_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"bigopt: error: {message}\n"


def test_errors_of_a_config_come_after_a_short_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "wrong.yaml"
    config.write_text("trainer:\n  no_such_option: 1\n")
    for arguments in (["fit", "--config", str(config)], ["plan", str(config)]):
        assert exit_code(*arguments) == 2
        message = capsys.readouterr().err
        assert "no_such_option" in message
        assert len(message.splitlines()) < 12


@pytest.mark.slow
def test_reader_of_a_pipe_that_has_ended_is_no_error():
    command_line = f"{shlex.quote(sys.executable)} -m lightning_bigopt.cli schedules"
    for count in (0, 1):
        result = subprocess.run(
            ["bash", "-c", f"{command_line} | head -n {count}; echo ${{PIPESTATUS[0]}}"],
            capture_output=True,
            text=True,
            check=True,
        )
        *lines, code = result.stdout.splitlines()
        assert len(lines) == count
        assert code in {"0", "141"}  # 0 if head has read everything before it ended
        assert "BrokenPipe" not in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("jsonargparse", ["--help"], "cli"),
        ("matplotlib", ["demo"], "plot"),
        ("matplotlib", ["schedules", "Cosine", "--picture", "cosine.png"], "plot"),
        ("shtab", ["completion", "bash"], "cli"),
    ],
)
def test_missing_dependency_prints_the_install_command(
    missing: str,
    arguments: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    found = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else found(name))
    assert cli.main(arguments) == 1
    message = capsys.readouterr().err
    assert missing in message
    assert f"pip install 'lightning-bigopt[{extra}]'" in message


def test_options_of_the_demo_are_the_fields_of_its_class():
    from lightning_bigopt.examples.demo import Demo

    _, options = cli._parse(["demo"])
    assert options.as_dict() == asdict(Demo())


class InterruptedModule(Probe):
    """Raises KeyboardInterrupt in the second batch."""

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        if batch_idx == 1:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


class FailingModule(Probe):
    """A user's model that raises an error."""

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        raise ValueError("a mistake in the model")


class MissingFileModule(Probe):
    """A user's model that reads a file which does not exist."""

    def on_train_start(self) -> None:
        Path("vocabulary.txt").read_text(encoding="utf-8")


class DataModule(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Regression(8), batch_size=2)


def fit(model: str, folder: Path, *more: str) -> int:
    here = "tests.cli.test_command_line"
    quiet = ("logger", "enable_progress_bar", "enable_checkpointing")
    trainer = {"accelerator": "cpu", "max_steps": "3", "default_root_dir": str(folder)}
    trainer |= dict.fromkeys(quiet, "false")
    options = [word for name, value in trainer.items() for word in (f"--trainer.{name}", value)]
    return cli.main(
        ["fit", "--model", f"{here}.{model}", "--data", f"{here}.DataModule", *options, *more]
    )


def test_ctrl_c_exits_with_130(tmp_path: Path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert fit("InterruptedModule", tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, handler)


def test_ctrl_c_outside_of_training_exits_with_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_bigopt.cli.__main__._parse", interrupt)
    assert cli.main(["plan", "a.yaml"]) == 130


def test_error_in_a_users_model_keeps_its_traceback(tmp_path: Path):
    with pytest.raises(ValueError, match="a mistake in the model"):
        fit("FailingModule", tmp_path)


def test_missing_file_of_a_users_model_keeps_its_traceback(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.txt"):
        fit("MissingFileModule", tmp_path)


def test_missing_checkpoint_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit("Probe", tmp_path, "--ckpt_path", str(tmp_path / "none.ckpt")) == 1
    assert "none.ckpt" in capsys.readouterr().err


def test_error_of_lightning_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit("Probe", tmp_path, "--trainer.min_epochs", "-3", "--trainer.devices", "0") == 1
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("bigopt: ")]
    assert "devices" in line


def test_conflict_prints_one_line_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clip = ["--trainer.callbacks+", "GradientClipping", "--trainer.callbacks.rule", "ZClip"]
    assert fit("Probe", tmp_path, *clip, "--trainer.gradient_clip_val", "1.0") == 1
    assert (
        "bigopt: error: gradient_clip_val must be None with GradientClipping, got 1.0; "
        "keep one of them\n" in capsys.readouterr().err
    )
