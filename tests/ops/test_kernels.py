"""Every kernel is held to its formula, written again in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from tests.ops import reference
from tests.ops.arrays import qkv, values

KERNELS = {
    "gaussian": (attn_jax.Gaussian(2.0, -1.0), lambda n, r: -(((r + 1) / 2) ** 2) / 2),
    "gaussian per head": (
        attn_jax.Gaussian((0.5, 1.0, 2.0, 4.0), (0.0, -1.0, 1.0, 2.0)),
        lambda n, r: -(((r - (0, -1, 1, 2)[n]) / (0.5, 1, 2, 4)[n]) ** 2) / 2,
    ),
    "exponential": (attn_jax.Exponential(3.0), lambda n, r: -abs(r) / 3),
    "window": (attn_jax.Window(2), lambda n, r: 0 if abs(r) <= 2 else -math.inf),
    "triangular": (
        attn_jax.Triangular(3.0),
        lambda n, r: math.log(1 - abs(r) / 3) if abs(r) < 3 else -math.inf,
    ),
    "epanechnikov": (
        attn_jax.Epanechnikov((1.0, 2.0, 3.0, 4.5)),
        lambda n, r: (
            math.log(1 - (r / (1, 2, 3, 4.5)[n]) ** 2) if abs(r) < (1, 2, 3, 4.5)[n] else -math.inf
        ),
    ),
    "power law": (attn_jax.PowerLaw(1.5), lambda n, r: -1.5 * math.log(1 + abs(r))),
    "table": (
        attn_jax.Table((0.5, -0.5, 1.0, 2.0)),
        lambda n, r: (0.5, -0.5, 1.0, 2.0)[min(max(r + 1, 0), 3)],
    ),
    "table per head": (
        attn_jax.Table(np.arange(12.0, dtype=np.float32).reshape(4, 3) / 5),
        lambda n, r: (3 * n + min(max(r + 1, 0), 2)) / 5,
    ),
    "reach": (
        attn_jax.PowerLaw(1.0, reach=2),
        lambda n, r: -math.log(1 + abs(r)) if abs(r) <= 2 else -math.inf,
    ),
    "alibi": (attn_jax.alibi(4), lambda n, r: -abs(r) * (0.25, 0.0625, 2**-6, 2**-8)[n]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_alone_is_its_formula(name):
    kernel, log_weight = KERNELS[name]
    value = values(key_heads=4)
    output = attn_jax.attention(None, None, value, proximity=kernel, implementation="dense")
    expected, _ = reference.attention(None, None, value, log_weight=log_weight)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_multiplies_content(name):
    kernel, log_weight = KERNELS[name]
    query, key, value = qkv()
    output = attn_jax.attention(query, key, value, proximity=kernel)
    expected, _ = reference.attention(query, key, value, log_weight=log_weight)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_no_gradient_of_a_kernel_is_nan(name):
    kernel, _ = KERNELS[name]
    kernel = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), kernel)
    distance = jnp.arange(-9.0, 10.0).reshape(1, 1, 1, -1)

    def weight(kernel, r):
        return jnp.exp(kernel.log_weight(r)).sum()

    floating = not isinstance(kernel, attn_jax.Table)
    r = distance if floating else distance.astype(jnp.int32)
    gradients = jax.grad(weight, (0, 1) if floating else 0)(kernel, r)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_gaussian_has_peak_one_without_normaliser():
    weights = attn_jax.attention_weights(
        None, None, values(), proximity=attn_jax.Gaussian(2.0), normalizer="none"
    )
    np.testing.assert_allclose(weights[0, 0, 4, 2:7], np.exp([-0.5, -0.125, 0, -0.125, -0.5]))


def test_power_law_one_is_the_normalised_reciprocal_distance():
    """A zero query with bias -log(1 + d) gives the same as 1 / (1 + d), normalised."""
    query, key, value = qkv(queries=9)
    distance = np.abs(np.arange(9)[None, :] - np.arange(9)[:, None])
    reciprocal = 1 / (1 + distance)
    expected = np.einsum(
        "ts,bsnd->btnd", reciprocal / reciprocal.sum(1, keepdims=True), np.repeat(value, 2, 2)
    )
    bias = -np.log(1.0 + distance).astype(np.float32)[None, None]
    zero_query = attn_jax.attention(jnp.zeros_like(query), key, value, bias=bias)
    kernel = attn_jax.attention(
        None, None, np.repeat(value, 2, 2), proximity=attn_jax.PowerLaw(1.0)
    )
    np.testing.assert_allclose(zero_query, expected, atol=2e-6)
    np.testing.assert_allclose(kernel, expected, atol=2e-6)


def test_narrow_gaussian_is_the_identity_and_a_wide_one_the_mean():
    value = values()
    narrow = attn_jax.attention(None, None, value, proximity=attn_jax.Gaussian(1e-3))
    wide = attn_jax.attention(None, None, value, proximity=attn_jax.Gaussian(1e6))
    np.testing.assert_array_equal(narrow, value)
    mean = np.broadcast_to(np.mean(value, 1, keepdims=True), value.shape)
    np.testing.assert_allclose(wide, mean, atol=1e-6)


def test_a_kernel_of_the_users_own():
    class EveryOther(attn_jax.Proximity):
        def log_weight(self, r):
            return jnp.where(r % 2 == 0, 0.0, -jnp.inf)

    value = values()
    output = attn_jax.attention(None, None, value, proximity=EveryOther())
    np.testing.assert_allclose(output[:, 0], value[:, ::2].mean(1), atol=1e-6)


def test_per_head_shapes():
    assert attn_jax.per_head(2.0).shape == ()
    assert attn_jax.per_head(jnp.ones(3)).shape == (1, 3, 1, 1)


def test_alibi_slopes():
    """8 heads: 1/2, 1/4, ... 1/256; 6 heads: the 4 of 4 heads, then the first and third of 8."""
    np.testing.assert_allclose(1 / attn_jax.alibi(8).length, 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(
        1 / attn_jax.alibi(6).length, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    )


def test_t5_buckets():
    """32 buckets, 128 positions: numbers as mesh-tensorflow's code gives them."""
    bucket = attn_jax.t5_bucket()
    r = jnp.asarray([0, -1, -7, -8, -11, -12, -16, -64, -127, -1000, 1, 7, 8, 16, 1000])
    expected = [0, 1, 7, 8, 8, 9, 10, 14, 15, 15, 17, 23, 24, 26, 31]
    np.testing.assert_array_equal(bucket(r.reshape(1, 1, 1, -1)).ravel(), expected)
    causal = attn_jax.t5_bucket(bidirectional=False)
    np.testing.assert_array_equal(
        causal(jnp.asarray([3, 0, -15, -16, -1000]).reshape(1, 1, 1, -1)).ravel(),
        [0, 0, 15, 16, 31],
    )


@pytest.mark.slow
def test_kernels_pass_through_jit_vmap_and_tree_map():
    value = values()
    kernel = attn_jax.Gaussian(jnp.asarray([1.0, 2.0]), offset=-1.0, reach=4)
    smooth = jax.jit(lambda kernel: attn_jax.attention(None, None, value, proximity=kernel))
    expected = attn_jax.attention(None, None, value, proximity=kernel)
    np.testing.assert_allclose(smooth(kernel), expected, atol=1e-6)
    assert jax.tree.map(lambda _: object(), kernel).reach == 4
    lanes = attn_jax.Gaussian(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([0.0, -1.0]))
    batched = jax.vmap(lambda kernel: attn_jax.attention(None, None, value, proximity=kernel))
    second = attn_jax.Gaussian(jnp.asarray([3.0, 4.0]), -1.0)
    np.testing.assert_allclose(
        batched(lanes)[1],
        attn_jax.attention(None, None, value, proximity=second, implementation="dense"),
        atol=1e-6,
    )
