"""The configuration of Sphinx. Building the site needs no network."""

from __future__ import annotations

import logging
import shutil
import sys
from filecmp import cmp
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import lightning_bigopt

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "lightning_bigopt"
author = "The lightning_bigopt authors"
copyright = f"2026, {author}"  # noqa: A001 - the name is Sphinx's
release = version = lightning_bigopt.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "mathml",
    "chart_pictures",
    "schedule_pictures",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"lightning_bigopt {release}"
html_math_renderer = "mathml"
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs
nb_code_prompt_show = "Show the setup"  # of the cells tagged hide-input
nb_code_prompt_hide = "Hide the setup"

autosummary_generate = False
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["State", "Tags", "Logs"]


HERE = Path(__file__).parent


def copy_notebooks(stored: Path, pages: Path) -> None:
    """Copies the notebooks into the source folder of Sphinx; git ignores the copies."""
    for page in pages.glob("*.ipynb"):
        if not (stored / page.name).exists():
            page.unlink()
    for notebook in stored.glob("*.ipynb"):
        page = pages / notebook.name
        if not page.exists() or not cmp(notebook, page, shallow=False):
            shutil.copyfile(notebook, page)  # unchanged files keep their time, so Sphinx skips them


copy_notebooks(HERE.parent / "notebooks", HERE / "notebooks")


def resolve_public_name(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    contnode: nodes.TextElement,
) -> nodes.reference | None:
    """Links ``lightning_bigopt.gradients.AGC`` to its entry, ``lightning_bigopt.AGC``.

    Docstrings and signatures contain the module that defines a name; the site documents the name in
    the module that users import it from.
    """
    target = node.get("reftarget", "")
    name = target.rsplit(".", maxsplit=1)[-1]
    if node.get("refdomain") != "py" or name not in lightning_bigopt.__all__:
        return None
    if "." in target and not target.startswith("lightning_bigopt."):
        return None
    full = f"lightning_bigopt.{name}"
    found = env.domains.python_domain.objects.get(full)
    if found is None:
        return None
    reference = nodes.reference("", "", internal=True, reftitle=full)
    reference["refuri"] = (
        f"{app.builder.get_relative_uri(node['refdoc'], found.docname)}#{found.node_id}"
    )
    reference += contnode
    return reference


def is_about_pages(record: logging.LogRecord) -> bool:
    """Returns whether a toctree warning is about more than an empty folder."""
    return "glob pattern" not in str(record.msg)


def setup(app: Sphinx) -> None:
    """Registers the resolver."""
    # Sphinx gives this one warning no type that suppress_warnings could name.
    logging.getLogger("sphinx.sphinx.directives.other").addFilter(is_about_pages)
    app.connect("missing-reference", resolve_public_name)
