"""Every option alone and every pair of them, with rows and classes over eight devices: by jit, and in shard_map."""

import covering
import covering_run
from tables import thinned


@thinned(4, "table, mode", covering.TABLES, covering.DEVICES["mode"])
def test_cases(table, mode):
    covering_run.check([case for case in covering.cases(table, placed=True) if case["mode"] == mode], mode)
