"""README.md does what it says: its Python blocks run, each on its own, and print the text that follows."""

import os
import re
import subprocess
import sys
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
    # a process each: what a reader who pastes it gets, with no flags of conftest.py
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=README.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if expected:
        assert done.stdout.split() == expected.split()


def test_names_in_the_readme_exist():
    import jaxent

    named = set(re.findall(r"jaxent\.([a-zA-Z]\w+)", README.read_text()))
    missing = {name for name in named if not hasattr(jaxent, name)}
    assert not missing
