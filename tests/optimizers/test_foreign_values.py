"""Learning rates that other code writes, and optimizers and groups that it replaces, in mid-run.

The learning rate of every update is recorded by torch's own step hook. The expected values are
computed from the learning rate that was written.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    Constant,
    GradientClipping,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    NormClip,
    OptimizationMonitor,
    StepGuard,
)
from tests.helpers import QUIET

STEPS = 8
FACTORS = [1 - step / STEPS for step in range(STEPS)]


class Recorded(L.LightningModule):
    """Records the learning rates of every update in the optimizer's own step hook, after it."""

    def __init__(self, lr: Any = 0.1, *, scheduler: bool = False) -> None:
        super().__init__()
        self.layer, self.lr, self.scheduler = nn.Linear(3, 1), lr, scheduler
        self.rates: list[float] = []
        self.all_rates: list[list[float]] = []

    def recorded(self, optimizer: Optimizer) -> Optimizer:
        optimizer.register_step_post_hook(self.record)
        return optimizer

    def record(self, optimizer: Optimizer, *_: Any) -> None:
        if self.trainer.callbacks and any(isinstance(c, Marker) for c in self.trainer.callbacks):
            self.rates.append(float(optimizer.param_groups[0]["lr"]))
            self.all_rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        groups = [{"params": [p], "name": name} for name, p in self.layer.named_parameters()]
        optimizer = self.recorded(AdamW(groups, lr=self.lr, weight_decay=0.5))
        if self.scheduler:
            return [optimizer], [LinearLR(optimizer, start_factor=0.25)]
        return optimizer


class Validated(Recorded):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Does nothing: only the hooks around it matter."""


class Marker(Callback):
    """Is in the Trainer's list except during the trials of Lightning's finders."""


def trainer_of(*callbacks: Any, **options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_steps": STEPS, **options}, callbacks=[Marker(), *callbacks])


def data(updates: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4 * updates, 3)), batch_size=4)


def fit(module: Recorded, *callbacks: Any, updates: int = 4, **options: Any) -> L.Trainer:
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, data(updates))
    return trainer


def scaled(base: float, updates: slice = slice(None)) -> Any:
    return pytest.approx([base * factor for factor in FACTORS[updates]])


class WritesOnce(Callback):
    """Writes the learning rate of every group in a hook, at a number of updates."""

    def __init__(self, hook: str, at: int, value: float = 0.4) -> None:
        self.at, self.value, self.done = at, value, False
        setattr(self, hook, self.write)

    def write(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at and not self.done:
            self.done = True
            for group in trainer.optimizers[0].param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.value)
                else:
                    group["lr"] = self.value


HOOKS = {
    # hook: the first update that uses the new base, for a write at update 4
    "on_train_epoch_start": 4,
    "on_train_epoch_end": 4,
    "on_train_batch_start": 4,
    "on_train_batch_end": 4,
    "on_before_zero_grad": 4,
    "on_validation_end": 4,
}


@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
@pytest.mark.parametrize("hook", HOOKS)
def test_written_learning_rate_is_the_base_from_then_on(hook: str, first: bool) -> None:
    module, writes = Validated(), WritesOnce(hook, at=4)
    scheduler = LearningRateScheduler(Linear())
    trainer = trainer_of(*([writes, scheduler] if first else [scheduler, writes]))
    trainer.fit(module, data(), data())
    start = HOOKS[hook]
    assert module.rates[:start] == scaled(0.1, slice(start))
    assert module.rates[start:] == scaled(0.4, slice(start, None))
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.4


def test_written_learning_rate_in_a_tensor_is_the_base() -> None:
    module = Recorded(torch.tensor(0.1))
    fit(module, LearningRateScheduler(Linear()), WritesOnce("on_train_epoch_start", at=4))
    assert module.rates[:4] == scaled(0.1, slice(4))
    assert module.rates[4:] == scaled(0.4, slice(4, None))


def test_foreign_values_that_were_found_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Recorded(), LearningRateScheduler(Linear()), WritesOnce("on_train_epoch_start", at=4))
    (line,) = [text for text in caplog.messages if text.startswith("Other code")]
    assert line == (
        "Other code has changed lr of weight from 0.05 to 0.4, lr of bias from 0.05 to 0.4. These "
        "are the new base values, which the schedule multiplies."
    )


def test_written_weight_decay_is_the_base() -> None:
    seen: list[float] = []

    class Reads(Recorded):
        def record(self, optimizer: Optimizer, *_: Any) -> None:
            seen.append(optimizer.param_groups[1]["weight_decay"])

    class Writes(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[1]["weight_decay"] = 2.0

    fit(Reads(), HyperparameterScheduler("weight_decay", Linear()), Writes())
    assert seen == [0.5 * f for f in FACTORS[:4]] + [2.0 * f for f in FACTORS[4:]]


class WarmsUp(Recorded):
    """Warms up in ``optimizer_step``, as the documentation of Lightning shows it."""

    before: bool

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.before:
            self.warm_up(optimizer)
        optimizer.step(closure=optimizer_closure)
        if not self.before:
            self.warm_up(optimizer)

    def warm_up(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (self.trainer.global_step + 1) / 500) * 0.01


@pytest.mark.parametrize("before", [True, False])
def test_writing_at_every_update_is_refused(before: bool) -> None:
    module = WarmsUp()
    module.before = before
    with pytest.raises(ValueError, match=r"^lr must have one writer, got .*warm-up in optimizer"):
        fit(module, LearningRateScheduler(Linear()))
    assert len(module.rates) <= 2


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lr must be finite and not neg.*, got nan"):
        fit(
            Recorded(),
            LearningRateScheduler(Linear()),
            WritesOnce("on_train_epoch_start", at=4, value=math.nan),
        )


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_written_learning_rate_survives_a_resume(tmp_path: Path, stop: int) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, monitor=None
    )
    straight, resumed = Recorded(), Recorded()
    fit(
        straight,
        WritesOnce("on_train_batch_end", at=4),
        LearningRateScheduler(Linear()),
        checkpoints,
        enable_checkpointing=True,
    )
    callbacks = [WritesOnce("on_train_batch_end", at=4), LearningRateScheduler(Linear())]
    trainer_of(*callbacks).fit(resumed, data(), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert resumed.rates == straight.rates[stop:]


class WritesThenSaves(Callback):
    """Saves a checkpoint directly after it wrote a learning rate, before the engine has seen it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 0:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.4
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [True, False])
def test_checkpoint_of_a_value_that_was_not_adopted_yet(tmp_path: Path, first: bool) -> None:
    path = tmp_path / "written.ckpt"
    callbacks = [WritesThenSaves(path), LearningRateScheduler(Linear())]
    straight, resumed = Recorded(), Recorded()
    fit(straight, *(callbacks if first else callbacks[::-1]), max_steps=-1, max_epochs=2)
    assert straight.rates[4:] == scaled(0.4, slice(4, None))
    trainer = trainer_of(LearningRateScheduler(Linear()), max_steps=-1, max_epochs=2)
    trainer.fit(resumed, data(), ckpt_path=path)
    # Lightning saves this checkpoint before it counts the epoch, and ends it at the resume.
    assert resumed.rates[-4:] == straight.rates[4:]


def test_two_trainers_share_an_optimizer() -> None:
    module = Recorded()
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == scaled(0.1)
    for base in (0.1, 0.3):
        for group in optimizer.param_groups:
            if base == 0.3:
                group["lr"] = base
        module.rates.clear()
        fit(module, LearningRateScheduler(Linear()))
        assert module.rates == scaled(base)


def test_initial_lr_without_a_scheduler_is_the_base_as_for_torch() -> None:
    module = Recorded(0.025)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.1
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == scaled(0.1)


def test_torch_scheduler_after_a_fit_starts_at_the_base() -> None:
    module = Recorded()
    trainer = fit(module, LearningRateScheduler(Linear()))
    (optimizer,) = trainer.optimizers
    assert LinearLR(optimizer).base_lrs == [0.1, 0.1]


# ---------------------------------------------------------------------------- Lightning's finders


class FineTuneLearningRateFinder(LearningRateFinder):
    """The example in the documentation of Lightning's LearningRateFinder."""

    def __init__(self, milestones: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        self.milestones = milestones
        self.found: list[float] = []

    def on_fit_start(self, *_: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)
            assert self.optimal_lr is not None
            suggestion = self.optimal_lr.suggestion()
            assert suggestion is not None
            # Twice as much in the second epoch, because both trials suggest the same.
            self.found.append(suggestion * (1 + trainer.current_epoch))
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = self.found[-1]


FINDER = {"min_lr": 1e-3, "max_lr": 1.0, "num_training_steps": 20, "early_stop_threshold": None}


@pytest.mark.parametrize("scheduler", [False, True], ids=["", "beside a torch scheduler"])
@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
def test_learning_rate_finder(tmp_path: Path, first: bool, scheduler: bool) -> None:
    module = Recorded(scheduler=scheduler)
    finder = LearningRateFinder(**FINDER)
    ours = LearningRateScheduler(Linear(), module_scheduler="replace")
    callbacks = [finder, ours] if first else [ours, finder]
    fit(module, *callbacks, default_root_dir=tmp_path)
    assert finder.optimal_lr is not None
    found = finder.optimal_lr.suggestion()
    assert found not in (None, 0.1)
    assert module.rates == scaled(found)


@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
def test_learning_rate_finder_in_mid_run(tmp_path: Path, first: bool) -> None:
    module = Recorded()
    finder = FineTuneLearningRateFinder(milestones=(0, 1), **FINDER)
    callbacks = [finder, LearningRateScheduler(Linear())]
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"max_steps": 64, "max_epochs": -1}
    fit(
        module,
        *(callbacks if first else callbacks[::-1]),
        saves,
        updates=32,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
        **options,
    )
    assert len(set(finder.found)) == 2
    right = [finder.found[step // 32] * (1 - step / 64) for step in range(64)]
    assert module.rates == pytest.approx(right)
    # The state of the engine is not that of the finder's own checkpoint.
    resumed = Recorded()
    trainer = trainer_of(LearningRateScheduler(Linear()), **options)
    trainer.fit(resumed, data(32), ckpt_path=tmp_path / "step=40.ckpt")
    assert resumed.rates == module.rates[40:]


def test_finder_in_mid_run_leaves_every_callback_as_it_was(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            LearningRateScheduler(Linear()),
            GradientClipping(NormClip(0.1)),
            StepGuard(),
            HyperparameterScheduler("weight_decay", Linear()),
            OptimizationMonitor(),
        ]

    class Finds(FineTuneLearningRateFinder):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            before = [group["lr"] for group in trainer.optimizers[0].param_groups]
            super().on_train_epoch_start(trainer, pl_module)
            for group, lr in zip(trainer.optimizers[0].param_groups, before, strict=True):
                group["lr"] = lr

    weights = []
    for finders in ([], [Finds(milestones=(1,), **FINDER)]):
        torch.manual_seed(0)
        module = Recorded()
        torch.manual_seed(1)
        batches = data(32)
        own = callbacks()
        trainer = trainer_of(*finders, *own, default_root_dir=tmp_path, max_steps=64)
        trainer.fit(module, batches)
        states = {c.state_key: c.state_dict() for c in own}
        weights.append((module.state_dict(), states, module.all_rates))
    (one, states, rates), (other, other_states, other_rates) = weights
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rates == other_rates
    leaves, other_leaves = (tree_flatten(s)[0] for s in (states, other_states))
    assert len(leaves) == len(other_leaves) > 20
    for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
        assert torch.equal(leaf, other_leaf) if isinstance(leaf, Tensor) else leaf == other_leaf


def test_tuner_before_the_fit(tmp_path: Path) -> None:
    module = Recorded()
    trainer = trainer_of(LearningRateScheduler(Linear()), default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(
        module, data(), min_lr=1e-3, max_lr=1.0, num_training=20, early_stop_threshold=None
    )
    assert found is not None
    assert module.lr == found.suggestion()
    trainer.fit(module, data())
    assert module.rates == scaled(module.lr)


# ------------------------------------------------------------------ replaced optimizers and groups


class Replaces(Callback):
    """Replaces the optimizer in a hook, after four updates."""

    def __init__(self, hook: str, how: str) -> None:
        self.how, self.done = how, False
        setattr(self, hook, self.replace)

    def replace(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step != 4 or self.done:
            return
        self.done = True
        if self.how == "assigned":
            trainer.strategy.optimizers = [module.recorded(SGD(module.parameters(), lr=0.4))]
        else:
            module.lr = 0.4
            trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
@pytest.mark.parametrize("how", ["assigned", "set up", "set up with a scheduler"])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_replaced_optimizer_brings_its_own_base(
    tmp_path: Path, hook: str, how: str, first: bool
) -> None:
    module = Recorded(scheduler="scheduler" in how)
    callbacks = [
        Replaces(hook, how),
        LearningRateScheduler(Linear(), module_scheduler="replace"),
        GradientClipping(NormClip(1.0)),
    ]
    logger = CSVLogger(tmp_path)
    trainer = fit(
        module,
        *(callbacks if first else callbacks[::-1]),
        LearningRateMonitor("step"),
        logger=logger,
        log_every_n_steps=1,
    )
    assert module.rates == [*scaled(0.1, slice(4)).expected, *scaled(0.4, slice(4, None)).expected]
    assert len(trainer.lr_scheduler_configs) == 1
    if "scheduler" not in how:  # torch's schedulers replace step, too
        assert "step" not in vars(trainer.optimizers[0])


@pytest.mark.parametrize("how", ["assigned", "set up"])
def test_replaced_optimizer_is_clipped_and_saved(tmp_path: Path, how: str) -> None:
    norms: list[float] = []

    class Measures(Recorded):
        def record(self, optimizer: Optimizer, *_: Any) -> None:
            super().record(optimizer)
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    def callbacks() -> list[Any]:
        return [
            Replaces("on_train_epoch_start", how),
            LearningRateScheduler(Linear()),
            GradientClipping(NormClip(1e-3)),
        ]

    module, resumed = Measures(), Measures()
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module, *callbacks(), saves, enable_checkpointing=True)
    assert norms == pytest.approx([1e-3] * STEPS, rel=1e-3)
    if how == "set up":
        trainer = trainer_of(*callbacks())
        trainer.fit(resumed, data(), ckpt_path=tmp_path / "step=6.ckpt")
        assert resumed.rates == module.rates[6:]


def test_replaced_optimizer_without_a_learning_rate_is_refused() -> None:
    class Replaces(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                optimizer = SGD(module.parameters(), lr=0.4)
                optimizer.param_groups[0]["lr"] = None
                trainer.strategy.optimizers = [optimizer]

    with pytest.raises(ValueError, match=r"^lr must be a number .* got None; pass"):
        fit(Recorded(), LearningRateScheduler(Linear()), Replaces())


def replace_group(optimizer: Optimizer) -> None:
    group = dict(optimizer.param_groups[1])
    group.pop("initial_lr", None)
    optimizer.param_groups[1] = {**group, "lr": 0.4}


CHANGES = {
    # the learning rates of the groups at the last four updates, as multiples of the factor
    "group deleted": (lambda o: o.param_groups.pop(0), [0.2]),
    "groups reversed": (lambda o: o.param_groups.reverse(), [0.2, 0.1]),
    "group replaced": (replace_group, [0.1, 0.4]),
    "group added": (
        lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.4}),
        [0.1, 0.2, 0.4],
    ),
    "group inserted": (
        lambda o: o.param_groups.insert(
            0, {**o.defaults, "params": [nn.Parameter(torch.ones(1))], "lr": 0.4}
        ),
        [0.4, 0.1, 0.2],
    ),
    "state loaded": (lambda o: o.load_state_dict(o.state_dict()), [0.1, 0.2]),
}


@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_groups_keep_or_bring_their_own_base(change: str, first: bool) -> None:
    class TwoBases(Recorded):
        def configure_optimizers(self) -> Any:
            parameters = [*self.layer.parameters()]
            return self.recorded(
                SGD(
                    [
                        {"params": parameters[:1], "lr": 0.1},
                        {"params": parameters[1:], "lr": 0.2},
                    ]
                )
            )

    act, bases = CHANGES[change]

    class Changes(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                act(trainer.optimizers[0])

    module, scheduler = TwoBases(), LearningRateScheduler(Linear())
    fit(module, *([Changes(), scheduler] if first else [scheduler, Changes()]))
    assert module.all_rates == [
        *([pytest.approx([0.1 * f, 0.2 * f]) for f in FACTORS[:4]]),
        *([pytest.approx([base * f for base in bases]) for f in FACTORS[4:]]),
    ]


# --------------------------------------------------------------------- found by a second look


@pytest.mark.parametrize("shared", ["added group", "assigned"])
def test_groups_that_begin_to_share_a_tensor_have_values_of_their_own(shared: str) -> None:
    class Shares(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            (optimizer,) = trainer.optimizers
            if trainer.current_epoch != 1:
                return
            if shared == "added group":  # torch puts the default, the same tensor, into the group
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
            else:
                rate = torch.tensor(0.5)
                for group in optimizer.param_groups:
                    group["lr"] = rate

    module = Recorded(torch.tensor(0.5))
    constant = {"bias": Constant()} if shared == "assigned" else None
    fit(module, LearningRateScheduler(Linear(), groups=constant), Shares())
    weights = [rates[0] for rates in module.all_rates]
    assert weights == scaled(0.5)
    others = [rates[-1] for rates in module.all_rates[4:]]
    assert others == (scaled(0.5, slice(4, None)) if constant is None else [0.5] * 4)


def test_earlier_state_of_the_optimizer_is_no_new_base() -> None:
    class Back(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.state = copy.deepcopy(trainer.optimizers[0].state_dict())
            if trainer.global_step in (5, 6):
                trainer.optimizers[0].load_state_dict(self.state)

    for first in (True, False):
        module, back = Recorded(), Back()
        ours = [
            LearningRateScheduler(Linear()),
            HyperparameterScheduler("weight_decay", Linear()),
        ]
        trainer = fit(module, *([back, *ours] if first else [*ours, back]))
        assert module.rates == scaled(0.1)
        # The value for an update after the end of the budget.
        assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.0


def test_value_that_is_written_beside_backbone_finetuning_is_the_base() -> None:
    module = Recorded()
    module.backbone = nn.Linear(1, 1)
    finetuning = BackboneFinetuning(10, verbose=False)
    writes = WritesOnce("on_train_epoch_start", at=4)
    fit(module, LearningRateScheduler(Linear()), finetuning, writes)
    assert module.rates[4:] == scaled(0.4, slice(4, None))


@pytest.mark.parametrize("change", ["deleted", "reversed"])
def test_groups_that_move_between_two_fits_keep_their_bases(change: str) -> None:
    module = Recorded()
    optimizer = module.configure_optimizers()
    optimizer.param_groups[1]["lr"] = 0.3
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit(module, LearningRateScheduler(Linear()))
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    if change == "deleted":
        del optimizer.param_groups[0]
    else:
        optimizer.param_groups.reverse()
    module.rates.clear()
    fit(module, LearningRateScheduler(Linear()))
    assert module.rates == scaled(0.3)


def test_negative_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lr must be finite and not negative .*got -1"):
        fit(
            Recorded(),
            LearningRateScheduler(Linear()),
            WritesOnce("on_train_epoch_start", at=4, value=-1.0),
        )
