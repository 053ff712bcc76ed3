"""Objects that Hydra builds in every mode of ``_convert_`` equal those of Python code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigValueError
from torch.utils.data import TensorDataset

import lightning_bigopt as bigopt
from lightning_bigopt import (
    BatchSizeSteps,
    Chain,
    Cosine,
    Groups,
    Linear,
    MultiStep,
    NonFinite,
    NormClip,
    NormSpike,
    PiecewiseLinear,
    Product,
    Schedule,
    Warmup,
    WarmupCosine,
    arguments,
    parameter_groups,
)
from lightning_bigopt.arguments import Specification, explain_arguments
from lightning_bigopt.checks import shown
from lightning_bigopt.config_values import CONVERT, python_value
from lightning_bigopt.monitoring.step_timer import StepTimer
from lightning_bigopt.type_checks import check_instance
from tests.faults.constructor_targets import targets

MODES = ("none", "partial", "object", "all")


def target(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"lightning_bigopt.{name}", **arguments}


COSINE = target("Cosine", end=0.1)
LINEAR = target("Linear", end=0.5)
RULE = target("NormClip", max_norm=2.0)

# The config of each class, and the same arguments as Python code writes them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AGC": ({"exclude": ["head*", "*.bias"]}, {"exclude": ("head*", "*.bias")}),
    "BatchSizeSteps": ({"sizes": {"0%": 8, "50%": 16}}, {"sizes": {"0%": 8, "50%": 16}}),
    "Chain": (
        {"parts": [["50%", COSINE], target("Product", schedules=[LINEAR, COSINE])]},
        {"parts": [("50%", Cosine(end=0.1)), Product([Linear(end=0.5),
         Cosine(end=0.1)])]},
    ),
    "Groups": (
        {"rules": {"head*": RULE, "*": target("ZClip"), "bias": None}},
        {"rules": {"head*": NormClip(max_norm=2.0), "*": bigopt.ZClip(), "bias": None}},
    ),
    "HyperparameterScheduler": (
        {"field": "weight_decay", "schedule": LINEAR, "groups": {"decay": COSINE}},
        {"field": "weight_decay", "schedule": Linear(end=0.5),
         "groups": {"decay": Cosine(end=0.1)}},
    ),
    "LearningRateScheduler": (
        {"schedule": LINEAR, "groups": {"decay": COSINE}, "optimizers": {"Adam": LINEAR}},
        {"schedule": Linear(end=0.5), "groups": {"decay": Cosine(end=0.1)},
         "optimizers": {"Adam": Linear(end=0.5)}},
    ),
    "ModelAveraging": (
        {"averages": target("EMA", half_life="1%"), "use": "training"},
        {"averages": bigopt.EMA("1%"), "use": "training"},
    ),
    "MultiStep": (
        {"milestones": [["50%", 0.1], ["75%", 0.01]]},
        {"milestones": [("50%", 0.1), ("75%", 0.01)]},
    ),
    "OptimizationMonitor": (
        {"layers": {"linear": "layer*"}, "per_layer": ["grad_norm"], "activations": {"a": "0"}},
        {"layers": {"linear": "layer*"}, "per_layer": ["grad_norm"], "activations": {"a": "0"}},
    ),
    "ParameterGroup": (
        {"pattern": ["head*", "*.bias"], "name": "a"}, {"pattern": ("head*", "*.bias"), "name": "a"}
    ),
    "PiecewiseLinear": ({"points": {"0%": 0.1, "75%": 1}}, {"points": {"0%": 0.1, "75%": 1}}),
    "Product": (
        {"schedules": [LINEAR, target("Product", schedules=[COSINE, LINEAR])]},
        {"schedules": [Linear(end=0.5), Product([Cosine(end=0.1),
         Linear(end=0.5)])]},
    ),
    "StepGuard": (
        {"detectors": [target("NonFinite"), target("NormSpike", window=50)],
         "actions": [target("Backoff"), target("Skip")]},
        {"detectors": [NonFinite(), NormSpike(window=50)],
         "actions": [bigopt.Backoff(), bigopt.Skip()]},
    ),
}  # fmt: skip

# The same arguments in another form, and lists inside the arguments of an argument.
MORE = (
    ("MultiStep", {"milestones": {"50%": 0.1}}, lambda: MultiStep({"50%": 0.1})),
    ("PiecewiseLinear", {"points": [["0%", 1], ["1", 0]]}, lambda: PiecewiseLinear(
        [("0%", 1), ("1", 0)])),
    ("BatchSizeSteps", {"sizes": [["0%", 8], ["9 steps", 9]]}, lambda: BatchSizeSteps(
        (("0%", 8), ("9 steps", 9)))),
    ("Groups", {"rules": [["head*", RULE], ["*", None]]}, lambda: Groups(
        (("head*", NormClip(max_norm=2.0)), ("*", None)))),
    ("Warmup", {"duration": "5%", "schedule": target("Chain", parts=[["50%", LINEAR], COSINE])},
     lambda: Warmup("5%", Chain([("50%", Linear(end=0.5)), Cosine(end=0.1)]))),
)  # fmt: skip

# Arguments that are no list of a config: data, and the results of measurements.
NOT_IN_CONFIGS = {
    *(("Horizon", "spans"), ("Horizon", "others")),
    *(("CriticalBatchSize", "multiples"), ("CriticalBatchSize", "losses")),
    *(
        ("FoundLearningRate", name)
        for name in ("interval", "learning_rates", "losses", "standard_errors")
    ),
    *(("LossCurve", name) for name in ("learning_rates", "losses", "updates")),
    *(("ExpectedLoss", name) for name in ("high", "losses", "low", "notes", "updates")),
    *(("LossLaw", "draws"), ("LossLaw", "peaks"), ("Suggestion", "outside")),
    *(
        ("HyperparameterLaw", name)
        for name in ("batch_tokens", "learning_rate", "parameters", "timescale")
    ),
    *(("HyperparameterLaw", name) for name in ("tokens", "tokens_per_parameter")),
    *(("Study", name) for name in ("axes", "best_values", "budgets", "importance", "trials")),
    *(("RangeTest", "learning_rates"), ("RangeTest", "losses")),
    *(("GlobalBatchLoader", name) for name in ("dataset", "collate_fn", "options")),
}


def values(obj: Any) -> Any:
    """Returns everything that an object holds, as plain data with the classes of all objects."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return type(obj), {f.name: values(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return type(obj), {key: values(value) for key, value in obj.items()}
    if isinstance(obj, Sequence) and not isinstance(obj, str):
        return type(obj), [values(value) for value in obj]
    if isinstance(obj, StepTimer):  # holds the time
        return type(obj)
    if type(obj).__module__.startswith(("lightning_bigopt", "omegaconf")):
        return type(obj), {name: values(value) for name, value in vars(obj).items()}
    return obj if isinstance(obj, int | float | str | type) else type(obj)


ADAMW = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1}
SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.2}
OF_A_MODULE = {
    "CombinedOptimizer": {
        "optimizers": {"0.* if ndim == 2": SGD, "*": ADAMW},
        "groups": [target("ParameterGroup", pattern=["1.*"], name="head", lr_factor=0.5)],
        "no_decay": ["*.bias"],
    },
    "MuonAdamW": {
        "lr": 0.1,
        "adamw": ["0.weight"],
        "muon": ["1.weight"],
        "betas": [0.8, 0.9],
        "groups": [target("ParameterGroup", pattern="1.*", name="head", weight_decay=0.0)],
        "no_decay": ["0.weight"],
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "function"), [
    ("CombinedOptimizer", "combine_optimizers"), ("MuonAdamW", "muon_adamw"),
])  # fmt: skip
def test_optimizers_of_a_module_are_partial(name: str, function: str, mode: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for called in (name, function):
        config = target(called, _partial_=True, _convert_=mode, **OF_A_MODULE[name])
        if mode == "none":  # omegaconf does not put the groups into a list
            with pytest.raises(ValueError, match=re.escape(CONVERT)):
                instantiate(config)
            del config["groups"]
            assert list(instantiate(config)(module).parts) == list(
                {"CombinedOptimizer": ["SGD", "AdamW"], "MuonAdamW": ["Muon", "AdamW"]}[name]
            )
            continue
        optimizer = instantiate(config)(module)
        found = {g["name"]: (g["lr"], g["param_names"]) for g in optimizer.param_groups}
        assert "omegaconf" not in str([type(v) for g in optimizer.param_groups for v in g.values()])
        assert (
            found
            == {
                "CombinedOptimizer": {
                    "SGD": (0.2, ["0.weight"]),
                    "AdamW.no_decay": (0.1, ["0.bias"]),
                    "AdamW.head": (0.05, ["1.weight"]),
                    "AdamW.head.no_decay": (0.05, ["1.bias"]),
                },
                "MuonAdamW": {
                    "Muon.head": (0.1, ["1.weight"]),
                    "AdamW.no_decay": (0.1, ["0.weight", "0.bias"]),
                    "AdamW.head": (0.1, ["1.bias"]),
                },
            }[name]
        )


def test_every_constructor_with_a_list_or_mapping_has_a_case():
    containers = re.compile(r"\b(Mapping|Sequence|Iterable|dict|list|tuple|set)\[")
    found = {
        (name, parameter.name)
        for name in bigopt.__all__
        if inspect.isclass(kind := getattr(bigopt, name)) and not issubclass(kind, Exception)
        for parameter in inspect.signature(kind).parameters.values()
        if containers.search(str(parameter.annotation))
    }
    cases = {(name, argument) for name, (_, written) in CASES.items() for argument in written}
    cases |= {(name, argument) for name, written in OF_A_MODULE.items() for argument in written}
    assert len(found) > 15
    assert found - NOT_IN_CONFIGS <= cases


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_object_of_a_config_equals_that_of_the_constructor(name: str, mode: str) -> None:
    config, written = CASES[name]
    made = instantiate(target(name, **config, _convert_=mode))
    assert values(made) == values(getattr(bigopt, name)(**written))
    assert "omegaconf" not in str(values(made))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", MORE, ids=[name for name, _, _ in MORE])
def test_other_forms_of_the_same_arguments(
    case: tuple[str, dict[str, Any], Callable[[], Any]], mode: str
) -> None:
    name, config, expected = case
    assert values(instantiate(target(name, **config, _convert_=mode))) == values(expected())


@pytest.mark.parametrize("mode", MODES)
def test_options_of_the_loader_are_a_dictionary(mode: str) -> None:
    config = target("GlobalBatchLoader", micro_batch_size=4, options={"timeout": 0})
    config["dataset"] = {"_target_": f"{__name__}.dataset"}
    loader = instantiate(config | {"_convert_": mode})
    assert type(loader.options) is dict
    assert loader.options == {"timeout": 0}
    assert len(next(iter(loader))[0]) == 4


def dataset() -> TensorDataset:
    return TensorDataset(torch.zeros(8, 1))


@pytest.mark.parametrize("mode", MODES)
def test_patterns_of_parameter_groups(mode: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    options = {"weight_decay": 0.1, "lr": 0.1, "layer_decay": 0.5}
    config = target("parameter_groups", no_decay=["1.*"], layers=["0.*", "1.*"], **options)
    made = instantiate(config | {"_convert_": mode}, module)
    expected = parameter_groups(module, no_decay=["1.*"], layers=["0.*", "1.*"], **options)
    assert made == expected


SPECIFICATIONS = {
    t.name: t.call(**{name: value() for name, value in t.valid.items()})
    for t in targets()
    if inspect.isclass(t.call) and issubclass(t.call, Specification)
}

# Those with a field whose annotation is a union that omegaconf does not allow, such as a duration.
NOT_IN_LISTS = {
    *("AGC", "Groups", "BatchSizeSteps", "SchedulePolicy", "MultiStep", "PiecewiseLinear"),
    *("CosineWithRestarts", "Cyclic", "Exponential", "InverseSquareRoot", "Power", "StepDecay"),
    "ParameterGroup",
    *("InfiniteSchedule", "Noam", "OneCycle", "TriStage", "Warmup", "WarmupConstant"),
    *("BF16", "FP16", "PowerSGD", "TopK", "EMA", "Merge", "RollBack", "TailMean"),
    *("WarmupCosine", "WarmupInverseSquareRoot", "WarmupLinear", "WarmupStableDecay"),
}


@pytest.mark.parametrize("name", sorted(SPECIFICATIONS.keys() - NOT_IN_LISTS))
def test_specification_survives_a_list_of_omegaconf(name: str) -> None:
    specification = SPECIFICATIONS[name]
    in_list = OmegaConf.create([{"a": specification}], flags={"allow_objects": True})
    assert not isinstance(in_list[0]["a"], type(specification))  # omegaconf has taken it apart
    (again,) = python_value("values", in_list)
    assert values(again) == (dict, {"a": values(specification)})


@pytest.mark.parametrize("name", sorted(NOT_IN_LISTS))
def test_specification_that_omegaconf_rejects_says_how_to_convert(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_into_list() -> None:
        OmegaConf.create([SPECIFICATIONS[name]], flags={"allow_objects": True})

    with pytest.raises(ValueError, match=rf"contains \w+, got none; {re.escape(CONVERT)}"):
        put_into_list()
    # Without this package's error omegaconf raises its own.
    monkeypatch.setattr(arguments, "check_convertible", lambda value: None)
    with pytest.raises(ConfigValueError, match="Unions of containers are not supported"):
        put_into_list()


@pytest.mark.parametrize("mode", MODES)
def test_list_of_schedules_with_durations(mode: str) -> None:
    config = target("Product", schedules=[LINEAR, target("WarmupCosine", warmup="10%")])
    if mode == "none":
        with pytest.raises(ValueError, match=re.escape(CONVERT)):
            instantiate(config)
    else:
        made = instantiate(config | {"_convert_": mode})
        assert made == Product([Linear(end=0.5), WarmupCosine(warmup="10%")])


@pytest.mark.parametrize("mode", MODES)
def test_averages_by_name(mode: str) -> None:
    averages = {"ema": target("EMA", half_life="1%"), "tail": target("TailMean", over=5)}
    config = target("ModelAveraging", averages=averages, use="tail")
    if mode == "none":
        with pytest.raises((ValueError, InstantiationException), match=re.escape(CONVERT)):
            instantiate(config)
    else:
        made = instantiate(config | {"_convert_": mode})
        assert made.averages == {"ema": bigopt.EMA("1%"), "tail": bigopt.TailMean(5)}


@dataclass(frozen=True)
class NotFromFields(Schedule):
    """A schedule that cannot be created from its fields."""

    def __init__(self, factor: float) -> None:
        object.__setattr__(self, "end", factor)

    end: float = 0.5

    def factor(self, fraction: float) -> float:
        return self.end


@pytest.mark.parametrize("mode", MODES)
def test_object_that_cannot_be_created_again_says_how_to_convert(mode: str) -> None:
    own = {"_target_": f"{__name__}.NotFromFields", "factor": 0.2}
    config = target("Product", schedules=[LINEAR, own], _convert_=mode)
    if mode == "none":
        with pytest.raises(InstantiationException, match=re.escape(CONVERT)):
            instantiate(config)
    else:
        assert instantiate(config)(0.0) == pytest.approx(0.2)


def test_missing_value_says_how_to_convert():
    config = OmegaConf.create({"0%": 8, "50%": "???"})
    with pytest.raises(ValueError, match=r"sizes must .*got a DictConfig .*_convert_: all"):
        BatchSizeSteps(config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_specification_as_a_direct_argument(name: str, mode: str) -> None:
    held = instantiate(
        {
            "_target_": f"{__name__}.Holder",
            "_convert_": mode,
            "value": {"_target_": f"{__name__}.make", "name": name},
        }
    )
    assert held.value is SPECIFICATIONS[name]


def make(name: str) -> Specification:
    return SPECIFICATIONS[name]


@explain_arguments
class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("mode", MODES)
def test_objects_beside_a_config_need_object_or_none(mode: str) -> None:
    # Hydra takes an object apart that is passed to ``instantiate`` beside a config.
    config, schedules = target("Product", _convert_=mode), [Linear(), Cosine()]
    if mode in ("none", "object"):
        assert instantiate(config, schedules=schedules) == Product(schedules)
    else:
        advice = {"partial": re.escape(CONVERT), "all": r"got \{.*start.*: 1\.0, "}[mode]
        with pytest.raises(InstantiationException, match=advice):
            instantiate(config, schedules=schedules)


def test_value_that_is_not_converted_says_how_to_convert():
    assert shown(OmegaConf.create({"a": 1})) == "a DictConfig"
    with pytest.raises(ValueError, match=r"got a DictConfig; write _convert_: all"):
        check_instance("schedule", OmegaConf.create({"a": 1}), Schedule)
