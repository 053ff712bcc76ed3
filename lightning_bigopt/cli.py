"""The command ``bigopt``: two functions a subcommand, its options and what it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning_bigopt import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["Command", "MissingExtraError", "main", "require"]


class MissingExtraError(Exception):
    """An optional dependency is not installed; the message says how to get it."""


def require(module: str, *, extra: str) -> None:
    """Makes sure of an optional dependency before any work is done.

    Args:
        module: The top-level module that is needed.
        extra: The group of optional dependencies that brings it.

    Raises:
        MissingExtraError: If it is not installed.

    Example:
        >>> require("json", extra="cli")
        >>> require("nowhere_to_be_found", extra="plot")
        Traceback (most recent call last):
        lightning_bigopt.cli.MissingExtraError: nowhere_to_be_found must be installed, got no such
        module; try: pip install 'lightning-bigopt[plot]'
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{module} must be installed, got no such module; "
            f"try: pip install 'lightning-bigopt[{extra}]'"
        )


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand.

    Args:
        summary: What ``bigopt --help`` says of it.
        add_options: Gives the subcommand's parser its options.
        run: Does the work.
    """

    summary: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


def add_demo_options(parser: ArgumentParser) -> None:
    """The options of ``bigopt demo``."""
    parser.add_argument(
        "--max-steps",
        type=int,
        default=500,
        help="Optimiser updates of the run with our callbacks; the others see as many samples.",
    )
    parser.add_argument("--devices", type=int, default=1, help="Processes; a divisor of 32.")
    parser.add_argument("--strategy", type=str, default="auto", help="Such as ddp.")
    parser.add_argument("--accelerator", type=str, default="cpu", help="Such as cpu or gpu.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and data order.")
    parser.add_argument("--logdir", type=str, default="runs/demo", help="For logs and picture.")


def run_demo(options: Namespace) -> None:
    """Trains a small GPT with and without our callbacks and prints the difference."""
    require("matplotlib", extra="plot")
    from lightning_bigopt.examples.demo import Demo

    Demo(**options.as_dict()).run()


def add_report_options(parser: ArgumentParser) -> None:
    """The options of ``bigopt report``."""
    parser.add_argument("logdir", type=str, help="The logger's folder of a run.")
    parser.add_argument("--beside", type=str, default=None, help="Another run, shown beside it.")
    parser.add_argument("--output", type=str, default="report.html", help="The file to write.")


def run_report(options: Namespace) -> None:
    """Writes the report of a run as one HTML file."""
    require("matplotlib", extra="plot")
    from lightning_bigopt.reporting.report import write_report

    folders = [options.logdir] if options.beside is None else [options.logdir, options.beside]
    print(write_report(folders, options.output))


def add_plan_options(parser: ArgumentParser) -> None:
    """The options of ``bigopt plan``."""
    parser.add_argument("config", type=str, help="A LightningCLI config: trainer, model, data.")
    parser.add_argument("--picture", type=str, default=None, help="Draw it, such as plan.png.")


def run_plan(options: Namespace) -> None:
    """Prints a whole run before anything is trained."""
    if options.picture is not None:
        require("matplotlib", extra="plot")
    from lightning_bigopt.reporting.plan import plan_config

    found = plan_config(options.config)
    print(found)
    if options.picture is not None:
        print(f"picture: {found.picture(options.picture)}")


COMMANDS: Mapping[str, Command] = {
    "demo": Command(
        summary="Trains a small GPT with and without our callbacks and prints the difference.",
        add_options=add_demo_options,
        run=run_demo,
    ),
    "plan": Command(
        summary="Prints a whole run before anything is trained.",
        add_options=add_plan_options,
        run=run_plan,
    ),
    "report": Command(
        summary="Writes the report of a run as one HTML file.",
        add_options=add_report_options,
        run=run_report,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command ``bigopt``.

    Args:
        arguments: The command line without the program's name; None for the real one.

    Returns:
        The exit code: 0, or 1 after an error that the message tells how to mend. A wrong command
        line exits with 2.

    Example:
        >>> main(["demo", "--max-steps", "-1"])
        1
    """
    try:
        require("jsonargparse", extra="cli")
        name, options = _parse(arguments)
        COMMANDS[name].run(options)
    except (MissingExtraError, ValueError) as error:
        print(f"bigopt: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> tuple[str, Namespace]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="bigopt",
        description="Optimisation engineering for PyTorch Lightning.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        subparser = ArgumentParser(description=command.summary)
        command.add_options(subparser)
        subcommands.add_subcommand(name, subparser, help=command.summary)
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    return parsed.command, parsed[parsed.command]


if __name__ == "__main__":
    sys.exit(main())
