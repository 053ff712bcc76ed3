"""``bigopt completion``: the shell completes commands, options and their choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning_bigopt.cli.command import Command, require

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["COMPLETION"]


def make_parser(**texts: Any) -> ArgumentParser:
    """The argument of ``bigopt completion``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="Which shell.")
    return parser


def run(options: Namespace) -> None:
    """Prints the script that makes a shell complete ``bigopt``."""
    require("shtab", extra="cli")
    import shtab

    from lightning_bigopt.cli import make_parser

    # Not jsonargparse's own script: with every class that a config may name, and theirs inside
    # them, it has 74 MB.
    print(shtab.complete(make_parser(), shell=options.shell))


COMPLETION = Command(
    summary="Prints the script that makes a shell complete this command.",
    examples=[
        ("bigopt completion bash >> ~/.bash_completion", ""),
        ("bigopt completion zsh > ~/.zfunc/_bigopt", "where fpath holds ~/.zfunc"),
    ],
    parser=make_parser,
    run=run,
)
