"""The sums of the dense loss on a CPU: the anchor, the lane that is left out, and what each number of classes takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
from jaxent._logits import dense_on_cpu

# few, in one sum, a prime, in groups, a prime that would be in groups
CLASSES = [1, 2, 16, 17, 251, 1000, 4096, 4099, 32_000]
N = 24


def maxima():
    """Around every change of the anchor, and far out."""
    near = np.concatenate([np.linspace(-3, 3, 40), np.linspace(67, 88, 80), np.linspace(115, 145, 80)])
    far = np.geomspace(1e-3, 1e30, 120)
    return np.concatenate([near, far, -far]).astype(np.float32)


def test_differences_from_the_anchor_are_exact():
    """For what lies within 70 of the maximum; within 86, down to where nothing is left, but for 2^-21."""
    rng = np.random.default_rng(0)
    m = maxima()[:, None]
    below = np.concatenate([np.geomspace(1e-6, 85.65, 400), rng.uniform(0, 85.65, 400)])
    z = (np.float64(m) - below).astype(np.float32)  # with more digits than m
    c = np.asarray(dense_on_cpu.anchor(jnp.asarray(m)))
    assert (c - m == np.float64(c) - np.float64(m)).all()
    error = np.abs((z - c).astype(np.float64) - (np.float64(z) - np.float64(c)))
    far = np.float64(m) - z > 70
    assert (error[~far] == 0).all() and (error <= 2.0**-21).all()
    # no exponential overflows, nor a sum of them, nor the numbers that leave one out
    reach, most = (np.float64(z) - c).max(), dense_on_cpu.MOST_CLASSES
    assert np.exp(reach) * most < 2.0**127 and np.exp(reach) < dense_on_cpu.BEYOND[4]
    assert np.isfinite(np.float32(dense_on_cpu.BEYOND[4]) * np.float32(most))


def test_the_anchor_of_rows_without_an_answer():
    m = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    assert dense_on_cpu.anchor(m).tolist() == [0, 0, 0]


def rows(v, kind):
    """[N, v] logits of a kind, and labels: the largest, another, the last."""
    rng = np.random.default_rng(v)
    z = rng.standard_normal((N, v)).astype(np.float32)
    top = z.argmax(-1)
    label = np.where(np.arange(N) % 3 == 0, top, rng.integers(0, v, N))
    label[-1] = v - 1
    at = np.arange(N)
    if kind == "confident":
        z[at, label] += 50
    elif kind == "ties":
        z = np.round(z)
    elif kind == "offset":
        z += np.repeat([-1e4, -70, 70, 1e4], N // 4)[:, None].astype(np.float32)
    elif kind == "scale":
        z *= np.repeat(np.float32([1e-30, 1e-3, 30, 1e30]), N // 4)[:, None]
    elif kind == "half of them -inf":
        z[:, : v // 2] = -np.inf
        label = np.maximum(label, v // 2)
    return z, label.astype(np.int32)


def exact_rest(z, m):
    """sum_j exp(z_j - m) - 1, the largest term left out, in longdouble."""
    e = np.exp(z.astype(np.longdouble) - m[:, None])
    e[np.arange(len(z)), z.argmax(-1)] = 0
    return e.sum(-1)


KINDS = ["ordinary", "confident", "ties", "offset", "scale", "half of them -inf"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", CLASSES)
def test_maximum_and_rest(v, kind):
    z, label = rows(v, kind)
    m, want = z.max(-1), exact_rest(z, z.max(-1))
    z_y = jnp.asarray(z[np.arange(N), label])
    found = {
        "no label": jax.jit(lambda z: dense_on_cpu.max_and_rest(z, None))(z),
        "label": jax.jit(dense_on_cpu.max_and_rest)(z, (label, z_y)),
        "terms": (m, jax.jit(dense_on_cpu.rest_and_terms)(z, m, label, z_y)[0]),
    }
    for name, (got_m, got) in found.items():
        assert (got_m == m).all(), name
        # with a label whose logit is not the largest, what log(1 + r) needs
        size = want if name == "no label" else np.where(z_y == m, want, 1 + want)
        error = np.abs(np.asarray(got, np.float64) - want.astype(np.float64))
        assert (error <= 1.5e-6 * size + 1e-37).all(), (name, (error / np.maximum(size, 1e-37)).max())


@pytest.mark.parametrize("v", [5, 40, 4096])
def test_a_label_in_another_block_leaves_nothing_out(v):
    """As in blocks of classes: r is T - 1, of all lanes."""
    z, _ = rows(v, "ordinary")
    label = np.resize([-1, v, 2**31 - 1, -(2**31)], N).astype(np.int32)
    nowhere = jnp.full(N, -jnp.inf)
    for select in dense_on_cpu.select_label, dense_on_cpu.gather_label:
        assert (jax.jit(select)(z, label) == nowhere).all()
    _, r = jax.jit(dense_on_cpu.max_and_rest)(z, (label, nowhere))
    np.testing.assert_allclose(r, exact_rest(z, z.max(-1)).astype(np.float64), rtol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("v", [3, 100, 1000, 4099, 8192])
def test_a_bad_logit_anywhere_is_seen(v, bad):
    """The library that XLA calls takes many lanes at once: none of them may lose a NaN."""
    at = np.unique(np.linspace(0, v - 1, 150).astype(int))
    z = np.zeros((len(at) + 1, v), np.float32)
    z[np.arange(len(at)), at] = bad
    y = np.where(np.arange(len(z)) % 2 == 0, 0, v - 1).astype(np.int32)
    for options in ({}, {"z_loss": 1e-4, "label_smoothing": 0.1}):
        f = jax.jit(functools.partial(jaxent.softmax_cross_entropy, **options))
        loss, gradient = f(z, y), jax.jit(jax.grad(lambda z, f=f: f(z, y).sum()))(z)
        assert np.isnan(loss[:-1]).all() and np.isfinite(loss[-1])
        assert np.isnan(gradient[:-1]).all() and np.isfinite(gradient[-1]).all()


@pytest.mark.parametrize("v", [2, 10, 1000, 4099, 32_000])
def test_passes_over_the_logits(v):
    """A prime number of classes takes no more; forward two, and with the gradient the array that becomes it."""
    n = 65_536 // max(v // 64, 1)
    z, y = jax.ShapeDtypeStruct((n, v), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    mean = functools.partial(jaxent.softmax_cross_entropy, reduction="mean")
    forward = jax.jit(mean).lower(z, y).compile()
    both = jax.jit(jax.value_and_grad(mean)).lower(z, y).compile()
    assert forward.memory_analysis().temp_size_in_bytes <= 64 * n + 4 * n * (v >= 4096) * 2 * v**0.5 + 4 * v
    assert both.memory_analysis().temp_size_in_bytes <= 64 * n


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=str)
@pytest.mark.parametrize("n, d, v", [(16_384, 64, 1000), (2048, 64, 32_000), (2048, 64, 32_003)])
def test_logits_exponentials_and_gradient_are_one_array(n, d, v, options):
    """Of logits that a matmul makes. (Up to 32 MiB they may be two.)"""

    def mean(hidden, kernel, y):
        return jaxent.softmax_cross_entropy(hidden @ kernel, y, reduction="mean", **options)

    hidden, kernel = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((d, v), jnp.float32)
    y = jax.ShapeDtypeStruct((n,), jnp.int32)
    program = jax.jit(jax.value_and_grad(mean, argnums=(0, 1))).lower(hidden, kernel, y).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1.02 * 4 * n * v


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("v", [1000, 32_000, 32_003])
def test_half_logits_are_written_out_once(v, gradient):
    """In float32, which the library takes; optax has two such arrays, where it has a gradient."""
    mean = functools.partial(jaxent.softmax_cross_entropy, reduction="mean")
    z, y = jax.ShapeDtypeStruct((512, v), jnp.bfloat16), jax.ShapeDtypeStruct((512,), jnp.int32)
    program = jax.jit(jax.value_and_grad(mean) if gradient else mean).lower(z, y).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1.04 * 4 * 512 * v


@pytest.mark.parametrize("v", [10, 1000])
def test_second_derivatives_of_what_is_kept(v):
    """The gradient is made of kept exponentials; its derivative is that of the softmax."""
    z, label = rows(v, "ordinary")
    z, t = jnp.asarray(z[:4]), jnp.asarray(np.random.default_rng(1).standard_normal((4, v)), jnp.float32)
    loss = lambda z: jaxent.softmax_cross_entropy(z, label[:4], label_smoothing=0.1, z_loss=0.01).sum()  # noqa: E731

    def plain(z):
        log_z = jax.nn.logsumexp(z, -1)
        log_p = z - log_z[:, None]
        hit = 0.9 * jnp.take_along_axis(log_p, label[:4, None], -1)[:, 0]
        return (-hit - 0.1 * log_p.mean(-1) + 0.01 * log_z**2).sum()

    got, want = (jax.jvp(jax.grad(f), (z,), (t,))[1] for f in (loss, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    (again,) = jax.vjp(jax.grad(loss), z)[1](t)
    np.testing.assert_allclose(again, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-25])
@pytest.mark.parametrize("top", [20.0, 50, 80, 1e4])
def test_small_cotangents_beside_large_logits(top, scale):
    """The factor between an anchor and the maximum, up to exp(-71), times a cotangent would be flushed to 0."""
    z = np.zeros((1, 33), np.float32)
    z[0, :3] = top, top - 1, top - 3
    gradient = jax.jit(jax.grad(lambda z: scale * jaxent.softmax_cross_entropy(z, jnp.array([1])).sum()))(z)
    e = np.exp(z.astype(np.float64) - top)
    want = e / e.sum() - (np.arange(33) == 1)
    np.testing.assert_allclose(np.float64(gradient) / scale, want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("gap", [1e-30, 1e-36, 1e-38, 1e-42])
@pytest.mark.parametrize("v", [3, 100, 1000, 4099, 8192])
def test_maxima_that_are_all_but_tied(v, gap):
    z = np.full((2, v), -100, np.float32)
    z[:, 0], z[0, v // 2], z[1, -1] = 0, -gap, -gap
    statistics = jax.jit(functools.partial(jaxent.softmax_statistics))(z)
    np.testing.assert_allclose(statistics.log_normalizer, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(statistics.entropy, np.log(2), rtol=1e-6)


def test_float64_keeps_its_digits_far_below_the_maximum():
    z = np.full((1, 40), -900.0)
    z[0, :3] = 600.37, 0.12345678912345, -1.7
    with jax.enable_x64(True):
        loss = jax.jit(jaxent.softmax_cross_entropy)(z, np.array([0]))
        gradient = jax.jit(jax.grad(lambda z: jaxent.softmax_cross_entropy(z, np.array([0])).sum()))(
            jnp.asarray(z)
        )
    want = np.exp(z[0].astype(np.longdouble) - z[0, 0])[1:]
    np.testing.assert_allclose(loss, np.float64(want.sum()), rtol=1e-15)
    np.testing.assert_allclose(gradient[0, 1:3], np.float64(want[:2]), rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ties_of_any_size(dtype):
    """Where numbers lie 128 or 1024 apart, an anchor below the maximum would be as far from it."""
    largest = 2.0 ** np.arange(-20, 120 if dtype == "float32" else 1000)
    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray(np.tile(largest[:, None], 40), dtype)
        loss = jax.jit(jaxent.softmax_cross_entropy)(z, np.zeros(len(z), int))
    np.testing.assert_allclose(loss, np.log(40), rtol=1e-6)


def test_differences_of_both_signs():
    """A maximum above 70 and a logit below 0: what is left may be off by 2^-21, beside 1e-6."""
    rng = np.random.default_rng(0)
    m = rng.uniform(60, 90, 100_000).astype(np.float32)
    z = np.stack([m, (m - rng.uniform(50, 85.6, m.size)).astype(np.float32)], -1)
    loss, vjp = jax.vjp(jax.jit(lambda z: jaxent.softmax_cross_entropy(z, jnp.zeros(len(z), int))), z)
    want = np.log1p(np.exp(z[:, 1].astype(np.longdouble) - z[:, 0]))
    np.testing.assert_allclose(loss, np.float64(want), rtol=7e-7)
    np.testing.assert_allclose(vjp(jnp.ones_like(m))[0][:, 1], np.float64(want), rtol=7e-7)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.0}])
def test_one_class_has_no_gradient(options):
    z = jnp.array([[0.7], [-2.3], [70.3], [0.1]])
    f = lambda z: jaxent.softmax_cross_entropy(z, jnp.zeros(4, int), **options).sum()  # noqa: E731
    assert (jax.grad(f)(z) == 0).all() and (jax.jit(jax.grad(f))(z) == 0).all()


@pytest.mark.parametrize("v", [1, 5, 40, 4099, 8192])
def test_no_infinity_on_the_way(v):
    """jax may be told to stop at one."""
    z = jnp.zeros((4, v)).at[0, 0].set(-1e5)
    y = jnp.zeros(4, int)
    with jax.debug_infs(True):
        jax.block_until_ready(jaxent.softmax_entropy(z))
        jax.block_until_ready(jax.value_and_grad(lambda z: jaxent.softmax_cross_entropy(z, y).sum())(z))


@pytest.mark.parametrize("v", [2, 10, 1000, 4096])
@pytest.mark.parametrize("spec", [("rows",), ("rows", "classes")], ids=str)
def test_an_explicit_mesh_of_one_device(v, spec):
    """Its arrays say how they are split, which gathers, and columns put together, would have to repeat."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((1, 1), ("rows", "classes"), devices=jax.devices()[:1], axis_types=kinds)
    z, label = rows(v, "ordinary")
    losses = {
        "plain": lambda z, y: jaxent.softmax_cross_entropy(z, y).sum(),
        "options": lambda z, y: jaxent.softmax_cross_entropy(z, y, label_smoothing=0.1, z_loss=1e-3).sum(),
        "entropy": lambda z, _: jaxent.softmax_entropy(z).sum(),
    }
    want = {name: jax.value_and_grad(f)(z, label) for name, f in losses.items()}
    with jax.set_mesh(mesh):
        P = jax.sharding.PartitionSpec
        split = [jax.device_put(x, jax.NamedSharding(mesh, P(*spec[: x.ndim]))) for x in (z, label)]
        for name, f in losses.items():
            got = jax.jit(jax.value_and_grad(f))(*split)
            for one, other in zip(got, want[name], strict=True):
                np.testing.assert_allclose(one, other, rtol=3e-6, atol=1e-6)
