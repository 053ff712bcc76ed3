"""The settings that processes compare; tests/faults/test_ranks.py compares those of two."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_bigopt import GradientClipping, HyperparameterScheduler, Linear, NormClip
from lightning_bigopt.engine import process_settings
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.engine.stage import Fit
from tests.helpers import Probe, fit, loader


class OnDevice(Capability):
    """A capability of a user, whose specification names a device and an address."""

    owns, rank = "device", 99

    def __init__(self, device: str) -> None:
        self.device = device

    def specification(self) -> str:
        return f"OnDevice({self.device!r}, {object()!r})"

    def settings_as_code(self) -> dict[str, str]:
        return {"decay": "0.9"}


class Reads(L.Callback):
    """Reads the settings of the fit."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        found = next(c.fit for c in trainer.callbacks if isinstance(c, Capability))
        assert isinstance(found, Fit)
        self.settings = process_settings._settings(found)


def settings_of(*callbacks: Any, **options: Any) -> dict[str, str]:
    reads = Reads()
    fit(Probe(), loader(8, 2), *callbacks, reads, max_epochs=1, **options)
    return reads.settings


def test_settings_contain_what_must_be_equal() -> None:
    found = settings_of(
        GradientClipping(NormClip(max_norm=0.5)),
        HyperparameterScheduler("weight_decay", Linear(end=0.1), budget="4 steps"),
        accumulate_grad_batches=2,
    )
    assert found["accumulate_grad_batches of the Trainer"] == "2"
    assert found["budget"] == "'4 steps'"
    assert "max_norm=0.5" in found["GradientClipping (gradient clipping)"]
    assert "Linear" in found["HyperparameterScheduler (schedule of weight_decay)"]


def test_devices_and_addresses_are_equal_on_all_processes() -> None:
    first, second = settings_of(OnDevice("cuda:0")), settings_of(OnDevice("cuda:1"))
    assert first == second
    assert first["OnDevice (device)"] == "OnDevice('cuda', <object object>)"
    assert first["decay of OnDevice (device)"] == "0.9"


def test_differences_name_the_processes() -> None:
    first = {"a": "1", "b": "2", "gone": ""}
    assert process_settings._differences(first, {"a": "1", "b": "3", "new": ""}, 2) == (
        "b: 2 on process 0, 3 on process 2; gone on process 0 only; new on process 2 only"
    )


def test_order_of_a_set_is_no_difference() -> None:
    """Processes hash strings differently: ``{name: rule for name in {"a", "b"}}``."""
    first = {"groups": "{'a': Linear(end=0.1), 'b': Cosine(end=0.1)}", "weight": "f({'x', 'y'})"}
    other = {"groups": "{'b': Cosine(end=0.1), 'a': Linear(end=0.1)}", "weight": "f({'y', 'x'})"}
    assert process_settings._differences(first, other, 1) == ""
    for text in ("f({'x', 'z'})", "f({'x'})"):
        assert process_settings._differences(first, other | {"weight": text}, 1).startswith(
            "weight"
        )
    for one, two in (("1e-3", "1e-4"), ("-1.0", "1.0"), ("1.0", "1.5")):
        assert process_settings._differences({"a": one}, {"a": two}, 1)


def test_missing_callback_is_named_once() -> None:
    first = {"Monitor (logging)": "", "every of Monitor (logging)": "5"}
    assert process_settings._differences(first, {}, 1) == "Monitor (logging) on process 0 only"
    assert process_settings._differences({}, first, 1) == "Monitor (logging) on process 1 only"
