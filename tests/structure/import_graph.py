"""Reads the imports of the package from its source: the graph of modules, circles and depth."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_bigopt"


@dataclass(frozen=True)
class Import:
    """One imported module: at the top of the file, inside a function, or for types only."""

    target: str
    line: int
    when: str


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns the files of the package's modules by name, without the package's own name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        names = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names) or "__init__"] = path
    return found


def imports(path: Path) -> Iterator[Import]:
    """Yields every import in a file, also inside functions and for types."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), "import", path)


def _imports(node: ast.AST, when: str, path: Path) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, when)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: write the import absolutely"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _imports(ast.Module(child.body, []), "types", path)
            yield from _imports(ast.Module(child.orelse, []), when, path)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(child, "call" if when == "import" else when, path)
        elif name := _imported_by_name(child):
            yield Import(name, child.lineno, when)
        else:
            yield from _imports(child, when, path)


def _imported_by_name(node: ast.AST) -> str:
    """Returns the module of the package that ``import_module("…")`` names; else ``""``."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")):
        return ""
    name = str(getattr(node.args[0], "value", ""))
    return name if name.startswith(f"{PACKAGE}.") else ""


def inner_module(target: str, root: Path = ROOT) -> str:
    """``lightning_bigopt.a.Name`` → ``a``; a name of the package itself → ``__init__``."""
    names = target.split(".")[1:]
    while names:
        path = root.joinpath(PACKAGE, *names)
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(names)
        names.pop()
    return "__init__"


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Returns for each module the modules of the package that it imports, types included."""
    return {
        name: {
            inner_module(found.target, root)
            for found in imports(path)
            if found.target.split(".")[0] == PACKAGE
        }
        - {name}
        for name, path in modules(root).items()
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of modules that import each other (strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def longest_chain(edges: dict[str, set[str]]) -> list[str]:
    """Returns the longest chain of imports; for a graph without circles."""
    chains: dict[str, list[str]] = {}

    def chain(node: str) -> list[str]:
        if node not in chains:
            below = max((chain(target) for target in edges.get(node, ())), key=len, default=[])
            chains[node] = [node, *below]
        return chains[node]

    return max((chain(node) for node in edges), key=len)
