"""The classes and functions that users call, with a valid call of each."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning_bigopt as bigopt
from lightning_bigopt import gradients as g
from lightning_bigopt.batching import BatchContext
from tests.faults.conforming import conforms, hints
from tests.planning.known_law import LAW

HORIZON = bigopt.Horizon.of_steps(1000, samples_per_step=8, tokens_per_step=64, steps_per_epoch=100)
MODULES = ("", ".schedules", ".batching", ".gradients", ".tuning", ".durations", ".optimizers")
MODULES = (*MODULES, ".callbacks", ".mixins", ".examples", ".monitoring")

NOT_CALLED = {
    # abstract base classes, protocols, types and data
    *("Action", "Average", "BatchSizePolicy", "ClippingRule", "Compressor", "Detector", "Schedule"),
    "UpdateRule",
    *("GradientNorms", "RuleState", "ScalingRule", "Clock", "DurationLike", "Unit", "Rounding"),
    *("TAGS", "__version__"),
    # results and internal values, which the package makes
    *("ClipContext", "ClipDecision", "Verdict", "Replay", "TrainingPlan", "MicroBatch"),
    *(
        *("Comparison", "CriticalBatchSize", "FoundLearningRate", "Study", "Suggestion"),
        "ExpectedLoss",
        "NoiseScaleReport",
        "MicroBatchSearch",
        "Tag",
        "WindowLength",
        "GlobalWindow",
        "BatchPlan",
    ),
    "Progress",  # made at every update, where checks would cost time
    # the functional core, called with values that the package makes
    *("apply_", "inspect", "record", "scale_", "clear_", "after_step_once", "norms_of"),
    # mixins have no arguments; the methods of the module return callbacks or specifications
    *(name for name in bigopt.__all__ if name.endswith("Mixin")),
    # they train; their own tests call them with wrong arguments
    *("critical_batch_size", "find_learning_rate", "learning_rate_range_test"),
    *("compare", "plan", "replay", "study"),
    *("read_loss_curve", "read_loss_curves"),  # they read folders
    "Muon",  # the class of torch, whose own errors pass through
    "TooManyRejectionsError",  # raised by the package
}
"""Public names that are not called with hostile values, and why."""


LEFT_OUT = {
    # names for messages, which no user passes
    *((call, "name") for call in ("plan_update", "Horizon.fraction", "Horizon.axis")),
    ("Duration.parse", "name"),
    # a function of the user, whose own errors pass through
    ("search_micro_batch_size", "try_size"),
    *(("Side", name) for name in ("make_trainer", "make_module", "make_data")),
    *(("CombinedOptimizer", "optimizers"), ("combine_optimizers", "optimizers")),
    # for distributed strategies
    *(("measure", name) for name in ("process_group", "is_sharded")),
}
"""Arguments that get no hostile values, by the name of the target."""

INFINITE = {
    *(("LearningRateRangeTest", "stop_at"), ("NoiseScaleBatchSize", "growth")),
    ("NormSpike", "margin"),
    *(("NormClip", "norm_type"), ("PerParameterNormClip", "norm_type"), ("measure", "norm_type")),
    *(("adascale_gain", "kappa"), ("Schedule.__call__", "fraction")),
    ("BatchContext", "noise_scale"),
}
"""Arguments that may be infinite, as documented."""


@dataclass(frozen=True, eq=False)
class Target:
    """A class or function with a valid call.

    Args:
        name: Its public name.
        group: Group of the table.
        call: The class or function.
        valid: Functions that make the values of the required arguments.
        use: Uses an object that was accepted; raises AssertionError if it misbehaves.
    """

    name: str
    group: str
    call: Callable[..., Any]
    valid: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    use: Callable[[Any], None] | None = None

    @cached_property
    def hints(self) -> dict[str, Any]:
        """The types of the arguments that get hostile values."""
        found = hints(self.call)
        return {name: kind for name, kind in found.items() if (self.name, name) not in LEFT_OUT}

    def may_be(self, name: str, value: object) -> bool:
        """Returns whether an argument may have a value, by its type or as documented."""
        if isinstance(value, float) and value == math.inf and (self.name, name) in INFINITE:
            return True
        if (self.name, name) == ("BatchContext", "noise_scale") and isinstance(value, float):
            return True  # a measurement
        if (self.name, name) == ("RangeTest", "losses") and isinstance(value, list | tuple):
            return all(isinstance(loss, float | int) for loss in value)  # a diverged run has NaN
        if (self.name, name) == ("parameter_groups", "lr") and isinstance(value, torch.Tensor):
            return value.numel() == 1  # torch's optimizers take a tensor, too
        if (self.name, name) == ("OptimizationMonitor", "per_layer") and type(value) is set:
            return not value  # of names, whose order does not matter
        return conforms(value, self.hints[name])


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW(model().parameters(), lr=0.1)


def model() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module(torch.ones(4, 2)).sum().backward()
    return module


def dataset() -> TensorDataset:
    return TensorDataset(torch.zeros(64, 2))


def use_schedule(schedule: bigopt.Schedule) -> None:
    resolved = schedule.resolve(HORIZON)
    factors = [resolved(fraction) for fraction in (0.0, 1e-9, 0.5, 0.999, 1.0, 3.0)]
    assert all(isinstance(f, Real) and math.isfinite(f) and f >= 0 for f in factors), factors
    assert all(0 <= at <= 1.0 for at in resolved.boundaries().values())
    assert 0 <= resolved.warmup_end() <= 1.0


def use_rule(rule: g.ClippingRule) -> None:
    module = model()
    adam = torch.optim.AdamW(module.parameters(), lr=0.1)
    state = rule.initial_state()
    for step in range(3):
        before = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in module.parameters()))
        g.clip_gradients_(module, rule, state=state, optimizer=adam, fraction=step / 3)
        after = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in module.parameters()))
        assert math.isfinite(after), "not finite"
        assert after <= before * (1 + 1e-6), "the norm grew"


def use_policy(policy: bigopt.BatchSizePolicy) -> None:
    for fraction in (0.0, 0.5, 1.0):
        steps = int(1000 * fraction)
        progress = bigopt.Progress(
            fraction=fraction,
            steps=steps,
            batches=steps,
            epochs=steps / 100,
            samples=8 * steps,
            tokens=64 * steps,
            seconds=steps,
        )
        for scale in (None, 100.0):
            context = BatchContext(samples_per_epoch=800, global_batch_size=8, noise_scale=scale)
            size = policy(progress, context=context)
            assert type(size) is int, repr(size)
            assert size > 0, repr(size)


def use_detector(detector: bigopt.Detector) -> None:
    state = detector.initial_state()
    for value in (1.0, 1.1, 0.9, 1e6, math.nan, 1.0):
        if detector.check(value, state) is None:
            detector.accept(value, state)
        else:
            detector.reject(value, state)


def use_action(action: bigopt.Action) -> None:
    if isinstance(action, bigopt.Backoff):
        state = action.initial_state()
        action.reject(state)
        action.accept(state)
        assert 0 < state["level"] <= 1, state


def use_duration(duration: bigopt.Duration) -> None:
    assert bigopt.Duration.parse(duration) == duration
    assert bigopt.Duration.parse(str(duration)).unit == duration.unit
    assert HORIZON.fraction(duration) >= 0


def use_number(result: Any) -> None:
    assert result is None or math.isfinite(result), result


def _valid(**values: Any) -> dict[str, Callable[[], Any]]:
    """Returns functions that make the values; a function among them is called each time."""
    return {
        name: value if inspect.isfunction(value) else lambda value=value: value
        for name, value in values.items()
    }


VALID: dict[str, dict[str, Callable[[], Any]]] = {
    # callbacks
    "BatchSizeScheduler": _valid(policy=bigopt.ConstantBatchSize(8)),
    "GradientClipping": _valid(rule=bigopt.NormClip()),
    "GradientCompression": _valid(compressor=bigopt.TopK()),
    "ModelAveraging": _valid(averages=bigopt.EMA("1%")),
    "HyperparameterScheduler": _valid(field="weight_decay", schedule=bigopt.Linear()),
    "LearningRateScheduler": _valid(schedule=bigopt.WarmupCosine()),
    "ReduceOnPlateau": _valid(monitor="val_loss"),
    "GlobalBatchFinder": _valid(global_batch_size=64),
    "MeasuredBatchSize": _valid(low=8, high=32),
    # specifications
    "EMA": _valid(half_life="1%"),
    "Merge": _valid(over="20%"),
    "TailMean": _valid(over="10%"),
    "BatchSizeRamp": _valid(start=8, end=64, over="10%"),
    "BatchSizeSteps": _valid(sizes={"0%": 8, "50%": 16}),
    "ConstantBatchSize": _valid(size=8),
    "NoiseScaleBatchSize": _valid(low=8, high=64),
    "SchedulePolicy": _valid(schedule=bigopt.StepDecay(), base=64),
    "SeesawBatchSize": _valid(schedule=bigopt.Seesaw(bigopt.Cosine()), base=8),
    "Chain": _valid(parts=[("50%", bigopt.Constant()), bigopt.Cosine()]),
    "Clamp": _valid(schedule=bigopt.Cosine(), low=0.1),
    "Product": _valid(schedules=[bigopt.Linear(), bigopt.Cosine()]),
    "Seesaw": _valid(schedule=bigopt.Cosine()),
    "Warmup": _valid(duration="5%", schedule=bigopt.Cosine()),
    "Groups": _valid(rules={"*": bigopt.NormClip()}),
    "Side": _valid(make_trainer=lambda: print, make_module=lambda: print),
    # data
    "GlobalBatchLoader": _valid(dataset=dataset, micro_batch_size=8),
    "Duration": _valid(value=5, unit="steps"),
    "Horizon": _valid(clock="steps", budget=100),
    "Span": _valid(updates=10),
    "Choice": _valid(options=[16, 32]),
    "Integer": _valid(low=1, high=8),
    "Log": _valid(low=1e-4, high=1e-1),
    "Uniform": _valid(low=0.0, high=1.0),
    "RangeTest": _valid(learning_rates=(0.1, 0.2), losses=(1.0, 2.0)),
    "HyperparameterLaw": _valid(
        name="mine",
        learning_rate=(1.0, -0.5, 0.1),
        batch_tokens=(10.0, 0.0, 0.5),
        parameters=(1e7, 1e9),
    ),
    "MultiPowerLaw": _valid(**LAW),
    "LossCurve": _valid(learning_rates=[0.1] * 9, updates=[1, 5, 9], losses=[3.0, 2.0, 1.0]),
    "LossLaw": _valid(law=bigopt.MultiPowerLaw(**LAW), peaks=(3e-4, 3e-4), total=6.0),
    # functions
    "convex_bound": _valid(schedule=bigopt.Linear(), updates=100),
    "learning_rate_ratio": _valid(a=bigopt.Linear(), b=bigopt.Cosine()),
    "cooldown_for_extension": _valid(factor=2.0),
    "suggest": _valid(parameters=1e9, tokens=2e10),
    "parameter_groups": _valid(module=model, weight_decay=0.1),
    "ParameterGroup": _valid(pattern="*", name="all"),
    "CombinedOptimizer": _valid(module=model, optimizers={"*": torch.optim.AdamW}),
    "combine_optimizers": _valid(module=model, optimizers={"*": torch.optim.AdamW}),
    "MuonAdamW": _valid(module=model, lr=0.1),
    "muon_adamw": _valid(module=model, lr=0.1),
    "clip_gradients_": _valid(parameters=model, rule=bigopt.NormClip()),
    "measure": _valid(parameters=lambda: list(model().named_parameters())),
    "noise_scale_terms": _valid(small_square=2.0, big_square=1.0, small=8, big=64),
    "skip_update_": _valid(optimizer=optimizer),
    "step_control": _valid(optimizer=optimizer),
    "StepControl": _valid(optimizer=optimizer),
    "takes_grad_scale": _valid(optimizer=optimizer),
    "adascale_gain": _valid(kappa=2.0, variance=1.0, square_norm=1.0),
    "check_explicit_sizes": _valid(
        policy=bigopt.ConstantBatchSize(8), micro_batch_size=4, world_size=1
    ),
    "learning_rate_factor": _valid(kappa=2.0, rule="sqrt"),
    "plan_at": _valid(
        policy=bigopt.ConstantBatchSize(8),
        progress=bigopt.Progress(fraction=0.5),
        micro_batch_size=4,
        world_size=1,
    ),
    "plan_update": _valid(global_batch_size=8, world_size=1, micro_batch_size=4),
    "planned_sizes": _valid(
        policy=bigopt.ConstantBatchSize(8),
        start=bigopt.Progress(fraction=0.0),
        position=0,
        clock="steps",
        budget=10,
        micro_batch_size=4,
        world_size=1,
        samples_per_epoch=80,
    ),
    "recommended_rule": _valid(optimizer="AdamW"),
    "scaled_beta": _valid(beta=0.95, kappa=2.0),
    "search_micro_batch_size": _valid(try_size=lambda: lambda size: size < 20, maximum=64),
    "simulate": _valid(
        policy=bigopt.ConstantBatchSize(8),
        clock="steps",
        budget=10,
        micro_batch_size=4,
        world_size=1,
        batches_per_epoch=20,
    ),
    "simulate_exact": _valid(
        policy=bigopt.ConstantBatchSize(8),
        clock="steps",
        budget=10,
        micro_batch_size=4,
        world_size=1,
        samples_per_epoch=80,
    ),
    "weight_decay_factor": _valid(kappa=2.0),
    "GroupField": _valid(name="lr"),
    "ScheduleLR": _valid(optimizer=optimizer, schedule=bigopt.Cosine(), horizon=100),
    "as_lr_scheduler": _valid(schedule=bigopt.Cosine(), optimizer=optimizer, horizon=100),
    "find_tag": _valid(name="optim/lr"),
}

METHODS: tuple[tuple[str, str, Callable[..., Any], dict[str, Callable[[], Any]]], ...] = (
    ("Schedule.__call__", "schedules", bigopt.Cosine().__call__, _valid(fraction=0.5)),
    ("Schedule.resolve", "schedules", bigopt.Cosine().resolve, _valid(horizon=HORIZON)),
    (
        "Schedule.with_cooldown",
        "schedules",
        bigopt.Cosine().with_cooldown,
        _valid(at=0.5, over=0.1),
    ),
    ("Duration.parse", "durations", bigopt.Duration.parse, _valid(value="5%")),
    ("Horizon.of_steps", "durations", bigopt.Horizon.of_steps, _valid(total_steps=100)),
    ("Horizon.fraction", "durations", HORIZON.fraction, _valid(duration="5%")),
    ("Horizon.axis", "durations", HORIZON.axis, _valid(duration="5%")),
    ("Progress.of", "durations", bigopt.Progress(fraction=0.5).of, _valid(duration="5%")),
    (
        "BatchSizeSteps.parse",
        "batch-size policies",
        bigopt.BatchSizeSteps.parse,
        _valid(text="0:8 5:9"),
    ),
)

USES: tuple[tuple[type, str, Callable[[Any], None]], ...] = (
    (bigopt.Schedule, "schedules", use_schedule),
    (g.ClippingRule, "clipping rules", use_rule),
    (bigopt.BatchSizePolicy, "batch-size policies", use_policy),
    (bigopt.Detector, "detectors and actions", use_detector),
    (bigopt.Action, "detectors and actions", use_action),
    (bigopt.Duration, "durations", use_duration),
)


def _public() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for suffix in MODULES:
        module = importlib.import_module(f"lightning_bigopt{suffix}")
        found.update({name: getattr(module, name) for name in module.__all__})
    return found


def targets() -> list[Target]:
    """Returns every public class and function that is called, with some methods."""
    found = []
    for name, call in _public().items():
        if name in NOT_CALLED:
            continue
        group, use = call.__module__.split(".")[1].replace("_", " "), None
        for base, group_of_base, use_of_base in USES:
            if inspect.isclass(call) and issubclass(call, base):
                group, use = group_of_base, use_of_base
        if inspect.isfunction(call):
            group = "functions"
        found.append(Target(name, group, call, VALID.get(name, {}), use))
    for name, _, call, valid in METHODS:
        found.append(Target(name, "methods", call, valid))
    return found


def is_frozen(value: object) -> bool:
    """Returns whether a value is an instance of a frozen dataclass."""
    return dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
