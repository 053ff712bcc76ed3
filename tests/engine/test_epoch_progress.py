"""The fraction of the budget under max_epochs, with epochs whose lengths differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bigopt import LearningRateScheduler, Linear, WarmupStableDecay
from tests.batch_helpers import RecordsRates, SaveInEpoch
from tests.helpers import QUIET


class Recorded(RecordsRates):
    """Has a number of batches in each epoch."""

    def __init__(self, sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.sizes = sizes

    def train_dataloader(self) -> Any:
        return batches(self.sizes[self.current_epoch])


def batches(count: int, size: int = 2) -> Any:
    return DataLoader(TensorDataset(torch.randn(count * size, 3)), batch_size=size)


def trainer_of(*callbacks: Any, schedule: Any = None, on_resume: Any = None, **options: Any) -> Any:
    scheduler = LearningRateScheduler(schedule or Linear(), on_resume=on_resume)
    return L.Trainer(**{**QUIET, "max_steps": -1, **options}, callbacks=[scheduler, *callbacks])


def expected(*lengths: int, epochs: int | None = None) -> list[float]:
    """Returns 1 - fraction of every batch, from the definition of the fraction."""
    total = epochs or len(lengths)
    return [1 - (e + i / n) / total for e, n in enumerate(lengths) for i in range(n)]


@pytest.mark.parametrize("sizes", [(4, 8, 12, 16), (16, 12, 8, 4), (3, 7, 1, 5)])
def test_reloaded_loaders_of_other_lengths_end_on_the_budget(sizes: tuple[int, ...]) -> None:
    module = Recorded(sizes)
    trainer_of(max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(module)
    assert module.rates == pytest.approx(expected(*sizes), abs=1e-12)


@pytest.mark.parametrize("on_resume", ["extend", "continue"])
@pytest.mark.parametrize(("before", "after"), [(16, 8), (8, 16), (12, 12)])
def test_resume_with_another_batch_size_continues_at_the_epoch(
    tmp_path: Path, on_resume: Any, before: int, after: int
) -> None:
    path = tmp_path / "epoch.ckpt"
    saves = SaveInEpoch(path, "on_train_epoch_end", at=(3, before))
    trainer_of(saves, max_epochs=10).fit(Recorded(), batches(before))
    module = Recorded()
    trainer_of(max_epochs=10, on_resume=on_resume).fit(module, batches(after), ckpt_path=path)
    right = expected(*[before] * 4, *[after] * 6)[4 * before :]
    assert module.rates == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        *(("on_train_batch_end", at) for at in [(0, 1), (0, 5), (1, 3), (1, 5), (2, 4)]),
        *(("on_train_epoch_end", at) for at in [(0, 5), (1, 5), (2, 5)]),
    ],
)
def test_resumed_learning_rates_equal_the_uninterrupted_ones(
    tmp_path: Path, hook: str, at: tuple[int, int]
) -> None:
    path, straight, resumed = tmp_path / "saved.ckpt", Recorded(), Recorded()
    trainer_of(SaveInEpoch(path, hook, at=at), max_epochs=4).fit(straight, batches(5))
    assert straight.rates == pytest.approx(expected(*[5] * 4), abs=1e-12)
    trainer_of(max_epochs=4).fit(resumed, batches(5), ckpt_path=path)
    assert resumed.rates == straight.rates[-len(resumed.rates) :]
    assert len(resumed.rates) == 20 - 5 * at[0] - at[1]


def test_raised_max_epochs_with_other_loaders_continue_at_the_epoch() -> None:
    module, trainer = Recorded(), trainer_of(max_epochs=4)
    trainer.fit(module, batches(8))
    for epochs, length, first in [(8, 4, 4), (12, 16, 8)]:
        module.rates.clear()
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, batches(length))
        right = [1 - (first + i / length) / epochs for i in range(length * 4)]
        assert module.rates == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("at", [(0, 3), (1, 45)])
def test_interrupted_fit_begins_the_epoch_again(at: tuple[int, int]) -> None:
    class Interrupts(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if (trainer.current_epoch, arguments[-1]) == at and not interrupted:
                interrupted.append(len(module.rates))
                raise KeyboardInterrupt

    interrupted: list[int] = []
    module, trainer = Recorded(), trainer_of(Interrupts(), max_epochs=4)
    with pytest.raises(SystemExit):
        trainer.fit(module, batches(50))
    module.rates.clear()
    trainer.fit(module, batches(50))
    assert module.rates == pytest.approx(expected(*[50] * 4)[50 * at[0] :], abs=1e-12)


class ShorterThanAnnounced(IterableDataset[list[Tensor]]):
    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Any:
        yield from ([row] for row in torch.randn(12, 3))


@pytest.mark.filterwarnings("ignore:.*IterableDataset")
def test_length_seen_in_the_first_epoch_is_used_afterwards(tmp_path: Path) -> None:
    path, module = tmp_path / "saved.ckpt", Recorded()
    data = DataLoader(ShorterThanAnnounced(), batch_size=2)
    trainer_of(SaveInEpoch(path, "on_train_batch_end", at=(1, 2)), max_epochs=3).fit(module, data)
    right = [1 - i / 8 / 3 for i in range(6)] + expected(6, 6, 6)[6:]
    assert module.rates == pytest.approx(right, abs=1e-12)
    resumed = Recorded()
    trainer_of(max_epochs=3).fit(resumed, data, ckpt_path=path)
    # The data begins again in the middle of the epoch, which therefore shows no other length.
    second = [1 - (1 + i / (6 if i < 6 else 8)) / 3 for i in range(2, 8)]
    assert resumed.rates == pytest.approx(second + expected(6, 6, 6)[12:], abs=1e-12)


class Announces:
    """A loader whose epochs have other numbers of batches than its length says."""

    def __init__(self, announced: int, *epochs: int) -> None:
        self.announced, self.epochs = announced, list(epochs)

    def __len__(self) -> int:
        return self.announced

    def __iter__(self) -> Any:
        yield from ([row] for row in torch.randn(self.epochs.pop(0), 2, 3))


def shares(announced: int, *lengths: int, window: int = 1) -> list[float]:
    """Returns 1 - fraction of every update, with the length that the epoch before has shown."""
    expected_length, rates = announced, []
    for epoch, actual in enumerate(lengths):
        # Lightning knows the last batch only by the announced length.
        last = actual if actual == announced else actual - window + 1
        for batch in range(0, last, window):
            length = expected_length if batch < expected_length else announced
            rates.append(1 - (epoch + batch / length) / len(lengths))
        expected_length = actual
    return rates


def test_an_explicit_budget_is_trained_to_its_end_after_a_short_epoch() -> None:
    """The third epoch is expected to be as short as the second, but is not."""
    module = Recorded()
    scheduler = LearningRateScheduler(Linear(), budget="30 steps")
    trainer = L.Trainer(**{**QUIET, "max_steps": -1}, max_epochs=3, callbacks=[scheduler])
    trainer.fit(module, Announces(12, 12, 6, 12))
    assert trainer.global_step == len(module.rates) == 30
    assert trainer.current_epoch == 3


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    "lengths", [(4, 8, 8, 8), (8, 4, 8, 8), (6, 8, 7, 8), (4, 6, 6), (6, 6, 6)]
)
def test_the_length_of_the_last_epoch_is_expected(lengths: tuple[int, ...], window: int) -> None:
    module = Recorded()
    trainer = trainer_of(max_epochs=len(lengths), accumulate_grad_batches=window)
    trainer.fit(module, Announces(8, *lengths))
    assert module.rates == pytest.approx(shares(8, *lengths, window=window), abs=1e-12)
    if lengths == (8, 4, 8, 8) and window == 1:  # the closed form, written out
        third = [2 / 4, 1.75 / 4, 1.5 / 4, 1.25 / 4, 1.5 / 4, 1.375 / 4, 1.25 / 4, 1.125 / 4]
        assert module.rates[12:20] == pytest.approx(third, abs=1e-12)
        assert module.rates[20:] == pytest.approx([(8 - i) / 32 for i in range(8)], abs=1e-12)


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        *(("on_train_batch_end", at) for at in [(0, 8), (2, 2), (2, 4), (2, 6), (2, 8)]),
        *(("on_train_epoch_end", at) for at in [(0, 8), (2, 8), (3, 4)]),
    ],
)
def test_expected_length_is_the_same_after_a_resume(
    tmp_path: Path, at: tuple[int, int], hook: str
) -> None:
    class Continues(Announces):
        """Gives the rest of the epoch after a resume."""

        start = given = 0

        def __iter__(self) -> Any:
            start, self.start, count = self.start, 0, self.epochs.pop(0)
            for self.given in range(start + 1, count + 1):
                yield [torch.randn(2, 3)]
            self.given = 0

        def state_dict(self) -> dict[str, int]:
            return {"start": self.given % lengths[at[0]]}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.start = state["start"]

    lengths, path = (8, 4, 8, 4, 8), tmp_path / "some.ckpt"
    # At the end of an epoch a loader without a state resumes exactly.
    loader = Continues if at[1] < lengths[at[0]] else Announces
    straight, resumed = Recorded(), Recorded()
    trainer_of(SaveInEpoch(path, hook, at=at), max_epochs=5).fit(straight, loader(8, *lengths))
    assert straight.rates == pytest.approx(shares(8, *lengths), abs=1e-12)
    rest = lengths[at[0] + (at[1] == lengths[at[0]]) :]
    trainer_of(max_epochs=5).fit(resumed, loader(8, *rest), ckpt_path=path)
    assert resumed.rates == straight.rates[-len(resumed.rates) :]
    assert len(resumed.rates) == sum(lengths) - sum(lengths[: at[0]]) - at[1]


@pytest.mark.parametrize("given", [1, 3])
def test_batch_that_was_fetched_and_not_trained_shows_no_length(tmp_path: Path, given: int) -> None:
    """A checkpoint of ``on_train_batch_start``: a stateful loader omits the batch on resume."""

    class Skips(Announces):
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    path = tmp_path / "started.ckpt"
    saves = SaveInEpoch(path, "on_train_batch_start", at=(0, given))
    trainer_of(saves, max_epochs=3).fit(Recorded(), Skips(6, 6, 6, 6))
    resumed = Recorded()
    trainer_of(max_epochs=3).fit(resumed, Skips(6, 5 - given, 6, 6), ckpt_path=path)
    assert resumed.rates == pytest.approx(
        [*expected(6, 6, 6)[given:5], *expected(6, 6, 6)[6:]], abs=1e-12
    )


def test_rest_of_an_epoch_after_a_resume_shows_no_length(tmp_path: Path) -> None:
    """A stateful loader of 6 batches, of which an epoch uses 5, begins with the sixth."""

    class Rest(Announces):
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    path, options = tmp_path / "last.ckpt", {"max_epochs": 4, "limit_train_batches": 5}
    saves = SaveInEpoch(path, "on_train_batch_end", at=(0, 5))
    trainer_of(saves, **options).fit(Recorded(), Rest(6, 6, 6, 6, 6))
    resumed = Recorded()
    trainer_of(**options).fit(resumed, Rest(6, 1, 6, 6), ckpt_path=path)
    right = [1 - 1 / 4, *(1 - (epoch + i / 5) / 4 for epoch in (2, 3) for i in range(5))]
    assert resumed.rates == pytest.approx(right, abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*IterableDataset")
@pytest.mark.parametrize("epochs", [1, 2])
def test_budget_in_epochs_ends_with_an_epoch_shorter_than_announced(epochs: int) -> None:
    module = Recorded()
    scheduler = LearningRateScheduler(Linear(), budget=f"{epochs} epochs")
    trainer = L.Trainer(**{**QUIET, "max_steps": -1, "max_epochs": -1}, callbacks=[scheduler])
    trainer.fit(module, DataLoader(ShorterThanAnnounced(), batch_size=2))
    assert len(module.rates) == 6 * epochs


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
@pytest.mark.parametrize(("before", "after"), [(16, 8), (8, 16)])
def test_cooldown_in_epochs_lasts_epochs_of_the_new_loader(
    tmp_path: Path, before: int, after: int, hook: str
) -> None:
    path = tmp_path / "epoch.ckpt"
    saves = SaveInEpoch(path, hook, at=(3, before))
    trainer_of(saves, max_epochs=10, schedule=WarmupStableDecay(warmup=0, decay="10%")).fit(
        Recorded(), batches(before)
    )
    module = Recorded()
    scheduler = LearningRateScheduler(
        WarmupStableDecay(warmup=0, decay="10%"),
        on_resume="cooldown",
        cooldown="2 epochs",
        cooldown_shape="linear",
    )
    trainer = L.Trainer(**{**QUIET, "max_steps": -1, "max_epochs": 10}, callbacks=[scheduler])
    trainer.fit(module, batches(after), ckpt_path=path)
    right = [1 - i / (2 * after) for i in range(2 * after)]
    assert module.rates == pytest.approx(right, abs=1e-12)


# ------------------------------------------------------------------------------- several limits


def test_the_largest_share_of_several_limits_is_used() -> None:
    """Epochs of 6 batches reach max_epochs first, and longer ones max_steps."""
    equal = Recorded((6, 6, 6))
    options: dict[str, Any] = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    trainer_of(max_steps=24, **options).fit(equal)
    assert equal.rates == pytest.approx([1 - step / 18 for step in range(18)])
    # The epochs become longer, so that max_steps ends the run.
    longer = Recorded((6, 12, 12))
    trainer_of(max_steps=24, **options).fit(longer)
    epochs = [e / 3 + b / n / 3 for e, n in enumerate((6, 12, 12)) for b in range(n)][:24]
    assert longer.rates[:6] == pytest.approx([1 - step / 18 for step in range(6)])
    right = [1 - max(share, step / 24) for step, share in enumerate(epochs)]
    assert longer.rates[6:] == pytest.approx(right[6:])
    assert longer.rates[-1] == pytest.approx(1 / 24)
    # The epochs become shorter, so that they end the run that max_steps would have ended.
    shorter = Recorded((12, 3, 3))
    trainer_of(max_steps=20, **options).fit(shorter)
    epochs = [e / 3 + b / n / 3 for e, n in enumerate((12, 3, 3)) for b in range(n)]
    assert shorter.rates[:12] == pytest.approx([1 - step / 20 for step in range(12)])
    right = [1 - max(share, step / 20) for step, share in enumerate(epochs)]
    assert shorter.rates[12:] == pytest.approx(right[12:])
    assert shorter.rates[-1] == pytest.approx(1 / 9)


@pytest.mark.parametrize("at", [(0, 3), (1, 2), (2, 1)])
def test_the_largest_share_is_the_same_after_a_resume(tmp_path: Path, at: tuple[int, int]) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    sizes, path = (12, 3, 3), tmp_path / "some.ckpt"
    straight, resumed = Recorded(sizes), Recorded(sizes)
    saves = SaveInEpoch(path, "on_train_batch_end", at=at)
    trainer_of(saves, max_steps=20, **options).fit(straight)
    trainer_of(max_steps=20, **options).fit(resumed, ckpt_path=path)
    done = sum(sizes[: at[0]]) + at[1]
    assert resumed.rates == pytest.approx(straight.rates[done:])


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_epoch_start"])
def test_epoch_that_lightning_continues_after_its_end_is_reported(
    tmp_path: Path, hook: str
) -> None:
    """With max_steps, Lightning trains a fifth batch of four, and one epoch less."""
    path, options = tmp_path / "end.ckpt", {"max_epochs": 3, "max_steps": 30}

    class SavesOnce(L.Callback):
        def save(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == ("start" in hook):
                trainer.save_checkpoint(path)

    saves = SavesOnce()
    setattr(saves, hook, saves.save)
    trainer_of(saves, **options).fit(Recorded(), batches(4))
    resumed = Recorded()
    with pytest.warns(UserWarning, match=r"^Lightning continues an epoch that had .* 4 batches"):
        trainer_of(**options).fit(resumed, batches(4), ckpt_path=path)
    # What Lightning trains: one batch more than two epochs, and then epoch 3.
    assert resumed.rates == pytest.approx([4 / 12, *(step / 12 for step in (4, 3, 2, 1))])


@pytest.mark.parametrize(("ended", "first"), [(1, 0), (2, 2)])
def test_resume_after_the_last_batch_of_an_epoch_reads_the_length_of_the_next(
    tmp_path: Path, ended: int, first: int
) -> None:
    """Lightning does not call ``on_train_epoch_start``, and begins a longer epoch at batch 2."""
    sizes, path = (4, 2, 6), tmp_path / "last.ckpt"
    options: dict[str, Any] = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    saves = SaveInEpoch(path, "on_train_batch_end", at=(ended - 1, sizes[ended - 1]))
    trainer_of(saves, **options).fit(Recorded(sizes))
    resumed = Recorded(sizes)
    trainer_of(**options).fit(resumed, ckpt_path=path)
    shares = [
        (epoch + batch / sizes[epoch]) / 3
        for epoch in range(ended, 3)
        for batch in range(first if epoch == ended else 0, sizes[epoch])
    ]
    assert resumed.rates == pytest.approx([1 - share for share in shares])
