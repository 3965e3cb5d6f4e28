"""Dropout of attention weights that can be repeated by any implementation, block by block.

The keep bit of a pair depends only on the key and on the pair's batch, head, query and key index:
random bits are drawn in fixed tiles of 128 x 128 pairs, counted from index 0, each with its own
key.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

TILE = 128


def keep_tiles(
    key: Array,
    rate: float,
    batch: Int[Array, "B"],
    head: Int[Array, "N"],
    query_tile: Int[Array, "Y"],
    key_tile: Int[Array, "X"],
) -> Bool[Array, "B N 128*Y 128*X"]:
    """Which weights survive in some tiles; each does with probability 1 - rate (within 2^-32).

    Args:
      key: a JAX random key.
      rate: chance of being dropped, in [0, 1).
      batch: indices of the sequences.
      head: indices of the heads.
      query_tile: query index // 128 of the tiles, below 2^16.
      key_tile: key index // 128 of the tiles, below 2^16.

    """

    def bits(b: Array, n: Array, y: Array, x: Array) -> UInt32[Array, "128 128"]:
        head_key = jax.random.fold_in(jax.random.fold_in(key, b), n)
        tile_key = jax.random.fold_in(head_key, (y << 16) + x)
        return jax.random.bits(tile_key, (TILE, TILE), jnp.uint32)

    over_keys = jax.vmap(bits, (None, None, None, 0), out_axes=1)
    over_queries = jax.vmap(over_keys, (None, None, 0, None))
    over_heads = jax.vmap(over_queries, (None, 0, None, None))
    drawn = jax.vmap(over_heads, (0, None, None, None))(batch, head, query_tile, key_tile)
    shape = (len(batch), len(head), len(query_tile) * TILE, len(key_tile) * TILE)
    return drawn.reshape(shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def keep(key: Array, rate: float, shape: tuple[int, int, int, int]) -> Bool[Array, "B N T S"]:
    """Which weights of a whole [B, N, T, S] survive."""
    batch, head, queries, keys = shape
    tiles = keep_tiles(
        key,
        rate,
        jnp.arange(batch),
        jnp.arange(head),
        jnp.arange(-(-queries // TILE)),
        jnp.arange(-(-keys // TILE)),
    )
    return tiles[:, :, :queries, :keys]
