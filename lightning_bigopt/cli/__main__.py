"""The entry point of the command ``bigopt`` and of ``python -m lightning_bigopt.cli``."""

from __future__ import annotations

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

from lightning_bigopt.cli.command import Command, MissingExtraError, require
from lightning_bigopt.cli.compare import COMPARE
from lightning_bigopt.cli.completion import completion_command
from lightning_bigopt.cli.demo import DEMO
from lightning_bigopt.cli.fit import FIT
from lightning_bigopt.cli.merge import MERGE
from lightning_bigopt.cli.plan import PLAN
from lightning_bigopt.cli.report import REPORT
from lightning_bigopt.cli.schedules import SCHEDULES
from lightning_bigopt.cli.tune import TUNE
from lightning_bigopt.trainer_access.packages import classes
from lightning_bigopt.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["COMMANDS", "main", "make_parser"]

COMMANDS: Mapping[str, Command] = {
    "compare": COMPARE,
    "demo": DEMO,
    "fit": FIT,
    "merge": MERGE,
    "plan": PLAN,
    "report": REPORT,
    "schedules": SCHEDULES,
    "tune": TUNE,
    "completion": completion_command(lambda: make_parser()),  # noqa: PLW0108  # defined below
}

_BROKEN_PIPE = 141  # as in a shell: 128 + the number of the signal SIGPIPE
_EXIT_CODES = """\
exit codes:
  0 success, 1 an error whose message says how to fix it, 2 an invalid command line, 130 Ctrl-C
"""
# Errors raised inside these packages are about the command line or the config.
_REPORTED = frozenset(
    {"jsonargparse", "lightning", "lightning_bigopt", "matplotlib", "pytorch_lightning"}
)
# A traceback through these packages only contains no code of the user.
_LIBRARIES = _REPORTED | sys.stdlib_module_names | {"fsspec", "torch", "yaml"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command ``bigopt``.

    Args:
        arguments: The arguments after the program's name; None for those of the process.

    Returns:
        The exit code: 0 after success, 1 after an error whose message says how to fix it, 130
        after Ctrl-C, or 141 if the reader of a pipe has ended. An invalid command line exits with
        2.

    Example:
        >>> main(["demo", "--max-steps", "-1"])
        1
    """
    # A config may name classes of modules in the current folder, which an installed script, unlike
    # ``python -m``, does not search.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        require("jsonargparse", extra="cli")
        name, options = _parse(arguments)
        COMMANDS[name].run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The program that reads the output has ended, as in ``bigopt schedules | head -1``. Python
        # flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit_:
        # Trainer.fit catches Ctrl-C and calls exit(1); the context still holds the interrupt.
        if isinstance(exit_.__context__, KeyboardInterrupt):
            return 130
        raise
    except _reported_errors() as error:
        if not _explains_itself(error):
            raise
        print(f"bigopt: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser(arguments: Sequence[str] = ()) -> ArgumentParser:
    """Makes the parser of the command line, with one subparser for each subcommand.

    Args:
        arguments: The arguments that it will parse: ``bigopt fit`` has the options of the package
            of its model.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class HelpText(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Formats help texts, and keeps the line breaks of descriptions and examples."""

    parser = ArgumentParser(
        prog="bigopt",
        description="Optimization engineering for PyTorch Lightning.",
        epilog=f"bigopt COMMAND --help shows a command's options, with examples.\n\n{_EXIT_CODES}",
        formatter_class=HelpText,
        version=__version__,
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        texts = {"description": command.summary, "epilog": command.epilog}
        given = {"arguments": arguments[1:]} if command is FIT else {}
        subparser = command.parser(formatter_class=HelpText, **texts, **given)
        subcommands.add_subcommand(name, subparser, help=command.summary)
    return parser


def _parse(arguments: Sequence[str] | None) -> tuple[str, Namespace]:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["fit"] and given[1:] and not given[1].startswith("-"):
        raise ValueError(
            f"config must be given as --config, got {given[1]!r}; write bigopt fit --config "
            f"{given[1]}"
        )
    parsed = make_parser(given).parse_args(given)
    return parsed.command, parsed[parsed.command]


def _reported_errors() -> tuple[type[Exception], ...]:
    misconfiguration = classes("fabric.utilities.exceptions.MisconfigurationException")
    return MissingExtraError, OSError, ValueError, *misconfiguration


def _explains_itself(error: Exception) -> bool:
    """Returns whether the message suffices; errors of the user's own code need a traceback."""
    if not isinstance(error, OSError | ValueError):
        return True
    packages = [
        frame.f_globals.get("__name__", "").split(".")[0]
        for frame, _ in walk_tb(error.__traceback__)
    ]
    if isinstance(error, OSError):
        # The standard library raises it for a path on the command line and for a file that the
        # user's model opens. Only the traceback distinguishes them.
        return _LIBRARIES.issuperset(packages)
    return packages[-1] in _REPORTED


if __name__ == "__main__":
    sys.exit(main())
