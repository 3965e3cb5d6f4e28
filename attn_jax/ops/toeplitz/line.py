"""Queries and keys of a content-free call on one line of positions, and what its masks allow there.

The line's positions count from 0, and each holds at most one query and one key. What remains of a
call are sums over the line, y[p] = sum over r of w(r) x[p + r] with x zero where there is no key:
the methods know neither of offsets nor of more queries than keys.

Letters: B batch, T queries, S keys, P positions, N query heads, K key/value heads, W channels,
R distances; b, n: B or 1, N or 1; r = key - query position.
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
from attn_jax.ops.toeplitz.runs import Runs, runs_of
from attn_jax.ops.toeplitz.shifted import padded

# A limit on r: None for no limit, a number known while tracing, or data.
Limit = Any

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Smooth:
    """What the result is differentiated by.

    While JAX transforms a pytree, its leaves may be anything: so they are of no declared type.

    Attributes:
      value: [B, S, K W], of the call. No axis may be one of a single head: XLA would choose among
        layouts of it that are the same, and copy from one to the other.
      log_weights: [n, R], the kernel's at all distances of the line, from the lowest; -inf beyond
        the masks' limits. None without a kernel, and for a Gaussian: its parameters give them.
      parameters: the kernel's where a method takes them as they are, [n] by name.

    """

    value: Any
    log_weights: Any
    parameters: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """A call on regular positions, as a pytree.

    Attributes:
      smooth: its floating numbers.
      query_count: [b, 1], how many queries the masks `Lengths` leave, from the first.
      key_count: [b, 1], how many keys.
      labels: of queries [B, T] and keys [B, S], which must carry the same, or None.
      runs: of the keys' labels by position; where there is no key, of the nearest one's.
      window: the radius of a `Window` in whole positions, [n], where that is data.
      limits: data among `before` and `after`, None elsewhere.
      known_window: the radius where it is known while tracing.
      known_limits: likewise.
      own_labels: whether the keys' labels are the queries'.
      all_seen: whether every key is known to be seen by a query.
      normalizer: of the call.
      heads: N.
      value_heads: K.
      queries: T.
      length: P.
      first_query: position of the first query.
      first_key: position of the first key.

    """

    smooth: Smooth
    query_count: Any
    key_count: Any
    labels: tuple[Any, Any] | None
    runs: Runs | None
    window: Any
    limits: tuple[Limit, Limit]
    known_window: tuple[int, ...] | None = dataclasses.field(metadata=_STATIC)
    known_limits: tuple[Limit, Limit] = dataclasses.field(metadata=_STATIC)
    own_labels: bool = dataclasses.field(metadata=_STATIC)
    all_seen: bool = dataclasses.field(metadata=_STATIC)
    normalizer: str = dataclasses.field(metadata=_STATIC)
    heads: int = dataclasses.field(metadata=_STATIC)
    value_heads: int = dataclasses.field(metadata=_STATIC)
    queries: int = dataclasses.field(metadata=_STATIC)
    length: int = dataclasses.field(metadata=_STATIC)
    first_query: int = dataclasses.field(metadata=_STATIC)
    first_key: int = dataclasses.field(metadata=_STATIC)

    @property
    def batch(self) -> int:
        """B."""
        return self.smooth.value.shape[0]

    @property
    def keys(self) -> int:
        """S."""
        return self.smooth.value.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and sums."""
        return jnp.promote_types(self.smooth.value.dtype, jnp.float32)

    @property
    def before(self) -> Limit:
        """Keys with r >= -before are allowed."""
        return self.known_limits[0] if self.limits[0] is None else self.limits[0]

    @property
    def after(self) -> Limit:
        """Keys with r <= after are allowed."""
        return self.known_limits[1] if self.limits[1] is None else self.limits[1]

    @property
    def radius(self) -> Limit:
        """Of a `Window`, [n]; None for other kernels."""
        if self.known_window is None:
            return self.window
        return np.asarray(self.known_window, np.int32)

    def place(self, x: Shaped[Array, "#b S ..."]) -> Shaped[Array, "#b P ..."]:
        """What belongs to keys at their positions, and zeros elsewhere."""
        return padded(x, 1, self.first_key, self.length - self.first_key - x.shape[1])

    def at_queries(self, y: Shaped[Array, "#b P ..."]) -> Shaped[Array, "#b T ..."]:
        """What belongs to positions, at the queries."""
        return y[:, self.first_query : self.first_query + self.queries]

    @property
    def value(self) -> Float[Array, "B P K W"]:
        """The values in the dtype of sums; zero where no query may see them."""
        value = self.smooth.value.astype(self.dtype)
        if not self.all_seen:
            value = jnp.where(self._key_seen[:, :, None], value, 0)
        return self.place(value.reshape(*value.shape[:2], self.value_heads, -1))

    @property
    def present(self) -> Float[Array, "#b P 1 1"]:
        """One where there is a key that some query may see."""
        return self.place(self._key_seen[:, :, None, None].astype(self.dtype))

    @property
    def _key_seen(self) -> Bool[Array, "#b S"]:
        place = self.first_key + jnp.arange(self.keys)[None]
        seen = place < self.first_key + self.key_count
        if self.before is not None:
            seen &= place >= self.first_query - self.before
        if self.after is not None:
            seen &= place < self.first_query + self.query_count + self.after
        if self.labels is not None and not self.own_labels:
            among = functools.partial(jnp.isin, method="binary_search")
            seen = seen & jax.vmap(among)(self.labels[1], self.labels[0])
        return seen

    def interval(self, radius: Limit = None) -> tuple[Int[Array, "#b P #n"], Int[Array, "#b P #n"]]:
        """First and last position of the keys that a query at each position may attend to.

        Labels are left out of account. Without any key the first is after the last.

        Args:
          radius: a limit on |r| besides, a number or one a head; the kernel's.

        """
        place = jnp.arange(self.length).reshape(1, -1, 1)
        first = jnp.full_like(place, self.first_key)
        last = (self.first_key + self.key_count - 1)[:, :, None] + jnp.zeros_like(place)
        for before, after in ((self.before, self.after), (radius, radius)):
            if before is not None:
                first = jnp.maximum(first, place - jnp.asarray(before).reshape(1, 1, -1))
            if after is not None:
                last = jnp.minimum(last, place + jnp.asarray(after).reshape(1, 1, -1))
        return first, last

    def empty(self, radius: Limit = None) -> Bool[Array, "#b P #n 1"]:
        """Positions whose interval holds no key, and those behind the masks' last query."""
        first, last = self.interval(radius)
        return ((first > last) | self.behind[..., None])[..., None]

    @property
    def behind(self) -> Bool[Array, "#b P"]:
        """Positions behind the last query that the masks leave."""
        return jnp.arange(self.length)[None] >= self.first_query + self.query_count

    def crossed(self, radius: Limit) -> Bool[Array, "#b P #n 1"]:
        """Positions whose interval holds a key with another label than the query's."""
        assert self.runs is not None
        first, last = self.interval(radius)
        apart = _taken(self.runs.run, first) != _taken(self.runs.run, last)
        return (apart | ~self.alike(first))[..., None]

    def alike(self, position: Int[Array, "#b P #n"]) -> Bool[Array, "B P #n"]:
        """Whether the key at another position carries the label of a position's query."""
        assert self.labels is not None
        keys = _at_positions(self.labels[1], self.length, self.first_key)
        return _taken(keys, position) == self.labels_of_queries[..., None]

    @property
    def labels_of_queries(self) -> Shaped[Array, "B P"]:
        """By position; zero where there is none."""
        assert self.labels is not None
        labels = self.labels[0]
        return padded(labels, 1, self.first_query, self.length - self.first_query - self.queries)

    def log_weights(self, lowest: int, highest: int) -> Float[Array, "n R"]:
        """At lowest <= r <= highest, -inf where the masks' limits say so."""
        if self.smooth.log_weights is not None:
            middle = self.length - 1
            return self.smooth.log_weights[:, middle + lowest : middle + highest + 1]
        r = np.arange(lowest, highest + 1)
        allowed = jnp.asarray(_inside(r, self.before, self.after))
        weights = jnp.zeros((1, 1), self.dtype)
        if self.smooth.parameters:  # a Gaussian's, which alone has them and no weights
            kernel = proximity.Gaussian(**self.smooth.parameters)
            weights = kernel.log_weight(jnp.asarray(r.reshape(1, 1, 1, -1), self.dtype))[0, :, 0]
        return jnp.where(allowed, weights, -jnp.inf)


def of(call: Call) -> Line:
    """Place the queries and keys of a call that has an offset and known kinds of masks."""
    offset, parts = offset_of(call), mask_parts(call.mask)
    assert offset is not None
    assert parts is not None
    _, heads, queries, keys = call.shape
    first_query, first_key = max(-offset, 0), max(offset, 0)
    length = max(first_query + queries, first_key + keys)
    limits = _limits(call, parts, length)
    labels, own = _labels(call, parts)
    runs = None if labels is None else runs_of(_at_positions(labels[1], length, first_key))
    window = _window(call.proximity, length)
    known = window is not None and not isinstance(window, jax.Array)
    return Line(
        smooth=Smooth(
            call.value.reshape(*call.value.shape[:2], -1),
            _sampled(call, limits, length),
            _parameters(call.proximity, call.dtype),
        ),
        query_count=_count(parts, "query", queries),
        key_count=_count(parts, "key", keys),
        labels=labels,
        runs=runs,
        window=None if known else window,
        limits=tuple(x if isinstance(x, jax.Array) else None for x in limits),  # pyright: ignore[reportArgumentType]
        known_window=tuple(window.tolist()) if known else None,  # pyright: ignore[reportOptionalMemberAccess]
        known_limits=tuple(None if isinstance(x, jax.Array) else x for x in limits),  # pyright: ignore[reportArgumentType]
        own_labels=own,
        all_seen=_all_seen(parts, own, offset, queries, keys, limits),
        normalizer=call.normalizer,
        heads=heads,
        value_heads=call.value.shape[2],
        queries=queries,
        length=length,
        first_query=first_query,
        first_key=first_key,
    )


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


def _limits(call: Call, parts: tuple[masks.Mask, ...], length: int) -> tuple[Limit, Limit]:
    """How far before and after a query keys are allowed, by masks and the kernel's stated reach."""
    before, after = [], []
    for mask in parts:
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
        return jnp.floor(jnp.clip(limit.reshape(()), -length, length)).astype(jnp.int32)
    return math.floor(np.clip(np.asarray(limit, float).item(), -length, length))


def _least(limits: list[Limit], length: int) -> Limit:
    if any(isinstance(limit, jax.Array) for limit in limits):
        return functools.reduce(jnp.minimum, limits)
    least = min(limits, default=length)
    return None if least >= length - 1 else least


def _count(parts: tuple[masks.Mask, ...], side: str, whole: int) -> Int[Array, "#b 1"]:
    """Of the queries or keys; an index is allowed if it is below a length, whole or not."""
    count = jnp.full((1, 1), whole)
    for mask in parts:
        length = getattr(mask, side) if isinstance(mask, masks.Lengths) else None
        if length is not None:
            limit = jnp.ceil(jnp.clip(jnp.asarray(length), 0, whole)).astype(jnp.int32)
            count = jnp.minimum(count, limit.reshape(-1, 1))
    return count


def _labels(
    call: Call, parts: tuple[masks.Mask, ...]
) -> tuple[tuple[Shaped[Array, "B T"], Shaped[Array, "B S"]] | None, bool]:
    """Labels of queries and keys, and whether they are the same."""
    for mask in parts:
        if isinstance(mask, masks.Segments):
            query, key = mask.pair()
            batch, _, queries, keys = call.shape
            labels = jnp.broadcast_to(query, (batch, queries)), jnp.broadcast_to(key, (batch, keys))
            return labels, mask.key is None or mask.key is mask.query
    return None, False


def _at_positions(
    labels: Shaped[Array, "B S"], length: int, first_key: int
) -> Shaped[Array, "B P"]:
    """Of keys; the nearest key's where there is none."""
    behind = length - first_key - labels.shape[1]
    return jnp.pad(labels, ((0, 0), (first_key, behind)), mode="edge")


def _all_seen(
    parts: tuple[masks.Mask, ...],
    own_labels: bool,
    offset: int,
    queries: int,
    keys: int,
    limits: tuple[Limit, Limit],
) -> bool:
    """Whether no key is hidden from all queries: masks limit the distance alone, or by labels that
    keys share with queries, and no key ends up beyond the limits of the queries at the ends.
    """
    hiding = masks.Lengths if own_labels else masks.Lengths | masks.Segments
    if any(isinstance(mask, hiding) for mask in parts):
        return False
    reached = (offset, keys - queries + offset)
    if any(isinstance(limit, jax.Array) for limit in limits):
        return False
    before, after = limits
    return (before is None or -before <= reached[0]) and (after is None or reached[1] <= after)


def _window(kernel: proximity.Proximity | None, length: int) -> Limit:
    if type(kernel) is not proximity.Window:
        return None
    array = jnp if isinstance(kernel.radius, jax.Array) else np
    radius = array.floor(array.clip(array.asarray(kernel.radius), -1, length))
    return radius.astype(np.int32).reshape(-1)


def _sampled(call: Call, limits: tuple[Limit, Limit], length: int) -> Float[Array, "n R"] | None:
    """The kernel at all distances of the line, from the lowest."""
    if call.proximity is None or type(call.proximity) is proximity.Gaussian:
        return None
    r = np.arange(1 - length, length)
    sampled = proximity.log_weights(call.proximity, r.reshape(1, 1, 1, -1))[0, :, 0]
    allowed = jnp.asarray(_inside(r, *limits))[None]
    return jnp.where(allowed, sampled.astype(call.dtype), -jnp.inf)


def _inside(r: Int[np.ndarray, "R"], before: Limit, after: Limit) -> Bool[Either, "R"]:
    inside = np.ones_like(r, bool)
    if before is not None:
        inside = inside & (r >= -before)
    return inside if after is None else inside & (r <= after)


def _parameters(kernel: proximity.Proximity | None, dtype: jnp.dtype) -> dict[str, Array]:
    names = {proximity.Gaussian: ("width", "offset"), proximity.Exponential: ("length",)}
    given = [jnp.asarray(getattr(kernel, n), dtype) for n in names.get(type(kernel), ())]  # pyright: ignore[reportArgumentType,reportCallIssue]
    arrays = jnp.broadcast_arrays(*(x.reshape(-1) for x in given))
    return dict(zip(names.get(type(kernel), ()), arrays, strict=True))  # pyright: ignore[reportArgumentType,reportCallIssue]


def _taken(x: Shaped[Array, "B P"], index: Int[Array, "#b P #n"]) -> Shaped[Array, "B P #n"]:
    index = jnp.clip(jnp.broadcast_to(index, (len(x), *index.shape[1:])), 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(len(x), -1), axis=1).reshape(index.shape)
