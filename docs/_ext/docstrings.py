"""Docstrings as pages: they are written for a terminal, and become reStructuredText here.

Sections are titles, arguments a list of definitions, an indented block is a formula, `x` and public names are code.
tests/test_docstrings.py holds the form.
"""

import itertools
import re
import textwrap

import jaxent

SECTION = re.compile(r"^([A-Z]\w+):$")
ITEM = re.compile(r"^(\*{0,2}\w+(?:, \w+)*): (.*)$")
OF_ITEMS = {"Args", "Attributes", "Raises"}
NAMES = "|".join(name for name in vars(jaxent) if "_" in name.strip("_"))
WORDS = re.compile(rf"`([^`]*)`|\b(?:jaxent\.)?({NAMES})\b(?!\()")  # code, or a public name without quotes


def prose(text):
    """One line: code, which names.py links, and everything else as it stands."""
    pieces, end = [], 0
    for match in WORDS.finditer(text):
        pieces += [
            re.sub(r"([\\*|_])", r"\\\1", text[end : match.start()]),
            f"``{match[1] or match[2]}``",
        ]
        end = match.end()
    return "".join([*pieces, re.sub(r"([\\*|_])", r"\\\1", text[end:])])


def body(lines):
    """Paragraphs, formulas and sessions."""
    for indented, block in itertools.groupby(lines, lambda line: line.startswith("    ")):
        block = list(block)
        if indented:
            yield from ["", ".. code-block:: none", "", *block, ""]
        elif any(line.startswith(">>>") for line in block):
            yield from block
        else:
            yield from (prose(line) for line in block)


def items(lines):
    """`name: what it is`, with lines that go on further in."""
    for line in lines:
        match = ITEM.match(line)
        if match:
            yield from ["", f"``{match[1]}``", f"   {prose(match[2])}"]
        else:
            yield f"   {prose(line.strip())}" if line.startswith(" ") else prose(line)


def as_rst(lines):
    """A section ends where the next one begins, or where a line is not indented."""
    section, inside = None, []
    for line in [*lines, "End:"]:
        starts = SECTION.match(line)
        if not starts and not (section and line and not line.startswith(" ")):
            inside.append(line)
            continue
        inside = textwrap.dedent("\n".join(inside)).splitlines()
        title = [f".. rubric:: {section}", ""] if section else []
        yield from [*title, *(items if section in OF_ITEMS else body)(inside), ""]
        section, inside = (starts[1], []) if starts else (None, [line])


def process(app, what, name, obj, options, lines):
    lines[:] = list(as_rst(lines))


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
