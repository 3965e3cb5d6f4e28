"""Down to a grid and up again, held to matrices of bells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.resampled import down, up

STEP, TAPS = 4, 3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _matrix(bells, length):
    """Entry (m i + j, i + k) is bells[j, k]."""
    blocks = -(-length // STEP)
    matrix = np.zeros((blocks * STEP, blocks + TAPS - 1))
    for i in range(blocks):
        matrix[STEP * i : STEP * (i + 1), i : i + TAPS] = bells
    return matrix[:length]


@pytest.mark.parametrize("outermost", [True, False])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_both_are_products_with_one_matrix_and_its_transpose(length, outermost):
    """For lines that are and are not a multiple of the step, and in both modes, twice over."""
    rng = np.random.default_rng(0)
    bells = rng.normal(size=(STEP, TAPS))
    matrix = _matrix(bells, length)
    x, grid = (rng.normal(size=(2, n, 3)) for n in matrix.shape)
    go_down = jax.jit(functools.partial(down, outermost=outermost))
    go_up = jax.jit(functools.partial(up, length=length, outermost=outermost))
    np.testing.assert_allclose(
        go_down(jnp.asarray(x), bells), np.einsum("pc,apw->acw", matrix, x), atol=1e-12
    )
    np.testing.assert_allclose(
        go_up(jnp.asarray(grid), bells), np.einsum("pc,acw->apw", matrix, grid), atol=1e-12
    )
    check_grads(go_down, (jnp.asarray(x), jnp.asarray(bells)), 2)
    check_grads(go_up, (jnp.asarray(grid), jnp.asarray(bells)), 2)


def test_a_step_between_levels_is_a_call_of_its_own_on_a_cpu():
    """Or the compiler would fuse it with the next one, and compute it for each of its slices."""
    bells = np.ones((STEP, TAPS))
    x = jnp.ones((1, 64, 8))
    calls = [
        jax.jit(functools.partial(f, bells=bells, outermost=outermost, **length))
        .lower(x)
        .compile()
        .as_text()
        .count(" call(")
        for f, length, outermost in (
            (down, {}, True),
            (up, {"length": 17}, False),
            (up, {"length": 17}, True),
        )
    ]
    expected = [1, 1, 0] if jax.default_backend() == "cpu" else [0, 0, 0]
    assert calls == expected
