"""The command ``bigopt``: one module a subcommand, and here what they share."""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bigopt import __version__
from lightning_bigopt.cli.command import Command, MissingExtraError, require
from lightning_bigopt.cli.completion import COMPLETION
from lightning_bigopt.cli.demo import DEMO
from lightning_bigopt.cli.fit import FIT
from lightning_bigopt.cli.plan import PLAN
from lightning_bigopt.cli.report import REPORT
from lightning_bigopt.cli.schedules import SCHEDULES

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["COMMANDS", "main", "make_parser"]

COMMANDS: Mapping[str, Command] = {
    "demo": DEMO,
    "fit": FIT,
    "plan": PLAN,
    "report": REPORT,
    "schedules": SCHEDULES,
    "completion": COMPLETION,
}

_EXIT_CODES = """\
exit codes:
  0 fine, 1 an error that its message tells how to mend, 2 a wrong command line, 130 Ctrl-C
"""
_OURS = frozenset({"jsonargparse", "lightning", "lightning_bigopt", "matplotlib"})
_LIBRARIES = _OURS | sys.stdlib_module_names | {"fsspec", "torch", "yaml"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command ``bigopt``.

    Args:
        arguments: The command line without the program's name; None for the real one.

    Returns:
        The exit code: 0, 1 after an error that the message tells how to mend, or 130 after
        Ctrl-C. A wrong command line exits with 2.

    Example:
        >>> main(["demo", "--max-steps", "-1"])
        1
    """
    if str(Path.cwd()) not in sys.path:  # a config names classes of files that lie here
        sys.path.insert(0, str(Path.cwd()))
    try:
        require("jsonargparse", extra="cli")
        name, options = _parse(arguments)
        COMMANDS[name].run(options)
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit_:
        # Lightning ends the program by itself after Ctrl-C, with the code of an error.
        if isinstance(exit_.__context__, KeyboardInterrupt):
            return 130
        raise
    except (MissingExtraError, MisconfigurationException, OSError, ValueError) as error:
        if not _is_for_the_user(error):
            raise
        print(f"bigopt: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> ArgumentParser:
    """The parser of the whole command line."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class HelpText(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of examples as they are written."""

    parser = ArgumentParser(
        prog="bigopt",
        description="Optimization engineering for PyTorch Lightning.",
        epilog=f"bigopt COMMAND --help shows a command's options, with examples.\n\n{_EXIT_CODES}",
        formatter_class=HelpText,
        version=__version__,
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        subparser = command.parser(
            description=command.summary, epilog=command.epilog, formatter_class=HelpText
        )
        subcommands.add_subcommand(name, subparser, help=command.summary)
    return parser


def _parse(arguments: Sequence[str] | None) -> tuple[str, Namespace]:
    parsed = make_parser().parse_args(None if arguments is None else list(arguments))
    return parsed.command, parsed[parsed.command]


def _is_for_the_user(error: Exception) -> bool:
    """Whether a message says enough: ours or Lightning's, not that of a model's own code."""
    if isinstance(error, MissingExtraError | MisconfigurationException):
        return True
    packages = [
        frame.f_globals.get("__name__", "").split(".")[0]
        for frame, _ in walk_tb(error.__traceback__)
    ]
    if isinstance(error, OSError):  # a path on the command line, not a file that a model reads
        return _LIBRARIES.issuperset(packages)
    return packages[-1] in _OURS
