"""The commands, paths, links and code of the README work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lightning.pytorch import Trainer

from tests.docs.commands import exists

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_opens_with_commands_picture_and_callbacks_and_is_short():
    first = [README.index(text) for text in ("make demo", "docs/images/demo.png", "callbacks=[")]
    assert first == sorted(first)
    assert first[-1] < README.index("\n## ")
    assert README.count("\n") < 150


def test_every_command_and_path_exists():
    shown = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    commands = [line.partition("#")[0] for block in shown for line in block.splitlines()]
    commands += re.findall(r"`((?:make|pytest|python|bigopt|tensorboard) [^`]+)`", README)
    assert len(commands) >= 8
    assert [command for command in commands if not exists(shlex.split(command))] == []


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert not [link for link in links if link.startswith("http")]


def test_python_of_the_readme_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert isinstance(namespace["trainer"], Trainer)
