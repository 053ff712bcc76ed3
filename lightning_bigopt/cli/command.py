"""The description of a subcommand of ``bigopt``, and the check for optional dependencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["Command", "MissingExtraError", "require"]


class MissingExtraError(Exception):
    """Raised if an optional dependency is missing; the message names the command to install it."""


def require(module: str, *, extra: str) -> None:
    """Raises unless an optional dependency is installed.

    Args:
        module: Name of the top-level module that is needed.
        extra: The extra of this package that installs it.

    Raises:
        MissingExtraError: If the module is not installed.

    Example:
        >>> require("json", extra="cli")
        >>> require("nowhere_to_be_found", extra="plot")
        Traceback (most recent call last):
        lightning_bigopt.cli.command.MissingExtraError: nowhere_to_be_found must be installed, got
        no such module; try: pip install 'lightning-bigopt[plot]'
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{module} must be installed, got no such module; "
            f"try: pip install 'lightning-bigopt[{extra}]'"
        )


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand of ``bigopt``.

    Args:
        summary: Description in ``bigopt --help``.
        examples: Command lines shown at the end of its own ``--help``, each with a short remark.
        parser: Function that makes its parser from keyword arguments of ``ArgumentParser``.
        run: Function that runs the subcommand with the parsed options.
    """

    summary: str
    examples: Sequence[tuple[str, str]]
    parser: Callable[..., ArgumentParser]
    run: Callable[[Namespace], None]

    @property
    def epilog(self) -> str:
        """The examples, formatted for the end of a help text."""
        width = max(len(line) for line, _ in self.examples)
        return "examples:\n" + "\n".join(
            f"  {line.ljust(width)}  {remark}".rstrip() for line, remark in self.examples
        )
