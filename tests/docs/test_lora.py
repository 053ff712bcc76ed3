"""The LoRA script of the page trains as a loop in torch does, and resumes to the bit."""

from __future__ import annotations

import csv
import importlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "lora.md").read_text(encoding="utf-8")
TAGS = ("step", "optim/lr/decay", "grad_norm/total", "layers/grad_norm/second", "train_loss")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # of PEFT
    pytest.mark.filterwarnings("ignore:.*LeafSpec. is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "lora.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lora")
    del sys.modules["lora"]


def logged(version: int) -> list[dict[str, str]]:
    path = Path("runs", "lora", f"version_{version}", "metrics.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return [{tag: row[tag] for tag in TAGS} for row in csv.DictReader(file)]


def column(rows: list[dict[str, str]], tag: str) -> list[float]:
    return [float(row[tag]) for row in rows if row[tag]]


def weights(model: nn.Module, *, trained: bool) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad is trained}


def train_in_torch(lora: ModuleType) -> tuple[nn.Module, list[float], list[float]]:
    """Trains 20 updates in a loop without the package; the batch doubles after 10 updates."""
    torch.manual_seed(0)
    model = lora.LoRA()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.01)
    batches, rates, norms = iter(lora.make_loader()), [], []
    for step in range(20):
        accumulate = 1 if step < 10 else 2
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 2) / 18))
        factor = step / 2 if step < 2 else cosine
        optimizer.param_groups[0]["lr"] = 0.01 * factor * math.sqrt(accumulate)
        optimizer.zero_grad()
        for _ in range(accumulate):
            (tokens,) = next(batches)
            logits = model.model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
            (loss / accumulate).backward()
        norms.append(nn.utils.clip_grad_norm_(trained, 0.02).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return model, rates, norms


def test_script_trains_the_adapters_as_a_loop_in_torch_does(lora):
    base = {name: p.clone() for name, p in lora.make_base().named_parameters()}
    made = lora.train()
    expected, rates, norms = train_in_torch(lora)

    rows = logged(0)
    assert column(rows, "optim/lr/decay") == pytest.approx(rates)
    assert column(rows, "grad_norm/total") == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.02
    torch.testing.assert_close(
        weights(made, trained=True), weights(expected, trained=True), rtol=0, atol=1e-6
    )
    frozen = weights(made, trained=False)
    assert len(frozen) == len(base)
    for name, value in base.items():
        plain = name.replace("c_attn.", "c_attn.base_layer.")
        name_in_peft = f"model.base_model.model.{name}"
        same = frozen.get(name_in_peft, frozen.get(f"model.base_model.model.{plain}"))
        assert torch.equal(same, value), name

    tokens = next(iter(lora.make_loader()))[0]
    before = made.model(input_ids=tokens).logits
    merged = made.model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, before, rtol=0, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("step", [7, 14])
def test_resumed_run_equals_the_one_that_is_not_stopped(lora, step):
    expected = weights(lora.train(), trained=True)
    (path,) = Path("runs/checkpoints").glob(f"*step={step}.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(expected)
    complete = Path("complete.ckpt")
    torch.save(lora.LoRA().state_dict(), complete)
    # With both moments of Adam the checkpoint of the adapters is smaller than the weights alone.
    assert path.stat().st_size < complete.stat().st_size / 4

    resumed = weights(lora.train(checkpoint=str(path)), trained=True)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert logged(1) == [row for row in logged(0) if int(row["step"]) >= step]
