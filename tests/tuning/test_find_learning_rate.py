"""find_learning_rate: branches in closed form, the restored state, all ways of training."""

from __future__ import annotations

import copy
import math
import random
import warnings
from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigopt import (
    BatchSizeScheduler,
    BatchSizeSteps,
    GradientClipping,
    LearningRateScheduler,
    Linear,
    NormClip,
    WarmupStableDecay,
)
from lightning_bigopt.tuning.branches import Branch
from lightning_bigopt.tuning.curve import RangeTest
from lightning_bigopt.tuning.find_learning_rate import find_learning_rate
from lightning_bigopt.tuning.found_learning_rate import FoundLearningRate
from lightning_bigopt.tuning.rate_branches import (
    highest_useful_rate,
    initial_losses,
    next_step,
    scores,
)
from tests.helpers import QUIET, cpu_precision

WEIGHTS = torch.randn(6, 1, generator=torch.Generator().manual_seed(3))
CURVATURES = torch.tensor([1.0, 3.0, 10.0])


def data(samples: int = 240, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x @ WEIGHTS), batch_size=batch_size, **options)


class Bowl(L.LightningModule):
    """A quadratic with three curvatures, trained with plain gradient descent."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, batch: Any) -> Tensor:
        return 0.5 * (CURVATURES * self.w**2).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Model(L.LightningModule):
    """A regression with dropout and batch normalization, which draws random numbers."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(5)
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)
        )
        self.seen: list[float] = []
        self.rates: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = x + 0.01 * (random.random() + float(np.random.rand()))  # noqa: NPY002
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.seen.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Manual(Model):
    """Makes its updates itself, each of two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Scheduled(Model):
    """Has a scheduler of its own."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def trainer(*callbacks: Any, steps: int = 1000, **options: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_steps": steps, "callbacks": list(callbacks), **options})


# ---------------------------------------------------------------------------------- closed form


def losses_of_bowl(peak: float, updates: int) -> np.ndarray:
    """Returns the loss before each update of gradient descent, from the product of its factors."""
    fractions = (np.arange(updates) + 0.5) / updates
    down = 1 - np.sqrt(np.clip((fractions - 0.8) / 0.2, 0, 1))
    rates = peak * np.minimum(np.minimum(fractions / 0.1, 1.0), down)
    curvatures = CURVATURES.double().numpy()
    weights = np.cumprod(1 - rates[:, None] * curvatures, axis=0)
    weights = np.vstack([np.ones(3), weights[:-1]])
    return 0.5 * (curvatures * weights**2).sum(axis=1)


def test_losses_of_the_branches_have_their_closed_form() -> None:
    found = find_learning_rate(trainer(), Bowl(), data())
    n = found.branch_updates
    expected = [losses_of_bowl(rate, n) for rate in found.learning_rates]
    means = [losses[-round(0.2 * n) :].mean() for losses in expected]
    assert found.losses == pytest.approx(means, rel=1e-9)
    steps = [math.log(rate / found.learning_rates[0], 2.5) for rate in found.learning_rates]
    assert steps == pytest.approx([round(step) for step in steps])


def test_best_rate_of_a_branch_is_at_the_bottom_of_the_closed_form() -> None:
    """The loss there is at most 5 % of the gain above the minimum over a fine grid."""
    found = find_learning_rate(trainer(), Bowl(), data())
    ends = [losses_of_bowl(rate, found.branch_updates)[-1] for rate in np.geomspace(1e-3, 1, 400)]
    start = 0.5 * float(CURVATURES.sum())
    at_optimum = losses_of_bowl(found.branch_optimum, found.branch_updates)[-1]
    assert found.edge is None
    assert at_optimum - min(ends) < 0.05 * (start - min(ends))


def test_suggestion_follows_the_lengths_of_branch_and_run() -> None:
    runs = [
        find_learning_rate(trainer(steps=steps), Bowl(), data(), budget="80 steps")
        for steps in (500, 2000)
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].suggestion / runs[1].suggestion == pytest.approx(4**0.32)
    for run in runs:
        factor = (run.branch_updates / run.run_updates) ** 0.32
        assert run.horizon_factor == pytest.approx(factor)
        assert run.suggestion == pytest.approx(run.branch_optimum * factor)
        low, high = run.interval
        assert low * high == pytest.approx(run.suggestion**2)
        # The losses have no noise: the interval is that of the exponent, 0.32 ± 0.15, and of the
        # initial weights.
        exponent = 0.15 * math.log(run.run_updates / run.branch_updates)
        spread = math.exp(1.645 * math.hypot(exponent, 0.25))
        assert high / run.suggestion == pytest.approx(spread, rel=0.01)
    flat = find_learning_rate(trainer(), Bowl(), data(), horizon_exponent=0.0)
    assert flat.suggestion == flat.branch_optimum


@pytest.mark.slow
@pytest.mark.parametrize("start", [1e-3, 0.1, 10.0])
def test_grid_grows_toward_the_lower_loss(start: float) -> None:
    """Eight branches span a factor of 610; those above 0.2 diverge."""
    found = find_learning_rate(
        trainer(steps=2000), Bowl(), data(), start=start, branches=8, budget="15%"
    )
    assert found.sweep is None
    assert found.edge is None
    assert 0.03 < found.branch_optimum < 0.2


# -------------------------------------------------------------------------------------- the cost


@pytest.mark.slow
@pytest.mark.parametrize("branches", [3, 5, 7])
@pytest.mark.parametrize("steps", [1000, 1234])
def test_cost_is_counted_and_within_the_budget(steps: int, branches: int) -> None:
    module = Model()
    counted: list[int] = []
    module.net[0].register_forward_hook(lambda *_: counted.append(1))
    found = find_learning_rate(trainer(steps=steps), module, data(), branches=branches)
    assert found.updates == len(counted)  # one batch each
    assert 0.08 * steps < found.updates <= 0.1 * steps
    assert found.cost == found.updates / steps
    assert found.run_updates == steps


def test_run_of_epochs_with_a_batch_size_has_the_updates_of_the_plan() -> None:
    policy = BatchSizeScheduler(BatchSizeSteps({"0%": 16, "50%": 32}))
    found = find_learning_rate(trainer(policy, steps=-1, max_epochs=60), Model(), data())
    assert found.run_updates == 30 * 15 + 30 * 8
    assert found.updates <= 0.1 * found.run_updates


# --------------------------------------------------------------------------------- restored state


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_training_after_it_equals_training_without_it_to_the_bit(workers: int) -> None:
    runs: list[Any] = []
    for searches in (False, True):
        module = Model()
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(3)
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": bool(workers)}
        loader = data(shuffle=True, generator=torch.Generator().manual_seed(4), **options)
        fitted = trainer(
            LearningRateScheduler(WarmupStableDecay(warmup="10%", decay="20%")),
            GradientClipping(NormClip(max_norm=1.0)),
            steps=60,
        )
        if searches:
            found = find_learning_rate(fitted, module, loader, budget="52 steps", branches=4)
            assert found.updates > 40
            assert fitted.global_step == fitted.current_epoch == 0
            assert module.lr == 0.01
        fitted.fit(module, loader)
        state = copy.deepcopy((module.state_dict(), fitted.optimizers[0].state_dict()))
        randoms = (random.random(), float(np.random.rand()), float(torch.rand(1)))  # noqa: NPY002
        runs.append((state, randoms, module.seen, module.rates))
    plain, searched = runs
    torch.testing.assert_close(searched[0], plain[0], rtol=0, atol=0)
    assert searched[1:] == plain[1:]


def test_search_that_raises_restores_everything() -> None:
    class Failing(Model):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and len(self.seen) == 30:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    module, fitted = Failing(), trainer(steps=40)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ArithmeticError):
        find_learning_rate(fitted, module, data(), budget=200)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    Failing.fails = False
    fitted.fit(module, data())
    assert fitted.global_step == 40


# ---------------------------------------------------------------------------- all ways of training


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_mixed_precision_and_accumulation_find_about_the_same(
    precision: str, accumulate: int
) -> None:
    plain = find_learning_rate(trainer(), Model(), data())
    mixed = find_learning_rate(
        trainer(accumulate_grad_batches=accumulate, **cpu_precision(precision)), Model(), data()
    )
    assert plain.suggestion / 3 < mixed.suggestion < plain.suggestion * 3
    assert mixed.updates == plain.updates


@pytest.mark.slow
@pytest.mark.parametrize("make", [Manual, Scheduled])
def test_own_updates_and_own_scheduler_find_the_same_as_plain_training(make: Any) -> None:
    plain = find_learning_rate(trainer(), Model(), data())
    assert find_learning_rate(trainer(), make(), data()) == plain


def test_clipping_takes_part() -> None:
    """The norm of the first gradient is 10, and each weight is 1 away from the minimum."""
    plain = find_learning_rate(trainer(), Bowl(), data())
    clipped = find_learning_rate(trainer(GradientClipping(NormClip(max_norm=0.1))), Bowl(), data())
    assert clipped.branch_optimum > 3 * plain.branch_optimum


def test_groups_keep_their_ratios() -> None:
    class Grouped(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(
                [
                    {"params": self.net[0].parameters(), "lr": 0.01},
                    {"params": self.net[4].parameters(), "lr": torch.tensor(0.04)},
                ]
            )

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            first, second = (float(group["lr"]) for group in optimizer.param_groups)
            ratios.append(second / first)

    ratios: list[float] = []
    module, fitted = Grouped(), trainer()
    find_learning_rate(fitted, module, data())
    assert len(ratios) > 80
    assert ratios == pytest.approx([4.0] * len(ratios), rel=1e-5)


# ------------------------------------------------------------------------------ use of the result


@pytest.mark.slow
def test_use_sets_the_lr_of_the_module() -> None:
    module, fitted = Model(), trainer(LearningRateScheduler(Linear()), steps=500)
    found = find_learning_rate(fitted, module, data(), on_result="use", budget="15%")
    assert module.lr == module.hparams.lr == found.suggestion
    fitted.fit(module, data())
    assert module.rates[0] == found.suggestion


def test_report_says_learning_rate_interval_and_cost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=rank_zero.log.name):
        found = find_learning_rate(trainer(), Bowl(), data())
    (text,) = (r.getMessage() for r in caplog.records if "interval" in r.getMessage())
    low, high = found.interval
    assert text == (
        f"Learning rate {found.suggestion:.3g} for 1000 updates (90 % interval {low:.2g} to "
        f"{high:.2g}), found in {found.updates} updates ({found.updates / 10:.1f}%)."
    )


def test_optimum_at_the_edge_warns_and_names_a_start() -> None:
    with pytest.warns(UserWarning, match=r"The highest learning rate .* Pass start=0\.0002, or"):
        found = find_learning_rate(trainer(), Bowl(), data(), start=1e-5)
    assert found.edge == "high"
    assert found.bracket == (pytest.approx(4e-6), pytest.approx(1e-5 * 2.5**3))


def result(**changes: Any) -> FoundLearningRate:
    values: dict[str, Any] = {
        "suggestion": 0.004,
        "interval": (0.002, 0.008),
        "branch_optimum": 0.012,
        "horizon_factor": 1 / 3,
        "learning_rates": (0.004, 0.01, 0.025),
        "losses": (2.5, 2.25, math.inf),
        "standard_errors": (0.05, 0.0, math.nan),
        "edge": None,
        "sweep": None,
        "current": 0.001,
        "branch_updates": 25,
        "updates": 75,
        "run_updates": 1000,
    }
    return FoundLearningRate(**{**values, **changes})


def test_text_shows_every_branch() -> None:
    assert str(result(edge="high")).splitlines() == [
        "Learning rate 0.004 for 1000 updates",
        "  factor on the current one: 4",
        "  90 % interval: 0.002 to 0.008",
        "  best for 25 updates: 0.012",
        "  factor for the longer run: 0.333",
        "  cost: 75 updates, 7.5% of the run",
        "  learning rate  loss",
        "  0.004          2.5 ± 0.05",
        "  0.01           2.25 ± 0",
        "  0.025          diverged",
        "  the highest was the best: the best one may be higher",
    ]


def test_plot_draws_finite_branches_and_the_suggestion() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = result().plot()
    drawn = ax.containers[0].lines[0]
    assert drawn.get_xdata().tolist() == [0.004, 0.01]
    assert drawn.get_ydata().tolist() == [2.5, 2.25]
    assert [line.get_xdata()[0] for line in ax.lines[-2:]] == [0.012, 0.004]
    plt.close(ax.figure)


def branches_of(losses: dict[int, float]) -> dict[int, Branch]:
    """Returns branches by step, with a constant loss; NaN for those that diverged."""
    return {
        step: Branch(losses=(loss,) * 10, evaluation=(), diverged=math.isnan(loss))
        for step, loss in losses.items()
    }


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ({}, 0),
        ({0: 2.0}, -1),
        ({0: 2.0, -1: 1.0}, -2),
        ({0: 1.0, -1: 2.0}, 1),
        ({0: 1.0, -1: 1.0}, 1),  # has learned nothing yet
        ({0: math.nan, -1: 2.0}, -2),
        ({0: math.nan, -1: math.nan}, -2),
        ({0: 2.0, -1: 1.0, -2: 1.5}, -3),
        ({0: 1.5, -1: 1.0, -2: 2.0}, 1),
        ({0: 1.0, -1: 2.0, 1: math.nan}, -2),
        ({0: 1.0, -1: 2.0, 1: 2.0}, 2),
    ],
)
def test_next_branch_is_beyond_the_end_with_the_lower_loss(
    losses: dict[int, float], step: int
) -> None:
    assert next_step(branches_of(losses)) == step


def test_search_of_many_branches_finds_any_minimum() -> None:
    """A parabola with its minimum at each step within 15 of the start."""
    for minimum in range(-15, 16):
        found: dict[int, Branch] = {}
        for _ in range(20):
            step = next_step(found)
            assert step not in found
            found |= branches_of({step: float((step - minimum) ** 2)})
        assert {minimum - 1, minimum, minimum + 1} <= set(found)


def test_highest_useful_rate_ignores_noise_of_the_start() -> None:
    rates = tuple(10.0**power for power in range(-9, 0))
    losses = (2.0, 2.1, 1.9, 2.0, 1.5, 1.4, 2.2, 2.6, 3.0)
    sweep = RangeTest(learning_rates=rates, losses=losses, skip=0, smoothing=0.0)
    assert highest_useful_rate(sweep) == rates[6]  # 2 + 3 * 0.0816
    assert scores(Branch(losses=(1.0, math.nan), evaluation=(), diverged=True)) == ()


def test_highest_useful_rate_ignores_a_low_loss_of_one_batch_after_the_rise() -> None:
    rates = tuple(10.0**power for power in range(-12, 0))
    losses = (2.0, 2.1, 1.9, 2.0, 1.5, 1.4, 2.2, 9.0, 9.0, 2.0, 9.0, 9.0)
    sweep = RangeTest(learning_rates=rates, losses=losses, skip=0, smoothing=0.0)
    assert highest_useful_rate(sweep) == rates[5]
    assert initial_losses(sweep) == losses[:4]


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "3 epochs"}, r"budget must be a share or a number .* got '3 epochs'"),
        ({"budget": "4%"}, r"budget must be at least 62 updates for 5 branches, .* which is 40"),
        ({"budget": 61, "start": 1e-3}, "budget must be at least 62 updates"),
        ({"budget": "ten"}, "budget must be"),
        ({"branches": 2}, "branches must be a number of branches of at least 3, got 2"),
        ({"start": 0.0}, "start must be positive and finite, got 0.0; write 1e-3, or None"),
        ({"horizon_exponent": 2.0}, r"horizon_exponent must be in \[0, 1\], got 2.0"),
        ({"on_result": "train"}, "on_result must be 'report' or 'use'|on_result must be 'use'"),
        (
            {"start": 1e300},
            r"budget and start must let .* that diverged after an initial loss of 7;",
        ),
    ],
)
def test_invalid_arguments_raise_with_their_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_learning_rate(trainer(), Bowl(), data(), **options)


class Stuck(Bowl):
    """Its loss does not depend on its weights; ``noise`` makes it random."""

    noise = 0.0

    def training_step(self, batch: Any) -> Tensor:
        return 0.0 * super().training_step(batch) + 2.0 + self.noise * torch.rand(())


@pytest.mark.parametrize("start", [None, 1e-3])
def test_branches_that_do_not_learn_raise(start: float | None) -> None:
    with pytest.raises(ValueError, match=r"budget and start must let a branch lower the loss, got"):
        find_learning_rate(trainer(), Stuck(), data(), start=start)


@pytest.mark.slow
def test_branches_that_do_not_learn_raise_or_warn_in_spite_of_noise() -> None:
    silent, module = 0, Stuck()
    module.noise = 1.0
    for seed in range(10):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as caught, suppress(ValueError):
            warnings.simplefilter("always")
            find_learning_rate(trainer(), module, data())
            silent += not any("suggestion may be arbitrary" in str(w.message) for w in caught)
    assert silent <= 3


def test_start_at_which_every_branch_explodes_raises() -> None:
    with pytest.raises(ValueError, match=r"budget and start must let .* initial loss of 7;"):
        find_learning_rate(trainer(), Bowl(), data(), start=1e3, branches=3)


def test_loss_that_is_never_finite_raises_without_an_advice_on_start() -> None:
    class Broken(Bowl):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch) * math.nan

    with pytest.raises(ValueError, match=r"training_step must return finite losses at .*\[nan\]"):
        find_learning_rate(trainer(), Broken(), data())


@pytest.mark.parametrize("start", [None, 1e-3])
@pytest.mark.parametrize("update", [1, 2])
def test_loss_that_is_not_finite_after_some_updates_raises(
    update: int, start: float | None
) -> None:
    class BreaksLater(Bowl):
        def training_step(self, batch: Any) -> Tensor:
            loss = super().training_step(batch)
            return loss * math.nan if self.trainer.global_step == update else loss

    with pytest.raises(ValueError, match=r"training_step must return finite losses at .* nan\]"):
        find_learning_rate(trainer(), BreaksLater(), data(), start=start)


class Outliers(Bowl):
    """Every fifth batch has a loss and a gradient of nearly zero, as batches of one sample may."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step(batch) * (1e-3 if batch_idx % 5 == 0 else 1.0)


def test_batches_of_very_different_losses_do_not_end_the_sweep() -> None:
    found = find_learning_rate(trainer(), Outliers(), data())
    assert found.sweep is not None
    assert found.sweep.learning_rates[-1] > 0.2  # at which the bowl diverges
    assert 0.01 < found.branch_optimum < 0.2


def test_trainer_without_a_limit_raises() -> None:
    with pytest.raises(ValueError, match="trainer must have a limit for find_learning_rate, got"):
        find_learning_rate(L.Trainer(**QUIET), Bowl(), data())


class TwoOptimizers(Manual):
    """Steps two optimizers for each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        halves = (self.net[0].parameters(), self.net[4].parameters())
        return [torch.optim.Adam(half, lr=self.lr) for half in halves]


def test_sweep_and_cost_of_two_optimizers_count_their_steps() -> None:
    module = TwoOptimizers()
    counted: list[int] = []
    module.net[0].register_forward_hook(lambda *_: counted.append(1))
    found = find_learning_rate(trainer(), module, data())
    assert found.updates == 2 * len(counted)
    assert found.sweep is not None
    assert found.sweep.learning_rates[-1] > 1.0 or found.sweep.diverged


def test_random_states_are_restored_after_an_error() -> None:
    class Fails(Bowl):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            if torch.rand(()) < 2.0 and self.trainer.global_step == 5:
                raise RuntimeError("a fault of the module")
            return super().training_step(batch)

    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="a fault of the module"):
        find_learning_rate(trainer(), Fails(), data())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_limits_of_the_trainer_are_restored() -> None:
    fitted = trainer()
    before = fitted.max_epochs, fitted.min_epochs, fitted.max_steps
    find_learning_rate(fitted, Bowl(), data())
    assert (fitted.max_epochs, fitted.min_epochs, fitted.max_steps) == before


class Scaled(Bowl):
    """Gives its optimizer another learning rate than its attribute."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5 * self.lr)


def test_use_warns_if_the_next_fit_would_not_notice_it() -> None:
    module = Scaled()
    with pytest.warns(UserWarning, match="on_result='use' needs an attribute .* Multiply it by"):
        found = find_learning_rate(trainer(), module, data(), on_result="use")
    assert module.lr == 1e-3
    assert found.current == 5e-4
    assert found.factor * found.current == pytest.approx(found.suggestion)


def test_run_of_unknown_length_raises() -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=r"length|max_steps|budget"):
        find_learning_rate(trainer(steps=-1, max_epochs=-1), Bowl(), data())


def test_training_step_without_a_loss_raises() -> None:
    class Silent(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="training_step must return the loss"):
        find_learning_rate(trainer(), Silent(), data())


def test_wrong_first_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"trainer must be a Trainer, got 3"):
        find_learning_rate(3, Bowl())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"module must be a Module"):
        find_learning_rate(trainer(), 3)  # type: ignore[arg-type]
