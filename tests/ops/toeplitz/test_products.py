"""The primitive of one matrix times every block: values and derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.products import product


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# Heads with a matrix of their own, heads, sequences.
KINDS = [(1, 1, 1), (1, 3, 2), (3, 3, 1), (3, 3, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_blocks_and_its_derivatives(kind):
    """`check_grads` asks for both modes; twice over for transposes of transposes, at the ends."""
    matrices, heads, sequences = kind
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(matrices, 5, 7)))
    x = jnp.asarray(rng.normal(size=(sequences, 2, 7, heads, 3)))
    expected = np.zeros((sequences, 2, 5, heads, 3))
    for a, i, k in itertools.product(range(sequences), range(2), range(heads)):
        expected[a, i, :, k] = np.asarray(matrix[k % matrices]) @ np.asarray(x[a, i, :, k])

    function = jax.jit(product)
    np.testing.assert_allclose(function(matrix, x), expected, atol=1e-12)
    check_grads(function, (matrix, x), 2 if kind in (KINDS[0], KINDS[-1]) else 1, rtol=1e-6)
