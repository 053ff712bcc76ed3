from __future__ import annotations

import pytest

from lightning_bigopt import __version__, cli


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return exit_.value.code


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown and command.summary[:30] in shown for name, command in cli.COMMANDS.items()
    )


def test_help_of_the_demo_tells_options_and_defaults(capsys: pytest.CaptureFixture[str]):
    assert exit_code("demo", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--max-steps", "--devices", "--strategy", "--seed", "--logdir"):
        assert option in shown
    assert "default: runs/demo" in shown


def test_version(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--version") == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [(), ("nothing",), ("demo", "--steps", "3"), ("demo", "--max-steps", "many")]
)
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...]):
    assert exit_code(*arguments) == 2


def test_a_bad_value_is_one_line_and_exits_with_1(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--devices", "3"]) == 1
    assert capsys.readouterr().err == "bigopt: error: devices must divide 32, got 3\n"


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("jsonargparse", ["--help"], "cli"), ("matplotlib", ["demo"], "plot")],
)
def test_a_missing_dependency_is_named_with_the_way_out(
    missing: str,
    arguments: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    found = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else found(name))
    assert cli.main(arguments) == 1
    message = capsys.readouterr().err
    assert missing in message
    assert f"pip install 'lightning-bigopt[{extra}]'" in message


def test_the_options_of_the_demo_are_the_fields_of_the_demo():
    from dataclasses import asdict

    from lightning_bigopt.examples.demo import Demo

    _, options = cli._parse(["demo"])
    assert options.as_dict() == asdict(Demo())
