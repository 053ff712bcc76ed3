"""ModelAveraging on one process: evaluations, checkpoints, resumes, and the module at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from lightning_bigopt import (
    EMA,
    BatchSizeScheduler,
    BatchSizeSteps,
    Constant,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    Merge,
    ModelAveraging,
    ModelAveragingMixin,
    NonFinite,
    NormClip,
    StepGuard,
    TailMean,
)
from lightning_bigopt.callbacks.averaging import conflicts
from tests.engine.fake_averaging import STAGES, Looked, copies, evaluate
from tests.helpers import QUIET, ResumableLoader, cpu_precision, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:You're resuming"),
]

Weights = dict[str, Tensor]
ALL = {
    "ema": EMA(2),
    "tail": TailMean("50%"),
    "merge": Merge(over=4, emulate="1-sqrt", checkpoints=2),
}


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def near(one: Weights, other: Weights) -> bool:
    return all(
        torch.allclose(one[name], other[name], rtol=2e-6, atol=1e-6)
        for name in one.keys() | other.keys()
    )


def mean(weights: Sequence[Weights], factors: Sequence[float] | None = None) -> Weights:
    """Returns the weighted mean, computed in float64."""
    factors = factors or [1.0] * len(weights)
    return {
        name: sum(f * w[name].double() for f, w in zip(factors, weights, strict=True))  # type: ignore[misc]
        .div(math.fsum(factors))
        .float()
        for name in weights[0]
    }


def ema(weights: Sequence[Weights], half_life: float) -> Weights:
    return mean(weights, [2 ** ((i + 1 - len(weights)) / half_life) for i in range(len(weights))])


def trainer_with(*callbacks: Any, **options: Any) -> Any:
    return L.Trainer(**{**QUIET, "max_steps": 6, **options}, callbacks=list(callbacks))


# ------------------------------------------------------------------------------- every update


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_the_weights_after_every_update_are_averaged(fused: bool, accumulate: int) -> None:
    module, averaging = Looked(fused=fused), ModelAveraging(ALL, use="ema")
    trainer = trainer_with(averaging, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(24, 2))
    made = module.trained[accumulate - 1 :: accumulate]
    assert len(made) == trainer.global_step == 6
    assert near(averaging.average("ema"), ema(made, 2))
    assert near(averaging.average("tail"), mean(made[3:]))
    cosine = [1 - 0.5**0.5, 0.5**0.5]
    assert near(averaging.average("merge"), mean([made[3], made[5]], cosine[::-1]))


@pytest.mark.parametrize(
    ("precision", "fused", "skips"),
    [
        ("32-true", False, StepGuard([NonFinite()])),
        ("32-true", True, StepGuard([NonFinite()])),
        ("32-true", True, GradientClipping(NormClip())),  # by found_inf, in the kernel
        ("16-mixed", False, None),  # a GradScaler makes no step
        ("16-mixed", True, None),
        ("bf16-mixed", False, StepGuard([NonFinite()])),
    ],
)
def test_a_skipped_update_repeats_the_weights_before_it(
    precision: str, fused: bool, skips: Any
) -> None:
    """The same for every way of skipping, and without NaN in the averages."""
    module, averaging = Looked(bad=(1, 4), fused=fused), ModelAveraging(ALL, use="ema")
    skip = [] if skips is None else [copy.deepcopy(skips)]
    trainer_with(*skip, averaging, **cpu_precision(precision)).fit(module, loader(24, 2))
    for index in (1, 4):
        assert same(module.trained[index], module.trained[index - 1])
    assert near(averaging.average("ema"), ema(module.trained, 2))
    assert near(averaging.average("tail"), mean(module.trained[3:]))


def test_several_optimizers_are_averaged_once_a_batch() -> None:
    class Two(Looked):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first, second = self.net[0].parameters(), self.net[2].parameters()
            return torch.optim.AdamW(first, lr=0.05), torch.optim.SGD(second, lr=0.05)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            if batch_idx == 1:
                return  # no update
            loss = self.loss(*batch[:2])
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()

    module, averaging = Two(), ModelAveraging(TailMean("100%"))
    trainer_with(averaging, max_steps=10).fit(module, loader(12, 2))
    made = [weights for index, weights in enumerate(module.trained) if index != 1]
    assert near(averaging.average(), mean(made))


def test_a_batch_ramp_does_not_change_the_memory_in_samples() -> None:
    module, averaging = Looked(), ModelAveraging(EMA("8 samples"))
    ramp = BatchSizeScheduler(BatchSizeSteps({0: 2, "3 steps": 4}))
    trainer_with(averaging, ramp).fit(module, loader(40, 2))
    ends = [0, 1, 2, 4, 6, 8]
    made, amounts = [module.trained[i] for i in ends], [2, 2, 2, 4, 4, 4]
    shares, factors = [1 - 2 ** (-n / 8) for n in amounts], []
    for i, share in enumerate(shares):
        factors.append(share * math.prod(1 - s for s in shares[i + 1 :]))
    assert near(averaging.average(), mean(made, factors))


def test_every_second_update() -> None:
    module, averaging = Looked(), ModelAveraging(TailMean("100%"), every=2)
    trainer_with(averaging).fit(module, loader(24, 2))
    assert near(averaging.average(), mean(module.trained[1::2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_averages_of_narrow_weights_have_float32(dtype: torch.dtype) -> None:
    precision = {torch.bfloat16: "bf16-true", torch.float64: "64-true"}[dtype]
    module, averaging = Looked(), ModelAveraging(TailMean("100%"))
    trainer_with(averaging, precision=precision).fit(module, loader(24, 2))
    expected = torch.promote_types(dtype, torch.float32)
    found = averaging.average()
    assert {tensor.dtype for tensor in found.values()} == {expected}
    exact = {
        n: torch.stack([w[n].double() for w in module.trained]).mean(0) for n in module.trained[0]
    }
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-6)
    assert all(p.dtype == dtype for p in module.parameters())


# ----------------------------------------------------------------------------------- evaluation


def test_a_delayed_start_never_evaluates_untrained_weights() -> None:
    """PL#21724: Lightning's EMA evaluates the initial weights until it starts."""
    module, averaging = Looked(), ModelAveraging(EMA(1, start=4))
    trainer_with(averaging, val_check_interval=2).fit(module, loader(24, 2), loader(2, 2))
    first = module.evaluated[1:]
    assert same(first[0], module.trained[1])
    assert same(first[1], module.trained[3])
    assert near(first[2], ema(module.trained[4:], 1))


def test_training_is_that_of_a_run_without_averages() -> None:
    """Also in the second epoch, whose order is drawn after the extra validations."""
    runs = []
    for callbacks in ([], [ModelAveraging(ALL, use="merge")]):
        L.seed_everything(1, verbose=False)
        module = Looked()
        trainer_with(*callbacks, val_check_interval=2, max_epochs=2).fit(
            module, loader(8, 2, shuffle=True), loader(2, 2)
        )
        runs.append(module.trained)
    assert len(runs[0]) == 6
    assert all(same(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_after_the_fit_the_module_has_the_average(stage: str) -> None:
    module, averaging = Looked(), ModelAveraging(EMA(2))
    trainer = trainer_with(averaging)
    trainer.fit(module, loader(24, 2))
    assert near(copies(module), ema(module.trained, 2))
    assert same(copies(module), averaging.average())
    evaluate(trainer, stage, module)
    assert same(module.evaluated[0], averaging.average())


@pytest.mark.parametrize("stage", STAGES)
def test_without_a_fit_nothing_changes(stage: str) -> None:
    module = Looked()
    before = copies(module)
    evaluate(trainer_with(ModelAveraging(EMA(2))), stage, module)
    assert same(module.evaluated[0], before)
    assert same(copies(module), before)


class Fails(Looked):
    """Raises in the evaluation after the sanity check."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            raise ZeroDivisionError


def test_an_error_in_a_validation_leaves_the_average_and_another_fit_goes_on() -> None:
    module, averaging = Fails(), ModelAveraging(ALL, use="ema")
    trainer = trainer_with(averaging, val_check_interval=2)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader(24, 2), loader(2, 2))
    assert same(copies(module), averaging.average())
    module.train()
    trainer.fit(module, loader(24, 2))
    assert near(averaging.average(), ema(module.trained, 2))


class Scored(Looked):
    """Logs a loss that depends on the weights, with a metric object."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import MeanMetric

        self.score = MeanMetric()
        self.validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        loss = self.loss(*batch[:2])
        self.score.update(loss)
        self.log("val_score", self.score)
        self.log("val_loss", loss, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.validated += not self.trainer.sanity_checking


def loss_of(weights: Weights) -> float:
    module = Looked()
    module.load_state_dict(weights)
    x, y, _ = next(iter(loader(4, 4)))
    return module.loss(x, y).item()


def test_the_other_averages_are_validated_and_logged() -> None:
    seen: list[dict[str, float]] = []

    class Records(L.Callback):
        calls = 0

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.calls += 1
            seen.append({n: float(v) for n, v in trainer.callback_metrics.items()})

    logger, records = Lines(), Records()
    module, averaging = Scored(), ModelAveraging(ALL, use="merge")
    options = {"logger": logger, "val_check_interval": 2, "num_sanity_val_steps": 0}
    trainer = trainer_with(averaging, records, **options)
    trainer.fit(module, loader(24, 2), loader(4, 2))
    assert records.calls == 3
    assert module.validated == 3 + 3 + 3
    last = seen[-1]
    for name, prefix in (("merge", ""), ("ema", "averages/ema/"), ("tail", "averages/tail/")):
        expected = loss_of(averaging.average(name))
        for metric in ("val_loss", "val_score"):
            assert last[prefix + metric] == pytest.approx(expected, rel=1e-5)
            assert logger.rows[max(logger.rows)][prefix + metric] == pytest.approx(
                expected, rel=1e-5
            )
    # The tail has not begun at the first validation, so that the current weights are validated.
    assert seen[0]["averages/tail/val_loss"] == pytest.approx(loss_of(module.trained[1]), rel=1e-5)
    assert "averages/merge/val_loss" not in last
    assert same(module.trained[-1], averaging.average("training"))


def test_an_average_can_be_monitored(tmp_path: Path) -> None:
    averaging = ModelAveraging({"ema": EMA(1), "tail": TailMean("100%")}, use="tail")
    saves = ModelCheckpoint(tmp_path, monitor="averages/ema/val_loss", save_top_k=-1)
    options = {"val_check_interval": 2, "enable_checkpointing": True}
    trainer_with(averaging, saves, **options).fit(Scored(), loader(24, 2), loader(4, 2))
    assert len(saves.best_k_models) == 3


@pytest.mark.parametrize("evaluate_others", [True, False])
def test_the_training_weights_can_stay_the_model(evaluate_others: bool) -> None:
    module = Scored()
    averaging = ModelAveraging(EMA(2), use="training", evaluate_others=evaluate_others)
    trainer = trainer_with(averaging, val_check_interval=6, num_sanity_val_steps=0)
    trainer.fit(module, loader(24, 2), loader(4, 2))
    assert same(copies(module), module.trained[-1])
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(
        loss_of(module.trained[-1]), rel=1e-5
    )
    assert ("averages/ema/val_loss" in trainer.callback_metrics) is evaluate_others
    if evaluate_others:
        found = float(trainer.callback_metrics["averages/ema/val_loss"])
        assert found == pytest.approx(loss_of(averaging.average("ema")), rel=1e-5)


class Lines(L.pytorch.loggers.logger.DummyLogger):
    """Keeps the values of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.rows.setdefault(step, {}).update(metrics)


# ---------------------------------------------------------------------------------- checkpoints


class SavesIn(L.Callback):
    """Saves at one update, in a hook, and records the average at that time."""

    def __init__(
        self,
        path: Path,
        hook: str,
        averaging: ModelAveraging,
        *,
        average: bool = True,
        **options: Any,
    ) -> None:
        self.saved, self.average = 0, {}

        def save(trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 4 and not self.saved:
                self.saved += 1
                trainer.save_checkpoint(path, **options)
                self.average = averaging.average() if average else {}

        setattr(self, hook, save)


HOOKS = [
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
]
NAMES = ["ema", "tail", "merge"]


def fit(
    averaging: ModelAveraging,
    *callbacks: Any,
    first: bool = True,
    accumulate: int = 1,
    **resume: Any,
) -> Looked:
    own = [averaging, LearningRateScheduler(Linear(start=1.0, end=0.0))]
    module = Looked()
    trainer = trainer_with(
        *([*callbacks, *own] if first else [*own, *callbacks]),
        max_steps=-1,
        max_epochs=2,
        val_check_interval=4 * accumulate,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, ResumableLoader(8 * accumulate, 2), loader(2, 2), **resume)
    return module


@pytest.mark.parametrize("use", NAMES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_has_the_average_and_resumes_to_the_bit(
    tmp_path: Path, hook: str, first: bool, use: str
) -> None:
    path, averaging = tmp_path / "saved.ckpt", ModelAveraging(ALL, use=use)
    saves = SavesIn(path, hook, averaging)
    straight = fit(averaging, saves, first=first)
    checkpoint = torch.load(path, weights_only=True)
    assert near(checkpoint["state_dict"], saves.average)
    assert checkpoint["state_dict"].keys() == straight.state_dict().keys()
    if use != "tail":  # which has not begun
        state = next(s for k, s in checkpoint["callbacks"].items() if "ModelAveraging" in k)
        assert same(state["training"], straight.trained[3])
        assert not near(checkpoint["state_dict"], straight.trained[3])
    loaded = Looked.load_from_checkpoint(path, weights_only=True)
    assert same(copies(loaded), checkpoint["state_dict"])
    again = ModelAveraging(ALL, use=use)
    resumed = fit(again, ckpt_path=path, weights_only=True)
    assert len(resumed.trained) == 4
    for one, other in zip(straight.trained[4:], resumed.trained, strict=True):
        assert same(one, other)
    for name in NAMES:
        assert same(averaging.average(name), again.average(name))
    assert same(straight.evaluated[-1], resumed.evaluated[-1])
    assert same(copies(straight), copies(resumed))


@pytest.mark.parametrize("use", NAMES)
def test_a_resume_inside_a_window_continues_the_averages(tmp_path: Path, use: str) -> None:
    """The gradients of the window are lost, so that the resumed runs are compared."""
    path = tmp_path / "inside.ckpt"

    class SavesInside(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.fit_loop.total_batch_idx + 1 == 9:
                trainer.save_checkpoint(path)

    averaging = ModelAveraging(ALL, use=use)
    straight = fit(averaging, SavesInside(), accumulate=2)
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 4
    found = next(s for k, s in state["callbacks"].items() if "ModelAveraging" in k)
    kept = found["averages"]["ema"]["copies"][0]
    assert near(kept, ema(straight.trained[1:9:2], 2))
    again = ModelAveraging(ALL, use=use)
    resumed = fit(again, accumulate=2, ckpt_path=path, weights_only=True)
    made = [*straight.trained[1:9:2], *resumed.trained[1::2]]
    assert near(again.average("ema"), ema(made[:8], 2)) or len(made) != 8


def test_a_file_of_weights_alone_has_the_average(tmp_path: Path) -> None:
    averaging = ModelAveraging(EMA(2))
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end", averaging, weights_only=True)
    fit(averaging, saves)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(checkpoint["state_dict"], saves.average)
    assert "callbacks" not in checkpoint


def test_a_checkpoint_after_the_fit_resumes_too(tmp_path: Path) -> None:
    first = ModelAveraging(EMA(2))
    trainer, module = trainer_with(first, max_steps=4), Looked()
    trainer.fit(module, ResumableLoader(8, 2))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert same(saved, first.average())
    second, resumed = ModelAveraging(EMA(2)), Looked()
    trainer_with(second, max_steps=8).fit(
        resumed, ResumableLoader(8, 2), ckpt_path=tmp_path / "after.ckpt", weights_only=True
    )
    straight, whole = ModelAveraging(EMA(2)), Looked()
    trainer_with(straight, max_steps=8).fit(whole, ResumableLoader(8, 2))
    assert same(whole.trained[-1], resumed.trained[-1])
    assert same(straight.average(), second.average())


def test_a_second_fit_continues_from_the_training_weights() -> None:
    averaging, module = ModelAveraging(ALL, use="merge"), Looked(optimizer=torch.optim.SGD)
    trainer = trainer_with(averaging, max_steps=4)
    trainer.fit(module, ResumableLoader(8, 2))
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, ResumableLoader(8, 2))
    straight, whole = ModelAveraging(ALL, use="merge"), Looked(optimizer=torch.optim.SGD)
    trainer_with(straight, max_steps=8).fit(whole, ResumableLoader(8, 2))
    assert same(whole.trained[-1], module.trained[-1])
    for name in ("ema", "merge"):
        assert same(straight.average(name), averaging.average(name))


def test_the_tail_of_a_longer_second_fit_begins_anew() -> None:
    averaging, module = ModelAveraging(TailMean("50%")), Looked()
    trainer = trainer_with(averaging, max_steps=4)
    trainer.fit(module, ResumableLoader(8, 2))
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, ResumableLoader(8, 2))
    assert near(averaging.average(), mean(module.trained[4:]))


def test_weights_that_were_replaced_between_fits_begin_anew() -> None:
    averaging, module = ModelAveraging(EMA(2)), Looked()
    trainer = trainer_with(averaging, max_steps=4)
    trainer.fit(module, ResumableLoader(8, 2))
    with torch.no_grad():
        module.net[0].weight.add_(1)
    start = copies(module)
    trainer.fit_loop.epoch_loop.max_steps = 5
    with pytest.warns(UserWarning, match="the averages start again"):
        trainer.fit(module, ResumableLoader(8, 2))
    assert same(averaging.average(), module.trained[-1])
    assert float((module.trained[-1]["net.0.weight"] - start["net.0.weight"]).abs().max()) < 0.5


def test_another_average_at_a_resume_begins_then(tmp_path: Path, caplog: Any) -> None:
    first = ModelAveraging({"ema": EMA(2)})
    fit(first, SavesIn(tmp_path / "a.ckpt", "on_train_batch_end", first))
    second = ModelAveraging({"ema": EMA(4), "tail": TailMean("100%")}, use="tail")
    with caplog.at_level("INFO"):
        module = fit(second, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert near(second.average("tail"), mean(module.trained))
    assert "averages.ema: EMA(half_life=2, start=0) → EMA(half_life=4, start=0)" in caplog.text


def test_a_checkpoint_without_averages_begins_them(tmp_path: Path) -> None:
    module = Looked()
    trainer = trainer_with(max_steps=4)
    trainer.fit(module, ResumableLoader(8, 2))
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    averaging, resumed = ModelAveraging(EMA(2)), Looked()
    trainer_with(averaging, max_steps=6).fit(
        resumed, ResumableLoader(8, 2), ckpt_path=tmp_path / "bare.ckpt", weights_only=True
    )
    assert near(averaging.average(), ema(resumed.trained, 2))


# ------------------------------------------------------------------------ what else is averaged


class Normalized(Looked):
    """A network with running statistics, a counter, and a frozen and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(0, nn.BatchNorm1d(4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.also = self.net[1]
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.statistics: list[Weights] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        self.statistics.append({n: b.detach().clone() for n, b in self.named_buffers()})


@pytest.mark.parametrize("buffers", ["average", "current"])
def test_running_statistics_are_averaged_or_those_of_training(buffers: Any, tmp_path: Path) -> None:
    module, averaging = Normalized(), ModelAveraging(TailMean("50%"), buffers=buffers)
    trainer = trainer_with(averaging)
    trainer.fit(module, loader(24, 2))
    found = averaging.average()
    tied = {"also.weight", "also.bias"}
    assert "frozen.weight" not in found
    assert ("net.0.running_mean" in found) is (buffers == "average")
    expected = mean(module.statistics[3:]) if buffers == "average" else {
        n: b.float() for n, b in module.statistics[-1].items()
    }  # fmt: skip
    torch.testing.assert_close(module.net[0].running_mean, expected["net.0.running_mean"])
    assert int(module.net[0].num_batches_tracked) == 6
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert tied <= saved.keys()
    for name in tied:
        torch.testing.assert_close(saved[name], found[name.replace("also", "net.1")])


@pytest.mark.parametrize("tie", ["module", "parameters"])
def test_tied_tensors_have_the_average_under_both_names(tie: str, tmp_path: Path) -> None:
    class Tied(Looked):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(0, nn.BatchNorm1d(4))
            self.also = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(4))
            for index, source in enumerate((self.net[1], self.net[0])):
                if tie == "module":
                    self.also[index] = source
                    continue
                for name in source.state_dict():
                    setattr(self.also[index], name, getattr(source, name))

    averaging = ModelAveraging(EMA(2))
    saves = SavesIn(tmp_path / "a.ckpt", "on_train_batch_end", averaging)
    module = Tied()
    trainer_with(averaging, saves).fit(module, loader(24, 2))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    names = {"also.0": "net.1", "also.1": "net.0"}
    tied = {key: names[key[:6]] + key[6:] for key in saved if key.startswith("also")}
    assert len(tied) == 7
    for other, name in tied.items():
        assert torch.equal(saved[other], saved[name])
        assert name.endswith("tracked") or torch.equal(saved[name], saves.average[name])
    assert not same({n: saved[n] for n in module.trained[3]}, module.trained[3])


def test_a_layer_that_is_unfrozen_later_was_constant_until_then() -> None:
    class Backbone(Looked):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[0]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    class Unfreezes(BackboneFinetuning):
        def __init__(self) -> None:
            super().__init__(unfreeze_backbone_at_epoch=1, verbose=False, backbone_initial_lr=0.05)

    module, averaging = (
        Backbone(),
        ModelAveraging({"tail": TailMean("100%"), "ema": EMA(2)}, use="tail"),
    )
    trainer = trainer_with(averaging, Unfreezes(), max_steps=-1, max_epochs=2)
    trainer.fit(module, loader(8, 2))
    assert not same(
        {"w": module.trained[3]["net.0.weight"]}, {"w": module.trained[7]["net.0.weight"]}
    )
    assert near(averaging.average("tail"), mean(module.trained))
    assert near(averaging.average("ema"), ema(module.trained, 2))


def saving(path: Path) -> L.Callback:
    """Saves after the fourth update."""
    return SavesIn(path, "on_train_batch_end", ModelAveraging(EMA(1)), average=False)


def test_infinite_masks_stay_as_they_are() -> None:
    class Masked(Looked):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("causal", torch.full((2, 2), -math.inf).triu(1))

    module = Masked()
    trainer_with(ModelAveraging(ALL, use="ema")).fit(module, loader(24, 2))
    assert module.causal.tolist() == [[0.0, -math.inf], [0.0, 0.0]]


class Frozen(Looked):
    """A network whose first layer is frozen or not."""

    def __init__(self, *, frozen: bool = True) -> None:
        super().__init__()
        self.net[0].requires_grad_(not frozen)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.05)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("use", NAMES)
def test_parameters_may_be_frozen_or_trainable_at_a_resume(
    tmp_path: Path, first: bool, use: str
) -> None:
    """They do not change, so that the average is the same."""
    runs = []
    for frozen in (first, not first):
        averaging, module = ModelAveraging(ALL, use=use), Frozen(frozen=frozen)
        resume = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True} if runs else {}
        saves = [] if runs else [saving(tmp_path / "a.ckpt")]
        trainer = trainer_with(averaging, *saves, max_steps=8)
        trainer.fit(module, ResumableLoader(8, 2), **resume)
        runs.append(module)
    straight = Frozen(frozen=first)
    trainer_with(ModelAveraging(ALL, use=use), max_steps=8).fit(straight, ResumableLoader(8, 2))
    assert near(copies(runs[1]), copies(straight))
    assert same(runs[1].trained[-1], straight.trained[-1])


@pytest.mark.parametrize("buffers", [("average", "current"), ("current", "average")])
@pytest.mark.parametrize("use", ["ema", "merge"])
def test_buffers_may_be_averaged_or_not_at_a_resume(
    tmp_path: Path, buffers: tuple[Any, Any], use: str
) -> None:
    for index, each in enumerate(buffers):
        averaging, module = ModelAveraging(ALL, use=use, buffers=each), Normalized()
        resume = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True} if index else {}
        saves = [] if index else [saving(tmp_path / "a.ckpt")]
        trainer = trainer_with(averaging, *saves, max_steps=8)
        trainer.fit(module, ResumableLoader(8, 2), **resume)
    plain = Normalized()
    trainer_with(max_steps=8).fit(plain, ResumableLoader(8, 2))
    assert same(plain.trained[-1], module.trained[-1])
    assert torch.equal(
        plain.statistics[-1]["net.0.running_mean"], module.statistics[-1]["net.0.running_mean"]
    )


@pytest.mark.parametrize("other", [TailMean("50%"), Merge("50%"), Merge(3), EMA("100%")])
def test_the_state_of_another_kind_of_average_is_not_used(tmp_path: Path, other: Any) -> None:
    first = ModelAveraging({"a": EMA(2)})
    trainer_with(first, saving(tmp_path / "a.ckpt"), max_steps=8).fit(
        Looked(), ResumableLoader(8, 2)
    )
    second, module = ModelAveraging({"a": other}), Looked()
    resume = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    trainer_with(second, max_steps=8).fit(module, ResumableLoader(8, 2), **resume)
    expected = ModelAveraging({"a": other})
    bare = Looked()
    plain = trainer_with(
        LearningRateScheduler(Constant()), saving(tmp_path / "bare.ckpt"), max_steps=8
    )
    plain.fit(bare, ResumableLoader(8, 2))
    resume["ckpt_path"] = tmp_path / "bare.ckpt"
    trainer_with(expected, max_steps=8).fit(Looked(), ResumableLoader(8, 2), **resume)
    assert same(second.average(), expected.average())


@pytest.mark.parametrize("use", ["ema", "training"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_an_extra_validation_leaves_the_model(use: str, error: Any) -> None:
    class Stops(Scored):
        raises = True

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            if self.validated == 2 and self.raises:
                raise error

    module, averaging = Stops(), ModelAveraging(ALL, use=use)
    trainer = trainer_with(averaging, val_check_interval=4, num_sanity_val_steps=0)
    with pytest.raises((SystemExit, error)):
        trainer.fit(module, loader(24, 2), loader(4, 2))
    expected = ema(module.trained, 2) if use == "ema" else module.trained[-1]
    weights = {n: w for n, w in copies(module).items() if n in expected}
    assert near(weights, expected)
    module.raises = False
    module.train()
    trainer.fit(module, loader(24, 2), loader(4, 2))
    assert near(averaging.average("ema"), ema(module.trained, 2))


def test_a_callback_that_is_removed_leaves_the_training_as_it_is() -> None:
    class Removes(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 3:
                trainer.callbacks.remove(averaging)

    averaging, module, plain = ModelAveraging(EMA(2)), Looked(), Looked()
    trainer_with(averaging, Removes(), LearningRateScheduler(Linear())).fit(module, loader(24, 2))
    trainer_with(LearningRateScheduler(Linear())).fit(plain, loader(24, 2))
    assert same(module.trained[-1], plain.trained[-1])


def test_metrics_for_callbacks_only_can_be_monitored() -> None:
    class Accurate(Looked):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("accuracy", 1.0, logger=False)

    trainer = trainer_with(ModelAveraging(ALL, use="ema"), val_check_interval=2)
    trainer.fit(Accurate(), loader(24, 2), loader(2, 2))
    assert "averages/tail/accuracy" in trainer.callback_metrics


def test_other_names_in_the_state_dict_warn(tmp_path: Path) -> None:
    class Renamed(Looked):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            found = super().state_dict(*arguments, **options)
            return {f"my.{name}": value for name, value in found.items()}

    trainer = trainer_with(ModelAveraging(EMA(2)))

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer.callbacks.append(Saves())
    with pytest.warns(UserWarning, match="does not contain net.0.weight under this name"):
        trainer.fit(Renamed(), loader(24, 2))


# ------------------------------------------------------------------------- conflicts and errors


@pytest.mark.parametrize(
    ("other", "way_out"),
    [
        (WeightAveraging(), "EMA"),
        (EMAWeightAveraging(), "EMA"),
        (StochasticWeightAveraging(0.01), "TailMean"),
    ],
)
def test_averages_of_lightning_are_refused_with_the_way_over(other: Any, way_out: str) -> None:
    name = type(other).__name__
    with pytest.raises(ValueError, match=f"must not contain {name} with ModelAveraging.*{way_out}"):
        trainer_with(ModelAveraging(EMA(2)), other).fit(Looked(), loader(4, 2))


def test_a_schedule_free_optimizer_is_refused() -> None:
    from schedulefree import AdamWScheduleFree

    module = Looked(optimizer=AdamWScheduleFree)
    with pytest.raises(ValueError, match="AdamWScheduleFree, which averages the weights itself"):
        trainer_with(ModelAveraging(EMA(2))).fit(module, loader(4, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelAveraging(0.99), "averages must be an Average or a dict, got 0.99"),
        (lambda: ModelAveraging({}), "averages must contain an average"),
        (lambda: ModelAveraging({"training": EMA(1)}), "names of averages must"),
        (lambda: ModelAveraging({"a/b": EMA(1)}), "names of averages must"),
        (lambda: ModelAveraging(ALL), "use must be"),
        (lambda: ModelAveraging(ALL, use="best"), "use must be"),
        (lambda: ModelAveraging(EMA(1), device="gpu9"), "device must be a device of torch"),
        (lambda: ModelAveraging(EMA(1), dtype="int8"), "dtype must be"),
        (lambda: ModelAveraging(EMA(1), every=0), "every must be"),
        (lambda: ModelAveraging(EMA(1), buffers="none"), "buffers must be"),
        (lambda: ModelAveraging(EMA(1)).average("other"), "use must be"),
        (lambda: ModelAveraging(EMA(1)).average(), "from the callback of a fit"),
        (lambda: ModelAveraging(EMA(1), dtype="float8_e4m3fn"), "dtype must be"),
    ],
)  # fmt: skip
def test_wrong_arguments_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("average", "message"),
    [
        (EMA("10 tokens"), "a unit that the run counts, got '10 tokens'; pass tokens="),
        (EMA("1 min"), "a unit that the run counts"),
        (EMA(1, start="10 tokens"), "a unit that the run counts"),
    ],
)
def test_units_that_are_not_counted_raise(average: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_with(ModelAveraging(average)).fit(Looked(), loader(4, 2))


def test_a_tail_that_does_not_fit_raises_before_the_first_update() -> None:
    module = Looked()
    for average, message in (
        (TailMean(500), "over must be at most the whole budget, got 500"),
        (TailMean("2 tokens"), "a unit that the run counts"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_with(ModelAveraging(average)).fit(module, loader(24, 2))
        assert module.trained == []


@pytest.mark.slow
def test_a_merge_in_percent_needs_no_budget() -> None:
    module, averaging = Looked(), ModelAveraging(Merge("50%", checkpoints=2))
    trainer_with(averaging, max_steps=-1, max_epochs=-1, max_time="00:00:00:02").fit(
        module, loader(24, 2)
    )
    assert not same(averaging.average(), module.trained[-1])


def test_percent_of_an_unknown_budget_raise() -> None:
    trainer = trainer_with(ModelAveraging(EMA("1%")), max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"budget|limit"):
        trainer.fit(Looked(), loader(4, 2))


def test_the_mixin_brings_the_callback() -> None:
    class Model(ModelAveragingMixin, Looked):
        def configure_model_averaging(self) -> Any:
            return TailMean("50%")

    module = Model()
    trainer_with().fit(module, loader(24, 2))
    assert near(copies(module), mean(module.trained[3:]))


def test_fsdp1_is_refused(monkeypatch: Any) -> None:
    trainer = trainer_with(ModelAveraging(EMA(2)))
    flat = (type(trainer.strategy),)  # FSDPStrategy needs a GPU
    monkeypatch.setattr(conflicts, "classes", lambda path: flat if "FSDP" in path else ())
    with pytest.raises(ValueError, match="must not be FSDP1 or DeepSpeed"):
        trainer.fit(Looked(), loader(4, 2))
