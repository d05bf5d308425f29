"""Candidate classes that are drawn, and the log of how often each class was to be expected among them.

A sampler is a proposal distribution, of which `_samples` takes draws. tests/test_samplers.py guards it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _contracts as contracts
from ._chosen import is_first, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Classes that a sampler drew. Unpacks as `classes, log_expected_counts = log_uniform_sampler(...)`.

    Attributes:
      classes: int32 `[S]`.
      log_expected_counts: float32 `[S]`, the log of how often each of them was to be expected among S.
      tries: float32 `[]`, how many draws it took; S where classes may come twice.
      proposal: a pytree, the distribution that they are from: `log_probs(classes)`.
      unique: a bool, whether no class comes twice.
    """

    classes: Array
    log_expected_counts: Array
    tries: Array
    proposal: Any
    unique: bool = dataclasses.field(metadata={"static": True})

    def __iter__(self) -> Iterator[Array]:
        return iter((self.classes, self.log_expected_counts))

    def log_expected_counts_of(self, classes: Array) -> Array:
        """Of any classes, integers `[...]`, such as labels: what `label_log_expected_counts` asks for.

        float32 `[...]`, -inf outside [0, V).
        """
        return _log_expected_counts(self.proposal, classes, self.tries, self.unique)


def log_uniform_sampler(key: Array, classes: int, number: int, *, unique: bool = True) -> Samples:
    """Classes from a log-uniform (Zipf) distribution: for vocabularies in the order of falling frequency.

        P(c) = (log(c + 2) - log(c + 1)) / log(V + 1)

    Args:
      key: of `jax.random`.
      classes: V, how many there are, a Python int > 0.
      number: S, how many samples, a Python int > 0; at most V with `unique`.
      unique: no class twice, by drawing until S different ones are found.

    Returns:
      `Samples`, which unpacks to int32 `[S]` and the log of their expected counts, float32 `[S]`: S P(c), or with
      `unique` the probability that any of the T draws it took gave c, 1 - (1 - P(c))^T.

    Gradients:
      None.

    Numerics:
      In float32; expected counts as -expm1(T log1p(-P)), exact to a few ulp for rare classes. (TensorFlow takes S P(c)
      where T happens to be S, which may be above 1.)

    Cost:
      A sort of 2 S numbers for each S draws with `unique`; memory of some S numbers, none over the classes.

    Raises:
      ValueError: fewer classes than samples with `unique`; numbers that are no positive ints.

    Example:
      >>> import jax, jaxent
      >>> samples = jaxent.log_uniform_sampler(jax.random.key(0), 50_000, 4)
      >>> classes, log_expected_counts = samples
      >>> print(classes.shape, samples.log_expected_counts_of(classes[:2]).shape)
      (4,) (2,)

    Source:
      tf.random.log_uniform_candidate_sampler.
    """
    return _samples("log_uniform_sampler", key, LogUniform(classes), (classes, number), unique)


def uniform_sampler(key: Array, classes: int, number: int, *, unique: bool = True) -> Samples:
    """Classes that are all equally likely: P(c) = 1 / V.

    Args:
      key: of `jax.random`.
      classes: V, how many there are, a Python int > 0.
      number: S, how many samples, a Python int > 0; at most V with `unique`.
      unique: no class twice, by drawing until S different ones are found.

    Returns:
      `Samples`, which unpacks to int32 `[S]` and float32 `[S]`, as `log_uniform_sampler`.

    Gradients:
      None.

    Numerics:
      As `log_uniform_sampler`.

    Cost:
      As `log_uniform_sampler`.

    Raises:
      As `log_uniform_sampler`.

    Example:
      >>> import jax, jaxent
      >>> classes, log_expected_counts = jaxent.uniform_sampler(jax.random.key(0), 10, 10)
      >>> print(sorted(classes.tolist()))
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]

    Source:
      tf.random.uniform_candidate_sampler.
    """
    return _samples("uniform_sampler", key, Uniform(classes), (classes, number), unique)


def learned_sampler(key: Array, counts: Array, number: int, *, unique: bool = True) -> Samples:
    """Classes as often as they were counted, P(c) = counts[c] / sum(counts): the unigrams of a corpus, or of a batch.

    Args:
      key: of `jax.random`.
      counts: real `[V]`, >= 0; to a power of 3/4 before, as in word2vec, if wanted.
      number: S, how many samples, a Python int > 0; at most V with `unique`.
      unique: no class twice, by a race: each class arrives after a time that is exponential with rate P(c), and the
        first S are taken. That is drawing until S different ones are found, without the draws.

    Returns:
      `Samples`, which unpacks to int32 `[S]` and float32 `[S]`, as `log_uniform_sampler`. With `unique` T is the time
      at which the last one arrived, and the expected count 1 - exp(-P(c) T). A class with a count of 0 is never drawn,
      and -inf is its log.

    Gradients:
      None.

    Numerics:
      As `log_uniform_sampler`. Where fewer than S classes have a count, those without one fill up, as -1. That
      counts are not negative is not checked.

    Cost:
      With `unique` V random numbers and the S smallest of them; else, of each sample, two cumulative sums over sqrt(V)
      numbers or so.

    Raises:
      TypeError: counts that are not real.
      ValueError: counts that are no vector; fewer classes than samples with `unique`; a number that is no int > 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxent
      >>> classes, _ = jaxent.learned_sampler(jax.random.key(0), jnp.array([5.0, 0.0, 1.0, 2.0]), 3)
      >>> print(sorted(classes.tolist()))
      [0, 2, 3]

    Source:
      Efraimidis and Spirakis 2006 (Gumbel top-k: Vieira 2014); Mikolov et al. 2013 for the power of 3/4.
    """
    function = "learned_sampler"
    contracts.check_real(function, "counts", counts)
    if np.ndim(counts) != 1:
        got = contracts.describe(counts)
        contracts.fail(ValueError, function, "counts", "of shape [V]", got, "How often each class was seen.")
    counts = jnp.asarray(counts, jnp.float32)
    proposal = Counted(jnp.log(counts) - jnp.log(jnp.sum(counts)))
    return _samples(function, key, proposal, (counts.shape[0], number), unique)


# Proposals: the log of P, and independent draws.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogUniform:
    classes: int = dataclasses.field(metadata={"static": True})

    def log_probs(self, classes: Array) -> Array:
        c = classes.astype(jnp.float32)
        return jnp.log(jnp.log1p(1 / (c + 1)) / np.float32(np.log1p(self.classes)))

    def draw(self, key: Array, number: int) -> Array:
        """The c with c + 1 <= (V + 1)^u < c + 2; of two numbers, as u alone has too few digits for rare classes."""
        coarse_key, fine_key = jax.random.split(key)
        coarse = jax.random.bits(coarse_key, (number,), jnp.uint16).astype(jnp.float32) / 2**16
        fine = jax.random.uniform(fine_key, (number,), jnp.float32) / 2**16
        reach = np.float32(np.log1p(self.classes))
        c = jnp.exp(coarse * reach) * jnp.exp(fine * reach)
        return jnp.clip(c.astype(jnp.int32) - 1, 0, self.classes - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform:
    classes: int = dataclasses.field(metadata={"static": True})

    def log_probs(self, classes: Array) -> Array:
        return jnp.zeros_like(classes, jnp.float32) - np.float32(np.log(self.classes))

    def draw(self, key: Array, number: int) -> Array:
        return jax.random.randint(key, (number,), 0, self.classes, jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
    log_p: Array  # [V]

    @property
    def classes(self) -> int:
        return self.log_p.shape[0]

    def log_probs(self, classes: Array) -> Array:
        return take(self.log_p, classes[..., None])[..., 0]  # one by one: they may be split over devices

    def draw(self, key: Array, number: int) -> Array:
        """By a stretch of about sqrt(V) classes, and one in it: a random number has too few digits for all at once."""
        size = max(int(np.sqrt(self.classes)), 1)
        p = jnp.exp(self.log_p)
        p = jnp.pad(p, (0, -self.classes % size)).reshape(-1, size)
        of_stretch, of_class = jax.random.split(key)
        stretch = _by_inversion(of_stretch, jnp.broadcast_to(jnp.sum(p, -1), (number, p.shape[0])))
        return stretch * size + _by_inversion(of_class, p[stretch])

    def race(self, key: Array, number: int) -> tuple[Array, Array]:
        """(the first `number` classes, when the last of them arrived)."""
        log_time = jnp.log(jax.random.exponential(key, self.log_p.shape)) - self.log_p
        first, classes = lax.top_k(-log_time, number)
        arrived = first > -jnp.inf
        last = jnp.max(jnp.where(arrived, -first, -jnp.inf))
        return jnp.where(arrived, classes, -1).astype(jnp.int32), jnp.exp(last)


def _by_inversion(key: Array, p: Array) -> Array:
    """A class of each row of weights `[S, V]`, int32 `[S]`; none of weight 0."""
    total = jnp.cumsum(p, -1)
    at = jax.random.uniform(key, p.shape[:1]) * total[:, -1]
    found = jnp.sum(total <= at[:, None], -1, dtype=jnp.int32)
    last = jnp.max(jnp.where(p > 0, lax.broadcasted_iota(jnp.int32, p.shape, 1), 0), -1)  # a rounding
    return jnp.minimum(found, last)


# Samples of a proposal.


class _Found(NamedTuple):
    classes: Array  # [S], -1 from the number of those that are found on
    number: Array
    tries: Array
    key: Array


def _samples(function: str, key: Array, proposal: Any, sizes: tuple[Any, Any], unique: bool) -> Samples:
    classes, number = sizes
    for name, x in (("classes", classes), ("number", number)):
        whole = bool(isinstance(x, int | np.integer) and not isinstance(x, bool) and x > 0)
        contracts.check_option(function, name, x, whole, "a positive int", "It is part of the program.")
    remedy = "Only so many are different; `unique=False` may take a class twice."
    possible = not unique or bool(number <= classes)
    contracts.check_option(
        function, "number", number, possible, f"at most {classes}, the number of classes", remedy
    )
    tries = jnp.asarray(number, jnp.float32)
    if not unique:
        found = proposal.draw(key, number)
    elif isinstance(proposal, Counted):
        found, tries = proposal.race(key, number)
    else:
        found, tries = _first_different(key, proposal, number)
    return Samples(found, _log_expected_counts(proposal, found, tries, unique), tries, proposal, unique)


def _first_different(key: Array, proposal: Any, number: int) -> tuple[Array, Array]:
    """(the first `number` different classes of independent draws, how many draws that took)."""

    def more(state: _Found) -> _Found:
        key, of_draws = jax.random.split(state.key)
        both = jnp.concatenate([state.classes, proposal.draw(of_draws, number)])
        place = jnp.cumsum(is_first(both) & (both >= 0), dtype=jnp.int32)
        is_new = (jnp.diff(place, prepend=0) > 0) & (place <= number)
        classes = state.classes.at[jnp.where(is_new, place - 1, number)].set(both, mode="drop")
        # the draws up to the one that gave the last
        drawn = jnp.minimum(jnp.sum(place[number:] < number, dtype=jnp.int32) + 1, number)
        return _Found(classes, jnp.minimum(place[-1], number), state.tries + drawn, key)

    empty = jnp.full(number, -1, jnp.int32)
    start = _Found(empty, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), key)
    found = lax.while_loop(lambda state: state.number < number, more, start)
    return found.classes, found.tries.astype(jnp.float32)


def _log_expected_counts(proposal: Any, classes: Array, tries: Array, unique: bool) -> Array:
    log_p = proposal.log_probs(classes)
    p = jnp.exp(log_p)
    if not unique:
        found = log_p + jnp.log(tries)
    elif isinstance(proposal, Counted):
        found = jnp.log(-jnp.expm1(-p * tries))
    else:
        found = jnp.log(-jnp.expm1(tries * jnp.log1p(-jnp.minimum(p, 1))))
    return jnp.where((classes >= 0) & (classes < proposal.classes), found, -jnp.inf)
