"""The arrays of a call, cut into blocks.

Query and output are cut and transposed row by row, where a block of them is in the cache. So are
keys and values along a band, to [h, s, W]. Otherwise each of their blocks is taken where it is
used, unless there are tangents: then all are transposed once, to [h, W, s], since what makes their
cotangents are products with that order of axes, which are twice as fast.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H key width, D value width;
a block has h key/value heads of g query heads each, n = h g, t queries, m = g t rows of logits, s
keys; C blocks of heads, I of queries, J of keys; L distances, t + s - 1 in a block.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from attn_jax.ops import dense, proximity
from attn_jax.ops.blockwise.blocks import Blocked
from attn_jax.ops.blockwise.partition import Plan
from attn_jax.ops.call import Call

Arrays = dict[str, Array]
"""The arrays of a call by name, whole or of one block: all that may be differentiated is there.

query, key, value, bias, scale [N], distance [n, L] (log-weights by distance), and what functions
of the call close over under names with a dot.
"""
Operands = dict[str, Blocked]


def of(call: Call, plan: Plan) -> Arrays:
    """The arrays of a call."""
    found: Arrays = {"value": dense.wide_value(call)}
    if call.query is not None and call.key is not None:
        scale = jnp.broadcast_to(jnp.asarray(call.scale, call.dtype), call.heads)
        found |= {"query": call.query, "key": call.key, "scale": scale}
    if call.bias is not None:
        found["bias"] = call.bias
    if call.proximity is not None and plan.offset is not None:
        low, high = plan.span
        r = np.arange(low, high + 1) + plan.offset
        by_distance = proximity.log_weights(call.proximity, r[None, None, None])
        found["distance"] = by_distance.astype(call.dtype)[0, :, 0]
    return found


def cut(arrays: Arrays, plan: Plan, *, late: bool) -> Operands:
    """Blocks for the loops over sequences and rows; linear in every array.

    Args:
      arrays: of the call.
      plan: the blocks.
      late: whether blocks of keys are taken from all of them where they are used (fewer copies),
        or a row's of some heads first (a transpose that is written once).

    """
    cutters = {"query": _queries, "bias": _bias, "distance": _distances}
    keys = functools.partial(_columns, late=late) if plan.window is None else _whole
    cutters |= {"key": keys, "value": keys}
    return {name: cutters.get(name, _shared)(array, plan) for name, array in arrays.items()}


def _shared(array: Array, plan: Plan) -> Blocked:
    del plan
    return Blocked(array)


def _whole(array: Float[Array, "B S K W"], plan: Plan) -> Blocked:
    del plan
    return Blocked(array, "b")


def _queries(query: Float[Array, "B T N H"], plan: Plan) -> Blocked:
    batch, queries, *rest = query.shape
    query = _padded(query, 1, plan.rows * plan.queries - queries)
    axes, shape = _rows(plan)
    return Blocked(query.reshape(batch, *shape, plan.queries, *rest), "b" + axes)


def _rows(plan: Plan) -> tuple[str, list[int]]:
    """The axes that count rows of blocks."""
    if plan.together == 1:
        return "q", [plan.rows]
    return "qr", [plan.rows // plan.together, plan.together]


def _columns(array: Float[Array, "B S K W"], plan: Plan, late: bool) -> Blocked:
    """Blocks [h, s, W]; `order` brings them to that."""
    batch, keys, _, width = array.shape
    array = _padded(array, 1, plan.columns * plan.keys - keys)
    array = array.reshape(batch, plan.columns, plan.keys, plan.chunks, plan.heads, width)
    if late:
        return Blocked(array, "bhk", late=(0, 3, 1), order=(1, 0, 2))
    return Blocked(array.transpose(0, 3, 1, 4, 5, 2), "bhk", order=(0, 2, 1))


def _bias(bias: Float[Array, "#B #N #T #S"], plan: Plan) -> Blocked:
    """Blocks [n or 1, t or 1, S or 1], their keys uncut."""
    batch, heads, queries, keys = bias.shape
    if queries > 1:
        bias = _padded(bias, 2, plan.rows * plan.queries - queries)
    if keys > 1:
        bias = _padded(bias, 3, plan.columns * plan.keys - keys)
    rows, row_shape = _rows(plan) if queries > 1 else ("", [])
    axes = ("b" if batch > 1 else "") + rows + ("h" if heads > 1 else "")
    shape = [batch] if batch > 1 else []
    shape += [plan.chunks, plan.heads * plan.group] if heads > 1 else [1]
    shape += [*row_shape, plan.queries if queries > 1 else 1]
    bias = bias.reshape(*shape, bias.shape[3])
    front, count = len(axes.partition("q")[0]), len(rows)
    behind = [i - count - 2 for i in range(count)]
    return Blocked(jnp.moveaxis(bias, behind, range(front, front + count)), axes)


def _distances(by_distance: Float[Array, "#N all"], plan: Plan) -> Blocked:
    if by_distance.shape[0] == 1:
        return Blocked(by_distance)
    return Blocked(by_distance.reshape(plan.chunks, plan.heads * plan.group, -1), "h")


def _padded(array: Array, axis: int, more: int) -> Array:
    widths = [(0, more) if i == axis else (0, 0) for i in range(array.ndim)]
    return jnp.pad(array, widths) if more else array


def taken(operands: Operands) -> Arrays:
    """The arrays of one block."""
    return {name: x.block for name, x in operands.items()}


def of_row(
    operands: Operands, query_start: Int[Array, ""], key_start: Int[Array, ""], plan: Plan
) -> Operands:
    """What one row of blocks needs, for the loops over heads and columns; linear in the arrays."""
    row = dict(operands)
    if "query" in row:
        row["query"] = Blocked(by_head(row["query"].array, plan), "h")
    if "scale" in row:
        row["scale"] = Blocked(row["scale"].array.reshape(plan.chunks, -1, 1, 1), "h")
    if plan.window is not None:
        for name in ("key", "value"):
            if name in row:
                keys = lax.dynamic_slice_in_dim(row[name].array, key_start, plan.keys, 0)
                row[name] = Blocked(_window(keys, plan), "h")
    elif "bias" in row and row["bias"].array.shape[-1] > 1:
        bias = row["bias"].array
        blocks = bias.reshape(*bias.shape[:-1], plan.columns, plan.keys)
        row["bias"] = Blocked(jnp.moveaxis(blocks, -2, -4), row["bias"].axes + "k")
    if "distance" in row:
        row["distance"] = _of_blocks(row["distance"], key_start - query_start, plan)
    return row


def by_head(array: Float[Array, "t N W"], plan: Plan) -> Float[Array, "C h m W"]:
    """Rows of queries as rows of logits."""
    queries, _, width = array.shape
    shape = (queries, plan.chunks, plan.heads, plan.group, width)
    by_head = array.reshape(shape).transpose(1, 2, 3, 0, 4)
    return by_head.reshape(plan.chunks, plan.heads, plan.group * queries, width)


def by_query(array: Float[Array, "C h m W"], plan: Plan) -> Float[Array, "t N W"]:
    """Rows of logits as rows of queries: the inverse of the cut of `query`."""
    width = array.shape[-1]
    shape = (plan.chunks, plan.heads, plan.group, plan.queries, width)
    return array.reshape(shape).transpose(3, 0, 1, 2, 4).reshape(plan.queries, -1, width)


def _window(array: Float[Array, "s K W"], plan: Plan) -> Float[Array, "C h s W"]:
    """The keys of a row along a band, as blocks of heads."""
    keys, _, width = array.shape
    by_head = array.reshape(keys, plan.chunks, plan.heads, width)
    return by_head.transpose(1, 2, 0, 3)


def _of_blocks(blocked: Blocked, shift: Int[Array, ""], plan: Plan) -> Blocked:
    """The distances that occur in each block of a row whose first key is `shift` from its query."""
    size, count = plan.keys, -(-(plan.queries - 1) // plan.keys)
    length = plan.columns * size + plan.queries - 1
    # Rows far behind the last key read the lowest distances, which are all out of reach.
    start = jnp.maximum(shift - (plan.queries - 1) - plan.span[0], 0)
    row = lax.dynamic_slice_in_dim(blocked.array, start, length, axis=-1)
    if plan.columns == 1:
        return Blocked(row, blocked.axes)
    padded = _padded(row, row.ndim - 1, (plan.columns + count) * size - length)
    blocks = padded.reshape(*row.shape[:-1], -1, size)
    parts = [blocks[..., m : m + plan.columns, :] for m in range(count + 1)]
    windows = jnp.concatenate(parts, -1)[..., : plan.queries + size - 1]
    return Blocked(jnp.moveaxis(windows, -2, -3), blocked.axes + "k")
