"""Windows of any radius by blocked sums: plain means of the keys around a query.

A window is what its first block holds from its start on, the whole blocks between, and what its
last block holds up to its end. Nothing is taken away again, so that neither values of a large mean
nor large values outside cost precision. Whole blocks, of 32, are summed by doubling.

Letters: B batch, P positions, N heads, K value heads, W channels, L positions a block, I blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize
from attn_jax.ops.toeplitz.line import Limit, Line
from attn_jax.ops.toeplitz.rows import Sums, Trust, for_heads
from attn_jax.ops.toeplitz.shifted import padded

BLOCK = 32


def sums(line: Line, farthest: int) -> Sums:
    """Over the keys of a window; with two ends it spans more than a block.

    Args:
      line: the call; its kernel is a `Window` or none.
      farthest: no end of the window is farther, as far as it has an end.

    """
    before, after = limits(line)
    unit = normalize(line.normalizer, jnp.zeros((1, 1), line.dtype)).weights[0, 0]

    def function(x: Float[Array, "#b P k W"]) -> Float[Array, "#b P k W"]:
        return unit * _windowed(x, before, after, farthest)

    mixed = function(for_heads(line.value, _heads(line)))
    if line.normalizer not in WITH_LOG_NORMALIZER:
        return Sums(mixed, jnp.ones((1, line.length, 1, 1), line.dtype))
    first, last = line.interval(line.radius)
    return Sums(mixed, jnp.maximum(last - first + 1, 0)[..., None].astype(line.dtype))


def trust(line: Line) -> Trust:
    """Sums of ones are exact."""
    zeros = jnp.zeros(_heads(line), line.dtype)
    return Trust(zeros, zeros, line.radius, line.radius)


def _heads(line: Line) -> int:
    return 1 if line.radius is None else len(line.radius)


def limits(line: Line) -> tuple[Limit, Limit]:
    """How far the window extends before and after a query."""
    return _nearer(line.before, line.radius), _nearer(line.after, line.radius)


def _nearer(limit: Limit, radius: Limit) -> Limit:
    if limit is None or radius is None:
        return radius if limit is None else limit
    if isinstance(limit, int) and isinstance(radius, np.ndarray):
        return np.minimum(limit, radius)
    return jnp.minimum(limit, radius)


def _windowed(
    x: Float[Array, "#b P K W"], before: Limit, after: Limit, farthest: int
) -> Float[Array, "#b P K W"]:
    """y[p] = sum of x from p - before to p + after."""
    if before is None and after is None:
        return jnp.broadcast_to(x.sum(1, keepdims=True), x.shape)
    if before is None:
        return _each_head(functools.partial(_up_to, farthest=farthest), x, after)
    if after is None:
        turned = _each_head(functools.partial(_up_to, farthest=farthest), jnp.flip(x, 1), before)
        return jnp.flip(turned, 1)
    return _each_head(functools.partial(_between, farthest=farthest), x, before, after)


def _each_head(
    function: Callable[..., Array], x: Float[Array, "#b P K W"], *limits: Limit
) -> Float[Array, "#b P K W"]:
    """Apply a function of [b, P, W] and scalars, for all heads at once if they share the limits."""
    each = [jnp.asarray(limit).reshape(-1) for limit in limits]
    if all(len(limit) == 1 for limit in each):
        merged = function(x.reshape(*x.shape[:2], -1), *(limit[0] for limit in each))
        return merged.reshape(x.shape)
    each = [jnp.broadcast_to(limit, x.shape[2]) for limit in each]
    return jax.vmap(function, (2, *[0] * len(each)), 2)(x, *each)


def _up_to(
    x: Float[Array, "#b P W"], after: Int[Array, ""], farthest: int
) -> Float[Array, "#b P W"]:
    """y[p] = sum of all x up to p + after."""
    positions = x.shape[1]
    running = _within(x, np.tri(BLOCK, dtype=x.dtype))
    earlier = padded(jnp.cumsum(running[:, :, -1], 1), 1, 1, -1)
    running = running + earlier[:, :, None]
    running = running.reshape(len(x), -1, x.shape[2])[:, :positions]
    around = jnp.pad(running, ((0, 0), (farthest, 0), (0, 0)))
    around = jnp.pad(around, ((0, 0), (0, farthest), (0, 0)), mode="edge")
    return lax.dynamic_slice_in_dim(around, farthest + after, positions, 1)


def _between(
    x: Float[Array, "#b P W"], before: Int[Array, ""], after: Int[Array, ""], farthest: int
) -> Float[Array, "#b P W"]:
    """y[p] = sum of x from p - before to p + after, more than BLOCK positions."""
    positions, channels = x.shape[1:]
    ones = np.tri(BLOCK, dtype=x.dtype)
    up_to, from_on = _within(x, ones), _within(x, ones.T)
    count = up_to.shape[1]
    spare = farthest // BLOCK + 2
    totals = padded(up_to[:, :, -1], 1, spare, spare)

    def shifted(sums: Float[Array, "b I L W"], by: Int[Array, ""]) -> Float[Array, "b I L W"]:
        rows = sums.reshape(len(x), -1, channels)
        rows = padded(rows, 1, spare * BLOCK, spare * BLOCK)
        moved = lax.dynamic_slice_in_dim(rows, spare * BLOCK + by, count * BLOCK, 1)
        return moved.reshape(len(x), count, BLOCK, channels)

    def blocks(by: Int[Array, ""]) -> Float[Array, "b I 1 W"]:
        return lax.dynamic_slice_in_dim(totals, spare + by, count, 1)[:, :, None]

    # The window's ends lie so many blocks and places on; a place may carry over into the next
    # block. What lies between their blocks is whole.
    start, start_place = jnp.divmod(-before, BLOCK)
    end, end_place = jnp.divmod(after, BLOCK)
    place = jnp.arange(BLOCK)[:, None]
    start_carries, end_carries = place + start_place >= BLOCK, place + end_place >= BLOCK
    apart = start + 1 < end
    whole = _doubled(totals, spare + start + 2, end - start - 2, count, 2 * spare)[:, :, None]
    whole += jnp.where(~start_carries & (apart | end_carries), blocks(start + 1), 0)
    whole += jnp.where(apart & end_carries, blocks(end), 0)
    y = shifted(from_on, -before) + whole + shifted(up_to, after)
    return y.reshape(len(x), -1, channels)[:, :positions]


def _within(x: Float[Array, "#b P W"], ones: Float[np.ndarray, "L L"]) -> Float[Array, "b I L W"]:
    """Sums of each block's rows, by a matrix of ones for what they are of."""
    batch, positions, channels = x.shape
    count = -(-positions // BLOCK)
    blocks = padded(x, 1, 0, count * BLOCK - positions).reshape(batch, count, BLOCK, channels)
    matrix = jnp.broadcast_to(ones, (batch, count, BLOCK, BLOCK))
    return jnp.einsum("bilm,bimw->bilw", matrix, blocks)


def _doubled(
    x: Float[Array, "b J W"], start: Int[Array, ""], number: Int[Array, ""], length: int, most: int
) -> Float[Array, "b I W"]:
    """y[p] = sum of `number` entries of x from start + p on, by runs of powers of two.

    None where the number is negative.
    """
    number = jnp.maximum(number, 0)
    total = jnp.zeros((len(x), length, x.shape[2]), x.dtype)
    for bit in range(most.bit_length()):
        taken = (number >> bit) & 1
        run = lax.dynamic_slice_in_dim(x, start, length, 1)
        total = total + jnp.where(taken == 1, run, 0)
        start = start + (taken << bit)
        x = x + padded(x, 1, -(1 << bit), 1 << bit) if (1 << bit) < x.shape[1] else x
    return total
