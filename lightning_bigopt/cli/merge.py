"""``bigopt merge``: merges checkpoints of a run at a constant learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.checks import check_choice
from lightning_bigopt.cli.command import Command
from lightning_bigopt.schedules.shapes import CooldownShape

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["MERGE"]


def make_parser(**texts: Any) -> ArgumentParser:
    """Makes the parser of ``bigopt merge``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(**texts)
    parser.add_argument(
        "checkpoints", type=str, nargs="+", help="Checkpoints: files, or folders of shards."
    )
    parser.add_argument(
        "--emulate",
        type=str,
        default="linear",
        help="Curve of the emulated decay: linear, cosine, 1-sqrt or exponential.",
    )
    parser.add_argument(
        "--over",
        type=str,
        default=None,
        help="Length of the decay before the last checkpoint, such as 20%; all checkpoints by "
        "default.",
    )
    parser.add_argument("--output", type=str, default="merged.ckpt", help="File to write.")
    parser.add_argument(
        "--weights-only",
        type=bool,
        default=True,
        help="Read files with weights_only=True; with false a file can run any code.",
    )
    return parser


def run(options: Namespace) -> None:
    """Merges the checkpoints, writes the file, and prints the coefficients."""
    import torch

    from lightning_bigopt.averaging.merge_checkpoints import merge_checkpoints

    check_choice("emulate", options.emulate, CooldownShape)
    merged = merge_checkpoints(
        options.checkpoints,
        emulate=options.emulate,
        over=options.over,
        weights_only=options.weights_only,
    )
    used = merged["merged"]
    for coefficient, path in zip(used["coefficients"], used["paths"], strict=True):
        print(f"{coefficient:.4f}  {path}")
    for path in used["left_out"]:
        print(f"left out  {path}")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(merged, options.output)
    print(f"wrote {options.output}")


MERGE = Command(
    summary="Merges checkpoints of a run at a constant learning rate, instead of a decay.",
    examples=[
        ("bigopt merge runs/gpt/*.ckpt --over 20%", "the last fifth of the run, as linear decay"),
        ("bigopt merge a.ckpt b.ckpt c.ckpt --emulate 1-sqrt", "the checkpoints given"),
    ],
    parser=make_parser,
    run=run,
)
