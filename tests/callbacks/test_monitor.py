"""The monitor's values against float64 and copies of the weights, and every odd kind of run."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    PerParameterNormClip,
    StepGuard,
    WarmupCosine,
)
from lightning_bigopt.parameters import block_of
from lightning_bigopt.reporting.runs import read_run
from lightning_bigopt.reporting.tags import TAGS, find_tag
from tests.kit import QUIET, Probe, ResumableLoader, loader

BY_THE_CLOCK = ("throughput/", "time/", "memory/")
OURS = tuple({tag.name.split("/")[0] + "/" for tag in TAGS})


class Watched(L.LightningModule):
    """Blocks with dead units; keeps float64 copies of what every update started from and made."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.blocks[1][0].bias[:3] = -100.0  # dead: zeros in the gradient
        self.options = {"lr": 0.1, **options}
        self.seen: list[dict[str, dict[str, Tensor]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        loss = nn.functional.mse_loss(self.head(h), y)
        self.log("train_loss", loss)
        return loss

    def on_after_backward(self) -> None:
        copies = {n: p.detach().double().clone() for n, p in self.named_parameters()}
        grads = {n: p.grad.double().clone() for n, p in self.named_parameters()}
        self.seen.append({"before": copies, "grads": grads})

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen[-1]["after"] = {n: p.detach().double() + 0 for n, p in self.named_parameters()}

    def configure_optimizers(self) -> Any:
        kind = self.options.pop("kind", torch.optim.SGD)
        return kind(self.parameters(), **self.options)


def fit(module: L.LightningModule, data: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    ckpt = options.pop("ckpt", None)
    trainer = L.Trainer(**{**QUIET, "callbacks": list(callbacks), **options})
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def curves(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    return dict(read_run(trainer.log_dir).curves)


def curves_in_tensorboard(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard itself reads the folder."""
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


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
def test_layers_are_those_of_an_independent_calculation_in_float64(
    layers: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    module = Watched(**optimizer)
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
                "grad_norm": norm(pick("grads")),
                "weight_norm": norm(pick("before")),
                "update_ratio": norm(changes) / norm(pick("before")),
                "zeros": sum(int((t == 0).sum()) for t in pick("grads")) / entries,
            }
            for value, truth in expected.items():
                step, found = logged[f"layers/{value}/{label}"][update]
                assert step == update
                # The update is a difference of float32 weights, here of 1e-3 of them.
                assert found == pytest.approx(truth, rel=1e-4 if value == "update_ratio" else 2e-6)
    if layers == "blocks":
        assert logged["layers/zeros/blocks.1"][0][1] >= 0.5


def test_the_total_the_clip_and_its_share(tmp_path: Path) -> None:
    module = Watched(lr=0.01)
    trainer = fit(
        module,
        loader(44, 4),
        GradientClipping(NormClip(max_norm=6.0)),
        OptimizationMonitor(every=4, layers=None),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    norms = [norm(list(seen["grads"].values())) for seen in module.seen]
    clipped = [value > 6.0 for value in norms]
    assert 0 < sum(clipped[:8]) < 8
    assert logged["grad_norm/total"] == [(t, pytest.approx(norms[t])) for t in (3, 7)]
    assert logged["clip/threshold"] == [(3, 6.0), (7, 6.0)]
    assert logged["clip/coefficient"] == [
        (t, pytest.approx(min(1.0, 6.0 / (norms[t] + 1e-6)))) for t in (3, 7)
    ]
    shares = [sum(clipped[:4]) / 4, sum(clipped[4:8]) / 4]
    assert [value for _, value in logged["clip/fraction"]] == pytest.approx(shares)


def test_groups_by_name_with_the_values_used_for_the_update(tmp_path: Path) -> None:
    class Grouped(Probe):
        def configure_optimizers(self) -> Any:
            first, second = self.net[0], self.net[2]
            return torch.optim.AdamW(
                [
                    {"params": first.parameters(), "name": "body", "weight_decay": 0.3},
                    {"params": second.parameters(), "lr": 0.2},
                ],
                lr=0.1,
                betas=(0.8, 0.99),
            )

    module = Grouped()
    schedule = LearningRateScheduler(Linear(start=1.0, end=0.0))
    trainer = fit(
        module,
        loader(8, 2),
        OptimizationMonitor(every=1, layers=None),
        schedule,
        max_steps=4,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    rates = [1.0, 0.75, 0.5, 0.25]
    assert [v for _, v in logged["optim/lr/body"]] == pytest.approx([0.1 * r for r in rates])
    assert [v for _, v in logged["optim/lr/group1"]] == pytest.approx([0.2 * r for r in rates])
    assert logged["optim/lr/body"] == [(t, pytest.approx(v)) for t, v in logged["plan/lr/body"]]
    assert [v for _, v in logged["optim/weight_decay/body"]] == pytest.approx([0.3] * 4)
    assert [v for _, v in logged["optim/momentum/group1"]] == pytest.approx([0.8] * 4)


def test_groups_of_one_name_have_a_curve_each(tmp_path: Path) -> None:
    class Grouped(Probe):
        def configure_optimizers(self) -> Any:
            first, second = self.net[0].parameters(), self.net[2].parameters()
            groups = [{"params": first, "name": "g"}, {"params": second, "name": "g", "lr": 0.2}]
            return torch.optim.SGD(groups, lr=0.1)

    trainer = fit(
        Grouped(),
        loader(8, 4),
        OptimizationMonitor(every=1),
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        max_steps=2,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    for kind in ("optim", "plan"):
        assert [value for _, value in logged[f"{kind}/lr/g-0"]] == pytest.approx([0.1, 0.05])
        assert [value for _, value in logged[f"{kind}/lr/g-1"]] == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("scheduled_by", ["us", "torch"])
def test_a_rate_in_a_tensor_is_the_one_that_the_update_used(
    scheduled_by: str, tmp_path: Path
) -> None:
    class Tensors(Watched):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.used.append(float(optimizer.param_groups[0]["lr"]))

        def configure_optimizers(self) -> Any:
            self.used: list[float] = []
            rate = torch.tensor(0.1)
            optimizer = torch.optim.Adam(self.parameters(), lr=rate, foreach=False)
            if scheduled_by == "us":
                return optimizer
            falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": falling, "interval": "step"}]

    module, callbacks = Tensors(), [OptimizationMonitor(every=1, layers=None)]
    if scheduled_by == "us":
        callbacks.append(LearningRateScheduler(Linear(start=1.0, end=0.0)))
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(module, loader(16, 4), *callbacks, max_steps=4, logger=logger)
    assert len(set(module.used)) == 4
    assert [v for _, v in curves(trainer)["optim/lr"]] == pytest.approx(module.used)


class FindsItsOwn(torch.optim.SGD):
    """Needs no learning rate, as Adafactor with relative steps."""

    def __init__(self, params: Any, **written: Any) -> None:
        super().__init__(params, lr=0.01)
        for group in self.param_groups:
            group.update(written)
            for key in [key for key, value in written.items() if value == "none at all"]:
                del group[key]

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            return closure()


@pytest.mark.parametrize(
    ("written", "missing"),
    [
        ({"lr": None}, "optim/lr"),
        ({"lr": "none at all"}, "optim/lr"),
        ({"weight_decay": None}, "optim/weight_decay"),
        ({"momentum": None, "betas": (None, 0.999)}, "optim/momentum"),
    ],
)
def test_what_an_optimizer_does_not_have_is_left_out(
    written: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    trainer = fit(
        Watched(kind=FindsItsOwn, **written),
        loader(8, 4),
        OptimizationMonitor(every=1),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = {tag for tag in curves(trainer) if tag.startswith("optim/")}
    assert logged == {"optim/lr", "optim/weight_decay", "optim/momentum"} - {missing}
    assert "grad_norm" in trainer.progress_bar_metrics


def batch_tokens(batch: Any) -> int:
    return 10 * len(batch[0])


def test_the_table_of_tags_is_complete(tmp_path: Path) -> None:
    logged: set[str] = set()
    module = Watched(momentum=0.9)
    trainer = fit(
        module,
        loader(16, 2),
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        GradientClipping(PerParameterNormClip(max_norm=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "50%": 4}), lr_scaling="sqrt"),
        StepGuard(),
        OptimizationMonitor(every=1, histograms_every=2, tokens=batch_tokens),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged |= set(curves(trainer))
    folder = Path(trainer.log_dir)
    for file in folder.glob("events*"):
        for event in EventFileLoader(str(file)).Load():
            logged |= {value.tag for value in event.summary.value}
    ours = {tag for tag in logged if tag.startswith(OURS) and "/text_summary" not in tag}
    assert {tag for tag in ours if find_tag(tag) is None} == set()
    never = {tag.name for tag in TAGS if not any(tag.matches(name) for name in ours)}
    elsewhere = {t.name for t in TAGS if t.name.startswith(("memory/", "noise_scale/"))}
    assert never == elsewhere  # on a GPU, and where the noise scale is measured
    assert len({tag.name for tag in TAGS}) == len(TAGS)
    for name in ours:
        assert sum(tag.matches(name) for tag in TAGS) == 1, name
    assert all(tag.meaning.endswith(".") and tag.unit for tag in TAGS)


def test_a_logged_update_is_one_event(tmp_path: Path) -> None:
    trainer = fit(
        Watched(),
        loader(16, 2),
        OptimizationMonitor(every=2, layers="parameters"),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    (file,) = Path(trainer.log_dir).glob("events*")
    ours = [
        (event.step, len(event.summary.value))
        for event in EventFileLoader(str(file)).Load()
        if any(v.tag == "grad_norm/total" for v in event.summary.value)
    ]
    assert [step for step, _ in ours] == [1, 3, 5, 7]
    assert all(count > 40 for _, count in ours)


@pytest.mark.parametrize(("axis", "each"), [("samples", 4), ("tokens", 40)])
def test_the_x_axis_counts_what_was_consumed(axis: Any, each: int, tmp_path: Path) -> None:
    trainer = fit(
        Watched(),
        loader(16, 4),
        OptimizationMonitor(every=1, x_axis=axis, tokens=batch_tokens),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    steps = [step for step, _ in curves(trainer)["grad_norm/total"]]
    assert steps == [each, 2 * each, 3 * each, 4 * each]


def test_a_budget_in_tokens_is_planned_on_the_axis_of_tokens(tmp_path: Path) -> None:
    def run(version: str, *more: Any, **options: Any) -> L.Trainer:
        schedule = LearningRateScheduler(
            WarmupCosine(warmup="25%"), budget="320 tokens", tokens=batch_tokens
        )
        return fit(
            Watched(),
            ResumableLoader(64, 4),
            schedule,
            OptimizationMonitor(every=1, x_axis="tokens"),
            *more,
            max_epochs=-1,
            logger=TensorBoardLogger(tmp_path, version=version),
            **options,
        )

    straight = curves(run("straight"))
    planned, used = dict(straight["plan/lr"]), straight["optim/lr"]
    assert (min(planned), max(planned), len(planned)) == (0, 320, 201)
    assert [at for at, _ in used] == [40 * update for update in range(1, 9)]
    # A logged update stands where it ended, and used the rate of the share where it began.
    assert [rate for _, rate in used] == [pytest.approx(planned[at - 40]) for at, _ in used]
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        run("died", save, DiesAt(5, ZeroDivisionError()), enable_checkpointing=True)
    time.sleep(1 - time.time() % 1)
    resumed = run("died", ckpt=tmp_path / "saved" / "epoch=0-step=3.ckpt")
    found = curves_in_tensorboard(resumed)
    for tag in ("plan/lr", "optim/lr"):
        assert found[tag] == straight[tag], tag


def test_tokens_that_only_counting_tells_have_no_plan_on_their_axis(tmp_path: Path) -> None:
    trainer = fit(
        Watched(),
        loader(16, 4),
        LearningRateScheduler(WarmupCosine(warmup="25%")),
        OptimizationMonitor(every=1, x_axis="tokens", tokens=batch_tokens),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    found = curves(trainer)
    assert len(found["optim/lr"]) == 4
    assert not [tag for tag in found if tag.startswith("plan/")]


def test_an_x_axis_that_nobody_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be counted for x_axis='tokens'"):
        fit(Watched(), loader(8, 4), OptimizationMonitor(x_axis="tokens"), max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a positive number of updates or None, got 0"),
        ({"histograms_every": 1.5}, "histograms_every must be a positive"),
        ({"x_axis": "epochs"}, "x_axis must be"),
        ({"layers": "block"}, "layers must be 'blocks', 'parameters'"),
        ({"layers": True}, "layers must be .* got True; write patterns as"),
        ({"layers": {"head": 3}}, "layers must be .* got {'head': 3}"),
        ({"per_layer": ["norm"]}, "per_layer must be a list of 'grad_norm', .* got 'norm'"),
        ({"per_layer": "grad_norm"}, "per_layer must be a list of .* got 'grad_norm'"),
        ({"tokens": 3}, "tokens must be a function of the batch, .* got 3"),
        ({"report": True}, "report must be the name of a file or None, got True"),
        ({"report": ""}, "report must be the name of a file or None, got ''"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizationMonitor(**options)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'haed\.\*', which matches none of"):
        fit(
            Watched(),
            loader(8, 4),
            OptimizationMonitor(every=50, layers={"head": "haed.*"}),
            max_epochs=1,
            logger=TensorBoardLogger(tmp_path),
        )


def test_patterns_may_belong_to_one_of_several_optimizers(tmp_path: Path) -> None:
    trainer = fit(
        TwoOptimizers(),
        loader(8, 2),
        OptimizationMonitor(every=1, layers={"first": "one.*", "second": "two.*"}),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    found = {tag for tag in curves(trainer) if tag.startswith("layers/grad_norm")}
    assert found == {"layers/grad_norm/first/SGD", "layers/grad_norm/second/AdamW"}


def test_patterns_may_match_what_is_frozen_for_a_while(tmp_path: Path) -> None:
    class Thawing(Watched):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.embed.requires_grad_(batch_idx >= 2)

        def on_after_backward(self) -> None:
            self.seen.append({})

    trainer = fit(
        Thawing(),
        loader(16, 4),
        OptimizationMonitor(every=1, layers={"embed": "embed.*", "head": "head.*"}),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    assert [step for step, _ in logged["layers/grad_norm/head"]] == [0, 1, 2, 3]
    assert [step for step, _ in logged["layers/grad_norm/embed"]] == [2, 3]


class DiesAt(L.Callback):
    """Raises after an update, when it has been logged."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("axis", "accumulate", "every", "saved"),
    [
        ("updates", 1, 1, 7),
        ("updates", 1, 1, 6),  # at the end of an epoch
        ("updates", 2, 1, 7),
        ("samples", 1, 1, 7),
        ("samples", 2, 2, 7),
        ("tokens", 1, 1, 6),
        ("tokens", 2, 2, 7),
    ],
)
def test_a_resumed_run_continues_its_curves(
    axis: Any, accumulate: int, every: int, saved: int, tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        return [
            LearningRateScheduler(Linear(start=1.0, end=0.1)),
            GradientClipping(NormClip(max_norm=6.0)),
            OptimizationMonitor(every=every, x_axis=axis, tokens=batch_tokens),
        ]

    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    data = (24 * accumulate, 2)
    straight = fit(
        Watched(),
        ResumableLoader(*data),
        *callbacks(),
        logger=TensorBoardLogger(tmp_path, version="straight"),
        **options,
    )
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=saved, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(
            Watched(),
            ResumableLoader(*data),
            *callbacks(),
            save,
            DiesAt(12, ZeroDivisionError()),
            logger=TensorBoardLogger(tmp_path, version="died"),
            enable_checkpointing=True,
            **options,
        )
    (checkpoint,) = (tmp_path / "saved").glob(f"*step={saved}.ckpt")
    # TensorBoard reads files by name, and names hold whole seconds; then a number as text.
    time.sleep(1 - time.time() % 1)
    resumed = fit(
        Watched(),
        ResumableLoader(*data),
        *callbacks(),
        logger=TensorBoardLogger(tmp_path, version="died"),
        ckpt=checkpoint,
        **options,
    )
    assert len(list(Path(resumed.log_dir).glob("events*"))) == 2
    expected, found = curves_in_tensorboard(straight), curves_in_tensorboard(resumed)
    compared = 0
    for tag, curve in expected.items():
        if not tag.startswith(BY_THE_CLOCK) and tag.startswith(OURS):
            assert found[tag] == curve, tag
            compared += 1
    assert compared > 25
    assert len(expected["grad_norm/total"]) == 24 // every


def test_the_micro_batches_of_an_epochs_last_update_are_those_it_had(tmp_path: Path) -> None:
    trainer = fit(
        Watched(),
        loader(12, 2),
        OptimizationMonitor(every=1),
        max_epochs=2,
        accumulate_grad_batches=4,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    assert [value for _, value in logged["batch/accumulate"]] == [4, 2, 4, 2]
    assert [value for _, value in logged["batch/global_size"]] == [8, 4, 8, 4]


class SeveralSteps(Watched):
    """Several updates a batch, the last of which is too small to be clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for factor in (1.0, 1.0, 1.0, 1e-9):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx) * factor)
            optimizer.step()


def test_the_share_clipped_counts_every_update_of_a_batch(tmp_path: Path) -> None:
    trainer = fit(
        SeveralSteps(),
        loader(16, 4),
        GradientClipping(NormClip(max_norm=1e-3)),
        OptimizationMonitor(every=2),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    assert curves(trainer)["clip/fraction"] == [(1, 0.75), (3, 0.75)]


class TwoOptimizers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        for optimizer, layer in zip(self.optimizers(), (self.one, self.two), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(layer(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.one.parameters(), lr=0.1),
            torch.optim.AdamW(self.two.parameters(), lr=0.01),
        )


def test_manual_optimization_of_several_optimizers(tmp_path: Path) -> None:
    trainer = fit(
        TwoOptimizers(),
        loader(8, 2),
        OptimizationMonitor(every=1),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    for tag in ("optim/lr/SGD", "grad_norm/total/AdamW", "layers/update_ratio/one/SGD"):
        assert [step for step, _ in logged[tag]] == [0, 1, 2, 3], tag
        assert find_tag(tag) is not None


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


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"fast_dev_run": True},
        {"limit_train_batches": 2, "log_every_n_steps": 1},
        {"limit_train_batches": 0},
        {"overfit_batches": 1},
        {"log_every_n_steps": 0},
    ],
)
def test_odd_runs_train_as_without_us(options: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [OptimizationMonitor(histograms_every=1)]):
        module = Watched(lr=1e-3)
        logger = TensorBoardLogger(tmp_path, version=str(len(callbacks)))
        fit(module, loader(16, 4), *callbacks, max_epochs=2, **{"logger": logger, **options})
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_validation_alone_leaves_nothing(tmp_path: Path) -> None:
    class Validating(Watched):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    trainer = L.Trainer(
        **{**QUIET, "logger": CSVLogger(tmp_path)}, callbacks=[OptimizationMonitor(every=1)]
    )
    assert trainer.validate(Validating(), loader(8, 4), verbose=False)


def test_every_logger_gets_the_same_numbers(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "csv")]
    fit(
        Watched(),
        loader(16, 4),
        OptimizationMonitor(every=2),
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
    )
    events, table = (read_run(logger.log_dir).curves for logger in loggers)
    shared = [tag for tag in table if tag.startswith("layers/") or tag == "grad_norm/total"]
    assert len(shared) > 15
    for tag in shared:
        assert events[tag] == [(step, pytest.approx(value)) for step, value in table[tag]]


def test_a_loggers_prefix_is_on_all_that_is_written(tmp_path: Path) -> None:
    trainer = fit(
        Watched(),
        loader(16, 4),
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        OptimizationMonitor(every=1, histograms_every=2),
        max_epochs=1,
        log_every_n_steps=1,
        logger=TensorBoardLogger(tmp_path, prefix="G+"),
    )
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = events.Tags()
    texts = [tag for tag in tags["tensors"] if tag.endswith("text_summary")]
    assert all(tag.startswith("G+-") for tag in tags["scalars"] + tags["histograms"] + texts)
    assert texts
    assert tags["histograms"]
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    )
    patterns = [t for c in layout.category for chart in c.chart for t in chart.multiline.tag]
    assert re.escape("G+-") + "optim/lr.*" in patterns
    for pattern in patterns:
        if "clip/threshold" not in pattern:  # beside the norm; nothing is clipped here
            assert any(re.match(pattern, tag) for tag in tags["scalars"]), pattern


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bars_show_what_is_used(
    bar: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step == 1:
                next(module.parameters()).grad.fill_(math.nan)

    monkeypatch.setenv("COLUMNS", "300")
    trainer = fit(
        Watched(lr=1.25e-4),
        loader(16, 4),
        Refused(),
        StepGuard(),
        OptimizationMonitor(every=1),
        bar(refresh_rate=1),
        max_epochs=1,
        enable_progress_bar=True,
    )
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert float(trainer.progress_bar_metrics["global_batch"]) == 4.0
    for name, value in (("lr", "0.000125"), ("global_batch", "4"), ("skipped", "1")):
        assert re.search(rf"{name}(=|: ){value}[],\s]", shown), name
    assert "grad_norm" in shown


def test_nothing_grows_with_the_number_of_steps(tmp_path: Path) -> None:
    sizes = []
    for epochs in (10, 60):
        monitor = OptimizationMonitor(every=3)
        clip = GradientClipping(NormClip(max_norm=1.0))
        fit(Watched(lr=1e-4), loader(64, 4), clip, monitor, max_epochs=epochs, logger=False)
        sizes.append(len(pickle.dumps(monitor.controller)))
    assert abs(sizes[1] - sizes[0]) < 64


def test_the_weights_are_copied_for_logged_updates_only(tmp_path: Path) -> None:
    copies = []
    original = torch._foreach_copy_

    def counted(*args: Any) -> Any:
        copies.append(1)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", counted)
        fit(
            Watched(),
            loader(48, 4),
            OptimizationMonitor(every=4),
            max_epochs=1,
            logger=TensorBoardLogger(tmp_path),
        )
    assert len(copies) == 3


def test_histograms_are_of_the_gradient_before_clipping(tmp_path: Path) -> None:
    module = Watched()
    trainer = fit(
        module,
        loader(16, 4),
        GradientClipping(NormClip(max_norm=1e-3)),
        OptimizationMonitor(histograms_every=2, layers=None),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    events = EventAccumulator(trainer.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    found = events.Histograms("histograms/grad/head.weight")
    assert [event.step for event in found] == [1, 3]
    truth = module.seen[1]["grads"]["head.weight"]
    assert found[0].histogram_value.num == truth.numel()
    assert found[0].histogram_value.max == pytest.approx(float(truth.max()), rel=1e-6)


def test_a_run_resumed_into_another_folder_has_its_plan(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True, "max_steps": 8}
    schedule = WarmupCosine(warmup="20%")
    fit(Watched(), ResumableLoader(16, 4), LearningRateScheduler(schedule), save, **options)
    trainer = fit(
        Watched(),
        ResumableLoader(16, 4),
        LearningRateScheduler(schedule),
        OptimizationMonitor(every=1),
        max_steps=8,
        ckpt=tmp_path / "saved" / "epoch=0-step=2.ckpt",
        logger=TensorBoardLogger(tmp_path, version="elsewhere"),
    )
    run = read_run(trainer.log_dir)
    assert "WarmupCosine" in run.texts["plan"]
    assert [step for step, _ in run.curves["plan/lr"]] == [2, 3, 4, 5, 6, 7]


def test_the_plan_is_a_text_and_the_end_has_hyperparameters(tmp_path: Path) -> None:
    module = Watched()
    trainer = fit(
        module,
        loader(16, 4),
        LearningRateScheduler(WarmupCosine(warmup="20%")),
        OptimizationMonitor(every=1),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    assert "WarmupCosine" in read_run(trainer.log_dir).texts["plan"]
    tags = {
        value.tag
        for file in (Path(trainer.log_dir) / "hyperparameters").glob("events*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "train_loss"} <= tags


def test_refusals_are_counted_where_somebody_may_refuse(tmp_path: Path) -> None:
    for guards, expected in (([], None), ([StepGuard()], [(step, 0.0) for step in range(4)])):
        logger = TensorBoardLogger(tmp_path, name=f"{len(guards)}")
        callbacks = [*guards, OptimizationMonitor(every=1)]
        trainer = fit(Watched(), loader(16, 4), *callbacks, max_epochs=1, logger=logger)
        assert curves(trainer).get("guard/skipped") == expected


def test_state_is_plain(tmp_path: Path) -> None:
    monitor = OptimizationMonitor(every=3)
    clipping = GradientClipping(NormClip(1.0))
    fit(Watched(), loader(16, 4), clipping, monitor, max_epochs=1)
    for callback in (monitor, clipping):
        state = callback.controller.state_dict()
        assert json.loads(json.dumps(state)) == state
    audit = state["audit"][""][""]
    assert (audit["updates"], audit["logged"][0]) == (4, 3)  # one came after the last logged one


def test_the_steps_seconds_and_samples_are_plausible(tmp_path: Path) -> None:
    trainer = fit(
        Watched(),
        loader(64, 4),
        OptimizationMonitor(every=4, layers=None),
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
    )
    logged = curves(trainer)
    for (_, median), (_, slow), (_, rate) in itertools.islice(
        zip(
            logged["time/step_median"],
            logged["time/step_p95"],
            logged["throughput/samples_per_second"],
            strict=True,
        ),
        1,
        None,
    ):
        assert 0 < median <= slow
        assert 4 / (20 * slow) < rate < 20 * 4 / median
