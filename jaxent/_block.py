"""What statistics are made of: some or all classes of some rows, and what is asked of them.

Symbols as in `_statistics`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import _chosen as chosen
from ._contracts import Number
from ._devices import lanes
from ._numerics import over_rows, widen
from ._sparse import SparseDistribution


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Phi:
    """phi(log p), of a loss that is sum_j t_j phi(log p_j), with a number of its own."""

    function: Callable[[Array, Number], Array] = dataclasses.field(metadata={"static": True})
    number: float = dataclasses.field(metadata={"static": True})
    per_row: Array | None = None  # [...] in its place, where it is a value and no part of the program

    def __call__(self, log_p: Array) -> Array:
        return self.function(log_p, self.number if self.per_row is None else self.per_row[..., None])

    def slope(self, log_p: Array) -> Array:
        """phi'(log p); where p is 0 that of a p which is all but 0."""
        log_p = jnp.where(log_p < -1e4, -1e4, log_p)
        return jax.jvp(self, (log_p,), (jnp.ones_like(log_p),))[1]

    def slope_of_number(self, log_p: Array) -> Array:
        """dphi / dnumber where that is `per_row`."""
        log_p = jnp.where(log_p < -1e4, -1e4, log_p)
        number = jnp.broadcast_to(self.per_row[..., None], log_p.shape)
        return jax.jvp(functools.partial(self.function, log_p), (number,), (jnp.ones_like(number),))[1]


class Block(NamedTuple):
    """Some or all classes of some rows: N rows `[...]`, B classes.

    `label` counts from the block's own first class, so that a label in another block hits no lane; so do all classes
    here. A row's label that names no class in force is -1 everywhere: `poison`.
    """

    logits: Any  # [..., B], any float dtype; before any arithmetic maybe a LinearLogits
    label: Array | None = None  # int [...]
    distribution: Array | SparseDistribution | None = None  # [..., B], or [..., K] of K classes
    class_weights: Array | None = None  # [B]
    class_mask: Array | None = None  # bool [B] or [..., B]: the classes in force
    classes: Array | None = None  # int [..., K]: chosen ones
    phi: Phi | None = None
    numbers: Array | None = None  # [..., B] of its classes, which may be there twice; None: 0, 1, ...

    def wide_logits(self) -> Array:
        z = widen(self.logits)
        return z if self.class_mask is None else jnp.where(over_rows(self.class_mask, z.ndim), z, -jnp.inf)

    def with_classes(self, f: Callable[[Array], Array]) -> "Block":
        """With `f` of the label and of all chosen classes."""
        q = self.distribution
        if isinstance(q, SparseDistribution):
            q = SparseDistribution(f(q.classes), q.probs)
        label, classes = (None if x is None else f(x) for x in (self.label, self.classes))
        return self._replace(label=label, distribution=q, classes=classes)

    def piece(self, start: int, end: int) -> "Block":
        """Logits and class mask of a stretch of the classes."""
        mask = None if self.class_mask is None else self.class_mask[..., start:end]
        return Block(self.logits[..., start:end], class_mask=mask)

    def hit(self) -> Array:
        """[..., B]: the label's lane. A comparison, not a gather or one-hot: it shards and fuses."""
        assert self.label is not None
        return self.class_numbers() == self.label[..., None]

    def class_numbers(self) -> Array:
        """int32 [..., B]."""
        return lanes(self.logits) if self.numbers is None else self.numbers

    def few(self) -> Array | None:
        """[..., K], all classes that are chosen or have mass in a sparse distribution."""
        q = self.distribution
        given = [q.classes] if isinstance(q, SparseDistribution) else []
        given += [] if self.classes is None else [self.classes]
        return jnp.concatenate(given, -1) if given else None

    def without_few(self) -> "Block":
        q, classes = self.distribution, self.classes
        q = jax.tree.map(lambda x: x[..., :0], q) if isinstance(q, SparseDistribution) else q
        return self._replace(distribution=q, classes=None if classes is None else classes[..., :0])

    def at(self, numbers: Array) -> "Block":
        """Of these classes `[..., K]`, those that are not here among them."""
        q, weights = self.distribution, self.class_weights
        if isinstance(q, SparseDistribution):
            q = chosen.spread(q.probs, q.classes, numbers) + jnp.zeros_like(numbers, q.probs.dtype)
        elif q is not None:
            q = chosen.take(q, numbers)
        return self._replace(
            logits=chosen.take(self.logits, numbers, -jnp.inf),
            distribution=q,
            class_weights=None if weights is None else chosen.take(weights, numbers),
            class_mask=None,
            numbers=numbers,
        )

    def weights_of_classes(self, dtype: Any) -> Array:
        """[] or [1, ..., 1, B]."""
        if self.class_weights is None:
            return jnp.ones((), dtype)
        return over_rows(self.class_weights.astype(dtype), self.logits.ndim)

    def target(self, name: str, dtype: Any) -> Any:
        """t of a statistic that is a sum over classes of t_j times something, unnormalized; None for an integer label.

        [] or [..., B], or the classes here that have some.
        """
        if name in ("mean_log_prob", "mean_phi"):
            weights = self.weights_of_classes(dtype)
            return weights if self.class_mask is None else self.in_force(weights)
        q = self.distribution
        if isinstance(q, SparseDistribution):
            # a NaN is here everywhere
            t = jnp.where(chosen.is_here(q.classes, self.logits) | jnp.isnan(q.probs), q.probs, 0)
            if name != "log_prob" and self.class_weights is not None:
                t = t * chosen.take(self.class_weights.astype(t.dtype), q.classes)
            return SparseDistribution(q.classes, t)
        if q is None or name == "log_prob" or self.class_weights is None:
            return q
        return q * self.weights_of_classes(q.dtype)

    def logits_at(self, classes: Array) -> Array:
        """`[..., K]`, -inf where a block has not the class; no chosen class is out of force."""
        # of the logits as they are: a gather does not fuse, and would take them widened from a copy
        return widen(chosen.take(self.logits, classes, -jnp.inf))

    def of_target(self, t: Any) -> tuple[Array, Array]:
        """t and z of all classes, or of those that it is given for."""
        if isinstance(t, SparseDistribution):
            return t.probs, self.logits_at(t.classes)
        return t, self.wide_logits()

    def in_force(self, x: Array) -> Array:
        """`x` `[..., B]`, 0 for a class that is not in force."""
        return x if self.class_mask is None else jnp.where(over_rows(self.class_mask, self.logits.ndim), x, 0)
