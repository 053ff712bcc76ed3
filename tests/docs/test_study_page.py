"""The script with study() on the page of hyperparameter search runs, and its trials train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes" / "hyperparameter_search.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_scripts_of_the_page_run(tmp_path: Path):
    script, trunk = re.findall(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[:2]
    (search,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "search.py").write_text(search)
    main = 'if __name__ == "__main__":'
    assert main in script
    both = script.replace(main, f"{trunk}print(found)\n{main}")
    both = both.replace("trials=8", "trials=2").replace(
        'budgets=["25%"', 'trials=2, budgets=["25%"'
    )
    (tmp_path / "tune.py").write_text(both)
    run = subprocess.run(
        [sys.executable, "tune.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "shared trunks saved" in run.stdout
    assert "<svg" in (tmp_path / "study.html").read_text()
    stored = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert len(stored.trials) == 2
    assert set(stored.best_params) == {
        "lr",
        "schedule.warmup",
        "clip.max_norm",
        "global_batch_size",
        "optimizer.momentum",
    }
