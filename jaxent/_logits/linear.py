"""Logits that are never built: the product of a linear layer, left open."""

import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import _contracts as contracts
from .._numerics import accumulation_dtype

BLOCK_BYTES = 128 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits `hidden @ kernel + bias` that are never built: pass them wherever jaxent takes `logits`.

        logits = cap(hidden @ kernel + bias) / temperature,   cap(z) = softcap * tanh(z / softcap)

    Every softmax function takes them with every option; only blocks of `block_bytes` exist at a time. A pytree: it
    goes through jit, grad, vmap and shard_map like any tuple of arrays.

    Args:
      hidden: `[..., D]`, floating point: what comes into the last layer.
      kernel: `[D, V]`, floating point; the layout of flax's `Dense` and of `hidden @ kernel`.
      bias: `[V]` or None.
      temperature: T > 0, a Python number, divides the logits. A learned one belongs into `hidden`.
      softcap: > 0, bounds the logits (before the temperature) to +-softcap. None: no bound.
      precision: of the matmuls, as in `jnp.matmul`.
      block_bytes: about how much memory a block of logits and its gradient may take, beside the gradients of
        `hidden` and `kernel`. Larger blocks are faster, up to some thousand rows. Of each device, where jax knows
        over how many the arrays are split (docs/sharding.md).

    Attributes:
      shape: `[..., V]`, that of the logits.
      ndim: its length.
      dtype: in which the logits are computed: float32, float64 where an operand is float64.

    Gradients:
      Of `hidden`, `kernel` and `bias`, each in its dtype, summed in float32 over rows and blocks. What is not
      differentiated (a frozen kernel) costs no matmul. To any order; forward over reverse (`jax.jvp` of
      `jax.grad`, `jax.hessian`) everywhere. `jax.jvp` of the loss itself: of sums in blocks of rows, else a
      TypeError of jax.

    Numerics:
      Operands of mixed dtypes are promoted as in `jnp.matmul`; products are summed to float32, and everything up
      to the gradient of the logits is float32. For the two matmuls of the backward that is rounded to bfloat16
      where both operands are. In blocks of classes the label's logit is a product of its own for `rank`: logits
      that are equal up to rounding may be ranked either way.

    Cost:
      2 N D V operations a matmul. `reduction="mean"` or "sum": 3 matmuls with gradients, 1 without. "none", or few
      rows and very many classes: 4. Blocks in which no row counts are left out.

    Example:
      >>> import jax, jax.numpy as jnp, jaxent
      >>> hidden, kernel = jnp.ones((2, 3)), jnp.eye(3, 4)
      >>> logits = jaxent.LinearLogits(hidden, kernel)
      >>> print(logits.shape, jaxent.softmax_cross_entropy(logits, jnp.array([0, 3])))
      (2, 4) [1.2142... 2.2142...]

    Source:
      Wijmans et al. 2024, "Cut your losses in large-vocabulary language models"; gradients in the forward pass:
      Hsu et al. 2024, "Liger Kernel". The logit softcap: Bello et al. 2016, Gemma 2.
    """

    hidden: Array
    kernel: Array
    bias: Array | None = None
    _: dataclasses.KW_ONLY
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    precision: Any = dataclasses.field(default=None, metadata={"static": True})
    block_bytes: int = dataclasses.field(default=BLOCK_BYTES, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.kernel.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return accumulation_dtype(self.hidden.dtype, self.kernel.dtype)

    def dense(self) -> Array:
        """The logits as an array `[..., V]`: N x V numbers, for tests and small cases."""
        check_linear("LinearLogits.dense", self)
        return from_product(self, product(self))


def check_linear(function: str, logits: LinearLogits, argument: str = "logits") -> None:
    """Shapes, dtypes, options. Here and not when it is built: a pytree may hold anything."""
    hidden, kernel, bias = logits.hidden, logits.kernel, logits.bias
    arrays = {"hidden": hidden, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    for name, x in arrays.items():
        contracts.check_floating(function, f"{argument}.{name}", x, "Pass `x.astype(jnp.float32)`.")
    if hidden.ndim == 0:
        remedy, got = "A single row of D features has shape [D].", contracts.describe(hidden)
        contracts.fail(ValueError, function, f"{argument}.hidden", "of shape [..., D]", got, remedy)
    features = hidden.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != features:
        transposed = kernel.ndim == 2 and kernel.shape[1] == features
        remedy = "It looks transposed: pass `kernel.T`." if transposed else "It maps D features to V logits."
        expected = f"of shape [{features}, V] (`hidden` is {contracts.describe(hidden)})"
        got = contracts.describe(kernel)
        contracts.fail(ValueError, function, f"{argument}.kernel", expected, got, remedy)
    if bias is not None:
        remedy = "Nothing is broadcast."
        contracts.check_shape(function, f"{argument}.bias", bias, kernel.shape[1:], "one per class", remedy)
    options = {"temperature": logits.temperature, "block_bytes": logits.block_bytes}
    for name, value in (options | ({} if logits.softcap is None else {"softcap": logits.softcap})).items():
        remedy = "It is part of the compiled program; multiply `hidden` by what is learned."
        contracts.check_number(function, f"{argument}.{name}", value, 0, math.inf, remedy)
        contracts.check_option(function, f"{argument}.{name}", value, value > 0, "positive", remedy)
    remedy = "Bytes come in whole numbers, e.g. `64 * 2**20`."
    whole = isinstance(logits.block_bytes, int | np.integer)
    contracts.check_option(function, f"{argument}.block_bytes", logits.block_bytes, whole, "an int", remedy)


def product(block: LinearLogits) -> Array:
    """hidden @ kernel, summed in the accumulation dtype."""
    return jnp.matmul(
        block.hidden, block.kernel, precision=block.precision, preferred_element_type=block.dtype
    )


def from_product(block: LinearLogits, z: Array) -> Array:
    """From the product to the logits: bias, softcap, temperature."""
    if block.bias is not None:
        z = z + block.bias.astype(z.dtype)
    if block.softcap is not None:
        cap = float(block.softcap)  # a numpy float64 would widen float32 under x64
        z = cap * jnp.tanh(z / cap)
    return z if block.temperature == 1 else z / float(block.temperature)


def _operand(block: LinearLogits, dz: Array) -> Array:
    """The product's gradient as an operand of the two matmuls that follow.

    bfloat16 where the layer is: beside float32 they would be slow ones. Not float16, in which the gradient of a
    mean over many rows is 0.
    """
    half = block.hidden.dtype == block.kernel.dtype == jnp.bfloat16
    return dz.astype(jnp.bfloat16) if half else dz


def gradient(moves: LinearLogits, block: LinearLogits, d_product: Array) -> LinearLogits:
    """The gradients of what moves, None for the rest, in the accumulation dtype."""
    dz = _operand(block, d_product)
    n = string.ascii_uppercase[: dz.ndim - 1]  # axes of rows
    return dataclasses.replace(
        block,
        hidden=_einsum(block, f"{n}v,dv->{n}d", dz, block.kernel) if moves.hidden else None,
        kernel=_einsum(block, f"{n}d,{n}v->dv", block.hidden, dz) if moves.kernel else None,
        bias=jnp.sum(d_product, tuple(range(dz.ndim - 1))) if moves.bias else None,
    )


def _einsum(block: LinearLogits, subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=block.precision, preferred_element_type=block.dtype)
