"""Sequences side by side in a row: a segment is a number above 0 that its positions share.

0 is padding. Letters: B batch, S positions, E features.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def segments(batch: int, positions: int, length: Int[Array, "B"] | None) -> Int[Array, "B S"]:
    """One segment a row, with padding behind its length."""
    if length is None:
        return jnp.ones((batch, positions), jnp.int32)
    return (jnp.arange(positions)[None] < length[:, None]).astype(jnp.int32)


def first_of_segment(segment: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Where a segment differs from that before it."""
    return segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]


def positions_in_segment(segment: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """0, 1, 2, ... in every segment."""
    index = jnp.arange(segment.shape[1])[None]
    return index - lax.cummax(jnp.where(first_of_segment(segment), index, 0), axis=1)


def without_padding(x: Float[Array, "B S E"], segment: Int[Array, "B S"]) -> Float[Array, "B S E"]:
    """Zeros in the place of padding, also where it is not finite."""
    return jnp.where((segment > 0)[..., None], x, 0)
