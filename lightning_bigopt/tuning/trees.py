"""Trees of objects and of config dictionaries, whose fields a study replaces."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

from lightning_bigopt.arguments import recorded_arguments
from lightning_bigopt.tuning.paths import Tree

__all__ = ["ConfigTree", "ObjectTree"]


class ObjectTree(Tree):
    """Specifications (dataclasses), and callbacks whose constructor arguments were recorded.

    Example:
        >>> from lightning_bigopt import GradientClipping, NormClip
        >>> from lightning_bigopt.tuning.paths import changed
        >>> callback = GradientClipping(NormClip(1.0), scope="all")
        >>> new = changed(ObjectTree(), callback, {("rule", "max_norm"): 0.5})
        >>> new.rule.max_norm, new.scope, callback.rule.max_norm
        (0.5, 'all', 1.0)
    """

    def names(self, node: Any) -> Sequence[str]:
        """Returns the names of the class of an object and of its base classes."""
        return [base.__name__ for base in type(node).__mro__]

    def fields(self, node: Any) -> Mapping[str, Any] | None:
        """Returns fields of a dataclass, constructor arguments of a callback, or items."""
        if isinstance(node, Mapping):
            return {str(key): value for key, value in node.items()}
        if is_dataclass(node) and not isinstance(node, type):
            return {field.name: getattr(node, field.name) for field in fields(node) if field.init}
        bound = _bound(node)
        if bound is None:
            return None
        bound.apply_defaults()
        _, *names = bound.arguments  # without self
        return {name: bound.arguments[name] for name in names}

    def rebuilt(self, node: Any, values: Mapping[str, Any]) -> Any:
        """Calls the constructor again, so that all its checks run."""
        if isinstance(node, Mapping):
            return {key: values.get(str(key), value) for key, value in node.items()}
        if is_dataclass(node) and not isinstance(node, type):
            return replace(node, **values)
        bound = _bound(node)
        assert bound is not None  # fields returned its arguments
        bound.arguments.update(values)
        return type(node)(*bound.args[1:], **bound.kwargs)


class ConfigTree(Tree):
    """Dictionaries of a parsed config: ``class_path`` with ``init_args``, and plain ones.

    Example:
        >>> from lightning_bigopt.tuning.paths import changed
        >>> rule = {"class_path": "lightning_bigopt.NormClip", "init_args": {"max_norm": 1.0}}
        >>> changed(ConfigTree(), rule, {("max_norm",): 0.5})["init_args"]
        {'max_norm': 0.5}
        >>> ConfigTree().names(rule)[:2]
        ['NormClip', 'ClippingRule']
    """

    def names(self, node: Any) -> Sequence[str]:
        """Returns the names of the class at ``class_path`` and of its base classes."""
        path = node.get("class_path") if isinstance(node, Mapping) else None
        if not isinstance(path, str):
            return []
        module, _, name = path.rpartition(".")
        kind: Any = None
        with suppress(ImportError):
            kind = getattr(import_module(module or "lightning_bigopt"), name, None)
        mro = kind.__mro__ if isinstance(kind, type) else ()
        return [base.__name__ for base in mro] or [name]

    def fields(self, node: Any) -> Mapping[str, Any] | None:
        """Returns ``init_args``, or the items of another dictionary."""
        if not isinstance(node, Mapping):
            return None
        return (node.get("init_args") or {}) if "class_path" in node else node

    def rebuilt(self, node: Any, values: Mapping[str, Any]) -> Any:
        """Returns a copy of the dictionary with other values."""
        if "class_path" in node:
            return {**node, "init_args": {**node.get("init_args", {}), **values}}
        return {**node, **values}


def _bound(node: Any) -> inspect.BoundArguments | None:
    """Returns the arguments with which an object was made; None if they were not recorded."""
    recorded = recorded_arguments(node)
    if recorded is None:
        return None
    arguments, keywords = recorded
    return inspect.signature(type(node).__init__).bind(node, *arguments, **keywords)
