"""Writes formulas as MathML, which browsers render without scripts, fonts or network."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Writes an inline formula."""
    translator.body.append(_converted(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a displayed formula."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(_converted(node, as_block=True))
    translator.body.append("</div>")
    raise nodes.SkipNode


def _converted(node: nodes.Element, *, as_block: bool) -> str:
    formula = node.astext().strip()
    # LaTeX reads \frac12 digit by digit, docutils reads the number twelve.
    braced = re.sub(r"(\\[dt]?frac)\s*(\d)\s*(\d)", r"\1{\2}{\3}", formula)
    try:
        return str(tex2mathml(braced, as_block=as_block))
    except (MathError, SyntaxError, IndexError) as error:
        logger.warning("formula must be MathML's LaTeX, got %r: %s", formula, error, location=node)
        return str(nodes.literal(text=formula))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
