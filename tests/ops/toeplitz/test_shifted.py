"""The primitive of shifted slices: values, derivatives and transformations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.shifted import shifted_sum
from tests.ops.implementations import quick_jit

TAPS, INPUTS, OUTPUTS = 5, 23, 19
# Sequences and heads that the weights tell apart, whether they differ between rows.
KINDS = list(itertools.product((1, 2), (1, 3), (1, OUTPUTS)))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def arrays(kind):
    sequences, heads, rows = kind
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(sequences, TAPS, rows, heads))
    return jnp.asarray(rng.normal(size=(2, INPUTS, 3, 4))), jnp.asarray(weights)


@pytest.mark.parametrize(("kind", "start"), [*zip(KINDS, itertools.cycle([2, -2, -2, 2]))])
def test_a_shifted_sum_and_its_derivatives(kind, start):
    """`check_grads` asks for both modes; twice over for transposes of transposes, at the ends."""
    x, weights = arrays(kind)
    taps = np.broadcast_to(weights, (2, TAPS, OUTPUTS, 3))
    expected = np.zeros((2, OUTPUTS, 3, 4))
    for c, t in itertools.product(range(OUTPUTS), range(TAPS)):
        if 0 <= c + t - start < INPUTS:
            expected[:, c] += taps[:, t, c, :, None] * np.asarray(x[:, c + t - start])

    @jax.jit
    def function(x, weights):
        return shifted_sum(x, weights, OUTPUTS, start)

    np.testing.assert_allclose(function(x, weights), expected, atol=1e-12)
    check_grads(
        function, (x, weights), 2 if start == 2 and kind in (KINDS[0], KINDS[-1]) else 1, rtol=1e-6
    )


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (2, 3)])
def test_vmap(in_axes):
    x, weights = arrays((1, 1, 1))
    lanes = [
        z if a is None else jnp.stack([z, 2 * z], a)
        for z, a in zip((x, weights), in_axes, strict=True)
    ]
    got = jax.vmap(lambda x, weights: shifted_sum(x, weights, OUTPUTS, 2), in_axes)(*lanes)
    factor = 2 ** sum(a is not None for a in in_axes)
    np.testing.assert_allclose(got[1], factor * shifted_sum(x, weights, OUTPUTS, 2))


def test_shard_map_over_sequences():
    x, weights = arrays((1, 1, 1))
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")

    def total(x, weights):
        def function(x, weights):
            return shifted_sum(x, weights, OUTPUTS, 2)

        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
        )
        return jnp.sin(sharded(x, weights)).sum()

    def plain(x, weights):
        return jnp.sin(shifted_sum(x, weights, OUTPUTS, 2)).sum()

    got, expected = (quick_jit(jax.grad(f, (0, 1)))(x, weights) for f in (total, plain))
    jax.tree.map(np.testing.assert_allclose, got, expected)


def test_export():
    x, weights = arrays((1, 1, 1))
    function = jax.jit(lambda x: shifted_sum(x, weights, OUTPUTS, 2))
    np.testing.assert_array_equal(jax.export.export(function)(x).call(x), function(x))
