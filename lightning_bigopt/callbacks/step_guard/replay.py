"""Replays a rejected update with the same batches and random numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_bigopt.batching.randomness import preserve_random_state, set_random_state
from lightning_bigopt.checks import check_choice, shown
from lightning_bigopt.gradients.gradient_norms import GradientNorms
from lightning_bigopt.gradients.measure import measure
from lightning_bigopt.trainer_access.packages import classes
from lightning_bigopt.type_checks import check_instance

__all__ = ["Replay", "replay"]

_KEYS = {"version", "window", "precision", "rejected"}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The losses and gradient norms of a replayed update.

    Args:
        loss: Mean loss over the samples of the window on this process.
        losses: Loss of each micro-batch.
        norms: Gradient norms of the mean loss.
        rejected: Description of the rejected update: the fields of ``RejectedUpdate``.

    Example:
        >>> sorted(Replay.__dataclass_fields__)
        ['loss', 'losses', 'norms', 'rejected']
    """

    loss: float
    losses: tuple[float, ...]
    norms: GradientNorms
    rejected: Mapping[str, Any]

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters with a non-finite gradient."""
        pairs = zip(self.norms.names, self.norms.per_tensor.tolist(), strict=True)
        return tuple(name for name, norm in pairs if not math.isfinite(norm))


def replay(
    path: str | PathLike[str],
    module: LightningModule,
    *,
    load: Literal["safe", "pickle"] = "safe",
) -> Replay:
    """Runs the forward and backward passes of a rejected update again.

    The module must have the weights that it had at the update: those of the last checkpoint before
    it, or those of the module after an error, because a skipped update changes no weights. Each
    process writes a file; the gradients are those of the batches in one file. The gradients of the
    module are set to None; its training mode and the random state are restored.

    Args:
        path: A file in the ``forensics`` folder of :class:`~lightning_bigopt.StepGuard`.
        module: Module with the ``training_step`` to run; it needs no Trainer.
        load: ``"safe"`` for batches of tensors in plain containers; ``"pickle"`` for other batches,
            from files that you trust.

    Returns:
        Losses and gradient norms. Synchronizes.

    Raises:
        ValueError: If ``load`` is neither, ``path`` is not a file that StepGuard wrote, the file
            has another version, or it cannot be loaded with ``"safe"``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning.pytorch import Trainer
        >>> from torch import nn, optim
        >>> from lightning_bigopt import StepGuard
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(1, 1)
        ...
        ...     def training_step(self, batch):
        ...         return self.layer(batch).sqrt().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return optim.SGD(self.parameters(), lr=0.1)
        >>> quiet = (
        ...     "enable_checkpointing",
        ...     "enable_progress_bar",
        ...     "enable_model_summary",
        ...     "logger",
        ... )
        >>> model, folder = Model(), tempfile.mkdtemp()
        >>> guard = StepGuard(forensics=folder)
        >>> loader = torch.utils.data.DataLoader(torch.full((1, 1), -1e4))
        >>> _ = model.layer.weight.data.fill_(1.0)
        >>> quiet = {**dict.fromkeys(quiet, False), "accelerator": "cpu"}
        >>> Trainer(**quiet, callbacks=[guard], max_steps=1).fit(model, loader)
        >>> guard.rejections[0].reason
        'the gradient norm is nan'
        >>> replay(Path(folder, "update-00000000-rank0.pt"), model).nonfinite
        ('layer.weight', 'layer.bias')
    """
    check_choice("load", load, ("safe", "pickle"))
    hint = "pass the module with the training_step"
    check_instance("module", module, classes("LightningModule"), hint=hint)
    saved = _load(path, load)
    window = saved["window"]
    samples = sum(micro["samples"] for micro in window)
    mode = module.training
    module.train()
    module.zero_grad()
    losses = []
    try:
        with (
            preserve_random_state(module.device),
            _autocast(saved["precision"], module.device),
            _unlogged(module),
        ):
            for micro in window:
                set_random_state(micro["random"], module.device)
                loss = _loss(module, micro["batch"], micro["index"])
                (loss * (micro["samples"] / samples)).backward()
                losses.append(loss.item())
        norms = measure(module.named_parameters())
    finally:
        module.zero_grad()
        module.train(mode)
    weights = [micro["samples"] / samples for micro in window]
    return Replay(
        loss=sum(weight * loss for weight, loss in zip(weights, losses, strict=True)),
        losses=tuple(losses),
        norms=norms,
        rejected=saved["rejected"],
    )


def _load(path: str | PathLike[str], load: Literal["safe", "pickle"]) -> dict[str, Any]:
    hint = "pass a file of the forensics folder of StepGuard"
    check_instance("path", path, (str, PathLike), hint=hint)
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no file"
        raise ValueError(f"path must be a file, got {shown(path)}, which is {found}; {hint}")
    if (problem := _foreign(path)) is not None:
        raise ValueError(f"path must be a file of StepGuard, got {shown(path)}{problem}; {hint}")
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=load == "safe")
    except UnpicklingError as error:
        if load == "pickle":
            raise
        raise ValueError(
            f"load must be 'pickle' for {path}, got 'safe': its batches hold other objects than "
            "tensors in plain containers; pass load='pickle' if you trust the file"
        ) from error
    if not isinstance(saved, dict) or not saved.keys() >= _KEYS:
        raise ValueError(f"path must be a file of StepGuard, got {shown(path)}; {hint}")
    if saved["version"] != 1:
        raise ValueError(
            f"path must be a file of version 1, got version {shown(saved['version'])} in {path}; "
            "replay it with the version of lightning_bigopt that wrote it"
        )
    return saved


def _foreign(path: str | PathLike[str]) -> str | None:
    """Returns why a file was not written by ``torch.save`` of StepGuard; None if it was.

    The names of the keys are read from the pickle without running it, so that another file is not
    recommended for ``load="pickle"``, which would run its code.
    """
    try:
        with ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = archive.read(name)
    except (BadZipFile, OSError, ValueError, EOFError):
        return ", which is damaged or no file of torch"
    try:
        texts = {argument for _, argument, _ in genops(content) if isinstance(argument, str)}
    except (ValueError, IndexError, UnicodeError):
        return ", which is damaged"
    return None if texts >= _KEYS else ""


def _loss(module: LightningModule, batch: Any, index: int) -> Tensor:
    arguments = [module.transfer_batch_to_device(batch, module.device, 0)]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(index)
    output = module.training_step(*arguments)
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step must return a loss for a replay, got {shown(output)}; manual "
            "optimization cannot be replayed"
        )
    return loss


@contextlib.contextmanager
def _autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Runs the block under the autocast of a Lightning precision; others change nothing."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in kinds:
        yield
        return
    with torch.autocast(device.type, dtype=kinds[precision]):
        yield


@contextlib.contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """Disables ``log`` and ``log_dict`` of a module, which would raise outside a running loop."""
    names = ("log", "log_dict")
    kept = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(dict.fromkeys(names, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(kept)
