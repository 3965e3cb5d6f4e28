"""Rows that sums of weights can't give: dense, in log space, a block of queries at a time.

So are rows whose every key is far from the kernel's peak, where weights underflow or drown in the
noise of a transform. Only blocks that hold such a row are computed, and only from the keys that
can matter to its rows.

Letters: B batch, T queries, S keys, P positions, N heads, D value width, C queries a block,
L keys of a block; b, n: B or 1, N or 1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attn_jax.ops import dense, masks, proximity
from attn_jax.ops.call import Call
from attn_jax.ops.lanes import any_in_all_lanes, each_in_any_lane
from attn_jax.ops.positions import Grid
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.varying import varying_as

_BLOCK = 64
# Numbers of keys that blocks are computed from; the first that holds all that matter. A block and
# what a Gaussian reaches in float32 are 522 keys for width 32, 980 for 64, 1897 for 128.
_KEYS = (576, 1152, 2304)

Result = tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]


def filled(call: Call, line: Line, result: Result, needed: Bool[Array, "#b T #n 1"]) -> Result:
    """The result with the rows that are needed put in."""
    output, log_normalizer = result

    def mended() -> Result:
        exact, exact_log = _by_blocks(call, line, needed)
        log = None
        if log_normalizer is not None and exact_log is not None:
            log = jnp.where(needed[..., 0], exact_log, log_normalizer)
        return jnp.where(needed, exact.astype(output.dtype), output), log

    return lax.cond(any_in_all_lanes(needed), jax.checkpoint(mended), lambda: result)


def _by_blocks(call: Call, line: Line, needed: Bool[Array, "#b T #n 1"]) -> Result:
    """Right where needed; zero, or right too, elsewhere."""
    batch, _, queries, keys = call.shape
    first, last = (line.at_queries(x) - line.first_key for x in _mattering(call, line))
    size = min(_BLOCK, queries)
    count = -(-queries // size)
    sizes = (*(k for k in _KEYS if k < keys), keys)
    value = line.value

    def block(index: Int[Array, ""]) -> Result:
        rows = jnp.minimum(index * size + jnp.arange(size), queries - 1)
        wanted = jnp.take(needed[..., 0], rows, 1)
        low = jnp.where(wanted, jnp.take(first, rows, 1), keys).min((1, 2))
        high = jnp.where(wanted, jnp.take(last, rows, 1), -1).max((1, 2))
        low = jnp.clip(low, 0, keys - 1)
        span = jnp.max(high - low) + 1
        short = each_in_any_lane(span > jnp.asarray(sizes[:-1], jnp.int32))
        branches = [
            jax.checkpoint(lambda k=k: _block(call, line, value, rows, low, k)) for k in sizes
        ]
        zeros = jax.eval_shape(branches[0])

        def nothing() -> Result:
            return jax.tree.map(lambda x: varying_as(jnp.zeros(x.shape, x.dtype), x), zeros)

        chosen = jnp.where(any_in_all_lanes(wanted), 1 + short.sum(), 0)
        return lax.switch(chosen, [nothing, *branches])

    def joined(stacked: Array) -> Array:
        whole = jnp.moveaxis(stacked, 0, 1)
        return whole.reshape(batch, -1, *whole.shape[3:])[:, :queries]

    return jax.tree.map(joined, lax.map(jax.checkpoint(block), jnp.arange(count)))


def _block(
    call: Call,
    line: Line,
    value: Float[Array, "B P K D"],
    rows: Int[Array, "C"],
    low: Int[Array, "b"],
    size: int,
) -> tuple[Float[Array, "B C N D"], Float[Array, "B C N"] | None]:
    """Attention of some queries to `size` keys, of each sequence those from `low` on.

    As everywhere in `toeplitz`, the values that no query may see are zero.
    """
    batch, _, _, keys = call.shape
    index = jnp.minimum(low, keys - size)[:, None] + jnp.arange(size)[None]
    index = jnp.broadcast_to(index, (batch, size))
    query_place, key_place = line.first_query + rows, line.first_key + index
    value = jnp.take_along_axis(value, key_place[..., None, None], axis=1)
    first, last = (jnp.take(x, query_place, 1) for x in line.interval())
    place = key_place[:, None, :]
    allowed = (place >= first) & (place <= last) & ~jnp.take(line.behind, query_place, 1)[..., None]
    if line.labels is not None:
        query = jnp.take(line.labels[0], rows, 1)
        allowed &= query[:, :, None] == jnp.take_along_axis(line.labels[1], index, 1)[:, None]
    grid = Grid(query_place[None], key_place, np.arange(len(rows)), np.arange(size))
    mask = masks.Array(allowed[:, None])
    call = dataclasses.replace(call, value=value, grid=grid, mask=mask)
    weights, denominator, log = dense.normalized(call, call.allowed())
    mixed = _mix(weights, value, call.heads)
    if denominator is not None:
        mixed = mixed / jnp.swapaxes(denominator, 1, 2)
    if not call.return_log_normalizer or log is None:
        return mixed, None
    shape = (batch, len(rows), call.heads)
    return mixed, jnp.broadcast_to(jnp.swapaxes(log[..., 0], 1, 2), shape)


def _mix(
    weights: Float[Array, "#b #n C L"], value: Float[Array, "B L K D"], heads: int
) -> Float[Array, "B C N D"]:
    """The weighted values; heads with the same weights are no more than channels."""
    if weights.shape[1] > 1:
        return jnp.swapaxes(dense.product(weights, value, heads), 1, 2)
    batch, size, value_heads, width = value.shape
    weights = jnp.broadcast_to(weights[:, 0], (batch, *weights.shape[2:]))
    mixed = jnp.einsum("bts,bsw->btw", weights, value.reshape(batch, size, -1))
    mixed = mixed.reshape(batch, -1, value_heads, width)
    return jnp.repeat(mixed, heads // value_heads, axis=2)


def _mattering(call: Call, line: Line) -> tuple[Int[Array, "#b P #n"], Int[Array, "#b P #n"]]:
    """The first and the last position whose key can matter to a query.

    The weights of a Gaussian or an exponential fall from the allowed key nearest to the peak at
    least as fast as they fall from the peak.
    """
    first, last = line.interval()
    kernel = call.proximity
    if kernel is None or call.normalizer not in ("softmax", "softmax_one"):
        return first, last
    negligible = math.log(call.shape[3] + 1) - math.log(jnp.finfo(call.dtype).eps / 2)
    place = jnp.arange(line.length).reshape(1, -1, 1)
    if type(kernel) is proximity.Gaussian:
        offset, width = (_each(x, call.dtype) for x in (kernel.offset, kernel.width))
        place, reach = place + offset, math.sqrt(2 * negligible) * width
    elif type(kernel) is proximity.Exponential:
        reach = negligible * _each(kernel.length, call.dtype)
    else:
        return first, last
    nearest = jnp.clip(place, first, last)
    low = jnp.maximum(first, _floored(nearest - reach, line.length))
    high = jnp.minimum(last, _floored(nearest + reach, line.length) + 1)
    if line.labels is None:
        return low, high
    # Keys of the label may lie anywhere, unless the nearest key is one of them.
    sure = line.alike(jnp.round(nearest).astype(jnp.int32))
    return jnp.where(sure, low, first), jnp.where(sure, high, last)


def _each(parameter: object, dtype: jnp.dtype) -> Float[Array, "1 1 n"]:
    return lax.stop_gradient(jnp.asarray(parameter, dtype)).reshape(1, 1, -1)


def _floored(x: Float[Array, "..."], length: int) -> Int[Array, "..."]:
    return jnp.floor(jnp.clip(x, -length, 2 * length)).astype(jnp.int32)
