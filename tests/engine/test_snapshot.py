"""A snapshot restores everything that training changes, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GlobalBatchLoader,
    GradientClipping,
    GradientNoiseScale,
    HyperparameterScheduler,
    LearningRateScheduler,
    Linear,
    LossSpike,
    NonFinite,
    NormSpike,
    OptimizationMonitor,
    ReduceOnPlateau,
    StepGuard,
    ZClip,
)
from lightning_bigopt.engine.stage import Fit
from lightning_bigopt.gradients import Backoff
from tests.engine.snapshots import Acts, Rich, equal, parts
from tests.helpers import QUIET, Regression, ResumableLoader, cpu_precision, loader

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


def capabilities() -> list[Any]:
    return [
        LearningRateScheduler(Linear(start=1.0, end=0.0)),
        HyperparameterScheduler("weight_decay", Linear(start=1.0, end=0.5)),
        BatchSizeScheduler(BatchSizeSteps({"0%": 2, "10%": 4, "40%": 6}), lr_scaling="sqrt"),
        GradientClipping(ZClip(warmup=2)),
        StepGuard([NonFinite(), NormSpike(), LossSpike()], actions=[Backoff(factor=0.5)]),
        GradientNoiseScale(minimum_updates=2),
        ReduceOnPlateau("train", patience=0, check="validation"),
        OptimizationMonitor(),
    ]


class Logged(Rich):
    """Logs a metric that never improves, and goes wrong once, so that every state changes."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        bad = self.trainer.global_step in (4, 9)
        return super().training_step(batch, batch_idx) * (float("nan") if bad else 1.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("train", float(self.trainer.global_step))


def run(
    *acts: Any,
    module: L.LightningModule | None = None,
    data: Any = None,
    own: list[Any] | None = None,
    **options: Any,
) -> L.LightningModule:
    module = Logged() if module is None else module
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        **{**QUIET, "max_epochs": 3, "val_check_interval": 3, "num_sanity_val_steps": 0, **options},
        callbacks=[*(capabilities() if own is None else own), *acts],
    )
    if data is None:
        exact = GlobalBatchLoader(Regression(24), micro_batch_size=2)
        data = exact if own is None else loader(24, 2)
    trainer.fit(module, data, loader(2, 2))
    return module


PARTS = [
    "weights",
    "buffers",
    "optimizer states",
    "groups",
    "gradient scaler",
    "torch's random state",
    "Python's random state",
    "NumPy's random state",
    "clock",
    "counters",
    "loaders",
    *(f"state of {type(one).__name__}" for one in capabilities()),
]
WITHOUT_CHANGE = {
    f"state of {name}"
    for name in ("LearningRateScheduler", "HyperparameterScheduler", "OptimizationMonitor")
}
REWOUND = ("clock", "counters", "loaders")


class Restores:
    """Takes a snapshot at one update, restores it at another, and compares every part."""

    def __init__(self, *, rewind: bool) -> None:
        self.rewind = rewind
        self.taken: dict[str, Any] = {}
        self.later: dict[str, Any] = {}
        self.restored: dict[str, Any] = {}

    def take(self, fit: Fit) -> None:
        self.snapshot = fit.take_snapshot()
        self.taken = parts(fit)

    def restore(self, fit: Fit) -> None:
        with torch.no_grad():
            for buffer in fit.module.buffers():
                buffer.add_(1)
        torch.rand(3)
        self.later = parts(fit)
        self.snapshot.restore(rewind=self.rewind)
        self.restored = parts(fit)
        fit.trainer.should_stop = True


@pytest.fixture(scope="module", params=[False, True], ids=["stay", "rewind"])
def restores(request: pytest.FixtureRequest) -> Restores:
    found = Restores(rewind=request.param)
    run(Acts({3: found.take, 7: found.restore}), **cpu_precision("16-mixed"))
    return found


@pytest.mark.parametrize("part", PARTS)
def test_every_part_goes_back(restores: Restores, part: str) -> None:
    assert restores.taken.keys() == set(PARTS)
    if part not in WITHOUT_CHANGE:
        assert not equal(restores.taken[part], restores.later[part])
    if part in REWOUND and not restores.rewind:
        assert equal(restores.later[part], restores.restored[part])
    else:
        assert equal(restores.taken[part], restores.restored[part])


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": False},
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True},
        {"optimizer": torch.optim.SGD, "momentum": 0.9},
        {"optimizer": torch.optim.Adafactor},
        {"optimizer": torch.optim.LBFGS, "history_size": 3, "max_iter": 3},
    ],
    ids=str,
)
def test_every_optimizer_goes_back(options: dict[str, Any]) -> None:
    found = Restores(rewind=False)
    run(
        Acts({3: found.take, 7: found.restore}),
        module=Rich(**options),
        own=[LearningRateScheduler(Constant())],
    )
    assert not equal(found.taken["optimizer states"], found.later["optimizer states"])
    for part in ("weights", "optimizer states", "groups"):
        assert equal(found.taken[part], found.restored[part])


def test_one_snapshot_is_restored_several_times() -> None:
    """Each time the run that follows is the same, so the snapshot has not changed."""
    runs: list[dict[str, Any]] = []

    def again(fit: Fit) -> None:
        runs.append(parts(fit))
        if len(runs) < 4:
            acts.at[6] = again
            found.snapshot.restore(rewind=True)

    found = Restores(rewind=True)
    acts = Acts({3: found.take, 6: again})
    run(acts)
    assert len(runs) == 4
    for other in runs[1:]:
        for part in PARTS:
            assert equal(runs[0][part], other[part]), part


# ------------------------------------------------------------------------- unusual tensors


class Keeps:
    """Takes a snapshot and restores it, with a look at both moments."""

    def __init__(self, look: Callable[[Fit], Any]) -> None:
        self.look = look

    def take(self, fit: Fit) -> None:
        self.snapshot = fit.take_snapshot()
        self.taken = copy.deepcopy(self.look(fit))

    def restore(self, fit: Fit) -> None:
        self.later = copy.deepcopy(self.look(fit))
        self.snapshot.restore(rewind=False)
        self.restored = copy.deepcopy(self.look(fit))


def test_a_lazy_layer_that_had_no_values_is_left_alone() -> None:
    class Lazy(Rich):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(4))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step >= 4:
                batch = [self.late(batch[0]), *batch[1:]]
            return super().training_step(batch, batch_idx)

    found = Keeps(lambda fit: [p.detach() for p in fit.module.net.parameters()])
    module = Lazy()
    run(Acts({3: found.take, 7: found.restore}), module=module, own=[])
    assert not equal(found.taken, found.later)
    assert equal(found.taken, found.restored)
    assert module.late[0].num_batches_tracked > 4  # went on counting
    assert module.late[1].weight.shape == (4, 4)


def test_a_learning_rate_tensor_stays_the_same_object() -> None:
    """A compiled optimizer keeps a reference to the tensor."""
    rate = torch.tensor(0.05)
    found = Keeps(lambda fit: fit.trainer.optimizers[0].param_groups[0]["lr"].clone())

    def restore(fit: Fit) -> None:
        rate.fill_(7.0)
        found.restore(fit)
        assert fit.trainer.optimizers[0].param_groups[0]["lr"] is rate

    module = Rich(lr=rate, foreach=False)
    run(Acts({3: found.take, 7: restore}), module=module, own=[])
    assert found.later == 7.0
    assert equal(found.taken, found.restored)


def test_tensors_inside_a_tuple_go_back() -> None:
    """The betas may be tensors too, which a schedule fills in place."""
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    found = Keeps(lambda fit: list(fit.trainer.optimizers[0].param_groups[0]["betas"]))
    run(
        Acts({3: found.take, 7: found.restore}),
        module=Rich(betas=betas, foreach=False, lr=torch.tensor(0.05)),
        own=[HyperparameterScheduler("betas[0]", Linear(start=1.0, end=0.5))],
    )
    assert not equal(found.taken, found.later)
    assert equal(found.taken, found.restored)


class Mentions(torch.optim.Optimizer):
    """Keeps a sparse tensor, a list and a number for some parameters, and none for the others."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"][::2]:
            parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
            state = self.state[parameter]
            rare = torch.where(parameter.grad.abs() > 0.1, parameter.grad, 0.0)
            state["rare"] = rare.to_sparse()
            state.setdefault("history", []).append(parameter.grad.sum())
            state["count"] = state.get("count", 0) + 1
        return loss


@pytest.mark.parametrize("at", [1, 3])
def test_states_that_are_sparse_go_back(at: int) -> None:
    def look(fit: Fit) -> Any:
        (optimizer,) = fit.trainer.optimizers
        return [dict(optimizer.state.get(p, {})) for p in optimizer.param_groups[0]["params"]]

    found = Keeps(look)
    module = Rich(optimizer=Mentions)
    run(Acts({at: found.take, 7: found.restore}), module=module, own=[])
    assert found.later[0]["rare"].is_sparse
    assert not found.later[1]
    assert not equal(found.taken, found.later)
    assert equal(found.taken, found.restored)


def test_sparse_gradients_of_an_embedding() -> None:
    class Words(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 2, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.words(batch[2]).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SparseAdam(list(self.parameters()), lr=0.1)

    def look(fit: Fit) -> Any:
        (state,) = fit.trainer.optimizers[0].state.values()
        return [fit.module.words.weight.detach(), dict(state)]

    found = Keeps(look)
    run(Acts({3: found.take, 7: found.restore}), module=Words(), own=[])
    assert not equal(found.taken, found.later)
    assert equal(found.taken, found.restored)


def test_fields_and_groups_that_came_later() -> None:
    """A new field is removed; a new group is kept, without state."""
    late = nn.Parameter(torch.ones(2))

    class Grows(Rich):
        def __init__(self) -> None:
            super().__init__()
            self.late = late

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=0.05)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.late.square().sum()

    def grow(fit: Fit) -> None:
        (optimizer,) = fit.trainer.optimizers
        optimizer.add_param_group({"params": [late], "lr": 0.5})
        optimizer.param_groups[0]["note"] = 1

    def check(fit: Fit) -> None:
        (optimizer,) = fit.trainer.optimizers
        assert late in optimizer.state
        found.restore(fit)
        assert len(optimizer.param_groups) == 2
        assert late not in optimizer.state
        assert equal(late.detach(), torch.ones(2))

    found = Keeps(
        lambda fit: [k for k in fit.trainer.optimizers[0].param_groups[0] if k != "params"]
    )
    module = Grows()
    run(Acts({3: found.take, 4: grow, 7: check}), module=module, own=[])
    assert "note" in found.later
    assert found.taken == found.restored


# ------------------------------------------------------------------------------- going back


class Replays:
    """Takes a snapshot at one moment and goes back to it once, from a later one."""

    def __init__(self) -> None:
        self.marks: dict[str, int] = {}
        self.state: list[dict[str, Any]] = []

    def take(self, fit: Fit) -> None:
        self.snapshot = fit.take_snapshot()
        self.marks["taken"] = len(fit.module.windows)

    def rewind(self, fit: Fit) -> None:
        self.state.append(parts(fit))
        self.marks["rewound"] = len(fit.module.windows)
        self.snapshot.restore(rewind=True)


def compare(replays: Replays, module: Rich, straight: Rich) -> None:
    """The batches after the snapshot are repeated, and the run equals one without a rewind."""
    start, stop = replays.marks["taken"], replays.marks["rewound"]
    assert start < stop
    again = slice(stop, stop + stop - start)
    assert module.windows[again] == module.windows[start:stop]
    assert module.factors[again] == module.factors[start:stop]
    assert module.windows[:start] + module.windows[stop:] == straight.windows
    assert module.factors[:start] + module.factors[stop:] == straight.factors
    for one, other in zip(module.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(module.buffers(), straight.buffers(), strict=True):
        assert torch.equal(one, other)


LIMITS: list[dict[str, Any]] = [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 14}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(("take", "rewind"), [(3, 5), (2, 4), (1, 5)])
def test_a_rewind_in_mid_epoch_with_an_exact_loader(
    take: int, rewind: int, limits: dict[str, Any]
) -> None:
    straight, module, replays = Logged(), Logged(), Replays()
    run(Acts(), module=straight, **limits)
    run(Acts({take: replays.take, rewind: replays.rewind}), module=module, **limits)
    compare(replays, module, straight)
    lrs = module.lrs[:take] + module.lrs[rewind:]
    assert lrs == straight.lrs
    assert module.trainer.global_step == straight.trainer.global_step
    assert len(straight.lrs) == straight.trainer.global_step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("take", "rewind"), [(1, 3), (5, 7)])
def test_a_rewind_in_mid_epoch_with_another_loader_that_has_a_state(
    take: int, rewind: int, accumulate: int
) -> None:
    def fit(*acts: Any) -> Rich:
        module = Rich()
        run(
            *acts,
            module=module,
            data=ResumableLoader(8 * accumulate, 2),
            own=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
            accumulate_grad_batches=accumulate,
        )
        return module

    replays = Replays()
    straight = fit(Acts())
    module = fit(Acts({take: replays.take, rewind: replays.rewind}))
    compare(replays, module, straight)
    assert module.lrs[:take] + module.lrs[rewind:] == straight.lrs


def test_a_rewind_in_mid_epoch_with_a_loader_without_a_state_goes_on_with_the_next_data() -> None:
    module, replays = Rich(), Replays()
    run(
        Acts({3: replays.take, 5: replays.rewind}),
        module=module,
        data=loader(16, 2),
        own=[LearningRateScheduler(Linear(start=1.0, end=0.0))],
        max_epochs=1,
    )
    assert module.windows == [[2 * i, 2 * i + 1] for i in range(8)]
    assert module.lrs == [0.05 * (1 - i / 8) for i in (0, 1, 2, 3, 4, 3, 4, 5)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_rewind_at_the_end_of_an_epoch(exact: bool, shuffled: bool) -> None:
    def fit(*acts: Any) -> Logged:
        data: Any = loader(24, 2, shuffle=shuffled)
        if exact:
            order = "permute" if shuffled else "sequential"
            data = GlobalBatchLoader(Regression(24), micro_batch_size=2, shuffle=order)
        module = Logged()
        run(*acts, module=module, data=data, max_epochs=4)
        return module

    replays = Replays()
    straight = fit(Acts())
    module = fit(Acts(epochs=[replays.take, lambda fit: None, replays.rewind]))
    compare(replays, module, straight)
    assert module.trainer.current_epoch == straight.trainer.current_epoch == 4
    assert module.trainer.global_step == straight.trainer.global_step


# --------------------------------------------------------- values and optimizers that changed


def test_base_values_that_other_code_has_changed_go_back() -> None:
    def write(fit: Fit) -> None:
        for group in fit.trainer.optimizers[0].param_groups:
            group["lr"] = 0.4

    found, module = Keeps(lambda fit: fit.groups.bases("lr")), Rich()
    acts = Acts({3: found.take, 5: write, 7: found.restore})
    run(acts, module=module, own=[LearningRateScheduler(Linear())], max_epochs=1)
    factors = [1 - step / 12 for step in range(12)]
    bases = [0.05] * 5 + [0.4] * 2 + [0.05] * 5
    assert module.lrs == pytest.approx([b * f for b, f in zip(bases, factors, strict=True)])
    assert found.later == [[0.4]]
    assert found.taken == found.restored == [[0.05]]
    assert module.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.05


def test_a_replaced_parameter_goes_back_in_module_and_optimizer() -> None:
    class Swaps(Rich):
        def swap(self) -> None:
            (group,) = self.trainer.optimizers[0].param_groups
            old = group["params"][0]
            new = nn.Parameter(old.detach() + 1)
            (name,) = (name for name, one in self.net.named_parameters() if one is old)
            path, _, attribute = name.rpartition(".")
            setattr(self.net.get_submodule(path), attribute, new)
            group["params"][0] = new

    def look(fit: Fit) -> Any:
        optimizer = fit.trainer.optimizers[0]
        return [
            [p.detach() for p in fit.module.parameters()],
            [dict(optimizer.state[p]) for p in optimizer.param_groups[0]["params"]],
        ]

    found, module = Keeps(look), Swaps()
    acts = Acts({3: found.take, 5: lambda fit: fit.module.swap(), 7: found.restore})
    run(acts, module=module, own=[])
    assert not equal(found.taken, found.later)
    assert equal(found.taken, found.restored)


def test_a_parameter_that_was_moved_to_another_group_goes_back() -> None:
    """The run then equals one without the move, to the bit."""

    def move(fit: Fit) -> None:
        (optimizer,) = fit.trainer.optimizers
        moved = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [moved], "lr": 0.5})

    def trained(change: Callable[[Fit], None]) -> list[Tensor]:
        found, module = Keeps(lambda fit: None), Rich()
        scheduler = LearningRateScheduler(Linear())
        run(Acts({3: found.take, 5: change, 7: found.restore}), module=module, own=[scheduler])
        (group,) = module.trainer.optimizers[0].param_groups
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
        return [p.detach() for p in module.parameters()]

    assert equal(trained(move), trained(lambda fit: None))


def test_other_optimizers_are_refused_before_any_change() -> None:
    def replace(fit: Fit) -> None:
        fit.trainer.strategy.optimizers = [torch.optim.SGD(fit.module.parameters(), lr=0.1)]

    def restore(fit: Fit) -> None:
        before = [p.detach().clone() for p in fit.module.parameters()]
        with pytest.raises(ValueError, match="restored into the optimizers it was taken of"):
            found.snapshot.restore()
        assert equal(before, [p.detach() for p in fit.module.parameters()])
        seen.append(fit.clock.batches)

    found, seen = Restores(rewind=True), []
    run(Acts({3: found.take, 5: replace, 7: restore}), module=Rich(), own=[])
    assert len(seen) == 1
