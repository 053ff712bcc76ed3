"""The beginning of the HTML pages of reports: their style and their heading."""

from __future__ import annotations

__all__ = ["page_head"]

_STYLES = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; margin: 2rem auto; max-width: 68rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem; }
p.note { color: #4a5568; margin: .1rem 0 .6rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #e2e8f0; vertical-align: top; }
figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
"""


def page_head(styles: str) -> str:
    """Returns the beginning of a page as a template of Jinja, up to the heading ``{{ title }}``.

    Args:
        styles: CSS of this page, after the common one.

    Example:
        >>> page_head("code { color: red; }").splitlines()[-4:]
        ['</style>', '</head>', '<body>', '<h1>{{ title }}</h1>']
    """
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{{{ title }}}}</title>
<style>
{_STYLES}{styles}
</style>
</head>
<body>
<h1>{{{{ title }}}}</h1>
"""
