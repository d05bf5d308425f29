"""Every option alone and every pair of them, with rows and classes over eight devices: by jit, and in shard_map."""

import pytest

import covering
import covering_run


@pytest.mark.parametrize("mode", covering.DEVICES["mode"])
@pytest.mark.parametrize("table", covering.TABLES)
def test_cases(table, mode):
    covering_run.check([case for case in covering.cases(table, placed=True) if case["mode"] == mode], mode)
