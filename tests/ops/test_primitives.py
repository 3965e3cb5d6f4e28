"""What every primitive owes JAX: lanes, devices, export, eager calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attn_jax.ops.blockwise.diagonals import toeplitz
from attn_jax.ops.toeplitz import exponential
from attn_jax.ops.toeplitz.products import product
from attn_jax.ops.toeplitz.resampled import down, up
from attn_jax.ops.toeplitz.rowwise import row_sums, times
from attn_jax.ops.toeplitz.shifted import shifted_sum
from attn_jax.ops.toeplitz.windows import window_sum
from tests.ops.implementations import quick_jit


def _product(x, weights):
    return product(weights, x)


# A function of x and weights, and the shapes of both.
PRIMITIVES = {
    "shifted sum": (
        functools.partial(shifted_sum, length=19, start=2),
        ((2, 23, 3, 4), (1, 5, 1, 1)),
    ),
    "product": (_product, ((2, 3, 7, 3, 4), (3, 5, 7))),
    "decayed states": (exponential.decayed, ((2, 3, 2, 4), (1, 2, 5))),
    "rows times numbers": (times, ((2, 5, 12), (1, 5, 3, 1))),
    "sums of rows": (functools.partial(row_sums, heads=3), ((2, 5, 12), (1, 5, 12))),
}


# Linear ones: a function of x, and its shape.
BELLS = ((0.5, 2.0, -1.0), (1.0, 0.25, 3.0))
LINEAR = {
    "down": (functools.partial(down, bells=BELLS, outermost=True), (2, 11, 5)),
    "up": (functools.partial(up, bells=BELLS, length=11, outermost=False), (2, 8, 5)),
    "window": (
        functools.partial(window_sum, before=jnp.asarray([9]), after=jnp.asarray([3]), farthest=9),
        (2, 21, 3),
    ),
    "Toeplitz matrix": (jax.vmap(lambda x: toeplitz(x, rows=4, heads=2)), (2, 1, 11)),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=PRIMITIVES)
def primitive(request):
    function, shapes = PRIMITIVES[request.param]
    rng = np.random.default_rng(0)
    return function, *(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def test_an_eager_call_equals_a_jitted_one(primitive):
    function, x, weights = primitive
    np.testing.assert_allclose(function(x, weights), jax.jit(function)(x, weights), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (2, 2)])
def test_vmap(primitive, in_axes):
    function, x, weights = primitive
    lanes = [
        z if a is None else jnp.stack([z, 2 * z], a)
        for z, a in zip((x, weights), in_axes, strict=True)
    ]
    got = jax.vmap(function, in_axes)(*lanes)
    factor = 2 ** sum(a is not None for a in in_axes)
    np.testing.assert_allclose(got[1], factor * function(x, weights), atol=1e-12)


def test_a_derivative_under_vmap(primitive):
    """The lanes' weights differ, and so do their cotangents."""
    function, x, weights = primitive

    def loss(x, weights):
        return jnp.sin(function(x, weights)).sum()

    gradient = quick_jit(jax.grad(loss, (0, 1)))
    lanes = jnp.stack([weights, 2 * weights])
    got = quick_jit(jax.vmap(jax.grad(loss, (0, 1)), (None, 0)))(x, lanes)
    expected = jax.tree.map(lambda *z: jnp.stack(z), *(gradient(x, w) for w in lanes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0)])
def test_a_derivative_of_a_vmap_of_one_sequence(primitive, in_axes):
    """What is not mapped may serve all lanes as it is, and gets what all of them give."""
    function, x, weights = primitive
    pair = x[:1], weights
    mapped = [axis == 0 for axis in in_axes]
    lanes = [
        jnp.stack([z, 2 * z]) if is_mapped else z for z, is_mapped in zip(pair, mapped, strict=True)
    ]

    def loss(*lanes):
        return jnp.sin(jax.vmap(function, in_axes)(*lanes)).sum()

    def one_by_one(*lanes):
        def of(lane):
            each = zip(lanes, mapped, strict=True)
            return function(*(z[lane] if is_mapped else z for z, is_mapped in each))

        return sum(jnp.sin(of(lane)).sum() for lane in range(2))

    got, expected = (quick_jit(jax.grad(f, (0, 1)))(*lanes) for f in (loss, one_by_one))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-11), got, expected)


def test_shard_map_over_sequences(primitive):
    function, x, weights = primitive
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")

    def total(x, weights):
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
        )
        return jnp.sin(sharded(x, weights)).sum()

    def plain(x, weights):
        return jnp.sin(function(x, weights)).sum()

    got, expected = (quick_jit(jax.grad(f, (0, 1)))(x, weights) for f in (total, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), got, expected)


def test_export(primitive):
    function, x, weights = primitive
    jitted = jax.jit(lambda x: function(x, weights))
    np.testing.assert_array_equal(jax.export.export(jitted)(x).call(x), jitted(x))


@pytest.fixture(params=LINEAR)
def linear(request):
    function, shape = LINEAR[request.param]
    return function, jnp.asarray(np.random.default_rng(0).normal(size=shape))


@pytest.mark.slow
def test_of_linear_ones_the_matrix_is_the_same_both_ways(linear):
    """An eager call, tangents, cotangents and lanes, of which the matrix is made."""
    function, x = linear
    flat = x.reshape(-1)

    def of_flat(flat):
        return function(flat.reshape(x.shape)).reshape(-1)

    forward, backward = quick_jit(jax.jacfwd(of_flat))(flat), quick_jit(jax.jacrev(of_flat))(flat)
    np.testing.assert_allclose(forward, backward, atol=1e-12)
    np.testing.assert_allclose(function(x).reshape(-1), forward @ flat, atol=1e-12)
    assert np.abs(forward).max() > 0


@pytest.mark.slow
def test_of_linear_ones_lanes_in_any_axis(linear):
    function, x = linear
    got = jax.vmap(function, 2)(jnp.stack([x, 2 * x], 2))
    np.testing.assert_allclose(got[1], 2 * function(x), atol=1e-12)


@pytest.mark.slow
def test_linear_ones_where_sequences_are_sharded_and_exported(linear):
    function, x = linear
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")
    sharded = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)

    def gradient(function):
        return quick_jit(jax.grad(lambda x: jnp.sin(function(x)).sum()))(x)

    np.testing.assert_allclose(gradient(sharded), gradient(function), atol=1e-12)
    jitted = jax.jit(function)
    np.testing.assert_array_equal(jax.export.export(jitted)(x).call(x), jitted(x))
