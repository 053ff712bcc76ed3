"""The HTML report of a study: basin, edges, importance, best config, cost and trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.reporting.picture import to_svg
from lightning_bigopt.reporting.study_picture import draw_basin, draw_importance
from lightning_bigopt.trainer_access.output_paths import file_error

if TYPE_CHECKING:
    from lightning_bigopt.reporting.study import StudyRecord

__all__ = ["render_study", "write_study_report"]

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
div.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e2e8f0;
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.reason { min-width: 16rem; } tr.best td { font-weight: 600; } tr.pruned td { color: #718096; }
figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
pre { background: #f7fafc; padding: .7rem 1rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
{% for label, text in summary %}
<tr><td>{{ label }}</td><td>{{ text }}</td></tr>
{% endfor %}
</table>
<h2>{{ study.monitor }} against each value</h2>
<p class="note">A dot is a complete trial, a cross a pruned one at its last value. Values far worse
than the best ones are drawn at the edge.</p>
<figure>{{ basin | safe }}</figure>
<h2>Best values at an end of their range</h2>
{% if edges %}
<ul>{% for line in edges %}<li>{{ line }}</li>{% endfor %}</ul>
{% else %}
<p class="note">None: the best values are inside their ranges.</p>
{% endif %}
<h2>Importance</h2>
{% if importance %}
<p class="note">Share of each value in the variance of {{ study.monitor }}, estimated by Optuna
(PED-ANOVA).</p>
<figure>{{ importance | safe }}</figure>
{% else %}
<p class="note">Not enough complete trials to estimate it: it takes five for each value.</p>
{% endif %}
{% if study.config %}
<h2>Best config</h2>
<pre>{{ study.config }}</pre>
{% endif %}
<h2>Trials</h2>
<div class="wide">
<table>
<tr><th class="number">trial</th><th>state</th><th class="number">{{ study.monitor }}</th>
<th class="number">updates</th><th class="number">seconds</th>
{% for axis in study.axes %}<th>{{ axis.name }}</th>{% endfor %}<th>reason</th></tr>
{% for trial in study.trials %}
<tr class="{{ 'best' if trial == study.best else trial.state }}">
<td class="number">{{ trial.number }}</td><td>{{ trial.state }}</td>
<td class="number">{{ written(trial.loss) }}</td><td class="number">{{ trial.updates }}</td>
<td class="number">{{ "%.1f" | format(trial.seconds) }}</td>
{% for axis in study.axes %}<td>{{ written(trial.values[axis.name]) }}</td>{% endfor %}
<td class="reason">{{ trial.reason }}</td></tr>
{% endfor %}
</table>
</div>
</body>
</html>
"""


def render_study(study: StudyRecord) -> str:
    """Renders the report of a study as HTML.

    Args:
        study: The study.

    Returns:
        The HTML page.

    Example:
        >>> from lightning_bigopt.reporting.study import Axis, StudyRecord, StudyTrial
        >>> trial = StudyTrial(number=0, state="complete", values={"lr": 0.1}, loss=2.0)
        >>> axis = Axis(name="lr", low=0.01, high=1.0, is_log=True)
        >>> page = render_study(
        ...     StudyRecord(name="a", monitor="loss", axes=(axis,), trials=(trial,))
        ... )
        >>> "<svg" in page, "Not enough complete trials" in page
        (True, True)
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(_PAGE).render(
        title=f"Study: {study.name}",
        study=study,
        summary=_summary(study),
        basin=to_svg(draw_basin(study)),
        edges=study.edges(),
        importance=to_svg(draw_importance(study)) if study.importance else "",
        written=_written,
    )


def write_study_report(study: StudyRecord, path: str | Path) -> Path:
    """Writes the report of a study.

    Args:
        study: The study.
        path: The HTML file.

    Returns:
        The path.

    Raises:
        ValueError: If the path is a folder or cannot be written.
    """
    target = Path(path)
    if error := file_error("path", target, example="study.html"):
        raise error
    page = render_study(study)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", errors="replace")
    return target


def _summary(study: StudyRecord) -> list[tuple[str, str]]:
    """Returns the rows of the table at the top."""
    rows = [("trials", study.states())]
    if study.best is not None:
        chosen = ", ".join(f"{path} = {_written(v)}" for path, v in study.best.values.items())
        rows += [
            (f"best {study.monitor}", f"{_written(study.best.loss)} in trial {study.best.number}"),
            ("best values", chosen),
        ]
    rows.append(("cost", study.cost()))
    return rows


def _written(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
