"""The arrays of a call as blocks, and results back from blocks.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H key width, D value width;
a block has h key/value heads of g query heads each, n = h g, t queries, m = g t rows of logits, s
keys; C blocks of heads, I of queries, J of keys; L distances, t + s - 1 in a block.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from attn_jax.ops import dense, proximity
from attn_jax.ops.blockwise.blocks import Blocked, Index
from attn_jax.ops.blockwise.partition import Plan
from attn_jax.ops.call import Call

Operands = dict[str, Blocked]
"""Every array of a call by name; all that may be differentiated is among them.

query [C h m H], key [h H s] and value [h D s] of a block (that order of axes keeps the products
and their transposes fast), bias, scale, distance (log-weights by distance), and leaves of the
kernel, the mask, the score function's closure and the positions under names with a dot.
"""


def of(call: Call, plan: Plan) -> Operands:
    """Cut the arrays of a call."""
    found: Operands = {"value": _keys(dense.wide_value(call), plan)}
    if call.query is not None and call.key is not None:
        found |= {"key": _keys(call.key, plan)} | _queries(call.query, call, plan)
    if call.bias is not None:
        found["bias"] = _bias(call.bias, plan)
    return found | _distances(call, plan)


def _queries(query: Float[Array, "B T N H"], call: Call, plan: Plan) -> Operands:
    scale = jnp.asarray(call.scale, call.dtype)
    folded = query.dtype == call.dtype
    if folded:
        query = query * scale.reshape(1, 1, -1, 1)
    batch, queries, _, width = query.shape
    query = _padded(query, 1, plan.rows * plan.queries - queries)
    shape = (batch, plan.rows, plan.queries, plan.chunks, plan.heads, plan.group, width)
    blocks = query.reshape(shape).transpose(0, 3, 1, 4, 5, 2, 6)
    blocks = blocks.reshape(*blocks.shape[:4], plan.group * plan.queries, width)
    found = {"query": Blocked(blocks, "bhq")}
    if folded:
        return found
    per_head = jnp.broadcast_to(scale, call.heads).reshape(plan.chunks, -1, 1, 1)
    return found | {"scale": Blocked(per_head, "h")}


def _keys(array: Float[Array, "B S K W"], plan: Plan) -> Blocked:
    """Blocks [h, W, s] of keys or values."""
    batch, keys, _, width = array.shape

    def blocks(array: Array, size: int) -> Array:
        shape = (batch, -1, size, plan.chunks, plan.heads, width)
        return array.reshape(shape).transpose(0, 3, 1, 4, 5, 2)

    if plan.window is None:
        array = _padded(array, 1, plan.columns * plan.keys - keys)
        return Blocked(blocks(array, plan.keys), "bhk")
    # Windows overlap: each is a run of neighbouring blocks as long as its queries.
    size = plan.queries
    count = -(-plan.keys // size)
    low, high = -plan.window, (plan.rows - 1 + count) * size + plan.window - keys
    zero = jnp.zeros((), array.dtype)
    shifted = lax.pad(array, zero, [(0, 0, 0), (low, high, 0), (0, 0, 0), (0, 0, 0)])
    return Blocked(blocks(shifted, size), "bhq", count)


def _bias(bias: Float[Array, "#B #N #T #S"], plan: Plan) -> Blocked:
    """Blocks [n or 1, t or 1, S or 1], their keys uncut (see `row`)."""
    batch, heads, queries, keys = bias.shape
    axes = ""
    if queries > 1:
        bias = _padded(bias, 2, plan.rows * plan.queries - queries)
    if keys > 1:
        bias = _padded(bias, 3, plan.columns * plan.keys - keys)
    shape = [batch] if batch > 1 else []
    shape += [plan.chunks, plan.heads * plan.group] if heads > 1 else [1]
    shape += [plan.rows, plan.queries] if queries > 1 else [1]
    axes = ("b" if batch > 1 else "") + ("h" if heads > 1 else "") + ("q" if queries > 1 else "")
    bias = bias.reshape(*shape, bias.shape[3])
    if queries > 1:
        bias = jnp.moveaxis(bias, -3, -4)
    return Blocked(bias, axes)


def _padded(array: Array, axis: int, more: int) -> Array:
    widths = [(0, more) if i == axis else (0, 0) for i in range(array.ndim)]
    return jnp.pad(array, widths) if more else array


def _distances(call: Call, plan: Plan) -> Operands:
    """The kernel's log-weights by key index - query index, where positions are regular."""
    if call.proximity is None or plan.offset is None:
        return {}
    low, high = _span(plan)
    r = np.arange(low, high + 1) + plan.offset
    by_distance = proximity.log_weights(call.proximity, r[None, None, None])
    by_distance = by_distance.astype(call.dtype)[0, :, 0]
    if by_distance.shape[0] == 1:
        return {"distance": Blocked(by_distance)}
    by_distance = by_distance.reshape(plan.chunks, plan.heads * plan.group, -1)
    return {"distance": Blocked(by_distance, "h")}


def _span(plan: Plan) -> tuple[int, int]:
    """Least and largest key index - query index of any block."""
    if plan.window is not None:
        return plan.window - (plan.queries - 1), plan.window + plan.keys - 1
    return 1 - plan.rows * plan.queries, plan.columns * plan.keys - 1


def row(operands: Operands, index: Index, plan: Plan) -> Operands:
    """What one row of blocks needs of bias and kernel, cut by keys. Linear in the arrays."""
    cut = dict(operands)
    if plan.window is not None:
        for name in ("key", "value"):
            if name in cut:
                cut[name] = Blocked(cut[name].array[..., : plan.keys])
        return cut
    if "bias" in cut and cut["bias"].array.shape[-1] > 1:
        bias = cut["bias"].array
        blocks = bias.reshape(*bias.shape[:-1], plan.columns, plan.keys)
        cut["bias"] = Blocked(jnp.moveaxis(blocks, -2, 0), "k")
    if "distance" in cut:
        cut["distance"] = Blocked(_windows(cut["distance"].array, index, plan), "k")
    return cut


def _windows(
    by_distance: Float[Array, "#n all"], index: Index, plan: Plan
) -> Float[Array, "J #n L"]:
    """The distances that occur in each block of a row."""
    size, count = plan.keys, -(-(plan.queries - 1) // plan.keys)
    length = (plan.columns + count) * size
    start = (plan.rows - 1 - index) * plan.queries
    of_row = lax.dynamic_slice_in_dim(
        by_distance, start, plan.columns * size + plan.queries - 1, axis=1
    )
    blocks = _padded(of_row, 1, length - of_row.shape[1]).reshape(len(of_row), -1, size)
    parts = [blocks[:, m : m + plan.columns] for m in range(count + 1)]
    return jnp.moveaxis(jnp.concatenate(parts, -1)[..., : plan.queries + size - 1], 1, 0)


def toeplitz(by_distance: Float[Array, "#n L"], queries: int) -> Float[Array, "#n t s"]:
    """The matrix whose entry (i, j) is by_distance[j - i + queries - 1].

    Each row is the row above shifted by one: rows one entry longer than that, laid end to end and
    cut anew. Its transpose is a pad and a sum; that of an indexed lookup would be a scatter.
    """
    heads, length = by_distance.shape
    keys = length - queries + 1
    longer = jnp.pad(by_distance, ((0, 0), (0, 1)))
    flat = jnp.broadcast_to(longer[:, None], (heads, queries, length + 1)).reshape(heads, -1)
    flat = flat[:, queries - 1 : queries - 1 + queries * length]
    return flat.reshape(heads, queries, length)[..., :keys]


def joined(blocks: Float[Array, "B C I h m W"], plan: Plan) -> Float[Array, "B T N W"]:
    """Results of the blocks of all queries as one array."""
    batch, *_, width = blocks.shape
    _, heads, queries, _ = plan.call.shape
    shape = (*blocks.shape[:4], plan.group, plan.queries, width)
    whole = blocks.reshape(shape).transpose(0, 2, 5, 1, 3, 4, 6)
    return whole.reshape(batch, plan.rows * plan.queries, heads, width)[:, :queries]
