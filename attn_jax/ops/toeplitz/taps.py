"""Kernels of short reach: one shifted slice for every distance.

Letters: B batch, P positions, N heads, R distances.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.rows import Rows, reweighed, weighed
from attn_jax.ops.toeplitz.strided import padded, strided_sum

# Weights of exp(-60) next to the largest are still summed without underflow.
_LEAST_EXACT = 1e-26


def rows(line: Line, reach: int, share: float | None) -> Rows:
    """Attention to the keys with |r| <= reach.

    Args:
      line: the call.
      reach: a number of positions.
      share: of the weights' sum that a row must hold for what lies beyond the reach not to count;
        None where there is nothing beyond.

    """
    lowest, highest = taps(line, reach)
    log_weights = line.log_weights(lowest, highest)
    weights, shift, floor = weighed(line, log_weights, _LEAST_EXACT if share is None else share)
    by_row = jnp.swapaxes(weights, 0, 1)[None, :, None]
    if line.labels is not None:
        by_row = by_row * _alike(line, lowest, highest)

    def sums(x: Float[Array, "b P K W"]) -> Float[Array, "b P n W"]:
        x = jnp.broadcast_to(x, (max(len(x), len(by_row)), *x.shape[1:]))
        return strided_sum(padded(x, 1, -lowest, highest), by_row, 1, line.length)

    return reweighed(line, sums, shift, floor)


def taps(line: Line, reach: int) -> tuple[int, int]:
    """The lowest and the highest distance within a reach that the masks' known limits leave."""
    lowest, highest = -reach, reach
    if isinstance(line.before, int):
        lowest = max(lowest, -line.before)
    if isinstance(line.after, int):
        highest = min(highest, line.after)
    return min(lowest, highest), max(lowest, highest)


def _alike(line: Line, lowest: int, highest: int) -> Float[Array, "b R P 1"]:
    """One where query and key at a distance carry the same label."""
    assert line.labels is not None
    query = line.place_queries(line.labels[0])
    key = padded(line.place(line.labels[1]), 1, -lowest, highest)
    alike = [query == key[:, t : t + line.length] for t in range(highest - lowest + 1)]
    return jnp.stack(alike, 1)[..., None].astype(line.call.dtype)
