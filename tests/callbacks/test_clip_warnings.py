"""Reports of clipping that never acted, and warnings about clipping by the module itself."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bigopt import (
    AutoClip,
    GradientClipping,
    Groups,
    NormClip,
    PerParameterNormClip,
    ZClip,
)
from lightning_bigopt.gradients.clip_statistics import ClipStatistics
from lightning_bigopt.gradients.clip_warnings import clip_warnings
from lightning_bigopt.gradients.norm_sample import NormSample, repetition
from tests.helpers import ManualUpdates, ResumableLoader, SaveAt, cpu_precision, fit, loader


class Plain(L.LightningModule):
    """A regression, whose gradients the module may clip by itself."""

    def __init__(self, limit: float | None = None, *, rate: float = 1e-3) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.limit, self.rate = limit, rate
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        return nn.functional.mse_loss(self.net(x), y / (1 + index).unsqueeze(1))

    def on_after_backward(self) -> None:
        if self.limit is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.limit)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def warned(module: L.LightningModule, rule: Any, size: int = 240, **options: Any) -> list[str]:
    """Returns the warnings of a fit with batches of two samples, and one epoch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, loader(size, 2), GradientClipping(rule), max_epochs=1, **options)
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_threshold_that_never_acted_is_information(caplog: pytest.LogCaptureFixture) -> None:
    module = Plain()
    with caplog.at_level(logging.INFO):
        assert warned(module, NormClip(1e3)) == []
    (line,) = [text for text in caplog.messages if text.startswith("NormClip")]
    text = f" No update was clipped: the largest norm was {max(module.norms):.3g}. A threshold that"
    assert text in line


def test_largest_norm_is_that_of_all_updates_and_survives_a_resume(tmp_path: Path) -> None:
    straight, resumed = GradientClipping(NormClip(50.0)), GradientClipping(NormClip(50.0))
    module, path = Plain(), tmp_path / "k.ckpt"
    fit(module, ResumableLoader(160, 2), straight, SaveAt(path, 51), max_epochs=1)
    fit(Plain(), ResumableLoader(160, 2), resumed, max_epochs=1, ckpt_path=path)
    assert straight.reports() == resumed.reports()
    assert straight.saved_state() == resumed.saved_state()
    assert straight.reports()["", ""].largest == pytest.approx(max(module.norms))


@pytest.mark.parametrize(
    "rule",
    [
        NormClip(1.0),
        PerParameterNormClip(1.0),
        Groups({"*": NormClip(1e3)}),
        AutoClip(percentile=90),
        ZClip(max_norm=None, z_threshold=99.0),
    ],
)
def test_clipping_of_whole_gradients_gives_no_warning(rule: Any) -> None:
    assert warned(Plain(), rule) == []


class Manual(ManualUpdates, Plain):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 0.7


@pytest.mark.parametrize(
    ("make", "options", "limit"),
    [
        (lambda: Plain(0.7), {}, 0.1),
        (lambda: Plain(0.7), {}, 0.7),
        (lambda: Plain(0.7), {"accumulate_grad_batches": 2}, 1e3),
        (lambda: Plain(0.7), cpu_precision("bf16-mixed"), 1e3),
        (lambda: Plain(0.7 * 2**8), cpu_precision("16-mixed"), 1e3),  # it clips before unscaling
        (Manual, {}, 1e3),
    ],
)
def test_clipping_by_the_module_itself_is_a_warning(make: Any, options: Any, limit: float) -> None:
    module = make()
    (text,) = warned(module, NormClip(limit), **options)
    assert text.startswith("gradients must reach GradientClipping before they are clipped, got ")
    assert "got the norm 0.7 in " in text


@pytest.mark.parametrize("limit", [1e-2, 1e-3])
def test_clipping_to_a_small_norm_is_a_warning_without_advice(
    limit: float, caplog: pytest.LogCaptureFixture
) -> None:
    """clip_grad_norm_ adds 1e-6 to the norm that it divides by."""
    with caplog.at_level(logging.INFO):
        (text,) = warned(Plain(limit), NormClip(1e3))
    assert f"got the norm {limit:.4g} in " in text or f"got the norm {0.9999 * limit:.4g}" in text
    assert "remove clip_grad_norm_ or clip_gradients from the module" in text
    assert "No update was clipped" not in caplog.text


def test_what_clip_grad_norm_adds_to_small_norms_is_tolerated() -> None:
    """Norms from 2e-4 to 1e-2, clipped to 1e-4 by the formula of torch."""
    norms = np.geomspace(2e-4, 1e-2, 200)
    rows = [(1e-4 * n / (n + 1e-6), 5e-5 * (1 + 0.3 * np.sin(1e4 * n))) for n in norms]
    found = repetition(rows)
    assert found is not None
    assert found.fraction == 1.0


class Linear(Plain):
    """Has the same gradient in every update."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(p.sum() for p in self.parameters()) / 50.0  # type: ignore[return-value]


class Signs(Plain):
    """Replaces the gradients by their signs, as sign-based methods do."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.sign_()  # type: ignore[union-attr]


class FullBatch(Plain):
    """Trains slowly on the same batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.first = getattr(self, "first", batch)
        return super().training_step(self.first, 0)


@pytest.mark.parametrize(
    "make",
    [Linear, Signs, lambda: FullBatch(rate=1e-6), lambda: FullBatch(rate=1e-2), Plain],
)
def test_constant_and_slow_norms_are_not_clipping_by_the_module(make: Any) -> None:
    assert warned(make(), NormClip(1e3), size=400) == []


def test_repetition_needs_an_accumulation_at_one_norm() -> None:
    random = np.random.default_rng(0)

    def rows(norms: Any) -> list[tuple[float, float]]:
        return [(float(n), float(n * random.uniform(0.1, 0.9))) for n in norms]

    for spread in (1e-6, 1e-4, 3e-4, 1e-3, 0.1):
        smooth = 1.0 + spread * random.normal(size=512)
        if spread > 1e-6:
            assert repetition(rows(smooth)) is None, spread
    clipped = np.minimum(random.lognormal(0.0, 0.5, size=512), 1.3)
    found = repetition(rows(clipped))
    assert found is not None
    assert (found.norm, found.fraction) == (1.3, float((clipped == 1.3).mean()))
    assert repetition(rows(clipped[clipped == 1.3][:19])) is None  # too few
    assert repetition(rows(np.minimum(random.lognormal(0.0, 0.5, size=512), 4.0))) is None
    assert repetition([]) is None
    assert repetition([(0.0, 0.0)] * 100) is None


def test_sample_on_a_device_equals_that_of_the_host() -> None:
    random = np.random.default_rng(1)
    rows = random.lognormal(size=(3000, 2)).astype(np.float32)
    rows[7, 0] = math.nan
    host, device = NormSample(), NormSample()
    for norm, last in rows:
        host.add(float(norm), float(last))
    for part in torch.from_numpy(rows).split(64):
        device.extend(part)
    assert host.state_dict() == device.state_dict()
    again = NormSample()
    again.load_state_dict(device.state_dict())
    assert again.state_dict() == device.state_dict()


def test_state_of_an_earlier_version_gives_no_warning() -> None:
    statistics = ClipStatistics()
    state = {"updates": 90, "clipped": 90.0, "norms": [0.7] * 90, "stride": 1, "seen": 90}
    statistics.load_state_dict(state)
    report = statistics.report()
    assert report is not None
    assert list(clip_warnings({("", ""): report})) == []
    assert report.largest == 0.7
