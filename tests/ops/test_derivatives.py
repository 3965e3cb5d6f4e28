"""Derivatives of both modes and orders, held to finite differences in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import attn_jax
from attn_jax import Causal, Lengths, Local, Prefix
from tests.ops.arrays import qkv, values
from tests.ops.implementations import WITH_CONTENT, every, with_content

SMALL = {"batch": 1, "queries": 3, "keys": 4, "heads": 2, "key_heads": 1, "key_width": 2}
SMALL |= {"value_width": 2, "dtype": np.float64}
TRAINABLE = {
    "gaussian": lambda: attn_jax.Gaussian(jnp.asarray([0.7, 2.0]), jnp.asarray([-1.0, 0.3]), 3),
    "exponential": lambda: attn_jax.Exponential(jnp.asarray([0.7, 2.0]), 3),
    "triangular": lambda: attn_jax.Triangular(jnp.asarray([1.5, 2.5]), 2),
    "epanechnikov": lambda: attn_jax.Epanechnikov(jnp.asarray(2.5), 2),
    "power law": lambda: attn_jax.PowerLaw(jnp.asarray([0.5, 1.5]), 3),
    "table": lambda: attn_jax.Table(jnp.asarray([0.3, 1.0, -0.5]), reach=3),
    "table per head": lambda: attn_jax.Table(jnp.arange(10.0).reshape(2, 5) / 7, reach=3),
    "t5": lambda: attn_jax.Table(jnp.arange(8.0) / 7, attn_jax.t5_bucket(8, 16), 3),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def check(function, arguments, order=1, modes=("fwd", "rev")):
    check_grads(jax.jit(function), arguments, order, modes=modes, rtol=1e-5, atol=1e-7, eps=1e-6)


ON_EVERY = itertools.product(WITH_CONTENT, TRAINABLE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "name"),
    [*ON_EVERY, ("toeplitz", "gaussian"), ("toeplitz", "epanechnikov")],
)
def test_gradients_of_kernels(implementation, name):
    """Slopes, widths, offsets, radii and tables; `reach` makes the band known."""
    value = values(batch=1, keys=5, key_heads=2, value_width=2, dtype=np.float64)

    def output(kernel, value):
        return attn_jax.attention(
            None, None, value, proximity=kernel, implementation=implementation
        )

    check(output, (TRAINABLE[name](), value))


@pytest.mark.slow
@with_content
@pytest.mark.parametrize("name", ["gaussian", "table per head"])
def test_gradients_of_kernels_with_content(implementation, name):
    def output(kernel, query):
        return attn_jax.attention(
            query, *arrays[1:], proximity=kernel, mask=Causal(), implementation=implementation
        )

    arrays = qkv(**SMALL)
    check(output, (TRAINABLE[name](), arrays[0]))


@pytest.mark.slow
@with_content
def test_gradients_of_query_key_value_bias_and_scale(implementation):
    """To second order, with an empty row, a masked key and a bias of -inf."""
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 3, 1)))
    minus_infinity = jnp.zeros((1, 1, 3, 4)).at[0, 0, 1, 2].set(-jnp.inf)
    keep = (np.arange(3) > 0).reshape(1, 1, 3, 1) & (np.arange(4) < 3).reshape(1, 1, 1, 4)

    def output(query, key, value, bias, scale):
        return attn_jax.attention(
            query,
            key,
            value,
            bias=bias + minus_infinity,
            scale=scale,
            mask=keep,
            return_log_normalizer=False,
            implementation=implementation,
        )

    check(output, (*qkv(**SMALL), bias, jnp.asarray([0.5, 1.5])), order=2)


@pytest.mark.slow
@with_content
@pytest.mark.parametrize("normalizer", ["softmax", "softmax_one"])
def test_gradients_of_the_log_normalizer(implementation, normalizer):
    def log_normalizer(query, key, bias):
        return attn_jax.attention(
            query,
            key,
            arrays[2],
            bias=bias,
            normalizer=normalizer,
            return_log_normalizer=True,
            implementation=implementation,
        )[1]

    arrays = qkv(**SMALL)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 1, 4)))
    check(log_normalizer, (*arrays[:2], bias))


@pytest.mark.slow
@every
def test_gradients_of_the_log_normalizer_without_content(implementation):
    value = values(batch=1, keys=5, dtype=np.float64)

    def log_normalizer(width):
        _, log = attn_jax.attention(
            None,
            None,
            value,
            proximity=attn_jax.Gaussian(width, reach=2),
            mask=Lengths(key=jnp.asarray([2])),
            return_log_normalizer=True,
            implementation=implementation,
        )
        return log[:, :4]

    check(log_normalizer, (jnp.asarray([0.7, 2.0]),))


@pytest.mark.slow
@with_content
def test_gradients_through_score_reach_what_it_closes_over(implementation):
    query, key, value = qkv(**SMALL)

    def output(query, table):
        def score(logits, query_index, key_index, head):
            return jnp.tanh(logits) * table[head, (query_index + key_index) % 3]

        return attn_jax.attention(query, key, value, score=score, implementation=implementation)

    check(output, (query, jnp.asarray([[0.5, 1.0, -0.5], [2.0, 0.1, 1.0]])))


@pytest.mark.slow
@with_content
def test_gradients_of_floating_positions(implementation):
    """Through the kernel, never through the mask."""
    value = values(batch=1, keys=4, dtype=np.float64)

    def output(query_positions, key_positions):
        return attn_jax.attention(
            None,
            None,
            value,
            proximity=attn_jax.Gaussian(1.5),
            mask=Local(2, 1) | Prefix(1),
            query_positions=query_positions,
            key_positions=key_positions,
            implementation=implementation,
        )

    check(output, (jnp.asarray([0.2, 1.3, 2.4]), jnp.asarray([0.1, 1.0, 1.7, 3.1])))


def content_loss(implementation):
    def loss(query, key, value):
        output = attn_jax.attention(query, key, value, mask=Causal(), implementation=implementation)
        return jnp.sin(output).sum()

    return loss


@pytest.mark.slow
@with_content
def test_a_tangent_is_a_finite_difference(implementation):
    loss = jax.jit(content_loss(implementation))
    arrays, tangents = qkv(0, **SMALL), qkv(1, **SMALL)
    _, tangent = jax.jvp(loss, arrays, tangents)
    above, below = (
        loss(*(x + step * t for x, t in zip(arrays, tangents, strict=True)))
        for step in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(tangent, (above - below) / 2e-6, rtol=1e-6)


@pytest.mark.slow
@with_content
def test_forward_over_reverse_and_reverse_over_reverse_agree(implementation):
    loss, (query, key, value) = content_loss(implementation), qkv(**SMALL)

    def of_query(query):
        return loss(query, key, value)

    forward = jax.jit(jax.jacfwd(jax.grad(of_query)))(query)
    reverse = jax.jit(jax.jacrev(jax.grad(of_query)))(query)
    np.testing.assert_allclose(forward, reverse, atol=1e-12)
    matrix = np.asarray(forward).reshape(query.size, query.size)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.abs(matrix).max() > 1e-3
