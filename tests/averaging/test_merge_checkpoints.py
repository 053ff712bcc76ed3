"""Merging saved checkpoints, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_bigopt import (
    EMA,
    Constant,
    LearningRateScheduler,
    ModelAveraging,
    OptimizationMonitor,
)
from lightning_bigopt.averaging import merge_checkpoints
from lightning_bigopt.cli.__main__ import main
from tests.engine.fake_averaging import Looked, copies
from tests.helpers import QUIET, loader

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def train(folder: Path, *callbacks: Any) -> Looked:
    """Trains ten updates and saves after each of them."""
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {**QUIET, "enable_checkpointing": True, "max_steps": 10}
    module = Looked()
    L.Trainer(**options, callbacks=[*callbacks, saves]).fit(module, loader(40, 2))
    return module


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*.ckpt"))


def mean(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([w[n].double() for w in weights]).mean(0).float() for n in weights[0]}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[n], other[n], atol=1e-6) for n in one.keys() | other.keys())


@pytest.mark.parametrize("callbacks", [[], [ModelAveraging(EMA(3))]])
def test_the_training_weights_of_the_last_part_are_merged(tmp_path: Path, callbacks: Any) -> None:
    module = train(tmp_path, *callbacks)
    merged = merge_checkpoints(files(tmp_path), over="40%")
    assert close(merged["state_dict"], mean(module.trained[6:]))
    assert merged["merged"]["coefficients"] == pytest.approx([0.25] * 4)
    assert [Path(p).stem for p in merged["merged"]["paths"]] == [f"step={i}" for i in range(7, 11)]
    assert len(merged["merged"]["left_out"]) == 6
    assert merged["global_step"] == 10
    assert not {"optimizer_states", "callbacks", "loops"} & merged.keys()


def test_samples_that_the_run_has_counted(tmp_path: Path) -> None:
    module = train(tmp_path, LearningRateScheduler(Constant()), OptimizationMonitor())
    merged = merge_checkpoints(files(tmp_path), over="6 samples")
    assert close(merged["state_dict"], mean(module.trained[7:]))


def test_the_command_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: Any) -> None:
    module = train(tmp_path / "run")
    output = tmp_path / "new" / "merged.ckpt"
    paths = [str(path) for path in files(tmp_path / "run")]
    assert main(["merge", *paths, "--over", "30%", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("0.3333  ") == 3
    assert printed.count("left out  ") == 7
    loaded = Looked.load_from_checkpoint(output, weights_only=True)
    assert close(copies(loaded), mean(module.trained[7:]))
    trainer = L.Trainer(**QUIET)
    trainer.validate(Looked(), loader(2, 2), ckpt_path=output, weights_only=True, verbose=False)


def save(folder: Path, step: int, **entries: Any) -> Path:
    path = folder / f"{step}.ckpt"
    torch.save({"global_step": step, "state_dict": {"w": torch.ones(1)}, **entries}, path)
    return path


def test_errors_name_the_file(tmp_path: Path, capsys: Any) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    again = tmp_path / "again.ckpt"
    torch.save({"global_step": 1, "state_dict": {"w": torch.ones(1)}}, again)
    merged = tmp_path / "merged.ckpt"
    torch.save(merge_checkpoints([one, two, again]), merged)
    result = merge_checkpoints([again, one, two, merged])["merged"]
    assert result["left_out"] == [str(one), str(merged)]
    other = save(tmp_path, 3, state_dict={"v": torch.ones(1)})
    plain = tmp_path / "plain.pt"
    torch.save({"w": torch.ones(1)}, plain)
    text = tmp_path / "text.ckpt"
    text.write_text("no checkpoint")
    unsafe = save(tmp_path, 4, hyper_parameters={"path": Path("a")})
    for paths, options, message in (
        ([], {}, "paths must contain at least one checkpoint"),
        ([merged], {}, "got only merges: .*merged.ckpt"),
        ([two, other], {}, "all copies must have the same names, got 'v'"),
        ([one, plain], {}, "plain.pt without global_step"),
        ([one, text], {}, "text.ckpt"),
        ([one, tmp_path / "none.ckpt"], {}, "none.ckpt, which cannot be read"),
        ([one, two], {"over": "5 samples"}, "got samples, which .* does not contain"),
        ([one, two], {"over": 0}, "over must be positive"),
        ([one, two], {"emulate": "sqrt"}, "emulate must be"),
        ([one, unsafe], {}, "4.ckpt with other objects.*weights_only=False"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_checkpoints(paths, **options)
    assert merge_checkpoints([one, unsafe], weights_only=False)["global_step"] == 4
    assert main(["merge", str(one), str(text)]) == 1
    assert "bigopt: error: paths must" in capsys.readouterr().err
