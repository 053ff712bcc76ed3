"""The completion script, run by the shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_bigopt.cli import __main__ as cli

COMPLETE = """
source "{script}"
COMP_WORDS=({words} "")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_WORDS[COMP_CWORD]="{typed}"
{function} bigopt "{typed}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "bigopt.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert cli.main(["completion", "bash"]) == 0
    return path


def completed(script: Path, *words: str, typed: str) -> set[str]:
    bash = shutil.which("bash")
    assert bash
    (function,) = {
        line.split()[-2]
        for line in script.read_text().splitlines()
        if line.startswith("complete ") and line.endswith(" bigopt")
    }
    text = COMPLETE.format(script=script, words=" ".join(words), typed=typed, function=function)
    done = subprocess.run([bash, "-c", text], check=True, capture_output=True, text=True)
    return {line.strip() for line in done.stdout.splitlines()}


def test_bash_completes_subcommands(script: Path):
    assert set(cli.COMMANDS) <= completed(script, "bigopt", typed="")
    assert completed(script, "bigopt", typed="sch") == {"schedules"}


def test_bash_completes_the_options_of_a_subcommand(script: Path):
    assert completed(script, "bigopt", "demo", typed="--max") == {"--max-steps"}
    assert {"--trainer.max_steps", "--trainer.max_epochs", "--trainer.max_time"} == completed(
        script, "bigopt", "fit", typed="--trainer.max"
    )


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_their_own_script(shell: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert "schedules" in shown
    assert {"zsh": "#compdef bigopt", "tcsh": "complete bigopt"}[shell] in shown
