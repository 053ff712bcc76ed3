"""Checks the commands that pages show."""

from __future__ import annotations

from pathlib import Path

from lightning_bigopt.cli import __main__ as cli

ROOT = Path(__file__).parents[2]


def exists(command: list[str]) -> bool:
    """Returns whether the target, the files or the subcommand of a command exist."""
    if command[0] == "make":
        return f"\n{command[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    if command[0] in {"pytest", "python"}:
        return all((ROOT / path).exists() for path in command[1:])
    if command[0] == "bigopt" and len(command) == 2:
        return command[1] in cli.COMMANDS  # a mention, without the required arguments
    if command[0] == "bigopt":
        return cli._parse(command[1:])[0] == command[1]
    return command[0] in {"pip", "tensorboard"}
