"""README.md does what it says: its Python blocks run, each on its own, and print the text that follows."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", README.read_text(), flags=re.DOTALL | re.MULTILINE
)


def test_there_are_blocks():
    assert BLOCKS


@pytest.mark.parametrize(("code", "expected"), BLOCKS, ids=lambda text: text.strip().split("\n")[-1][:40])
def test_block(code, expected):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    if expected:
        assert printed.getvalue().split() == expected.split()


def test_names_in_the_readme_exist():
    import jaxent

    named = set(re.findall(r"jaxent\.([a-zA-Z]\w+)", README.read_text()))
    missing = {name for name in named if not hasattr(jaxent, name)}
    assert not missing
