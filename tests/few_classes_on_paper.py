"""Divergences to a few classes on paper, in 90 digits: the definition, and difference quotients of it."""

import functools

import mpmath as mp
import numpy as np

F32, INF = np.float32, np.inf


def buckets_on_paper(z, classes, probs, temperature, missing):
    """[(p, q)] of each class that is named, and of all others, if asked for."""
    e = [mp.mpf(0) if x == -INF else mp.exp(mp.mpf(x) / temperature) for x in z]
    named = sorted({c for c in classes if c >= 0})
    found = [(e[j], mp.fsum(q for c, q in zip(classes, probs, strict=True) if c == j)) for j in named]
    if missing is not None:
        found.append((mp.fsum(x for j, x in enumerate(e) if j not in named), missing))
    return [(p / mp.fsum(e), q) for p, q in found]


def relative_entropy(a, b):
    return mp.mpf(0) if a == 0 else mp.inf if b == 0 else a * mp.log(a / b)


def on_paper(z, classes, probs, temperature, beta, missing):
    both = buckets_on_paper(z, classes, probs, temperature, missing)
    of_p = mp.fsum(relative_entropy(p, (1 - beta) * p + beta * q) for p, q in both)
    of_q = mp.fsum(relative_entropy(q, (1 - beta) * p + beta * q) for p, q in both)
    return of_q if beta == 0 else of_p if beta == 1 else (1 - beta) * of_p + beta * of_q


def row_on_paper(z, classes, probs, temperature, beta, rest):
    """The value and its derivatives by the logits, by the probabilities, by the temperature and by beta."""
    with mp.workdps(90):
        x = [[mp.mpf(float(v)) for v in part] for part in (z, probs, (temperature, beta))]

        full = mp.fsum(x[1]) >= 1  # then no probability moves anything into the rest

        def f(z, probs, numbers):
            missing = None if rest == "ignore" else mp.mpf(0) if full else 1 - mp.fsum(probs)
            return on_paper(z, classes, probs, *numbers, missing)

        def slope(i, j):
            def moved(v):
                return f(*(part if k != i else [*part[:j], v, *part[j + 1 :]] for k, part in enumerate(x)))

            fixed = mp.isinf(x[i][j]) or (i == 1 and classes[j] < 0) or (i == 2 and j == 1 and beta in (0, 1))
            return mp.mpf(0) if fixed else mp.diff(moved, x[i][j])

        value = f(*x)
        if mp.isinf(value):
            return np.inf, None
        slopes = [[slope(i, j) for j in range(len(part))] for i, part in enumerate(x)]
        return as_number(value), [np.array([as_number(v) for v in part]) for part in slopes]


def as_number(x):
    return np.longdouble(mp.nstr(mp.re(x), 25))


Z = F32([0.3, -1.1, 0.7, 0.1, -0.4])
SURE = 69.0


def logits(**at):
    """`Z` with another number at a class."""
    z = Z.copy()
    for name, x in at.items():
        z[int(name[1:])] = x
    return z


# of classes 0 to 4 three slots; probabilities whose sums are exact; a mass of 1e-24 or less on either side
ROWS = {
    "ordinary": (logits(), (0, 1, 3), (0.5, 0.25, 0.125)),
    "a class twice": (logits(), (2, 0, 2), (0.25, 0.25, 0.125)),
    "one class": (logits(), (-1, 4, -1), (0, 0.25, 0)),
    "no class": (logits(), (-1, -1, -1), (0, 0, 0)),
    "a sum of 1": (logits(), (0, 1, -1), (0.75, 0.25, 0)),
    "-inf among the others": (logits(c4=-INF), (0, 1, 3), (0.5, 0.25, 0.125)),
    "-inf of all others": (logits(c4=-INF, c2=-INF), (0, 1, 3), (0.5, 0.25, 0.25)),
    "-inf of all others, with mass": (logits(c4=-INF, c2=-INF), (0, 1, 3), (0.5, 0.25, 0.125)),
    "-inf of a class": (logits(c0=-INF), (0, 1, 3), (0.5, 0.25, 0.125)),
    "student sure of a class": (logits(c1=SURE), (0, 1, 3), (0.5, 0.25, 0.125)),
    "both sure of a class": (logits(c1=SURE), (-1, 1, -1), (0, 1.0, 0)),
    "teacher less sure": (logits(c1=SURE), (0, 1, -1), (2.0**-20, 1 - 2.0**-19, 0)),
    "student sure of the others": (logits(c4=SURE), (0, 1, 3), (0.5, 0.25, 0.125)),
    "teacher sure of the others": (logits(), (0, 1, 3), (1e-30, 2e-30, 3e-20)),
    "both sure of the others": (logits(c4=SURE), (0, 1, 3), (1e-30, 2e-30, 3e-20)),
    "teacher sure of a class": (logits(), (0, 1, 3), (1.0, 1e-30, 1e-33)),
    "disjoint": (logits(c4=SURE), (0, -1, -1), (1.0, 0, 0)),
}
NAMES = list(ROWS)
ROW_LOGITS, ROW_CLASSES, ROW_PROBS = (
    np.array(x, dtype)
    for x, dtype in zip(zip(*ROWS.values(), strict=True), (F32, np.int32, F32), strict=True)
)
TEMPERATURE = 1.25


@functools.cache
def table(beta, rest):
    rows = zip(ROW_LOGITS, ROW_CLASSES, ROW_PROBS, strict=True)
    return [row_on_paper(*row, TEMPERATURE, beta, rest) for row in rows]


def exact(rows, classes, seed=0, of=1024):
    """Probabilities that add up to exactly 1, in every order."""
    rng = np.random.default_rng(seed)
    return F32((rng.multinomial(of - classes, np.ones(classes) / classes, size=rows) + 1) / of)
