"""The general softmax functions: any function of row statistics, and the statistics themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _contracts as contracts
from ._logits import sources
from ._logits.linear import LinearLogits
from ._objective import objective, prepare
from ._row_function import available_statistics
from ._rows import AxisName, Options, keep
from ._sparse import SparseDistribution
from ._statistics import SoftmaxStatistics


@contracts.takes_arrays
def softmax_loss(
    fn: Callable[..., Any],
    logits: Array | LinearLogits,
    labels: Array | SparseDistribution | None,
    *row_args: Any,
    axis: int = -1,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    classes: Array | None = None,
    reduction: str = "mean",
    has_aux: bool = False,
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Any:
    """The general softmax loss: any function of one row's statistics, `fn(statistics, *row_args)`.

        loss = sum(weights * fn(statistics, *row_args)) / sum(weights)      over the rows that count

    Args:
      fn: maps the `SoftmaxStatistics` of one row, whose fields are scalars, and that row's arguments to a scalar; or,
        with `has_aux`, to `(loss, aux)`. Any jax function: `jax.vmap` applies it to all rows. It is traced beforehand
        to see which statistics it reads, and only those are computed.
      logits: `[..., V]`, floating point, or `LinearLogits`.
      labels: integers `[...]` in [0, V), a distribution `[..., V]`, a `SparseDistribution`, or None: then no field that
        needs a label.
      *row_args: arrays (or pytrees of them) `[..., *anything]`, e.g. advantages, old log-probs, random keys; `fn` gets
        `[*anything]`. Where a row does not count it sees 0 instead, and the statistics of a row of equal logits. What
        all rows share, `fn` closes over.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      ignore_index: rows with this integer label are gone as well.
      weights: real `[...]`, a factor per row.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of the softmax.
      classes: integers `[..., K]` in [0, V) or -1, chosen classes of each row: `fn` sees `class_log_probs` `[K]`
        and `other_log_prob`, which are those of `softmax_statistics`.
      reduction: "none", "sum" or "mean", which is the default here.
      has_aux: whether `fn` returns `(loss, aux)`, aux a pytree of arrays: metrics from the same pass.
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses `[...]` or a scalar, in what unit `fn` gives, float32 (float64 for float64 logits); with `has_aux`
      `(losses, aux)`, its leaves `[..., *anything]` of each row, never reduced, 0 in rows that do not count (but for
      random keys).

    Gradients:
      With respect to `logits`, `row_args`, a distribution, and what `fn` closes over, in their dtypes; to any order
      and in forward mode (`LinearLogits` has its limits). `fn` is differentiated by jax, the statistics by jaxent;
      `aux` is not. A custom rule inside `fn` must be linear in its cotangent, which for a reduced loss is known up to
      a factor only.

    Numerics:
      The statistics are those of `softmax_statistics`: accurate for confident rows, NaN for bad labels. Rows
      that do not count contribute exactly 0, even if `fn` makes NaN of them (but what `fn` closes over gets a NaN
      gradient if `fn` is singular at row arguments of 0). A row of weight 0 does not count if `fn` is not finite there.

    Cost:
      That of the statistics that `fn` reads. `LinearLogits`: 3 matmuls with gradients if the loss is reduced, else 4.
      (In a `shard_map` that checks what varies, also 4 if `fn` closes over a traced array that varies less than the
      rows; `jax.lax.pcast` it.)

    Raises:
      As `softmax_cross_entropy`; TypeError: an `fn` that reads what the labels do not allow; ValueError: an
        `fn` that does not give a scalar; a row argument without the shape of the rows in front.

    Example:
      A policy gradient with an entropy bonus, and how often the policy agrees with the action:

      >>> import jax, jax.numpy as jnp, jaxent
      >>> def objective(s, advantage):
      ...     return -advantage * s.log_prob - 0.01 * s.entropy, s.rank == 0
      >>> logits, actions, advantages = jnp.eye(2, 4), jnp.array([3, 1]), jnp.array([1.0, -1.0])
      >>> loss, agrees = jaxent.softmax_loss(objective, logits, actions, advantages, has_aux=True)
      >>> print(f"{loss:.4f}", agrees)
      0.4873 [False  True]

      What mixes rows stands on `softmax_statistics`. DPO compares the log-probabilities of two answers, sequences of
      tokens, with those that a reference model gave:

      >>> def dpo(logits, tokens, where, reference, beta=0.1):
      ...     log_prob = jaxent.softmax_statistics(logits, tokens, where=where, names=("log_prob",)).log_prob
      ...     chosen, rejected = beta * (log_prob.sum(-1) - reference)  # [2, N]
      ...     return jaxent.sigmoid_cross_entropy(chosen - rejected, jnp.ones(chosen.shape), reduction="mean")
      >>> tokens = jnp.array([[[3, 1]], [[2, 2]]])  # chosen and rejected, of one question, two tokens each
      >>> print(dpo(jnp.zeros((2, 1, 2, 4)), tokens, tokens > 0, jnp.zeros((2, 1))).round(4))
      0.6931

      A margin on the label's logit, from the odds of the label against all other classes (CosFace; with a margin per
      class, LDAM):

      >>> def with_margin(s, margin):
      ...     return jax.nn.softplus(margin + s.other_log_prob - s.class_log_probs[0])
      >>> margins = jnp.array([0.35, 0.35])
      >>> print(jaxent.softmax_loss(with_margin, logits, None, margins, classes=actions[:, None]).round(4))
      1.4915

      docs/objectives.md has more: GRPO, GSPO, top-p sampling, in-batch negatives.

    Source:
      The narrow waist of jaxent, docs/architecture.md. DPO: Rafailov et al. 2023.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, ignore_index, weights, None, class_mask, classes, reduction, *names)
    block, rows = prepare("softmax_loss", logits, labels, options)
    for x in jax.tree.leaves(row_args):
        contracts.check_array("softmax_loss", "row_args", x)
        if np.shape(x)[: len(rows.shape)] != rows.shape:
            expected = f"of shape [{', '.join(map(str, (*rows.shape, '...')))}], one entry per row"
            remedy = "What all rows share is no row argument: close over it."
            contracts.fail(ValueError, "softmax_loss", "row_args", expected, contracts.describe(x), remedy)
    return objective(lambda s, _, *args: fn(s, *args), block, rows, row_args, has_aux)


@contracts.takes_arrays
def softmax_statistics(
    logits: Array | LinearLogits,
    labels: Array | SparseDistribution | None = None,
    *,
    names: Sequence[str] | None = None,
    axis: int = -1,
    where: Array | None = None,
    class_mask: Array | None = None,
    classes: Array | None = None,
    class_axis_name: AxisName = None,
) -> SoftmaxStatistics:
    """Row statistics of logits: log-probability, log-normalizer, entropy, prediction, rank, in nats.

    With log p = log_softmax(logits) over the classes in force:

        log_prob = log p_y, or sum_j q_j log p_j         mean_log_prob = 1/V sum_j log p_j
        log_normalizer = log sum_j exp(logits_j)         entropy = -sum_j p_j log p_j
        prediction = argmax_j logits_j                   rank = how many logits are larger than the label's
        class_log_probs = log p_c of the classes c       other_log_prob = log sum p_j of all others

    Accuracy is `jaxent.mean(prediction == labels, where=where)`, top-k accuracy `jaxent.mean(rank < k, where=where)`.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      labels: integers `[...]` in [0, V), a distribution `[..., V]`, a `SparseDistribution`, or None.
      names: the fields to compute; the others are None. Default: all that the labels allow.
      axis: the class axis.
      where: bool `[...]`; a False row has 0 in real fields, prediction -1 and rank V: it is no hit.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of the softmax.
      classes: integers `[..., K]` in [0, V), chosen classes of each row, K where V stands in `logits`. -1 is an empty
        slot. Any other number makes its row NaN; NumPy ones raise.
      class_axis_name: of a mapped axis along which the classes are split.

    Returns:
      `SoftmaxStatistics`, each field `[...]`: float32 (float64 for float64 logits), `prediction` and `rank` int32;
      `class_log_probs` has the shape of `classes`: -inf in an empty slot, and of a class that is not in force (keep
      these out of p log p: 0 * inf); a class that is there twice has it twice.
      `log_prob` and `weighted_log_prob` are None without labels, `rank` also for a distribution.

    Gradients:
      Of all real fields with respect to `logits` (and a distribution), to any order; of an array in forward mode too. A
      `class_log_probs` of -inf has none.

    Numerics:
      As `softmax_cross_entropy`: `log_prob` and `entropy` are accurate for confident rows. A bad label makes
      the real fields of its row NaN and its rank V. Of several largest logits the first is the prediction; a logit that
      equals the label's does not count for its rank. (Equal columns of a kernel give equal logits, but in the
      last block of classes, if it is narrower: they may be a rounding apart.) `other_log_prob` is made of a sum without
      the chosen classes, of which none counts twice: a few ulp where it is log(1e-30), and where it is -1e-20.

    Cost:
      Two passes over the logits for `log_prob`, about one more for each other field in `names`. `LinearLogits`: 1
      matmul for all fields (1 more for `rank` in blocks of classes), 3 more for their gradients. `class_log_probs`
      gather K logits; gradients, and `other_log_prob` where the classes may be split, compare each logit with K classes
      of its row, with more than 32 they scatter these into an array of the logits' size.

    Raises:
      As `softmax_cross_entropy`; ValueError: a name that is unknown or needs labels.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> s = jaxent.softmax_statistics(jnp.array([[2.0, 0.0, -1.0]]), jnp.array([1]))
      >>> print(s.log_prob.round(4), s.entropy.round(4), s.prediction, s.rank)
      [-2.1698] [0.5243] [0] [1]

    Source:
      log-prob and entropy in one pass: what policy-gradient training asks of a language model head, as in TRL.
    """
    function = "softmax_statistics"
    options = Options(axis, where, class_mask=class_mask, classes=classes, class_axis_name=class_axis_name)
    block, rows = prepare(function, logits, labels, options)
    available = available_statistics(block)
    if names is not None:
        known = isinstance(names, Sequence) and not isinstance(names, str) and set(names) <= set(available)
        remedy = "Some need (integer) labels."
        contracts.check_option(function, "names", names, known, f"some of {available}", remedy)
    wanted = tuple(name for name in available if names is None or name in names)
    statistics = sources.statistics(wanted, block, rows.counts, class_axis_name)
    hidden = {"prediction": -1, "rank": rows.all_classes(block.logits.shape[-1])}  # neither is a hit
    fields = {name: x for name, x in vars(statistics).items() if x is not None}
    fields = {name: keep(rows.counts, x, hidden.get(name, 0)) for name, x in fields.items()}
    if "class_log_probs" in fields:
        fields["class_log_probs"] = jnp.moveaxis(fields["class_log_probs"], -1, axis)
    return SoftmaxStatistics(**fields)
