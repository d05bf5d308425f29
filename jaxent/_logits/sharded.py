"""A class axis that is split over devices: each sums over its own classes, and collectives of one number per row
add up the sums.

Symbols as in `_statistics`. The one term that is exactly 1 cannot be left out here by looking for the largest
logit, for several devices may hold it. The label, though, is on one device: with integer labels its term is left
out,

    S = sum_{j != y} e_j      c = z_y - m      T = S + exp(c)      log p_y = c - log T

where log T = log1p(S) if c = 0. No term is ever subtracted, so a loss of 1e-30 keeps its digits.

The rule of differentiation is that of the sums of one device; the collectives stay outside, where jax knows in every
kind of mapping what their transposes are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import with_forward_mode
from .._numerics import exp_difference, product_or_zero
from .._reduction import keep_gradient
from .._statistics import (
    Block,
    Moments,
    Partial,
    SoftmaxStatistics,
    partial_statistics,
)
from . import class_blocks
from .linear import LinearLogits

AxisName = Any  # of one mapped axis, or a tuple of them


class Sums(NamedTuple):
    """Of a row, over the classes of one device, relative to the largest logit there."""

    max: Array  # no derivative: a shift
    total: Array  # sum_j e_j, without the label's class where there are integer labels
    ...
