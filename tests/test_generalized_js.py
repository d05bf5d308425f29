"""The generalized Jensen-Shannon divergence, from forward KL at a beta of 0 to reverse KL at 1."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax import nn

import harness
import jaxent
import oracle
from cases import SUPPORTS
from layers import compiled
from tables import spread

F32, INF, NAN = np.float32, np.inf, np.nan
BETAS = (0.0, 1e-20, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 1e-9, 1.0)
STEPS = (1e-4, 1e-2, 0.3, 1.0, 4.0, 10.0)
SHARE = "It is the share of the target in the mean; 0 is KL(target || model), 1 is KL(model || target)."
js, kl = jaxent.softmax_js_divergence, jaxent.softmax_kl_divergence


# On paper, in 50 digits: the definition, and difference quotients of it.


def softmax(z, temperature):
    e = [mp.exp(x / temperature) for x in z]
    return [x / mp.fsum(e) for x in e]


def kl_on_paper(q, p):
    if any(a > 0 == b for a, b in zip(q, p, strict=True)):
        return mp.inf
    return mp.fsum(a * mp.log(a / b) for a, b in zip(q, p, strict=True) if a)


def parts_on_paper(z, t, temperature, beta):
    """KL(p || h) and KL(q || h)."""
    p, q = softmax(z, temperature), softmax(t, temperature)
    h = [(1 - beta) * a + beta * b for a, b in zip(p, q, strict=True)]
    return kl_on_paper(p, h), kl_on_paper(q, h)


def on_paper(z, t, temperature, beta):
    of_p, of_q = parts_on_paper(z, t, temperature, beta)
    return of_q if beta == 0 else of_p if beta == 1 else (1 - beta) * of_p + beta * of_q


def exactly(x):
    return [mp.mpf(float(v)) for v in x]


def as_numpy(x):
    """0 where that is what 50 digits leave of it."""
    return np.array([np.longdouble(mp.nstr(v, 25)) if abs(v) > 1e-45 else np.longdouble(0) for v in x])


def row_on_paper(z, t, temperature, beta, slopes=True):
    """The value, and derivatives by both logits, the temperature and beta; 0 by beta at the ends."""
    with mp.workdps(50):
        z, t, (temperature, beta) = exactly(z), exactly(t), exactly((temperature, beta))
        value = on_paper(z, t, temperature, beta)
        if not slopes:
            return as_numpy([value])[0]

        def by(x, f):
            moved = lambda j, v: f([*x[:j], v, *x[j + 1 :]])  # noqa: E731
            each = (
                mp.mpf(0) if mp.isinf(v) else mp.diff(functools.partial(moved, j), v) for j, v in enumerate(x)
            )
            return as_numpy(each)

        dz = by(z, lambda z: on_paper(z, t, temperature, beta))
        dt = by(t, lambda t: on_paper(z, t, temperature, beta))
        by_temperature = by([temperature], lambda x: on_paper(z, t, *x, beta))[0]
        inside = 0 < beta < 1
        by_beta = by([beta], lambda x: on_paper(z, t, temperature, *x))[0] if inside else np.longdouble(0)
        return as_numpy([value])[0], dz, dt, by_temperature, by_beta


@functools.cache
def table(dtype):
    """Rows of which each has a step and a beta, and what they must be; as numbers and rounded to float32."""
    rng = np.random.default_rng(5)
    beta, step = (x.ravel() for x in np.meshgrid(BETAS, STEPS))
    z = 2 * rng.normal(size=(beta.size, 4))
    t = z + step[:, None] * rng.normal(size=z.shape)
    z, t = (np.asarray(jnp.asarray(F32(x), "float32" if dtype == "float64" else dtype)) for x in (z, t))
    temperature = F32(rng.choice([1, 0.75, 2.5], size=beta.size))
    rounded = beta if dtype == "float64" else np.float64(F32(beta))
    return z, t, temperature, beta, tuple(rows_on_paper(z, t, temperature, b) for b in (beta, rounded))


def rows_on_paper(z, t, temperature, beta):
    rows = [row_on_paper(*row) for row in zip(z, t, temperature, beta, strict=True)]
    return tuple(map(np.array, zip(*rows, strict=True)))


def norm(x):
    return np.linalg.norm(np.longdouble(x), axis=-1)


def check(got, want, z, t, temperature, dtype):
    value, dz, dt, by_temperature, by_beta = map(np.longdouble, got)
    eps = 1e-14 if dtype == "float64" else 1.5e-6
    rounding = eps if dtype != "bfloat16" else 2.0**-8
    want_value, want_dz, want_dt, want_by_temperature, want_by_beta = want
    assert (value >= 0).all()
    harness.assert_within(value, want_value, eps * want_value, "value")
    # a row that is sure of a class has the difference of the others' small ones there
    for name, g, w in (("logits", dz, want_dz), ("targets", dt, want_dt)):
        harness.assert_within(
            norm(g - w), 0 * norm(w), rounding * norm(w) + eps * want_value / temperature, name
        )
    size = np.sum(np.abs(want_dz * z) + np.abs(want_dt * t), -1) / temperature
    harness.assert_within(by_temperature, want_by_temperature, 2 * eps * size, "temperature")
    harness.assert_within(by_beta, want_by_beta, eps * sizes_of_slopes(want_value, want_by_beta), "beta")


def sizes_of_slopes(value, slope):
    """KL(q || h) + KL(p || h), of which beta's is the difference, is at most this."""
    return np.abs(slope) + 4 * value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["numbers", "an array"])
def test_values_and_gradients(dtype, kind):
    z, t, temperature, beta, wants = table(dtype)
    of_numbers = {b: beta == b for b in BETAS}

    def rows(z, t, temperature, beta):
        if kind == "an array":
            return js(z, t, temperature=temperature, beta=beta)
        found = jnp.zeros(len(z), jnp.float64 if dtype == "float64" else jnp.float32)
        for b, here in of_numbers.items():
            found = found.at[here].set(js(z[here], t[here], temperature=temperature[here], beta=b))
        return found

    with jax.enable_x64(dtype == "float64"):
        wide = np.float64 if dtype == "float64" else F32
        inputs = z.astype(jnp.dtype(dtype)), t.astype(jnp.dtype(dtype)), wide(temperature), wide(beta)

        @compiled
        def run(*x):
            value, vjp = jax.vjp(rows, *x)
            return value, *vjp(jnp.ones_like(value))

        got = run(*inputs)
    assert [g.dtype for g in got[1:]] == [x.dtype for x in inputs]
    want = wants[kind == "an array"]
    if kind == "numbers":
        want = (*want[:4], np.zeros_like(want[4]))
    check(got, want, np.longdouble(z), np.longdouble(t), temperature, dtype)


def pairs(rows, step, seed=0, classes=6):
    rng = np.random.default_rng(seed)
    z = F32(2 * rng.normal(size=(rows, classes)))
    return z, F32(z + np.reshape(step, (-1, 1)) * rng.normal(size=z.shape))


def test_the_oracle():
    z, t, temperature, beta, (want, _) = table("float64")
    for i in range(len(z)):
        f = functools.partial(
            oracle.softmax_js_divergence, z[i], t[i], temperature=temperature[i], beta=beta[i]
        )
        np.testing.assert_allclose(f(), want[0][i], rtol=1e-13)
        got = f(cotangent=np.longdouble(1))
        for g, w in zip(got, want[1:3], strict=True):
            assert norm(g - w[i]) <= 1e-12 * norm(w[i])


def test_next_to_the_ends():
    """Of numbers: loss / beta is forward KL, loss / (1 - beta) reverse KL."""
    z, t = pairs(40, np.repeat([1e-3, 1e-2, 0.1, 1], 10))

    @compiled
    def run(z, t):
        ends = js(z, t, beta=0.0), js(z, t, beta=1.0)
        low = [js(z, t, beta=b) / b for b in (1e-8, 1e-12, 1e-20)]
        high = [js(z, t, beta=1 - c) / c for c in (2.0**-30, 2.0**-50)]
        return ends, (kl(z, t), kl(t, z)), low, high

    (forward, reverse), (want, want_reverse), low, high = run(z, t)
    np.testing.assert_array_equal((forward, reverse), (want, want_reverse))
    for got in low:
        np.testing.assert_allclose(got, want, rtol=1e-6)
    for got in high:
        np.testing.assert_allclose(got, want_reverse, rtol=1e-6)


def test_symmetry():
    z, t = pairs(30, np.repeat([1e-4, 0.1, 3], 10))
    betas = (0.0, 1e-3, 0.25, 0.5)
    found = compiled(lambda z, t: [(js(z, t, beta=b), js(t, z, beta=1 - b)) for b in betas])(z, t)
    for a, b in found:
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_it_is_never_negative_and_0_for_equal_rows():
    steps = np.repeat([0, 1e-7, 1e-6, 1e-5, 1e-3, 0.1, 30], 50)
    z, t = pairs(steps.size, steps)

    @compiled
    def run(z, t, beta):
        def rows(z, t, beta):
            return js(z + 100, t + 100, beta=beta)

        value, vjp = jax.vjp(rows, z, t, beta)
        return value, vjp(jnp.ones_like(value))

    for beta in (0.0, 1e-12, 0.3, 0.5, 1.0):
        value, gradients = run(z, t, jnp.full(len(z), beta))
        assert (np.asarray(value) >= 0).all()
        for x in (value, *gradients):
            assert (np.asarray(x)[steps == 0] == 0).all()


# Supports that differ.

ROWS = SUPPORTS | {"far": ([0, 1, 400], [400, 1, 0])}


def slopes_of(rows):
    """Values and gradients, and the second derivative of all gradients added up."""

    def slopes(*x):
        value, vjp = jax.vjp(rows, *x)
        return vjp(jnp.ones_like(value)), value

    def run(*x):
        gradients, curvature, value = jax.vjp(slopes, *x, has_aux=True)
        return value, gradients, curvature(jax.tree.map(jnp.ones_like, gradients))

    return run


@pytest.mark.parametrize("kind", ["numbers", "an array"])
def test_supports_that_differ(kind):
    z, t = (F32(x) for x in zip(*ROWS.values(), strict=True))
    betas = (0.0, 1e-20, 1e-3, 0.5, 1 - 2.0**-20, 1.0)
    directions = [slopes_of(lambda z, t: kl(z, t)), slopes_of(lambda z, t: kl(t, z))]

    @compiled
    def run(z, t):
        of_numbers = [slopes_of(functools.partial(js, beta=b))(z, t) for b in betas]
        of_arrays = jax.vmap(slopes_of(lambda *x: js(*x[:2], beta=x[2])), (None, None, 0))
        by = jnp.broadcast_to(jnp.array(betas)[:, None], (len(betas), len(z)))
        return of_numbers if kind == "numbers" else of_arrays(z, t, by), [f(z, t) for f in directions]

    found, ends = run(z, t)
    if kind == "an array":
        found = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(betas))]
    for beta, (value, gradients, curvature) in zip(betas, found, strict=True):
        assert all(np.isfinite(x).all() for x in (*gradients, *curvature))
        if beta in (0, 1):
            for a, b in zip((value, *gradients[:2]), (ends[int(beta)][0], *ends[int(beta)][1]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
            continue
        want = [row_on_paper(*row, 1, F32(beta) if kind == "an array" else beta) for row in zip(z, t)]  # noqa: B905
        want = tuple(map(np.array, zip(*want, strict=True)))
        np.testing.assert_allclose(np.float64(value), np.float64(want[0]), rtol=2e-6)
        for g, w in zip(gradients, (*want[1:3], want[4]), strict=False):
            np.testing.assert_allclose(g, np.float64(w), rtol=2e-6, atol=2e-7 * (1 + np.abs(w).max()))


def test_reverse_kl():
    """By either way the student's gradient is that of KL(student || teacher)."""
    student, teacher = pairs(8, 1.0)

    def naive(z, t):
        return jnp.sum(nn.softmax(z) * (nn.log_softmax(z) - nn.log_softmax(t)), -1)

    @compiled
    def run(student, teacher):
        ways = naive, functools.partial(js, beta=1.0), lambda z, t: kl(t, z)
        return [jax.value_and_grad(lambda z, f=f: jnp.sum(f(z, teacher)))(student) for f in ways]

    (value, gradient), *found = run(student, teacher)
    for other, slope in found:
        np.testing.assert_allclose(other, value, rtol=1e-5)
        np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-6)


# Sources, options, transformations.


@spread(
    2, "source, reduction, kind", ["rows", "mixed"], ["none", "mean"], ["a number", "an end", "[]", "[...]"]
)
def test_sources(source, reduction, kind):
    """Of layers as of arrays, with all options; a row that is hidden, or has no weight and no answer, is gone."""
    z, t = pairs(7, 1.0)
    z[4] = NAN
    options = {"where": np.arange(7) != 4, "class_mask": np.arange(6) != 2, "reduction": reduction}
    options |= {"weights": F32([1, 2, 0.5, 1, 3, 0, 0]), "temperature": F32(np.linspace(0.5, 2, 7))}
    per_row = F32([0, 0.3, 1, 1e-6, NAN, NAN, 0.5])
    beta = {"a number": 0.3, "an end": 1.0, "[]": F32(0.3), "[...]": per_row}[kind]

    def layer(z):
        return harness.as_layer(jnp.where(jnp.isnan(z), 0, z))  # in a kernel it would be everybody's

    def total(source, z, t, beta):
        both = {"dense": (z, t), "rows": (layer(z), layer(t)), "mixed": (z, layer(t))}[source]
        losses = js(*both, **options, beta=beta)
        return jnp.sum(losses * np.arange(1, 1 + losses.size, dtype=F32).reshape(losses.shape))

    @compiled
    def run(z, t):
        if isinstance(beta, float):
            return [
                jax.value_and_grad(functools.partial(total, x, beta=beta), (0, 1))(z, t)
                for x in ("dense", source)
            ]
        return [jax.value_and_grad(total, (1, 2, 3))(x, z, t, jnp.asarray(beta)) for x in ("dense", source)]

    with harness.blocks("rows"):
        want, got = map(jax.tree.leaves, run(z, t))
    assert all(np.isfinite(x).all() for x in want)
    assert (np.asarray(want[1])[4:6] == 0).all()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def naive(z, t, temperature, beta):
    log_p, log_q = (nn.log_softmax(x / temperature) for x in (z, t))
    log_h = jnp.logaddexp(log_p + jnp.log1p(-beta), log_q + jnp.log(beta))
    of_p, of_q = (jnp.sum(jnp.exp(x) * (x - log_h), -1) for x in (log_p, log_q))
    return (1 - beta) * of_p + beta * of_q


def test_all_derivatives_of_a_row(x64):
    """Hessian, forward mode, and beta mapped over in one program."""
    z, t = pairs(2, 1.0)
    x = jnp.asarray(z[0], jnp.float64), jnp.asarray(t[0], jnp.float64), jnp.float64(1.3)
    betas = jnp.array([0.01, 0.5, 0.8])

    @compiled
    def run(x, betas):
        def of(f):
            def each(beta):
                y = *x, beta
                return f(*y), jax.jacfwd(f, range(4))(*y), jax.hessian(f, range(4))(*y)

            return jax.vmap(each)(betas)

        return of(lambda z, t, temperature, beta: js(z, t, temperature=temperature, beta=beta)), of(naive)

    got, want = map(jax.tree.leaves, run(x, betas))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_values_out_of_range():
    z, t = pairs(6, 1.0)
    beta = F32([0.5, -1e-3, 1.001, NAN, 0, 1])

    @compiled
    def run(z, t, beta):
        value, vjp = jax.vjp(lambda z, t: js(z, t, beta=beta), z, t)
        return value, *vjp(jnp.ones_like(value))

    bad = np.array([False, True, True, True, False, False])
    for x in run(z, t, beta):
        np.testing.assert_array_equal(np.isnan(x), bad if x.ndim == 1 else np.repeat(bad[:, None], 6, 1))
    assert np.isnan(compiled(js)(z, t, beta=F32(1.5))).all()


def test_dtypes_of_beta(x64):
    """1 - beta is as precise as beta is."""
    z, t = pairs(5, 0.1)

    def total(beta, z, t):
        return jnp.sum(js(z, t, beta=beta))

    for dtype, out in ((jnp.bfloat16, jnp.float32), (jnp.float64, jnp.float64)):
        for beta in (jnp.float64(0.3), jnp.bfloat16(0.3)):
            value, slope = jax.eval_shape(
                jax.value_and_grad(total), beta, jnp.asarray(z, dtype), jnp.asarray(t, dtype)
            )
            assert (value.dtype, slope.dtype) == (out, beta.dtype)
    for c in (1e-9, 1e-12):
        got = compiled(js)(jnp.asarray(z), jnp.asarray(t), beta=jnp.float64(1 - c))
        np.testing.assert_allclose(got / (1 - (1 - c)), kl(t, z), rtol=1e-6)


ERRORS = {
    "a str": ("0.5", TypeError),
    "bool[]": (jnp.ones((), bool), TypeError),
    "-0.1": (-0.1, ValueError),
    "1.5": (1.5, ValueError),
    "nan": (NAN, ValueError),
    "2.0": (np.array([0.5, 2.0]), ValueError),
    "float32[6]": (jnp.ones(6), ValueError),
}


@pytest.mark.parametrize("got", ERRORS)
def test_errors(got):
    beta, kind = ERRORS[got]
    with pytest.raises(kind) as error:
        js(*pairs(2, 1.0), beta=beta)
    message = str(error.value)
    assert message.startswith("jaxent.softmax_js_divergence: `beta` must be ")
    assert kind is TypeError or "in [0, 1], but" in message or "of shape [] or [2], but" in message
    assert message.endswith(f", but is {got}. {SHARE}")


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.999])
def test_a_small_cotangent_of_a_row_that_is_sure(beta):
    """Of a mean over many rows: the factors of a derivative, one tiny and one huge, are not multiplied one by one."""
    rows = 1000
    z = jnp.stack([jnp.zeros(rows), jnp.linspace(60, 85, rows)], -1)
    classes, probs = jnp.tile(jnp.array([[0, 1]]), (rows, 1)), jnp.tile(jnp.array([[0.9, 0.05]]), (rows, 1))
    few = jaxent.SparseDistribution(classes, probs)

    @functools.partial(jax.jit, static_argnums=0)
    def slope(reduction):
        return jax.grad(lambda z: jaxent.softmax_js_divergence(z, few, beta=beta, reduction=reduction))(z)

    np.testing.assert_allclose(slope("mean") * rows, slope("sum"), rtol=1e-4, atol=1e-6)
