"""Calls every public class and function with hostile arguments, and judges the answers.

An answer is ``accepted`` (the types allow the values, and the object can be used), ``clear`` (a
short ValueError or TypeError that names the argument, its constraint, the value received and a way
out, raised by the package itself), or a fault: ``crash`` (another exception, or an error from
another library), ``unclear``, ``hang`` (more than a second) or ``wrongly accepted``.

The judge does not use the functions of the package that write the messages.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
import re
import signal
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import torch

import lightning_bigopt
from tests.faults.constructor_targets import Target, is_frozen, targets
from tests.faults.hostile_values import VALUES

FAULTS = ("crash", "unclear", "hang", "wrongly accepted")
LONGEST_MESSAGE = 420  # characters
TEXT = """\
Every public class and function is called with each of many invalid and unusual values for each of
its arguments (NaN, infinities, huge numbers, bools, strings, containers, NumPy scalars, tensors,
objects without a repr, ...), and with random combinations of them. The answers:

- accepted: the types allow the values, and the object can be used;
- clear: a short ValueError or TypeError of this package that names the argument, its constraint,
  the value and a way out;
- crash: another exception, or an error of another library;
- unclear: an error that lacks one of these parts;
- hang: more than a second;
- wrongly accepted: an invalid value without an error.
"""
_PACKAGE = str(Path(lightning_bigopt.__file__).parent)
_SYNONYMS = {"world_size": "processes", "text": "sizes", "value": "duration"}
_WITHOUT_COPY = ("deep list", "generator", "math")
_WITHOUT_PICKLE = ("lambda", "NoRepr()", "NoComparison()", "generator")


class Hang(BaseException):
    """A call took more than a second."""


@dataclass(frozen=True)
class Case:
    """A call with some hostile values.

    Args:
        target: The class or function.
        hostile: Indices into the hostile values, by argument.
    """

    target: Target
    hostile: Mapping[str, int]

    def __str__(self) -> str:
        arguments = ", ".join(f"{n}={VALUES[i][0]}" for n, i in self.hostile.items())
        return f"{self.target.name}({arguments})"


@dataclass(frozen=True)
class Answer:
    """The answer to a case: its kind, and what was raised or went wrong."""

    case: Case
    kind: str
    reason: str = ""


def single_cases(chosen: Sequence[Target]) -> Iterator[Case]:
    """Yields every hostile value for every argument of the targets, one at a time."""
    for target in chosen:
        for name in target.hints:
            for index in range(len(VALUES)):
                yield Case(target, {name: index})


def combined_cases(chosen: Sequence[Target], count: int, *, seed: int) -> Iterator[Case]:
    """Yields calls with two to four hostile values, mostly of a type that the argument allows."""
    generator = random.Random(seed)
    several = [target for target in chosen if len(target.hints) > 1]
    for _ in range(count):
        target = generator.choice(several)
        number = generator.randint(2, min(4, len(target.hints)))
        names = generator.sample(list(target.hints), number)
        hostile = {}
        for name in names:
            allowed = _of_allowed_type(target, name)
            choices = allowed if allowed and generator.random() < 0.8 else range(len(VALUES))
            hostile[name] = generator.choice(choices)
        yield Case(target, hostile)


@functools.cache
def _of_allowed_type(target: Target, name: str) -> list[int]:
    """Returns the indices of the values that the type of an argument allows."""
    return [index for index, (_, make) in enumerate(VALUES) if target.may_be(name, make())]


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after some seconds of the processor's time."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(case: Case) -> Answer:
    """Calls a target and judges its answer."""
    target = case.target
    hostile = {name: VALUES[index][1]() for name, index in case.hostile.items()}
    arguments = {**{n: make() for n, make in target.valid.items()}, **hostile}
    # Arguments in their order: positional-only ones do not exist.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _time_limit(1.0):
                made = target.call(**arguments)
                if isinstance(made, Iterator):
                    next(made, None)
        except Hang:
            return Answer(case, "hang")
        except Exception as error:  # noqa: BLE001  # every exception is judged
            return _judge_error(case, hostile, error)
        wrong = [n for n, v in hostile.items() if not target.may_be(n, v)]
        if wrong:
            return Answer(case, "wrongly accepted", f"{', '.join(wrong)}")
        return _judge_accepted(case, hostile, made)


def _judge_error(
    case: Case, hostile: Mapping[str, Any], error: Exception, *, in_use: bool = False
) -> Answer:
    kind = f"{type(error).__name__}: "
    try:
        text = str(error)
    except Exception as other:  # noqa: BLE001
        return Answer(case, "crash", f"{kind}without a message: {other}")
    reason = kind + (text if len(text) < 500 else f"{text[:500]}… ({len(text)} characters)")
    if not isinstance(error, ValueError | TypeError) or isinstance(error, UnicodeError):
        return Answer(case, "crash", reason)
    if "must " not in text and "expected" not in text:
        return Answer(case, "crash", reason)
    frames = traceback.extract_tb(error.__traceback__)
    if not frames[-1].filename.startswith(_PACKAGE) and frames[-1].filename != "<string>":
        return Answer(case, "crash", f"{reason} (raised in {frames[-1].filename})")
    shown_context = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    problems = [
        *(["another error before it"] if shown_context else []),
        *(["no way out"] if "; " not in text else []),
        *([f"{len(text)} characters"] if len(text) > LONGEST_MESSAGE else []),
        *(["several lines"] if "\n" in text else []),
    ]
    if not in_use:
        names = {*hostile, *(_SYNONYMS[name] for name in hostile if name in _SYNONYMS)}
        named = any(_names(name, text) for name in names)
        shown = any(_shows(value, text) for value in hostile.values())
        problems += [*([] if named else ["no argument"]), *([] if shown else ["no value"])]
    return Answer(case, "unclear" if problems else "clear", f"{reason} ({', '.join(problems)})")


def _names(name: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def _shows(value: Any, text: str, depth: int = 0) -> bool:
    """Returns whether a message shows a value: its text, its class, or a part of it."""
    if isinstance(value, type):
        return value.__name__ in text
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if _names(type(value).__name__, text) or any(form in text for form in _forms(value)):
        return True
    if isinstance(value, str | Generator) or depth == 3:
        return isinstance(value, Generator)  # the call has consumed it
    with contextlib.suppress(Exception):
        count = len(value)
        if re.search(rf"got (\d+ and )?{count}\b", text) or (not count and "got none" in text):
            return True
    with contextlib.suppress(Exception):
        parts = [*value.items()] if isinstance(value, Mapping) else list(islice(value, 10))
        return any(_shows(part, text, depth + 1) for part in parts)
    return False


def _forms(value: Any) -> Iterator[str]:
    """Yields the forms in which a message may show a value."""
    for describe in (repr, str):
        with contextlib.suppress(Exception):
            if describe(value).strip():
                yield describe(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
            yield from (f"{number:g}", f"{number:.0f}", f"{100 * number:.0G}%")
    if isinstance(value, str) and (match := re.match(r"[\d.]+(e\d+)?", value)):
        # A duration is shown in the unit that it is kept in.
        with contextlib.suppress(ValueError):
            number = float(match[0])
            yield from (f"{number:.0f}", f"{60 * number:g} seconds", f"{100 * number:g}%")
    if isinstance(value, str) and not value.strip():
        yield "()"


def _judge_accepted(case: Case, hostile: Mapping[str, Any], made: Any) -> Answer:
    labels = [VALUES[index][0] for index in case.hostile.values()]
    try:
        with _time_limit(1.0):
            repr(made)
            has_copies = case.target.name != "StepControl" and not set(labels) & {*_WITHOUT_COPY}
            if case.target.call is type(made) and has_copies:
                _check_copies(made, with_pickle=not any(x in _WITHOUT_PICKLE for x in labels))
            if case.target.use is not None:
                case.target.use(made)
    except Hang:
        return Answer(case, "hang", "in use")
    except AssertionError as error:
        return Answer(case, "wrongly accepted", f"AssertionError: {error}")
    except Exception as error:  # noqa: BLE001
        # A value that only the use can judge, such as a duration longer than the run.
        answer = _judge_error(case, hostile, error, in_use=True)
        return Answer(case, answer.kind, f"in use: {answer.reason}")
    return Answer(case, "accepted")


def _check_copies(made: Any, *, with_pickle: bool) -> None:
    same = copy.deepcopy(made)
    if is_frozen(made):
        has_nan = "nan" in repr(made)  # two NaN differ
        assert same == made or has_nan, "differs from its copy"
        assert hash(made) == hash(same) or has_nan, "the hash of a copy differs"
    if with_pickle:
        loaded = pickle.loads(pickle.dumps(made))
        assert type(loaded) is type(made)
        if is_frozen(made):
            assert loaded == made or "nan" in repr(made), "differs after pickling"


def judged(cases: Iterator[Case], report: Callable[[Answer], None]) -> None:
    """Judges cases one after the other."""
    for case in cases:
        report(judge(case))


def measure(*, combined: int = 12_000, seed: int = 0) -> str:
    """Judges every hostile value for every argument, and random combinations."""
    chosen = targets()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    faults: list[Answer] = []

    def report(answer: Answer) -> None:
        counts[answer.case.target.group][answer.kind] += 1
        if answer.kind in FAULTS:
            faults.append(answer)

    judged(single_cases(chosen), report)
    judged(combined_cases(chosen, combined, seed=seed), report)
    return f"{TEXT}\n{table(chosen, counts)}" + "".join(
        f"\n- `{a.case}`: {a.kind}: {a.reason}" for a in faults[:40]
    )


def table(chosen: Sequence[Target], counts: Mapping[str, Counter[str]]) -> str:
    """Returns the counts as a Markdown table."""
    kinds = ("accepted", "clear", *FAULTS)
    lines = [
        f"| group | names | cases | {' | '.join(kinds)} |",
        f"|---|{'---:|' * (2 + len(kinds))}",
    ]
    for group in sorted(counts):
        names = sum(target.group == group for target in chosen)
        cells = (counts[group][kind] for kind in kinds)
        lines.append(
            f"| {group} | {names} | {counts[group].total():,} | "
            + " | ".join(f"{cell:,}" for cell in cells)
            + " |"
        )
    total = sum(counts.values(), Counter())
    cells = (f"{total[kind]:,}" for kind in kinds)
    lines.append(f"| all | {len(chosen)} | {total.total():,} | {' | '.join(cells)} |")
    return "\n".join(lines)
