"""What docs/objectives.md says beside its blocks, which tests/test_readme.py runs: each objective against plain jax.

Values and gradients, compiled, of logits and of `LinearLogits`, beside a form of the same objective that is written
differently, on the probabilities of all classes; and that nothing of the size of the logits is built.
"""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from programs import avals
from test_readme import PAGES, PATTERN

pytestmark = pytest.mark.usefixtures("as_users_run")

PAGE = PAGES["objectives.md"]
BLOCKS = [code for code, _ in PATTERN.findall(PAGE)]
P, G, T, D, V = 3, 4, 6, 8, 50
BLOCK = 8  # rows whose logits exist at a time


def names_of(text, whole=False):
    """The functions of the block with this text; of the `whole` block all that it leaves behind."""
    (code,) = (code for code in BLOCKS if f"def {text}(" in code)
    tree = ast.parse(code)
    if not whole:
        tree.body = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom | ast.FunctionDef)]
    found = {}
    exec(compile(tree, text, "exec"), found)
    return found


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(seed, high, *shape):
    return np.random.default_rng(seed).integers(high, size=shape).astype(np.int32)


@pytest.fixture(autouse=True)
def blocks_of_rows(monkeypatch):
    for name in "plan", "plan_by_rows":
        monkeypatch.setattr(sources, name, lambda *_: Plan(BLOCK, V))


def agree(objective, plain, hidden, kernel=None, masks=False):
    """One function of logits in three forms; `masks` may be as large as the logits."""
    kernel = 2 * normal(9, hidden.shape[-1], V) if kernel is None else kernel

    def value_and_grad(f, to_logits):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.vdot(1.0, jnp.sum(f(to_logits(*x)))), (0, 1)))

    want = value_and_grad(plain, jnp.matmul)(hidden, kernel)
    assert all(np.abs(x).max() > 1e-4 for x in want[1])
    linear = value_and_grad(objective, jaxent.LinearLogits)
    for f in value_and_grad(objective, jnp.matmul), linear:
        for a, b in zip(jax.tree.leaves(f(hidden, kernel)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5)
    assert largest(linear, hidden, kernel, masks=masks) < np.prod(hidden.shape[:-1]) * V / 3


def largest(f, *arguments, masks=False):
    """How many numbers the largest array has that `f` makes; with `masks` of floating point numbers only."""
    made = [x for x in avals(jax.make_jaxpr(f)(*arguments).jaxpr) if hasattr(x, "shape")]
    return max(np.prod(x.shape) for x in made if not masks or jnp.issubdtype(x.dtype, jnp.floating))


def log_prob(logits, tokens):
    return jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(tokens, logits.shape[-1]), -1)


def test_blocks_check_themselves():
    assert len(BLOCKS) == 14
    assert all(expected.strip() for _, expected in PATTERN.findall(PAGE))


def test_links_lead_to_sections():
    sections = {x.lower().replace(" ", "-") for x in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)}
    links = set(re.findall(r"\(#(.*?)\)", PAGE))
    assert links == sections


# ---------------------------------------------------------------------------------------- policies and preferences


class Answers:
    hidden = normal(0, P, G, T, D)
    tokens = integers(1, V, P, G, T)
    lengths = 1 + integers(2, T, P, G, 1)
    mask = np.arange(T) < lengths
    rewards = normal(3, P, G)
    first = log_prob(hidden @ (2 * normal(9, D, V)), tokens)
    old = first + 0.3 * normal(4, P, G, T)
    reference = first + 0.5 * normal(5, P, G, T)


def standardized(rewards):
    return (rewards - np.mean(rewards, -1, keepdims=True)) / (np.std(rewards, -1, keepdims=True) + 1e-6)


def clipped_gain(ratio, advantage, low, high):
    """Where an advantage is positive a ratio counts up to a bound, else down to one."""
    up, down = jnp.minimum(ratio, 1 + high) * advantage, jnp.maximum(ratio, 1 - low) * advantage
    return jnp.where(advantage >= 0, up, down)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_grpo(beta):
    a, grpo = Answers, names_of("grpo")["grpo"]

    def objective(logits):
        return grpo(logits, a.tokens, a.mask, a.rewards, a.old, a.reference, beta=beta)

    def plain(logits):
        now = log_prob(logits, a.tokens)
        ratio, r = jnp.exp(now - a.old), jnp.exp(a.reference - now)
        gain = clipped_gain(ratio, standardized(a.rewards)[..., None], 0.2, 0.2)
        of_tokens = beta * (r - 1 - jnp.log(r)) - gain
        answers = [
            [of_tokens[i, j, : a.lengths[i, j, 0]].sum() / a.lengths[i, j, 0] for j in range(G)]
            for i in range(P)
        ]
        return sum(map(sum, answers)) / (P * G)

    agree(objective, plain, a.hidden)


def test_grpo_of_an_answer_without_tokens():
    a, grpo = Answers, names_of("grpo")["grpo"]
    mask = jnp.asarray(a.mask).at[0, 1].set(False)
    logits = a.hidden @ normal(9, D, V)
    f = jax.value_and_grad(lambda z: grpo(z, a.tokens, mask, a.rewards, a.old, a.reference))
    assert all(np.isfinite(x).all() for x in f(logits))


def test_dapo():
    a, dapo = Answers, names_of("dapo")["dapo"]
    rewards = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]], np.float32)

    def plain(logits):
        ratio = jnp.exp(log_prob(logits, a.tokens) - a.old)[np.array([0, 2])]
        gain = clipped_gain(ratio, standardized(rewards[[0, 2]])[..., None], 0.2, 0.28)
        of_tokens = gain[np.nonzero(a.mask[[0, 2]])]
        return -jnp.sum(of_tokens) / len(of_tokens)

    agree(lambda logits: dapo(logits, a.tokens, a.mask, rewards, a.old), plain, a.hidden)


def test_gspo():
    a, gspo = Answers, names_of("gspo")["gspo"]
    low, high = 0.05, 0.1
    clipped = []

    def plain(logits):
        of_tokens = jnp.where(a.mask, jnp.exp(log_prob(logits, a.tokens) - a.old), 1.0)
        ratio = jnp.prod(of_tokens, -1) ** (1 / a.lengths[..., 0])
        clipped.append((ratio < 1 - low) | (ratio > 1 + high))
        return -clipped_gain(ratio, standardized(a.rewards), low, high).sum() / (P * G)

    agree(lambda logits: gspo(logits, a.tokens, a.mask, a.rewards, a.old, low, high), plain, a.hidden)
    plain(a.hidden @ (2 * normal(9, D, V)))
    assert 0.1 < clipped[-1].mean() < 0.9


class Pairs:
    hidden = normal(0, 2, G, T, D)
    tokens = integers(1, V, 2, G, T)
    mask = np.arange(T) < 1 + integers(2, T, 2, G, 1)
    reference = np.asarray(jnp.sum(log_prob(hidden @ (2 * normal(9, D, V)), tokens), -1, where=mask)) + 1

    @classmethod
    def margin(cls, logits):
        ratios = jnp.einsum("...t,...t->...", log_prob(logits, cls.tokens), cls.mask) - cls.reference
        return ratios[0] - ratios[1]


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_dpo(wrong):
    b, dpo = Pairs, names_of("dpo")["dpo"]

    def plain(logits):
        margin = 0.7 * b.margin(logits)
        return jnp.mean((1 - wrong) * jnp.log1p(jnp.exp(-margin)) + wrong * jnp.log1p(jnp.exp(margin)))

    options = {"beta": 0.7, "label_smoothing": 2 * wrong}
    agree(lambda logits: dpo(logits, b.tokens, b.mask, b.reference, **options), plain, b.hidden)


def test_ipo():
    b, ipo = Pairs, names_of("ipo")["ipo"]
    agree(
        lambda logits: ipo(logits, b.tokens, b.mask, b.reference, beta=0.25),
        lambda logits: jnp.mean(jnp.square(b.margin(logits) - 2)),
        b.hidden,
    )


def test_distillation():
    distillation = names_of("distillation")["distillation"]
    hidden, layer, labels = normal(0, 48, D), (normal(1, 48, D), normal(2, D, V)), integers(3, V, 48)

    def plain(logits):
        q, log_p = jax.nn.softmax(jnp.matmul(*layer) / 3), jax.nn.log_softmax(logits / 3)
        soft = jnp.sum(q * (jnp.log(q) - log_p), -1)
        return 0.25 * 9 * soft.mean() - 0.75 * log_prob(logits, labels).mean()

    def objective(student):
        return distillation(student, jaxent.LinearLogits(*layer), labels, temperature=3.0, alpha=0.25)

    agree(objective, plain, hidden)


# ------------------------------------------------------------------------------------------------------ penalties


def test_estimators():
    block = names_of("expectation", whole=True)
    policy, reference = (np.asarray(block[name], np.float64) for name in ("policy", "reference"))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (policy, reference))
    log_r = np.log(q / p)
    values = {"k1": np.sum(-p * log_r), "k2": np.sum(p * log_r**2) / 2, "k3": np.sum(p * (q / p - 1 - log_r))}
    assert values["k1"] == pytest.approx(values["k3"]) and values["k1"] != pytest.approx(
        values["k2"], rel=0.05
    )
    jacobian = np.eye(5) - p  # of log p, a row for each token
    gradients = {"k1": -p @ -jacobian, "k2": p * -log_r @ jacobian, "k3": p * (1 - q / p) @ jacobian}
    for name, estimator in block["estimators"].items():
        f = jax.value_and_grad(functools.partial(block["expectation"], estimator))
        value, gradient = jax.jit(f, compiler_options=harness.QUICK)(block["policy"])
        np.testing.assert_allclose(value, values[name], rtol=1e-5)
        np.testing.assert_allclose(gradient, gradients[name], atol=1e-6)
    # k1 in the reward: the advantage is held constant
    value, kl = jax.jit(jax.value_and_grad(block["reverse"]), compiler_options=harness.QUICK)(block["policy"])
    np.testing.assert_allclose(-(p * log_r) @ jacobian, kl, atol=1e-6)
    assert value == pytest.approx(values["k1"], rel=1e-5)


@pytest.mark.parametrize("slots", [3, V + 2])
def test_top_kl(slots):
    top_kl = names_of("top_kl")["top_kl"]
    hidden = normal(0, 6, T, D)
    reference = hidden @ (2 * normal(9, D, V) + 0.2 * normal(8, D, V))
    logits = hidden @ (2 * normal(9, D, V))
    order = np.argsort(-logits, -1).astype(np.int32)
    classes = np.concatenate([order, np.full((6, T, 3), -1, np.int32)], -1)[..., :slots]
    classes[0, 0, 1] = -1  # sets of different sizes
    member = np.stack([[np.isin(np.arange(V), x) for x in row] for row in classes])

    def plain(logits):
        p, q = jax.nn.softmax(logits), jax.nn.softmax(reference)
        kl = jnp.sum(p * jnp.log(p / q), -1, where=member)
        p, q = (jnp.sum(x, -1, where=~member) for x in (p, q))
        rest = np.any(~member, -1)
        return jnp.mean(kl + jnp.where(rest, p * jnp.log(jnp.where(rest, p, 1) / jnp.where(rest, q, 1)), 0))

    layer = jaxent.LinearLogits(hidden, 2 * normal(9, D, V) + 0.2 * normal(8, D, V))
    if slots < V:
        agree(lambda logits: top_kl(logits, layer, classes), plain, hidden)
        return
    pair = lambda z: top_kl(z, reference, classes), plain
    f, want = (jax.jit(jax.value_and_grad(x), compiler_options=harness.QUICK) for x in pair)
    for a, b in zip(f(logits), want(logits), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-6)


def test_more_classes_come_nearer_from_below():
    top_kl = names_of("top_kl")["top_kl"]
    policy = 3 * normal(0, T, V)
    reference = policy + normal(1, T, V)
    order = np.argsort(reference - policy, -1).astype(np.int32)  # the bound is that of any classes
    f = jax.jit(top_kl, compiler_options=harness.QUICK)
    found = jnp.stack([f(policy, reference, order[:, :k]) for k in (0, 4, 16, V)])
    exact = jaxent.softmax_kl_divergence(reference, policy, reduction="mean")
    assert found[0] == 0 and (jnp.diff(found) > 0).all() and (found[:-1] < exact).all()
    np.testing.assert_allclose(found[-1], exact, rtol=1e-5)


# --------------------------------------------------------------------------------------------- many rows, many labels


def test_mtp():
    mtp = names_of("mtp")["mtp"]
    hidden, tokens, share = normal(0, 3, 4, T, D), integers(1, V, 4, T), np.array([1, 0.3, 0.2], np.float32)

    def plain(logits):
        total = 0.0
        for d in range(3):
            pairs = [(b, t) for b in range(4) for t in range(T) if t + d + 1 < T]
            losses = [-jax.nn.log_softmax(logits[d, b, t])[tokens[b, t + d + 1]] for b, t in pairs]
            total += share[d] * sum(losses) / len(pairs)
        return total

    kernel = 2 * normal(9, D, V)

    def linear(hidden, kernel):
        return mtp(hidden, kernel, tokens, share)

    want = jax.jit(jax.value_and_grad(lambda h, k: plain(h @ k), (0, 1)))(hidden, kernel)
    found = jax.jit(jax.value_and_grad(linear, (0, 1)))(hidden, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5)
    assert largest(jax.grad(linear, (0, 1)), hidden, kernel) < hidden.size / D * V / 3
    assert np.isfinite(mtp(hidden[:, :, :2], kernel, tokens[:, :2], share))  # too short for the last head


@pytest.mark.parametrize("corrected", [False, True])
def test_info_nce(corrected):
    info_nce = names_of("info_nce")["info_nce"]
    x, y = normal(0, V, D), normal(1, V, D)
    ids = integers(2, V - 15, V)
    assert len(set(ids.tolist())) < V
    log_q = normal(3, V) if corrected else np.zeros(V, np.float32)

    def plain(x, y):
        total = 0.0
        for i in range(V):
            negatives = np.array([j for j in range(V) if ids[j] != ids[i]])
            scores = x[i] @ y.T / 0.3 - log_q
            total += jnp.log(jnp.exp(scores[i]) + jnp.exp(scores[negatives]).sum()) - scores[i]
        return total / V

    def objective(x, y):
        return info_nce(x, y, ids, log_q, 0.3)

    want = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, y)
    found = jax.jit(jax.value_and_grad(objective, (0, 1)))(x, y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5)
    assert largest(jax.grad(objective, (0, 1)), x, y, masks=True) < V * V / 3


# -------------------------------------------------------------------------------------------------- chosen classes


def kept_by_hand(logits, k, top_p=1.0, min_p=0.0):
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    found = []
    for c in np.argsort(-p)[:k]:
        if p[list(map(int, found))].sum() >= top_p or p[c] < min_p * p.max():
            break
        found.append(c)
    return set(map(int, found))


OPTIONS = {
    "top-k": {},
    "top-p": {"top_p": 0.5},
    "min-p": {"min_p": 0.3},
    "both": {"top_p": 0.8, "min_p": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_truncated_samplers(name):
    block = names_of("kept")
    hidden, kernel, k = normal(0, 8, T, D), normal(9, D, V) / 2, 12
    logits = hidden @ kernel
    classes = np.asarray(jax.jit(lambda z: block["kept"](z, k, **OPTIONS[name]))(logits))
    sets = [{int(c) for c in x if c >= 0} for x in classes.reshape(-1, k)]
    assert sets == [kept_by_hand(z, k, **OPTIONS[name]) for z in logits.reshape(-1, V)]
    assert name == "top-k" or len({len(x) for x in sets}) > 2
    member = np.stack([[np.isin(np.arange(V), x) for x in row] for row in classes])
    tokens, sampled = jax.jit(block["sample"])(jax.random.key(0), logits, classes)
    assert np.take_along_axis(member, np.asarray(tokens)[..., None], -1).all()

    def plain(logits):
        p = jax.nn.softmax(logits)
        return jnp.log(jnp.take_along_axis(p, tokens[..., None], -1)[..., 0] / jnp.sum(p, -1, where=member))

    def of_token(s):
        return s.log_prob - jax.nn.logsumexp(s.class_log_probs)

    def in_a_loss(logits):
        return jaxent.softmax_loss(of_token, logits, tokens, classes=classes, reduction="sum")

    np.testing.assert_allclose(sampled, plain(logits), rtol=1e-4, atol=1e-5)
    agree(lambda logits: block["by_classes"](logits, tokens, classes), plain, hidden, kernel)
    agree(lambda logits: block["by_mask"](logits, tokens, classes), plain, hidden, kernel, masks=True)
    agree(in_a_loss, plain, hidden, kernel)


def test_a_token_outside_of_its_set():
    block = names_of("kept")
    logits, classes = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32), np.array([[1, 2]])
    assert np.isnan(block["by_mask"](logits, jnp.array([0]), classes))
    assert block["by_classes"](logits, jnp.array([0]), classes) > 0


@pytest.mark.parametrize("name", ["CosFace", "LDAM"])
def test_margins(name):
    with_margin = names_of("with_margin")["with_margin"]
    hidden, labels = normal(0, 40, D), integers(1, V, 40)
    margins = np.full(40, 3.0, np.float32) if name == "CosFace" else np.abs(normal(2, V))[labels]
    counts = labels % 4 > 0

    def plain(logits):
        lowered = logits - margins[:, None] * jax.nn.one_hot(labels, V)
        return -jnp.sum(log_prob(lowered, labels), where=counts) / counts.sum()

    def objective(logits):
        return with_margin(logits, np.where(counts, labels, -1), margins, ignore_index=-1)

    agree(objective, plain, hidden)


def test_margin_of_a_row_that_is_sure():
    with_margin = names_of("with_margin")["with_margin"]
    f = jax.value_and_grad(lambda z: with_margin(z, jnp.array([0]), jnp.array([20.0])))
    loss, gradient = jax.jit(f, compiler_options=harness.QUICK)(jnp.array([[90.0, 1.0, 0.0]]))
    others = np.exp([1.0 - 70.0, 0.0 - 70.0])
    np.testing.assert_allclose(loss, others.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [-others.sum(), *others], rtol=1e-5)


class Sets:
    hidden = normal(0, 40, D)
    classes = np.stack([np.random.default_rng(i).permutation(V)[:4] for i in range(40)]).astype(np.int32)
    classes[::3, 2:] = -1
    classes[1, 0] = -1
    member = np.stack([np.isin(np.arange(V), x) for x in classes])


def test_any_of():
    c, any_of = Sets, names_of("any_of")["any_of"]

    def plain(logits):
        return -jnp.mean(jnp.log(jnp.sum(jax.nn.softmax(logits), -1, where=c.member)))

    agree(lambda logits: any_of(logits, c.classes), plain, c.hidden)
    sure = jnp.array([[60.0, 58.0, 0.0]])
    np.testing.assert_allclose(any_of(sure, jnp.array([[0, 1]])), 1 / (np.exp(60) + np.exp(58)), rtol=1e-5)


def test_all_of():
    c, all_of = Sets, names_of("all_of")["all_of"]

    def plain(logits):
        share = c.member / c.member.sum(-1, keepdims=True)
        return -jnp.mean(jnp.sum(share * jax.nn.log_softmax(logits), -1))

    agree(lambda logits: all_of(logits, c.classes), plain, c.hidden)


def test_unlikelihood():
    unlikelihood = names_of("unlikelihood")["unlikelihood"]
    hidden, labels = normal(0, 5, 8, D), integers(1, 6, 5, 8)

    def plain(logits):
        p, total = jax.nn.softmax(logits), 0.0
        for b in range(5):
            for t in range(8):
                bad = sorted(set(labels[b, max(0, t - 4) : t].tolist()) - {int(labels[b, t])})
                others = np.array([j for j in range(V) if j not in bad])
                total -= jnp.log(p[b, t, labels[b, t]]) + 0.5 * jnp.log(p[b, t, others].sum())
        return total / 40

    agree(lambda logits: unlikelihood(logits, labels, 0.5), plain, hidden)
