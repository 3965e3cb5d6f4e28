"""Kernels of short reach: one shifted slice for every distance.

Letters: B batch, P positions, N heads, K value heads, W channels, R distances; n: N, or 1 where
heads share weights; k: K, or N where weights differ.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.parameters import Parameters, by_parameters
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
    alike = None if line.labels is None else _alike(line, lowest, highest)
    total = functools.partial(shifted_sum, length=line.length, start=-lowest)

    def weights(parameters: Parameters, fixed: Any) -> Float[Array, "#B R #P n"]:
        limits, alike = fixed
        smooth = dataclasses.replace(line.smooth, parameters=parameters)
        placed = dataclasses.replace(line, smooth=smooth, limits=limits)
        by_row = _weighed(placed, reach, share).weights.T[None, :, None]
        return by_row if alike is None else by_row * alike

    parameters, fixed = line.smooth.parameters, (line.limits, alike)
    by_row = weights(parameters, fixed)

    def function(x: Float[Array, "#B P k W"]) -> Float[Array, "#B P k W"]:
        if alike is not None:
            x = jnp.broadcast_to(x, (line.batch, *x.shape[1:]))
        if line.smooth.log_weights is not None:
            return total(x, by_row)
        return by_parameters(total, weights, x, parameters, fixed)

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
