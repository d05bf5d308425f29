"""The site: `sphinx-build -W -n docs build/site`. What a page shows is run, and it prints what it prints then."""

import importlib.metadata
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "jaxent"
author = "The jaxent developers"
project_copyright = "the jaxent developers"
release = importlib.metadata.version("jaxent")

extensions = [
    "blocks",
    "docstrings",
    "names",
    "thumbnails",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",  # the source as pages: a link to a repository would ask for its address
    "sphinx_design",
]
exclude_patterns = ["inventories"]
templates_path = ["_templates"]
nitpicky = True

# A page is run in a process of its own; an exception ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the list of arguments says more: shapes, and what a dtype is for

# Of the names that these pages have: a build asks no network.
intersphinx_mapping = {
    name: (url, f"inventories/{name}.inv")
    for name, url in {
        "numpy": "https://numpy.org/doc/stable/",
        "jax": "https://docs.jax.dev/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
    }.items()
}

html_theme = "pydata_sphinx_theme"
html_title = "jaxent"
html_static_path = ["_static"]
html_css_files = ["jaxent.css"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's machine is
html_math_renderer = "mathml"
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "which_loss", "confusions")}  # with nothing below them
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def mathml(writer, node):
    """TeX as what browsers know by themselves: no script, no fonts of others."""
    block = isinstance(node, nodes.math_block)
    converted = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div class="math">{converted}</div>' if block else converted)
    raise nodes.SkipNode


def leave_out_contents(app, doctree):
    """Of pages of one thing, and of the one where sections are answers."""
    page = app.env.docname
    if page.startswith(("api/", "gallery")) or page == "which_loss":
        app.env.metadata[page]["html_theme.sidebar_secondary.remove"] = "true"


def setup(app):
    app.connect("doctree-read", leave_out_contents)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
