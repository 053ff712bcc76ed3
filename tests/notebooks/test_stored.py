"""Stored notebooks: executed in order, without errors, small, and the same on every machine."""

from __future__ import annotations

import copy
import re

import nbformat
import pytest

from notebooks.run import NOTEBOOKS, clean, find, free_port, main
from tests.notebooks.comparison import errors_and_warnings

STORED = find([])
KIBIBYTES = 600


def read(path):
    return nbformat.read(path, as_version=4)


def test_a_free_port_is_none_that_the_system_gives_to_connections():
    ports = {free_port() for _ in range(50)}
    assert max(ports) < 32_768
    assert min(ports) >= 1024
    assert len(ports) > 40  # chosen at random: two callers at the same time do not get the same


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_cell_was_executed_in_order(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_no_error_and_no_warning_is_stored(path):
    assert not errors_and_warnings(read(path))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_notebook_is_stored_as_the_command_stores_it(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert clean(copy.deepcopy(notebook)) == notebook
    assert path.stat().st_size < KIBIBYTES * 1024


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_notebook_has_one_title_and_no_paths_or_addresses(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown"
    titles = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("# ")
    ]
    assert len(titles) == 1
    # No addresses of objects and no folders of one machine.
    assert not re.search(r" at 0x[0-9a-f]+|/tmp/|/home/|/root/", nbformat.writes(notebook))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_notebook_begins_with_its_idea_and_folds_the_imports(path):
    idea, setup, *others = read(path).cells
    assert idea.cell_type == "markdown"
    assert "**The idea.** " in idea.source
    assert "The folded cell" in idea.source
    assert setup.cell_type == "code"
    assert setup.source.startswith("# Setup")
    # The tag for the site, the metadata for Jupyter and VS Code.
    assert setup.metadata.tags == ["hide-input"]
    assert setup.metadata.jupyter == {"source_hidden": True}
    assert not setup.outputs
    assert not [cell for cell in others if "hide-input" in cell.metadata.get("tags", ())]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_notebook_is_on_the_index_page(path):
    page = (NOTEBOOKS.parent / "docs" / "notebooks" / "index.md").read_text()
    assert f"{{doc}}`{path.stem}`" in page


def test_unknown_name_exits_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["99"])
    assert "got '99'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        ("Failed to load /a/torchao/_C.so\nW1129 torch/utils/_pytree.py:630] an Enum\n", False),
        ("Failed to load /a/torchao/_C.so\nValueError: wrong\n", True),
        ("UserWarning: wrong\n", True),
    ],
)
def test_what_the_import_of_torchao_prints_is_not_stored(text, is_kept):
    cell = nbformat.v4.new_code_cell("import transformers")
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=text)]
    (cleaned,) = clean(nbformat.v4.new_notebook(cells=[cell])).cells
    assert bool(cleaned.outputs) is is_kept
