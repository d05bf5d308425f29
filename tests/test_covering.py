"""Every option alone and every pair of them, in every family and source of logits, on one device."""

import pytest

import covering
import covering_run


@pytest.mark.parametrize("table", covering.TABLES)
def test_cases(table):
    covering_run.check(covering.cases(table, placed=False))
