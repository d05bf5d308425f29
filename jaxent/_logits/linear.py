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
from .._contracts import Number, Range
from .._devices import row_major
from .._numerics import accumulation_dtype, as_dtype, of_one_dtype, over_rows
from .._rows import keep

OPTIONS = ("temperature", "softcap")  # Python numbers or arrays
STATIC = ("class_axis", "precision", "block_bytes")  # part of the program
ARRAYS = ("hidden", "kernel", "bias", *OPTIONS)
REMEDY = "1 leaves the logits as they are; the limit at 0 is the argmax, which has no gradient."
TEMPERATURE = Range(0, math.inf, REMEDY, above=True)
SOFTCAP = Range(0, math.inf, "For no bound pass None.", above=True)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits `hidden @ kernel + bias` that are never built: pass them to any softmax function.

        logits = cap(hidden @ kernel + bias) / temperature,   cap(z) = softcap * tanh(z / softcap)

    Every softmax function takes them with every option; only blocks of `block_bytes` exist at a time. A pytree: it
    goes through jit, grad, vmap and shard_map like any tuple of arrays.

    Args:
      hidden: `[..., D]`, floating point: what comes into the last layer.
      kernel: `[D, V]`, floating point; the layout of flax's `Dense` and of `hidden @ kernel`. Or an embedding table
        `[V, D]`, with `class_axis=0`.
      bias: `[V]`, floating point, or None.
      temperature: T > 0, divides the logits: a Python number, or an array `[]` or `[...]`, one per row.
      softcap: > 0, bounds the logits (before the temperature) to +-softcap: a number or an array `[]`. None: no bound.
      class_axis: of the kernel: -1 for `[D, V]`, 0 for an embedding table `[V, D]` (tied embeddings), which is read,
        and whose gradient is made, as it lies: no copy, where `kernel=table.T` may take two.
      precision: of the matmuls, as in `jnp.matmul`.
      block_bytes: > 0, about how much memory a block of logits and its gradient may take, beside the gradients of
        `hidden` and `kernel`. Larger blocks are faster, up to some thousand rows. Of each device, where jax knows
        over how many the arrays are split (docs/sharding.md). None: 128 MiB on a CPU; on accelerators as the machine
        and the shapes ask for, blocks of rows up to 18 kB a class (docs/architecture.md).

    Attributes:
      shape: `[..., V]`, that of the logits.
      ndim: its length.
      dtype: in which the logits are computed: float32, float64 where an operand is float64.

    Gradients:
      Of `hidden`, `kernel` and `bias`, and of a temperature or softcap that is an array, each in its dtype, summed in
      float32 over rows and blocks. What is not differentiated (a frozen kernel) costs no matmul. To any order; forward
      over reverse (`jax.jvp` of `jax.grad`, `jax.hessian`) everywhere. `jax.jvp` of the loss itself: of sums in blocks
      of rows, else a TypeError.

    Numerics:
      Operands of mixed dtypes are promoted as in `jnp.matmul`; products are summed to float32, and everything up
      to the gradient of the logits is float32. For the two matmuls of the backward that is rounded to bfloat16
      where both operands are. What a hidden row, or a column that `class_mask` hides, holds stays there. A temperature
      or softcap that is an array and out of its range makes its rows NaN.

    Cost:
      Memory of about `block_bytes` and of the gradients, none of N x V.
      2 N D V operations a matmul. `reduction="mean"` or "sum": 3 matmuls with gradients, 1 without. "none", or few
      rows and very many classes: 4. Blocks in which no row counts are left out; in a reduced loss also those whose
      weights are all 0. With a `class_mask` the backward may copy the kernel. Call it within `jit`: outside of it the
      loop is compiled at each call.

    Raises:
      Nothing when it is made: a pytree may hold anything. As `logits` of a function, TypeError: operands that are not
      floating point; ValueError: shapes that do not match exactly, an option out of its range.

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
    temperature: Number = 1.0
    softcap: Number | None = None
    class_axis: int = -1
    precision: Any = None
    block_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ARRAYS:
            object.__setattr__(self, name, contracts.as_arrays(getattr(self, name)))

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Arrays are children; options that are Python numbers are part of the program."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        numbers = {name: arrays.pop(name) for name in OPTIONS if contracts.is_number(arrays[name])}
        children = tuple((jax.tree_util.GetAttrKey(name), arrays.get(name)) for name in ARRAYS)
        return children, (*numbers.items(), *((name, getattr(self, name)) for name in STATIC))

    @classmethod
    def tree_unflatten(cls, options: Any, children: Any) -> "LinearLogits":
        return cls(**(dict(zip(ARRAYS, children, strict=True)) | dict(options)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.kernel.shape[self.class_axis])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return accumulation_dtype(self.hidden.dtype, self.kernel.dtype)

    def dense(self) -> Array:
        """The logits as an array `[..., V]`: N x V numbers, for tests and small cases."""
        layer = checked("LinearLogits.dense", self)
        return from_product(layer, product(layer))


def checked(function: str, logits: LinearLogits, argument: str = "logits") -> LinearLogits:
    """Of jax arrays and numbers. Checked here and not when it is built: a pytree may hold anything."""
    hidden, kernel, bias = logits.hidden, logits.kernel, logits.bias
    arrays = {"hidden": hidden, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    for name, x in arrays.items():
        contracts.check_floating(function, f"{argument}.{name}", x, "Pass `x.astype(jnp.float32)`.")
    if hidden.ndim == 0:
        remedy, got = "A single row of D features has shape [D].", contracts.describe(hidden)
        contracts.fail(ValueError, function, f"{argument}.hidden", "of shape [..., D]", got, remedy)
    class_axis, ok = logits.class_axis, logits.class_axis in (-1, 0)
    remedy = "-1 for `[D, V]`, 0 for an embedding table `[V, D]`."
    contracts.check_option(function, f"{argument}.class_axis", class_axis, ok, "-1 or 0", remedy)
    features, other = hidden.shape[-1], -1 - class_axis
    if kernel.ndim != 2 or kernel.shape[other] != features:
        transposed = kernel.ndim == 2 and kernel.shape[class_axis] == features
        remedy = f"It looks transposed: pass `class_axis={other}`."
        remedy = remedy if transposed else "It maps D features to V logits."
        wanted = f"[{features}, V]" if class_axis else f"[V, {features}]"
        expected = f"of shape {wanted} (`hidden` is {contracts.describe(hidden)})"
        got = contracts.describe(kernel)
        contracts.fail(ValueError, function, f"{argument}.kernel", expected, got, remedy)
    if bias is not None:
        remedy, of_bias = "Nothing is broadcast.", (kernel.shape[class_axis],)
        contracts.check_shape(function, f"{argument}.bias", bias, of_bias, "one per class", remedy)
    name, rows = f"{argument}.temperature", hidden.shape[:-1]
    temperature = contracts.number(function, name, logits.temperature, TEMPERATURE, rows)
    softcap = logits.softcap
    if softcap is not None:
        softcap = contracts.number(function, f"{argument}.softcap", softcap, SOFTCAP)
    contracts.check_block_bytes(function, f"{argument}.block_bytes", logits.block_bytes)
    hidden, kernel, bias = jax.tree.map(jnp.asarray, (hidden, kernel, bias))
    options = {"temperature": temperature, "softcap": softcap}
    return replace(logits, {"hidden": hidden, "kernel": kernel, "bias": bias} | options)


def per_row_fields(layer: LinearLogits) -> dict[str, Array]:
    """What each row has of its own."""
    per_row: dict[str, Any] = {"temperature": layer.temperature} if np.ndim(layer.temperature) else {}
    return per_row | {"hidden": layer.hidden}


def shared_fields(layer: LinearLogits) -> dict[str, Array]:
    """What the rows have in common."""
    fields = {name: getattr(layer, name) for name in ARRAYS if name not in per_row_fields(layer)}
    return {name: x for name, x in fields.items() if not contracts.is_number(x)}


def replace(layer: LinearLogits, fields: dict[str, Any]) -> LinearLogits:
    return dataclasses.replace(layer, **fields)


def without_arrays(layer: LinearLogits) -> LinearLogits:
    """What is left of it: gradients by nothing."""
    return replace(layer, dict.fromkeys(per_row_fields(layer) | shared_fields(layer)))


def without_hidden_rows(layer: LinearLogits, counts: Array | None) -> LinearLogits:
    """Something harmless in place of what is hidden: it will be multiplied by a gradient of zero."""
    if counts is None:
        return layer
    fields = per_row_fields(layer).items()
    return replace(layer, {name: keep(counts, x, 0 if name == "hidden" else 1) for name, x in fields})


def product(block: LinearLogits) -> Array:
    """hidden @ kernel, summed in the accumulation dtype."""
    n = _axes_of_rows(block.hidden)
    return _einsum(block, f"{n}d,{_axes_of_kernel(block)}->{n}v", block.hidden, block.kernel)


def from_product(block: LinearLogits, z: Array, class_mask: Array | None = None) -> Array:
    """From the product to the logits: bias, softcap, temperature. NaN of classes out of force stays where it is."""
    if block.bias is not None:
        z = z + over_rows(block.bias.astype(z.dtype), z.ndim)
    if class_mask is not None:
        z = jnp.where(over_rows(class_mask, z.ndim), z, 0)
    if block.softcap is not None:
        cap = as_dtype(block.softcap, z.dtype)
        z = cap * jnp.tanh(z / cap)
    if isinstance(block.temperature, float):
        return z if block.temperature == 1 else z / block.temperature
    temperature = block.temperature.astype(z.dtype)
    return z / (temperature[..., None] if temperature.ndim else temperature)


def operand_dtype(layer: LinearLogits) -> jnp.dtype:
    """Of the gradient of the logits where it meets hidden and kernel.

    bfloat16 where the layer is: beside float32 they would be slow matmuls. Not float16, in which the gradient of a
    mean over many rows is 0.
    """
    half = layer.hidden.dtype == layer.kernel.dtype == jnp.bfloat16
    return jnp.dtype(jnp.bfloat16) if half else layer.dtype


def operand(layer: LinearLogits, d_product: Array) -> Array:
    """The product's gradient for the matmuls that follow."""
    return d_product.astype(operand_dtype(layer))


def bias_gradient(perturbed: LinearLogits, d_product: Array) -> Array | None:
    return jnp.sum(d_product, tuple(range(d_product.ndim - 1))) if perturbed.bias else None


def hidden_gradient(layer: LinearLogits, operand: Array, class_mask: Array | None = None) -> Array:
    """In the accumulation dtype."""
    kernel, n = layer.kernel, _axes_of_rows(operand)
    if class_mask is not None:
        # 0 * NaN: a column that some rows have in force has made these NaN already
        of_all = class_mask.ndim == 1
        seen = jnp.expand_dims(class_mask, -1 - layer.class_axis) if of_all else jnp.isfinite(kernel)
        kernel = jnp.where(seen, kernel, 0)
    return _einsum(layer, f"{n}v,{_axes_of_kernel(layer)}->{n}d", operand, kernel)


def kernel_gradient(layer: LinearLogits, operand: Array) -> Array:
    """In the accumulation dtype."""
    n = _axes_of_rows(operand)
    return row_major(_einsum(layer, f"{n}d,{n}v->{_axes_of_kernel(layer)}", layer.hidden, operand))


def _axes_of_rows(x: Array) -> str:
    return string.ascii_uppercase[: x.ndim - 1]


def _axes_of_kernel(layer: LinearLogits) -> str:
    return "dv" if layer.class_axis else "vd"


def perturbed_options(perturbed: LinearLogits, block: LinearLogits) -> dict[str, Array]:
    """Those that are differentiated, which jax does."""
    return {name: getattr(block, name) for name in OPTIONS if getattr(perturbed, name) is True}


def _einsum(block: LinearLogits, subscripts: str, a: Array, b: Array) -> Array:
    a, b = of_one_dtype(a, b)
    return jnp.einsum(subscripts, a, b, precision=block.precision, preferred_element_type=block.dtype)
