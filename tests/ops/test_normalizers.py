"""Every normaliser is held to a loop over one row of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import attn_jax
from attn_jax.ops.normalizers import NORMALIZERS
from tests.ops import reference
from tests.ops.arrays import qkv


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizer_is_its_loop(name):
    query, key, value = qkv()
    query = query * 3
    mask = np.tril(np.ones((6, 9), bool), -1)[None, None]
    output = attn_jax.attention(query, key, value, mask=mask, normalizer=name)
    weights = attn_jax.attention_weights(query, key, value, mask=mask, normalizer=name)
    expected, expected_weights = reference.attention(
        query, key, value, allowed=np.broadcast_to(mask, (2, 4, 6, 9)), normalizer=name
    )
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)
    assert not np.any(output[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizer_derivatives(name):
    """Both modes in float64, with a bias of -inf and an empty row; twice over for two of them."""
    order = 2 if name in ("softmax", "entmax15") else 1
    with jax.enable_x64(True):
        query, key, value = qkv(batch=1, queries=3, keys=4, key_width=2, dtype=np.float64)
        bias = jnp.zeros((1, 1, 3, 4)).at[0, 0, 1].set(-jnp.inf).at[0, 0, 2, 0].set(-jnp.inf)

        def output(query, key, value):
            return attn_jax.attention(query, key, value, bias=bias, normalizer=name)

        assert output(query, key, value).dtype == np.float64
        check_grads(
            jax.jit(output), (query, key, value), order=order, rtol=1e-5, atol=1e-6, eps=1e-6
        )


@pytest.mark.parametrize("name", ["softmax", "softmax_one"])
def test_log_normalizer_is_its_loop(name):
    query, key, value = qkv()
    mask = np.tril(np.ones((6, 9), bool), -1)[None, None]
    _, log = attn_jax.attention(
        query, key, value, mask=mask, normalizer=name, return_log_normalizer=True
    )
    logits = np.einsum("btnh,bsnh->btns", query, np.repeat(key, 2, 2)) * 8**-0.5
    for b, i, n in np.ndindex(2, 6, 4):
        row = [*logits[b, i, n, :i], *([0.0] if name == "softmax_one" else [])]
        np.testing.assert_allclose(log[b, i, n], reference.log_normalizer(row), atol=1e-6)
    assert log.dtype == np.float32


def test_softmax_one_leaves_weight_for_nothing():
    """One key with logit 0: e^0 / (e^0 + 1)."""
    value = jnp.ones((1, 1, 1, 1))
    assert attn_jax.attention(None, None, value, normalizer="softmax_one").item() == 0.5


def test_sparsemax_of_small_numbers():
    """Logits 1, 0.5, -1: tau = (1.5 - 1) / 2 = 0.25, so weights 0.75, 0.25, 0."""
    bias = jnp.asarray([1.0, 0.5, -1.0]).reshape(1, 1, 1, 3)
    value = jnp.eye(3).reshape(1, 3, 1, 3)
    output = attn_jax.attention(
        None, None, value, bias=bias, normalizer="sparsemax", query_positions=np.arange(1)
    )
    np.testing.assert_allclose(output[0, 0, 0], [0.75, 0.25, 0.0], atol=1e-7)
