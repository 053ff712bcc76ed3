"""Writes a file as a whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["save_whole"]


def save_whole(path: Path, contents: dict[str, Any]) -> None:
    """Saves contents with ``torch.save``; a process that is killed leaves no partial file.

    Args:
        path: The file; its folder is created.
        contents: Plain data and tensors.

    Raises:
        Exception: Any error of writing; the partial file is removed then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_whole(Path(folder, "new", "a.pt"), {"update": 3})
        ...     torch.load(Path(folder, "new", "a.pt"), weights_only=True)
        {'update': 3}
    """
    partial = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(contents, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
