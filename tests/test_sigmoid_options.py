"""Options of the elementwise losses as values: annealed, differentiated, vmapped, out of range."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle_elementwise as oracle
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy, sigmoid_focal_loss
from sigmoid_cases import ORACLES

OPTIONS = {
    sigmoid_cross_entropy: ("label_smoothing", "pos_weight"),
    sigmoid_focal_loss: ("label_smoothing", "pos_weight", "alpha", "gamma"),
    sigmoid_asymmetric_loss: ("label_smoothing", "pos_weight", "gamma_negative", "gamma_positive"),
}
VALUES = {  # of the options in this order: inside, and at the ends
    sigmoid_cross_entropy: [(0.125, 2), (0, 1), (1, 0), (0, 0), (1, 3)],
    sigmoid_focal_loss: [(0.125, 2, 0.25, 1.5), (0, 1, 0, 0), (1, 0, 1, 2), (0, 3, 1, 1), (0.5, 1, 0.5, 5)],
    sigmoid_asymmetric_loss: [(0.125, 2, 4, 1), (0, 1, 0, 0), (1, 0, 2, 0), (0, 3, 0.5, 2.5), (0.5, 1, 1, 0)],
}
losses = pytest.mark.parametrize("loss", OPTIONS, ids=lambda f: f.__name__)
Z = np.float64([0.3, -2.0, 5.0, 0.0, -1.0, 12.0, -30.0, -2.9, 20.0])
Y = np.float64([0.0, 1.0, 0.4, 1.0, 0.0, 0.75, 0.2, 0.0, 1.0])


def with_options(loss, z, y):
    return lambda *values: loss(z, y, **dict(zip(OPTIONS[loss], values, strict=True)))


@functools.cache
def compiled(loss):
    def f(z, y, values):
        rows = with_options(loss, z, y)
        every = tuple(range(len(values)))
        hessian = jax.jacfwd(jax.jacrev(rows, every), every)
        mixed = jax.jvp(
            lambda z: jax.jacrev(with_options(loss, z, y), every)(*values), (z,), (jnp.ones_like(z),)
        )[1]
        return (
            rows(*values),
            jax.jacrev(rows, every)(*values),
            jax.jacfwd(rows, every)(*values),
            hessian(*values),
            mixed,
        )

    return jax.jit(f)


def wanted(loss, z, values):
    """The loss, in longdouble, at these options."""
    return ORACLES[loss](z, Y, **dict(zip(OPTIONS[loss], values, strict=True)))[0]


def slopes(f, values):
    """Of a function of the options, by differences in longdouble: it is smooth at the ends as well."""
    h = np.longdouble(1e-6)
    for i in range(len(values)):
        up, down = ([v + s * h * (k == i) for k, v in enumerate(values)] for s in (1, -1))
        yield (f(up) - f(down)) / (2 * h)


@losses
def test_derivatives(loss, x64):
    for values in VALUES[loss]:
        out, reverse, forward, hessian, mixed = compiled(loss)(Z, Y, tuple(map(jnp.float64, values)))
        np.testing.assert_allclose(out, wanted(loss, Z, values).astype(float), rtol=1e-12)
        want = list(slopes(lambda v: wanted(loss, Z, v), values))
        near = {"rtol": 1e-8, "atol": 1e-9}
        for i in range(len(values)):
            np.testing.assert_allclose(reverse[i], want[i].astype(float), **near)
            np.testing.assert_allclose(forward[i], want[i].astype(float), **near)
        second = slopes(lambda v: np.array(list(slopes(lambda u: wanted(loss, Z, u), v))), values)
        for i, column in enumerate(second):  # a difference of differences
            for k in range(len(values)):
                np.testing.assert_allclose(hessian[k][i], column[k].astype(float), rtol=1e-5, atol=1e-5)
        h = np.longdouble(1e-6)
        per_logit = [
            np.array(list(slopes(lambda v, z=z: wanted(loss, z, v), values))) for z in (Z + h, Z - h)
        ]
        for got, x in zip(mixed, (per_logit[0] - per_logit[1]) / (2 * h), strict=True):
            np.testing.assert_allclose(got, x.astype(float), rtol=1e-5, atol=1e-6)


@losses
def test_infinite_logits_that_are_right(loss):
    """Where the loss takes 0 * inf as 0, so do all derivatives; nothing else sees them."""
    z, y = jnp.float32([jnp.inf, -jnp.inf, 0.5]), jnp.float32([1, 0, 1])
    for values in [v for v in VALUES[loss] if v[0] == 0]:
        found = compiled(loss)(z, y, tuple(map(jnp.float32, values)))
        for x in jax.tree.leaves(found):
            assert np.isfinite(x).all()
    # smoothing that turns half of the label around costs all there is; at y = 1/2 it turns nothing
    z, y = jnp.full(2, -jnp.inf), jnp.float32([1, 0.5])
    out, reverse, *_ = compiled(sigmoid_cross_entropy)(z, y, (jnp.float32(0.25), jnp.float32(1)))
    np.testing.assert_array_equal(out, np.inf)
    np.testing.assert_array_equal(reverse[0], [-np.inf, 0])


@losses
def test_annealing_compiles_once(loss):
    traced, y, z = [], jnp.asarray(Y, jnp.float32), jnp.asarray(Z, jnp.float32)

    @jax.jit
    def f(values):
        traced.append(values)
        return with_options(loss, z, y)(*values)

    columns = [jnp.float32(x) for x in zip(*VALUES[loss], strict=True)]
    batch = jax.jit(jax.vmap(with_options(loss, z, y)))(*columns)
    for i, values in enumerate(VALUES[loss]):
        np.testing.assert_allclose(f(tuple(map(float, values))), batch[i], rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(
            batch[i], wanted(loss, np.asarray(z), values).astype(np.float32), rtol=1e-5
        )
    assert len(traced) == 1


@losses
def test_out_of_range_is_nan(loss):
    good = VALUES[loss][0]
    wrong = {"label_smoothing": (-0.1, 1.1), "alpha": (-0.1, 1.1), "pos_weight": (-1, np.inf)}
    bad = [
        (*good[:i], x, *good[i + 1 :])
        for i, name in enumerate(OPTIONS[loss])
        for x in (*wrong.get(name, (-1, np.inf)), np.nan)
    ]
    f = jax.jit(jax.vmap(with_options(loss, jnp.float32([0.5, -1]), jnp.float32([0.5, 0.25]))))
    assert np.isnan(f(*[jnp.float32(x) for x in zip(*bad, strict=True)])).all()


def test_python_numbers_select_the_smallest_program():
    z, y = jnp.zeros(3), jnp.ones(3)

    def size(loss, **options):
        return len(jax.jit(lambda z, y: loss(z, y, **options)).lower(z, y).as_text().splitlines())

    plain = size(sigmoid_cross_entropy)
    assert size(sigmoid_cross_entropy, label_smoothing=0, pos_weight=1) == plain
    assert size(sigmoid_focal_loss, gamma=0.0) == plain
    assert size(sigmoid_cross_entropy, label_smoothing=jnp.float32(0)) > plain
    traced = jax.make_jaxpr(lambda gamma: sigmoid_focal_loss(z, y, gamma=gamma))(0.0)
    assert "pow" in str(traced)


def test_options_and_labels_of_numpy():
    z, y = jnp.asarray(Z, jnp.float32), jnp.asarray(Y, jnp.float32)
    by_number = sigmoid_focal_loss(z, y, gamma=2, alpha=0.25, label_smoothing=0.125)
    of_numpy = {
        "gamma": np.array(2),
        "alpha": np.float64(0.25),
        "label_smoothing": np.array(0.125, np.float16),
    }
    np.testing.assert_allclose(sigmoid_focal_loss(z, y, **of_numpy), by_number, rtol=2e-6)
    want, *_ = oracle.sigmoid_focal_loss(
        np.asarray(z), np.asarray(y), gamma=2.0, alpha=0.25, label_smoothing=0.125
    )
    np.testing.assert_allclose(by_number, want.astype(np.float32), rtol=2e-6)
