"""Down to a grid and up again, held to matrices of bells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.resampled import down, up
from attn_jax.ops.toeplitz.runs import places, runs_of

STEP, TAPS = 4, 3
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(STEP, TAPS))
WEIGHTS[1, 2] = 0
BELLS = tuple(map(tuple, WEIGHTS.tolist()))
LABELS = np.asarray([[1, 1, 1, 2, 5, 5, 0], [3, 4, 4, 4, 4, 4, 4]])
GAP, LONGER = 4, 14  # of the longest sequence three gaps


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _matrix(length):
    """Entry (m i + j, i + k) is bells[j][k]."""
    blocks = -(-length // STEP)
    matrix = np.zeros((blocks * STEP, blocks + TAPS - 1))
    for i in range(blocks):
        matrix[STEP * i : STEP * (i + 1), i : i + TAPS] = BELLS
    return matrix[:length]


def _both(length, outermost, laid=None, margin=0):
    how = {"bells": BELLS, "outermost": outermost, "laid": laid, "margin": margin}
    go_down, go_up = functools.partial(down, **how), functools.partial(up, length=length, **how)
    return jax.jit(go_down), jax.jit(go_up)


@pytest.mark.slow
@pytest.mark.parametrize("outermost", [True, False])
@pytest.mark.parametrize(("length", "margin"), [(1, 2), (4, 0), (11, 2)])
def test_both_are_products_with_one_matrix_and_its_transpose(length, outermost, margin):
    """For lines that are and are not a multiple of the step, and in both modes, twice over.

    Zeros beside the grid on the way down are skipped on the way up.
    """
    matrix = np.pad(_matrix(length), ((0, 0), (margin, margin)))
    x, grid = (jnp.asarray(RNG.normal(size=(2, n, 3))) for n in matrix.shape)
    go_down, go_up = _both(length, outermost, margin=margin)
    np.testing.assert_allclose(go_down(x), np.einsum("pc,apw->acw", matrix, x), atol=1e-12)
    np.testing.assert_allclose(go_up(grid), np.einsum("pc,acw->apw", matrix, grid), atol=1e-12)
    check_grads(go_down, (x,), 2)
    check_grads(go_up, (grid,), 2)


def _laid():
    return places(runs_of(jnp.asarray(LABELS)), jnp.asarray(GAP), LONGER)


def _matrices_of_runs():
    """[sequence, position, grid point]: the rows of the longer line that positions lie at."""
    rows = [np.arange(7) + GAP * np.cumsum(np.diff(z, prepend=z[0]) != 0) for z in LABELS]
    return _matrix(7 + LONGER)[np.stack(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 17])
def test_both_of_a_longer_line_on_which_runs_lie_apart(channels):
    """Of short rows and of long ones, which are read where they are; with zeros beside the grid."""
    matrices = np.pad(_matrices_of_runs(), ((0, 0), (0, 0), (1, 1)))
    x, grid = (jnp.asarray(RNG.normal(size=(2, n, channels))) for n in matrices.shape[1:])
    go_down, go_up = _both(7 + LONGER, True, _laid(), 1)
    np.testing.assert_allclose(go_down(x), np.einsum("apc,apw->acw", matrices, x), atol=1e-12)
    np.testing.assert_allclose(go_up(grid), np.einsum("apc,acw->apw", matrices, grid), atol=1e-12)
    check_grads(go_down, (x,), 2)
    check_grads(go_up, (grid,), 2)


def test_lanes_of_values_and_of_places():
    laid = _laid()
    x = jnp.asarray(RNG.normal(size=(3, 2, 7, 4)))
    expected = [down(z, BELLS, True, laid) for z in x]

    def of(x, laid):
        return down(x, BELLS, True, laid)

    np.testing.assert_array_equal(jax.vmap(of, (0, None))(x, laid), expected)
    lanes = jax.tree.map(lambda z: jnp.stack([z] * 3), laid)
    np.testing.assert_array_equal(jax.vmap(of)(x, lanes), expected)
    np.testing.assert_array_equal(jax.vmap(of, (None, 0))(x[0], lanes)[2], expected[0])


@pytest.mark.slow
def test_lanes_of_one_sequence_share_its_places():
    """Both ways, and in the derivatives, which are taken lane by lane."""
    laid = jax.tree.map(lambda z: z[:1], _laid())
    matrix = _matrices_of_runs()[0]

    def there_and_back(x):
        return up(down(x, BELLS, True, laid), BELLS, 7 + LONGER, True, laid)

    lanes = jnp.asarray(RNG.normal(size=(3, 1, 7, 2)))
    expected = np.einsum("pc,qc,lbqw->lbpw", matrix, matrix, lanes)
    np.testing.assert_allclose(jax.vmap(there_and_back)(lanes), expected, atol=1e-12)
    jacobian = jax.jacrev(there_and_back)(lanes[0])[0, :, 0, 0, :, 0]
    np.testing.assert_allclose(jacobian, matrix @ matrix.T, atol=1e-12)


@pytest.mark.slow
def test_shard_map_over_sequences():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("a",))
    along = PartitionSpec("a")
    x = jnp.asarray(RNG.normal(size=(2, 7, 3)))

    def loss(x, labels):
        laid = places(runs_of(labels), jnp.asarray(GAP), LONGER)
        grid = down(x, BELLS, True, laid)
        return jnp.sin(up(grid, BELLS, 7 + LONGER, True, laid)).sum()

    gradient = jax.grad(loss)
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(along, along), out_specs=along)
    labels = jnp.asarray(LABELS)
    np.testing.assert_allclose(sharded(x, labels), gradient(x, labels), atol=1e-12)


def test_a_step_between_levels_is_a_call_of_its_own_on_a_cpu():
    """Or the compiler would fuse it with the next one, and compute it for each of its slices."""
    x = jnp.ones((1, 64, 8))
    calls = [
        f.lower(x).compile().as_text().count(" call(")
        for f in (_both(64, True)[0], _both(17, False)[1], _both(17, True)[1])
    ]
    expected = [1, 1, 0] if jax.default_backend() == "cpu" else [0, 0, 0]
    assert calls == expected
