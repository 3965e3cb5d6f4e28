"""The primitive of shifted slices: values and derivatives."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.shifted import _spacing, shifted_sum

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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "own"), [(1, 1), (2, 2), (16, 16), (16, 1)])
def test_rows_set_apart_in_the_cache_and_several_blocks(heads, own):
    """Rows of 1024 bytes; the weights' cotangent takes more than one block."""
    taps, length, start = 70, 90, 30
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(1, length, heads, 128 // heads))) for _ in "xy")
    weights = jnp.asarray(rng.normal(size=(1, taps, 1, own)))

    def plain(x, weights):
        around = jnp.pad(x, ((0, 0), (start, taps), (0, 0), (0, 0)))
        slices = jnp.stack([around[:, t : t + length] for t in range(taps)], 1)
        return (weights[..., None] * slices).sum(1)

    got, expected = (
        jax.jit(lambda x, weights, f=f: jax.vjp(f, x, weights)[1](cotangent))(x, weights)
        for f in (lambda x, weights: shifted_sum(x, weights, length, start), plain)
    )
    np.testing.assert_allclose(
        shifted_sum(x, weights, length, start), plain(x, weights), atol=1e-12
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, expected)


@pytest.mark.parametrize("heads", [1, 3])
def test_what_needs_no_zeros_is_read_where_it_is(heads):
    """On a CPU, where another sum's result is stored."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, INPUTS, 3, 4)))
    weights = jnp.asarray(rng.normal(size=(1, TAPS, 1, heads)))
    outputs = INPUTS - TAPS + 1

    @functools.partial(jax.jit, static_argnums=2)
    def summed(x, weights, start=0):
        return shifted_sum(x, weights, outputs, start, apart=True)

    expected = sum(weights[:, t, :, :, None] * x[:, t : t + outputs] for t in range(TAPS))
    np.testing.assert_allclose(summed(x, weights), expected, atol=1e-12)
    check_grads(summed, (x, weights), 2, rtol=1e-6)
    if jax.default_backend() == "cpu":
        for inputs, start, copied in ((x, 0, False), (x, 1, True), (x[:, 2:], 0, True)):
            text = summed.lower(inputs, weights, start).compile().as_text()
            assert (" pad(" in text) == copied


@pytest.mark.parametrize("inner", [(512,), (8, 64), (16, 64), (16, 16), (64, 4)])
def test_rows_of_a_multiple_of_a_kilobyte_are_set_apart(inner):
    """And hardly grow by it; so many that the cache holds them stay as they are."""
    sides = _spacing(inner, 4, 100)
    row = math.prod(inner) * 4
    wider = math.prod(size + behind for size, (_, behind) in zip(inner, sides, strict=True)) * 4
    assert row % 1024 == 0
    assert wider % 1024
    assert wider <= 1.25 * row
    nowhere = [(0, 0)] * len(inner)
    assert _spacing(inner, 4, 2**15 // row) == nowhere
    assert _spacing(inner, 4, 2**15 // row + 1) == sides
    assert _spacing((*inner[:-1], 3), 4, 100) == nowhere
