"""Merges the weights of saved checkpoints, in one file each or sharded."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_bigopt.averaging.merge import merge_coefficients
from lightning_bigopt.averaging.weights import merge_weights
from lightning_bigopt.checks import shown
from lightning_bigopt.durations.duration import Duration, DurationLike
from lightning_bigopt.schedules.shapes import CooldownShape

__all__ = ["merge_checkpoints"]

PathOrStr: TypeAlias = str | PathLike[str]

_MODEL = "state_dict"
_RESERVED = "lightning_bigopt."  # how the names of second weights begin
_TRAINING = f"{_RESERVED}ModelAveraging.training."
# A merged checkpoint has no state with which training could continue.
_LEFT_OUT = frozenset({"optimizer_states", "lr_schedulers", "callbacks", "loops", _MODEL})
_STATE = frozenset({"averages", "training"})  # of ModelAveraging
_METADATA = "meta.pt"  # Lightning's file beside the shards


def merge_checkpoints(
    paths: Sequence[PathOrStr],
    *,
    emulate: CooldownShape = "linear",
    over: DurationLike | None = None,
    weights_only: bool = True,
) -> dict[str, Any]:
    """Merges the weights of checkpoints of one run at a constant learning rate.

    The checkpoints are sorted by their number of updates. Of several with the same number, such as
    ``last.ckpt``, the first one is used; merged ones are left out. If the model of a checkpoint is
    an average of ``ModelAveraging``, its training weights are merged.

    Args:
        paths: Files, or folders of sharded checkpoints (FSDP2), of Lightning.
        emulate: Curve of the emulated decay, as for :class:`~lightning_bigopt.Merge`.
        over: Length of the emulated decay before the last checkpoint: percent of the run up to it,
            steps, or samples or tokens that the run has counted. Earlier checkpoints are left out.
            None for all checkpoints.
        weights_only: Whether files are read with ``weights_only=True``; with False a file can run
            any code.

    Returns:
        A checkpoint in one file with the merged weights and the hyperparameters of the last one,
        for ``load_from_checkpoint`` and for evaluations. It has no optimizer states. Its key
        ``merged`` has the paths, their coefficients, and the paths that were left out.

    Raises:
        ValueError: If there is no checkpoint, one cannot be read, their weights have different
            names, or they do not count the unit of ``over``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for step in (10, 20):
        ...         weights = {"scale": torch.tensor([float(step)])}
        ...         torch.save(
        ...             {"global_step": step, "state_dict": weights}, f"{folder}/{step}.ckpt"
        ...         )
        ...     merged = merge_checkpoints([f"{folder}/10.ckpt", f"{folder}/20.ckpt"])
        >>> merged["state_dict"]["scale"].tolist(), merged["global_step"]
        ([15.0], 20)
    """
    if not paths:
        raise ValueError(
            "paths must contain at least one checkpoint, got none; pass files that ModelCheckpoint "
            "has saved"
        )
    unit = "steps" if over is None else Duration.parse(over, name="over").unit
    found: dict[float, Path] = {}
    left_out: list[str] = []
    for path in map(Path, paths):
        checkpoint = _read(path, weights_only=weights_only)
        position = _position(checkpoint, unit, path)
        if "merged" in checkpoint or position in found:
            left_out.append(str(path))
        else:
            found[position] = path
    if not found:
        raise ValueError(
            f"paths must contain a checkpoint that is not a merge, got only merges: {left_out}; "
            "pass the checkpoints that ModelCheckpoint has saved"
        )
    positions = sorted(found)
    begin = None if over is None else positions[-1] - _length(over, positions[-1])
    used = [(place, found[place]) for place in positions if begin is None or place > begin]
    left_out += [str(found[place]) for place in positions[: len(found) - len(used)]]
    coefficients = merge_coefficients([p for p, _ in used], emulate=emulate, begin=begin)
    last = _read(used[-1][1], weights_only=weights_only)
    merged = merge_weights(
        (_weights(path, weights_only=weights_only) for _, path in used), coefficients
    )
    return {
        **{name: value for name, value in last.items() if name not in _LEFT_OUT},
        _MODEL: merged,
        "merged": {
            "paths": [str(path) for _, path in used],
            "coefficients": coefficients,
            "left_out": left_out,
        },
    }


def _length(over: DurationLike, last: float) -> float:
    length = Duration.parse(over)
    if not length.value:
        raise ValueError(f"over must be positive, got {shown(over)}; write '20%' or 500")
    return length.value * last if length.unit == "fraction" else length.value


def _position(checkpoint: Mapping[str, Any], unit: str, path: PathOrStr) -> float:
    """Returns the amount that the run had consumed."""
    if unit in ("steps", "fraction"):
        return float(checkpoint["global_step"])
    states: Mapping[str, Any] = checkpoint.get("callbacks", {})
    clocks = [state["clock"] for state in states.values() if "clock" in state]
    amount = clocks[0].get(unit, 0) if clocks else 0
    if not amount:
        raise ValueError(
            f"over must have a unit that the run has counted, got {unit}, which {path} does not "
            "contain; write it in percent or steps"
        )
    return float(amount)


def _read(path: PathOrStr, *, weights_only: bool) -> dict[str, Any]:
    """Reads a checkpoint without loading the tensors of a file into memory."""
    file = Path(path)
    file = file / _METADATA if file.is_dir() else file
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"paths must load with weights_only=True, got {path} with other objects "
            f"({str(error).splitlines()[0]}); pass weights_only=False if you trust the file"
        ) from None
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"paths must be files or folders of Lightning, got {path}, which cannot be read: "
            f"{str(error).splitlines()[0]}; check the path"
        ) from None
    if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
        raise ValueError(
            f"paths must be checkpoints of Lightning, got {path} without global_step; save with "
            "ModelCheckpoint"
        )
    return checkpoint


def _weights(path: Path, *, weights_only: bool) -> dict[str, Tensor]:
    """Returns the training weights of a checkpoint."""
    if path.is_dir():
        return _sharded_weights(path)
    checkpoint = _read(path, weights_only=weights_only)
    states: Mapping[str, Any] = checkpoint.get("callbacks", {})
    # By its contents, because the key has the name of the class, which may be a subclass.
    averaging = [s for s in states.values() if isinstance(s, dict) and s.keys() >= _STATE]
    training = averaging[0]["training"] if averaging else None
    return {**checkpoint[_MODEL], **(training or {})}


def _sharded_weights(path: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        key.removeprefix(f"{_MODEL}."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(f"{_MODEL}.") and isinstance(entry, TensorStorageMetadata)
    }
    training = [name for name in weights if name.startswith(_TRAINING)]
    replaced = {name.removeprefix(_TRAINING) for name in training}
    wanted = {
        name: weight
        for name, weight in weights.items()
        if name in training or not (name.startswith(_RESERVED) or name in replaced)
    }
    load({_MODEL: wanted}, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(_TRAINING): weight for name, weight in wanted.items()}
