"""Attention without content over a band of known width: time B N T (band + block) D.

On regularly spaced positions the weights depend on r alone, so the [C, C] blocks on one block
diagonal are all the same matrix: for every diagonal in the band, one product of that matrix with
all blocks of values. The denominator is the same product with the key mask. There is no T x S.

Gaussian and exponential weights never end. Their band holds all but 2^-24 of a row's mass if some
key is near the row's peak. That, and that no denominator underflows, is checked on every call;
otherwise all rows take the exact path, dense weights for a block of queries at a time.

NaN and inf: keys that the mask hides from every query reach nothing. Those that it hides from some
queries only, or that only the reach excludes, may reach other queries of their block.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, D value width, C block,
I query blocks, M key blocks a query block; b, n: B or 1, N or 1; r = key - query position.
"""

import contextlib
import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from attn_jax.ops import dense, masks, proximity
from attn_jax.ops.call import Call
from attn_jax.ops.lanes import any_in_all_lanes
from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize
from attn_jax.ops.positions import Either, regular_offset

_BLOCK = 128
# A row is done by the band if a key's log-weight is this close to the peak.
_NEAR_AUTOMATIC = 8.0
_NEAR_EXACT = 60.0


def available() -> bool:
    """Whether this machine can run it."""
    return True


def unsupported(call: Call) -> str | None:
    """Why it can't run the call, or None."""
    if call.query is not None:
        return "it takes no query and key"
    if call.bias is not None or call.score is not None:
        return "it takes no bias and no score function"
    if call.dropout_rate:
        return "it has no dropout"
    if call.normalizer in ("sparsemax", "entmax15"):
        return f"it has no {call.normalizer}"
    if _offset(call) is None:
        return "positions must be known while tracing, and one step apart"
    if _mask_parts(call.mask) is None:
        return "its masks are Lengths, Causal and Local with Python numbers, joined by &"
    if math.inf in _band(call).ends:
        return "neither a kernel of known reach nor a Local mask bounds the band"
    return None


def unwise(call: Call) -> str | None:
    """Why another implementation is probably faster, or None."""
    band = _band(call)
    queries, keys = call.shape[2:]
    if min(queries, keys) <= 2 * _BLOCK or 4 * sum(band.ends) > keys:
        return "the band is no small part of the keys"
    if band.automatic and any(isinstance(m, masks.Lengths) for m in _mask_parts(call.mask) or ()):
        return "rows far from every allowed key would leave the band"
    return None


def _offset(call: Call) -> int | None:
    return regular_offset(call.grid.query_positions, call.grid.key_positions)


class _Band(NamedTuple):
    """Keys with -before <= r <= after; `automatic` if there is (negligible) weight beyond."""

    before: float
    after: float
    automatic: bool

    @property
    def ends(self) -> tuple[float, float]:
        return self.before, self.after


def _band(call: Call) -> _Band:
    before, after = (math.inf, math.inf) if call.mask is None else call.mask.band()
    kernel = call.proximity
    if kernel is None:
        return _Band(before, after, False)
    reach = proximity.exact_reach(kernel)
    before, after = min(before, reach), min(after, reach)
    negligible = math.log(call.shape[3] + 1) - math.log(jnp.finfo(call.dtype).eps / 2)
    support = proximity.known_support(kernel, negligible + _NEAR_AUTOMATIC)
    # A logit that is itself the weight only grows with the distance.
    if support is None or support >= max(before, after) or call.normalizer == "linear":
        return _Band(before, after, False)
    support = float(math.ceil(support))
    return _Band(min(before, support), min(after, support), True)


def _mask_parts(mask: masks.Mask | None) -> tuple[masks.Mask, ...] | None:
    """The masks that `&` joins, or None if one of them doesn't fit a band."""
    if mask is None:
        return ()
    if type(mask) is masks.Both:
        first, second = _mask_parts(mask.first), _mask_parts(mask.second)
        return None if first is None or second is None else first + second
    # A subclass may allow something else: only the classes themselves are known.
    static_local = type(mask) is masks.Local and math.inf not in mask.band()
    return (mask,) if type(mask) in (masks.Causal, masks.Lengths) or static_local else None


def run(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Output and log-normaliser (None unless asked for)."""
    if 0 in (*call.shape, call.value.shape[3]):
        return dense.run(call)
    with _evaluated_if_known(call):
        diagonals = _Diagonals.of(call)
        outside = _any_row_outside(call, diagonals)
    if not isinstance(outside, Tracer):
        return _exact(call) if outside else _banded(call, diagonals)
    return lax.cond(
        any_in_all_lanes(outside),
        jax.checkpoint(lambda: _exact(call)),
        jax.checkpoint(lambda: _banded(call, diagonals)),
    )


def _evaluated_if_known(call: Call) -> contextlib.AbstractContextManager:
    """Where nothing depends on data, settle while tracing whether the exact path is needed."""
    kernel = call.proximity
    known = kernel is None or (proximity.is_built_in(kernel) and proximity.is_known(kernel))
    lengths = [m for m in _mask_parts(call.mask) or () if isinstance(m, masks.Lengths)]
    data = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(lengths))
    return jax.ensure_compile_time_eval() if known and not data else contextlib.nullcontext()


class _Diagonals(NamedTuple):
    """What the query blocks share.

    Attributes:
      log_weights: of the M key blocks that a query block sees, -inf outside the band.
      first: index of the first of these keys, less the index of the block's first query.
      automatic: whether there is weight beyond the band.

    """

    log_weights: Float[Array, "M 1 n C C"]
    first: int
    automatic: bool

    @classmethod
    def of(cls, call: Call) -> "_Diagonals":
        """Evaluate the kernel on the diagonals of the band."""
        queries, keys = call.shape[2:]
        offset = _offset(call)
        assert offset is not None
        band = _band(call)
        lowest = int(max(-band.before, offset - (queries - 1)))
        highest = int(max(lowest, min(band.after, offset + keys - 1)))
        size = min(_BLOCK, queries)
        count = -(-(size + highest - lowest) // size)
        r = np.arange(count * size)[None] + lowest - np.arange(size)[:, None]
        log_weights = jnp.zeros((1, size, count * size), call.dtype)
        if call.proximity is not None:
            log_weights = proximity.log_weights(call.proximity, r[None, None]).astype(call.dtype)[0]
        inside = (r >= -band.before) & (r <= band.after)
        banded = jnp.where(inside[None], log_weights, -jnp.inf)
        blocks = jnp.moveaxis(banded.reshape(-1, size, count, size), 2, 0)
        return cls(blocks[:, None], lowest - offset, band.automatic)


def _banded(
    call: Call, diagonals: _Diagonals
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Output and log-normaliser by the band alone."""
    weights, shift = _weights(call.normalizer, diagonals.log_weights)
    key_mask, query_mask = _length_masks(call)
    value = jnp.where(jnp.moveaxis(key_mask, 3, 1), dense.wide_value(call), 0)
    mixed = _product(weights, value, diagonals.first, call.shape[2])
    present = jnp.moveaxis(key_mask, 3, 1).astype(call.dtype)
    allowed = (diagonals.log_weights > -jnp.inf).astype(call.dtype)
    empty = (_product(allowed, present, diagonals.first, call.shape[2]) == 0) | ~query_mask
    log_normalizer = None
    if shift is not None:
        total = _product(weights, present, diagonals.first, call.shape[2])
        total = jnp.where(empty, 1, total + _zero_logit(call, shift))
        mixed = mixed / total
        if call.return_log_normalizer:
            log_normalizer = _log_normalizer(call, shift + jnp.log(total), empty)
    mixed = jnp.where(empty, 0, mixed)
    batch, heads, queries, _ = call.shape
    mixed = jnp.broadcast_to(mixed, (batch, heads, queries, mixed.shape[-1]))
    return jnp.swapaxes(mixed, 1, 2).astype(call.value.dtype), log_normalizer


def _weights(
    normalizer: str, log_weights: Float[Array, "M 1 n C C"]
) -> tuple[Float[Array, "M 1 n C C"], Float[Array, "1 n 1 1"] | None]:
    """Weights before the division, and the shift of the exponent; None if nothing is divided."""
    if normalizer not in WITH_LOG_NORMALIZER:
        return normalize(normalizer, log_weights).weights, None
    shift = _peak(log_weights)
    if normalizer == "softmax_one":
        shift = jnp.maximum(shift, 0)
    return jnp.exp(log_weights - shift), shift[0]


def _peak(log_weights: Float[Array, "M 1 n C C"]) -> Float[Array, "1 1 n 1 1"]:
    """The largest log-weight of a head, 0 if there is none. It cancels: no gradient passes."""
    peak = lax.stop_gradient(log_weights).max((0, 3, 4), keepdims=True)
    return jnp.where(peak == -jnp.inf, 0, peak)


def _zero_logit(call: Call, shift: Float[Array, "1 n 1 1"]) -> Float[Array, "1 n 1 1"]:
    return jnp.exp(-shift) if call.normalizer == "softmax_one" else jnp.zeros_like(shift)


def _log_normalizer(
    call: Call, rows: Float[Array, "#b #n T 1"], empty: Bool[Array, "#b #n T 1"]
) -> Float[Array, "B T N"]:
    rows = jnp.where(empty, 0 if call.normalizer == "softmax_one" else -jnp.inf, rows)
    return jnp.swapaxes(jnp.broadcast_to(rows[..., 0], call.shape[:3]), 1, 2)


def _product(
    weights: Float[Array, "M 1 n C C"],
    value: Float[Array, "b S K W"],
    first: int,
    queries: int,
) -> Float[Array, "b m T W"]:
    """Banded weights times values: one product per block diagonal, for all query blocks at once."""
    count, size = weights.shape[0], weights.shape[-1]
    blocks = -(-queries // size)
    batch, keys, heads, width = value.shape
    high = (blocks + count - 1) * size + first - keys
    padded = lax.pad(
        value, jnp.zeros((), value.dtype), [(0, 0, 0), (-first, high, 0), (0, 0, 0), (0, 0, 0)]
    )
    tiles = padded.reshape(batch, -1, size, heads, width)
    products = [
        dense.product(
            weights[m],
            tiles[:, m : m + blocks].reshape(batch * blocks, size, heads, width),
            max(weights.shape[2], heads),
        )
        for m in range(count)
    ]
    total = functools.reduce(operator.add, products)
    rows = jnp.swapaxes(total.reshape(batch, blocks, -1, size, width), 1, 2)
    return rows.reshape(batch, -1, blocks * size, width)[:, :, :queries]


def _length_masks(call: Call) -> tuple[Bool[Either, "#b 1 1 S"], Bool[Either, "#b 1 T 1"]]:
    """Which keys the mask shows to some query, and which queries its `Lengths` leave."""
    lengths = [m for m in _mask_parts(call.mask) or () if isinstance(m, masks.Lengths)]
    before, after = (math.inf, math.inf) if call.mask is None else call.mask.band()
    place = np.arange(call.shape[3]) + (_offset(call) or 0)
    keys = ((place >= -before) & (place <= call.shape[2] - 1 + after)).reshape(1, 1, 1, -1)
    queries = np.ones((1, 1, call.shape[2], 1), bool)
    for mask in lengths:
        keys = keys & dataclasses.replace(mask, query=None).allowed(call.grid)
        queries = queries & dataclasses.replace(mask, key=None).allowed(call.grid)
    return keys, queries


def _any_row_outside(call: Call, diagonals: _Diagonals) -> Bool[Array, ""]:
    """Whether the band alone would be wrong for a query.

    So it is for a query without a key near the peak of the band's log-weights: its denominator may
    underflow, or weight beyond the band count. A band that is not automatic is right for a query
    without any key in it.
    """
    key_mask, query_mask = _length_masks(call)
    present = jnp.moveaxis(key_mask, 3, 1).astype(jnp.float32)
    log_weights = lax.stop_gradient(diagonals.log_weights)
    margin = _NEAR_AUTOMATIC if diagonals.automatic else _NEAR_EXACT
    near = (log_weights >= _peak(log_weights) - margin) & (log_weights > -jnp.inf)
    outside = _product(near.astype(jnp.float32), present, diagonals.first, call.shape[2]) == 0
    if not diagonals.automatic:
        allowed = (log_weights > -jnp.inf).astype(jnp.float32)
        outside &= _product(allowed, present, diagonals.first, call.shape[2]) > 0
    return (outside & query_mask).any()


def _exact(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Output and log-normaliser by dense weights, a block of queries at a time."""
    queries = call.shape[2]
    count = -(-queries // _BLOCK)

    def block(index: Array) -> tuple[Array, Array | None]:
        rows = jnp.minimum(index * _BLOCK + jnp.arange(_BLOCK), queries - 1)
        positions = jnp.take(jnp.asarray(call.grid.query_positions), rows, axis=1)
        grid = dataclasses.replace(call.grid, query_positions=positions, query_index=rows)
        return dense.run(dataclasses.replace(call, grid=grid))

    def joined(stacked: Array) -> Array:
        whole = jnp.moveaxis(stacked, 0, 1)
        return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :queries]

    return jax.tree.map(joined, lax.map(jax.checkpoint(block), jnp.arange(count)))
