"""Queries and keys of a content-free call on one line of positions, and what its masks allow there.

The line's positions count from 0, and each holds at most one query and one key. What remains of a
call are sums over the line, y[p] = sum over r of w(r) x[p + r] with x zero where there is no key:
the methods know neither of offsets nor of more queries than keys.

Letters: B batch, T queries, S keys, P positions, N query heads, K key/value heads, W channels;
b, n: B or 1, N or 1; r = key - query position.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from attn_jax.ops import masks, proximity
from attn_jax.ops.call import Call
from attn_jax.ops.positions import Either, regular_offset
from attn_jax.ops.toeplitz.strided import padded

# A limit on r: None for no limit, a number known while tracing, or data.
Limit = Any


@dataclasses.dataclass(frozen=True)
class Line:
    """A call on regular positions.

    Attributes:
      call: it.
      length: P.
      first_query: position of the first query.
      first_key: position of the first key.
      before: keys with r >= -before are allowed.
      after: keys with r <= after are allowed.

    """

    call: Call
    length: int
    first_query: int
    first_key: int
    before: Limit
    after: Limit

    @classmethod
    def of(cls, call: Call) -> "Line":
        """Place the queries and keys."""
        offset = offset_of(call)
        assert offset is not None
        queries, keys = call.shape[2:]
        first_query, first_key = max(-offset, 0), max(offset, 0)
        length = max(first_query + queries, first_key + keys)
        return cls(call, length, first_query, first_key, *_limits(call, length))

    def place(self, x: Shaped[Array, "b S ..."]) -> Shaped[Array, "b P ..."]:
        """What belongs to keys at their positions, and zeros elsewhere."""
        return padded(x, 1, self.first_key, self.length - self.first_key - x.shape[1])

    def place_queries(self, x: Shaped[Array, "b T ..."]) -> Shaped[Array, "b P ..."]:
        """What belongs to queries at their positions, and zeros elsewhere."""
        return padded(x, 1, self.first_query, self.length - self.first_query - x.shape[1])

    def at_queries(self, y: Shaped[Array, "b P ..."]) -> Shaped[Array, "b T ..."]:
        """What belongs to positions, at the queries."""
        return y[:, self.first_query : self.first_query + self.call.shape[2]]

    @property
    def value(self) -> Float[Array, "B P K W"]:
        """The values in the dtype of sums; zero where no query may see them."""
        value = self.call.value.astype(self.call.dtype)
        return self.place(jnp.where(self._key_seen[:, :, None, None], value, 0))

    @property
    def present(self) -> Float[Array, "b P 1 1"]:
        """One where there is a key that some query may see."""
        seen = jnp.asarray(self._key_seen, self.call.dtype)
        return self.place(seen[:, :, None, None])

    @property
    def _key_seen(self) -> Bool[Either, "b S"]:
        place = self.first_key + np.arange(self.call.shape[3])[None]
        seen = place < self.first_key + self._count("key")
        if self.before is not None:
            seen = seen & (place >= self.first_query - self.before)
        if self.after is not None:
            seen = seen & (place < self.first_query + self._count("query") + self.after)
        if self.labels is not None and self.labels[0] is not self.labels[1]:
            seen = seen & jax.vmap(jnp.isin)(self.labels[1], self.labels[0])
        return seen

    def _count(self, side: str) -> Int[Either, "#b 1"]:
        """How many of the queries or keys, from the first, the masks `Lengths` leave."""
        whole = self.call.shape[2 if side == "query" else 3]
        lengths = [getattr(m, side) for m in self.parts if isinstance(m, masks.Lengths)]
        count = np.full((1, 1), whole)
        for length in (x for x in lengths if x is not None):
            array = jnp if isinstance(length, jax.Array) else np
            # Index < length, also for lengths that are no whole numbers.
            limit = array.clip(array.ceil(length), 0, whole).astype(np.int32).reshape(-1, 1)
            count = array.minimum(count, limit)
        return count

    @property
    def parts(self) -> tuple[masks.Mask, ...]:
        """The masks that `&` joins."""
        return mask_parts(self.call.mask) or ()

    @property
    def labels(self) -> tuple[Shaped[Array, "B T"], Shaped[Array, "B S"]] | None:
        """What queries and keys must carry alike."""
        for mask in self.parts:
            if isinstance(mask, masks.Segments):
                query, key = mask.pair()
                batch, _, queries, keys = self.call.shape
                placed = jnp.broadcast_to(query, (batch, queries))
                return placed, placed if mask.key is None else jnp.broadcast_to(key, (batch, keys))
        return None

    def interval(self, radius: Limit = None) -> tuple[Int[Array, "b P n"], Int[Array, "b P n"]]:
        """First and last position of the keys that a query at each position may attend to.

        Labels are left out of account. Without any key the first is after the last.

        Args:
          radius: a limit on |r| besides, a number or one a head; the kernel's.

        """
        place = jnp.arange(self.length).reshape(1, -1, 1)
        first = jnp.full((1, 1, 1), self.first_key)
        last = jnp.asarray(self.first_key + self._count("key") - 1)[:, :, None]
        for before, after in ((self.before, self.after), (radius, radius)):
            if before is not None:
                first = jnp.maximum(first, place - jnp.asarray(before).reshape(1, 1, -1))
            if after is not None:
                last = jnp.minimum(last, place + jnp.asarray(after).reshape(1, 1, -1))
        ones = jnp.ones_like(place)
        return first * ones, last * ones

    def empty(self, radius: Limit = None) -> Bool[Array, "b P n 1"]:
        """Positions whose interval holds no key, and those behind the masks' last query."""
        first, last = self.interval(radius)
        return ((first > last) | self.behind[..., None])[..., None]

    @property
    def behind(self) -> Bool[Array, "b P"]:
        """Positions behind the last query that the masks leave."""
        count = jnp.asarray(self._count("query"))
        return jnp.arange(self.length)[None] >= self.first_query + count

    def crossed(self, radius: Limit) -> Bool[Array, "b P n 1"]:
        """Positions whose interval holds a key with another label than the query's."""
        first, last = self.interval(radius)
        keys = self._labels_of_keys
        runs = jnp.cumsum(padded(keys[:, 1:] != keys[:, :-1], 1, 1, 0), axis=1)
        apart = _taken(runs, first) != _taken(runs, last)
        return (apart | ~self.alike(first))[..., None]

    def alike(self, position: Int[Array, "b P n"]) -> Bool[Array, "B P n"]:
        """Whether the key at another position carries the label of a position's query."""
        assert self.labels is not None
        queries = self.place_queries(self.labels[0])
        return _taken(self._labels_of_keys, position) == queries[..., None]

    @property
    def _labels_of_keys(self) -> Shaped[Array, "B P"]:
        """By position; the nearest key's where there is none."""
        assert self.labels is not None
        labels = self.labels[1]
        behind = self.length - self.first_key - labels.shape[1]
        return jnp.pad(labels, ((0, 0), (self.first_key, behind)), mode="edge")

    def log_weights(self, lowest: int, highest: int) -> Float[Array, "n R"]:
        """The kernel's log-weights at lowest <= r <= highest, -inf where the masks' limits say so."""
        r = np.arange(lowest, highest + 1)
        weights = jnp.zeros((1, len(r)), self.call.dtype)
        if self.call.proximity is not None:
            sampled = proximity.log_weights(self.call.proximity, r.reshape(1, 1, 1, -1))
            weights = sampled[0, :, 0].astype(self.call.dtype)
        inside = np.ones_like(r, bool)
        if self.before is not None:
            inside = inside & (r >= -self.before)
        if self.after is not None:
            inside = inside & (r <= self.after)
        return jnp.where(jnp.asarray(inside)[None], weights, -jnp.inf)


def _taken(x: Shaped[Array, "B P"], index: Int[Array, "b P n"]) -> Shaped[Array, "B P n"]:
    index = jnp.clip(jnp.broadcast_to(index, (len(x), *index.shape[1:])), 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(len(x), -1), axis=1).reshape(index.shape)


def offset_of(call: Call) -> int | None:
    """O such that key j and query i are j - i + o apart, or None if that is not provable."""
    return regular_offset(call.grid.query_positions, call.grid.key_positions)


def mask_parts(mask: masks.Mask | None) -> tuple[masks.Mask, ...] | None:
    """The masks that `&` joins, or None if one of them can't be told from a place on the line."""
    if mask is None:
        return ()
    if type(mask) is masks.Both:
        first, second = mask_parts(mask.first), mask_parts(mask.second)
        if first is None or second is None:
            return None
        segments = [m for m in first + second if isinstance(m, masks.Segments)]
        return first + second if len(segments) < 2 else None
    # A subclass may allow something else: only the classes themselves are known.
    if type(mask) is masks.Local:
        return (mask,) if all(np.size(x) == 1 for x in (mask.before, mask.after)) else None
    return (mask,) if type(mask) in (masks.Causal, masks.Lengths, masks.Segments) else None


def _limits(call: Call, length: int) -> tuple[Limit, Limit]:
    """How far before and after a query keys are allowed, by masks and the kernel's stated reach."""
    before, after = [], []
    for mask in mask_parts(call.mask) or ():
        if isinstance(mask, masks.Causal):
            after.append(0)
        elif isinstance(mask, masks.Local):
            before.append(_whole(mask.before, length))
            after.append(_whole(mask.after, length))
    if call.proximity is not None and call.proximity.reach is not None:
        reach = _whole(call.proximity.reach, length)
        before.append(reach)
        after.append(reach)
    return _least(before, length), _least(after, length)


def _whole(limit: Any, length: int) -> Limit:
    """A limit as a whole number; past the ends of the line all are alike."""
    if isinstance(limit, jax.Array):
        limit = limit.reshape(())
        return jnp.floor(jnp.clip(limit, -length, length)).astype(jnp.int32)
    return math.floor(np.clip(np.asarray(limit, float).item(), -length, length))


def _least(limits: list[Limit], length: int) -> Limit:
    if any(isinstance(limit, jax.Array) for limit in limits):
        return functools.reduce(jnp.minimum, limits)
    least = min(limits, default=length)
    return None if least >= length - 1 else least
