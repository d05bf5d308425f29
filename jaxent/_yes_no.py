"""One yes/no element, from its logit: the loss, and its derivatives on paper.

    positive * yes(z) + negative * no(z)

with the two halves of the label as factors. So one rule serves all losses of such elements, and what differs is the
`Form`.
"""

from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._contracts import Number, is_floating
from ._derivatives import varying_like, with_forward_mode
from ._numerics import limit, nan_unless, probability, widen


class Form(NamedTuple):
    """Floats are part of the program; arrays `[]`, `[V]`, `[...]` are values in it, and have a derivative."""

    label_smoothing: Any  # a `Number` once it is checked
    positive: Number = 1.0
    negative: Number = 1.0
    gamma_positive: Number = 0.0
    gamma_negative: Number = 0.0
    clip: float = 0.0
    axis: int = 0  # of the logits: where arrays `[V]` go


def _along(axis: int, x: Number, ndim: int) -> Number:
    """`[V]` along this axis of `ndim`: jax may be told not to promote ranks."""
    if np.ndim(x) in (0, ndim):
        return x
    return jnp.expand_dims(x, tuple(i for i in range(ndim) if i != axis))


def product(axis: int, a: Number, b: Number) -> Number:
    ndim = max(np.ndim(a), np.ndim(b))
    return _along(axis, a, ndim) * _along(axis, b, ndim)


def _joined(static: Form, values: dict[str, Array], ndim: int) -> Form:
    """`static` has None where `values` has an array, which gets the rank of the logits."""
    arrays: dict[str, Any] = {name: _along(static.axis, x, ndim) for name, x in values.items()}
    return static._replace(**arrays)


def _off(option: Number) -> bool:
    return isinstance(option, float) and option == 0


@jax.custom_jvp
def sigmoids(z: Array) -> tuple[Array, Array, Array, Array]:
    """σ(z), σ(-z), -log σ(z), -log σ(-z), none of them by a difference."""
    e = jnp.exp(-jnp.abs(z))
    up = z >= 0
    large, small, tail = 1 / (1 + e), e / (1 + e), jnp.log1p(e)
    p, q = jnp.where(up, large, small), jnp.where(up, small, large)
    return p, q, tail + jnp.maximum(-z, 0), tail + jnp.maximum(z, 0)


@sigmoids.defjvp
def _sigmoids_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    # autodiff would take |z| for flat at 0, and cancel in 1 - σ(z)
    p, q, a, b = sigmoids(*primals)
    (dz,) = tangents
    return (p, q, a, b), (p * q * dz, -p * q * dz, -q * dz, p * dz)


class _Half(NamedTuple):
    """The loss at the label 1 or 0, unweighted, and its derivatives by z and by its exponent."""

    label: Array  # y' or 1 - y'
    factor: Array  # what `value` is multiplied by: the label and its weight
    value: Array
    slope: Array
    per_gamma: Array


def _halves(form: Form, z: Array, labels: Array) -> tuple[_Half, _Half]:
    """yes(z), no(z); 0 where they are infinite and their factor is 0, NaN where the label is outside [0, 1]."""
    y = probability(labels, z.dtype)
    other = 1 - y
    if not _off(form.label_smoothing):
        y, other = ((1 - form.label_smoothing) * x + form.label_smoothing / 2 for x in (y, other))
    positive, negative = form.positive * y, form.negative * other
    p, q, a, b = sigmoids(z)
    u, minus_log_u, b_u, lead, rise = _clipped(form, z, p, q, a, b)
    fall = q if _off(form.gamma_positive) else q + form.gamma_positive * p * limit(p, a)
    if not _off(form.gamma_negative):
        rise = rise + form.gamma_negative * q * limit(q, b_u) * lead
    easy, hard = _power(q, form.gamma_positive), _power(u, form.gamma_negative)
    yes = _Half(y, positive, easy * limit(positive, a), -easy * fall, -easy * limit(b, a) * limit(a, b))
    per_gamma = -hard * limit(minus_log_u, b_u) * limit(b_u, minus_log_u)
    return yes, _Half(other, negative, hard * limit(negative, b_u), hard * rise, per_gamma)


def _clipped(form: Form, z: Array, p: Array, q: Array, a: Array, b: Array) -> tuple[Array, ...]:
    """u = max(p - clip, 0), -log u, -log(1 - u), and where u > 0 also p/u and p q/(1 - u).

    With c = log(clip / (1 - clip)): p - clip = p (1 - clip) (1 - exp(c - z)), where nothing cancels, because
    c = high + low. 1 - u = q + clip.
    """
    if _off(form.clip):
        return p, a, b, jnp.ones_like(p), p
    c = Decimal(form.clip).ln() - (1 - Decimal(form.clip)).ln()
    high = np.asarray(float(c), z.dtype)
    low = np.asarray(float(c - Decimal(float(high))), z.dtype)
    e = jnp.expm1(jnp.minimum(high - z, 1))
    u = p * (1 - form.clip) * jnp.maximum(-(e + low * (1 + e)), 0)  # XLA would fold (high - z) + low
    rest = q + form.clip
    off = u == 0
    on = jnp.where(off, 1, u)
    return u, -jnp.log(on), jnp.log1p(u / rest), p / on, jnp.where(off, 0, p * q / rest)


def _power(x: Array, gamma: Number) -> Array:
    if isinstance(gamma, float) and gamma.is_integer():
        return x ** int(gamma)
    zero = x == 0  # its derivative is a factor of something that is 0 there
    return jnp.where(zero, 0, jnp.where(zero, 1, x) ** gamma)


def _primal(static: Form, logits: Array, labels: Array, values: dict[str, Any]) -> Array:
    yes, no = _halves(_joined(static, values, logits.ndim), widen(logits), labels)
    return yes.factor * yes.value + no.factor * no.value


# loss     = positive yes(z) + negative no(z)      positive = α w y',  negative = (1 - α) (1 - y')
# yes(z)   = q^γ+ a                                p = σ(z),  q = σ(-z),  a = -log p,  b = -log q
# no(z)    = u^γ- b_u                              u = max(p - clip, 0),  1 - u = q + clip,  b_u = -log(1 - u)
# p' = p q,  q' = -p q,  a' = -q,  u' = p q,  b_u' = p q / (1 - u)  (the latter two 0 where u = 0)
#
# yes'(z)  = -q^γ+ (γ+ p a + q)                    dyes/dγ+ = -q^γ+ a b
# no'(z)   = u^γ- (γ- q b_u p/u + p q / (1 - u))   dno/dγ-  = u^γ- b_u log u
#            without clip p/u = 1 and p q / (1 - u) = p
# dloss/dy' = α w yes(z) - (1 - α) no(z)           dy'/dy = 1 - smoothing,  dy'/dsmoothing = 1/2 - y
#            with γ = clip = 0, as a - b = -z:  (α w - (1 - α)) a - (1 - α) z  for z >= 0
#                                               (α w - (1 - α)) b - α w z      for z < 0
# dloss/d(α w) = y' yes(z)                         dloss/d(1 - α) = (1 - y') no(z)
def _backward(static: Form, residuals: Any, g: Array) -> Any:
    logits, labels, values = residuals
    form, z = _joined(static, values, logits.ndim), widen(logits)
    yes, no = _halves(form, z, labels)
    if all(map(_off, (form.gamma_positive, form.gamma_negative, form.clip))):
        up = z >= 0
        d = (form.positive - form.negative) * jnp.where(up, yes.value, no.value)
        d = d - jnp.where(up, form.negative * limit(no.factor, z), form.positive * limit(yes.factor, z))
    else:
        d = form.positive * yes.value - form.negative * no.value
    d = d * nan_unless(~jnp.isnan(yes.label))

    tilt, share = 0.5 - probability(labels, z.dtype), 1 - form.label_smoothing
    by_value = {
        "label_smoothing": tilt * limit(tilt, d),
        "positive": yes.label * yes.value,
        "negative": no.label * no.value,
        "gamma_positive": yes.factor * yes.per_gamma,
        "gamma_negative": no.factor * no.per_gamma,
    }
    d_values = {}
    for name, x in values.items():
        own = range(z.ndim) if x.ndim == z.ndim else [static.axis][: x.ndim]
        d_values[name] = jnp.sum(g * by_value[name], tuple(i for i in range(z.ndim) if i not in own))
    d_logits = (g * (yes.factor * yes.slope + no.factor * no.slope)).astype(logits.dtype)
    d_labels = (g * (share * limit(share, d))).astype(labels.dtype) if is_floating(labels) else None
    return d_logits, d_labels, d_values


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(lambda static, *arrays: (_primal(static, *arrays), arrays), _backward)
elementwise = with_forward_mode(_rule)


def elementwise_cross_entropy(z: Array, y: Array, label_smoothing: Number) -> Array:
    """Of checked arrays of one shape, one for each element."""
    form = Form(label_smoothing)
    values = (
        {} if isinstance(label_smoothing, float) else {"label_smoothing": label_smoothing.astype(z.dtype)}
    )
    return elementwise(form._replace(**dict.fromkeys(values)), *varying_like((z, y, values), (z, y, values)))
