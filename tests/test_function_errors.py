"""What is no function of one row: the same errors on all sources of logits, before anything runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import harness
import jaxent
from forms import log_prob
from layers import (
    ADVANTAGE,
    FLAGS,
    FLAT,
    SEQUENCES,
    SOURCES,
    layer_of,
    logits_of,
)

everywhere = pytest.mark.parametrize("source", SOURCES)
LABELS = jnp.asarray([3, 0, 10, 7, 7, 1, 5])


def messages(fn, *row_args, match, rows=FLAT, **options):
    found = set()
    for source in SOURCES:
        for reduction in ("none", "mean"):
            with harness.blocks(source), pytest.raises(ValueError, match=match) as error:
                jax.eval_shape(
                    lambda layer, source=source, reduction=reduction: jaxent.softmax_loss(
                        fn,
                        logits_of(source, layer),
                        jnp.zeros(rows, int),
                        *row_args,
                        reduction=reduction,
                        **options,
                    ),
                    layer_of(rows),
                )
            found.add(str(error.value))
    (message,) = found
    assert message.startswith("jaxent.softmax_loss: ")
    return message


ARRAYS = {
    "closes over a value per row": ([7], lambda s: ADVANTAGE * s.log_prob),
    "one lane": ([1], lambda s: s.log_prob[None]),
    "stacked": ([2], lambda s: jnp.stack([s.log_prob, s.entropy])),
    "integers": ([7], lambda s: FLAGS),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_fn_returns_an_array(name):
    shape, fn = ARRAYS[name]
    message = messages(fn, match=r"`fn` must be")
    assert "row argument" in message and str(shape) in message


NO_LOSSES = {
    "a tuple": lambda s: (s.entropy,),
    "a pair": lambda s: (s.entropy, s.log_prob),
    "nothing": lambda s: None,
    "a dict": lambda s: {"loss": s.entropy},
    "the statistics": lambda s: s,
    "complex": lambda s: lax.complex(s.log_prob, s.entropy),
}


@pytest.mark.parametrize("name", NO_LOSSES)
def test_fn_returns_something_else(name):
    messages(NO_LOSSES[name], match=r"`fn` must be")


NO_PAIRS = {
    "a loss": lambda s: s.log_prob,
    "three": lambda s: (s.log_prob, s.entropy, s.rank),
    "one": lambda s: (s.log_prob,),
    "a dict": lambda s: {"loss": s.log_prob, "aux": s.entropy},
    "an array as loss": lambda s: (s.log_prob[None], s.entropy),
    "no loss": lambda s: (None, s.entropy),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_fn_returns_no_pair(name):
    messages(NO_PAIRS[name], match=r"`fn` must be", has_aux=True)


OTHER_ROWS = {
    "another number of rows": jnp.ones(8),
    "one for all": jnp.ones(1),
    "a number": 0.5,
    "one per class": jnp.ones(11),
    "rows in another place": jnp.ones((3, 7)),
    "a leaf of a pytree": {"a": ADVANTAGE, "b": [jnp.ones(2)]},
    "one key": jax.random.key(0),
    "a table": np.ones((2, 7)),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_row_arguments_without_the_rows(name):
    message = messages(lambda s, x: s.log_prob, OTHER_ROWS[name], match=r"`row_args` must be")
    assert "close over it" in message


def test_row_arguments_with_some_of_the_rows():
    for x in (jnp.ones(4), jnp.ones((4, 1)), jnp.ones((3, 4)), jnp.ones(())):
        assert "close over it" in messages(
            lambda s, x: s.entropy, x, match=r"`row_args` must be", rows=SEQUENCES
        )


def test_no_row_argument_is_none():
    """A pytree with no leaf."""
    z = layer_of(FLAT).dense()
    got = jaxent.softmax_loss(lambda s, nothing, x: s.log_prob * x[1], z, LABELS, None, (None, ADVANTAGE))
    np.testing.assert_allclose(got, jnp.mean(ADVANTAGE * log_prob(z, LABELS)), rtol=1e-5)


@everywhere
def test_errors_of_fn_are_its_own(source):
    def fn(s):
        raise KeyError("mine")

    with harness.blocks(source), pytest.raises(KeyError, match="mine"):
        jaxent.softmax_loss(fn, logits_of(source, layer_of(FLAT)), LABELS)


def test_what_the_labels_do_not_allow_is_an_error_when_it_is_only_compared():
    z, q = jnp.eye(3), jnp.eye(3)
    for fn, labels in (
        (lambda s: jnp.where(s.rank == 0, s.entropy, 0), q),
        (lambda s: s.log_prob is None, None),
    ):
        with pytest.raises(TypeError, match="`labels` must be given for `fn` to read"):
            jaxent.softmax_loss(fn, z, labels)


def test_statistics_may_be_replaced():
    """Those that there are: a distribution has no rank, and no classes are chosen."""
    z = jnp.eye(3)
    for labels in (jnp.arange(3), jnp.eye(3)):
        fn = lambda s: dataclasses.replace(s, entropy=1.0).log_prob  # noqa: E731
        np.testing.assert_array_equal(
            jaxent.softmax_loss(fn, z, labels), jaxent.softmax_loss(lambda s: s.log_prob, z, labels)
        )
