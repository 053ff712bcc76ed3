"""Finds the fields of a training by dotted path, and replaces their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

__all__ = ["FieldPaths", "Place", "Tree", "changed"]

SHORT_NAMES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("LearningRateScheduler", "schedule"),
    "clip": ("GradientClipping", "rule"),
    "batch": ("BatchSizeScheduler", "policy"),
    "guard": ("StepGuard",),
    "averaging": ("ModelAveraging",),
    "global_batch_size": ("BatchSizeScheduler", "policy", "size"),
}
"""Short names of callbacks and of their specifications."""

Changes: TypeAlias = dict[str, Any]
"""New values by field; a dictionary of class :class:`_Inner` changes fields of the old value."""

_MOST_SHOWN = 12


class Tree(ABC):
    """Reads and rebuilds the nodes of one kind of tree: objects, or dictionaries of a config."""

    @abstractmethod
    def names(self, node: Any) -> Sequence[str]:
        """Returns the names of a node's class and its base classes; empty for other nodes."""

    @abstractmethod
    def fields(self, node: Any) -> Mapping[str, Any] | None:
        """Returns the fields of a node with their values; None for a value without fields."""

    @abstractmethod
    def rebuilt(self, node: Any, values: Mapping[str, Any]) -> Any:
        """Returns a node made anew with other values in some fields."""


@dataclass(frozen=True)
class Place:
    """Where a field is.

    Args:
        root: ``"model"``, ``"trainer"``, ``"data"``, ``"callbacks"`` or ``"optimizer"``.
        keys: Fields from there on; the first one of a callback is its index.
    """

    root: str
    keys: tuple[str, ...]


class FieldPaths:
    """Finds fields by their paths.

    Args:
        tree: How nodes are read.
        arguments: The arguments of model, Trainer and data, by the name of the root.
        callbacks: The callbacks.
        open_roots: Roots that accept any name that is found nowhere else.
        is_shared: Whether a bare name that several roots have goes to all of them; it is ambiguous
            otherwise.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        arguments: Mapping[str, Mapping[str, Any]],
        callbacks: Sequence[Any],
        open_roots: Sequence[str] = (),
        is_shared: bool,
    ) -> None:
        self.tree, self.arguments, self.callbacks = tree, arguments, callbacks
        self.open_roots, self.is_shared = open_roots, is_shared

    def find(self, path: str) -> tuple[Place, ...]:
        """Returns the places of a field; empty if there is none.

        Raises:
            ValueError: If several fields have this path.
        """
        head, *rest = path.split(".")
        root = "model" if head == "module" else head
        inside = self._descend(self.arguments[root], rest) if root in self.arguments else None
        if rest and inside is not None:
            return (Place(root, inside),)
        if found := self._in_arguments(path, [head, *rest]):
            return found
        for places in (
            self._by_short_name(head, rest),
            self._by_class(head, rest),
            self._anywhere([head, *rest]),
        ):
            if len(places) > 1:
                raise _ambiguous(path, [self._written(place) for place in places])
            if places:
                return tuple(places)
        return () if rest else tuple(Place(root, (head,)) for root in self.open_roots[:1])

    def unknown(self, path: str, *, others: Sequence[str] = ()) -> ValueError:
        """Returns the error for a path without a field, with the most similar one.

        Args:
            path: The path.
            others: Further fields, such as those of the optimizer.
        """
        known = [*self._listed(), *others]
        similar = get_close_matches(path, known, n=1, cutoff=0.6)
        if not similar and "." in path:
            last = path.rpartition(".")[2]
            ends = {name: name.rpartition(".")[2] for name in known}
            words = get_close_matches(last, list(ends.values()), n=1)
            similar = [name for name, end in ends.items() if words and end == words[0]]
        if similar:
            advice = f"did you mean {similar[0]!r}?"
        else:
            shown = known[:_MOST_SHOWN]
            more = ", …" if len(known) > len(shown) else ""
            advice = (
                f"the fields are {', '.join(shown)}{more}; give one of the make functions an "
                "argument of this name for anything else"
            )
        return ValueError(f"space must contain paths of fields that exist, got {path!r}; {advice}")

    def _in_arguments(self, path: str, parts: Sequence[str]) -> tuple[Place, ...]:
        found = [
            Place(root, keys)
            for root, fields in self.arguments.items()
            if (keys := self._descend(fields, parts)) is not None
        ]
        if len(found) > 1 and not self.is_shared:
            raise _ambiguous(path, [f"{place.root}.{path}" for place in found])
        return tuple(found)

    def _by_short_name(self, head: str, rest: Sequence[str]) -> list[Place]:
        if head not in SHORT_NAMES:
            return []
        name, *inner = SHORT_NAMES[head]
        # clip.max_norm is a field of the rule, clip.scope one of the callback.
        return self._by_class(name, [*inner, *rest]) or self._by_class(name, rest)

    def _by_class(self, name: str, parts: Sequence[str]) -> list[Place]:
        if not parts:
            return []
        if name == "callbacks":
            keys = self._descend(self.callbacks, parts) if len(parts) > 1 else None
            return [] if keys is None else [Place("callbacks", keys)]
        return [
            Place("callbacks", (str(index), *keys))
            for index, callback in enumerate(self.callbacks)
            if name in self.tree.names(callback)
            and (keys := self._descend(callback, parts)) is not None
        ]

    def _anywhere(self, parts: Sequence[str]) -> list[Place]:
        """Returns the fields of all callbacks whose path ends like this, of the least depth."""
        found = [
            Place("callbacks", (str(index), *before, *keys))
            for index, callback in enumerate(self.callbacks)
            for before, node in self._walk(callback, ())
            if (keys := self._descend(node, parts)) is not None
        ]
        least = min((len(place.keys) for place in found), default=0)
        return [place for place in found if len(place.keys) == least]

    def _descend(self, node: Any, parts: Sequence[str]) -> tuple[str, ...] | None:
        """Returns the keys from a node to a field; None if there is no such field."""
        if not parts:
            return ()
        fields = self._fields(node)
        head, *rest = parts
        if fields is None:
            return None
        keys = [head] if head in fields else []
        if isinstance(node, (list, tuple)) and not keys:
            keys = [key for key, item in fields.items() if head in self.tree.names(item)]
        for key in keys[:1]:
            inner = self._descend(fields[key], rest)
            return None if inner is None else (key, *inner)
        return None

    def _fields(self, node: Any) -> Mapping[str, Any] | None:
        if isinstance(node, (list, tuple)):
            return {str(index): item for index, item in enumerate(node)}
        return self.tree.fields(node)

    def _walk(self, node: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        fields = self._fields(node)
        if fields is None:
            return
        yield keys, node
        for key, child in fields.items():
            yield from self._walk(child, (*keys, key))

    def _written(self, place: Place) -> str:
        """Returns the path of a field of a callback, by its class unless two are of that class."""
        index, *rest = place.keys
        name = next(iter(self.tree.names(self.callbacks[int(index)])), "")
        if sum(name in self.tree.names(callback) for callback in self.callbacks) > 1:
            return ".".join(("callbacks", *place.keys))
        return ".".join((name, *rest))

    def _listed(self) -> list[str]:
        listed = [name for fields in self.arguments.values() for name in fields]
        for index, callback in enumerate(self.callbacks):
            for keys, node in self._walk(callback, (str(index),)):
                places = [Place("callbacks", (*keys, key)) for key in self._fields(node) or ()]
                listed += map(self._written, places)
        short = []
        for name, inner in SHORT_NAMES.items():
            start = ".".join(inner) + "."
            short += [f"{name}.{p[len(start) :]}" for p in listed if p.startswith(start)]
        return list(dict.fromkeys([*listed, *short]))


class _Inner(dict[str, Any]):
    """Changes of fields of a node."""


def changed(tree: Tree, node: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    """Returns a node made anew with other values in some of its fields, at any depth.

    Every node on the way is made once, with all its new values, so that its checks see them
    together.

    Args:
        tree: How nodes are read and rebuilt.
        node: The node.
        values: The new value of each field by its keys.

    Raises:
        ValueError: If one field is inside another one, or a constructor refuses a value.
    """
    changes = _Inner()
    for keys, value in values.items():
        inner = changes
        for key in keys[:-1]:
            inner = inner.setdefault(key, _Inner())
            if not isinstance(inner, _Inner):
                raise _nested(keys)
        if keys[-1] in inner:
            raise _nested(keys)
        inner[keys[-1]] = value
    return _apply(tree, node, changes)


def _apply(tree: Tree, node: Any, changes: _Inner) -> Any:
    if isinstance(node, (list, tuple)):
        items = {str(index): item for index, item in enumerate(node)}
        return type(node)(_new(tree, items, changes, key) for key in items)
    fields = tree.fields(node)
    assert fields is not None  # the path has been found in it
    return tree.rebuilt(node, {key: _new(tree, fields, changes, key) for key in changes})


def _new(tree: Tree, fields: Mapping[str, Any], changes: _Inner, key: str) -> Any:
    if key not in changes:
        return fields[key]
    new = changes[key]
    return _apply(tree, fields[key], new) if isinstance(new, _Inner) else new


def _nested(keys: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"space must not contain a field and a field inside it, got both for {'.'.join(keys)!r}; "
        "remove one of them"
    )


def _ambiguous(path: str, candidates: Sequence[str]) -> ValueError:
    return ValueError(
        f"space must contain paths of one field each, got {path!r}, which {len(candidates)} fields "
        f"have; write one of {', '.join(map(repr, candidates))}"
    )
