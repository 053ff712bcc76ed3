"""Metadata, pins and installed versions agree."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def version() -> str:
    tree = ast.parse((ROOT / "lightning_bigopt" / "version.py").read_text())
    return next(
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", version())
    assert f"\nversion: {version()}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    "pin", [p for p in PINS if p.marker is None or p.marker.evaluate()], ids=lambda p: p.name
)
def test_installed_versions_are_those_pinned(pin: Requirement):
    try:
        installed = metadata.version(pin.name)
    except metadata.PackageNotFoundError:
        return  # only needed on other platforms
    assert pin.specifier.contains(installed), f"{pin} is pinned, {installed} is installed"


def test_every_indirect_dependency_is_pinned():
    pinned = {canonicalize_name(pin.name) for pin in PINS}
    assert "torch" in pinned
    assert "torchvision" not in pinned
    todo, seen = [Requirement("lightning-bigopt[dev]")], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        for line in metadata.requires(name) or []:
            child = Requirement(line)
            extras = [*requirement.extras, ""]
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    ours = {"lightning-bigopt", "setuptools"}
    unpinned = {name for name, _ in seen} - pinned - ours
    assert not {name for name in unpinned if not name.startswith(("nvidia-", "cuda-", "triton"))}


def test_package_is_typed():
    assert (ROOT / "lightning_bigopt" / "py.typed").is_file()
