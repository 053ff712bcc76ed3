"""``bigopt completion``: prints a shell script that completes commands, options and choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["completion_command"]


def completion_command(whole_parser: Callable[[], ArgumentParser]) -> Command:
    """Makes the subcommand.

    Args:
        whole_parser: Function that makes the parser of the command line with all subcommands.

    Returns:
        The subcommand.
    """

    def run(options: Namespace) -> None:
        require("shtab", extra="cli")
        import shtab

        # jsonargparse's own completion script lists every class that a config may name, and the
        # arguments of each, nested: 74 MB. shtab alone writes the options only.
        print(shtab.complete(whole_parser(), shell=options.shell))

    return Command(
        summary="Prints the script for tab completion in a shell.",
        examples=[
            ("bigopt completion bash >> ~/.bash_completion", ""),
            ("bigopt completion zsh > ~/.zfunc/_bigopt", "if fpath contains ~/.zfunc"),
        ],
        parser=make_parser,
        run=run,
    )


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt completion``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="Name of the shell.")
    return parser
