"""Private names of Lightning and torch: their uses in the package, and the tests of each."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from tests.structure.import_graph import PACKAGE, modules

TestT = TypeVar("TestT", bound=Callable[..., object])

# Attributes that the package itself sets on objects, by their names as strings.
OUR_ATTRIBUTES = frozenset(
    {
        "_bigopt",  # how the next ones begin
        "_bigopt_bases",
        "_bigopt_callbacks",
        "_bigopt_step_control",
        "_brought_by_module",
        "_loaded_state",
    }
)
# Strings that look like private names and are none: suffixes and joins.
NO_NAMES = frozenset({"_", "_zero"})
# Documented methods of named tuples.
PUBLIC_NAMES = frozenset({"_replace"})


def asserts(*names: str) -> Callable[[TestT], TestT]:
    """Marks a test that asserts private names; its docstring explains their use."""
    return lambda test: test


class Use(NamedTuple):
    """A private name in a module of the package."""

    name: str
    where: str


def is_private(name: str) -> bool:
    """Whether a name has exactly one leading underscore."""
    return re.fullmatch(r"_(?!_)\w+", name) is not None


def uses(path: Path, module: str) -> Iterator[Use]:
    """Returns the private names of others that a module uses: attributes, imports, strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes, variables = _defined(tree)
    for node in ast.walk(tree):
        # A string names an attribute, never a variable of the module.
        is_string = isinstance(node, ast.Constant)
        own = attributes | OUR_ATTRIBUTES | PUBLIC_NAMES | (NO_NAMES if is_string else variables)
        for name in _names(node):
            if is_private(name) and name not in own:
                yield Use(name, f"{module}:{getattr(node, 'lineno', 0)}")


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names)
        if node.module is not None and not node.module.startswith(f"{PACKAGE}."):
            yield from node.module.split(".")
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield from alias.name.split(".")
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        # getattr(x, "_name"), vars(x)["_name"], attrgetter("_name"), own(x, "module._name")
        yield from node.value.split(".") if re.fullmatch(r"\w+(\.\w+)*", node.value) else ()


def _defined(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Returns the attributes that a module defines in classes and on ``self``; its other names."""
    attributes: set[str] = set()
    variables: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            variables.add(node.name)
            attributes |= {
                target.id
                for line in node.body
                if isinstance(line, ast.Assign | ast.AnnAssign)
                for target in (line.targets if isinstance(line, ast.Assign) else [line.target])
                if isinstance(target, ast.Name)
            }
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            variables.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            variables.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _is_self(node.value)
        ):
            attributes.add(node.attr)
    return attributes, variables


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def used() -> dict[str, list[str]]:
    """Returns every private name of other packages that the package uses, with its places."""
    ours = {name for path in modules().values() for names in _of(path) for name in names}
    found: dict[str, list[str]] = {}
    for module, path in modules().items():
        # On ``self`` also what a base class of the package defines in another module.
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        inherited = {n.attr for n in attributes if _is_self(n.value)} & ours
        for name, where in uses(path, module):
            if name not in inherited:
                found.setdefault(name, []).append(where)
    return found


def _of(path: Path) -> tuple[set[str], set[str]]:
    return _defined(ast.parse(path.read_text(encoding="utf-8")))


class Assertion(NamedTuple):
    """A test that asserts private names."""

    names: tuple[str, ...]
    test: str
    docstring: str


def assertions(folder: Path = Path(__file__).parent) -> list[Assertion]:
    """Returns the tests of a folder that are marked with :func:`asserts`."""
    found = []
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "asserts":
                    names = tuple(ast.literal_eval(argument) for argument in mark.args)
                    where = f"{path.name}::{node.name}"
                    found.append(Assertion(names, where, ast.get_docstring(node) or ""))
    return found
