"""Options that are numbers may be arrays, known at run time only: annealed, mapped over, differentiated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import harness
import jaxent
from tables import thinned

N, D, V = 6, 3, 9
SOURCES = ("dense", *harness.LINEAR)
LOSSES = {
    "cross-entropy": jaxent.softmax_cross_entropy,
    "focal": jaxent.softmax_focal_loss,
    "poly": jaxent.softmax_poly_loss,
}
# for each option: inside of its range, its ends, and outside
VALUES = {
    "label_smoothing": ((0.0, 0.1, 1.0), (-0.1, 1.1, np.nan)),
    "z_loss": ((0.0, 1e-2), (-1e-4, np.inf)),
    "gamma": ((0.0, 0.5, 2.0, 3.7), (-0.5,)),
    "epsilon": ((-1.0, 0.0, 1.7), (-1.1,)),
}
OF = {"gamma": "focal", "epsilon": "poly"}


@functools.cache
def arrays():
    rng = np.random.default_rng(12)
    hidden, kernel = np.float32(2 * rng.normal(size=(N, D))), np.float32(rng.normal(size=(D, V)))
    return jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(rng.integers(V, size=N))


def logits_of(source, hidden, kernel, **options):
    layer = jaxent.LinearLogits(hidden, kernel, **options)
    return layer.dense() if source == "dense" else layer


@thinned(3, "option, source", VALUES, SOURCES)
def test_values_are_those_of_numbers(option, source):
    """For each number by one program, as by a program of its own; its derivative is that of finite differences."""
    hidden, kernel, label = arrays()
    inside, outside = VALUES[option]

    def losses(value, hidden, reduction="none"):
        f = LOSSES[OF.get(option, "cross-entropy")]
        return f(logits_of(source, hidden, kernel), label, reduction=reduction, **{option: value})

    def mean(value, hidden):
        return losses(value, hidden, "mean")

    with harness.blocks(source):
        of_values = jax.jit(
            jax.vmap(jax.value_and_grad(mean, (0, 1)), (0, None)), compiler_options=harness.QUICK
        )
        found, (slopes, gradients) = of_values(jnp.float32(inside + outside), hidden)
        of_numbers = jax.jit(
            lambda hidden: [jax.value_and_grad(functools.partial(mean, x))(hidden) for x in inside],
            compiler_options=harness.QUICK,
        )
        wanted = of_numbers(hidden)
        rows = jax.jit(jax.vmap(losses, (0, None)))(jnp.float32(inside), hidden)
    for i, (value, gradient) in enumerate(wanted):
        np.testing.assert_allclose(found[i], value, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(rows[i].mean(), value, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(gradients[i], gradient, rtol=2e-5, atol=2e-6)
    assert np.isnan(found[len(inside) :]).all()
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    for value, slope in zip(inside, slopes, strict=False):
        step = 1e-6
        low, high = value - step * (value > inside[0]), value + step * (value < inside[-1])
        want = (plain(option, high, z) - plain(option, low, z)) / (high - low)
        np.testing.assert_allclose(slope, want, rtol=2e-5, atol=2e-6)


def plain(option, value, z):
    """The mean in NumPy float64."""
    options = {"label_smoothing": 0.0, "z_loss": 0.0, "gamma": 0.0, "epsilon": 0.0, option: value}
    lse = np.log(np.exp(z).sum(-1))
    log_p = z - lse[:, None]
    log_p_y = log_p[np.arange(N), np.asarray(arrays()[2])]
    a, p = options["label_smoothing"], np.exp(log_p_y)
    ce = -(1 - a) * log_p_y - a * log_p.mean(-1)
    loss = (1 - p) ** options["gamma"] * ce + options["epsilon"] * (1 - p) + options["z_loss"] * lse**2
    return loss.mean()


def test_an_infinite_loss_that_is_not_asked_for():
    """0 * inf = 0, at either end of the smoothing."""
    logits, label = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[1, 2]])

    @jax.jit
    def loss(a, label):
        return jaxent.softmax_cross_entropy(logits, label, label_smoothing=a)

    assert np.isfinite(loss(jnp.float32(0), label[:, 0])) and loss(jnp.float32(0.5), label[:, 0]) == np.inf


def test_a_number_compiles_to_less():
    """An option that is off costs nothing; one that is a value is compiled once."""
    hidden, kernel, label = arrays()
    logits, traces = hidden @ kernel, []

    @jax.jit
    def annealed(a):
        traces.append(a)
        return jaxent.softmax_cross_entropy(logits, label, label_smoothing=a, z_loss=a, reduction="mean")

    assert annealed(0.1) != annealed(0.2) and len(traces) == 1

    def exponentials(**options):
        return str(jax.make_jaxpr(lambda z: jaxent.softmax_focal_loss(z, label, **options))(logits)).count(
            "pow"
        )

    assert exponentials(gamma=2) == exponentials(gamma=np.float64(2)) < exponentials(gamma=jnp.float32(2)) + 1


# Of a layer: temperature, also one per row, and softcap.

OPTIONS = {
    "temperature": {"temperature": jnp.float32(0.7)},
    "per row": {"temperature": jnp.linspace(0.3, 2.0, N)},
    "softcap": {"softcap": jnp.float32(2.5)},
    "both": {"temperature": jnp.linspace(0.3, 2.0, N), "softcap": jnp.float32(2.5)},
}


def reference(hidden, kernel, options):
    z = hidden @ kernel
    if "softcap" in options:
        z = options["softcap"] * jnp.tanh(z / options["softcap"])
    t = options.get("temperature", jnp.ones(()))
    return z / (t[:, None] if t.ndim else t)


@thinned(2, "source, reduction", SOURCES, ["mean", "none"])
def test_layers(source, reduction):
    """Losses and all gradients, with rows and classes that do not count and hold NaN."""
    hidden, kernel, label = arrays()
    where, class_mask = jnp.arange(N) != 4, jnp.arange(V) != 5
    label = jnp.where(label == 5, 6, label)
    # where logits are made first, that is the user's own matmul, which would multiply NaN by 0
    nothing = jnp.nan if source != "dense" else 1.0
    garbage = hidden.at[4].set(nothing)
    direction = jnp.cos(jnp.arange(N, dtype=jnp.float32))

    def total(losses):
        return losses @ direction if losses.ndim else losses

    def loss(hidden, kernel, options):
        logits = logits_of(source, hidden, kernel, **options)
        return total(
            jaxent.softmax_cross_entropy(
                logits, label, where=where, class_mask=class_mask, z_loss=0.01, reduction=reduction
            )
        )

    def want(hidden, kernel, options):
        z = jnp.where(class_mask[None], reference(hidden, kernel, options), -jnp.inf)
        lse = nn.logsumexp(z, -1)
        losses = lse - z[jnp.arange(N), label] + 0.01 * lse**2
        losses = jnp.where(where, losses, 0)
        return total(losses if reduction == "none" else losses.sum() / where.sum(dtype=jnp.float32))

    def garbage_in(options):
        t = options.get("temperature", jnp.ones(()))
        return options | ({"temperature": t.at[4].set(nothing)} if t.ndim else {})

    with harness.blocks(source):
        got = jax.jit(
            lambda: [
                jax.value_and_grad(loss, (0, 1, 2))(garbage, kernel, garbage_in(o)) for o in OPTIONS.values()
            ],
            compiler_options=harness.QUICK,
        )()
    wanted = jax.jit(
        lambda: [jax.value_and_grad(want, (0, 1, 2))(hidden, kernel, o) for o in OPTIONS.values()],
        compiler_options=harness.QUICK,
    )()
    for name, g, w in zip(OPTIONS, got, wanted, strict=True):
        for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(w), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("source", SOURCES)
def test_layers_of_values_out_of_range(source):
    hidden, kernel, label = arrays()

    @jax.jit
    def losses(temperature, softcap):
        logits = logits_of(source, hidden, kernel, temperature=temperature, softcap=softcap)
        return jaxent.softmax_cross_entropy(logits, label)

    with harness.blocks(source):
        got = losses(jnp.array([1.0, 0.0, -1.0, np.nan, np.inf, 2.0]), jnp.float32(1))
        assert np.isnan(got).tolist() == [False, True, True, True, True, False]
        assert np.isnan(losses(jnp.ones(N), jnp.float32(0))).all()


def test_layers_are_compiled_once_and_mapped():
    hidden, kernel, label = arrays()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def losses(t, layer):
        logits = jaxent.LinearLogits(layer.hidden, layer.kernel, temperature=t)
        return jaxent.softmax_cross_entropy(logits, label, reduction="mean")

    layer = jaxent.LinearLogits(hidden, kernel)
    t = jnp.array([0.5, 1.0, 3.0])
    want = [jaxent.softmax_cross_entropy(hidden @ kernel / x, label, reduction="mean") for x in t]
    np.testing.assert_allclose(losses(t, layer), jnp.stack(want), rtol=1e-6)
    mapped = jax.tree.map(lambda x: x * 2, jaxent.LinearLogits(hidden, kernel, temperature=t[0], softcap=3.0))
    assert mapped.temperature == 1 and mapped.softcap == 3  # an array is a leaf, a number is not
