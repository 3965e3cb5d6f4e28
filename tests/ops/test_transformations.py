"""Rules as arguments of compiled functions, donation; the rest is asked by the conformance kit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import attn_jax
from attn_jax import Causal, Gaussian, Lengths
from tests.ops.arrays import qkv, values
from tests.ops.implementations import every, quick_jit, with_content


def attend_some(implementation):
    """Attention to as many keys as data say."""
    mask = Lengths(key=jnp.asarray([3, 7]))
    return functools.partial(attn_jax.attention, mask=mask, implementation=implementation)


def sharded(function, in_specs, along):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("d",))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=along)


@with_content
def test_a_donated_query_becomes_the_output(implementation):
    query, key, value = qkv(queries=9, heads=2, value_width=8)

    def attend(*qkv):
        return attn_jax.attention(*qkv, mask=Causal(), implementation=implementation)

    expected = np.asarray(jax.jit(attend)(query, key, value))
    got = jax.jit(attend, donate_argnums=0)(query, key, value)
    assert query.is_deleted()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@every
@pytest.mark.parametrize("normalizer", ["softmax", "softmax_one"])
def test_a_gradient_without_content_under_shard_map(implementation, normalizer):
    """Weights of a known kernel are the same on every device, the values are not."""
    value, along = values(), PartitionSpec("d")

    def smoothed(value):
        return attn_jax.attention(
            None,
            None,
            value,
            proximity=Gaussian(2.0),
            normalizer=normalizer,
            implementation=implementation,
        )

    def loss(function):
        return lambda value: jnp.sin(function(value)).sum()

    over_sequences = sharded(smoothed, along, along)
    got, expected = (quick_jit(jax.grad(loss(f)))(value) for f in (over_sequences, smoothed))
    np.testing.assert_allclose(got, expected, atol=1e-7)


@with_content
def test_a_gradient_of_values_under_shard_map(implementation):
    """Weights are the same on every device, the values are not."""
    attend, along = attend_some(implementation), PartitionSpec(None, None, None, "d")

    def gradient(function):
        return quick_jit(jax.grad(lambda *qkv: jnp.sin(function(*qkv)).sum(), (0, 1, 2)))

    over_values = sharded(attend, (PartitionSpec(), PartitionSpec(), along), along)
    got, expected = (gradient(f)(*qkv()) for f in (over_values, attend))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, expected)


@with_content
def test_queries_under_shard_map_with_a_mask_of_data(implementation):
    """What is found out of the keys, which all devices hold, is joined with what varies."""
    attend, along = attend_some(implementation), PartitionSpec(None, "d")
    over_queries = sharded(attend, (along, PartitionSpec(), PartitionSpec()), along)
    got, expected = (quick_jit(f)(*qkv()) for f in (over_queries, attend))
    np.testing.assert_array_equal(got, expected)


def traces(function, *arguments):
    """How often a function is traced when it is called with each of some arguments."""
    count = 0

    def counted(argument):
        nonlocal count
        count += 1
        return function(argument)

    compiled = jax.jit(counted)
    for argument in arguments:
        compiled(argument)
    return count


def test_rules_and_masks_as_arguments_trace_nothing_again():
    def output(rule):
        kernel, mask = rule
        return attn_jax.attention(*qkv(), proximity=kernel, mask=mask)

    def rule(x):
        return Gaussian(jnp.asarray(x)), Causal() & Lengths(key=jnp.asarray([int(x), 9]))

    assert traces(output, rule(2.0), rule(5.0)) == 1
    assert traces(output, rule(2.0), (Gaussian(2.0), Causal())) == 2
