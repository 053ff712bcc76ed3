"""The script of the page on loaders resumes as the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "streaming_data.md").read_text(encoding="utf-8")
CALL = """
import sys, warnings
from pathlib import Path
import streaming

warnings.simplefilter("ignore")
for name in ("table", "stateful", "sized stream", "stream"):
    folder = Path("checkpoints", name)
    whole = streaming.train(name, folder)
    resumed = streaming.train(name, folder, folder / "step=5.ckpt")
    lost = [update for update in whole[5:] if update[1] not in [batch for _, batch in resumed]]
    same_rates = [rate for rate, _ in resumed] == [rate for rate, _ in whole[5:]]
    print(name, len(whole), same_rates, resumed == whole[5:], len(lost), sep="|")
"""


@pytest.mark.slow
def test_loaders_resume_as_the_page_says(tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "streaming.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-c", CALL], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if "|" in line] == [
        "table|12|True|True|0",
        "stateful|12|True|True|0",
        "sized stream|12|True|True|0",
        "stream|12|True|False|1",
    ]
