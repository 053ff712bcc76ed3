"""What a subcommand of ``bigopt`` is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["Command", "MissingExtraError", "require"]


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
    """A subcommand.

    Args:
        summary: What ``bigopt --help`` says of it.
        examples: Command lines that its own ``--help`` shows, each with a few words.
        parser: Makes its parser from the keyword arguments of an ``ArgumentParser``.
        run: Does the work.
    """

    summary: str
    examples: Sequence[tuple[str, str]]
    parser: Callable[..., ArgumentParser]
    run: Callable[[Namespace], None]

    @property
    def epilog(self) -> str:
        """The examples as the end of a help text."""
        width = max(len(line) for line, _ in self.examples)
        return "examples:\n" + "\n".join(
            f"  {line.ljust(width)}  {words}".rstrip() for line, words in self.examples
        )
