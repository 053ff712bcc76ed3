"""The comparison of notebook outputs finds changed copies."""

from __future__ import annotations

import base64
import copy
import struct

import nbformat
import pytest
from nbformat import v4

from notebooks.run import clean, execute
from tests.notebooks.comparison import differences, errors_and_warnings


def picture(width, height):
    return base64.b64encode(bytes(16) + struct.pack(">II", width, height)).decode()


@pytest.fixture
def notebook():
    outputs = [
        v4.new_output(
            "stream", name="stdout", text="loss    seed\n------\n0.1234  7\nnan -3.5e+02\n"
        ),
        v4.new_output("display_data", {"image/png": picture(640, 320), "text/plain": "<Figure>"}),
    ]
    cell = v4.new_code_cell("train()", outputs=outputs, execution_count=1)
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), cell])


def changed_copy(notebook, before, after):
    copied = copy.deepcopy(notebook)
    text = copied.cells[1].outputs[0].text
    assert before in text
    copied.cells[1].outputs[0].text = text.replace(before, after)
    return copied


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0.1234", "0.1244"),  # within 2 %
        ("loss    ", "loss  "),  # other alignment of a table
        ("------", "-----"),
        ("-3.5e+02", "-3.6e+02"),  # one unit of the last digit
    ],
)
def test_small_differences_are_accepted(notebook, before, after):
    assert not differences(notebook, changed_copy(notebook, before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0.1234", "0.1284"),
        ("0.1234", "-0.1234"),
        ("0.1234", "nan"),
        ("nan", "1.0"),
        ("-3.5e+02", "-3.5e+03"),
        ("seed", "seeds"),
        ("7", "8"),  # a whole number
        ("7", ""),
        ("7\n", "7\nand more\n"),
    ],
)
def test_other_output_is_found(notebook, before, after):
    copied = changed_copy(notebook, before, after)
    assert differences(notebook, copied)
    assert differences(copied, notebook)


def test_in_a_varying_cell_numbers_may_differ_and_words_may_not(notebook):
    notebook.cells[1].metadata["tags"] = ["varies"]
    assert not differences(notebook, changed_copy(notebook, "0.1234", "12"))
    assert differences(notebook, changed_copy(notebook, "0.1234", "nan"))
    assert differences(notebook, changed_copy(notebook, "loss", "accuracy"))


@pytest.mark.parametrize("width", [500, 700])
def test_other_size_of_a_picture_is_found(notebook, width):
    copied = copy.deepcopy(notebook)
    copied.cells[1].outputs[1].data["image/png"] = picture(width, 320)
    assert differences(notebook, copied) == [
        f"cell 1: picture stored (640, 320), now ({width}, 320) pixels"
    ]


def test_missing_picture_error_and_other_source_are_found(notebook):
    fewer = copy.deepcopy(notebook)
    del fewer.cells[1].outputs[1]
    assert "outputs stored" in differences(notebook, fewer)[0]

    broken = copy.deepcopy(notebook)
    broken.cells[1].outputs[1] = v4.new_output("error", ename="ValueError", evalue="no")
    assert "outputs stored" in differences(notebook, broken)[0]
    assert errors_and_warnings(broken) == ["cell 1: raises ValueError: no"]

    other = copy.deepcopy(notebook)
    other.cells[1].source = "train(2)"
    assert differences(notebook, other) == ["cell 1: the source differs"]
    shorter = copy.deepcopy(notebook)
    del shorter.cells[1]
    assert differences(notebook, shorter) == ["cell 1: the source differs"]


def test_clean_removes_times_and_versions(notebook):
    marked = copy.deepcopy(notebook)
    marked.metadata["language_info"] = {"name": "python", "version": "3.14.0"}
    marked.cells[1].metadata["execution"] = {"iopub.status.busy": "2020-01-01T00:00:00Z"}
    marked.cells[1].id = "another"
    assert clean(marked) == clean(notebook)
    assert "3.14.0" not in nbformat.writes(marked)


def test_cells_with_the_same_source_have_different_ids():
    cells = [v4.new_code_cell("1") for _ in range(3)]
    ids = [cell.id for cell in clean(v4.new_notebook(cells=cells)).cells]
    assert len(set(ids)) == 3


@pytest.mark.slow
def test_execution_uses_one_thread_and_shows_warnings():
    source = "import os, warnings\nprint(os.environ['OMP_NUM_THREADS'])\nwarnings.warn('beware')"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source)])
    fresh = execute(notebook)
    assert not notebook.cells[0].outputs
    assert fresh.cells[0].outputs[0].text == "1\n"
    (warning,) = errors_and_warnings(fresh)
    assert "beware" in warning
