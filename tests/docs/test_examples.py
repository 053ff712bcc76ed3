"""Every Python block of the site runs, and gives the text block that follows it.

The blocks of a page share one namespace, in order. A text block right after a Python block is the
error that it raises, or a part of what it prints or logs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    *(f"{name}.md" for name in ("index", "start", "errors", "faq", "algorithms")),
    *(
        f"guides/{name}.md"
        for name in ("averaging", "workflows", "loggers", "launchers", "optimizers", "single_parts")
    ),
    *(
        f"recipes/{name}.md"
        for name in ("huggingface_trainer", "timm", "megatron", "gpt", "resnet", "speech", "gan")
    ),
]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ERROR = re.compile(r"[A-Z]\w*Error: ")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Code, the line on which it starts, and the text that follows it."""

    line: int
    code: str
    text: str | None

    @property
    def raises(self) -> bool:
        return self.text is not None and _ERROR.match(self.text) is not None


def blocks(page: str) -> Iterator[Block]:
    fences = list(_FENCE.finditer(page))
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[1] == "python":
            is_text = following is not None and following[1] == "text"
            line = page.count("\n", 0, fence.start(2))
            text = following[2].strip() if following is not None and is_text else None
            yield Block(line=line, code=fence[2], text=text)


def run(block: Block, namespace: dict[str, object], *, page: str) -> None:
    # Leading newlines, so that a traceback shows the line of the page.
    code = compile("\n" * block.line + block.code, page, "exec")
    exec(code, namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_page_runs_and_gives_the_shown_output(
    page, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # one page reads the command line
    caplog.set_level(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks((DOCS / page).read_text()):
        caplog.clear()
        capsys.readouterr()
        if block.raises:
            with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
                run(block, namespace, page=page)
            assert f"{type(caught.value).__name__}: {caught.value}" == block.text
        else:
            run(block, namespace, page=page)
            if block.text is not None:
                assert block.text in capsys.readouterr().out + caplog.text


def test_code_block_that_raises_no_shown_error_fails():
    found = list(blocks((DOCS / "errors.md").read_text()))
    assert sum(block.raises for block in found) >= 12
