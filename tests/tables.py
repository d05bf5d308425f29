"""Large tables of parameters: a part of each runs by default, the rest is exhaustive."""

import itertools

import pytest


def some(chosen, values):
    """Of the values those that are chosen run by default."""

    def row(x):
        marks = [] if x in chosen else [pytest.mark.exhaustive]
        return pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=marks)

    return [row(x) for x in values]


def thinned(n, names, *axes, **options):
    """parametrize by all combinations; one in n runs by default, and each value in some of them."""
    axes = [list(axis) for axis in axes]
    others = sum(map(len, axes)) - max(map(len, axes)) - len(axes) + 1
    assert n <= 1 + others, "some value would never have its turn"

    def row(at):
        marks = [pytest.mark.exhaustive] if sum(at) % n else []
        return pytest.param(*(axis[i] for axis, i in zip(axes, at, strict=True)), marks=marks)

    rows = map(row, itertools.product(*map(range, map(len, axes))))
    return pytest.mark.parametrize(names, list(rows), ids=str, **options)
