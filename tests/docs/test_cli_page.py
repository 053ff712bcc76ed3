"""The page of the command line shows what the commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_bigopt.cli import __main__ as cli

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
FLAGS = re.MULTILINE | re.DOTALL
SHOWN = re.findall(r"^```console\n\$ bigopt (.*?)\n```\n\n```text\n(.*?)^```", PAGE, FLAGS)
ENDS = re.findall(r"`bigopt ([a-z]+) --help` .*?ends with\n\n```text\n(.*?)^```", PAGE, FLAGS)


def output(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setenv("COLUMNS", "88")
    try:
        code = cli.main(shlex.split(line))
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    return [row.rstrip() for row in capsys.readouterr().out.strip("\n").splitlines()]


@pytest.mark.parametrize(("line", "text"), SHOWN, ids=[line for line, _ in SHOWN])
def test_commands_print_the_output_shown_on_the_page(line, text, capsys, monkeypatch):
    printed = output(line, capsys, monkeypatch)
    assert [row.rstrip() for row in text.strip("\n").splitlines()] == printed


@pytest.mark.parametrize(("name", "text"), ENDS, ids=[name for name, _ in ENDS])
def test_help_ends_as_shown_on_the_page(name, text, capsys, monkeypatch):
    rows = [row.rstrip() for row in text.strip("\n").splitlines()]
    assert output(f"{name} --help", capsys, monkeypatch)[-len(rows) :] == rows


def test_every_subcommand_has_its_help_on_the_page():
    shown = {line.split()[0] for line, _ in SHOWN} | {name for name, _ in ENDS}
    assert set(cli.COMMANDS) <= shown
