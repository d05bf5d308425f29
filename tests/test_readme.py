"""README.md and the pages in docs do what they say: their Python blocks run, each on its own, and print the text that
follows.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
PATTERN = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", flags=re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(*block, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, block in enumerate(PATTERN.findall(text))
]


@pytest.mark.parametrize("page", ["README.md", "sharding.md"])
def test_there_are_blocks(page):
    assert PATTERN.findall(PAGES[page])


@pytest.mark.parametrize(("code", "expected"), BLOCKS)
def test_block(code, expected):
    # a process each: what a reader who pastes it gets, with no flags of conftest.py
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if expected:
        assert done.stdout.split() == expected.split()


@pytest.mark.parametrize("page", PAGES)
def test_names_on_the_page_exist(page):
    import jaxent

    named = set(re.findall(r"jaxent\.([a-zA-Z]\w+)", PAGES[page]))
    missing = {name for name in named if not hasattr(jaxent, name)}
    assert not missing
