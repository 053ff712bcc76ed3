"""Writes the batches of rejected updates to files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.callbacks.step_guard.whole_file import save_whole
from lightning_bigopt.trainer_access import output_paths
from lightning_bigopt.type_checks import path_or_none

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["RejectionFiles"]

_MAX_FILES = 20


class RejectionFiles:
    """The folder to which every process writes the batches of at most 20 rejected updates.

    Args:
        folder: The folder; None to write nothing.

    Raises:
        ValueError: If ``folder`` is neither a path nor None.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = path_or_none("forensics", folder, hint="write 'rejected'")
        self._count = 0
        self._has_warned = False

    def check(self, trainer: Trainer) -> None:
        """Raises on all processes if one of them cannot write to the folder; a collective.

        Raises:
            ValueError: If the folder is a file, is below one, or cannot be written to.
        """
        problem = "" if self.folder is None else output_paths.folder_problem(self.folder)
        error = None
        if problem:
            error = ValueError(
                f"forensics must be a folder that can be written to, got {self.folder!r}, "
                f"{problem}; choose another folder, or None to write no batches"
            )
        output_paths.raise_on_every_process(trainer, error, name="forensics")

    def next_file(self, trainer: Trainer) -> Path | None:
        """Returns the file for the current update; None if no more files are written."""
        if self.folder is None or self._count >= _MAX_FILES:
            return None
        name = f"update-{trainer.global_step:08d}-rank{trainer.global_rank}.pt"
        return Path(self.folder, name)

    def write(self, path: Path, contents: Callable[[], dict[str, Any]]) -> bool:
        """Writes a file as a whole or not at all; the first error is a warning.

        Args:
            path: The file.
            contents: Returns the contents.

        Returns:
            Whether the file was written.
        """
        try:
            save_whole(path, contents())
        except Exception as error:  # noqa: BLE001  # a full disk must not end the training
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"The batches of a rejected update could not be written to {str(path)!r} "
                    f"({type(error).__name__}: {error}). The training continues, without another "
                    "warning; repair the folder to get the batches of later rejections.",
                    stacklevel=2,
                )
            return False
        self._count += 1
        return True
