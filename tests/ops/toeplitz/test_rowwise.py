"""Rows times numbers and sums of rows, held to NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.rowwise import row_sums, times


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# Channels of a head that are and are not a multiple of a vector.
@pytest.mark.slow
@pytest.mark.parametrize("width", [5, 48, 512])
@pytest.mark.parametrize("heads", [1, 2])
def test_values_and_derivatives_of_both(heads, width):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2, 3, heads * width))
    factors = rng.normal(size=(2, 3, heads, 1))
    by_head = (2, 3, heads, width)
    scaled = (x.reshape(by_head) * factors).reshape(x.shape)
    np.testing.assert_allclose(times(jnp.asarray(x), jnp.asarray(factors)), scaled, rtol=1e-14)
    sums = functools.partial(row_sums, heads=heads)
    expected = (x * y).reshape(by_head).sum(-1, keepdims=True)
    np.testing.assert_allclose(sums(jnp.asarray(x), jnp.asarray(y)), expected, atol=1e-12)
    check_grads(jax.jit(times), (jnp.asarray(x), jnp.asarray(factors)), 2)
    check_grads(jax.jit(sums), (jnp.asarray(x), jnp.asarray(y)), 2)
