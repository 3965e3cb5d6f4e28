"""The primitive of shifted slices: values, derivatives and transformations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.strided import spread_sum, strided_sum
from tests.ops.implementations import quick_jit

TAPS, OUTPUTS = 5, 19
# Stride, sequences and heads that the weights tell apart, whether they differ between rows.
KINDS = [
    (stride, sequences, heads, rows)
    for stride, sequences, heads, rows in itertools.product((1, 2, 3), (1, 2), (1, 3), (1, OUTPUTS))
    if stride == 1 or rows == 1
]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def arrays(kind, inputs):
    _, sequences, heads, rows = kind
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(sequences, TAPS, rows, heads))
    return jnp.asarray(rng.normal(size=(2, inputs, 3, 4))), jnp.asarray(weights)


def pairs(stride, few, many, start):
    """(few index, tap, many index) of all terms: stride * few + tap - start = many."""
    for c, t in itertools.product(range(few), range(TAPS)):
        if 0 <= stride * c + t - start < many:
            yield c, t, stride * c + t - start


@pytest.mark.parametrize("kind", KINDS)
def test_a_strided_sum_gathers(kind):
    stride, start = kind[0], 2 * kind[0]
    x, weights = arrays(kind, inputs=2 * OUTPUTS)
    function = quick_jit(lambda x, weights: strided_sum(x, weights, stride, OUTPUTS, start))
    taps = np.broadcast_to(weights, (2, TAPS, OUTPUTS, 3))
    expected = np.zeros((2, OUTPUTS, 3, 4))
    for c, t, i in pairs(stride, OUTPUTS, x.shape[1], start):
        expected[:, c] += taps[:, t, c, :, None] * np.asarray(x[:, i])
    np.testing.assert_allclose(function(x, weights), expected, atol=1e-12)
    check_grads(function, (x, weights), 2, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spread_sum_is_the_transposed_one(kind):
    stride, start = kind[0], 2 * kind[0]
    x, weights = arrays(kind, inputs=OUTPUTS)
    function = quick_jit(lambda x, weights: spread_sum(x, weights, stride, 2 * OUTPUTS, start))
    taps = np.broadcast_to(weights, (2, TAPS, OUTPUTS, 3))
    expected = np.zeros((2, 2 * OUTPUTS, 3, 4))
    for c, t, i in pairs(stride, OUTPUTS, 2 * OUTPUTS, start):
        expected[:, i] += taps[:, t, c, :, None] * np.asarray(x[:, c])
    np.testing.assert_allclose(function(x, weights), expected, atol=1e-12)
    check_grads(function, (x, weights), 2, rtol=1e-6)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (2, 3)])
def test_vmap(in_axes):
    x, weights = arrays((1, 1, 1, 1), OUTPUTS)
    lanes = [
        z if a is None else jnp.stack([z, 2 * z], a)
        for z, a in zip((x, weights), in_axes, strict=True)
    ]
    got = jax.vmap(lambda x, weights: strided_sum(x, weights, 1, OUTPUTS, 2), in_axes)(*lanes)
    factor = 2 ** sum(a is not None for a in in_axes)
    np.testing.assert_allclose(got[1], factor * strided_sum(x, weights, 1, OUTPUTS, 2))


def test_shard_map_over_sequences():
    x, weights = arrays((1, 1, 1, 1), OUTPUTS)
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")

    def total(x, weights):
        def function(x, weights):
            return strided_sum(x, weights, 1, OUTPUTS, 2)

        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
        )
        return jnp.sin(sharded(x, weights)).sum()

    def plain(x, weights):
        return jnp.sin(strided_sum(x, weights, 1, OUTPUTS, 2)).sum()

    got, expected = (jax.grad(f, (0, 1))(x, weights) for f in (total, plain))
    jax.tree.map(np.testing.assert_allclose, got, expected)


def test_export():
    x, weights = arrays((1, 1, 1, 1), OUTPUTS)
    function = quick_jit(lambda x: strided_sum(x, weights, 1, OUTPUTS, 2))
    np.testing.assert_array_equal(jax.export.export(function)(x).call(x), function(x))
