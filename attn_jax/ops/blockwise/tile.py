"""One block of query-key pairs: which are allowed, and their logits.

Letters: a block has h key/value heads of g query heads each, n = h g, t queries, m = g t, s keys;
H key width; r = key - query position.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from attn_jax.ops import dropout, proximity
from attn_jax.ops.blockwise.diagonals import toeplitz
from attn_jax.ops.blockwise.partition import Kind, Plan, as_index
from attn_jax.ops.lanes import any_in_all_lanes
from attn_jax.ops.positions import Either, Grid

Scalar = Int[Array, ""]


class Place(NamedTuple):
    """Where a block is: indices of its sequence, block of heads, first query and first key."""

    sequence: Scalar
    chunk: Scalar
    query_start: Scalar
    key_start: Scalar


@dataclasses.dataclass(frozen=True)
class Tile(Grid):
    """The grid of one block, which reads its part of a mask's data.

    Attributes:
      sequence: index of the sequence.
      first_head: index of the first query head.
      head_count: n.
      query_start: index of the first query.
      key_start: index of the first key.
      aligned: whether that is a multiple of the block's keys.

    """

    sequence: Scalar
    first_head: Scalar
    head_count: int
    query_start: Scalar
    key_start: Scalar
    aligned: bool

    @classmethod
    def at(cls, place: Place, plan: Plan) -> "Tile":
        """The block's grid."""
        grid = plan.call.grid
        _, _, query_start, key_start = place
        query_index = query_start + jnp.arange(plan.queries)
        key_index = key_start + jnp.arange(plan.keys)
        return cls(
            query_positions=_positions(
                grid.query_positions, query_start, plan.queries, place, True
            ),
            key_positions=_positions(
                grid.key_positions, key_start, plan.keys, place, plan.window is None
            ),
            query_index=query_index,
            key_index=key_index,
            sequence=place.sequence,
            first_head=place.chunk * plan.heads * plan.group,
            head_count=plan.heads * plan.group,
            query_start=query_start,
            key_start=key_start,
            aligned=plan.window is None,
        )

    @property
    def head_index(self) -> Int[Array, "n"]:
        """Indices of the query heads."""
        return self.first_head + jnp.arange(self.head_count)

    def sequences(self, data: Shaped[Either, "..."]) -> Shaped[Either, "..."]:
        """The entry of this block's sequence."""
        return _slice(data, self.sequence, 1, 0, True)

    def heads(self, data: Shaped[Either, "..."], axis: int) -> Shaped[Either, "..."]:
        """The entries of this block's heads."""
        return _slice(data, self.first_head, self.head_count, axis, True)

    def rows(self, data: Shaped[Either, "..."], axis: int) -> Shaped[Either, "..."]:
        """The entries of this block's queries."""
        return _slice(data, self.query_start, len(self.query_index), axis, True)

    def columns(self, data: Shaped[Either, "..."], axis: int) -> Shaped[Either, "..."]:
        """The entries of this block's keys."""
        return _slice(data, self.key_start, len(self.key_index), axis, self.aligned)


def _positions(positions: Either, start: Scalar, size: int, place: Place, aligned: bool) -> Array:
    """A block's positions; those known to be regular are counted, not looked up."""
    known = isinstance(positions, np.ndarray) and len(positions) == 1
    if known and np.all(np.diff(positions[0]) == 1):
        first = jnp.asarray(positions[0, :1])
        return (first + (start + jnp.arange(size)).astype(first.dtype))[None]
    of_sequence = _slice(jnp.asarray(positions), place.sequence, 1, 0, True)
    return jnp.asarray(_slice(of_sequence, start, size, 1, aligned))


def _slice(
    data: Shaped[Either, "..."], start: Scalar, size: int, axis: int, aligned: bool
) -> Shaped[Either, "..."]:
    """data[start : start + size] along an axis (kept if of length 1).

    What lies outside of the data may be anything. `aligned`: start is a multiple of size.
    """
    length = data.shape[axis]
    if length == 1:
        return data
    if length < size:
        widths = [(0, size - length) if i == axis else (0, 0) for i in range(data.ndim)]
        data, length = jnp.pad(data, widths), size
    first = jnp.clip(start, 0, length - size)
    part = lax.dynamic_slice_in_dim(jnp.asarray(data), first, size, axis)
    # At the ends the slice that fits is another one: its entries are brought to their places.
    return part if aligned and length % size == 0 else jnp.roll(part, first - start, axis)


def allowed(place: Place, plan: Plan) -> Bool[Array, "1 #n t s"] | None:
    """Which pairs of the block exist and are allowed; None: all of every block."""
    tile = Tile.at(place, plan)
    found: Any = None
    if plan.ragged:
        last = plan.call.shape[3]
        found = (tile.key_index < last).reshape(1, 1, 1, -1)
    if plan.call.mask is not None:
        of_mask = _within_limits(tile, plan) if plan.limits_are_mask else _of_mask(tile, plan)
        found = of_mask if found is None else found & of_mask
    if found is None:
        return None
    return jnp.broadcast_to(found, (1, found.shape[1], plan.queries, plan.keys))


def _within_limits(tile: Tile, plan: Plan) -> Bool[Array, "1 1 t s"]:
    """A mask that is all in the limits."""
    relative = jnp.asarray(tile.key_index)[None, :] - jnp.asarray(tile.query_index)[:, None]
    low, high = (as_index(limit) for limit in plan.limits)
    return ((relative >= low) & (relative <= high))[None, None]


def _of_mask(tile: Tile, plan: Plan) -> Bool[Array, "1 #n t s"]:
    """What the mask says; one of someone's own may answer for all sequences and heads."""
    assert plan.call.mask is not None
    found = tile.sequences(jnp.asarray(plan.call.mask.allowed(tile)))
    found = tile.heads(found, 1) if found.shape[1] > tile.head_count else found
    return jnp.asarray(found)


def kind(place: Place, plan: Plan, pairs: Bool[Array, "1 #n t s"]) -> Scalar:
    """What the mask does to the block; the same in all lanes of a vmap, so that it is a branch."""
    _, _, query_start, key_start = place
    least = key_start - (query_start + plan.queries - 1)
    greatest = key_start + plan.keys - 1 - query_start
    low, high = (as_index(limit) for limit in plan.limits)
    outside = (greatest < low) | (least > high)
    if plan.limits_are_mask:
        keys = plan.call.shape[3]
        exist = key_start + plan.keys <= keys
        inside = (least >= low) & (greatest <= high) & exist
        return jnp.where(outside, Kind.EMPTY, jnp.where(inside, Kind.FULL, Kind.PARTIAL))
    some, some_not = any_in_all_lanes(pairs), any_in_all_lanes(~pairs)
    of_data = jnp.where(some, jnp.where(some_not, Kind.PARTIAL, Kind.FULL), Kind.EMPTY)
    return jnp.where(outside, Kind.EMPTY, of_data)


def logits(
    operands: dict[str, Array], pairs: Bool[Array, "1 #n t s"] | None, place: Place, plan: Plan
) -> Float[Array, "h m s"]:
    """All terms of the logits, -inf at pairs that are not allowed; of operands as `scaled`."""
    call = plan.call
    tile = Tile.at(place, plan)
    shape = (1, tile.head_count, plan.queries, plan.keys)
    total = jnp.zeros((1, 1, 1, 1), call.dtype)
    if "query" in operands:
        total = _content(operands, plan).reshape(shape)
    if "distance" in operands:
        total = total + toeplitz(operands["distance"], plan.queries, tile.head_count)[None]
    elif call.proximity is not None:
        total = total + _of_kernel(tile, plan)
    if "bias" in operands:
        total = total + operands["bias"][None].astype(call.dtype)
    if call.score is not None:
        total = call.scored(jnp.broadcast_to(total, shape), pairs, tile.head_index, tile)
    if pairs is not None:
        total = jnp.where(pairs, total, -jnp.inf)
    return jnp.broadcast_to(total, shape).reshape(plan.heads, -1, plan.keys)


def _content(operands: dict[str, Array], plan: Plan) -> Float[Array, "h m s"]:
    """The scaled product."""
    query, key, dtype = operands["query"], operands["key"], plan.call.dtype
    product = jnp.einsum("htd,hsd->hts", query, key, preferred_element_type=dtype)
    return product if query.dtype == dtype else product * _scales(operands, plan)


def scaled(operands: dict[str, Array], plan: Plan) -> dict[str, Array]:
    """With queries as `logits` takes them: scaled already where that loses nothing."""
    if "query" not in operands or operands["query"].dtype != plan.call.dtype:
        return operands
    return operands | {"query": operands["query"] * _scales(operands, plan)}


def _scales(operands: dict[str, Array], plan: Plan) -> Float[Array, "h m 1"]:
    return jnp.repeat(operands["scale"].reshape(plan.heads, -1, 1), plan.queries, axis=1)


def finite(operands: dict[str, Array], plan: Plan, *names: str) -> dict[str, Array]:
    """With 0 for NaN and inf in these, under a mask: 0 * NaN would bring them past it."""
    if plan.call.mask is None:
        return operands
    there = operands.keys() & set(names)
    return operands | {n: jnp.where(jnp.isfinite(operands[n]), operands[n], 0) for n in there}


def _of_kernel(tile: Tile, plan: Plan) -> Float[Array, "1 #n t s"]:
    kernel = plan.call.proximity
    assert kernel is not None
    weights = proximity.log_weights(kernel, tile.relative).astype(plan.call.dtype)
    return jnp.asarray(tile.heads(weights, 1)) if weights.shape[1] > tile.head_count else weights


def keep(place: Place, plan: Plan) -> Bool[Array, "h m s"] | None:
    """Which weights of the block dropout keeps; None: all."""
    if not plan.call.dropout_rate:
        return None
    tile = Tile.at(place, plan)
    bits = dropout.keep_tiles(
        plan.call.dropout_key,
        plan.call.dropout_rate,
        tile.sequence[None],
        tile.head_index,
        tile.query_start // dropout.TILE + jnp.arange(plan.queries // dropout.TILE),
        tile.key_start // dropout.TILE + jnp.arange(plan.keys // dropout.TILE),
    )
    return bits.reshape(plan.heads, -1, plan.keys)
