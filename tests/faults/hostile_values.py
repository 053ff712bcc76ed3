"""Values that no argument expects: wrong types, extreme numbers, and objects that misbehave."""

from __future__ import annotations

import datetime as dt
import enum
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_bigopt import (
    AutoClip,
    ConstantBatchSize,
    Cosine,
    Duration,
    MultiStep,
    NonFinite,
    NormClip,
    Skip,
    WarmupCosine,
)


class Color(enum.Enum):
    """A value of an enumeration."""

    RED = 1


class Level(enum.IntEnum):
    """An integer of an enumeration."""

    HIGH = 3


class NoRepr:
    """An object that cannot be described."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class NoComparison:
    """An object that cannot be compared, and has no truth value."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth value")


class Text(str):
    """A string of a subclass."""

    __slots__ = ()


def function() -> float:
    return 1.0


def circular() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


def deep() -> list[Any]:
    items: list[Any] = []
    for _ in range(5000):
        items = [items]
    return items


_CONSTANTS: tuple[object, ...] = (
    # numbers
    *(None, True, False, 0, 1, 2, 3, 7, 100, -1, -7, 10**30, -(10**30), 10**400, 10**5000),
    *(0.0, -0.0, 0.25, 0.5, 1.0, 1.5, -0.5, -1.5, 7.0, 1e308, -1e308, 5e-324, 1e-300, 1e30),
    *(math.nan, math.inf, -math.inf, 1 + 2j, Fraction(1, 2), Decimal("0.5"), Decimal("NaN")),
    *(np.float64(0.5), np.float64(math.nan), np.float32(0.5), np.float16(7), np.int64(3)),
    *(np.int64(-3), np.bool_(True), np.array(5), Level.HIGH),
    # text
    *(
        "",
        " ",
        "x",
        "1.0",
        "nan",
        "inf",
        "true",
        "None",
        "10%",
        "-5%",
        "250%",
        "5 steps",
        "0 steps",
    ),
    *("0%", "3 epochs", "1e999 steps", "1e30 samples", "5 parsecs", "7 min", "x" * 10_000, "\0"),
    *("line\nbreak", "\ud800", "0:8 50%:16", b"1", b"", Text("5%"), bytearray(b"5")),
    # classes and functions
    *(int, Cosine, NormClip, function, len, Ellipsis, NotImplemented, Color.RED, Color, math),
    # objects
    *(Cosine(), WarmupCosine(), NormClip(), AutoClip(), ConstantBatchSize(8), NonFinite(), Skip()),
    *(Duration(5, "steps"), Duration(0.5, "fraction"), Duration(10**30, "samples"), MultiStep()),
    *(Path("x"), dt.timedelta(minutes=5), dt.date(2026, 1, 1)),
    *(torch.float32, torch.device("cpu"), slice(3), range(3), range(10**30)),
)
_MADE: tuple[tuple[str, Callable[[], object]], ...] = (
    ("torch.tensor(0.5)", lambda: torch.tensor(0.5)),
    ("torch.tensor(3)", lambda: torch.tensor(3)),
    ("torch.tensor(nan)", lambda: torch.tensor(math.nan)),
    ("torch.ones(3)", lambda: torch.ones(3)),
    ("torch.ones(0)", lambda: torch.ones(0)),
    ("nn.Linear", lambda: nn.Linear(2, 2)),
    ("nn.Parameter", lambda: nn.Parameter(torch.ones(2))),
    ("SGD", lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)),
    ("np.array([1.0, 2.0])", lambda: np.array([1.0, 2.0])),
    ("np.zeros(0)", lambda: np.zeros(0)),
    ("np.array(['a', None])", lambda: np.array(["a", None], dtype=object)),
    ("lambda", lambda: lambda *_, **__: 1.0),
    ("object()", object),
    ("NoRepr()", NoRepr),
    ("NoComparison()", NoComparison),
    ("generator", lambda: (i for i in (1, 2))),
    ("circular list", circular),
    ("deep list", deep),
    ("[]", list),
    ("()", tuple),
    ("{}", dict),
    ("set()", set),
    ("[[]]", lambda: [[]]),
    ("[None]", lambda: [None]),
    ("[1, 2]", lambda: [1, 2]),
    ("[1, nan]", lambda: [1, math.nan]),
    ("['a', 'b']", lambda: ["a", "b"]),
    ("('a', 'a')", lambda: ("a", "a")),
    ("{1, 2}", lambda: {1, 2}),
    ("{'a': 1}", lambda: {"a": 1}),
    ("{'a': None}", lambda: {"a": None}),
    ("{'a': nan}", lambda: {"a": math.nan}),
    ("{'a': True}", lambda: {"a": True}),
    ("{1: 2}", lambda: {1: 2}),
    ("{None: None}", lambda: {None: None}),
    ("{'': ''}", lambda: {"": ""}),
    ("{'0%': 4, '50%': True}", lambda: {"0%": 4, "50%": True}),
    ("{'0%': 4, nan: 8}", lambda: {"0%": 4, math.nan: 8}),
    ("{'0%': 4, '50%': 10**30}", lambda: {"0%": 4, "50%": 10**30}),
    ("{'0%': 1.0, '50%': nan}", lambda: {"0%": 1.0, "50%": math.nan}),
    ("{'0%': 1.0, '50%': '1'}", lambda: {"0%": 1.0, "50%": "1"}),
    ("{'0%': 1.0, '50%': -1}", lambda: {"0%": 1.0, "50%": -1}),
    ("{'*': Cosine()}", lambda: {"*": Cosine()}),
    ("{'[': Cosine()}", lambda: {"[": Cosine()}),
    ("{'*': NormClip()}", lambda: {"*": NormClip()}),
    ("{NormClip(): '*'}", lambda: {NormClip(): "*"}),
    ("{'num_workers': -1}", lambda: {"num_workers": -1}),
    ("{'a': {'b': {'c': []}}}", lambda: {"a": {"b": {"c": []}}}),
    ("OrderedDict()", OrderedDict),
    ("deque([1])", lambda: deque([1])),
    ("[Cosine()]", lambda: [Cosine()]),
    ("[Cosine(), Cosine]", lambda: [Cosine(), Cosine]),
    ("[('50%', Cosine()), 3]", lambda: [("50%", Cosine()), 3]),
    ("[('50%', Cosine()), Cosine()]", lambda: [("50%", Cosine()), Cosine()]),
    ("[(nan, Cosine()), Cosine()]", lambda: [(math.nan, Cosine()), Cosine()]),
    ("[('50%',), Cosine()]", lambda: [("50%",), Cosine()]),
    ("[NonFinite(), None]", lambda: [NonFinite(), None]),
    ("[NonFinite(), NonFinite()]", lambda: [NonFinite(), NonFinite()]),
    ("[Skip(), Skip()]", lambda: [Skip(), Skip()]),
    ("[NoRepr()]", lambda: [NoRepr()]),
)


def _named(value: object) -> tuple[str, Callable[[], object]]:
    if isinstance(value, int) and abs(value) > 10**30:
        text = f"an int of {value.bit_length()} bits"
    elif isinstance(value, str) and len(value) > 100:
        text = f"a string of {len(value)} characters"
    else:
        text = repr(value)
    return text, lambda: value


VALUES: tuple[tuple[str, Callable[[], object]], ...] = (*map(_named, _CONSTANTS), *_MADE)
"""Every hostile value: a description, and a function that returns it (a new one if it is mutable).

Some are valid for some arguments; the oracle in :mod:`tests.faults.conforming` decides which.
"""
