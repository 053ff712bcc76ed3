"""Compares the stored outputs of a notebook with those of a new execution.

Words are compared exactly. A number with a point or an exponent may differ by 2 %, or by one unit
of its last printed digit: other processors add in another order, and training multiplies that.
Whole numbers are compared exactly. In a cell tagged ``varies``, such as one that measures time, the
words are compared and the numbers are not. Pictures are compared in number and size.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

RELATIVE = 0.02
SIZE_RELATIVE = 0.05
_SIGN = r"(?:(?<![\w.)\]])[-+])?"
_NUMBER = re.compile(rf"(?<![A-Za-z_]){_SIGN}(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def differences(stored: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """Returns one line for each difference between the stored outputs and the new ones."""
    found = []
    for number, (one, other) in enumerate(zip_longest(stored["cells"], fresh["cells"])):
        if one is None or other is None or one["source"] != other["source"]:
            return [f"cell {number}: the source differs"]
        if one["cell_type"] == "code":
            found += [f"cell {number}: {text}" for text in _cell_differences(one, other)]
    return found


def errors_and_warnings(notebook: Mapping[str, Any]) -> list[str]:
    """Returns errors, and everything on standard error, where warnings go."""
    found = []
    for number, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                found.append(f"cell {number}: raises {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number}: writes to standard error: {output['text']}")
    return found


def _cell_differences(stored: Mapping[str, Any], fresh: Mapping[str, Any]) -> Iterator[str]:
    varies = "varies" in stored["metadata"].get("tags", ())
    one, other = ([_kind(o) for o in cell["outputs"]] for cell in (stored, fresh))
    if one != other:
        yield f"outputs stored: {one}, now: {other}"
        return
    for before, after in zip(stored["outputs"], fresh["outputs"], strict=True):
        for kind, text in _contents(before).items():
            if kind == "image/png":
                yield from _picture_differences(text, _contents(after)[kind])
            else:
                yield from _text_differences(text, _contents(after)[kind], varies=varies)


def _kind(output: Mapping[str, Any]) -> str:
    return " ".join([output["output_type"], *sorted(_contents(output))])


def _contents(output: Mapping[str, Any]) -> dict[str, str]:
    if output["output_type"] == "stream":
        return {output["name"]: output["text"]}
    if output["output_type"] == "error":
        return {"error": f"{output['ename']}: {output['evalue']}"}
    return dict(output["data"])


def _text_differences(stored: str, fresh: str, *, varies: bool) -> Iterator[str]:
    for one, other in zip_longest(_tokens(stored), _tokens(fresh)):
        if one is None or other is None:  # one output is longer
            yield f"stored {one!r}, now {other!r}"
            return
        if not _same(one, other, varies=varies):
            yield f"stored {one!r}, now {other!r}"


def _tokens(text: str) -> list[str]:
    """Splits a text into numbers and the words between them, without alignment spaces."""
    tokens, end = [], 0
    for number in _NUMBER.finditer(text):
        tokens += [*text[end : number.start()].split(), number[0]]
        end = number.end()
    return tokens + text[end:].split()


def _same(stored: str, fresh: str, *, varies: bool) -> bool:
    if not (_NUMBER.fullmatch(stored) and _NUMBER.fullmatch(fresh)):
        return _rules(stored) == _rules(fresh)
    if varies:
        return True
    if not re.search(r"[.eE]", stored + fresh):
        return int(stored) == int(fresh)
    one, other = float(stored), float(fresh)
    allowed = max(RELATIVE * max(abs(one), abs(other)), _unit(stored), _unit(fresh))
    return abs(one - other) <= allowed * (1 + 1e-9)


def _rules(word: str) -> str:
    """Replaces a rule under a table's head, whose length depends on the numbers."""
    return re.sub(r"([-─═=])\1+", r"\1", word)


def _unit(number: str) -> float:
    """Returns one unit of the last printed digit."""
    mantissa, _, exponent = number.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(10.0 ** (int(exponent or 0) - decimals))


def _picture_differences(stored: str, fresh: str) -> Iterator[str]:
    one, other = picture_size(stored), picture_size(fresh)
    # Axis labels of slightly different numbers differ in width.
    if any(abs(a - b) > SIZE_RELATIVE * a for a, b in zip(one, other, strict=True)):
        yield f"picture stored {one}, now {other} pixels"


def picture_size(png: str) -> tuple[int, int]:
    """Returns width and height in pixels of a picture as notebooks store it."""
    width, height = struct.unpack(">II", base64.b64decode(png)[16:24])
    return width, height
