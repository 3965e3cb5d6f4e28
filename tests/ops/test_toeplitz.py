"""The banded implementation gives dense weights times the values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Exponential, Gaussian, Lengths, Local, PowerLaw, Triangular, Window
from tests.ops.arrays import values
from tests.ops.implementations import attend, weigh

toeplitz = functools.partial(attend, None, None, implementation="toeplitz")

CALLS = {
    "gaussian": {"proximity": Gaussian(2.0)},
    "gaussian per head": {"proximity": Gaussian((0.5, 6.0), (-1.0, 3.0))},
    "exponential": {"proximity": Exponential(1.5)},
    "window wider than a block": {"proximity": Window(140)},
    "power law with a reach": {"proximity": PowerLaw(1.0, reach=7)},
    "causal": {"proximity": Triangular(20.0), "mask": Causal()},
    "lengths": {"proximity": Gaussian(2.0), "mask": Lengths(np.asarray([250, 4]), [100, 300])},
    "local alone": {"mask": Local(5, 2) & Causal()},
    "offset": {"proximity": Gaussian(3.0), "query_positions": -20},
    "none": {"proximity": Gaussian(3.0), "normalizer": "none"},
    "sigmoid": {"proximity": Window(3), "normalizer": "sigmoid"},
    "softmax_one": {"proximity": Window(3), "normalizer": "softmax_one"},
}


@pytest.mark.parametrize("name", CALLS)
def test_toeplitz_is_dense_weights_times_the_values(name):
    """260 keys: three blocks, the last one short."""
    value, arguments = values(keys=260), CALLS[name]
    weights = weigh(None, None, value, **arguments)
    expected = np.einsum("bnts,bsnd->btnd", weights, value)
    np.testing.assert_allclose(toeplitz(value, **arguments), expected, atol=5e-6)


def test_gradient_is_the_transposed_product():
    value = values(keys=260)
    arguments = {"proximity": Gaussian(2.0), "mask": Causal()}

    def output(value):
        return attn_jax.attention(None, None, value, **arguments, implementation="toeplitz")

    cotangent = values(1, keys=260)
    (gradient,) = jax.jit(lambda value: jax.vjp(output, value)[1](cotangent))(value)
    weights = weigh(None, None, value, **arguments)
    expected = np.einsum("bnts,btnd->bsnd", weights, cotangent)
    np.testing.assert_allclose(gradient, expected, atol=5e-6)


@pytest.mark.parametrize("level", [1.0, 1e4])
@pytest.mark.parametrize("name", ["gaussian", "causal", "power law with a reach"])
def test_constant_values_stay_constant(name, level):
    value = jnp.full((1, 200, 2, 3), level)
    np.testing.assert_allclose(toeplitz(value, **CALLS[name]), value, rtol=1e-6)


def test_values_of_a_large_mean_keep_their_deviations():
    value = values(keys=200)
    raised = toeplitz(value + 1e4, proximity=Gaussian(2.0))
    np.testing.assert_allclose(raised - 1e4, toeplitz(value, proximity=Gaussian(2.0)), atol=5e-3)


def test_a_width_near_zero_is_the_identity():
    value = values(keys=140)
    np.testing.assert_array_equal(toeplitz(value, proximity=Gaussian(1e-3)), value)


def test_a_width_far_above_the_length_is_the_mean():
    value = values(keys=140)
    output = toeplitz(value, proximity=Gaussian(1e5))
    mean = np.broadcast_to(np.mean(value, 1, keepdims=True), value.shape)
    np.testing.assert_allclose(output, mean, atol=2e-6)


def test_a_power_law_is_finite_at_distance_zero():
    """Weight (1 + 0)^-p = 1 for the key itself, and so no gradient is NaN."""
    value = values(keys=5)

    def output(exponent, value):
        kernel = PowerLaw(exponent, reach=0)
        return attn_jax.attention(None, None, value, proximity=kernel, implementation="toeplitz")

    np.testing.assert_array_equal(output(2.0, value), value)
    gradient = jax.grad(lambda exponent: output(exponent, value).sum())(jnp.asarray(2.0))
    assert gradient == 0


def test_rows_far_from_every_key_are_still_right():
    """Their nearest key is 200 positions away, where the Gaussian's weight underflows."""
    value = values(keys=300)
    arguments = {"proximity": Gaussian(2.0), "mask": Lengths(key=jnp.asarray([100, 300]))}
    output = toeplitz(value, **arguments)
    expected = attend(None, None, value, **arguments, implementation="dense")
    np.testing.assert_allclose(output, expected, atol=5e-6)
    np.testing.assert_allclose(output[0, 250:], np.tile(value[0, 99], (50, 1, 1)), atol=1e-5)


def test_what_it_cannot_do_names_dense():
    value = values()
    for arguments in (
        {"proximity": PowerLaw(1.0)},
        {"proximity": Gaussian(jnp.asarray(2.0))},
        {"proximity": Gaussian(2.0), "bias": jnp.zeros((1, 1, 1, 9))},
        {"proximity": Gaussian(2.0), "mask": attn_jax.Segments(np.ones(9, int))},
        {"proximity": Gaussian(2.0), "query_positions": jnp.arange(9)},
        {"proximity": Gaussian(2.0), "normalizer": "sparsemax"},
    ):
        with pytest.raises(NotImplementedError, match="dense"):
            toeplitz(value, **arguments)
