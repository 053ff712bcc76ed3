"""Every callback and mixin under ``lightning`` and under ``pytorch_lightning``."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_bigopt import (
    BatchSizeScheduler,
    Cosine,
    GradientClipping,
    GradientClippingMixin,
    LearningRateScheduler,
    NormClip,
    OptimizationMonitor,
    StepGuard,
    learning_rate_range_test,
    plan,
    replay,
)
from lightning_bigopt.engine.engine import Engine
from lightning_bigopt.trainer_access.packages import classes, own
from tests.compatibility.lightning_packages import NAMES, module_class, package, train, trainer
from tests.compatibility.runs_of_both_packages import (
    CALLBACKS,
    CASES,
    MIXINS,
    POLICY,
    public,
    readme,
    run,
    table,
)
from tests.helpers import Regression
from tests.structure.import_graph import modules

# Lightning's advice.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|sync_dist=True|`dataloader_iter` step flavor)"
)
both = pytest.mark.parametrize("name", NAMES)


# --------------------------------------------------------------------------- the same results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_packages_train_to_the_same_bits(case: str) -> None:
    first, second = (run(case, name) for name in NAMES)
    assert len(first["rates"]) == 12
    for part in first:
        assert first[part] == second[part], part


def test_every_public_callback_and_mixin_is_run() -> None:
    assert (set(CALLBACKS), set(MIXINS)) == public()


@pytest.mark.slow
def test_the_runs_do_what_their_callbacks_are_for() -> None:
    name = "pytorch_lightning"
    bare = {"loss", "epoch", "val_loss", "falling", "lr-AdamW"}
    assert bare <= set(run("GradientClipping", name)["logged"])
    for case in ("StepGuard", "StepGuardMixin"):
        skipped = [value for _, value in run(case, name)["logged"]["guard/skipped"]]
        assert max(skipped) == 2  # once an epoch
    for case in ("GradientNoiseScale", "GradientNoiseScaleMixin"):
        state = run(case, name)["checkpoints"]["step=12.ckpt"]["callbacks"]["GradientNoiseScale"]
        assert state["estimator"]["updates"] == 12
    for case in ("ReduceOnPlateau", "ReduceOnPlateauMixin"):
        assert run(case, name)["rates"][-1][0] < 0.05
    for case in ("BatchSizeScheduler", "BatchSizePolicyMixin"):
        states = run(case, name)["checkpoints"]["step=12.ckpt"]["callbacks"]
        # Six updates of 4 samples, then three epochs of 12 samples as updates of 8 and 4.
        assert states[Engine.state_key]["clock"]["samples"] == 6 * 4 + 3 * (8 + 4)
    assert run("GlobalBatchFinder", name)["rates"][0] == [0.05]
    assert run("LearningRateRangeTest", name)["rates"][0] != [0.05]
    assert run("the list of the README", name)["logged"]["custom_scalars__config__"] >= 1


@both
def test_a_resumed_run_ends_like_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    root = package(name)
    straight = train(root, tmp_path / "straight", readme)
    checkpoint = tmp_path / "straight" / "checkpoints" / "step=4.ckpt"
    resumed = train(root, tmp_path / "resumed", readme, ckpt_path=str(checkpoint))
    assert resumed["weights"] == straight["weights"]
    assert resumed["rates"] == straight["rates"][4:]


def test_a_run_can_be_resumed_under_the_other_package(tmp_path: Path) -> None:
    first, second = map(package, NAMES)
    straight = train(first, tmp_path / "first", readme)
    checkpoint = tmp_path / "first" / "checkpoints" / "step=4.ckpt"
    resumed = train(second, tmp_path / "second", readme, ckpt_path=str(checkpoint))
    assert resumed["weights"] == straight["weights"]


# ------------------------------------------------------------------------------- functions


def planned(root: Any, **options: Any) -> str:
    ours = [*readme(), root.callbacks.ModelCheckpoint(every_n_train_steps=5)]
    fitting = trainer(root, ours, enable_checkpointing=True, **options)
    loader = DataLoader(Regression(24), batch_size=2)
    return str(plan(fitting, module_class(root)(), loader))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "ddp", "devices": 2, "max_epochs": 3, "max_steps": -1},
        {"max_time": "00:01:00:00"},
    ],
)
def test_plan(options: dict[str, Any]) -> None:
    first, second = (planned(package(name), **options) for name in NAMES)
    assert first == second
    assert "every 5 updates" in first


def test_plan_of_a_gradient_accumulation_scheduler() -> None:
    def text(root: Any) -> str:
        schedules = root.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
        fitting = trainer(
            root, [LearningRateScheduler(Cosine()), schedules], max_steps=-1, max_epochs=2
        )
        return str(plan(fitting, module_class(root)(), DataLoader(Regression(24), batch_size=2)))

    first, second = (text(package(name)) for name in NAMES)
    assert first == second
    assert "18" in first  # 12 updates in the first epoch, 6 in the second


def test_learning_rate_range_test() -> None:
    def losses(root: Any) -> Any:
        found = learning_rate_range_test(
            trainer(root, [GradientClipping(NormClip(max_norm=1.0))]),
            module_class(root)(),
            DataLoader(Regression(24), batch_size=12),
            start=1e-4,
            steps=20,
            skip=3,
        )
        return found.losses, found.suggestion

    (curve, rate), second = (losses(package(name)) for name in NAMES)
    assert (curve, rate) == second
    assert len(curve) == 20
    assert rate is not None


def test_replay(tmp_path: Path) -> None:
    def replayed(name: str) -> Any:
        root, folder = package(name), tmp_path / name
        module = module_class(root, poisoned=3)()
        fitting = trainer(root, [StepGuard(forensics=folder)], max_steps=4)
        fitting.fit(module)
        (path,) = folder.rglob("*.pt")
        return replay(path, module).nonfinite

    first, second = map(replayed, NAMES)
    assert first == second
    assert len(first) == 4


def test_replay_names_the_class_once(tmp_path: Path) -> None:
    package("pytorch_lightning")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"module must be a LightningModule, got 'module'"):
        replay(tmp_path / "file", "module")  # type: ignore[arg-type]


@both
def test_a_subclass_of_the_trainer(name: str) -> None:
    root = package(name)

    class Own(root.Trainer):  # type: ignore[misc, name-defined]
        pass

    own_trainer = Own(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=readme(),
    )
    assert own(own_trainer, "Trainer") is root.Trainer
    own_trainer.fit(module_class(root)())
    assert own_trainer.global_step == 2


# ------------------------------------------------------------------------------- conflicts


@dataclass(frozen=True)
class Conflict:
    """Something that a fit refuses, with the beginning of its message."""

    match: str
    callbacks: Callable[[Any], list[Any]]
    members: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[Any], Mapping[str, Any]] = lambda root: {}
    mixins: tuple[type, ...] = ()


REFUSALS = (ValueError, TypeError, AttributeError, RuntimeError)


def _clipping(root: Any) -> list[Any]:
    return [GradientClipping(NormClip(max_norm=1.0))]


def _schedule(root: Any) -> list[Any]:
    return [LearningRateScheduler(Cosine())]


def _with_one_cycle(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)]


CONFLICTS = {
    "gradient_clip_val": Conflict(
        "gradient_clip_val must be None", _clipping, options=lambda _: {"gradient_clip_val": 1.0}
    ),
    "configure_gradient_clipping": Conflict(
        "configure_gradient_clipping must not be overridden",
        _clipping,
        {"configure_gradient_clipping": lambda self, *arguments: None},
    ),
    "GradientAccumulationScheduler": Conflict(
        "callbacks must not contain GradientAccumulationScheduler with BatchSizeScheduler",
        lambda root: [
            BatchSizeScheduler(POLICY),
            root.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
        ],
    ),
    "StochasticWeightAveraging and BatchSizeScheduler": Conflict(
        "callbacks must not contain StochasticWeightAveraging with BatchSizeScheduler",
        lambda root: [
            BatchSizeScheduler(POLICY),
            root.callbacks.StochasticWeightAveraging(swa_lrs=0.1),
        ],
    ),
    "StochasticWeightAveraging and LearningRateScheduler": Conflict(
        "callbacks must not contain StochasticWeightAveraging with LearningRateScheduler",
        lambda root: [
            LearningRateScheduler(Cosine()),
            root.callbacks.StochasticWeightAveraging(swa_lrs=0.1),
        ],
    ),
    "accumulate_grad_batches": Conflict(
        "accumulate_grad_batches must be 1",
        lambda _: [BatchSizeScheduler(POLICY)],
        options=lambda _: {"accumulate_grad_batches": 2},
    ),
    "dataloader_iter": Conflict(
        "training_step must take a batch with BatchSizeScheduler",
        lambda _: [BatchSizeScheduler(POLICY)],
        {"training_step": lambda self, dataloader_iter: None},
    ),
    "manual optimization": Conflict(
        "automatic_optimization must be True",
        lambda _: [BatchSizeScheduler(POLICY)],
        {"automatic_optimization": False},
    ),
    "two schedulers": Conflict(
        "Found more than one stateful callback of type `LearningRateScheduler`",
        lambda _: [LearningRateScheduler(Cosine()), LearningRateScheduler(Cosine())],
    ),
    "a mixin and its callback": Conflict(
        "callbacks must not contain GradientClipping if a mixin",
        _clipping,
        {"configure_clipping_rule": lambda self: NormClip(max_norm=1.0)},
        mixins=(GradientClippingMixin,),
    ),
    "OneCycleLR": Conflict(
        "configure_optimizers must not return a OneCycleLR",
        lambda _: [LearningRateScheduler(Cosine(), module_scheduler="replace")],
        {"configure_optimizers": _with_one_cycle},
    ),
    "a schedule as a callback": Conflict(
        "callbacks must contain Callback objects", lambda _: [Cosine()]
    ),
    "static_graph": Conflict(
        "the first update of a fit must have one micro-batch with DDPStrategy",
        _schedule,
        options=lambda root: {
            "strategy": root.strategies.DDPStrategy(
                static_graph=True, process_group_backend="gloo"
            ),
            "devices": 1,
            "accumulate_grad_batches": 2,
        },
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_conflicts_are_refused_alike(case: str) -> None:
    conflict, messages = CONFLICTS[case], []
    for name in NAMES:
        root = package(name)
        module = module_class(root, *conflict.mixins, **conflict.members)()
        with mock.patch.dict(os.environ):  # Lightning sets rank and port for child processes
            try:
                with pytest.raises(REFUSALS, match=f"^{conflict.match}") as caught:
                    trainer(root, conflict.callbacks(root), **conflict.options(root)).fit(module)
            finally:
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def test_the_warning_about_a_row_of_hyperparameters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(name: str) -> list[str]:
        root = package(name)

        class WithHyperparameters(module_class(root)):  # type: ignore[misc]
            def __init__(self, width: int = 3) -> None:
                super().__init__()
                self.save_hyperparameters()

        caplog.clear()
        with caplog.at_level("INFO"):
            logger = root.loggers.TensorBoardLogger(tmp_path / name)
            trainer(root, [OptimizationMonitor()], logger=logger, log_every_n_steps=1).fit(
                WithHyperparameters()
            )
        return [text for text in caplog.messages if "default_hp_metric=False" in text]

    first, second = map(told, NAMES)
    assert first == second
    assert len(first) == 1


# ---------------------------------------------------------------------- what Lightning refuses


def test_pytorch_lightning_takes_callbacks_in_a_list_only() -> None:
    with pytest.raises(TypeError, match="object is not iterable"):
        package("pytorch_lightning").Trainer(callbacks=LearningRateScheduler(Cosine()))
    L.Trainer(callbacks=LearningRateScheduler(Cosine()), accelerator="cpu", logger=False)


# --------------------------------------------------------------------------------- the classes


def paths() -> dict[str, str]:
    """Returns the paths that the package passes to ``classes`` and ``own``, with a place."""
    found = {}
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"classes", "own"}:
                for argument in node.args:
                    if isinstance(argument, ast.Constant):
                        found[argument.value] = f"{module}:{node.lineno}"
    return found


@pytest.mark.parametrize("path", paths())
def test_every_path_names_a_class_or_function_in_both_packages(path: str) -> None:
    first, second = (own(trainer(package(name)), path) for name in NAMES)
    assert first is not None
    assert second is not None
    assert first is not second
    assert (first.__name__, second.__name__) == (path.rpartition(".")[2],) * 2
    if isinstance(first, type):
        assert classes(path) == (first, second)


def test_the_other_package_is_not_looked_at_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert classes("callbacks.Timer") == (L.pytorch.callbacks.Timer,)
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.slow
def test_the_table_of_the_page_is_the_one_that_the_runs_print() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith("`import pytorch_lightning`")]
    assert table() in text
