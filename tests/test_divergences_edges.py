"""KL and JS of hostile pairs: shifted logits, supports that differ, weights of 0, temperatures that are values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
import oracle
from cases import SUPPORTS
from harness import difference
from tables import spread, thinned

NAMES = ("softmax_kl_divergence", "softmax_js_divergence")
names = pytest.mark.parametrize("name", NAMES)
compiled = functools.partial(jax.jit, compiler_options=harness.QUICK)
INF, NAN, F32 = np.inf, np.nan, np.float32


def pairs(rows, step, seed=0, classes=6):
    rng = np.random.default_rng(seed)
    z = F32(2 * rng.normal(size=(rows, classes)))
    return z, F32(z + np.reshape(step, (-1, 1)) * rng.normal(size=z.shape))


def assert_close(got, want, rtol=2e-6, atol=0.0):
    """Of rows by their norm."""
    got, want = np.asarray(got, np.longdouble), np.asarray(want, np.longdouble)
    error = difference(got, want)
    if got.ndim > 1:
        error, want = np.linalg.norm(error, axis=-1), np.linalg.norm(np.nan_to_num(want), axis=-1)
    harness.assert_within(
        error, np.zeros_like(error), rtol * np.abs(np.where(np.isinf(want), 0, want)) + atol
    )


@names
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_shift_of_one_of_both_costs_no_digits(name, temperature):
    shift, step = np.meshgrid([0, 10, -37.3, 100, 1e4], [1e-4, 1e-3, 1e-2, 0.3, 1.0])
    z, t = pairs(shift.size, step)
    t = F32(t + np.reshape(shift, (-1, 1)))
    rows = functools.partial(getattr(jaxent, name), temperature=temperature)
    f = compiled(lambda z, t: (rows(z, t), jax.grad(lambda *x: jnp.sum(rows(*x)), (0, 1))(z, t)))
    for a, b in ((z, t), (t, z)):
        want = functools.partial(getattr(oracle, name), a, b, temperature=F32(temperature))
        value, (da, db) = f(a, b)
        assert_close(value, want())
        assert_close(da, want(cotangent=np.ones(len(a))).logits)
        assert_close(db, want(cotangent=np.ones(len(a))).labels)


def test_the_gradient_of_a_sure_row_that_is_shifted():
    """Of differences of logits both lose what rounding takes, which is the same for all classes, and cancels."""
    z, t = pairs(200, 1e-3)
    z[:, 2] += 8
    t[:, 2] += 8
    t += F32(1e4)
    for beta in (0.0, 1.0):
        f = functools.partial(jaxent.softmax_js_divergence, beta=beta)
        found = compiled(jax.grad(lambda z, t, f=f: jnp.sum(f(z, t)), (0, 1)))(z, t)
        known = oracle.softmax_js_divergence(z, t, beta=beta) > 3e-9
        assert known.sum() > 20
        wanted = oracle.softmax_js_divergence(z, t, beta=beta, cotangent=np.ones(len(z)))
        for g, w in zip(found, wanted, strict=True):
            assert_close(g[known], w[known], 1e-6)


@names
def test_classes_far_from_the_other_distribution(name):
    """One side masks by -inf or the lowest number, the other by -1e9: the other classes keep their digits."""
    z, t = pairs(4, 1e-3)
    z[:, 4:], t[:, 4:] = -1e9, -INF
    z[1, 4], t[1, 4] = -INF, np.finfo(F32).min
    z[2], t[2] = t[2], z[2].copy()
    want = getattr(oracle, name)(z, t)
    assert (want < 1e-5).all()
    assert_close(compiled(getattr(jaxent, name))(z, t), want)


@names
def test_supports_that_differ(name):
    """Value; reverse and forward mode, which say the same and are finite; second derivatives, too."""
    z, t = (F32(x) for x in zip(*SUPPORTS.values(), strict=True))
    rng = np.random.default_rng(1)
    dz, dt = F32(rng.normal(size=z.shape)), F32(rng.normal(size=z.shape))
    rows, ones = getattr(jaxent, name), jnp.ones(len(z))

    @compiled
    def run(z, t, dz, dt):
        def slopes(z, t):
            value, vjp = jax.vjp(rows, z, t)
            return vjp(ones), value

        gradients, curvature, value = jax.vjp(slopes, z, t, has_aux=True)
        nothing = jnp.zeros_like(dz)
        along = [jax.jvp(rows, (z, t), x)[1] for x in ((dz, nothing), (nothing, dt), (dz, dt))]
        only = jax.jvp(lambda z: rows(z, t), (z,), (dz,))[1]
        again = jax.jvp(lambda *x: slopes(*x)[0], (z, t), (dz, dt))[1]
        return value, gradients, (*along, only), curvature((dz, dt)), again

    value, (gz, gt), (by_z, by_t, by_both, only), reverse, forward = run(z, t, dz, dt)
    want = getattr(oracle, name)(z, t)
    wanted = getattr(oracle, name)(z, t, cotangent=np.ones(len(z)))
    assert_close(value, want)
    assert_close(gz, wanted.logits)
    finite = np.isfinite(want)[:, None]
    assert_close(gt, np.where(finite, wanted.labels, 0))
    assert finite.all() == (name != NAMES[0])
    for got, of_z, of_t in ((by_z, 1, 0), (only, 1, 0), (by_t, 0, 1), (by_both, 1, 1)):
        want = np.sum(of_z * np.float64(gz) * dz + of_t * np.float64(gt) * dt, -1)
        assert_close(got, want, atol=1e-6)
    for a, b in zip(reverse, forward, strict=True):
        assert np.isfinite(a).all() and np.isfinite(b).all()
        assert_close(np.where(finite, a, 0), np.where(finite, b, 0), 1e-5, 1e-6)


@names
def test_what_a_class_mask_hides(name):
    """NaN and infinities there: nothing to see in values, gradients and forward mode; as if the classes were not."""
    z, t = pairs(4, 1.0)
    z[:2, 3], z[2:, 3], t[::2, 3], t[1::2, 3] = NAN, INF, -INF, NAN
    mask = np.arange(6) != 3
    dz, dt = pairs(4, 1.0, seed=2)
    temperature = F32([1, 2, 0.5, 1])

    @compiled
    def run(z, t, dz, dt):
        def rows(z, t, temperature):
            return getattr(jaxent, name)(z, t, class_mask=mask, temperature=temperature)

        value, vjp = jax.vjp(rows, z, t, temperature)
        return value, vjp(jnp.ones(4)), jax.jvp(rows, (z, t, temperature), (dz, dt, jnp.ones(4)))[1]

    value, (gz, gt, g), along = run(z, t, dz, dt)
    want, wanted = per_row(name, z[:, mask], t[:, mask], temperature)
    assert_close(value, want)
    for got, expected in ((gz, wanted.logits), (gt, wanted.labels)):
        assert (got[:, ~mask] == 0).all()
        assert_close(got[:, mask], expected)
    slope = by_temperature(z[:, mask], t[:, mask], temperature, wanted)
    assert_close(g, slope)
    assert_close(along, np.sum(np.asarray(gz) * dz + np.asarray(gt) * dt, -1) + slope, atol=1e-6)


def per_row(name, z, t, temperature):
    """Values and gradients of rows, each with its own temperature."""
    each = [
        getattr(oracle, name)(a, b, temperature=c, cotangent=cotangent)
        for cotangent in (None, np.longdouble(1))
        for a, b, c in zip(z, t, temperature, strict=True)
    ]
    gradients = each[len(z) :]
    return np.stack(each[: len(z)]), oracle.Gradients(
        np.stack([g.logits for g in gradients]), np.stack([g.labels for g in gradients])
    )


def by_temperature(z, t, temperature, gradients):
    """L depends on z / T and t / T only."""
    return -np.sum(gradients.logits * z + gradients.labels * t, -1) / temperature


# Weights of 0: the derivative by the weight is the loss.


@spread(3, "name, reduction, source", NAMES, ["none", "sum", "mean"], ["dense", "rows"])
def test_weights_of_zero(name, reduction, source):
    z, t = pairs(6, 1.0)
    if source == "dense":  # in a kernel they would be everybody's
        z[3, 1], z[4, 0] = NAN, -INF  # an infinite KL
    where = np.arange(6) != 5
    weights = F32([1.5, 0, 0.5, 0, 0, 2])

    def total(weights, z, t):
        options = {"where": where, "weights": weights, "reduction": reduction}
        return jnp.sum(harness.call(name, source, [z, t], options))

    @compiled
    def run(*x):
        by_weights = jax.grad(total)(*x)
        gradient = jax.grad(total, (1, 2))
        return (
            total(*x),
            by_weights,
            gradient(*x),
            jax.jvp(lambda w: gradient(w, *x[1:]), x[:1], (directions,))[1],
        )

    directions = F32([0.3, -1, 0.7, 2, 1, 1])
    with harness.blocks(source):
        value, by_weights, gradients, mixed = run(weights, z, t)
    rows = np.where(where, getattr(oracle, name)(z, t), 0)
    slopes = getattr(oracle, name)(z, t, cotangent=np.ones(6))
    gone = ~where | ~np.isfinite(rows)
    rows, w, along = np.where(gone, 0, rows), np.where(gone, 0, weights), np.where(gone, 0, directions)
    size = w.sum() if reduction == "mean" else np.longdouble(1)
    mean = rows @ w / size
    assert_close(value, mean)
    centre = mean if reduction == "mean" else 0
    assert_close(by_weights, np.where(gone, 0, (rows - centre) / size), atol=1e-6)
    scale = along / size - (w * along.sum() / size**2 if reduction == "mean" else 0)
    for got, second, slope in zip(gradients, mixed, slopes[:2], strict=True):
        slope = np.where(gone[:, None], 0, slope)
        assert_close(got, w[:, None] / size * slope)
        assert_close(second, scale[:, None] * slope)


# Temperatures that are values.

T = F32([0.5, 1, 1.7, 4, 0.25])


@thinned(2, "name, source", NAMES, ["dense", "rows"])
def test_a_temperature_per_row(name, source):
    z, t = pairs(5, 1.0)

    @compiled
    def run(*x):
        def rows(z, t, temperature):
            return harness.call(name, source, [z, t], {"temperature": temperature})

        value, vjp = jax.vjp(rows, *x)
        return value, vjp(jnp.ones(5)), jax.grad(lambda s: jnp.sum(rows(*x[:2], s)))(jnp.float32(1.7))

    with harness.blocks(source):
        value, (gz, gt, by_t), by_one = run(z, t, T)
    want, wanted = per_row(name, z, t, T)
    assert_close(value, want)
    assert_close(gz, wanted.logits)
    assert_close(gt, wanted.labels)
    assert_close(by_t, by_temperature(z, t, T, wanted), 5e-6)
    _, wanted = per_row(name, z, t, F32([1.7] * 5))
    assert_close(by_one, by_temperature(z, t, F32(1.7), wanted).sum(), 5e-6)
    assert by_t.dtype == by_one.dtype == F32


@names
def test_temperatures_in_one_program(name):
    """Mapped over, out of range, of a row that is hidden, or of none with an answer; traced once."""
    z, t = pairs(5, 1.0)
    z[4] = NAN
    traced = []

    @compiled
    def run(temperatures, where):
        def total(z, temperature):
            traced.append(0)
            options = {"temperature": temperature, "where": where, "weights": weights}
            return getattr(jaxent, name)(z, t, **options, reduction="sum")

        each = jax.vmap(jax.value_and_grad(total, (0, 1)), (None, 0))
        return each(z, temperatures), each(z, jnp.repeat(temperatures[:, None], 5, 1).at[0, 3].set(-1))

    weights = F32([1, 2, 0.5, 0, 0])
    where = np.array([True, True, True, True, False])
    temperatures = F32([2, 0.5, 0, -1, INF, NAN])
    (values, (_, by_one)), (each_row, (dz, by_row)) = run(temperatures, where)
    count = len(traced)
    run(temperatures + 1, where)
    assert len(traced) == count
    rows = [
        getattr(oracle, name)(z, t, temperature=x, where=where, weights=weights) for x in temperatures[:2]
    ]
    want = np.append(np.sum(rows, -1), [NAN] * 4)
    assert_close(values, want)
    assert_close(each_row, want)
    assert np.isnan(dz[:, :3]).all((1, 2)).tolist() == [False] * 2 + [True] * 4
    # a weight of 0 with a temperature that is none is gone; a hidden row is
    assert (dz[0, 3:] == 0).all() and (by_row[0, 3:] == 0).all() and np.isfinite(by_row[:2]).all()
    assert_close(by_row[:2].sum(-1), by_one[:2], 1e-5)


@names
def test_a_temperature_of_another_dtype(name, x64):
    z, t = pairs(5, 1.0)

    def total(temperature, z, t):
        return jnp.sum(getattr(jaxent, name)(z, t, temperature=temperature))

    for dtype, out in ((jnp.bfloat16, jnp.float32), (jnp.float64, jnp.float64)):
        inputs = jnp.asarray(z, dtype), jnp.asarray(t, dtype)
        for temperature in (jnp.float64(1.7), jnp.bfloat16(1.7)):
            value, slope = jax.eval_shape(jax.value_and_grad(total), temperature, *inputs)
            assert (value.dtype, slope.dtype) == (out, temperature.dtype)
        assert jax.eval_shape(functools.partial(total, np.float64(1.7)), *inputs).dtype == out


class Parameter:
    """What is an array by protocol only."""

    def __init__(self, value):
        self.value = jnp.asarray(value)

    def __jax_array__(self):
        return self.value


@pytest.mark.parametrize("name", [*NAMES, "softmax_entropy"])
def test_arrays_by_protocol(name):
    z, t = pairs(2, 1.0)
    inputs = (z, t)[: 1 + (name in NAMES)]
    options = {"weights": np.ones(2, F32)} | ({"temperature": F32(2)} if name in NAMES else {})

    @functools.partial(jax.jit, static_argnums=0, compiler_options=harness.QUICK)
    def run(a, inputs, options):
        return getattr(jaxent, name)(*map(a, inputs), **{key: a(x) for key, x in options.items()})

    np.testing.assert_array_equal(run(Parameter, inputs, options), run(lambda x: x, inputs, options))


DIVIDES = "It divides both logits: small ones come near the argmax, which has no gradient."
ERRORS = {
    "a str": ("2", TypeError),
    "bool[]": (jnp.ones((), bool), TypeError),
    "0.0": (0.0, ValueError),
    "inf": (INF, ValueError),
    "float32[6]": (jnp.ones(6), ValueError),
}


@names
@pytest.mark.parametrize("got", ERRORS)
def test_errors_of_a_temperature(name, got):
    temperature, kind = ERRORS[got]
    with pytest.raises(kind) as error:
        getattr(jaxent, name)(*pairs(2, 1.0), temperature=temperature)
    message = str(error.value)
    assert message.startswith(f"jaxent.{name}: `temperature` must be ")
    assert message.endswith(f", but is {got}. {DIVIDES}")


@names
def test_one_axis_for_rows_and_classes(name):
    axes = {"class_axis_name": "one", "batch_axis_name": ("other", "one")}
    with pytest.raises(ValueError, match=f"jaxent.{name}: `batch_axis_name` must be another axis"):
        getattr(jaxent, name)(*pairs(2, 1.0), **axes)
