"""The HTML report of a comparison: verdict, losses by seed, searches and best configs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_bigopt.reporting.comparison_picture import draw_comparison
from lightning_bigopt.reporting.page import render_page, write_page
from lightning_bigopt.reporting.picture import to_svg
from lightning_bigopt.reporting.study_picture import draw_basin

if TYPE_CHECKING:
    from lightning_bigopt.reporting.comparison import ComparisonRecord

__all__ = ["render_comparison", "write_comparison_report"]

_STYLES = """\
p.verdict { font-size: 1.1rem; background: #ebf8ff; border-left: 4px solid #3182ce;
            padding: .6rem .9rem; margin: .8rem 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.mean td { font-weight: 600; border-top: 2px solid #a0aec0; }
ul.warning { background: #fffaf0; border-left: 4px solid #dd6b20; padding: .5rem 1rem .5rem 2rem; }
pre { background: #f7fafc; padding: .7rem 1rem; overflow-x: auto; }
h3 { font-size: 1rem; margin: .8rem 0 .1rem; }
div.sides { display: flex; flex-wrap: wrap; gap: 0 2rem; } div.sides > div { max-width: 32rem; }
summary { cursor: pointer; margin: .4rem 0; }"""
_PAGE = """\
<p class="verdict">{{ found.verdict }}</p>
{% if warnings %}
<ul class="warning">{% for line in warnings %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
<figure>{{ picture | safe }}</figure>
<h2>The test</h2>
<table>
{% for label, text in test %}
<tr><td>{{ label }}</td><td>{{ text }}</td></tr>
{% endfor %}
</table>
<h2>{{ found.monitor }} of each seed</h2>
<p class="note">A seed sets the initial weights and the order of the samples on both sides.</p>
<table>
<tr>{% for name in head %}<th class="number">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr{{ ' class="mean"' | safe if row[0] == "mean" }}>
{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% if searches %}
<h2>The searches</h2>
<p class="note">Both sides have the same number of trials, sampler, pruner and seed. The seed of the
searches is none of those above. A dot is a complete trial, a cross a pruned one.</p>
<div class="sides">
{% for name, text, basin in searches %}
<div><h3>{{ name }}</h3>
<p class="note">{{ text }}</p>
<figure>{{ basin | safe }}</figure></div>
{% endfor %}
</div>
{% endif %}
<h2>Configs</h2>
{% for side in sides %}
<details><summary>{{ side.name }}</summary>
<pre>{{ side.config }}</pre></details>
{% endfor %}
</body>
</html>
"""


def render_comparison(found: ComparisonRecord) -> str:
    """Renders the report of a comparison as HTML.

    Args:
        found: The comparison.

    Returns:
        The HTML page.

    Example:
        >>> from lightning_bigopt.reporting.compared_side import ComparedSide, SeedRun
        >>> from lightning_bigopt.reporting.comparison import ComparisonRecord
        >>> a, b = (ComparedSide(name=n, runs=(SeedRun(seed=1, loss=2.0),)) for n in "ab")
        >>> page = render_comparison(ComparisonRecord(a=a, b=b, monitor="loss", test=None))
        >>> "<svg" in page, "no verdict" in page
        (True, True)
    """
    head, *rows = found.rows()
    sides = (found.a, found.b)
    return render_page(
        _PAGE,
        styles=_STYLES,
        title=f"Comparison: {found.a.name} (a) and {found.b.name} (b)",
        found=found,
        warnings=[*found.edges(), *found.divergences()],
        picture=to_svg(draw_comparison(found)),
        test=_rows_of_test(found),
        head=head,
        rows=rows,
        searches=[
            (side.name, "; ".join(side.study.summary()[1:]), to_svg(draw_basin(side.study)))
            for side in sides
            if side.study is not None
        ],
        sides=[side for side in sides if side.config],
    )


def write_comparison_report(found: ComparisonRecord, path: str | Path) -> Path:
    """Writes the report of a comparison.

    Args:
        found: The comparison.
        path: The HTML file.

    Returns:
        The path.

    Raises:
        ValueError: If the path is a folder or cannot be written.
    """
    return write_page(lambda: render_comparison(found), path, example="comparison.html")


def _rows_of_test(found: ComparisonRecord) -> list[tuple[str, str]]:
    """Returns the rows of the table of the test."""
    test = found.test
    rows = [("direction", f"{found.direction} {found.monitor}")]
    if test is not None:
        low, high = test.interval
        rows += [
            ("mean difference b - a", f"{test.difference:.5g}"),
            ("95 % confidence interval", f"{low:.5g} to {high:.5g}"),
            ("standard deviation of the differences", f"{test.deviation:.4g}"),
        ]
    if test is not None and test.is_defined:
        rows += [
            ("t statistic, p-value", f"{test.statistic:.4g}, {test.p_value:.3g}"),
            (
                "smallest difference that could have been seen",
                f"{test.detectable:.4g} (power 0.8, level 0.05, {test.count} pairs)",
            ),
        ]
    if found.relevant is not None:
        rows.append(("smallest difference that matters", f"{found.relevant:.4g}"))
    rows.append(("updates of b / updates of a", f"{found.updates_ratio:.3g}"))
    rows += [
        (f"best values of {side.name}", ", ".join(f"{k} = {_short(v)}" for k, v in values.items()))
        for side in (found.a, found.b)
        if (values := side.best_values)
    ]
    return [*rows, ("cost", found.cost())]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
