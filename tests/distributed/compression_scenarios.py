"""Compressed gradients on two processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    fp16_compress_hook,
)
from torch.utils.data import DataLoader, Sampler

from lightning_bigopt import (
    BF16,
    FP16,
    BatchSizeScheduler,
    BatchSizeSteps,
    ConstantBatchSize,
    GlobalBatchLoader,
    GradientClipping,
    GradientCompression,
    GradientNoiseScale,
    NonFinite,
    NormClip,
    PowerSGD,
    StepGuard,
    TopK,
)
from tests.distributed.batch_scenarios import QuadraticNoise, noise_loader
from tests.distributed.scenarios import fit, in_order, module
from tests.helpers import ManualUpdates, Regression, cpu_precision
from tests.mean_gradients import MICRO, Means, first_element, mean_data

COMPRESSORS = {
    "topk": TopK(keep=0.1),
    "powersgd": PowerSGD(rank=1),
    "fp16": FP16(),
    "bf16": BF16(),
}
RAMP = BatchSizeSteps({"0%": 4, "3 steps": 8, "6 steps": 12})


class Wide(L.LightningModule):
    """A network with matrices that PowerSGD compresses; keeps gradients and metrics."""

    def __init__(self, *, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 3))
        self.unused = nn.Linear(4, 16)
        self.uses_unused = 0  # bit 1: on the first process, bit 2: on the second one
        self.optimizer = optimizer
        self.bad: int | None = None
        self.bad_factor = math.nan
        self.bytes: list[tuple[float, float]] = []
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        if self.optimizer == "fused":
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = nn.functional.mse_loss(self.net(x), y / (index + 1).unsqueeze(1))
        if self.uses_unused & (1 << self.global_rank):
            loss = loss + self.unused(x).square().mean()
        return loss * self.bad_factor if self.bad == batch_idx and self.global_rank else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(grads)) if grads else math.nan)


def flat(model: nn.Module) -> list[float]:
    return [v for p in model.parameters() for v in p.detach().float().flatten().tolist()]


def residuals(callback: GradientCompression) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in callback.residuals.items()}


def data(size: int = 64, micro: int = 2) -> GlobalBatchLoader:
    return GlobalBatchLoader(Regression(size), micro_batch_size=micro)


def unused() -> DDPStrategy:
    return DDPStrategy(find_unused_parameters=True)


def train(
    model: Wide, *callbacks: Any, ckpt: Any = None, policy: Any = RAMP, **options: Any
) -> L.Trainer:
    options = {"max_steps": 10, "strategy": unused(), "max_epochs": -1, **options}
    loader = options.pop("data", None) or data()
    extra = [] if policy is None else [BatchSizeScheduler(policy)]
    return fit("ddp", model, loader, *extra, *callbacks, ckpt=ckpt, **options)


class Saves(L.Callback):
    """Saves after an update, and again after each further batch of the next window."""

    def __init__(self, path: Path, *, at: int) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def resumed(out: Path) -> Any:
    """Compares resumed runs with uninterrupted ones to the bit; saves within a window."""
    found = {}
    cases = [("topk", "32-true"), ("topk", "16-mixed"), ("powersgd", "32-true")]
    cases += [("powersgd", "bf16-mixed"), ("fp16", "32-true"), ("bf16", "16-mixed")]
    for name, precision in cases:
        runs, path = [], out / f"resumed {name} {precision}.ckpt"
        for ckpt in (None, path):
            model, callback = Wide(), GradientCompression(COMPRESSORS[name])
            options = cpu_precision(precision)
            if precision == "16-mixed":  # the scale changes while there are residuals
                options["plugins"][0].scaler.set_growth_interval(3)
            clipping = GradientClipping(NormClip(max_norm=0.5))
            saves = [] if ckpt else [Saves(path, at=4)]
            train(model, callback, clipping, *saves, ckpt=ckpt, **options)
            runs.append((flat(model), residuals(callback)))
        found[f"{name} {precision}"] = {
            "equal": runs[0] == runs[1],
            "finite": all(map(math.isfinite, runs[0][0])),
            "weights": runs[0][0],
        }
    return found


def in_order_data(size: int = 32) -> Any:
    return DataLoader(Regression(size), batch_size=2, sampler=in_order(size))


def plain(model: Wide, *callbacks: Any, **options: Any) -> L.Trainer:
    """Trains on the data in order, without a batch policy."""
    options = {"use_distributed_sampler": False, "max_epochs": 1, "max_steps": -1, **options}
    data = options.pop("data", None) or in_order_data()
    return train(model, *callbacks, policy=None, data=data, **options)


def trained(out: Path) -> Any:
    """Trains with each compressor; the test repeats it in a plain loop."""
    found = {}
    for name, compressor in (
        ("topk", TopK(keep=0.1)),
        ("all", TopK(keep=1.0)),
        ("late", TopK(keep=0.1, start="5 steps")),
        ("fp16", FP16()),
        ("bf16", BF16()),
        ("dense", None),
    ):
        model = Wide()
        plain(model, *([] if compressor is None else [GradientCompression(compressor)]))
        found[name] = flat(model.net)
    return found


class TorchPowerSGD(Wide):
    """Registers torch's own hook."""

    def on_fit_start(self) -> None:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=3, start_powerSGD_iter=3, min_compression_rate=2
        )

        def hook(state: Any, bucket: Any) -> Any:
            future = powerSGD_hook.powerSGD_hook(state, bucket)
            future.wait()  # else gloo mixes up its collectives with those of DDP
            return future

        hook.__annotations__.clear()
        self.trainer.strategy.model.register_comm_hook(state, hook)


def power_sgd(out: Path) -> Any:
    """Trains with torch's PowerSGD and with ours, from equal factors."""
    original = torch.randn

    def equal(*shape: Any, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(math.prod(shape))
        return original(*shape, generator=generator)

    theirs, ours, dense = TorchPowerSGD(), Wide(), Wide()
    torch.randn = equal
    try:
        plain(theirs)
        plain(ours, GradientCompression(PowerSGD(rank=3, start="3 steps")))
    finally:
        torch.randn = original
    plain(dense)
    return {"theirs": flat(theirs.net), "ours": flat(ours.net), "dense": flat(dense.net)}


class Without(Sampler[int]):
    """The samples of this process in order, without those of one batch."""

    def __init__(self, batch: int) -> None:
        rank = int(os.environ["RANK"])
        indices = list(range(rank, 32, 2))
        self.indices = indices[: 2 * batch] + indices[2 * batch + 2 :]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def skipped(out: Path) -> Any:
    """Compares a run with a bad batch on one process with a run without this batch."""
    found = {}
    for name, optimizer, precision in (
        ("topk", "sgd", "32-true"),
        ("powersgd", "sgd", "32-true"),
        ("topk", "fused", "32-true"),
        ("powersgd", "sgd", "16-mixed"),
        ("topk", "sgd", "bf16-mixed"),
        ("fp16", "sgd", "32-true"),
    ):
        compressor, runs = COMPRESSORS[name], []
        for bad in (3, None):
            model, callback = Wide(optimizer=optimizer), GradientCompression(compressor)
            model.bad = bad
            if name == "fp16":  # a finite gradient beyond the range of float16
                model.bad_factor = 1e9
            # The kernel of a fused optimizer skips by itself.
            guards = [] if optimizer == "fused" else [StepGuard([NonFinite()])]
            clipping = GradientClipping(NormClip(max_norm=0.5))
            options = cpu_precision(precision)
            if bad is None:
                options["data"] = DataLoader(Regression(32), batch_size=2, sampler=Without(3))
            plain(model, callback, clipping, *guards, **options)
            runs.append((flat(model), residuals(callback)))
        found[f"{name} {optimizer} {precision}"] = {
            "equal": runs[0] == runs[1],
            "finite": all(map(math.isfinite, runs[0][0])),
        }
    return found


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the bytes of floats and positions that are handed to the collectives."""
    sizes: list[int] = []
    originals = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            sizes.append(tensor.numel() * tensor.element_size())
            return originals[name](*args, **options)

        return run

    for name in originals:
        setattr(distributed, name, counting(name))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


class CountsBytes(Wide):
    """Keeps the bytes of each backward pass, and the logged ones."""

    def on_before_backward(self, loss: Any) -> None:
        self.before = sum(self.sizes)

    def on_after_backward(self) -> None:
        self.handed.append(sum(self.sizes) - self.before)


def communicated(out: Path) -> Any:
    """Compares the logged bytes with those that the collectives receive."""
    found = {}
    for name, compressor in {**COMPRESSORS, "late": TopK(keep=0.1, start="4 steps")}.items():
        model, logger = CountsBytes(), CSVLogger(out, name=f"bytes {name}", version=0)
        model.handed = []
        with counted() as model.sizes:
            callback = GradientCompression(compressor)
            plain(
                model,
                callback,
                logger=logger,
                log_every_n_steps=1,
                strategy=unused(),
            )
        found[name] = {"handed": model.handed, "path": str(Path(logger.log_dir) / "metrics.csv")}
    return found


def error_of(run: Any, *args: Any, **options: Any) -> str:
    """Returns the message of the ValueError that a function raises; empty for none."""
    try:
        run(*args, **options)
    except ValueError as error:
        return str(error)
    return ""


class UserHook(Wide):
    """Registers a hook in on_fit_start, which runs after that of callbacks."""

    def on_fit_start(self) -> None:
        self.calls = []

        def hook(state: Any, bucket: Any) -> Any:
            state.append(bucket.buffer().numel())
            return fp16_compress_hook(None, bucket)

        hook.__annotations__.clear()
        self.trainer.strategy.model.register_comm_hook(self.calls, hook)


class Registers(L.Callback):
    """Registers a hook before the callbacks of this package."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.model.register_comm_hook(None, allreduce_hook)


def hooks(out: Path) -> Any:
    """Shares DDP's only hook between two callbacks, and with hooks of the user."""
    found: dict[str, Any] = {"errors": []}
    for name, build, callbacks in (
        ("none", Wide, []),
        ("noise", Wide, [GradientNoiseScale(minimum_updates=2)]),
        ("user", UserHook, []),
        ("user and noise", UserHook, [GradientNoiseScale(minimum_updates=2)]),
        ("fp16", Wide, [GradientCompression(FP16())]),
        (
            "fp16 and noise",
            Wide,
            [GradientNoiseScale(minimum_updates=2), GradientCompression(FP16())],
        ),
    ):
        model = build()
        plain(model, *callbacks)
        noises = [c for c in callbacks if isinstance(c, GradientNoiseScale)]
        found[name] = {
            "weights": flat(model.net),
            "calls": len(getattr(model, "calls", ())),
            "noise": [noises[0].report.noise, noises[0].report.signal] if noises else None,
            "measured": noises[0].estimator.updates if noises else 0,
        }
    given = DDPStrategy(ddp_comm_hook=fp16_compress_hook, find_unused_parameters=True)
    for build, callbacks, strategy in (
        (UserHook, [GradientCompression(FP16())], unused()),
        (Wide, [GradientCompression(FP16())], given),
        (Wide, [Registers(), GradientCompression(FP16())], unused()),
        (Wide, [Registers(), GradientNoiseScale()], unused()),
    ):
        found["errors"].append(error_of(plain, build(), *callbacks, strategy=strategy))
    return found


def noise(out: Path) -> Any:
    """Measures the noise scale of gradients that are compressed."""
    rank, found = int(os.environ["RANK"]), {}
    for name, compressor in (
        ("dense", None),
        ("fp16", FP16()),
        ("late top k", TopK(keep=0.1, start="50%")),
        ("top k", TopK(keep=0.1)),
    ):
        scale = GradientNoiseScale(decay=0.999)
        extra = [] if compressor is None else [GradientCompression(compressor)]
        fit("ddp", QuadraticNoise(), noise_loader(2, rank), scale, *extra, max_steps=300)
        report, updates = scale.report, scale.estimator.updates
        found[name] = {
            "scale": report.noise_scale,
            "error": report.standard_error,
            "updates": updates,
        }
    return found


def graphs(out: Path) -> Any:
    """Trains with parameters that one process or none uses, and with other options of DDP."""
    found = {}
    for name, compressor in (("topk", COMPRESSORS["topk"]), ("powersgd", COMPRESSORS["powersgd"])):
        for case, uses, options in (
            ("one", 1, {"find_unused_parameters": True}),
            ("unused", 0, {"find_unused_parameters": True}),
            ("everybody", 3, {}),
            ("views", 3, {"gradient_as_bucket_view": True}),
            ("static", 3, {"static_graph": True}),
            ("small buckets", 3, {"bucket_cap_mb": 0.0001}),
        ):
            model, callback = Wide(), GradientCompression(compressor)
            model.uses_unused = uses
            plain(model, callback, strategy=DDPStrategy(**options))
            found[f"{name} {case}"] = {
                "weights": flat(model),
                "residual": residuals(callback).get("unused.weight"),
                "grad": None if model.unused.weight.grad is None else "some",
            }
        model, callback = Wide(), GradientCompression(compressor)
        model.uses_unused = 3
        strategy = unused()
        first = plain(model, callback, strategy=strategy, max_epochs=1)
        model.uses_unused = 0  # no process uses it from now on: DDP does not write its gradient
        kept = residuals(callback)["unused.weight"]
        first.fit_loop.max_epochs = 2
        first.fit(model, in_order_data())
        found[f"{name} left"] = kept == residuals(callback)["unused.weight"], max(map(abs, kept))
    return found


def other_sizes(out: Path) -> Any:
    """Saves on two processes, for a resume on one."""
    model, callback = Wide(), GradientCompression(TopK(keep=0.1))
    train(model, callback, Saves(out / "two.ckpt", at=4))
    error_saves = ModelCheckpoint(out / "error", save_on_exception=True)

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                raise ArithmeticError("on purpose")

    saver = GradientCompression(TopK(keep=0.1))
    with suppress(ArithmeticError):
        train(Wide(), saver, error_saves, Fails(), enable_checkpointing=True)
    return {
        "path": str(out / "two.ckpt"),
        "folder": str(out / "error"),
        "residuals": residuals(saver),
    }


class Manual(ManualUpdates, Wide):
    """Manual optimization, with one backward pass for each update."""


def refused(out: Path) -> Any:
    """Collects the errors of strategies and modules; trains with manual optimization."""
    errors = []
    half, top_k = GradientCompression(FP16()), GradientCompression(TopK(keep=0.1))
    cases: list[Any] = [("fsdp2", module("fsdp2"), half), ("fsdp1", Wide(), half)]
    for name, model, callback in [*cases, ("ddp", Manual(), top_k)]:
        errors.append(error_of(fit, name, model, in_order_data(), callback, max_steps=1))
    found: dict[str, Any] = {"errors": errors}
    for name, callbacks in (("dense", []), ("fp16", [GradientCompression(FP16())])):
        model = Manual()
        plain(model, *callbacks)
        found[f"manual {name}"] = flat(model.net)
    return found


def rescaled(out: Path) -> Any:
    """Trains with windows that a batch policy rescales; the gradient does not depend on weights."""
    rank, found = int(os.environ["RANK"]), {}
    for name, compressor in (("topk", TopK(keep=0.02)), ("powersgd", PowerSGD(rank=1))):
        for case, weight in (("samples", None), ("weights", first_element)):
            model, callback = Means(), GradientCompression(compressor)
            policy = BatchSizeScheduler(ConstantBatchSize(4 * MICRO), weight=weight)
            loader = DataLoader(mean_data(33 + 2 * rank, seed=rank), batch_size=MICRO)  # type: ignore[arg-type]
            options = {"use_distributed_sampler": False, "max_epochs": 2, "max_steps": -1}
            fit("ddp", model, loader, callback, policy, **options)
            found[f"{name} {case}"] = {
                "weight": model.weight.flatten().tolist(),
                "residual": callback.residuals["weight"].flatten().tolist(),
            }
    return found


NAMES = [
    "resumed",
    "trained",
    "power_sgd",
    "skipped",
    "communicated",
    "hooks",
    "noise",
    "graphs",
    "other_sizes",
    "refused",
    "rescaled",
]
