"""One run for every public callback and mixin, trained under both packages of Lightning.

``python -m tests.compatibility.runs_of_both_packages`` prints the table of the page
*Compatibility*.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning_bigopt as bigopt
from lightning_bigopt import (
    EMA,
    BatchSizePolicyMixin,
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GlobalBatchFinder,
    GlobalBatchLoader,
    GradientClipping,
    GradientClippingMixin,
    GradientCompression,
    GradientCompressionMixin,
    GradientNoiseScale,
    GradientNoiseScaleMixin,
    HyperparameterScheduleMixin,
    HyperparameterScheduler,
    LearningRateRangeTest,
    LearningRateScheduleMixin,
    LearningRateScheduler,
    Linear,
    MeasuredBatchSize,
    Merge,
    ModelAveraging,
    ModelAveragingMixin,
    NonFinite,
    NormClip,
    NormSpike,
    OptimizationMonitor,
    OptimizationMonitorMixin,
    ReduceOnPlateau,
    ReduceOnPlateauMixin,
    StepGuard,
    StepGuardMixin,
    TopK,
    WarmupStableDecay,
)
from tests.compatibility.lightning_packages import NAMES, package, train
from tests.helpers import Regression, ResumableLoader

SCHEDULE = WarmupStableDecay(warmup="20%", decay="20%")
POLICY = BatchSizeSteps({"0%": 4, "50%": 8})
DETECTORS = [NonFinite(), NormSpike(armed=4)]
PLATEAU = {"patience": 0, "check": "train_epoch", "factor": 0.5, "mode": "max"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a run adds to the module and the Trainer.

    Args:
        callbacks: Makes the callbacks of the Trainer, which may be those of its package.
        mixins: Base classes of the module.
        members: Methods and attributes of the module.
        loader: Makes the training loader; None for the module's own.
        options: Arguments of the Trainer.
    """

    callbacks: Callable[[Any], list[Any]] = lambda root: []
    mixins: Sequence[type] = ()
    members: Mapping[str, Any] = field(default_factory=dict)
    loader: Callable[[], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def readme() -> list[Any]:
    """Returns the callbacks of the README, with a guard and the noise scale."""
    return [
        LearningRateScheduler(SCHEDULE),
        GradientClipping(NormClip(max_norm=1.0)),
        BatchSizeScheduler(POLICY, lr_scaling="sqrt"),
        StepGuard(DETECTORS),
        GradientNoiseScale(),
        OptimizationMonitor(),
    ]


CALLBACKS: dict[str, Case] = {
    "LearningRateScheduler": Case(callbacks=lambda _: [LearningRateScheduler(SCHEDULE)]),
    "GradientClipping": Case(callbacks=lambda _: [GradientClipping(NormClip(max_norm=1.0))]),
    "BatchSizeScheduler": Case(callbacks=lambda _: [BatchSizeScheduler(POLICY)]),
    "StepGuard": Case(
        callbacks=lambda _: [StepGuard(DETECTORS), OptimizationMonitor()],
        members={"poisoned": 3},
    ),
    "GradientNoiseScale": Case(
        callbacks=lambda _: [GradientNoiseScale(), OptimizationMonitor()],
        options={"accumulate_grad_batches": 2},
    ),
    "GradientCompression": Case(
        callbacks=lambda _: [GradientCompression(TopK(keep=0.2)), OptimizationMonitor()]
    ),
    "ModelAveraging": Case(
        callbacks=lambda _: [
            ModelAveraging({"ema": EMA(3), "merge": Merge(over=4)}, use="merge"),
            OptimizationMonitor(),
        ]
    ),
    "HyperparameterScheduler": Case(
        callbacks=lambda _: [HyperparameterScheduler("weight_decay", Linear(end=0.0))]
    ),
    "ReduceOnPlateau": Case(
        callbacks=lambda _: [
            ReduceOnPlateau("falling", **PLATEAU),
            LearningRateScheduler(Constant()),
        ],
        loader=lambda: ResumableLoader(8, 2),  # three epochs: the rate is reduced after the second
    ),
    "OptimizationMonitor": Case(callbacks=lambda _: [OptimizationMonitor()]),
    "LearningRateRangeTest": Case(
        callbacks=lambda _: [
            LearningRateRangeTest(start=1e-4, steps=40, skip=5, smoothing=0.9),
            GradientClipping(NormClip(max_norm=1.0)),
        ],
        loader=lambda: ResumableLoader(24, 12),
    ),
    "MeasuredBatchSize": Case(
        callbacks=lambda _: [
            MeasuredBatchSize(
                2, high=4, check_every="25%", window="16 samples", evaluate=2, tolerance=1e9
            ),
            OptimizationMonitor(),
        ],
    ),
    "GlobalBatchFinder": Case(
        callbacks=lambda _: [GlobalBatchFinder(global_batch_size=4, smallest=2)]
    ),
}
MIXINS: dict[str, Case] = {
    "LearningRateScheduleMixin": Case(
        mixins=[LearningRateScheduleMixin],
        members={"configure_learning_rate_schedule": lambda self: SCHEDULE},
    ),
    "GradientClippingMixin": Case(
        mixins=[GradientClippingMixin],
        members={"configure_clipping_rule": lambda self: NormClip(max_norm=1.0)},
    ),
    "BatchSizePolicyMixin": Case(
        mixins=[BatchSizePolicyMixin],
        members={"configure_batch_size_policy": lambda self: POLICY},
    ),
    "StepGuardMixin": Case(
        mixins=[StepGuardMixin, OptimizationMonitorMixin],
        members={"configure_step_guard": lambda self: DETECTORS, "poisoned": 3},
    ),
    "GradientNoiseScaleMixin": Case(
        mixins=[GradientNoiseScaleMixin, OptimizationMonitorMixin],
        options={"accumulate_grad_batches": 2},
    ),
    "GradientCompressionMixin": Case(
        mixins=[GradientCompressionMixin],
        members={"configure_gradient_compression": lambda self: TopK(keep=0.2)},
    ),
    "ModelAveragingMixin": Case(mixins=[ModelAveragingMixin]),
    "HyperparameterScheduleMixin": Case(
        mixins=[HyperparameterScheduleMixin],
        members={
            "configure_hyperparameter_schedules": lambda self: {"weight_decay": Linear(end=0.0)}
        },
    ),
    "ReduceOnPlateauMixin": Case(
        mixins=[ReduceOnPlateauMixin, LearningRateScheduleMixin],
        members={
            "configure_reduce_on_plateau": lambda self: ReduceOnPlateau("falling", **PLATEAU),
            "configure_learning_rate_schedule": lambda self: Constant(),
        },
        loader=lambda: ResumableLoader(8, 2),
    ),
    "OptimizationMonitorMixin": Case(mixins=[OptimizationMonitorMixin]),
}
TOGETHER: dict[str, Case] = {
    "the list of the README": Case(callbacks=lambda _: readme()),
    "GlobalBatchLoader": Case(
        callbacks=lambda _: readme(),
        loader=lambda: GlobalBatchLoader(Regression(24), micro_batch_size=2, seed=3),
    ),
    "EMAWeightAveraging of Lightning": Case(
        callbacks=lambda root: [*readme(), root.callbacks.EMAWeightAveraging()]
    ),
    "RichProgressBar of Lightning": Case(
        callbacks=lambda root: [*readme(), root.callbacks.RichProgressBar()],
        options={"enable_progress_bar": True},
    ),
}
CASES = {**CALLBACKS, **MIXINS, **TOGETHER}


@cache
def run(case: str, name: str) -> dict[str, Any]:
    """Trains a case under a package, and returns everything that the run left behind."""
    root, found = package(name), CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        return train(
            root,
            Path(folder),
            lambda: found.callbacks(root),
            mixins=found.mixins,
            members=found.members,
            loader=found.loader,
            **found.options,
        )


def public() -> tuple[set[str], set[str]]:
    """Returns the names of the public callbacks and mixins."""
    from lightning.pytorch import Callback

    kinds = {name: kind for name, kind in vars(bigopt).items() if isinstance(kind, type)}
    callbacks = {name for name, kind in kinds.items() if issubclass(kind, Callback)}
    return callbacks, {name for name in kinds if name.endswith("Mixin")}


def table() -> str:
    """Returns the table of the page: what was equal under both packages, in Markdown."""
    lines = [
        "| run | updates | tags in TensorBoard | checkpoints | equal to the bit |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        first, second = (run(case, name) for name in NAMES)
        equal = "yes" if first == second else "no"
        counts = (len(first["rates"]), len(first["logged"]), len(first["checkpoints"]))
        name = case if case in TOGETHER else f"`{case}`"
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {equal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
