"""Kernels of short reach: one shifted slice for every distance.

Letters: B batch, P positions, N heads, W channels, R distances; k: K, or N where weights differ.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.rows import ANYWHERE, LEAST, Sums, Trust, Weights, summed, weighed
from attn_jax.ops.toeplitz.shifted import padded, shifted_sum


def sums(line: Line, reach: int, share: float | None) -> Sums:
    """Over the keys with |r| <= reach.

    Args:
      line: the call.
      reach: a number of positions.
      share: of the weights' sum that a row must hold for what lies beyond the reach not to count;
        None where there is nothing beyond.

    """
    lowest, highest = _taps(line, reach)
    by_row = _weighed(line, reach, share).weights.T[None, :, None]
    if line.labels is not None:
        by_row = by_row * _alike(line, lowest, highest)

    def function(x: Float[Array, "#b P k W"]) -> Float[Array, "#b P k W"]:
        x = jnp.broadcast_to(x, (max(len(x), len(by_row)), *x.shape[1:]))
        return shifted_sum(x, by_row, line.length, -lowest)

    return summed(line, function, by_row.shape[3])


def trust(line: Line, reach: int, share: float | None) -> Trust:
    """How far `sums` with the same arguments are to be trusted."""
    return _weighed(line, reach, share).trust._replace(reach=ANYWHERE)


def _weighed(line: Line, reach: int, share: float | None) -> Weights:
    return weighed(line, line.log_weights(*_taps(line, reach)), LEAST if share is None else share)


def _taps(line: Line, reach: int) -> tuple[int, int]:
    """The lowest and the highest distance within a reach that the masks' known limits leave."""
    lowest, highest = -reach, reach
    if isinstance(line.before, int):
        lowest = max(lowest, -line.before)
    if isinstance(line.after, int):
        highest = min(highest, line.after)
    return min(lowest, highest), max(lowest, highest)


def _alike(line: Line, lowest: int, highest: int) -> Float[Array, "B R P 1"]:
    """One where query and key at a distance carry the same label."""
    assert line.labels is not None
    query = line.labels_of_queries
    key = padded(line.place(line.labels[1]), 1, -lowest, highest)
    alike = [query == key[:, t : t + line.length] for t in range(highest - lowest + 1)]
    return jnp.stack(alike, 1)[..., None].astype(line.dtype)
