"""README.md and the pages in docs do what they say: their Python blocks run, page by page as in a notebook, and print
the text that follows. The build of the site (docs/_ext/blocks.py) says the same, and .ci/run has that on another jax.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path.name: path.read_text() for path in PATHS}
PATTERN = re.compile(
    r"^```(?:python|\{code-cell\}(?:\n:tags:[^\n]*)?)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?",
    flags=re.DOTALL | re.MULTILINE,
)
BLOCKS = {page: PATTERN.findall(text) for page, text in PAGES.items()}
NEEDS = {"from_flax.md": ["flax"], "recipes.md": ["flax", "equinox", "haiku"]}  # which the extra [docs] has
# On the last line what each has printed.
RUN = """
import contextlib, io, json, sys
printed, names = [], {"__name__": "__main__"}
for i, block in enumerate(json.loads(sys.argv[1])):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, f"block {i}", "exec"), names)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def test_there_are_blocks():
    assert {"README.md", "sharding.md", "objectives.md"} <= {
        page for page, blocks in BLOCKS.items() if blocks
    }


def check(page):
    """In a process: what a reader who pastes it gets, with no flags of conftest.py."""
    codes, texts = zip(*BLOCKS[page], strict=True)
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    if "jax_num_cpu_devices" in PAGES[page]:  # which jax wants to know before the first block runs
        environment["JAX_NUM_CPU_DEVICES"] = "8"
    command = [sys.executable, "-W", "error", "-c", RUN, json.dumps(codes)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for i, (got, expected) in enumerate(zip(json.loads(done.stdout.splitlines()[-1]), texts, strict=True)):
        assert not expected or got.split() == expected.split(), f"block {i}"


def test_readme():
    check("README.md")


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks and page != "README.md"])
def test_page(page):
    for package in NEEDS.get(page, []):
        pytest.importorskip(package)
    check(page)


@pytest.mark.parametrize("page", PAGES)
def test_names_on_the_page_exist(page):
    import jaxent

    named = set(re.findall(r"jaxent\.([a-zA-Z]\w+)", PAGES[page]))
    missing = {name for name in named if not hasattr(jaxent, name)}
    assert not missing
