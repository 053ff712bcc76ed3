"""The logged values of each layer, compared with a calculation in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_bigopt import (
    GradientClipping,
    NormClip,
    OptimizationMonitor,
)
from lightning_bigopt.parameters import block_of
from tests.helpers import fit, loader
from tests.monitoring.helpers import Blocks, TwoOptimizers, curves, total_norm

PATTERNS = {"biases": "*.bias", "head": "head.*"}
GROUPINGS: dict[str, Any] = {
    "blocks": block_of,
    "parameters": lambda name: name,
    "patterns": lambda name: "biases" if name.endswith("bias") else name.split(".")[0],
}


@pytest.mark.parametrize("layers", list(GROUPINGS))
@pytest.mark.parametrize(
    "optimizer",
    [
        {"kind": torch.optim.SGD, "lr": 0.1, "momentum": 0.9},
        {"kind": torch.optim.AdamW, "lr": 0.01, "fused": True},
        {"kind": torch.optim.AdamW, "lr": 0.01},
    ],
)
def test_layer_values_equal_a_calculation_in_float64(
    layers: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    module = Blocks(**optimizer)
    monitor = OptimizationMonitor(
        every=1, layers=PATTERNS if layers == "patterns" else layers, histograms_every=None
    )
    trainer = fit(
        module,
        loader(24, 4),
        GradientClipping(NormClip(max_norm=0.5)),
        monitor,
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    assert len(module.seen) == 6
    members: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        label = GROUPINGS[layers](name)
        if layers != "patterns" or label in PATTERNS:
            members.setdefault(label, []).append(name)
    assert len(members) == {"blocks": 5, "parameters": 10, "patterns": 2}[layers]
    for label, names in members.items():
        for update, seen in enumerate(module.seen):

            def pick(what: str, seen: Any = seen, names: list[str] = names) -> list[Tensor]:
                return [seen[what][name] for name in names]

            changes = [
                after - before for after, before in zip(pick("after"), pick("before"), strict=True)
            ]
            entries = sum(t.numel() for t in pick("grads"))
            expected = {
                "grad_norm": total_norm(pick("grads")),
                "weight_norm": total_norm(pick("before")),
                "update_ratio": total_norm(changes) / total_norm(pick("before")),
                "zeros": sum(int((t == 0).sum()) for t in pick("grads")) / entries,
            }
            for value, truth in expected.items():
                step, found = logged[f"layers/{value}/{label}"][update]
                assert step == update
                # The update is a difference of float32 weights and about 1e-3 of their size.
                assert found == pytest.approx(truth, rel=1e-4 if value == "update_ratio" else 2e-6)
    if layers == "blocks":
        assert logged["layers/zeros/blocks.1"][0][1] >= 0.5


def test_pattern_that_matches_nothing_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'haed\.\*', which matches none of"):
        fit(
            Blocks(),
            loader(8, 4),
            OptimizationMonitor(every=50, layers={"head": "haed.*"}),
            max_epochs=1,
            logger=TensorBoardLogger(tmp_path),
        )


def test_patterns_may_match_parameters_of_different_optimizers(tmp_path: Path) -> None:
    trainer = fit(
        TwoOptimizers(),
        loader(8, 2),
        OptimizationMonitor(every=1, layers={"first": "one.*", "second": "two.*"}),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    found = {tag for tag in curves(trainer) if tag.startswith("layers/grad_norm")}
    assert found == {"layers/grad_norm/first/SGD", "layers/grad_norm/second/AdamW"}


def test_patterns_may_match_parameters_that_are_frozen_at_first(tmp_path: Path) -> None:
    class FrozenAtFirst(Blocks):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.embed.requires_grad_(batch_idx >= 2)

        def on_after_backward(self) -> None:
            self.seen.append({})

    trainer = fit(
        FrozenAtFirst(),
        loader(16, 4),
        OptimizationMonitor(every=1, layers={"embed": "embed.*", "head": "head.*"}),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    assert [step for step, _ in logged["layers/grad_norm/head"]] == [0, 1, 2, 3]
    assert [step for step, _ in logged["layers/grad_norm/embed"]] == [2, 3]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_layers_may_all_belong_to_one_of_several_optimizers(
    tmp_path: Path, norm_type: float
) -> None:
    trainer = fit(
        TwoOptimizers(),
        loader(8, 2),
        OptimizationMonitor(
            every=1,
            layers={"first": "one.*"},
            per_layer=("grad_norm", "weight_norm", "update_ratio", "zeros"),
        ),
        GradientClipping(NormClip(max_norm=1.0, norm_type=norm_type)),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    layers = {tag for tag in curves(trainer) if tag.startswith("layers/")}
    values = ("grad_norm", "weight_norm", "update_ratio", "zeros")
    assert layers == {f"layers/{value}/first/SGD" for value in values}


def test_weights_are_copied_for_logged_updates_only(tmp_path: Path) -> None:
    copies = []
    original = torch._foreach_copy_

    def counted(*args: Any) -> Any:
        copies.append(1)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", counted)
        fit(
            Blocks(),
            loader(48, 4),
            OptimizationMonitor(every=4),
            max_epochs=1,
            logger=TensorBoardLogger(tmp_path),
        )
    assert len(copies) == 3


@pytest.mark.parametrize("module", [Blocks, TwoOptimizers])
def test_quantiles_are_those_over_the_layers_of_each_optimizer(
    module: type[Any], tmp_path: Path
) -> None:
    trainer = fit(
        module(),
        loader(24, 4),
        OptimizationMonitor(every=2, layers="parameters"),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    labels = [""] if module is Blocks else ["/SGD", "/AdamW"]
    for label in labels:
        of_layers = [
            points
            for tag, points in logged.items()
            if tag.startswith("layers/update_ratio/") and tag.endswith(label)
        ]
        assert len(of_layers) >= 2
        for position, points in enumerate(zip(*of_layers, strict=True)):
            ratios = torch.tensor([value for _, value in points], dtype=torch.float64)
            for name, quantile in (("min", 0.0), ("median", 0.5), ("max", 1.0)):
                step, found = logged[f"update_ratio/{name}{label}"][position]
                assert step == points[0][0]
                assert found == pytest.approx(ratios.quantile(quantile).item(), rel=1e-6)


def test_no_quantiles_without_update_ratios(tmp_path: Path) -> None:
    trainer = fit(
        Blocks(),
        loader(8, 4),
        OptimizationMonitor(every=1, per_layer=["grad_norm"]),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    assert not [tag for tag in curves(trainer) if tag.startswith("update_ratio")]
