"""Every mask is held to the rule it states, written as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Lengths, Local, Prefix, Segments
from tests.ops import reference
from tests.ops.arrays import qkv

LENGTHS = jnp.asarray([3, 9])
QUERY_LENGTHS = np.asarray([6, 2])
QUERY_SEGMENT = np.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
KEY_SEGMENT = jnp.asarray([[1, 1, 2, 2, 2, 2, 0, 0, 0], [1, 2, 2, 3, 3, 3, 3, 3, 4]])
ODD_KEYS = np.arange(9).reshape(1, 1, 1, 9) % 2 == 1

MASKS = {
    "causal": (Causal(), lambda b, i, j: j <= i),
    "local": (Local(2, 1), lambda b, i, j: i - 2 <= j <= i + 1),
    "local of nothing but itself": (Local(0, 0), lambda b, i, j: i == j),
    "local wider than the keys": (Local(99, 99), lambda b, i, j: True),
    "local as data": (
        Local(jnp.asarray([1, 3]), jnp.asarray(0)),
        lambda b, i, j: i - (1, 3)[b] <= j <= i,
    ),
    "prefix": (Prefix(4), lambda b, i, j: j < 4),
    "prefix language model": (Causal() | Prefix(LENGTHS), lambda b, i, j: j <= i or j < (3, 9)[b]),
    "key lengths": (Lengths(key=LENGTHS), lambda b, i, j: j < (3, 9)[b]),
    "both lengths": (
        Lengths(QUERY_LENGTHS, LENGTHS),
        lambda b, i, j: i < (6, 2)[b] and j < (3, 9)[b],
    ),
    "segments": (
        Segments(QUERY_SEGMENT, KEY_SEGMENT),
        lambda b, i, j: QUERY_SEGMENT[b, i] == KEY_SEGMENT[b, j],
    ),
    "array": (ODD_KEYS, lambda b, i, j: j % 2 == 1),
    "mask and array": (Causal() & ODD_KEYS, lambda b, i, j: j <= i and j % 2 == 1),
    "array and mask": (ODD_KEYS & Causal(), lambda b, i, j: j <= i and j % 2 == 1),
    "array or mask": (jnp.asarray(ODD_KEYS) | Causal(), lambda b, i, j: j <= i or j % 2 == 1),
    "three": (
        Causal() & (Lengths(key=LENGTHS) | Local(1, 0)),
        lambda b, i, j: j <= i and (j < (3, 9)[b] or j >= i - 1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_mask_is_its_rule(name):
    mask, rule = MASKS[name]
    query, key, value = qkv()
    allowed = np.array(
        [[[[rule(b, i, j) for j in range(9)] for i in range(6)]] * 4 for b in range(2)]
    )
    output = attn_jax.attention(query, key, value, mask=mask)
    weights = attn_jax.attention_weights(query, key, value, mask=mask)
    expected, expected_weights = reference.attention(query, key, value, allowed=allowed)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6)
    assert not np.any(np.asarray(weights)[~allowed])


def test_segments_of_self_attention_need_one_array():
    query, key, value = qkv(queries=9)
    weights = attn_jax.attention_weights(query, key, value, mask=Segments(KEY_SEGMENT))
    same = np.asarray(KEY_SEGMENT)[:, :, None] == np.asarray(KEY_SEGMENT)[:, None, :]
    np.testing.assert_array_equal(np.asarray(weights[:, 0]) > 0, same)


def test_python_numbers_are_static_and_arrays_are_data():
    assert jax.tree.leaves(Local(2, 1) & Causal()) == []
    assert len(jax.tree.leaves(Local(jnp.asarray(2), 1) & Lengths(key=LENGTHS))) == 2
    lanes = jax.vmap(lambda mask: mask)(Lengths(key=jnp.zeros((3, 2), jnp.int32)))
    assert lanes.key.shape == (3, 2)


def test_masks_act_on_positions_and_data_on_indices():
    query, key, value = qkv()
    shifted = attn_jax.attention(query, key, value, mask=Causal(), query_positions=np.arange(6) + 3)
    by_index = attn_jax.attention(query, key, value, mask=Local(99, 3))
    np.testing.assert_array_equal(shifted, by_index)
    lengths = attn_jax.attention(query, key, value, mask=Lengths(key=3), key_positions=100)
    np.testing.assert_array_equal(
        lengths, attn_jax.attention(query, key, value, mask=Lengths(key=3))
    )
