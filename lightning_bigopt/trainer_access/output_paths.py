"""Checks before the first batch that the files of a callback can be written."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["file_error", "folder_problem", "raise_on_every_process"]


def folder_problem(folder: str | PathLike[str]) -> str:
    """Returns why no file can be written into a folder, which need not exist; "" if one can.

    Nothing is created: a temporary file is written into the folder, or into that above it which
    exists, and deleted.

    Example:
        >>> folder_problem(".")
        ''
    """
    path = Path(folder).absolute()
    for existing in (path, *path.parents):
        try:
            existing.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # below a folder that does not exist either, or below a file
        except OSError as error:  # such as a name that is too long
            return f"which cannot be used ({error.strerror})"
        if not existing.is_dir():
            kind = "a link to nothing" if existing.is_symlink() else "a file"
            return f"which is {kind}" if existing == path else f"which is below {kind}"
        try:
            with TemporaryFile(dir=existing) as file:
                file.write(b"0")
        except OSError as error:
            return f"to which nothing can be written ({error.strerror})"
        return ""
    return "which is on a drive that does not exist"


def file_error(name: str, path: str | PathLike[str], *, example: str) -> ValueError | None:
    """Returns the error of a file that cannot be written; None if it can.

    Args:
        name: Name of the argument.
        path: The file.
        example: A good name for the file.

    Example:
        >>> print(file_error("output", ".", example="report.html"))
        output must be the name of a file, got the folder '.'; write 'report.html'
    """
    file = Path(path)
    if os.path.isdir(file):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        return ValueError(
            f"{name} must be the name of a file, got the folder {str(file)!r}; write "
            f"{str(file / example)!r}"
        )
    problem = folder_problem(file.parent)
    if problem:
        return ValueError(
            f"{name} must be a file in a folder that can be written to, got {str(file)!r} in "
            f"{str(file.parent)!r}, {problem}; choose another folder"
        )
    return None


def raise_on_every_process(trainer: Trainer, error: ValueError | None, *, name: str) -> None:
    """Raises on all processes if one has an error, so that the others do not wait for it.

    A collective.

    Args:
        trainer: The Trainer.
        error: The error of this process; None for no error.
        name: Name of the argument.

    Raises:
        ValueError: The error of this process, or one that refers to another process.
    """
    is_wrong = trainer.strategy.reduce_boolean_decision(error is not None, all=False)
    if error is not None:
        raise error
    if is_wrong:
        raise ValueError(
            f"{name} must be writable on every process, got an error on another process than "
            f"process {trainer.global_rank}; read its message"
        )
