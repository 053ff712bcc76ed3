"""The HTML report of one run, or of several runs side by side, as one self-contained file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from lightning_bigopt.monitoring.tags import TAGS, find_tag
from lightning_bigopt.reporting.charts import CHARTS, is_loss
from lightning_bigopt.reporting.drawing import describe, draw
from lightning_bigopt.reporting.page import render_page, write_page
from lightning_bigopt.reporting.runs import Curve, Run, read_run

__all__ = ["clip_audit", "render_report", "write_report"]

_MAX_REJECTIONS = 20
_STYLES = "figure.beside svg { min-width: 48rem; } code { overflow-wrap: anywhere; }"
_PAGE = """\
<table>
<tr><th></th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr>
{% for label, cells in summary %}
<tr><td>{{ label }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for title, text, picture in pictures %}
<section>
<h2>{{ title }}</h2>
<p class="note">{{ text }}</p>
<figure{% if runs | length > 1 %} class="beside"{% endif %}>{{ picture | safe }}</figure>
</section>
{% endfor %}
{% for run in runs if run.refusals %}
<h2>Why updates were rejected{% if runs | length > 1 %} in {{ run.name }}{% endif %}</h2>
<ul>{% for line in run.refusals[:shown] %}<li>{{ line }}</li>{% endfor %}</ul>
{% if run.refusals | length > shown %}
<p class="note">… and {{ run.refusals | length - shown }} more.</p>
{% endif %}
{% endfor %}
<h2>Clipping summary</h2>
{% for run in runs %}
<p class="note">{{ run.name }}</p>
<ul>{% for line in audits[loop.index0] %}<li>{{ line }}</li>{% endfor %}</ul>
{% endfor %}
{% for run in runs %}
{% if plans[loop.index0] %}
<h2>Plan{% if runs | length > 1 %} of {{ run.name }}{% endif %}</h2>
<table>
{% for label, written in plans[loop.index0] %}
<tr><td>{{ label }}</td><td><code>{{ written }}</code></td></tr>
{% endfor %}
</table>
{% endif %}
{% endfor %}
<h2>Logged values</h2>
<table>
<tr><th>tag</th><th>unit</th><th>meaning</th></tr>
{% for tag in tags %}
<tr><td><code>{{ tag.name }}</code></td><td>{{ tag.unit }}</td><td>{{ tag.meaning }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""


def render_report(runs: Sequence[Run]) -> str:
    """Renders the report of one run or several runs as HTML.

    Args:
        runs: The runs; several are shown side by side.

    Returns:
        The HTML page.

    Example:
        >>> run = Run(name="tiny", curves={"train_loss": [(0, 2.0), (1, 1.0)]})
        >>> "<svg" in render_report([run])
        True
    """
    logged = {find_tag(tag) for run in runs for tag in run.curves}
    pictures = [(chart.title, describe(chart, runs), draw(chart, runs)) for chart in CHARTS]
    return render_page(
        _PAGE,
        styles=_STYLES,
        title="Optimization report: " + " beside ".join(run.name for run in runs),
        runs=runs,
        summary=_summary(runs),
        pictures=[shown for shown in pictures if shown[-1] is not None],
        audits=[clip_audit(run) for run in runs],
        plans=[_table_rows(run.texts.get("plan", "")) for run in runs],
        tags=[tag for tag in TAGS if tag in logged],
        shown=_MAX_REJECTIONS,
    )


def write_report(
    folders: str | PathLike[str] | Sequence[str | PathLike[str]], output: str | Path
) -> Path:
    """Reads the logs of runs and writes their report.

    Args:
        folders: The log folder of one run, or the log folders of several runs, which are shown
            side by side.
        output: The HTML file to write.

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: If no folder is given, if a folder holds no logs, or if ``output`` is a folder
            or cannot be written.
    """
    several = [folders] if isinstance(folders, (str, PathLike)) else folders
    if not several:
        raise ValueError(
            "folders must be the log folders of at least one run, got none; pass trainer.log_dir"
        )

    def render() -> str:
        return render_report(_with_different_names([read_run(folder) for folder in several]))

    return write_page(render, output, name="output", example="report.html")


def _with_different_names(runs: Sequence[Run]) -> list[Run]:
    """Numbers runs of the same name, such as those of two folders ``logs/version_0``."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})")
        if names.count(run.name) > 1
        else run
        for i, run in enumerate(runs)
    ]


def clip_audit(run: Run) -> list[str]:
    """Summarizes the clipping of a run.

    Args:
        run: The run.

    Returns:
        One sentence for each finding.

    Example:
        >>> curves = {"clip/coefficient": [(0, 1.0), (1, 0.5)], "clip/fraction": [(0, 0), (1, 1)]}
        >>> clip_audit(Run(name="a", curves=curves))[0]
        'clip: 50.0 % of the updates were clipped; logged coefficients: median 0.75, minimum 0.5.'
    """
    lines = []
    for tag, curve in run.select("clip/coefficient").items():
        name = "clip" + tag.removeprefix("clip/coefficient")
        values = _finite(curve)
        fractions = run.curves.get(tag.replace("coefficient", "fraction"), [])
        share = _weighted_mean(fractions)
        if not values or share is None:
            continue
        lines.append(
            f"{name}: {100 * share:.1f} % of the updates were clipped; logged coefficients: "
            f"median {median(values):.3g}, minimum {min(values):.3g}."
        )
        if share > 0.9:
            lines.append(
                "Almost every update was clipped: the threshold set the norm of nearly every "
                "gradient, which lowers the effective learning rate of SGD and changes little for "
                "Adam. A larger threshold would clip outliers only."
            )
        elif share == 0:
            lines.append("No update was clipped: the norm of every update was below the threshold.")
    bad = [s for c in run.select("grad_norm/total").values() for s, v in c if not math.isfinite(v)]
    if bad:
        lines.append(f"{len(bad)} logged gradient norms were not finite, the first at {bad[0]}.")
    if not run.select("clip/"):
        lines.append("Clipping was not logged.")
    return lines or ["No update was clipped, or no coefficient was logged."]


def _table_rows(text: str) -> list[list[str]]:
    r"""Parses the rows of a Markdown table of two columns, without its header.

    Example:
        >>> _table_rows("| | |\n|---|---|\n| budget | `10 steps` |")
        [['budget', '10 steps']]
    """
    # plan_text writes a vertical bar in a name as \|.
    rows = [
        re.split(r"(?<!\\) \| ", line.strip("| "), maxsplit=1) for line in text.splitlines()[2:]
    ]
    cells = [[cell.replace(r"\|", "|").strip("` ") for cell in row] for row in rows]
    return [row for row in cells if len(row) == 2]


def _weighted_mean(fractions: Curve) -> float | None:
    """Returns the mean over all updates; each point covers the updates since the previous one."""
    steps = [step for step, _ in fractions]
    widths = [after - before for before, after in pairwise(steps)]
    # The first point has no predecessor: it is taken to cover as many updates as the second.
    widths = [*widths[:1], *widths] or [1]
    total = sum(width * share for width, (_, share) in zip(widths, fractions, strict=False))
    return total / sum(widths) if fractions else None


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    rows = [
        ("last logged step", [_last_step(run) for run in runs]),
        ("samples", [_number(run.last("progress/samples"), "{:,.0f}") for run in runs]),
        ("tokens", [_number(run.last("progress/tokens"), "{:,.0f}") for run in runs]),
        ("global batch", [_number(run.last("batch/global_size"), "{:,.0f}") for run in runs]),
        ("skipped updates", [_number(run.last("guard/skipped"), "{:.0f}") for run in runs]),
        ("rollbacks", [_number(run.last("rollback/count"), "{:.0f}") for run in runs]),
        (
            "left out by them",
            [_number(run.last("rollback/left_out"), "{:,.0f}") for run in runs],
        ),
        ("samples per second", [_median(run, "throughput/samples_per_second") for run in runs]),
    ]
    losses = sorted({tag for run in runs for tag in run.curves if is_loss(tag)})
    losses = [tag for tag in losses if not tag.startswith("rollback/")]
    rows += [(f"last {t}", [_number(run.last(t), "{:.4g}") for run in runs]) for t in losses]
    return [(label, cells) for label, cells in rows if any(cells)]


def _last_step(run: Run) -> str:
    used = [c[-1][0] for tag, c in run.curves.items() if c and find_tag(tag) and tag[:5] != "plan/"]
    used = used or [curve[-1][0] for curve in run.curves.values() if curve]  # no known tag
    unit = "" if run.axis == "update" else f" {run.axis}"
    return f"{max(used):,}{unit}" if used else ""


def _median(run: Run, tag: str) -> str:
    values = _finite(run.curves.get(tag, []))
    return f"{median(values):,.1f} (median)" if values else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _finite(curve: Any) -> list[float]:
    return [value for _, value in curve if math.isfinite(value)]
