"""Figures of matplotlib without a display: layout, numbers at the ticks, legends, and SVG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.trainer_access.output_paths import file_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "add_legend",
    "drawn_label",
    "figure_width",
    "format_number",
    "new_picture",
    "plain_text",
    "set_number_format",
    "short_label",
    "short_labels",
    "to_svg",
    "write_picture",
]

# Columns that together are as wide as the page of a report, so that its text is not scaled.
_WIDTH, _COLUMN_WIDTH, _HEIGHT = 8.0, 5.5, 2.7
_FONT_SIZE, _MAX_LABEL, _MAX_COLUMNS = 9, 32, 4
# In inches: a row, the sample of a line with its margins, a wide character, and the distance of a
# legend from the axes, which leaves space for the labels of the axis.
_LEGEND_ROW, _HANDLE, _CHARACTER, _LEGEND_DISTANCE = 0.19, 0.6, 0.08, 0.48


def format_number(value: float) -> str:
    """Formats a number at a tick: 0.001, and 1e-6 for very small or large numbers.

    Example:
        >>> [format_number(value) for value in (1.0, 0.001, 2e-5, 1e-6, 3.5e9, 0.0)]
        ['1', '0.001', '2e-5', '1e-6', '3.5e9', '0']
    """
    if not value or 1e-4 <= abs(value) < 1e6:
        return f"{value:.6g}"
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def set_number_format(axis: Axes, *, is_log: bool) -> None:
    """Sets the ticks of the vertical axis, after everything is drawn on it."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, Locator, LogLocator, NullFormatter

    if is_log:
        low, high = axis.get_ylim()
        locator: Locator = LogLocator()
        # A small range may contain no power of ten.
        if high < 10 * low:
            locator = AutoLocator()
        elif high < 100 * low:
            locator = LogLocator(subs=(1.0, 2.0, 5.0))
        axis.yaxis.set_major_locator(locator)
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def short_labels(tags: Iterable[str], prefixes: Sequence[str]) -> dict[str, str]:
    """Returns a label for each tag: without its prefix, and with the middle of a long one left out.

    Args:
        tags: The tags of one chart.
        prefixes: Prefixes of the tags; the labels keep them if there are several.

    Example:
        >>> short_labels(["layers/zeros/head", "layers/zeros/blocks.0"], ["layers/zeros"])
        {'layers/zeros/head': 'head', 'layers/zeros/blocks.0': 'blocks.0'}
        >>> tag = "layers/zeros/model.transformer.layers.11.attention.out_proj"
        >>> short_labels([tag], ["layers/zeros"])[tag]
        'model.transform…ention.out_proj'
    """
    labels: dict[str, str] = {}
    for tag in tags:
        label = _without_prefix(tag, prefixes[0]) if len(prefixes) == 1 else tag
        if label.startswith("_"):
            label = tag
        short = short_label(label)
        labels[tag] = drawn_label(label) if short in labels.values() else short
    return labels


def short_label(name: str, *, limit: int = _MAX_LABEL) -> str:
    """Returns a name as it is drawn, without its middle if it is longer than ``limit``."""
    half = (limit - 1) // 2
    return drawn_label(name if len(name) <= limit else f"{name[:half]}…{name[-half:]}")


def drawn_label(name: str) -> str:
    r"""Returns a name without what matplotlib and SVG cannot draw in one line of text.

    A space before an underscore keeps the name in legends, which leave out ``_name``.

    Example:
        >>> drawn_label("_x"), drawn_label("two\nlines"), drawn_label("a$b$")
        (' _x', 'two lines', 'a$b$')
    """
    spaces = " ".join(name.splitlines())
    drawn = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in spaces)
    return f" {drawn}" if drawn.startswith("_") else drawn


def _without_prefix(tag: str, prefix: str) -> str:
    """Returns the part of a tag after a prefix, from a slash on; the whole tag if nothing is left.

    Example:
        >>> _without_prefix("optim/lr/head", "optim/lr"), _without_prefix("optim/lr", "optim/lr")
        ('head', 'optim/lr')
        >>> _without_prefix("time/step_p95", "time/step")
        'step_p95'
    """
    if tag == prefix:
        return tag
    end = prefix if prefix.endswith("/") else f"{prefix}/"
    return tag.removeprefix(end if tag.startswith(end) else prefix.rpartition("/")[0] + "/")


def add_legend(axis: Axes, *, width: float = 0.0, columns: int | None = None) -> int:
    """Adds the legend of the labeled lines below the axes, where it hides no curve.

    Args:
        axis: The axes with the lines.
        width: Width that the legend may have, in inches.
        columns: Number of columns of a legend for all axes of the figure; None for a legend of
            these axes, with as many columns as fit.

    Returns:
        The number of rows.
    """
    from matplotlib.transforms import ScaledTranslation

    handles, labels = axis.get_legend_handles_labels()
    if not labels:
        return 0
    options: dict[str, Any] = {"fontsize": _FONT_SIZE, "frameon": False}
    if columns is None:
        entry = _CHARACTER * max(map(len, labels)) + _HANDLE
        columns = min(max(int(width / entry), 1), _MAX_COLUMNS)
        below = ScaledTranslation(0, -_LEGEND_DISTANCE, axis.figure.dpi_scale_trans)
        axis.legend(
            handles,
            labels,
            ncols=columns,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            bbox_transform=axis.transAxes + below,
            borderaxespad=0.0,
            **options,
        )
    else:
        figure: Any = axis.figure
        figure.legend(handles, labels, ncols=columns, loc="outside lower center", **options)
    return math.ceil(len(labels) / columns)


def new_picture(
    paint: Callable[[Sequence[Axes]], int], *, columns: int = 1, shares_x: bool = True
) -> Any:
    """Makes a matplotlib figure with axes in a row on a common vertical scale, and paints it.

    Args:
        paint: Draws on the axes, from left to right; returns the rows of the legend below them, for
            which the figure grows.
        columns: Number of axes.
        shares_x: Whether the axes have a common horizontal scale, too.

    Returns:
        The ``matplotlib.figure.Figure``; it needs no display.
    """
    from matplotlib.figure import Figure

    with plain_text():
        figure = Figure(figsize=(figure_width(columns), _HEIGHT), layout="constrained")
        grid = figure.subplots(1, columns, sharex=shares_x, sharey=True, squeeze=False)
        rows = paint(list(grid[0]))
    figure.set_figheight(_HEIGHT + _LEGEND_ROW * rows)
    return figure


@contextmanager
def plain_text() -> Iterator[None]:
    """Makes matplotlib draw all new texts as they are: a dollar sign in a name is no formula."""
    import matplotlib as mpl

    options: dict[Any, Any] = {
        "text.parse_math": False,
        "text.usetex": False,
        "axes.formatter.use_mathtext": False,
        "svg.fonttype": "none",
    }
    with mpl.rc_context(options):
        yield


def write_picture(
    draw: Callable[[], Any], path: str | Path, *, name: str = "path", example: str
) -> Path:
    """Writes a figure to a file, whose suffix selects the format and whose folder is made.

    Args:
        draw: Returns the figure; called after the path is checked.
        path: The file.
        name: Name of the argument with the path, for the error.
        example: A good name for the file, for the error.

    Returns:
        The path.

    Raises:
        ValueError: If the path is a folder or cannot be written, or matplotlib does not support the
            format.
    """
    target = Path(path)
    if error := file_error(name, target, example=example):
        raise error
    figure = draw()
    target.parent.mkdir(parents=True, exist_ok=True)
    with plain_text():
        figure.savefig(target, dpi=120)
    return target


def figure_width(columns: int) -> float:
    """Returns the width of a figure with a number of axes in a row, in inches."""
    return _COLUMN_WIDTH * columns if columns > 1 else _WIDTH


def to_svg(figure: Any) -> str:
    """Renders a figure as an SVG element that can be embedded in an HTML page.

    Text stays text, so that it can be searched and copied.
    """
    buffer = io.StringIO()
    with plain_text(), warnings.catch_warnings():
        # The browser draws the text, with fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None})  # no date in the file
    text = buffer.getvalue()
    return text[text.index("<svg") :]
