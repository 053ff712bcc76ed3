"""The HTML report of a study: basin, edges, importance, best config, cost and trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bigopt.reporting.page import render_page, write_page
from lightning_bigopt.reporting.picture import to_svg
from lightning_bigopt.reporting.study_picture import draw_basin, draw_importance

if TYPE_CHECKING:
    from lightning_bigopt.reporting.study import StudyRecord

__all__ = ["render_study", "write_study_report"]

_STYLES = """\
div.wide { overflow-x: auto; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.reason { min-width: 16rem; } tr.best td { font-weight: 600; } tr.pruned td { color: #718096; }
pre { background: #f7fafc; padding: .7rem 1rem; overflow-x: auto; }"""
_PAGE = """\
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
<p class="note">None: the best values are inside their ranges, or fewer than six trials are
complete.</p>
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
    return render_page(
        _PAGE,
        styles=_STYLES,
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
    return write_page(lambda: render_study(study), path, example="study.html")


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
