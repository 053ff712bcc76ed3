"""The wheel and the sdist of ``python -m build`` install and run without a checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from packaging.metadata import Metadata
from packaging.version import Version

import lightning_bigopt

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

# Checks the installation and runs commands through the entry point, in one process.
PROBE = """
import lightning_bigopt, importlib.metadata, json, pathlib, sys
folder = pathlib.Path(lightning_bigopt.__file__).parent
assert (folder / "py.typed").is_file()
assert all(hasattr(lightning_bigopt, name) for name in lightning_bigopt.__all__)
print(folder, importlib.metadata.version("lightning-bigopt"))
(script,) = importlib.metadata.entry_points(group="console_scripts", name="bigopt")
for command in json.loads(sys.argv[1]):
    assert script.load()(command) == 0, command
"""

SMALL_GPT = [
    *("--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"),
    *("--trainer.val_check_interval", "null", "--trainer.accelerator", "cpu"),
    *("--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--model.length", "8"),
    *("--data.length", "8", "--data.validation_samples", "64"),
]


def run(*command: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds sdist and wheel, the wheel from the sdist; returns their folder."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        return Metadata.from_email(files.read(name), validate=True)


def environment(folder: Path, package: object) -> Path:
    """Installs the package in a new environment; returns its scripts.

    The dependencies are those of the current environment. pip checks them, and downloads none.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    # A path in a .pth file makes modules visible, but that folder's own .pth files are not read:
    # the editable installation of this checkout is not visible.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", "venv", vars=variables))
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet"]
    run(*pip, "--no-index", "--no-build-isolation", package, cwd=folder)
    return scripts


def test_every_command_runs_from_the_wheel_in_a_new_environment(
    wheel: Path, tmp_path: Path
) -> None:
    scripts = environment(tmp_path / "env", f"{wheel}[cli,plot]")
    work = tmp_path / "work"
    work.mkdir()
    (work / "gpt.yaml").write_text((ROOT / "examples" / "gpt.yaml").read_text())
    fit = ["fit", "--config", "gpt.yaml", *SMALL_GPT]
    commands = [["schedules"], ["plan", "gpt.yaml"], fit, ["report", "runs/gpt/version_0"]]
    printed = run(scripts / "python", "-c", PROBE, json.dumps(commands), cwd=work)
    where, version = printed.splitlines()[0].split()
    assert (tmp_path / "env").resolve() in Path(where).resolve().parents
    assert version == lightning_bigopt.__version__
    assert "WarmupStableDecay" in printed
    assert "updates: 300\n" in printed
    page = (work / "report.html").read_text()
    assert page.count("<svg") >= 7
    assert "<tr><td>last logged step</td><td>2</td></tr>" in page

    printed = run(scripts / "bigopt", "demo", "--max-steps", "5", cwd=work)
    assert "| validation loss (nats/byte) |" in printed
    assert (work / "runs" / "demo" / "demo.png").is_file()


def test_package_is_installed_from_the_sdist(sdist: Path, tmp_path: Path) -> None:
    scripts = environment(tmp_path / "env", sdist)
    assert "WarmupStableDecay" in run(scripts / "bigopt", "schedules", cwd=tmp_path)
    assert list((tmp_path / "env").rglob("lightning_bigopt/py.typed"))


def test_wheel_holds_only_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_bigopt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in names if not re.match(r"[^/]+\.dist-info/", name)}
    assert inside == tracked
    assert "lightning_bigopt/py.typed" in inside
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_the_files_of_tests_and_docs(sdist: Path) -> None:
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"}
    wanted |= {"constraints.txt", "examples/gpt.yaml", "docs/conf.py", "tests/conftest.py"}
    assert wanted <= names
    assert not [name for name in names if {"_build", "__pycache__"} & set(name.split("/"))]


def test_metadata_are_complete(metadata: Metadata) -> None:
    assert metadata.name == "lightning-bigopt"
    assert metadata.version == Version(lightning_bigopt.__version__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(metadata.version))
    assert metadata.summary
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert str(metadata.requires_python) == ">=3.10"
    assert {"cli", "plot", "docs"} <= set(metadata.provides_extra or [])
    assert "Typing :: Typed" in (metadata.classifiers or [])
    assert not metadata.project_urls  # there is none yet
    # The versions of Python with which all tests were run, as docs/compatibility.md says.
    found = set(metadata.classifiers or [])
    (language,) = (c for c in found if re.search(r":: 3\.", c))
    assert language == "Programming Language :: Python :: 3.11"
    assert {c for c in found if "System ::" in c} == {"Operating System :: POSIX :: Linux"}


def test_readme_renders(metadata: Metadata) -> None:
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
    page = MarkdownIt("gfm-like", {"linkify": False}).render(metadata.description)
    assert "<h1>lightning_bigopt</h1>" in page
    assert page.count("<table>") >= 1
    assert "```" not in page


def test_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version = re.escape(f"[{lightning_bigopt.__version__}]")
    assert re.fullmatch(rf"{version} (\(unreleased\)|- \d{{4}}-\d\d-\d\d)", headings[0])
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", h) for h in headings[1:])
