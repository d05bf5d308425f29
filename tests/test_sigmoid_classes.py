"""Sigmoid losses: weights per class and per element, the class axis; every option alone and every pair."""

import functools
import itertools
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import jaxent
import oracle_complex
from harness import QUICK, assert_within, cotangent_of
from jaxent import sigmoid_cross_entropy, sigmoid_focal_loss
from sigmoid_cases import LOSSES, ORACLES, losses

SHAPES = {  # and where the classes are
    "[N, V]": ((5, 3), -1),
    "[V, N]": ((3, 5), 0),
    "[N, V, H, W]": ((2, 3, 2, 4), 1),
    "[V]": ((7,), -1),
    "[]": ((), -1),
}
WORLD = {
    "loss": tuple(f.__name__ for f in LOSSES),
    "shape": tuple(SHAPES),
    "labels": ("bool", "int32", "uint8", "float"),
    "dtype": ("float32", "bfloat16", "float16"),
    "reduction": ("none", "sum", "mean"),
}
OPTIONS = {
    "pos_weight": ("number", "[]", "[V]", "[...]"),
    "alpha": ("number", "[]", "[V]", "[...]"),
    "where": ("given",),
    "ignore_index": (255,),
    "weights": ("given",),
    "label_smoothing": (0.2,),
}
IGNORED = {"int32": (-100, 255), "uint8": (255,)}  # of labels


def allowed(case):
    return not (
        (case["alpha"] and case["loss"] != "sigmoid_focal_loss")
        or (case["ignore_index"] and case["labels"] not in IGNORED)
        or (case["shape"] == "[]" and "[V]" in (case["pos_weight"], case["alpha"]))
    )


LEVELS = {name: (*of, None) if name in OPTIONS else of for name, of in (WORLD | OPTIONS).items()}


def pairs(case):
    return set(itertools.combinations(case.items(), 2))


def table():
    """Each option alone in all there is, level by level, then every pair of levels of two factors."""
    rng, rows = random.Random(0), []

    def cases_of(options):
        while True:
            case = {name: rng.choice(of) for name, of in LEVELS.items()} | options
            if allowed(case):
                yield case

    def cover(options, parts, patience):
        seen, stale = set(), 0
        while stale < patience:  # the last test looks whether that was enough
            case = max(itertools.islice(cases_of(options), 20), key=lambda case: len(parts(case) - seen))
            stale = 0 if parts(case) - seen else stale + 1
            rows.extend([] if stale else [case])
            seen |= parts(case)

    for name, of in OPTIONS.items():
        for x in of:
            cover(dict.fromkeys(OPTIONS) | {name: x}, lambda case: set(case.items()), 10)
    cover({}, pairs, 60)
    return rows


TABLE = table()


def name_of(case):
    return " ".join(f"{k}={x}" if k in OPTIONS else str(x) for k, x in case.items() if x is not None)


def along(x, shape, axis):
    """[V] as an array of the rank of the logits."""
    return x.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]) if x.ndim == 1 else x


def summed(x, like, axis):
    """A gradient per element, in the shape of its option."""
    if like.ndim == x.ndim:
        return x
    return x.sum(tuple(i for i in range(x.ndim) if like.ndim == 0 or i != axis % x.ndim))


@functools.cache
def build(i):
    """(what jaxent gets: arrays and the rest; the value, the gradients) of a case; what is hidden holds garbage."""
    case = TABLE[i]
    rng = np.random.default_rng(zlib.crc32(name_of(case).encode()))
    shape, axis = SHAPES[case["shape"]]
    position = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    sizes = {"number": (), "[]": (), "[V]": (shape[axis],) if shape else None, "[...]": shape}

    def floats(x):
        return np.asarray(x).astype(cases.NUMPY_DTYPES[case["dtype"]]).astype(np.float64)

    z, kind = floats(2 * rng.normal(size=shape)), case["labels"]
    y = floats(rng.choice([0, 0.2, 0.9, 1] if kind == "float" else [0, 1], size=shape))
    counts, weights = np.ones(shape, bool), np.ones(shape)
    arrays, rest = {}, {"reduction": case["reduction"], "axis": axis}
    if case["where"]:
        counts = arrays["where"] = position % 4 != 2
    if case["weights"]:
        weights = cases.rounded(rng.uniform(0.5, 2, size=shape)) * (position % 5 != 3)
        arrays["weights"] = np.where(counts, weights, np.nan).astype(np.float32)
    gone = ~counts | (weights == 0)
    bad = {"bool": y > 0, "float": np.nan}.get(kind, 7)
    labels = np.where(gone, bad, y)
    if case["ignore_index"]:
        rest["ignore_index"] = ignored = int(rng.choice(IGNORED[kind]))
        at = position % 3 == 1
        counts, gone, labels = counts & ~at, gone | at, np.where(at, ignored, labels)
    clean, smoothing = {"logits": z}, {name: case[name] for name in ("label_smoothing",) if case[name]}
    arrays |= {"logits": np.where(gone, np.nan, z)}
    rest |= smoothing
    if kind == "float":
        clean["labels"], arrays["labels"] = y, labels
    for name, low, high in (("pos_weight", 0.5, 3), ("alpha", 0.1, 0.9)):
        if case[name]:
            x = clean[name] = floats(rng.uniform(low, high, size=sizes[case[name]]))
            if case[name] == "number":
                rest[name] = float(clean.pop(name))
            else:
                arrays[name] = np.where(gone, np.nan, x) if case[name] == "[...]" else x
    moving = tuple(clean)

    def f(**x):
        x = {"labels": y} | {name: rest[name] for name in ("pos_weight", "alpha") if name in rest} | x
        x |= {name: along(x[name], shape, axis) for name in ("pos_weight", "alpha") if name in clean}
        options = smoothing | ({"alpha": x["alpha"]} if "alpha" in x else {})
        return oracle_complex.sigmoid(case["loss"], x["logits"], x["labels"], x.get("pos_weight", 1), options)

    loss = f(**clean)
    scale = np.where(counts, weights, 0)
    if case["reduction"] == "mean":
        scale = scale / (scale.sum() or 1)
    value = scale * loss if case["reduction"] == "none" else (scale * loss).sum()
    ct = cotangent_of(value.shape)
    gradients = {}
    for name in moving:
        whole = {k: np.broadcast_to(along(x, shape, axis), shape) for k, x in clean.items()}
        slope = oracle_complex.slopes(lambda x, name=name, whole=whole: f(**whole | {name: x}), whole[name])
        gradients[name] = summed(ct * scale * slope, clean[name], axis)
    arrays = {k: x.astype(cases.NUMPY_DTYPES[case["dtype"]]) if k in moving else x for k, x in arrays.items()}
    if kind != "float":
        arrays["labels"] = np.asarray(labels).astype(kind)
    return arrays, rest, value, ct, gradients


def found(rows):
    """Of some cases, as one program."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everything(of_cases):
        results = []
        for i, (arrays, ct) in zip(rows, of_cases, strict=True):
            _, rest, *_, gradients = build(i)

            def f(moving, i=i, arrays=arrays, rest=rest):
                return getattr(jaxent, TABLE[i]["loss"])(**arrays | moving, **rest)

            value, vjp = jax.vjp(f, {name: arrays[name] for name in gradients})
            results.append((value, *vjp(ct)))
        return results

    return everything([(jax.tree.map(jnp.asarray, build(i)[0]), jnp.float32(build(i)[3])) for i in rows])


@pytest.mark.parametrize("start", range(0, len(TABLE), 8))
def test_every_option_alone_and_every_pair(start):
    rows = range(start, min(start + 8, len(TABLE)))
    for i, (value, gradients) in zip(rows, found(rows), strict=True):
        arrays, _, want, _, wanted = build(i)
        name = name_of(TABLE[i])
        assert value.dtype == jnp.float32 and gradients.keys() == wanted.keys()
        parts = [("value", value, want, 0.0)]
        for key, g in gradients.items():
            assert g.dtype == arrays[key].dtype and g.shape == arrays[key].shape
            rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[str(g.dtype)]
            parts.append((key, g, wanted[key], rounding))
        for key, got, x, rounding in parts:
            bound = np.where(x == 0, 0, (4e-6 + rounding) * np.abs(x).max(initial=0))
            assert_within(np.asarray(got, np.float64), x, bound, f"{name}: {key}")


def test_the_table_has_every_pair():
    """That may be: any two levels, but those that `allowed` cannot have."""
    have = set().union(*map(pairs, TABLE))
    plain = {"loss": "sigmoid_focal_loss", "shape": "[N, V]", "labels": "uint8"} | dict.fromkeys(OPTIONS)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(LEVELS, 2)
        for x, y in itertools.product(LEVELS[a], LEVELS[b])
        if allowed(plain | {a: x, b: y})
    }
    assert wanted <= have
    alone = [row for row in TABLE if sum(row[name] is not None for name in OPTIONS) == 1]
    for name, of in OPTIONS.items():
        for x, (factor, worlds) in itertools.product(of, WORLD.items()):
            got = {row[factor] for row in alone if row[name] == x}
            assert got == {w for w in worlds if allowed(plain | {name: x, factor: w})}, (name, x, factor)


def test_two_oracles():
    """Complex steps in the table; elsewhere a derivation in longdouble, here with arrays of all three shapes."""
    rng = np.random.default_rng(1)
    z, y = rng.normal(0, 2, (2, 4, 3)), rng.uniform(size=(4, 3))
    y[0] = 0.5
    for loss, w in itertools.product(LOSSES, (rng.uniform(1, 2, 3), rng.uniform(size=(4, 3)))):
        alpha = {"alpha": rng.uniform(size=(4, 3))} if loss is sigmoid_focal_loss else {}
        f = functools.partial(oracle_complex.sigmoid, loss.__name__, o=alpha | {"label_smoothing": 0.1})
        want, *slopes = ORACLES[loss](z, y, pos_weight=w, label_smoothing=0.1, **alpha)
        inputs = [z, y, np.broadcast_to(w, (4, 3))]
        np.testing.assert_allclose(f(*inputs), want.astype(float), rtol=1e-12)
        for i, x in enumerate(slopes):
            step = [1j * oracle_complex.STEP * (i == k) for k in range(3)]
            got = f(*(a + b for a, b in zip(inputs, step, strict=True))).imag / oracle_complex.STEP
            np.testing.assert_allclose(got, x.astype(float), rtol=1e-10, atol=1e-13)


# what torch 2.13.0 gives: BCEWithLogitsLoss and its gradient, pos_weight per class and per element
Z = np.float32([[0.5, -1.0, 2.0], [-3.0, 0.25, 1.0]])
YES = np.float32([[1, 0, 1], [0, 1, 0]])
OF_TORCH = [
    ([0.5, 2, 7], [[0.23703849, 0.31326175, 0.8884961], [0.04858732, 1.1518788, 1.3132617]],
     [[-0.18877032, 0.26894143, -0.8344207], [0.04742587, -0.87564695, 0.7310586]]),
    ([[0.5, 2, 7], [1, 3, 4]], [[0.23703849, 0.31326175, 0.8884961], [0.04858732, 1.7278183, 1.3132617]],
     [[-0.18877032, 0.26894143, -0.8344207], [0.04742587, -1.3134704, 0.7310586]]),
]  # fmt: skip


@pytest.mark.parametrize("pos_weight, values, slopes", OF_TORCH)
def test_parity_with_torch(pos_weight, values, slopes):
    """There the class axis is where broadcasting puts it; here one says which it is."""
    w = jnp.float32(pos_weight)
    for axis in (1, 0):  # [N, V], [V, N]
        turn = (lambda x: jnp.asarray(x).T) if axis == 0 else jnp.asarray
        options = {"labels": turn(YES), "pos_weight": turn(w) if w.ndim == 2 else w, "axis": axis}
        out, vjp = jax.vjp(functools.partial(sigmoid_cross_entropy, **options), turn(Z))
        np.testing.assert_allclose(turn(out), values, rtol=1e-6)
        np.testing.assert_allclose(turn(vjp(jnp.ones_like(out))[0]), slopes, rtol=1e-6)


@pytest.mark.usefixtures("as_users_run")
def test_parity_of_focal_with_optax_and_torchvision():
    rng = np.random.default_rng(2)
    z = rng.normal(0, 3, (2, 3, 2, 4)).astype(np.float32)
    y = (rng.uniform(size=z.shape) < 0.4).astype(np.float32)
    per_class, per_element = np.float32([0.25, 0.5, 0.9]), rng.uniform(size=z.shape).astype(np.float32)
    for alpha, theirs in ((per_class, per_class[:, None, None]), (per_element, per_element)):
        got = sigmoid_focal_loss(jnp.asarray(z), y, alpha=alpha, axis=1)
        peer = optax.sigmoid_focal_loss(jnp.asarray(z), y, alpha=jnp.broadcast_to(theirs, z.shape), gamma=2.0)
        np.testing.assert_allclose(got, peer, rtol=5e-6)
        # torchvision.ops.sigmoid_focal_loss, in float64
        p = 1 / (1 + np.exp(-np.float64(z)))
        ce = -y * np.log(p) - (1 - y) * np.log(1 - p)
        p_t, alpha_t = p * y + (1 - p) * (1 - y), theirs * y + (1 - theirs) * (1 - y)
        np.testing.assert_allclose(got, alpha_t * ce * (1 - p_t) ** 2, rtol=5e-6)


def test_transformations():
    rng = np.random.default_rng(3)
    z, dot = (jnp.float32(x) for x in rng.normal(0, 2, (2, 4, 3, 2)))
    y, w = (jnp.float32(x) for x in rng.uniform(size=(2, 4, 3, 2)))
    alphas = jnp.float32(rng.uniform(size=(5, 3)))

    def f(alpha, z, w):
        return sigmoid_focal_loss(z, y, alpha=alpha, pos_weight=w, axis=1)

    def total(alpha, z, w):
        return (f(alpha, z, w) * (1 + jnp.arange(24.0).reshape(4, 3, 2))).sum()

    gradient, every = jax.grad(total, (0, 1, 2)), (alphas[1], z, w)
    dots = (jnp.ones(3), dot, dot)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everything(z):
        by_row = jax.vmap(lambda z, y, w: sigmoid_focal_loss(z, y, alpha=alphas[1], pos_weight=w, axis=0))
        by_class = jax.vmap(lambda z, y, a: sigmoid_focal_loss(z, y, alpha=a), (1, 1, 0), 1)
        d = gradient(alphas[1], z, w)
        return {
            "alphas": (jax.vmap(f, (0, None, None))(alphas, z, w), jnp.stack([f(a, z, w) for a in alphas])),
            "gradients by alphas": (
                jax.vmap(gradient, (0, None, None))(alphas, z, w)[0],
                jnp.stack([gradient(a, z, w)[0] for a in alphas]),
            ),
            "rows": (by_row(z, y, w), f(alphas[1], z, w)),
            "classes": (by_class(z, y, alphas[1]), f(alphas[1], z, None)),
            "grad in vmap": (jax.vmap(lambda z, w: gradient(alphas[1], z, w)[2])(z[None], w[None])[0], d[2]),
            "jvp": (
                jax.jvp(total, (alphas[1], z, w), dots)[1],
                sum(jnp.vdot(a, b) for a, b in zip(d, dots, strict=True)),
            ),
            "jacfwd": (jax.jacfwd(total)(alphas[1], z, w), d[0]),
        }

    for name, (a, b) in everything(z).items():
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(gradient(*every)[0], jax.jit(gradient)(*every)[0], rtol=1e-6)


@losses
def test_second_derivatives(loss, x64):
    """By logits and options, of all three shapes; there is nothing left to sum wrongly in what differences give."""
    rng = np.random.default_rng(4)
    z, y, w = (jnp.asarray(x) for x in rng.uniform(0.1, 0.9, (3, 2, 3)))
    moving = {"logits": 3 * z - 1, "pos_weight": w}
    if loss is sigmoid_focal_loss:
        moving |= {"alpha": w[0], "gamma": jnp.asarray(1.5)}

    def f(x):
        return (loss(**x, labels=y, label_smoothing=0.1) * (1 + jnp.arange(6.0).reshape(2, 3))).sum()

    gradient, hessian = jax.jit(jax.grad(f)), jax.jit(jax.hessian(f))(moving)
    reverse = jax.jit(jax.jacrev(jax.jacrev(f)))(moving)
    h = 1e-5
    for name, x in moving.items():
        for at in np.ndindex(x.shape):
            up, down = (gradient(moving | {name: x.at[at].add(s)}) for s in (h, -h))
            for other in moving:
                want = (up[other] - down[other]) / (2 * h)
                for found in (hessian, reverse):
                    np.testing.assert_allclose(found[other][name][(..., *at)], want, rtol=1e-6, atol=1e-8)


BAD = {"pos_weight": (-0.5, np.nan, np.inf), "alpha": (-0.5, np.nan, 1.5)}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_weight_poisons_its_class_or_element(name):
    z, y = jnp.ones((2, 4)), jnp.float32([[0, 1, 0.5, 0], [1, 0.5, 0, 1]])

    @jax.jit
    def everything(z, y, x):
        out, vjp = jax.vjp(lambda z, y, x: sigmoid_focal_loss(z, y, **{name: x}), z, y, x)
        return out, *vjp(jnp.ones_like(out))

    for x in ([*BAD[name], 0.5], [[0.5, *BAD[name]], [0.5, 0.5, BAD[name][0], 0.5]]):
        bad = ~((np.array(x) >= 0) & (np.array(x) <= 1))
        *found, d = everything(z, y, jnp.float32(x))
        for value in found:
            np.testing.assert_array_equal(np.isnan(value), np.broadcast_to(bad, (2, 4)))
        np.testing.assert_array_equal(np.isnan(d), bad)
        with pytest.raises(ValueError, match=f"`{name}` must be .*, but is "):
            sigmoid_focal_loss(z, y, **{name: np.array(x)})


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_a_bad_weight_goes_with_its_element(name, shape):
    """Hidden, ignored or of weight 0: nothing comes of it, not even by options that all elements share."""
    position = np.arange(7).reshape(shape)
    y = jnp.asarray(np.where(position == 1, 255, position % 2))
    where, weights = jnp.asarray(position != 3), jnp.float32(position != 5)
    gone = np.isin(position, [1, 3, 5])
    clean = jnp.full(shape, 0.5)

    @jax.jit
    def everything(x):
        def f(z, x, weights, smoothing, gamma):
            options = {"where": where, "weights": weights, "ignore_index": 255, "gamma": gamma}
            return sigmoid_focal_loss(
                z, y, **{name: x}, **options, label_smoothing=smoothing, reduction="mean"
            )

        return jax.value_and_grad(f, (0, 1, 2, 3, 4))(clean, x, weights, jnp.float32(0.1), jnp.float32(2))

    want = everything(clean)
    for bad in BAD[name]:
        value, (dz, dx, d_weights, *others) = everything(jnp.where(gone, bad, clean))
        np.testing.assert_array_equal(value, want[0])
        for got, x in ((dz, want[1][0]), (dx, want[1][1])):
            np.testing.assert_array_equal(got, x)
            np.testing.assert_array_equal(got[gone], 0)
        np.testing.assert_array_equal(d_weights, np.where(gone, 0, want[1][2]))
        np.testing.assert_array_equal(others, want[1][3:])


@losses
def test_shapes_that_say_the_same(loss):
    """A number, one per class, one per element; at one axis [V] is both."""
    z, y = jnp.float32([[0.5, -2, 3], [1, 0, -1]]), jnp.float32([[1, 0, 0.5], [0, 1, 1]])
    names = ("pos_weight", "alpha") if loss is sigmoid_focal_loss else ("pos_weight",)
    for name in names:
        forms = (0.75, np.float32(0.75), jnp.full(3, 0.75), np.full((2, 3), 0.75), jnp.full((2, 3), 0.75))
        first, *others = jax.jit(lambda name=name, forms=forms: [loss(z, y, **{name: x}) for x in forms])()
        for other in others:
            np.testing.assert_allclose(other, first, rtol=3e-7)
        square = jnp.arange(4.0).reshape(2, 2) / 4  # [V, V]: nothing is taken for another thing
        columns, rows = (
            loss(jnp.ones((2, 2)), jnp.ones((2, 2)), **{name: square[1]}, axis=axis) for axis in (1, 0)
        )
        np.testing.assert_array_equal(columns, rows.T)
        assert (columns[0] != columns[1]).sum() == 0 and columns[0, 0] != columns[0, 1]


def test_what_is_kept_for_the_backward():
    """Beside logits and labels an option per element, but nothing of their size for one per class."""
    z, y = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((4, 8), jnp.int8)
    for alpha, wanted in ((jnp.full(4, 0.5), set()), (jnp.full((4, 8), 0.5), {jnp.dtype(jnp.float32)})):
        _, vjp = jax.vjp(lambda z, a: sigmoid_focal_loss(z, y, alpha=a, pos_weight=a, axis=0), z, alpha)
        kept = {leaf.dtype for leaf in jax.tree.leaves(vjp) if getattr(leaf, "shape", ()) == (4, 8)}
        assert kept - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)} == wanted
