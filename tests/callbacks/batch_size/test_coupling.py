"""Learning rate, second beta and weight decay scaled with the batch size."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
)
from tests.helpers import Probe, ResumableLoader, fit, loader

POLICY = BatchSizeSteps({"0%": 2, "3 steps": 8, "5 steps": 4})
KAPPAS = [1, 1, 1, 4, 4, 2, 2, 2]


class RecordsBetaAndDecay(Probe):
    """Records the second beta and the weight decay of every update."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"optimizer": torch.optim.AdamW, "lr": 0.01, **options})
        self.used: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        group = optimizer.param_groups[0]
        self.used.append((float(group["betas"][1]), float(group["weight_decay"])))


@pytest.mark.parametrize(("rule", "power"), [("sqrt", 0.5), ("linear", 1.0)])
@pytest.mark.parametrize("scheduled", [True, False])
def test_learning_rate_follows_the_batch_of_the_same_update(
    rule: Any, power: float, scheduled: bool
) -> None:
    module = Probe(lr=0.001)
    others = [LearningRateScheduler(Linear(start=1.0, end=0.0))] if scheduled else []
    scheduler = BatchSizeScheduler(POLICY, lr_scaling=rule)
    fit(module, loader(80, 2), *others, scheduler, max_steps=8)
    assert [len(w) for w in module.windows] == [2 * kappa for kappa in KAPPAS]
    schedule = [1 - t / 8 if scheduled else 1.0 for t in range(8)]
    expected = [0.001 * s * kappa**power for s, kappa in zip(schedule, KAPPAS, strict=True)]
    assert module.lrs == pytest.approx(expected, rel=1e-12)


def test_max_kappa_limits_the_factor() -> None:
    module = Probe(lr=0.001)
    scheduler = BatchSizeScheduler(POLICY, lr_scaling="linear", max_kappa=3.0)
    fit(module, loader(80, 2), scheduler, max_steps=8)
    assert module.lrs == pytest.approx([0.001 * min(k, 3.0) for k in KAPPAS])


def test_beta2_and_weight_decay_are_computed_from_their_bases() -> None:
    module = RecordsBetaAndDecay(betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = BatchSizeScheduler(
        POLICY, beta2_scaling="half-life", weight_decay_scaling="sqrt", lr_scaling="sqrt"
    )
    fit(module, loader(80, 2), scheduler, max_steps=8)
    expected = [(0.95**kappa, 0.1 * math.sqrt(kappa)) for kappa in KAPPAS]
    assert [pair[0] for pair in module.used] == pytest.approx([pair[0] for pair in expected])
    assert [pair[1] for pair in module.used] == pytest.approx([pair[1] for pair in expected])


class TwoGroups(Probe):
    """Two groups with different values, with any implementation of AdamW."""

    bases = ((0.01, 0.95, 0.1), (0.002, 0.99, 0.3))

    def __init__(self, *, lr_is_tensor: bool, **choice: bool) -> None:
        super().__init__()
        self.lr_is_tensor, self.choice = lr_is_tensor, choice
        self.used: list[list[tuple[float, float, float]]] = []

    def configure_optimizers(self) -> Any:
        layers = ([*self.net[0].parameters()], [*self.net[2].parameters()])
        groups = [
            {
                "params": layer,
                "lr": torch.tensor(lr) if self.lr_is_tensor else lr,
                "betas": (0.9, beta),
                "weight_decay": decay,
            }
            for layer, (lr, beta, decay) in zip(layers, self.bases, strict=True)
        ]
        return torch.optim.AdamW(groups, **self.choice)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        names = ("lr", "betas", "weight_decay")
        rows = [[group[name] for name in names] for group in optimizer.param_groups]
        self.used.append([(float(lr), float(betas[1]), float(wd)) for lr, betas, wd in rows])


@pytest.mark.parametrize(
    ("lr_is_tensor", "choice"),
    [(False, "foreach"), (False, "fused"), (True, "fused"), (True, "foreach=False")],
)
@pytest.mark.parametrize("scheduled", [True, False])
def test_groups_keep_their_ratios_with_every_implementation_of_adamw(
    lr_is_tensor: bool, choice: str, scheduled: bool
) -> None:
    """A learning rate in a tensor stands for capturable optimizers, which need a GPU."""
    name, _, value = choice.partition("=")
    module = TwoGroups(lr_is_tensor=lr_is_tensor, **{name: not value})
    others = [LearningRateScheduler(Linear(start=1.0, end=0.0))] if scheduled else []
    scheduler = BatchSizeScheduler(
        POLICY, lr_scaling="sqrt", beta2_scaling="half-life", weight_decay_scaling="sqrt"
    )
    fit(module, loader(80, 2), *others, scheduler, max_steps=8)
    for t, (kappa, used) in enumerate(zip(KAPPAS, module.used, strict=True)):
        schedule = 1 - t / 8 if scheduled else 1.0
        for found, (lr, beta, decay) in zip(used, module.bases, strict=True):
            root = math.sqrt(kappa)
            assert found == pytest.approx(
                (lr * schedule * root, beta**kappa, decay * root), rel=1e-6
            )


def test_rewarmup_is_linear_from_the_old_factor_to_the_new_one() -> None:
    module = Probe(lr=0.001)
    policy = BatchSizeSteps({"0%": 2, "4 steps": 8})
    scheduler = BatchSizeScheduler(policy, lr_scaling="linear", rewarmup="4 steps")
    fit(module, loader(80, 2), scheduler, max_steps=11)
    factors = [lr / 0.001 for lr in module.lrs]
    # 1 until the change, then a quarter of the difference (1 → 4) per update.
    assert factors == pytest.approx([1, 1, 1, 1, 1, 1.75, 2.5, 3.25, 4, 4, 4])


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_resume_with_all_scalings_is_exact(tmp_path: Path, stop: int) -> None:
    def build() -> tuple[RecordsBetaAndDecay, list[Any], ResumableLoader]:
        scheduler = BatchSizeScheduler(
            POLICY,
            lr_scaling="sqrt",
            beta2_scaling="half-life",
            weight_decay_scaling="sqrt",
            rewarmup="3 steps",
        )
        return RecordsBetaAndDecay(weight_decay=0.1), [scheduler], ResumableLoader(80, 2)

    straight, callbacks, data = build()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, data, *callbacks, checkpoint, enable_checkpointing=True, max_steps=8)
    resumed, callbacks, data = build()
    fit(resumed, data, *callbacks, ckpt_path=tmp_path / f"step={stop}.ckpt", max_steps=8)
    assert resumed.lrs == straight.lrs[stop:]
    assert resumed.used == straight.used[stop:]
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("optimizer", "pattern"),
    [
        (torch.optim.AdamW, "lr_scaling='sqrt'.*AdamW"),
        (torch.optim.SGD, "lr_scaling='linear'.*SGD"),
    ],
)
def test_plan_is_logged_once_with_the_recommended_rule(
    optimizer: Any, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        module = Probe(lr=0.001, optimizer=optimizer)
        fit(module, loader(80, 2), BatchSizeScheduler(POLICY), max_steps=8)
    lines = [r.getMessage() for r in caplog.records if "Global batch" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(
        "Global batch 2 = micro-batch 2 × accumulation 1 × processes 1; 8 from update 3; "
        "4 from update 5; 8 updates."
    )
    assert re.search(pattern, lines[0])


class WithScheduler(Probe):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_conflicts_raise() -> None:
    def run(*callbacks: Any, module: L.LightningModule | None = None, **options: Any) -> None:
        scheduler = BatchSizeScheduler(POLICY, **options)
        fit(module or RecordsBetaAndDecay(), loader(80, 2), scheduler, *callbacks, max_steps=8)

    with pytest.raises(ValueError, match=r"StepLR.*add LearningRateScheduler"):
        run(module=WithScheduler(), lr_scaling="sqrt")
    with pytest.raises(ValueError, match="HyperparameterScheduler"):
        run(
            HyperparameterScheduler("weight_decay", Linear(start=1.0, end=2.0)),
            weight_decay_scaling="sqrt",
        )
    with pytest.raises(ValueError, match=r"beta2_scaling must be None for SGD.*betas\[1\]"):
        run(module=Probe(), beta2_scaling="half-life")
    with pytest.raises(ValueError, match="tokens must be given with rewarmup"):
        run(lr_scaling="sqrt", rewarmup="1e3 tokens")
    for bad in (
        {"lr_scaling": "cubic"},
        {"beta2_scaling": "sqrt"},
        {"rewarmup": "5%"},
        {"lr_scaling": "sqrt", "max_kappa": 0.0},
        {"lr_scaling": "sqrt", "rewarmup": "0%"},
    ):
        with pytest.raises(ValueError, match="got"):
            BatchSizeScheduler(POLICY, **bad)
    with pytest.raises(ValueError, match="which is constant"):
        BatchSizeScheduler(ConstantBatchSize(32), lr_scaling="sqrt")


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.filterwarnings("ignore:The global batch .* is larger than an epoch")
def test_learning_rate_follows_the_batch_that_an_epoch_allows(is_exact: bool) -> None:
    module = Probe(lr=0.1)
    data: Any = loader(16, 2)
    if is_exact:
        data = GlobalBatchLoader(data.dataset, micro_batch_size=2, shuffle="sequential")
    scheduler = BatchSizeScheduler(
        BatchSizeSteps({"0 epochs": 4, "1 epochs": 1024}), lr_scaling="linear"
    )
    fit(module, data, scheduler, max_epochs=3)
    assert [len(window) for window in module.windows] == [4, 4, 4, 4, 16, 16]
    assert module.lrs == pytest.approx([0.1] * 4 + [0.4] * 2)
    assert max(module.errors) <= 1e-6
