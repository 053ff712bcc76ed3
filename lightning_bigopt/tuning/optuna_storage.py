"""Storages of Optuna by name, opened before the first trial."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import shown

if TYPE_CHECKING:
    from optuna.study import Study as OptunaStudy
    from optuna.trial import Trial

__all__ = ["make_storage", "open_study", "suggest"]

_ATTEMPTS = 6
_RACES = ("already exists", "unique constraint", "duplicate", "database is locked")


def open_study(storage: Any, **options: Any) -> OptunaStudy:
    """Returns a study of a storage, which is made if it does not exist.

    Args:
        storage: As for :func:`make_storage`.
        options: Further arguments of ``optuna.create_study``.

    Raises:
        ValueError: If the storage cannot be used.
    """
    try:
        made = make_storage(storage)
    except (OSError, JSONDecodeError) as error:
        raise _unusable(storage, error) from error
    try:
        return _create_study(made, options, attempts=_ATTEMPTS)
    except Exception as error:  # each database has errors of its own
        raise _unusable(storage, error.__cause__ or error) from error


def _create_study(storage: Any, options: Mapping[str, Any], *, attempts: int) -> OptunaStudy:
    import optuna

    try:
        return optuna.create_study(storage=storage, load_if_exists=True, **options)
    except Exception as error:
        if attempts == 1 or not _is_race(error):
            raise
        time.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - lets the other process finish
        return _create_study(storage, options, attempts=attempts - 1)


def _is_race(error: BaseException) -> bool:
    """Returns whether another process has made the tables of a database at the same time."""
    text = str(error).lower()
    return any(words in text for words in _RACES)


def suggest(trial: Trial, path: str, distribution: Any) -> None:
    """Draws the value of a field.

    Args:
        trial: The trial.
        path: Path of the field.
        distribution: Its distribution.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(path, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(path, distribution.low, distribution.high, log=distribution.log)
    else:
        trial.suggest_float(path, distribution.low, distribution.high, log=distribution.log)


def make_storage(storage: Any) -> Any:
    """Returns a storage of Optuna.

    Args:
        storage: A file ``study.db`` (SQLite), a file ``study.journal`` or ``study.log`` (a journal,
            also for processes that share a network drive), a URL, a storage of Optuna, or None for
            the memory of this process.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> make_storage("study.txt")
        Traceback (most recent call last):
        ValueError: storage must be a file .db, .journal or .log, a URL or None, got 'study.txt';
        write 'study.db'
    """
    import optuna

    if storage is None or isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if not isinstance(storage, (str, os.PathLike)):
        raise _storage_error(storage)
    text = os.fspath(storage)
    if "://" in text:
        return text
    path = Path(text)
    if path.suffix not in (".db", ".sqlite", ".sqlite3", ".journal", ".log"):
        raise _storage_error(text)
    if path.is_dir():
        raise _unusable(text, "it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".journal", ".log"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(text))
    return f"sqlite:///{text}"


def _storage_error(storage: Any) -> ValueError:
    return ValueError(
        "storage must be a file .db, .journal or .log, a URL or None, got "
        f"{shown(storage)}; write 'study.db'"
    )


def _unusable(storage: Any, reason: BaseException | str) -> ValueError:
    first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
    return ValueError(
        f"storage must be a database or journal that can be written, got {shown(str(storage))}: "
        f"{first_line}; pass another file, such as 'study.db'"
    )
