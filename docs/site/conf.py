"""The site: `sphinx-build -W -n docs build/site`. What a page shows is run, and it prints what it prints then."""

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "jaxent"
author = "The jaxent developers"
project_copyright = "the jaxent developers"
release = "0.1.0"

extensions = [
    "docstrings",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
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
os.environ["JAX_PLATFORMS"] = "cpu"

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
html_math_renderer = "mathml"
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n.*?^```$)?", flags=re.DOTALL | re.MULTILINE)
NOTEBOOK = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"


def run_blocks(app, name, source):
    """Blocks of Python become cells: what they print is made again, and tests/test_readme.py compares it."""
    text, cells = BLOCK.subn(r"```{code-cell}\n\1```", source[0])
    source[0] = (NOTEBOOK if cells else "") + text


def mathml(writer, node):
    """TeX as what browsers know by themselves: no script, no fonts of others."""
    block = isinstance(node, nodes.math_block)
    converted = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div class="math">{converted}</div>' if block else converted)
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", run_blocks)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
