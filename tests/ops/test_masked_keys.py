"""Queries without keys give zero, and what a masked key or value holds reaches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Lengths, Local, Segments, Window
from tests.ops.arrays import qkv, values
from tests.ops.implementations import attend, every, weigh, with_content

EMPTY = (0, slice(2, 4))
ROW_TWO = np.arange(6).reshape(1, 1, 6, 1) != 2
NO_KEYS = {
    "mask": {"mask": jnp.asarray(ROW_TWO)},
    "mask known while tracing": {"mask": ROW_TWO},
    "causal": {"mask": Causal(), "query_positions": -3},
    "local": {"mask": Local(1, 1), "query_positions": 7},
    "no key has any length": {"mask": Lengths(key=jnp.asarray([0, 9]))},
    "query lengths": {"mask": Lengths(query=np.asarray([6, 2]))},
    "segments": {"mask": Segments(np.asarray([1, 1, 2, 3, 1, 1]), np.ones(9, int))},
    "bias": {"bias": jnp.where(ROW_TWO, 1.0, -jnp.inf)},
    "kernel": {"proximity": Window(1), "query_positions": 7},
    "score": {"score": lambda z, i, j, n: jnp.where(i == 2, -jnp.inf, z)},
}
SUMMING = ("softmax", "softmax_one", "sparsemax")


def empty_rows(arguments, **shape):
    """[B, T] which queries have no allowed key."""
    query, key, value = qkv(**shape)
    if set(arguments) == {"bias"} or set(arguments) == {"score"}:
        return np.arange(6)[None, :].repeat(2, 0) == 2
    weights = weigh(0 * query, key, value, **arguments)
    return ~np.asarray(weights).any((1, 3))


@with_content
@pytest.mark.parametrize("reason", NO_KEYS)
def test_a_query_without_keys_gives_zero_and_no_gradient(implementation, reason):
    """All other cotangents are zero: so must every gradient be, exactly."""
    arguments, arrays = NO_KEYS[reason], qkv()
    empty = empty_rows(arguments)
    assert empty.any()
    assert not empty.all()

    def derivatives(*arrays):
        def output(*arrays):
            return attn_jax.attention(*arrays, **arguments, implementation=implementation)

        result, pull = jax.vjp(output, *arrays)
        pushed = jax.jvp(output, arrays, arrays)[1]
        return result, pushed, pull(jnp.where(empty[..., None, None], jnp.ones_like(result), 0))

    result, pushed, gradients = jax.jit(derivatives)(*arrays)
    np.testing.assert_array_equal(np.asarray(result).any((2, 3)), ~empty)
    assert not np.any(pushed[empty])
    assert not any(np.any(gradient) for gradient in gradients)


@with_content
def test_a_query_without_keys_gives_zero_under_every_normalizer(implementation):
    query, key, value = qkv()
    for normalizer in ("softmax_one", "sigmoid", "none", "linear"):
        output = attend(
            query, key, value, mask=ROW_TWO, normalizer=normalizer, implementation=implementation
        )
        assert not np.any(output[:, 2])


@every
def test_a_query_without_keys_gives_zero_and_no_gradient_without_content(implementation):
    value = values()

    def output(value):
        return attn_jax.attention(
            None,
            None,
            value,
            proximity=Window(2),
            mask=Lengths(key=jnp.asarray([0, 3])),
            implementation=implementation,
        )

    result, pull = jax.jit(lambda value: jax.vjp(output, value))(value)
    empty = np.stack([np.ones(9, bool), np.arange(9) > 4])
    np.testing.assert_array_equal(np.asarray(result).any((2, 3)), ~empty)
    (gradient,) = pull(jnp.where(empty[..., None, None], jnp.ones_like(result), 0))
    assert not np.any(gradient)


# NaN and inf in masked keys and values

BAD = [np.nan, np.inf, -np.inf]
SEGMENTS = np.asarray([1, 1, 1, 1, 2, 2, 2, 2, 2])
HIDDEN_FROM_ALL = {
    "lengths": Lengths(key=jnp.asarray([6, 6])),
    "keys": np.arange(9).reshape(1, 1, 1, 9) < 6,
    "pairs": jnp.asarray(np.arange(9).reshape(1, 1, 1, 9) < 6) & (np.ones((2, 1, 9, 1), bool)),
    "and causal": Causal() & Lengths(key=6),
}


def all_derivatives(arrays, tangents, cotangent, **arguments):
    """Output, tangent of the output, and cotangents of query, key and value."""

    def output(*arrays):
        return attn_jax.attention(*arrays, **arguments)

    @jax.jit
    def derivatives(arrays, tangents, cotangent):
        result, pull = jax.vjp(output, *arrays)
        return result, jax.jvp(output, arrays, tangents)[1], pull(cotangent)

    return derivatives(arrays, tangents, cotangent)


def spoiled(arrays, bad, at):
    """Query as it is; key and value with a bad entry."""
    query, key, value = arrays
    return query, key.at[:, at, :, 1].set(bad), value.at[:, at, :, 2].set(bad)


@with_content
@pytest.mark.parametrize(("mask", "bad"), [*zip(HIDDEN_FROM_ALL, [*BAD, np.nan], strict=True)])
def test_keys_hidden_from_every_query_may_hold_anything(implementation, mask, bad):
    arrays, tangents, cotangent = qkv(0, queries=9), qkv(1, queries=9), jnp.ones((2, 9, 4, 5))
    arguments = {"mask": HIDDEN_FROM_ALL[mask], "implementation": implementation}
    clean = all_derivatives(arrays, tangents, cotangent, **arguments)
    dirty = all_derivatives(
        spoiled(arrays, bad, slice(6, 9)),
        spoiled(tangents, bad, slice(6, 9)),
        cotangent,
        **arguments,
    )
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@with_content
@pytest.mark.parametrize("bad", BAD)
def test_keys_of_one_segment_reach_no_other_segment(implementation, bad):
    """And they do reach their own."""
    arrays, tangents, cotangent = qkv(0, queries=9), qkv(1, queries=9), jnp.ones((2, 9, 4, 5))
    arguments = {"mask": Segments(SEGMENTS), "implementation": implementation}
    clean = all_derivatives(arrays, tangents, cotangent, **arguments)
    dirty = all_derivatives(
        spoiled(arrays, bad, 1), spoiled(tangents, bad, 1), cotangent, **arguments
    )
    for got, expected in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(got[:, 4:], expected[:, 4:], atol=1e-6)
    assert not np.isfinite(dirty[0][:, :4, :, 2]).any()


@with_content
@pytest.mark.parametrize("bad", BAD)
def test_a_later_key_reaches_no_earlier_query(implementation, bad):
    arrays, tangents = qkv(0, queries=9), qkv(1, queries=9)
    cotangent = jnp.ones((2, 9, 4, 5)).at[:, 7:].set(0)
    arguments = {"mask": Causal(), "implementation": implementation}
    clean = all_derivatives(arrays, tangents, cotangent, **arguments)
    dirty = all_derivatives(
        spoiled(arrays, bad, 7), spoiled(tangents, bad, 7), cotangent, **arguments
    )
    for got, expected in zip((*dirty[:2], dirty[2][0]), (*clean[:2], clean[2][0]), strict=True):
        np.testing.assert_allclose(got[:, :7], expected[:, :7], atol=1e-6)
    assert not np.isfinite(dirty[0][:, 7:, :, 2]).any()


@every
@pytest.mark.parametrize("bad", BAD)
def test_values_hidden_from_every_query_may_hold_anything_without_content(implementation, bad):
    value, tangent = values(0), values(1)

    @jax.jit
    def derivatives(value, tangent):
        def output(value):
            mask = Lengths(key=jnp.asarray([5, 7]))
            return attn_jax.attention(
                None, None, value, proximity=Window(3), mask=mask, implementation=implementation
            )

        result, pull = jax.vjp(output, value)
        return result, jax.jvp(output, (value,), (tangent,))[1], pull(jnp.ones_like(result))

    clean = derivatives(value, tangent)
    dirty = derivatives(
        value.at[0, 5:].set(bad).at[1, 7:].set(bad),
        tangent.at[0, 5:].set(bad).at[1, 7:].set(bad),
    )
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@with_content
def test_a_value_that_may_be_seen_is_seen_whatever_its_weight(implementation):
    """exp(-2000) is zero in float32; the mask lets NaN through."""
    query, key, value = qkv()
    bias = jnp.zeros((1, 1, 1, 9)).at[..., 4].set(-2000.0)
    mask = np.ones((1, 1, 6, 1), bool)
    output = attend(
        query,
        key,
        value.at[:, 4].set(jnp.nan),
        bias=bias,
        mask=mask & (np.arange(9).reshape(1, 1, 1, 9) < 8),
        implementation=implementation,
    )
    assert np.isnan(output).all()
