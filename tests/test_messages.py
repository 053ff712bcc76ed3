"""Messages for the mistakes of a first day: each names the mistake and what to write instead."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_bigopt as bigopt
from lightning_bigopt import (
    AutoClip,
    BatchSizeRamp,
    BatchSizeScheduler,
    Chain,
    ConstantBatchSize,
    Cosine,
    CosineWithRestarts,
    Exponential,
    GlobalBatchLoader,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateRangeTest,
    LearningRateScheduler,
    MultiStep,
    Noam,
    NonFinite,
    NormClip,
    OneCycle,
    OptimizationMonitor,
    Product,
    ReduceOnPlateau,
    Schedule,
    Skip,
    StepDecay,
    StepGuard,
    ValueClip,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from tests.helpers import QUIET, Probe, Regression, loader

DATA = Regression(8)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def two_levels() -> Any:
    return bigopt.Constant(1.0, 2.0)  # type: ignore[misc]


KEYWORDS: list[tuple[Callable[[], Any], str]] = [
    # torch
    (lambda: Exponential(gamma=0.9), r"got gamma=0.9; write decay=0.9, the factor of one step"),
    (
        lambda: StepDecay(step_size=30),
        r"got step_size=30; write every=30: an int is a number of up",
    ),
    (lambda: StepDecay(gamma=0.5), r"got gamma=0.5; write decay=0.5"),
    (
        lambda: MultiStep({"10%": 0.1}, gamma=0.1),
        r"write each milestone with its factor: MultiStep",
    ),
    (lambda: Cosine(T_max=100), r"got T_max=100; remove it: a schedule ends with the training"),
    (lambda: Cosine(eta_min=1e-5), r"write LearningRateScheduler\(Cosine\(...\), min_lr=1e-05\)"),
    (lambda: OneCycle(max_lr=0.1), r"got max_lr=0.1; set the peak as lr of the optimizer"),
    (lambda: OneCycle(total_steps=9), r"got total_steps=9; remove it: a schedule ends with the tr"),
    (
        lambda: OneCycle(pct_start=0.3),
        r"got pct_start=0.3; write warmup=0.3: a float is a fraction",
    ),
    (lambda: OneCycle(div_factor=25), r"got div_factor=25; write start=1 / 25"),
    (
        lambda: CosineWithRestarts(T_0=10),
        r"got T_0=10; write first_cycle=10: an int is a number of",
    ),
    (lambda: CosineWithRestarts(T_mult=2), r"got T_mult=2; write cycle_multiplier=2"),
    (lambda: Cosine(last_epoch=-1), r"got last_epoch=-1; remove it: LearningRateScheduler"),
    (
        lambda: ReduceOnPlateau("loss", min_lr=0.1),
        r"got min_lr=0.1; write min_factor=..., a factor",
    ),
    (lambda: GradientClipping(max_norm=1.0), r"write GradientClipping\(NormClip\(max_norm=1.0\)\)"),
    (
        lambda: GradientClipping(clip_value=0.5),
        r"write GradientClipping\(ValueClip\(max_abs=0.5\)\)",
    ),
    (lambda: ValueClip(clip_value=0.5), r"got clip_value=0.5; write max_abs=0.5"),
    # Hugging Face
    (
        lambda: WarmupCosine(warmup_steps=50),
        r"got warmup_steps=50; write warmup=50: an int is a num",
    ),
    (lambda: WarmupLinear(num_warmup_steps=50), r"got num_warmup_steps=50; write warmup=50"),
    (lambda: WarmupConstant(warmup_ratio=0.1), r"got warmup_ratio=0.1; write warmup=0.1: a float"),
    (lambda: WarmupCosine(num_training_steps=9), r"remove it: a schedule ends with the training"),
    (lambda: WarmupStableDecay(num_decay_steps=9), r"write decay=9: an int is a number of updates"),
    (lambda: WarmupCosine(min_lr_rate=0.1), r"got min_lr_rate=0.1; write end=0.1, a factor of the"),
    (
        lambda: WarmupCosine(min_lr=1e-5),
        r"write LearningRateScheduler\(WarmupCosine\(...\), min_lr",
    ),
    (lambda: NormClip(max_grad_norm=1.0), r"got max_grad_norm=1.0; write max_norm=1.0"),
    # Lightning
    (
        lambda: GradientClipping(gradient_clip_val=2),
        r"write GradientClipping\(NormClip\(max_norm=2\)",
    ),
    (
        lambda: GradientClipping(gradient_clip_algorithm="value"),
        r"GradientClipping\(ValueClip\(\)\)",
    ),
    (
        lambda: BatchSizeScheduler(batch_size=256),
        r"write BatchSizeScheduler\(ConstantBatchSize\(256",
    ),
    (lambda: ConstantBatchSize(batch_size=256), r"got batch_size=256; write size=256"),
    (lambda: GlobalBatchLoader(DATA, batch_size=4), r"got batch_size=4; write micro_batch_size=4"),
    (lambda: OptimizationMonitor(log_every_n_steps=5), r"write every=5, a number of updates"),
    (lambda: LearningRateRangeTest(min_lr=1e-8), r"got min_lr=1e-08; write start=1e-08"),
    (lambda: LearningRateRangeTest(num_training=50), r"got num_training=50; write steps=50"),
    (lambda: BatchSizeRamp(8, end=64, steps=100), r"got steps=100; write over=100"),
    (
        lambda: LearningRateScheduler(Cosine(), warmup=10),
        r"it belongs to the schedule, as in Learni",
    ),
    (
        lambda: LearningRateScheduler(scheduler=Cosine()),
        r"write schedule=..., for example Learning",
    ),
    # timm, and others
    (lambda: WarmupCosine(warmup_t=5), r"got warmup_t=5; write warmup='5 epochs'"),
    (lambda: StepGuard(patience=3), r"got patience=3; write max_consecutive=3"),
    # misspelled
    (lambda: WarmupCosine(warmpu="5%"), r"got warmpu='5%'; did you mean warmup\?"),
    (lambda: OptimizationMonitor(evry=10), r"got evry=10; did you mean every\?"),
    (lambda: BatchSizeScheduler(ConstantBatchSize(4), lr_scalling="sqrt"), r"mean lr_scaling\?"),
    (lambda: AutoClip(percentil=5.0), r"got percentil=5.0; did you mean percentile\?"),
    # neither known nor similar
    (lambda: NonFinite(xyz=1), r"the arguments of NonFinite must be none, got xyz=1$"),
    (lambda: Cosine(xyz=1), r"the arguments of Cosine must be among start, end, got xyz=1$"),
    (lambda: HyperparameterScheduler(name="eps", schedule=Cosine()), r"write field='eps'$"),
    (lambda: OptimizationMonitor(logging_interval="step"), r"write every=10, a number of updates"),
    (lambda: CosineWithRestarts(num_cycles=4), r"write first_cycle=1 / 4: a float is a fraction"),
    (lambda: LearningRateScheduler(Cosine(), lr=0.1), r"got lr=0.1; set lr of the optimizer"),
    (lambda: BatchSizeRamp(8, stop=64, over="10%"), r"got stop=64; write end=64"),
    (lambda: Noam(d_model=512), r"got d_model=512; remove it: the optimizer's lr is the peak"),
    (lambda: GradientNoiseScale(every=10), r"got every=10; remove it: every update is measured"),
    (
        lambda: GlobalBatchLoader(DATA, micro_batch_size=2, pin_memory=True),
        r"pass it to the inner DataLoader: options=\{...: True\}",
    ),
    (lambda: GlobalBatchLoader(DATA, micro_batch_size=2, drop_last=True), r"write tail='drop'"),
    (lambda: StepGuard(max_skip=3), r"got max_skip=3; write max_consecutive=3"),
    # missing
    (GradientClipping, r"must contain rule, got none; write them as in GradientCli"),
    (LearningRateScheduler, r"must contain schedule, got none; write them as in LearningR"),
    (BatchSizeScheduler, r"must contain policy, got none; write them as in BatchSizeSch"),
    (
        lambda: GlobalBatchLoader(DataLoader(DATA)),
        r"must contain micro_batch_size, got a DataLoader; write them as in GlobalB",
    ),
    (lambda: BatchSizeRamp(8), r"the arguments of BatchSizeRamp must contain end, over, got 8$"),
    # without a name
    (lambda: LearningRateScheduler(Cosine(), optimizer()), r"got an SGD .*; remove it: the callba"),
    (
        lambda: Chain(Cosine(), Cosine()),
        r"write them as in Chain\(\[\('50%', Linear\(\)\), Cosine",
    ),
    (
        lambda: Product(Cosine(), Cosine()),
        r"write them as in Product\(\[Linear\(\), Cosine\(\)\]",
    ),
    (lambda: StepGuard(NonFinite(), Skip()), r"write them as in StepGuard\(\[NonFinite\(\), N"),
    (
        lambda: WarmupCosine("5%"),
        r"got '5%' without a name; write the name of the argument before its",
    ),
    (two_levels, r"must be among level, got 2.0 without a name; write the name of"),
]


@pytest.mark.parametrize(("call", "message"), KEYWORDS)
def test_unknown_arguments_are_answered_with_ours(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


class Named:
    """A value with a long description, like an optimizer."""

    def __repr__(self) -> str:
        return "Named(\n  a: 1\n)"


def test_long_values_are_shown_by_their_class() -> None:
    with pytest.raises(TypeError, match=r"got optimizer=a Named; remove it"):
        LearningRateScheduler(Cosine(), optimizer=Named())  # type: ignore[call-arg]


# Base classes, and those that the package itself makes.
NOT_MADE_BY_USERS = {
    *("Action", "Average", "BatchSizePolicy", "ClippingRule", "Compressor", "Detector", "Schedule"),
    *("CriticalBatchSize", "Duration", "Horizon", "Progress", "RangeTest", "Study"),
    *("Comparison", "ExpectedLoss", "FoundLearningRate", "Suggestion"),
    "TooManyRejectionsError",
}
MADE_BY_USERS = [
    value
    for name, value in vars(bigopt).items()
    if inspect.isclass(value) and name not in NOT_MADE_BY_USERS and not name.endswith("Mixin")
]


@pytest.mark.parametrize("kind", MADE_BY_USERS)
def test_every_public_class_with_arguments_explains_them(kind: type) -> None:
    with pytest.raises(TypeError, match=f"the arguments of {kind.__name__} must be "):
        kind(no_such_argument=1)


def test_subclass_of_the_user_keeps_its_own_arguments() -> None:
    class Own(GradientClipping):
        def __init__(self, max_norm: float) -> None:
            super().__init__(NormClip(max_norm))

    assert Own(max_norm=2.0).rule == NormClip(2.0)
    with pytest.raises(TypeError, match="no_such"):
        Own(no_such=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        (WarmupCosine(), r"got WarmupCosine\(.*\); write LearningRateScheduler\(WarmupCosine\("),
        (NormClip(), r"got NormClip\(.*\); write GradientClipping\(NormClip\(max_norm=1.0"),
        (ConstantBatchSize(4), r"got .*; write BatchSizeScheduler\(ConstantBatchSize\(size=4\)\)"),
        (NonFinite(), r"got .*; write StepGuard\(\[NonFinite\(\)\]\)"),
        (Skip(), r"got .*; write StepGuard\(actions=\[Skip\(\)\]\)"),
    ],
)
def test_specification_as_a_callback_names_the_callback(specification: Any, message: str) -> None:
    def train() -> None:  # depending on its version, Lightning reads the callbacks here or there
        L.Trainer(**{**QUIET, "callbacks": [specification], "max_steps": 1}).fit(
            Probe(), loader(4, 2)
        )

    with pytest.raises(
        AttributeError, match=rf"callbacks must contain Callback objects, {message}"
    ):
        train()


@pytest.mark.parametrize("specification", [WarmupCosine(), NormClip(), NonFinite(), Skip()])
def test_other_attributes_raise_as_usual(specification: Any) -> None:
    with pytest.raises(AttributeError, match=r"object has no attribute 'nothing'"):
        specification.nothing  # noqa: B018
    assert not hasattr(specification, "__deepcopy__")
    assert pickle.loads(pickle.dumps(specification)) == specification


def test_error_inside_a_property_keeps_its_message() -> None:
    class Own(Schedule):
        def factor(self, fraction: float) -> float:
            return 1.0

        @property
        def broken(self) -> float:
            return self.missing_inside  # type: ignore[attr-defined,no-any-return]

    with pytest.raises(AttributeError, match="missing_inside"):
        Own().broken  # noqa: B018


VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: StepGuard(NonFinite()), r"detectors must be a list of Detector objects, got NonFin"),
    (lambda: StepGuard(10), r"detectors must be a list of Detector objects, got 10; try \["),
    (
        lambda: StepGuard([NonFinite]),
        r"detectors\[0\] must be a Detector, got the class NonFinite; wr",
    ),
    (
        lambda: StepGuard(actions=Skip()),
        r"actions must be a list of Action objects, got Skip\(\); ",
    ),
    (
        lambda: NormClip("1.0"),
        r"max_norm must be a positive and finite number, got '1.0'; write 1.0",
    ),
    (
        lambda: Cosine(end="0.1"),
        r"end must be a non-negative and finite number, got '0.1'; write 0",
    ),
    (lambda: AutoClip("10"), r"percentile must be a number in \(0, 100\], got '10'; write 10"),
    (
        lambda: ConstantBatchSize("256"),
        r"size must be a positive number .*got '256'; write 256 with",
    ),
    (lambda: GradientClipping(NormClip), r"got the class NormClip; write NormClip\(...\)"),
    (
        lambda: LearningRateScheduler(WarmupCosine),
        r"got the class WarmupCosine; write WarmupCosine",
    ),
    (
        lambda: LearningRateScheduler(optimizer()),
        r"schedule must be a Schedule, got an? SGD; try W",
    ),
    (
        lambda: BatchSizeScheduler(256),
        r"policy must be a BatchSizePolicy, got 256; try ConstantBatc",
    ),
    (lambda: BatchSizeScheduler(ConstantBatchSize), r"the class ConstantBatchSize; write Constant"),
    (
        lambda: GlobalBatchLoader(DataLoader(DATA), micro_batch_size=4),
        r"dataset must be a Dataset, got a DataLoader; write GlobalBatchLoader\(loader.dataset, ",
    ),
    (
        lambda: bigopt.BatchSizeSteps([32, 64]),
        r"sizes must be .*, got \[32, 64\]; write \{'0%': 32",
    ),
]


@pytest.mark.parametrize(("call", "message"), VALUES)
def test_values_of_the_wrong_type_are_answered(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_fast_dev_run_has_no_statistics_of_one_update(caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [
        LearningRateScheduler(WarmupCosine()),
        GradientClipping(NormClip()),
        StepGuard(),
        GradientNoiseScale(),
        OptimizationMonitor(),
    ]
    with caplog.at_level("INFO"):
        L.Trainer(**{**QUIET, "fast_dev_run": True, "callbacks": callbacks}).fit(
            Probe(), loader(8, 2)
        )
    assert "clipped" not in caplog.text
    assert "noise scale" not in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        L.Trainer(**{**QUIET, "max_steps": 4, "callbacks": callbacks}).fit(Probe(), loader(8, 2))
    assert "clipped" in caplog.text
    assert "noise scale" in caplog.text
