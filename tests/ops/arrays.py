"""Random arrays of the shapes that the tests share."""

import jax
import numpy as np

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 6, 9, 4, 2, 8, 5


def qkv(
    seed=0,
    *,
    batch=BATCH,
    queries=QUERIES,
    keys=KEYS,
    heads=HEADS,
    key_heads=KEY_HEADS,
    key_width=KEY_WIDTH,
    value_width=VALUE_WIDTH,
    dtype=np.float32,
):
    """Query [B, T, N, H], key [B, S, K, H] and value [B, S, K, D]."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, queries, heads, key_width))
    key = rng.normal(size=(batch, keys, key_heads, key_width))
    value = rng.normal(size=(batch, keys, key_heads, value_width))
    return tuple(jax.numpy.asarray(x, dtype) for x in (query, key, value))


def values(seed=0, **sizes):
    """Value alone, for attention without content."""
    return qkv(seed, **sizes)[2]
