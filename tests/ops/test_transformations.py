"""Rules as arguments of compiled functions, donation; the rest is asked by the conformance kit."""

import jax
import jax.numpy as jnp
import numpy as np

import attn_jax
from attn_jax import Causal, Gaussian, Lengths
from tests.ops.arrays import qkv
from tests.ops.implementations import with_content


@with_content
def test_a_donated_query_becomes_the_output(implementation):
    query, key, value = qkv(queries=9, heads=2, value_width=8)

    def attend(*qkv):
        return attn_jax.attention(*qkv, mask=Causal(), implementation=implementation)

    expected = np.asarray(jax.jit(attend)(query, key, value))
    got = jax.jit(attend, donate_argnums=0)(query, key, value)
    assert query.is_deleted()
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
