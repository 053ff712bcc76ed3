"""Hostile arguments: a sample of all cases, and every fault that was found before."""

from __future__ import annotations

import inspect
import math
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

import lightning_bigopt as bigopt
from lightning_bigopt import gradients
from lightning_bigopt.batching import adascale_gain, simulate
from tests.faults import constructors
from tests.faults.constructor_targets import NOT_CALLED, VALID, targets
from tests.faults.constructors import FAULTS, Answer, Case, combined_cases, judge, single_cases
from tests.faults.hostile_values import VALUES
from tests.helpers import QUIET

CASES = 3000


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    chosen = targets()
    single = random.Random(1).sample(list(single_cases(chosen)), CASES)
    return [*map(judge, single), *map(judge, combined_cases(chosen, CASES // 3, seed=1))]


@pytest.mark.slow
def test_no_answer_is_a_fault(answers: list[Answer]) -> None:
    faults = [f"{a.case}: {a.kind}: {a.reason}" for a in answers if a.kind in FAULTS]
    assert not faults, "\n".join(faults[:10])


@pytest.mark.slow
def test_answers_are_of_both_kinds(answers: list[Answer]) -> None:
    kinds = [answer.kind for answer in answers]
    assert kinds.count("accepted") > CASES / 50
    assert kinds.count("clear") > CASES / 2


def test_every_public_class_and_function_is_called_or_named() -> None:
    called = {target.name for target in targets()}
    assert set(bigopt.__all__) <= called | NOT_CALLED
    assert not called & NOT_CALLED


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_valid_calls_are_accepted(target: Any) -> None:
    answer = judge(Case(target, {}))
    assert answer.kind == "accepted", answer.reason


class TestJudge:
    """The judge itself finds each kind of fault."""

    def judged(self, call: Callable[..., Any], index: int = 0, **options: Any) -> str:
        target = constructors.Target("call", "test", call, **options)
        return judge(Case(target, {"end": index})).kind

    def test_other_exceptions_are_crashes(self) -> None:
        def call(end: float) -> None:
            raise AttributeError("end must be 1, got None; write 1")

        assert self.judged(call) == "crash"

    def test_errors_of_other_libraries_are_crashes(self) -> None:
        def call(end: float) -> None:
            torch.zeros(2) + torch.zeros(3)

        assert self.judged(call) == "crash"

    def test_messages_without_a_part_are_unclear(self) -> None:
        # In the package, so that the error is not one of another library.
        assert self.judged(raise_in_package("end must be a number, got None; write 1")) == "clear"
        for message in (
            "end must be a number, got None",
            "it must be a number, got None; write 1",
            "end must be a number; write 1",
            "end must be a number, got None; " + "x" * 500,
        ):
            assert self.judged(raise_in_package(message)) == "unclear", message

    def test_endless_loops_are_hangs(self) -> None:
        def call(end: float) -> None:
            while True:
                pass

        assert self.judged(call) == "hang"

    def test_accepted_values_of_another_type_are_faults(self) -> None:
        def call(end: float) -> None:
            """Accepts anything."""

        assert self.judged(call) == "wrongly accepted"


def raise_in_package(message: str) -> Callable[..., Any]:
    """Returns a function whose error appears to be raised by the package."""
    names: dict[str, Any] = {"message": message, "__name__": __name__}
    path = str(Path(bigopt.__file__).parent / "made_by_the_test.py")
    exec(compile("def call(end: float):\n    raise ValueError(message)", path, "exec"), names)
    call: Callable[..., Any] = names["call"]
    return call


KNOWN = [
    (lambda: bigopt.GradientNoiseScale(minimum_updates=math.nan), "minimum_updates must be"),
    (lambda: bigopt.GlobalBatchFinder(global_batch_size=8, smallest=math.nan), "smallest must be"),
    (lambda: bigopt.GlobalBatchFinder(global_batch_size=8, attribute=3), "attribute must be a str"),
    (lambda: bigopt.NormClip(schedule=3), "schedule must be a Schedule, got 3"),
    (lambda: bigopt.NormClip(norm_type=True), "norm_type must be 1, 2 or inf, got True"),
    (lambda: bigopt.Cosine(end=10**400), "end must be non-negative and finite, got an int; "),
    (lambda: bigopt.Cosine(end=10**5000), "end must be non-negative and finite, got an int; "),
    (lambda: bigopt.AutoClip(window=10**30), r"window must be an integer of at most 2\*\*53"),
    (lambda: bigopt.BatchSizeRamp(8, end=64, over="5%", increment=10**30), "increment must be a"),
    (lambda: bigopt.BatchSizeRamp(8, end=64, over="5%", increment=2**50), "write 56, or None"),
    (lambda: bigopt.StepDecay(every=5e-324), "every must be longer than zero, got '5E-322%'; "),
    (lambda: bigopt.Duration.parse("9" * 5000), r"duration must be .*got inf; write an int"),
    (
        lambda: bigopt.Duration.parse(10**400),
        r"duration must be a number of steps of at most 2\*\*53, got an int; write 500",
    ),
    (lambda: bigopt.Horizon(clock="weeks", budget=1), "clock must be 'steps', .*, got 'weeks'; "),
    (lambda: bigopt.Horizon.of_steps(10).fraction("5%", start=math.nan), "start must be finite"),
    (lambda: bigopt.ReduceOnPlateau("loss", threshold=math.nan), "threshold must be non-neg"),
    (lambda: bigopt.LearningRateRangeTest(then=object()), "then must be 'use' or 'report', got"),
    (lambda: bigopt.StepGuard(forensics=True), "forensics must be a path or None, got True; "),
    (lambda: bigopt.AGC(exclude=3), r"exclude must be a pattern or a list of patterns, got 3; "),
    (lambda: bigopt.Groups(3), "rules must be a dict from patterns to rules, got 3; write"),
    (lambda: gradients.step_control(3), "optimizer must be a torch optimizer, got 3; pass the"),
    (lambda: gradients.takes_grad_scale("Adam"), "optimizer must be a torch optimizer, got 'Adam'"),
    (lambda: gradients.measure(nn.Linear(1, 1).parameters()), "parameters must be pairs of name"),
    (lambda: adascale_gain(2.0, variance=math.nan, square_norm=1.0), "variance must be finite"),
    (
        lambda: simulate(
            bigopt.ConstantBatchSize(8),
            clock="steps",
            budget=5,
            micro_batch_size=4,
            world_size=1,
            batches_per_epoch=-7,
        ),
        "batches_per_epoch must be a positive number of batches, got -7; ",
    ),
    (lambda: bigopt.Cosine(start=np.bool_(True)), "start must be non-negative and finite, got"),
    (lambda: bigopt.Cosine()("0.5"), "fraction must be a finite number, got '0.5'; write 0.5 with"),
    (lambda: bigopt.Cosine()(math.nan), "fraction must be non-negative, got nan; divide"),
    (lambda: bigopt.Cosine().resolve(100), "horizon must be a Horizon, got 100; write Horizon.of"),
    (lambda: bigopt.Constant(level="x" * 10_000), "level must be .*, got a str; write"),
]


@pytest.mark.parametrize(("call", "message"), KNOWN)
def test_known_faults_are_answered(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "; " in str(caught.value)
    assert caught.value.__cause__ is None


def test_ramp_over_millions_of_samples_is_fast() -> None:
    """Without an increment the ramp has a step for every sample; it took more than 4 s."""
    start = time.process_time()
    ramp = bigopt.BatchSizeRamp(16, end=10_000_000, over=1.0)
    sizes = [ramp(bigopt.Progress(fraction=fraction)) for fraction in (0.0, 0.25, 0.5, 1.0)]
    assert sizes == [16, 16 + 9_999_984 // 4, 16 + 9_999_984 // 2, 10_000_000]
    huge = bigopt.BatchSizeRamp(1, end=2**53, over="1e6 samples")
    assert huge(bigopt.Progress(fraction=0.5, samples=1_000_000)) == 2**53
    horizon = simulate(
        ramp,
        clock="samples",
        budget=1e9,
        micro_batch_size=16,
        world_size=1,
        batches_per_epoch=10**8,
    )
    assert sum(span.updates * span.samples for span in horizon.spans) >= 1e9
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(("increment", "over"), [(None, "10%"), (3, "300 samples"), (7, "9 steps")])
def test_ramp_equals_its_step_function(increment: int | None, over: str) -> None:
    ramp = bigopt.BatchSizeRamp(8, end=8 + 21 * 4, over=over, increment=increment)
    steps = ramp.step_function()
    assert steps is not None
    for index in range(1000):
        progress = bigopt.Progress(fraction=index / 5000, steps=index // 50, samples=index)
        assert ramp(progress) == steps.at(progress)


def test_numpy_scalars_become_plain_numbers() -> None:
    """A float32 would give factors with the precision of float32."""
    schedule = bigopt.Cosine(start=np.float32(0.5), end=np.int64(0))
    assert repr(schedule) == "Cosine(start=0.5, end=0)"
    assert schedule == bigopt.Cosine(start=0.5, end=0.0)
    assert type(schedule(0.3)) is float
    assert bigopt.ConstantBatchSize(np.int64(8)) == bigopt.ConstantBatchSize(8)
    assert str(bigopt.Duration(np.float64(5), "steps")) == "5.0 steps"


def test_every_required_argument_has_a_valid_value() -> None:
    for target in targets():
        parameters = inspect.signature(target.call).parameters.values()
        required = {
            p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        }
        assert required == set(VALID.get(target.name, target.valid)) & required


NEGATIVE = {
    "Uniform.low",
    "Power.exponent",
    # measurements and estimates
    "BatchContext.noise_scale",
    *("adascale_gain.variance", "adascale_gain.square_norm"),
    *("noise_scale_terms.small_square", "noise_scale_terms.big_square"),
    # a part of a horizon may begin before it
    *("Horizon.fraction.start", "Horizon.fraction.stop"),
}
INTEGERS = {"GlobalBatchLoader.seed", "Integer.low"}


def test_negative_numbers_are_accepted_by_few_arguments() -> None:
    labels = [label for label, _ in VALUES]
    for label in ("-1", "-0.5"):
        cases = [
            Case(target, {name: labels.index(label)})
            for target in targets()
            for name in target.hints
        ]
        accepted = [case for case in cases if judge(case).kind == "accepted"]
        found = {f"{case.target.name}.{name}" for case in accepted for name in case.hostile}
        assert found == NEGATIVE | (INTEGERS if label == "-1" else set())


@pytest.mark.parametrize("function", [bigopt.plan, bigopt.learning_rate_range_test])
def test_functions_that_train_check_trainer_and_module(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"trainer must be a Trainer, got 3; write "):
        function(3, L.LightningModule())
    trainer = L.Trainer(**QUIET)
    with pytest.raises(ValueError, match=r"module must be a Module, got 3; write "):
        function(trainer, 3)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def foreign_files(folder: Path) -> dict[str, Path]:
    """Writes files that StepGuard did not write."""
    files = {name: folder / name for name in ("text", "empty", "pickle", "other", "cut", "evil")}
    files["text"].write_text("loss=0.1\n" * 100)
    files["empty"].touch()
    files["pickle"].write_bytes(pickle.dumps({"version": 1}))
    torch.save({"state_dict": {"weight": torch.ones(2)}, "version": 1}, files["other"])
    torch.save({"version": 1, "window": [], "precision": "32", "rejected": {}}, files["cut"])
    files["cut"].write_bytes(files["cut"].read_bytes()[:-200])
    torch.save({"version": Malicious(folder / "ran")}, files["evil"])
    return {**files, "folder": folder, "missing": folder / "missing.pt"}


@pytest.mark.parametrize("load", ["safe", "pickle"])
def test_replay_of_a_foreign_file_is_one_clear_error(tmp_path: Path, load: Any) -> None:
    for name, path in foreign_files(tmp_path).items():
        with pytest.raises(
            ValueError, match=r"path must be a file.*; pass a file of the foren"
        ) as e:
            bigopt.replay(path, L.LightningModule(), load=load)
        assert str(path) in str(e.value), name
        assert e.value.__suppress_context__ or e.value.__context__ is None, name
    assert not (tmp_path / "ran").exists()  # the code in the pickle was not run


def test_replay_runs_no_code_of_a_file_with_the_right_keys(tmp_path: Path) -> None:
    evil = Malicious(tmp_path / "ran")
    torch.save({"version": 1, "window": evil, "precision": "32", "rejected": {}}, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"load must be 'pickle' .* if you trust the file"):
        bigopt.replay(tmp_path / "f.pt", L.LightningModule())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", [None, 3, b"x", ""])
def test_replay_of_something_that_is_no_path_raises(path: Any) -> None:
    with pytest.raises(ValueError, match="path must be"):
        bigopt.replay(path, L.LightningModule())
