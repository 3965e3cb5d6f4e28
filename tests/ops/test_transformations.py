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
    value, mesh, along = values(), Mesh(np.asarray(jax.devices()[:1]), ("d",)), PartitionSpec("d")

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

    sharded = jax.shard_map(smoothed, mesh=mesh, in_specs=along, out_specs=along)
    got, expected = (quick_jit(jax.grad(loss(f)))(value) for f in (sharded, smoothed))
    np.testing.assert_allclose(got, expected, atol=1e-7)


@with_content
def test_a_gradient_of_values_under_shard_map(implementation):
    """Weights are the same on every device, the values are not."""
    mesh, along = Mesh(np.asarray(jax.devices()[:1]), ("d",)), PartitionSpec(None, None, None, "d")

    def attend(*qkv):
        mask = Lengths(key=jnp.asarray([3, 7]))
        return attn_jax.attention(*qkv, mask=mask, implementation=implementation)

    def gradient(function):
        return quick_jit(jax.grad(lambda *qkv: jnp.sin(function(*qkv)).sum(), (0, 1, 2)))

    whole = PartitionSpec()
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(whole, whole, along), out_specs=along)
    got, expected = (gradient(f)(*qkv()) for f in (sharded, attend))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, expected)


@with_content
def test_queries_under_shard_map_with_a_mask_of_data(implementation):
    """What is found out of the keys, which all devices hold, is joined with what varies."""
    mesh, along = Mesh(np.asarray(jax.devices()[:1]), ("d",)), PartitionSpec(None, "d")

    def attend(*qkv):
        mask = Lengths(key=jnp.asarray([3, 7]))
        return attn_jax.attention(*qkv, mask=mask, implementation=implementation)

    whole = PartitionSpec()
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(along, whole, whole), out_specs=along)
    got, expected = (quick_jit(f)(*qkv()) for f in (sharded, attend))
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
