"""The HTML pages of reports: their common style, their heading, and their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_bigopt.trainer_access.output_paths import file_error

__all__ = ["render_page", "write_page"]

_STYLES = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; margin: 2rem auto; max-width: 68rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p.note { color: #4a5568; margin: .1rem 0 .6rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #e2e8f0; vertical-align: top; }
figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
"""


_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
%s
</style>
</head>
<body>
<h1>{{ title }}</h1>
"""


def render_page(body: str, *, styles: str, title: str, **values: Any) -> str:
    """Renders an HTML page.

    Args:
        body: The page after its heading, as a template of Jinja.
        styles: CSS of this page, after the common one.
        title: The title, which is the heading, too.
        **values: What the template uses; text in it is escaped.

    Returns:
        The page.

    Example:
        >>> page = render_page("<p>{{ loss }}</p>", styles="", title="A & B", loss="< 2")
        >>> page.splitlines()[-3:]
        ['<body>', '<h1>A &amp; B</h1>', '<p>&lt; 2</p>']
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(_HEAD % (_STYLES + styles) + body)
    return template.render(title=title, **values)


def write_page(
    render: Callable[[], str], path: str | Path, *, name: str = "path", example: str
) -> Path:
    """Writes a page to a file, whose folder is made.

    Args:
        render: Returns the page; called after the path is checked.
        path: The HTML file.
        name: Name of the argument with the path, for the error.
        example: A good name for the file, for the error.

    Returns:
        The path.

    Raises:
        ValueError: If the path is a folder or cannot be written.
    """
    target = Path(path)
    if error := file_error(name, target, example=example):
        raise error
    page = render()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", errors="replace")  # a name may be no UTF-8
    return target
