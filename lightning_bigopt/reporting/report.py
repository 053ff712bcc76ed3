"""The report of a run, or of two side by side: one HTML file that needs no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from lightning_bigopt.reporting.charts import CHARTS, draw
from lightning_bigopt.reporting.runs import Curve, Run, read_run
from lightning_bigopt.reporting.tags import TAGS, find_tag

__all__ = ["clip_audit", "render_report", "write_report"]

_REFUSALS = 20
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; margin: 2rem auto; max-width: 68rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p.note { color: #4a5568; margin: .1rem 0 .6rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #e2e8f0; vertical-align: top; }
figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
figure.beside svg { min-width: 48rem; } code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
<tr><th></th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr>
{% for label, cells in summary %}
<tr><td>{{ label }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for chart, picture in pictures %}
<section>
<h2>{{ chart.title }}</h2>
<p class="note">{{ chart.text }}</p>
<figure{% if runs | length > 1 %} class="beside"{% endif %}>{{ picture | safe }}</figure>
</section>
{% endfor %}
{% for run in runs if run.refusals %}
<h2>Why updates were refused{% if runs | length > 1 %} in {{ run.name }}{% endif %}</h2>
<ul>{% for line in run.refusals[:shown] %}<li>{{ line }}</li>{% endfor %}</ul>
{% if run.refusals | length > shown %}
<p class="note">… and {{ run.refusals | length - shown }} more.</p>
{% endif %}
{% endfor %}
<h2>Clip audit</h2>
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
<h2>What was logged</h2>
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
    """The HTML of a report.

    Args:
        runs: One run, or several to be shown side by side.

    Example:
        >>> run = Run(name="tiny", curves={"train_loss": [(0, 2.0), (1, 1.0)]})
        >>> "<svg" in render_report([run])
        True
    """
    from jinja2 import Environment

    logged = {find_tag(tag) for run in runs for tag in run.curves}
    pictures = [(chart, draw(chart, runs)) for chart in CHARTS]
    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(
        title="Optimization report: " + " beside ".join(run.name for run in runs),
        runs=runs,
        summary=_summary(runs),
        pictures=[(chart, picture) for chart, picture in pictures if picture is not None],
        audits=[clip_audit(run) for run in runs],
        plans=[_rows(run.texts.get("plan", "")) for run in runs],
        tags=[tag for tag in TAGS if tag in logged],
        shown=_REFUSALS,
    )


def write_report(
    folders: str | PathLike[str] | Sequence[str | PathLike[str]], output: str | Path
) -> Path:
    """Reads runs and writes their report.

    Args:
        folders: The folder of one run, or those of several to be shown side by side.
        output: The HTML file to be written.

    Returns:
        Its path.

    Raises:
        ValueError: If there is no folder or one holds no logs, or if ``output`` is a folder.
    """
    several = [folders] if isinstance(folders, (str, PathLike)) else folders
    if not several:
        raise ValueError("folders must be those of one run or more, got none; pass the logger's")
    path = Path(output)
    if path.is_dir():
        raise ValueError(
            f"output must be the name of a file, got the folder {str(path)!r}; write "
            f"{str(path / 'report.html')!r}"
        )
    page = render_report([read_run(folder) for folder in several])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def clip_audit(run: Run) -> list[str]:
    """What clipping did to a run, a sentence each.

    Example:
        >>> curves = {"clip/coefficient": [(0, 1.0), (1, 0.5)], "clip/fraction": [(0, 0), (1, 1)]}
        >>> clip_audit(Run(name="a", curves=curves))[0]
        'clip: 50.0 % of the updates were clipped; logged coefficients: median 0.75, least 0.5.'
    """
    lines = []
    for tag, curve in run.select("clip/coefficient").items():
        whose = "clip" + tag.removeprefix("clip/coefficient")
        values = _finite(curve)
        fractions = run.curves.get(tag.replace("coefficient", "fraction"), [])
        share = _weighted_mean(fractions)
        if not values or share is None:
            continue
        lines.append(
            f"{whose}: {100 * share:.1f} % of the updates were clipped; logged coefficients: "
            f"median {median(values):.3g}, least {min(values):.3g}."
        )
        if share > 0.9:
            lines.append(
                "Clipping acted almost always: it set the length of nearly every gradient, which "
                "lowers the learning rate under SGD and differs little under Adam. A larger "
                "threshold would catch outliers only."
            )
        elif share == 0:
            lines.append("Clipping never acted: no update that was made had a norm to be clipped.")
    lost = [s for c in run.select("grad_norm/total").values() for s, v in c if not math.isfinite(v)]
    if lost:
        lines.append(f"{len(lost)} logged gradient norms were not finite, the first at {lost[0]}.")
    return lines or ["Nothing was clipped, or clipping was not logged."]


def _rows(text: str) -> list[list[str]]:
    r"""The rows of a Markdown table of two columns, its head left out.

    Example:
        >>> _rows("| | |\n|---|---|\n| budget | `10 steps` |")
        [['budget', '10 steps']]
    """
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines()[2:]]
    return [[cell.strip("` ") for cell in row] for row in rows if len(row) == 2]


def _weighted_mean(fractions: Curve) -> float | None:
    """The mean over updates of shares that were taken over unequal stretches."""
    steps = [step for step, _ in fractions]
    stretches = [after - before for before, after in pairwise(steps)]
    stretches = [*stretches[:1], *stretches] or [1]  # the first as long as the second
    total = sum(s * share for s, (_, share) in zip(stretches, fractions, strict=False))
    return total / sum(stretches) if fractions else None


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    rows = [
        ("last logged step", [_last_step(run) for run in runs]),
        ("samples", [_number(run.last("progress/samples"), "{:,.0f}") for run in runs]),
        ("tokens", [_number(run.last("progress/tokens"), "{:,.0f}") for run in runs]),
        ("global batch", [_number(run.last("batch/global_size"), "{:,.0f}") for run in runs]),
        ("refused updates", [_number(run.last("guard/skipped"), "{:.0f}") for run in runs]),
        ("samples per second", [_typical(run, "throughput/samples_per_second") for run in runs]),
    ]
    losses = sorted({tag for run in runs for tag in run.curves if "loss" in tag.lower()})
    rows += [(f"last {t}", [_number(run.last(t), "{:.4g}") for run in runs]) for t in losses]
    return [(label, cells) for label, cells in rows if any(cells)]


def _last_step(run: Run) -> str:
    used = [c[-1][0] for tag, c in run.curves.items() if c and find_tag(tag) and tag[:5] != "plan/"]
    used = used or [curve[-1][0] for curve in run.curves.values() if curve]  # nothing of ours
    unit = "" if run.axis == "update" else f" {run.axis}"
    return f"{max(used):,}{unit}" if used else ""


def _typical(run: Run, tag: str) -> str:
    values = _finite(run.curves.get(tag, []))
    return f"{median(values):,.1f} (median)" if values else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _finite(curve: Any) -> list[float]:
    return [value for _, value in curve if math.isfinite(value)]
