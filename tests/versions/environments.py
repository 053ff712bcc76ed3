"""Environments that differ from the current one in the version of Lightning."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def environment(folder: Path, lightning: str) -> Path:
    """Makes an environment with this checkout and a version of Lightning; returns its interpreter.

    All other packages are those of the current environment, through a path in a ``.pth`` file,
    except those whose installed versions that Lightning does not allow: pip installs others into
    the new environment, and never changes a package outside of it. torch stays the same.

    Args:
        folder: Folder of the environment; one that exists is made anew.
        lightning: Version of ``lightning`` and of ``pytorch-lightning``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    # Python reads no .pth file of a folder that a .pth file names: the editable installation of
    # this checkout is not visible.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = Path(sysconfig.get_path("scripts", "venv", vars=variables)) / "python"
    torch = f"torch=={metadata.version('torch')}"
    wanted = [f"lightning=={lightning}", f"pytorch-lightning=={lightning}", torch]
    # The checkout too, so that pip compares its requirements with that Lightning.
    checkout = ["--no-build-isolation", ROOT]
    subprocess.run([*PIP, "--python", python, "install", "--quiet", *wanted, *checkout], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Returns the packages that an environment holds itself, with their versions."""
    code = (
        "import sysconfig; from importlib.metadata import distributions\n"
        "for d in distributions(path=[sysconfig.get_path('purelib')]): print(d.name, d.version)"
    )
    lines = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return dict(line.split() for line in lines)
