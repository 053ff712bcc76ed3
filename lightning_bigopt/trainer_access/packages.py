"""Lightning's classes in both of its packages, ``lightning.pytorch`` and ``pytorch_lightning``.

The packages hold copies of the same code: their classes have the same names, and an object of one
package is not an instance of the class of the other. A user trains with either of them. Only this
module knows the packages; all others get the classes here, by their path within the package.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["classes", "own"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def classes(*paths: str) -> tuple[type[Any], ...]:
    """Returns classes of Lightning in every package that is imported, for ``isinstance``.

    Args:
        paths: Paths within the package, such as ``"strategies.DDPStrategy"``; those of Fabric
            begin with ``"fabric."``.

    Example:
        >>> from lightning.pytorch.callbacks import Timer
        >>> Timer in classes("callbacks.Timer", "callbacks.ModelCheckpoint")
        True
    """
    # pytorch_lightning is not imported here: that takes half a second, and before that no
    # object can be an instance of its classes.
    return _classes(paths, _PACKAGES if "pytorch_lightning" in sys.modules else _PACKAGES[:1])


@cache
def _classes(paths: tuple[str, ...], packages: tuple[str, ...]) -> tuple[type[Any], ...]:
    found = [_find(package, path) for package in packages for path in paths]
    return tuple(kind for kind in found if kind is not None)


def own(trainer: Trainer, path: str) -> Any:
    """Returns a class or function of the package of a Trainer.

    Args:
        trainer: The Trainer; its class may be a user's subclass.
        path: Path within the package, as for :func:`classes`.
    """
    modules = [base.__module__.partition(".")[0] for base in type(trainer).__mro__]
    package = "pytorch_lightning" if "pytorch_lightning" in modules else "lightning.pytorch"
    return _find(package, path)


@cache
def _find(package: str, path: str) -> Any:
    """Returns the object at a path; None if the package does not have it, as an old version."""
    if path.startswith("fabric."):
        package, path = _FABRIC[package], path.removeprefix("fabric.")
    module, _, name = f"{package}.{path}".rpartition(".")
    with suppress(ModuleNotFoundError):
        return getattr(import_module(module), name, None)
    return None
