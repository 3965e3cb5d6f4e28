"""How a call is cut into blocks; all of it known while tracing.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K.
"""

import dataclasses
import enum
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attn_jax.ops import masks, proximity
from attn_jax.ops.blockwise.blocks import Index
from attn_jax.ops.call import Call
from attn_jax.ops.dropout import TILE
from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER
from attn_jax.ops.positions import regular_offset

# Entries of one block of logits, and its usual sides. On a CPU of two cores blocks of 2^20 float32
# (4 MB, what a core's share of the last cache holds) were fastest among 2^17 to 2^22.
_ENTRIES = 1 << 20
_SIDE = 512
# Rows of a block: queries times the query heads that share a key.
_ROWS = 2048
# A band of no more keys than this is one block per row.
_WIDEST_WINDOW = 2048
# Queries of a block along a band that is narrower than so many keys, else `_SIDE`, which is more:
# with more queries more of the block lies beside the band, with fewer its products are too small to
# be fast.
_BAND_SIDES = ((192, 64), (768, 128))
# Rows of such blocks are visited together, for so many rows of logits: the least for which XLA:CPU
# makes products, peak, sum and division one call of its library.
_BAND_ROWS = 4096


class Kind(enum.IntEnum):
    """What mask and reach do to a block."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


class Columns(NamedTuple):
    """Neighbouring columns of a row of blocks.

    Attributes:
      first: the first.
      end: the one behind the last.
      kind: what mask and reach do to each, where that is known while tracing.

    """

    first: Index
    end: Index
    kind: Kind | None

    @property
    def are_none(self) -> bool:
        """Whether it is known while tracing that there are none."""
        first, end = self.first, self.end
        return isinstance(first, int) and isinstance(end, int) and first >= end


@dataclasses.dataclass(frozen=True)
class Plan:
    """Blocks of a call.

    Row i of blocks holds the queries from i * queries on. Without a window it visits the columns
    j with the keys from j * keys on; with one it visits one block, with the keys from
    i * queries + window on, or as near to them as there are keys.

    Attributes:
      shape: (B, N, T, S).
      kv_heads: K.
      heads: key/value heads a block.
      queries: queries a block.
      keys: keys a block.
      rows: blocks of queries, the last of which may hold none.
      together: rows that are visited at once, a divisor of their number.
      columns: blocks of keys a row.
      window: first key of a row's only block relative to its first query; None: all columns.
      limits: least and largest key index - query index of any pair that mask and reach allow.
      offset: key position - query position of a pair of equal indices; None: not regular.
      limits_are_mask: whether the mask allows all pairs within the limits.

    """

    call: Call
    kv_heads: int
    heads: int
    queries: int
    keys: int
    rows: int
    together: int
    columns: int
    window: int | None
    limits: tuple[float, float]
    offset: int | None
    limits_are_mask: bool

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.call.heads // self.kv_heads

    @property
    def chunks(self) -> int:
        """Blocks of heads."""
        return self.kv_heads // self.heads

    @property
    def ragged(self) -> bool:
        """Whether a block may have keys that do not exist."""
        return self.window is None and self.columns * self.keys != self.call.shape[3]

    @property
    def masked_at_once(self) -> bool:
        """Whether rows are masked softmaxes of one block each, of arithmetic alone."""
        call = self.call
        softmax = call.normalizer in WITH_LOG_NORMALIZER and call.score is None
        return softmax and self.window is not None and call.mask is not None

    @property
    def span(self) -> tuple[int, int]:
        """Least and largest key index - query index of any pair in a block."""
        if self.window is None:
            return 1 - self.rows * self.queries, self.columns * self.keys - 1
        # A window at either end may lie anywhere within the keys.
        farthest = self.rows * self.queries + self.keys
        return (
            max(self.window - self.keys, -farthest) - (self.queries - 1),
            min(self.window + self.keys, farthest) + self.keys - 1,
        )

    def key_start(self, query_start: Any) -> Any:
        """The first key of a row."""
        if self.window is None:
            return 0
        return jnp.clip(query_start + self.window, 0, self.call.shape[3] - self.keys)

    def columns_of(self, query_start: Int[Array, ""]) -> list[Columns]:
        """The columns of a row within the limits, by kind where the limits tell it."""
        if self.window is not None or self.columns == 1:
            return [Columns(0, self.columns, None)]
        low, high = self.limits
        last = query_start + self.queries - 1
        first = 0 if low == -math.inf else self._column(query_start + as_index(low))
        end = self.columns if high == math.inf else self._column(last + as_index(high) + self.keys)
        alike = self.call.mask is None and not self.ragged
        if alike or not self.limits_are_mask:
            return [Columns(first, end, None)]
        # Columns whose first key the last query may attend to, and the first query their last key.
        full_first, full_end = 0, self.call.shape[3] // self.keys
        if low != -math.inf:
            full_first = self._column(last + as_index(low) + self.keys - 1)
            full_first = jnp.clip(full_first, first, end)
        if high != math.inf:
            full_end = jnp.minimum(self._column(query_start + as_index(high) + 1), full_end)
        if not isinstance(full_first, int) or not isinstance(full_end, int):
            full_end = jnp.clip(full_end, full_first, end)
        columns = [
            Columns(first, full_first, Kind.PARTIAL),
            Columns(full_first, full_end, Kind.FULL),
            Columns(full_end, end, Kind.PARTIAL),
        ]
        return [x for x in columns if not x.are_none]

    def _column(self, key: Int[Array, ""]) -> Int[Array, ""]:
        """The column of a key; the first or the one behind the last of keys that do not exist."""
        return jnp.clip(key // self.keys, 0, self.columns)

    def __str__(self) -> str:
        what = f"blocks of {self.queries} queries and {self.keys} keys, {self.heads} heads at once"
        return what if self.window is None else f"{what}, along a band"

    @classmethod
    def of(cls, call: Call) -> "Plan":
        """Choose the blocks of a call."""
        _, heads, queries, keys = call.shape
        kv_heads = call.value.shape[2]
        offset = regular_offset(call.grid.query_positions, call.grid.key_positions)
        limits = _limits(call, offset)
        group = heads // kv_heads
        unit = TILE if call.dropout_rate else 1
        banded = _band_is_wise(call, limits)
        side = _side(limits) if banded else _SIDE
        terms = (call.mask, call.proximity, call.bias, call.score)
        if all(term is None for term in terms):
            # Nothing leaves out blocks or is made for each: keys are taken half as often.
            side = 2 * _SIDE
        block_queries = _block(queries, min(side, max(1, _ROWS // group)), unit)
        if banded:
            window = int(limits[0])
            block_keys, columns = block_queries + int(limits[1]) - window, 1
        else:
            window = None
            longest = max(_SIDE, _ENTRIES // (block_queries * group) // 4)
            block_keys = _block(keys, longest, unit)
            columns = -(-keys // block_keys)
        rows = -(-queries // block_queries)
        heads_at_once = _divisor(kv_heads, _ENTRIES // (block_queries * block_keys * group))
        together = 1
        if banded and side < _SIDE:
            wanted = -(-_BAND_ROWS // (heads_at_once * group * block_queries))
            together = -(-rows // max(1, rows // wanted))
        return cls(
            call=call,
            kv_heads=kv_heads,
            heads=1 if _bias_is_full(call) else heads_at_once,
            queries=block_queries,
            keys=block_keys,
            rows=-(-rows // together) * together,
            together=together,
            columns=columns,
            window=window,
            limits=limits,
            offset=offset,
            limits_are_mask=offset is not None and _is_band(call.mask),
        )


def _block(length: int, longest: int, unit: int) -> int:
    """Blocks of nearly equal length, a multiple of the unit."""
    count = -(-length // longest)
    return -(-length // (count * unit)) * unit


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most` (1 if there is none)."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, most))


def _limits(call: Call, offset: int | None) -> tuple[float, float]:
    before, after = (math.inf, math.inf) if call.mask is None else call.mask.band()
    if call.proximity is not None:
        reach = proximity.exact_reach(call.proximity)
        before, after = min(before, reach), min(after, reach)
    if offset is None:
        return -math.inf, math.inf
    return (
        -math.inf if before == math.inf else float(math.ceil(-before - offset)),
        math.inf if after == math.inf else float(math.floor(after - offset)),
    )


def _band_is_wise(call: Call, limits: tuple[float, float]) -> bool:
    queries, keys = call.shape[2:]
    # Dropout counts its tiles from the first key.
    if call.dropout_rate or (call.bias is not None and call.bias.shape[3] > 1):
        return False
    width = limits[1] - limits[0] + 1
    side = min(queries, _side(limits))
    return 1 <= width <= _WIDEST_WINDOW - _SIDE and 2 * (width + side) <= keys


def _side(limits: tuple[float, float]) -> int:
    """Queries of a block along a band."""
    width = limits[1] - limits[0] + 1
    return next((side for bound, side in _BAND_SIDES if width < bound), _SIDE)


def _is_band(mask: masks.Mask | None) -> bool:
    """Whether the mask allows every pair that its band holds."""
    if mask is None:
        return True
    if type(mask) is masks.Both:
        return _is_band(mask.first) and _is_band(mask.second)
    # A subclass may allow something else: only the classes themselves are known.
    if type(mask) is masks.Local:
        return math.inf not in mask.band()
    return type(mask) is masks.Causal


def _bias_is_full(call: Call) -> bool:
    return call.bias is not None and min(call.bias.shape[2:]) > 1


def as_index(limit: float) -> int:
    """A limit as an index; infinite ones are beyond all."""
    far = np.iinfo(np.int32).max // 2
    return int(max(-far, min(far, limit)))
