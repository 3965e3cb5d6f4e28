"""Sums over windows, by blocks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attn_jax.ops.toeplitz.windows import window_sum
from tests.ops.implementations import quick_jit

LENGTH = 45
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, LENGTH, 3))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inside(before, after, length=LENGTH):
    """[query, key]: whether the query's window holds the key."""
    distance = np.arange(length) - np.arange(length)[:, None]
    left = distance >= -before if before is not None else True
    right = distance <= after if after is not None else True
    return np.broadcast_to(left & right, distance.shape)


def windowed(x, before, after, farthest):
    limits = (None if z is None else jnp.asarray(z, jnp.int32).reshape(-1) for z in (before, after))
    return window_sum(jnp.asarray(x), *limits, farthest)


def pairs(farthest):
    """Of limits, on either side of the query: also of windows that hold nothing."""
    limits = [z for z in range(-40, 41) if abs(z) <= farthest]
    return [
        *itertools.product(limits, limits),
        *((None, a) for a in limits),
        *((b, None) for b in limits),
        (None, None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("farthest", [9, 17, 40])
@pytest.mark.parametrize("length", [5, LENGTH, 48])
def test_every_window_is_the_sum_of_what_it_holds(farthest, length):
    """On short lines and long ones, whole blocks and not."""
    x = RNG.normal(size=(1, length, 2))
    sums = {
        known: quick_jit(
            lambda b, a, known=known: windowed(
                x, b if known[0] else None, a if known[1] else None, farthest
            )
        )
        for known in itertools.product([True, False], repeat=2)
    }
    for before, after in pairs(farthest):
        got = sums[before is not None, after is not None](before or 0, after or 0)
        expected = inside(before, after, length) @ x
        np.testing.assert_allclose(got, expected, atol=1e-12, err_msg=f"{before}, {after}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [(12, 3), (None, 2), (7, None), (40, 40), (None, None)]
)
def test_its_derivatives_are_those_of_a_matrix(before, after):
    def sums(x):
        return windowed(x, before, after, 40)

    cotangent = RNG.normal(size=X.shape)
    matrix = inside(before, after)
    np.testing.assert_allclose(quick_jit(jax.vjp(sums, X)[1])(cotangent)[0], matrix.T @ cotangent)
    tangent = quick_jit(lambda t: jax.jvp(sums, (jnp.asarray(X),), (t,))[1])(jnp.asarray(X))
    np.testing.assert_allclose(tangent, matrix @ X)


def test_lanes_and_sequences_may_have_windows_of_their_own():
    before, after = np.asarray([[8, 20], [3, 5]]), np.asarray([[1, 0], [9, 30]])

    def total(x, before, after):
        return (windowed(x, before, after, 40) ** 3).sum()

    each = jax.grad(total)
    got = quick_jit(jax.vmap(each, (None, 0, 0)))(jnp.asarray(X), before, after)
    for lane, sequence in itertools.product(range(2), repeat=2):
        matrix = inside(before[lane, sequence], after[lane, sequence])
        expected = matrix.T @ (3 * (matrix @ X[sequence]) ** 2)
        np.testing.assert_allclose(got[lane, sequence], expected)


def test_lanes_that_share_a_window():
    got = jax.vmap(lambda x: windowed(x, 12, 3, 40), 2)(jnp.asarray(np.stack([X, 2 * X], 2)))
    np.testing.assert_allclose(got[1], 2 * inside(12, 3) @ X)


@pytest.mark.parametrize("shape", [(0, 9, 3), (2, 0, 3), (2, 9, 0)])
def test_of_nothing_it_is_nothing(shape):
    assert windowed(np.zeros(shape), 3, 2, 5).shape == shape


def test_what_is_outside_reaches_nothing():
    """Not even as zero times infinity."""
    for before, after in [(10, 2), (None, -3), (-4, None), (20, -6)]:
        x = X.copy()
        x[:, 30] = np.inf
        sums = windowed(x, before, after, 40)
        holds = inside(before, after)[:, 30]
        np.testing.assert_array_equal(np.isinf(sums), np.broadcast_to(holds[:, None], x.shape))
        assert np.isfinite(sums[:, ~holds]).all()


def test_shard_map_over_sequences():
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")

    def total(x, before):
        sums = jax.shard_map(
            lambda x, before: windowed(x, before, 3, 40),
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
        )
        return (sums(x, before) ** 2).sum()

    matrix = inside(12, 3)
    got = quick_jit(jax.grad(total))(jnp.asarray(X), jnp.asarray(12))
    np.testing.assert_allclose(got, 2 * matrix.T @ (matrix @ X))


def test_export():
    jitted = jax.jit(lambda x: windowed(x, 12, 3, 40))
    x = jnp.asarray(X)
    np.testing.assert_array_equal(jax.export.export(jitted)(x).call(x), jitted(x))
