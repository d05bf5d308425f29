"""Blocks of Python as cells of a notebook, and what stands below them as what they must print.

A page is Markdown that any viewer shows. Here it is run, as a notebook in a process of its own. Where it says what a
block prints, and that prints something else, the build warns; `-W` makes an error of it.
"""

import os
import re

from docutils import nodes
from nbclient import NotebookClient
from sphinx.util import logging

BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", flags=re.DOTALL | re.MULTILINE)
NOTEBOOK = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"
logger = logging.getLogger(__name__)


def as_cells(app, name, source):
    # before the first block of a page jax wants to know how many devices its last one has
    os.environ["JAX_NUM_CPU_DEVICES"] = "8" if "jax_num_cpu_devices" in source[0] else "1"
    app.env.temp_data["expected"] = [text for _, text in BLOCK.findall(source[0])]
    text, cells = BLOCK.subn(r"```{code-cell}\n\1```", source[0])
    source[0] = (NOTEBOOK if cells else "") + text


def compare(app, doctree):
    expected = app.env.temp_data.pop("expected", [])
    cells = [x for x in doctree.findall(nodes.container) if x.get("nb_element") == "cell_code"]
    for cell, text in zip(cells, expected, strict=True):
        printed = [
            x.astext() for x in cell.findall(nodes.container) if x.get("nb_element") == "cell_code_output"
        ]
        if text and text.split() != " ".join(printed).split():
            logger.warning("printed %r, not %r", printed, text, location=cell)


def setup(app):
    os.environ["JAX_PLATFORMS"] = "cpu"
    NotebookClient.extra_arguments.default_args = (["--log-level=ERROR"],)  # each would warn of its port
    app.connect("source-read", as_cells)
    app.connect("doctree-read", compare, priority=100)
    return {"parallel_read_safe": True}
