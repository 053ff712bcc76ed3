"""Small models on real data, trained clean or with gradients multiplied at some updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_bigopt.examples.gpt import BytesGPT
from lightning_bigopt.examples.text import read_sources
from lightning_bigopt.gradients import (
    ClippingRule,
    Detector,
    clip_gradients_,
    inspect,
    record,
)

Kind: TypeAlias = Literal["LSTM", "CNN", "GPT", "MLP"]
KINDS: tuple[Kind, ...] = ("LSTM", "CNN", "GPT", "MLP")
OPTIMIZERS = ("SGD", "AdamW")
LENGTH = 32
TRAINING_DIGITS = 1437
# The best of a grid with factors of three, by the validation loss after a warm-up.
LEARNING_RATES: dict[tuple[str, str], float] = {
    ("LSTM", "SGD"): 3.0,
    ("LSTM", "AdamW"): 0.03,
    ("CNN", "SGD"): 0.1,
    ("CNN", "AdamW"): 0.01,
    ("GPT", "SGD"): 0.3,
    ("GPT", "AdamW"): 0.01,
    ("MLP", "SGD"): 0.1,
    ("MLP", "AdamW"): 0.003,
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(images, dtype=torch.float32) / 16)[order], torch.tensor(labels)[order]


@cache
def text(split: Literal["train", "val"]) -> Tensor:
    return torch.frombuffer(bytearray(read_sources(split)), dtype=torch.uint8)


def windows(split: Literal["train", "val"], size: int, rng: torch.Generator) -> Tensor:
    data = text(split)
    starts = torch.randint(len(data) - LENGTH - 1, (size, 1), generator=rng)
    return data[starts + torch.arange(LENGTH + 1)].long()


class Recurrent(nn.Module):
    """An LSTM over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.cells = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cells(self.embed(x))[0])
        return logits


def convolutions() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    start, end = nn.Unflatten(1, (1, 8, 8)), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        start, *block(1, 16), nn.MaxPool2d(2), *block(16, 32), *end, nn.Linear(32, 10)
    )


def perceptron() -> nn.Module:
    hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def gpt() -> nn.Module:
    return BytesGPT(width=32, layers=2, heads=2, length=LENGTH)


MODELS = {"LSTM": Recurrent, "CNN": convolutions, "GPT": gpt, "MLP": perceptron}


@dataclass(frozen=True)
class Result:
    """A run: norms before clipping, losses, rejected updates and the validation loss."""

    norms: list[float]
    losses: list[float]
    rejected: set[int]
    validation: float


@dataclass(frozen=True)
class Task:
    """A model with its optimizer and its schedule of the learning rate."""

    kind: Kind
    optimizer: str
    warmup: bool = True
    size: int | None = None
    """Samples in a batch; 16 windows of text or 32 digits by default."""
    noise: float = 0.0
    """The fraction of the labels of digits that are random."""

    def __str__(self) -> str:
        warmup = "warm-up" if self.warmup else "no warm-up"
        size = "" if self.size is None else f", batch {self.size}"
        noise = "" if not self.noise else f", {self.noise:.0%} of the labels random"
        return f"{self.kind}, {self.optimizer}, {warmup}{size}{noise}"

    def train(
        self,
        seed: int,
        updates: int,
        *,
        bad: Mapping[int, float] | None = None,
        clip: ClippingRule | None = None,
        detectors: tuple[Detector, ...] = (),
    ) -> Result:
        """Trains once; the gradient is multiplied at the bad updates, before clipping and guard."""
        torch.manual_seed(seed)
        model, rng = MODELS[self.kind](), torch.Generator().manual_seed(seed)
        parameters = list(model.parameters())
        optimizer = self._optimizer(parameters)
        clip_state = clip.initial_state() if clip is not None else {}
        states = [detector.initial_state() for detector in detectors]
        norms: list[float] = []
        losses: list[float] = []
        rejected = set()
        for update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(update / updates)
            loss = self._loss(model, self._batch(rng))
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            if factor := (bad or {}).get(update):
                torch._foreach_mul_(gradients, factor)
            norms.append(nn.utils.get_total_norm(gradients).item())
            losses.append(loss.item())
            readings: Any = {"norm": norms[-1], "loss": losses[-1]}
            verdict = inspect(detectors, states, readings)
            record(detectors, states, readings, verdict)
            if verdict is not None:
                rejected.add(update)
                continue
            if clip is not None:
                clip_gradients_(parameters, clip, state=clip_state)
            optimizer.step()
        return Result(norms, losses, rejected, self._validation_loss(model))

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr = LEARNING_RATES[self.kind, self.optimizer]
        if self.optimizer == "SGD":
            return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
        return torch.optim.AdamW(
            parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
        )

    def _learning_rate(self, share: float) -> float:
        """A constant, or a linear warm-up and a cosine that ends at a tenth."""
        lr = LEARNING_RATES[self.kind, self.optimizer]
        if not self.warmup:
            return lr
        if share < 0.1:
            return lr * share / 0.1
        return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (share - 0.1) / 0.9)))

    def _batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.kind in {"LSTM", "GPT"}:
            found = windows("train", self.size or 16, rng)
            return found[:, :-1], found[:, 1:]
        picks = torch.randint(TRAINING_DIGITS, (self.size or 32,), generator=rng)
        images, labels = digits()[0][picks], digits()[1][picks]
        if self.noise:
            wrong = torch.rand(len(picks), generator=rng) < self.noise
            labels = torch.where(wrong, torch.randint(10, labels.shape, generator=rng), labels)
        return images, labels

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    def _validation_loss(self, model: nn.Module) -> float:
        if self.kind in {"LSTM", "GPT"}:
            found = windows("val", 512, torch.Generator().manual_seed(7))
            batch = found[:, :-1], found[:, 1:]
        else:
            batch = digits()[0][TRAINING_DIGITS:], digits()[1][TRAINING_DIGITS:]
        model.eval()
        with torch.no_grad():
            return self._loss(model, batch).item()


CELLS = tuple(
    Task(kind, optimizer, warmup)
    for kind in KINDS
    for optimizer in OPTIMIZERS
    for warmup in (True, False)
)
