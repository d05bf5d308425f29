"""Docstrings as pages: they are written for a terminal, and become reStructuredText here.

Sections are titles, arguments a list of definitions, an indented block is a formula, `x` is code, and a public name of
jaxent is a link to its page. tests/test_architecture.py holds the form.
"""

import itertools
import re
import textwrap

import jaxent

SECTION = re.compile(r"^([A-Z]\w+):$")
ITEM = re.compile(r"^(\*{0,2}\w+(?:, \w+)*): (.*)$")
OF_ITEMS = {"Args", "Attributes", "Raises"}
PUBLIC = "|".join(sorted((name for name in vars(jaxent) if not name.startswith("_")), key=len, reverse=True))
# code in backticks or a public name; what is neither has no markup
WORDS = re.compile(rf"`(?:jaxent\.)?({PUBLIC})`|(`[^`]*`)|\b(?:jaxent\.)?({PUBLIC})\b(?!\()")


def prose(text, own_name):
    """One line: links, code, and everything else as it stands."""
    pieces, end = [], 0
    for match in WORDS.finditer(text):
        quoted, code, bare = match.groups()
        name = quoted or (bare if bare and "_" in bare else None)
        if not (name or code):
            continue
        pieces.append(re.sub(r"([\\*|_])", r"\\\1", text[end : match.start()]))
        link = f":py:obj:`~jaxent.{name}`"
        pieces.append(f"``{(name or code).strip('`')}``" if code or name == own_name else link)
        end = match.end()
    pieces.append(re.sub(r"([\\*|_])", r"\\\1", text[end:]))
    return "".join(pieces)


def body(lines, own_name):
    """Paragraphs, formulas and sessions."""
    for indented, block in itertools.groupby(lines, lambda line: line.startswith("    ")):
        block = list(block)
        if indented:
            yield from ["", "::", "", *block, ""]
        elif any(line.startswith(">>>") for line in block):
            yield from block
        else:
            yield from (prose(line, own_name) for line in block)


def items(lines, own_name):
    """`name: what it is`, with lines that go on further in."""
    for line in lines:
        match = ITEM.match(line)
        if match:
            yield from ["", f"``{match[1]}``", f"   {prose(match[2], own_name)}"]
        else:
            yield f"   {prose(line.strip(), own_name)}" if line.startswith(" ") else prose(line, own_name)


def as_rst(lines, own_name):
    """A section ends where the next one begins, or where a line is not indented."""
    section, inside = None, []
    for line in [*lines, "End:"]:
        starts = SECTION.match(line)
        if not starts and not (section and line and not line.startswith(" ")):
            inside.append(line)
            continue
        inside = textwrap.dedent("\n".join(inside)).splitlines()
        title = [f".. rubric:: {section}", ""] if section else []
        yield from [*title, *(items if section in OF_ITEMS else body)(inside, own_name), ""]
        section, inside = (starts[1], []) if starts else (None, [line])


def process(app, what, name, obj, options, lines):
    lines[:] = list(as_rst(lines, name.rpartition(".")[2]))


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
