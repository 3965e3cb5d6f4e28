"""Sums whose weights parameters give, held to the same without a derivative of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.parameters import by_parameters
from attn_jax.ops.toeplitz.shifted import shifted_sum

TAPS, LENGTH, SCALE = 5, 11, 3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _weights(parameters, scale):
    distance = jnp.arange(TAPS)[:, None] - TAPS // 2 - parameters["offset"][None]
    return scale * jnp.exp(-jnp.square(distance / parameters["width"][None]) / 2)[None, :, None]


_total = functools.partial(shifted_sum, length=LENGTH, start=TAPS // 2)


def _plain(x, parameters):
    return _total(x, _weights(parameters, SCALE))


@jax.jit
def _sum(x, parameters):
    return by_parameters(_total, _weights, x, parameters, jnp.asarray(SCALE))


def _arguments(heads):
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 2, 3))
    parameters = {"width": np.asarray([1.3, 0.8]), "offset": np.asarray([0.2, -0.6])}
    return jnp.asarray(x), {k: jnp.asarray(z[:heads]) for k, z in parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
def test_values_and_derivatives(heads):
    """`check_grads` asks for both modes, twice over; together and apart."""
    x, parameters = _arguments(heads)
    np.testing.assert_allclose(_sum(x, parameters), _plain(x, parameters))
    check_grads(_sum, (x, parameters), 2, rtol=1e-6)
    check_grads(lambda parameters: _sum(x, parameters), (parameters,), 1, rtol=1e-6)
    check_grads(lambda x: _sum(x, parameters), (x,), 1, rtol=1e-6)


@pytest.mark.slow
def test_lanes_of_parameters():
    x, parameters = _arguments(2)
    lanes = jax.tree.map(lambda z: jnp.stack([z, 1.5 * z]), parameters)
    got, expected = (
        jax.vmap(jax.grad(lambda p, f=f: jnp.sin(f(x, p)).sum()))(lanes) for f in (_sum, _plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), got, expected)
