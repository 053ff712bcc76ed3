"""Every private name that the package uses has a test, and every tested name is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lightning_contract.private_names import Use, assertions, used, uses


def test_every_private_name_is_asserted() -> None:
    asserted = {name for assertion in assertions() for name in assertion.names}
    missing = {name: places for name, places in used().items() if name not in asserted}
    assert not missing, "write a test with @asserts(name) in tests/lightning_contract"


@pytest.mark.slow
def test_every_asserted_name_is_used() -> None:
    names = used()
    stale = {a.test: n for a in assertions() for n in a.names if n not in names}
    assert not stale, "the package does not use it any more: delete the test"


def test_every_name_is_asserted_once_with_its_purpose() -> None:
    names = [name for assertion in assertions() for name in assertion.names]
    assert len(names) == len(set(names))
    for assertion in assertions():
        assert len(assertion.docstring.split()) > 5, assertion.test


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f(trainer):\n    return trainer._anything", "_anything"),
        ("def f(a):\n    return getattr(a.b, '_anything')", "_anything"),
        ("def f(a):\n    return vars(a)['_anything']", "_anything"),
        ("def f(a):\n    return own(a, 'loops.module._Anything')", "_Anything"),
        ("from lightning.pytorch.loops import _Anything", "_Anything"),
        ("from lightning._private import Anything", "_private"),
        ("import torch._dynamo", "_dynamo"),
        ("class A(B):\n    def f(self):\n        return self._anything", "_anything"),
    ],
)
def test_a_private_name_of_others_is_found(source: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    assert [use.name for use in uses(tmp_path / "module.py", "module")] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def f(self, other):\n        self._mine = other._mine",
        "def _mine(): ...\n_mine.cache_clear()",
        "def f(a):\n    return a.__dict__, a.public, '__all__', '_bigopt_step_control'",
        "'a sentence with _underscores in it'",
    ],
)
def test_own_names_are_not(source: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    assert list(uses(tmp_path / "module.py", "module")) == []


def test_a_use_contains_its_position(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("\n\ndef f(a):\n    return a._anything")
    assert list(uses(tmp_path / "module.py", "room.module")) == [Use("_anything", "room.module:4")]
