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
    rows, chosen = combinations(n, *axes)
    return pytest.mark.parametrize(names, some(chosen, rows), ids=str, **options)


def spread(n, names, *axes, **options):
    """Those alone that `thinned` runs by default: each value in some, where other tests have the combinations."""
    return pytest.mark.parametrize(names, combinations(n, *axes)[1], ids=str, **options)


def combinations(n, *axes):
    """All, and one in n."""
    axes = [list(axis) for axis in axes]
    others = sum(map(len, axes)) - max(map(len, axes)) - len(axes) + 1
    assert n <= 1 + others, "some value would never have its turn"
    places = list(itertools.product(*map(range, map(len, axes))))
    rows = [tuple(axis[i] for axis, i in zip(axes, at, strict=True)) for at in places]
    return rows, [row for row, at in zip(rows, places, strict=True) if sum(at) % n == 0]
