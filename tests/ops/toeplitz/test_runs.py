"""Runs of one label laid apart: where they lie, both ways there, and what falls back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.runs import collected, gap_between, places, spread

LABELS = np.asarray([[1, 1, 1, 2, 5, 5, 0], [3, 4, 4, 4, 4, 4, 4]])
LONGER = 7


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_gap_is_what_the_row_with_most_runs_has_room_for():
    assert gap_between(jnp.asarray(LABELS), LONGER) == LONGER // 3
    assert gap_between(jnp.asarray(LABELS[1:]), LONGER) == LONGER
    assert gap_between(jnp.zeros((1, 4), int), LONGER) == LONGER


@pytest.mark.parametrize(
    "labels", [[1, 2, 1], [2, 0, 2], [2, 1, 0], [1, np.nan, 1], [1, 0, 1, 0], [1, 2, 0, 1]]
)
def test_no_room_where_a_label_may_come_back(labels):
    assert gap_between(jnp.asarray([labels]), 100) == 0


def test_places_keep_runs_together_and_others_a_gap_away():
    laid = places(jnp.asarray(LABELS), jnp.asarray(2), LONGER)
    expected = [[0, 1, 2, 5, 8, 9, 12], [0, 3, 4, 5, 6, 7, 8]]
    np.testing.assert_array_equal(laid.place, expected)
    for place, position in zip(laid.place, laid.position, strict=True):
        np.testing.assert_array_equal(position[place], np.arange(7))
        assert (np.asarray(position) >= 0).sum() == 7


def _laid():
    return places(jnp.asarray(LABELS), jnp.asarray(2), LONGER)


def test_both_ways_and_their_derivatives():
    laid = _laid()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)))
    there = jax.jit(spread)(x, laid)
    assert there.shape == (2, 14, 3)
    np.testing.assert_array_equal(collected(there, laid), x)
    np.testing.assert_allclose(there.sum(), x.sum())
    check_grads(jax.jit(functools.partial(spread, places=laid)), (x,), 2)
    check_grads(jax.jit(functools.partial(collected, places=laid)), (there,), 2)
    gradient = jax.grad(lambda y: (collected(y, laid) * x).sum())(there)
    np.testing.assert_array_equal(gradient, there)


def test_lanes_of_values_and_of_places():
    laid = _laid()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 7, 4)))
    expected = [spread(z, laid) for z in x]
    np.testing.assert_array_equal(jax.vmap(spread, (0, None))(x, laid), expected)
    lanes = jax.tree.map(lambda z: jnp.stack([z] * 3), laid)
    np.testing.assert_array_equal(jax.vmap(spread)(x, lanes), expected)
    np.testing.assert_array_equal(jax.vmap(spread, (None, 0))(x[0], lanes)[2], expected[0])


def test_shard_map_over_sequences():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("a",))
    along = PartitionSpec("a")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(along, along), out_specs=along)
    def there_and_back(x, labels):
        laid = places(labels, jnp.asarray(2), LONGER)
        return jax.grad(lambda x: jnp.sin(collected(spread(x, laid), laid)).sum())(x)

    np.testing.assert_allclose(there_and_back(x, jnp.asarray(LABELS)), jnp.cos(x))
