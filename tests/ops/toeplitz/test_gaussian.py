"""Grids of a Gaussian, level by level: how exact they are at the least width that each serves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import Gaussian, attention
from attn_jax.ops.toeplitz import gaussian

FLOAT64 = jnp.dtype(jnp.float64)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("step", [2, 8, 16, 64])
def test_a_grid_gives_the_weights_of_all_pairs(step):
    """Of one level, one with the most places, and two of which the last is of few or of most.

    Ten units of rounding: each level allows two for each of three terms, and sums round as well.
    """
    width = gaussian.finest(step, FLOAT64)
    length = int(3 * width) + step
    grid = gaussian._Grid.over(length, step, None, FLOAT64)
    ones = jnp.eye(length)[:, :, None, None]  # each sequence has one key
    parameters = {"width": jnp.asarray([width]), "offset": jnp.zeros(1)}
    on_grid = grid.total(grid.down(ones, None), grid.weights(parameters, None))
    weights = grid.up(on_grid, None)[:, :, 0, 0]
    distance = np.arange(length)[:, None] - np.arange(length)
    expected = np.exp(-np.square(distance / width) / 2)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=10 * np.finfo(np.float64).eps)


@pytest.mark.parametrize(("heads", "copies"), [(3, 1), (8, 2)])
def test_only_the_line_is_copied_and_grids_of_rows_that_lie_alike_in_the_cache(heads, copies):
    if jax.default_backend() != "cpu":
        pytest.skip("only on a CPU is a grid stored and read where it is")
    value = jnp.ones((1, 600, heads, 64), jnp.float32)
    smooth = jax.jit(lambda x: attention(None, None, x, proximity=Gaussian(5.0)))
    text = smooth.lower(value).compile().as_text()
    wide = [x for x in text.splitlines() if " pad(" in x and ",1]{" not in x]
    assert len(wide) == copies, wide
