"""With Opacus, schedules are exact, and everything that reads or changes gradients raises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import wrap_data_loader
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    ConstantBatchSize,
    GlobalBatchFinder,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateRangeTest,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    ReduceOnPlateau,
    StepGuard,
    learning_rate_range_test,
)
from lightning_bigopt.engine.capability import Capability
from lightning_bigopt.gradients import clip_gradients_
from lightning_bigopt.optimizers import as_lr_scheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec. is deprecated"),
    pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning"),
]

STEPS = 20
PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "opacus.md"


class Private(LightningModule):
    """A regression that Opacus makes private, with the optimizer and the loader."""

    def __init__(self, *, physical_batch: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        inputs = torch.randn(160, 4)
        targets = inputs.sum(dim=1, keepdim=True)
        self.privacy = PrivacyEngine(accountant="rdp")
        self.model, self.optimizer, self.loader = self.privacy.make_private(
            module=network,
            optimizer=torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1),
            data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=16),
            noise_multiplier=1.0,
            max_grad_norm=0.5,
            noise_generator=torch.Generator().manual_seed(1),
        )
        if physical_batch is not None:
            self.loader = wrap_data_loader(
                data_loader=self.loader, max_batch_size=physical_batch, optimizer=self.optimizer
            )
        self.factor: Any = None
        self.rates: list[tuple[float, float]] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        group = self.optimizer.param_groups[0]
        self.rates.append((group["lr"], group["weight_decay"]))
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.factor is None:
            return self.optimizer
        scheduler = LambdaLR(self.optimizer, self.factor)
        return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Validated(Private):
    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", 1.0)


class DecayByHand(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.optimizer.param_groups[0]["weight_decay"] = 0.1 * (
            1 - trainer.global_step / STEPS
        )


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        **{"max_steps": STEPS, **options},
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("physical_batch", [None, 5])
def test_scheduled_run_equals_that_with_the_scheduler_of_torch(physical_batch):
    expected = Private(physical_batch=physical_batch)
    expected.factor = lambda step: 1 - step / STEPS
    trainer(DecayByHand()).fit(expected, expected.loader)

    made = Private(physical_batch=physical_batch)
    schedules = LearningRateScheduler(Linear()), HyperparameterScheduler("weight_decay", Linear())
    trainer(*schedules).fit(made, made.loader)

    assert len(made.rates) == STEPS
    assert sum(made.rates, ()) == pytest.approx(sum(expected.rates, ()))
    assert made.rates[10] == pytest.approx((0.05, 0.05))
    weights = [list(module.state_dict().values()) for module in (made, expected)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert made.privacy.get_epsilon(1e-5) == expected.privacy.get_epsilon(1e-5) > 0
    steps = sum(steps for _, _, steps in made.privacy.accountant.history)
    assert (steps < STEPS) is (physical_batch is not None)  # virtual steps add no noise


def test_plateau_changes_the_learning_rate():
    made = Validated()
    plateau = ReduceOnPlateau(monitor="val_loss", patience=1, factor=0.5)
    loader = DataLoader(TensorDataset(torch.zeros(2, 4), torch.zeros(2, 1)))
    run = trainer(LearningRateScheduler(Linear(end=1.0)), plateau, max_epochs=4, max_steps=-1)
    run.fit(made, made.loader, loader)
    assert [rate for rate, _ in made.rates[::10]] == [0.1, 0.1, 0.1, 0.05]


class ReadsGradients(Capability):
    owns, rank = "my statistics", 70

    def needs_norms(self, update):
        return True


class ReadsWeights(Capability):
    owns, rank = "my weights", 70
    count = 0

    def after_step(self, update):
        self.count += 1


REFUSED = {
    "GradientClipping": (GradientClipping(NormClip()), "set its max_grad_norm"),
    "StepGuard": (StepGuard(), "privacy accounting breaks"),
    "BatchSizeScheduler": (BatchSizeScheduler(ConstantBatchSize(32)), "batch_size of the loader"),
    "GradientNoiseScale": (GradientNoiseScale(), "are not private"),
    "OptimizationMonitor": (OptimizationMonitor(), "are not private"),
    "ReadsGradients": (ReadsGradients(), "are not private"),
    "LearningRateRangeTest": (LearningRateRangeTest(), "privacy budget"),
    "GlobalBatchFinder": (GlobalBatchFinder(global_batch_size=64), "BatchMemoryManager"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_callback_raises_before_the_first_batch(name):
    callback, advice = REFUSED[name]
    private = Private()
    before = [p.clone() for p in private.parameters()]
    pattern = f"^optimizer must not be an optimizer of Opacus with {name}, got .*{advice}"
    with pytest.raises(ValueError, match=pattern):
        trainer(callback).fit(private, private.loader)
    assert private.rates == []
    assert private.privacy.accountant.history == []
    assert all(map(torch.equal, before, private.parameters()))


def test_range_test_as_a_function_raises():
    private = Private()
    with pytest.raises(ValueError, match="Opacus with LearningRateRangeTest"):
        learning_rate_range_test(trainer(), private, private.loader)


def test_capability_that_reads_the_weights_runs():
    private, own = Private(), ReadsWeights()
    trainer(own).fit(private, private.loader)
    assert own.count == STEPS


def test_clipping_in_a_loop_raises():
    private = Private()
    inputs, targets = next(iter(private.loader))
    nn.functional.mse_loss(private.model(inputs), targets).backward()
    with pytest.raises(ValueError, match=r"optimizer of Opacus with clip_gradients_"):
        clip_gradients_(private.model, NormClip(), optimizer=private.optimizer)
    with pytest.raises(ValueError, match=r"must have no gradients of samples \(Opacus\)"):
        clip_gradients_(private.model, NormClip())


def test_torch_scheduler_of_a_schedule():
    private = Private()
    scheduler = as_lr_scheduler(Linear(), private.optimizer, 4)
    rates = []
    for _, (inputs, targets) in zip(range(4), private.loader, strict=False):
        rates.append(private.optimizer.param_groups[0]["lr"])
        private.optimizer.zero_grad()
        nn.functional.mse_loss(private.model(inputs), targets).backward()
        private.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_script_of_the_page_resumes_with_the_privacy_spent(tmp_path, monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "private"}
    exec(script, names)
    module = names["train"]()
    epsilon = module.privacy.get_epsilon(delta=1e-5)
    assert f"`epsilon {epsilon:.3f}`" in page
    # After the last update both schedules are at their ends.
    (group,) = module.optimizer.param_groups
    assert group["weight_decay"] == pytest.approx(0.01 * 0.1)
    resumed = names["train"](checkpoint="runs/epoch=0.ckpt")
    assert resumed.privacy.accountant.history == [(1.0, 0.05, 40)]
    assert resumed.privacy.get_epsilon(delta=1e-5) == epsilon
    assert resumed.optimizer.param_groups[0]["lr"] == group["lr"] == pytest.approx(0.001)


def test_page_lists_every_callback_that_raises():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if "raise" in line]
    for name in REFUSED.keys() - {"ReadsGradients"}:
        assert any(f"`{name}`" in row for row in rows), name
