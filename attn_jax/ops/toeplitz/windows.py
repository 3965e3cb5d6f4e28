"""Sums over windows by blocks of a line, as a primitive of JAX whose transpose is one again.

A window is what its first block holds from its start on, the whole blocks between, and what its
last block holds up to its end. Nothing is taken away again, so that neither values of a large mean
nor large values outside cost precision. Blocks are so small that their parts are sums of slices.

Letters: A sequences, P positions, W channels, I blocks of L positions, J blocks with those around
the line, U = I L; a: A or 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attn_jax.ops.primitives import Run, linear
from attn_jax.ops.toeplitz.shifted import padded, stored, sum_of

# Positions a block: L.
BLOCK = 8


def window_sum(
    x: Float[Array, "A P W"],
    before: Int[Array, "a"] | None,
    after: Int[Array, "a"] | None,
    farthest: int,
) -> Float[Array, "A P W"]:
    """y[p] = sum of x from p - before to p + after, linear in x, which is zero outside.

    Args:
      x: what to add up.
      before: None for no start.
      after: None for no end.
      farthest: neither is farther, on either side.

    """
    if before is None and after is None:
        return jnp.broadcast_to(x.sum(1, keepdims=True), x.shape)
    sides = before is not None, after is not None
    limits = (jnp.zeros(1, jnp.int32) if z is None else z for z in (before, after))
    return _window_sum(x, *limits, farthest=farthest, sides=sides)


class _Blocks(NamedTuple):
    """The blocks of a line, and how much of what is around it is stored with it.

    What is read for a query whose block is outside of the line is not used. So where there would be
    more around the line than on it, the line is stored twice instead.
    """

    length: int
    farthest: int

    @property
    def count(self) -> int:
        """On the line: I."""
        return -(-self.length // BLOCK)

    @property
    def whole(self) -> int:
        """Their positions: U."""
        return self.count * BLOCK

    @property
    def spare(self) -> int:
        """How many blocks there are between a query's and one that it may need."""
        return self.farthest // BLOCK + 1

    @property
    def twice(self) -> bool:
        """Whether the line is stored twice."""
        return 2 * self.spare > self.count

    @property
    def ahead(self) -> int:
        """Rows stored before the line."""
        return BLOCK * (1 if self.twice else 1 + self.spare)

    def rows(self, x: Float[Array, "A P W"]) -> Float[Array, "A Q V"]:
        """The line and what is around it."""
        if not self.twice:
            return stored(x, self.ahead, self.ahead + self.whole - self.length, 2 * BLOCK)
        x = stored(x, 0, self.whole - self.length, 2 * BLOCK)[:, : self.whole]
        return jnp.concatenate([x[:, -BLOCK:], x, x, x[:, :BLOCK]], 1)

    def shifted(
        self, rows: Float[Array, "A Q V"], by: Int[Array, ""], channels: int
    ) -> Float[Array, "A U W"]:
        """Up to a block's length more to either side than an end of a window."""
        corner = jnp.stack([0, self.ahead + by, 0])
        return lax.dynamic_slice(rows, corner, (len(rows), self.whole, channels))

    def totals(self, rows: Float[Array, "A Q V"], channels: int) -> Float[Array, "A I W"]:
        """Of every block."""
        blocks = rows[:, self.ahead : self.ahead + self.whole, :channels]
        blocks = blocks.reshape(len(rows), self.count, BLOCK, channels)
        return sum_of([blocks[:, :, place] for place in range(BLOCK)])


class _End(NamedTuple):
    """A window's first or last position, so far from each query."""

    by: Int[Array, ""]

    @property
    def blocks(self) -> Int[Array, ""]:
        """From a query's block to that position's, if the query is the first of its block."""
        return self.by // BLOCK

    @property
    def carries(self) -> Bool[Array, "L 1"]:
        """Places of queries for which it lies one block further on."""
        return jnp.arange(BLOCK)[:, None] + self.by % BLOCK >= BLOCK

    def block(self, count: int) -> Int[Array, "U"]:
        """In which block it lies, of queries of so many blocks."""
        return (jnp.arange(count * BLOCK) + self.by) // BLOCK

    def place(self, count: int) -> Int[Array, "U"]:
        """Where in its block it lies."""
        return (jnp.arange(count * BLOCK) + self.by) % BLOCK


def _summed(
    x: Array, before: Array, after: Array, *, run: Run, farthest: int, sides: tuple[bool, bool]
) -> Array:
    def of(x: Array, before: Array, after: Array) -> Array:
        start = _End(-before) if sides[0] else None
        return _by_blocks(x, start, _End(after) if sides[1] else None, farthest, run)

    if len(before) == len(after) == 1:
        return of(x, before[0], after[0])
    each = (jnp.broadcast_to(limit, len(x)) for limit in (before, after))
    return lax.map(lambda lane: of(lane[0][None], *lane[1:])[0], (x, *each))


def _by_blocks(
    x: Float[Array, "A P W"], start: _End | None, end: _End | None, farthest: int, run: Run
) -> Float[Array, "A P W"]:
    sequences, length, channels = x.shape
    blocks = _Blocks(length, farthest)
    count = blocks.count
    rows = run(blocks.rows, x)
    terms = []

    def add(end: _End, step: int, inside: Callable[[int], Bool[Array, "#U"]]) -> None:
        """Rows of the block with a window's end, from there on to one side."""
        block = end.block(count)
        first = end.by % blocks.whole if blocks.twice else end.by
        for d in range(BLOCK):
            used = (block >= 0) & (block < count) & inside(d)
            moved = blocks.shifted(rows, first + step * d, channels)
            terms.append(jnp.where(used[None, :, None], moved, 0))

    if start is not None:
        place = start.place(count)
        held = BLOCK if end is None else end.by - start.by + 1
        add(start, 1, lambda d: (d < BLOCK - place) & (d < held))
    if end is not None:
        place_of_end = end.place(count)
        apart = True if start is None else start.block(count) < end.block(count)
        add(end, -1, lambda d: (d <= place_of_end) & apart)
    totals = run(functools.partial(blocks.totals, channels=channels), rows)
    between = _whole_blocks(totals, start, end, blocks.spare, run)
    y = sum_of(terms).reshape(sequences, count, BLOCK, channels) + between
    return y.reshape(sequences, blocks.whole, channels)[:, :length]


def _whole_blocks(
    totals: Float[Array, "A I W"], start: _End | None, end: _End | None, spare: int, run: Run
) -> Float[Array, "A I #L W"]:
    """What lies between the blocks with a window's ends."""
    count = totals.shape[1]

    def at(x: Float[Array, "A J W"], blocks: Int[Array, ""]) -> Float[Array, "A I 1 W"]:
        return lax.dynamic_slice_in_dim(x, spare + blocks, count, 1)[:, :, None]

    def of_earlier(x: Float[Array, "A I W"]) -> Float[Array, "A J W"]:
        return jnp.cumsum(padded(x, 1, spare + 1, spare), 1)

    if start is None:
        assert end is not None
        x = run(of_earlier, totals)
        return jnp.where(end.carries, at(x, end.blocks + 1), at(x, end.blocks))
    if end is None:
        x = run(lambda x: jnp.flip(of_earlier(jnp.flip(x, 1)), 1), totals)
        return jnp.where(start.carries, at(x, start.blocks + 2), at(x, start.blocks + 1))
    x = padded(totals, 1, spare, spare + 1)
    number = end.blocks - start.blocks - 2
    between = _runs(x, spare + start.blocks + 2, number, count, 2 * spare, run)[:, :, None]
    # Besides, for some queries: the block next to the start's, and the last before the end's.
    first = ~start.carries & ((number >= 0) | (number == -1) & end.carries)
    between += jnp.where(first, at(x, start.blocks + 1), 0)
    return between + jnp.where((number >= 0) & end.carries, at(x, end.blocks), 0)


def _runs(
    x: Float[Array, "A J W"],
    start: Int[Array, ""],
    number: Int[Array, ""],
    length: int,
    most: int,
    run: Run,
) -> Float[Array, "A I W"]:
    """y[p] = sum of `number` entries of x from start + p on, by runs of powers of two.

    None where the number is negative.
    """
    number = jnp.maximum(number, 0)
    total = jnp.zeros((len(x), length, x.shape[2]), x.dtype)

    def added(total: Array, x: Array, start: Array, taken: Array) -> Array:
        return total + jnp.where(taken == 1, lax.dynamic_slice_in_dim(x, start, length, 1), 0)

    def doubled(x: Array, by: int) -> Array:
        return x + padded(x, 1, -by, by)

    for bit in range(most.bit_length()):
        taken = (number >> bit) & 1
        total = run(added, total, x, start, taken)
        start = start + (taken << bit)
        if (1 << bit) < x.shape[1]:
            x = run(functools.partial(doubled, by=1 << bit), x)
    return total


_window_sum = linear(
    "attn_jax_window_sum",
    _summed,
    lambda x, *_, **__: x,
    lambda cotangent, before, after, *, shape, farthest, sides: _window_sum(
        cotangent, after, before, farthest=farthest, sides=sides[::-1]
    ),
    apart=True,
)
