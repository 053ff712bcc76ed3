"""The directive ``schedule``: shows Python code that makes a schedule, and its curve."""

from __future__ import annotations

import hashlib
from pathlib import Path

import matplotlib as mpl
from docutils import nodes
from matplotlib import pyplot as plt
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import lightning_bigopt
from lightning_bigopt.reporting.plots import plot_schedule

FOLDER = "_build/pictures"


class Picture(SphinxDirective):
    """Shows its content as code, and the resulting schedule over 1000 steps."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        code = "\n".join(self.content)
        name = hashlib.sha256(code.encode()).hexdigest()[:16]
        path = Path(self.env.srcdir, FOLDER, f"{name}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        schedule = eval(code, vars(lightning_bigopt).copy())  # noqa: S307 - code of a page in this folder
        with mpl.rc_context({"svg.hashsalt": name, "font.size": 8}):
            figure, ax = plt.subplots(figsize=(5.2, 1.6), layout="constrained")
            plot_schedule(schedule, 1000, ax=ax)
            figure.savefig(path, metadata={"Date": None}, facecolor="white")
            plt.close(figure)
        block = nodes.literal_block(code, code, language="python")
        image = nodes.image(uri=f"/{FOLDER}/{path.name}", alt=f"The curve of {code}")
        return [block, image]


def setup(app: Sphinx) -> dict[str, bool]:
    mpl.use("agg")
    app.add_directive("schedule", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
