"""The loops over the blocks of a call: sequences, rows of queries, heads, columns of keys.

Letters: B batch, N query heads, D value width; a block has h key/value heads of g query heads
each, t queries, m = g t rows of logits; C blocks of heads, I rows of blocks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attn_jax.ops.blockwise import operands
from attn_jax.ops.blockwise.blocks import Blocked, Index, carried, over
from attn_jax.ops.blockwise.operands import Arrays, Operands
from attn_jax.ops.blockwise.partition import Kind, Plan
from attn_jax.ops.blockwise.tile import Place


class Results(NamedTuple):
    """What the rows of blocks give.

    Attributes:
      output: the mixed values, [B, I, t, N, D]; of one block of heads [h, m, D].
      shift: the largest logit, finite, [B, I, C, h, m, 1]; of one block [h, m, 1]. Its
        derivative counts as zero: that of the log-normaliser, shift + log_total, is all in the
        other.
      log_total: logarithm of the sum of exp(logit - shift), likewise.

    """

    output: Any
    shift: Any
    log_total: Any


class Column(NamedTuple):
    """One block of a row.

    Attributes:
      place: of the block.
      operands: of the block.
      moving: their tangents, of those that have one.
      kind: what mask and reach do to it, where that is known while tracing.

    """

    place: Place
    operands: Operands
    moving: Operands
    kind: Kind | None


class Chunk(NamedTuple):
    """A row of blocks, and some of its heads.

    Attributes:
      plan: the blocks.
      place: of the first column.
      operands: of all columns.
      moving: their tangents, of those that have one.
      results: what is known of the results.

    """

    plan: Plan
    place: Place
    operands: Operands
    moving: Operands
    results: Results | None

    def each_column(self, visit: Callable[[Any, Column], Any], state: Any) -> Any:
        """The state after visit(state, column) of every column in turn.

        Without tangents, columns beyond the limits of mask and reach are left out: such a loop
        can't be transposed. With tangents, nothing of a column is kept for the backward pass; along
        a band `each_chunk` sees to it for the row as a whole.
        """
        blocks, size = (self.operands, self.moving), self.plan.columns
        if self.moving:
            if self.plan.window is None:
                visit = _recomputed(visit)
            step = functools.partial(self._step, visit, None)
            return carried("k", size, step, state, blocks)
        for columns in self.plan.columns_of(self.place.query_start):
            step = functools.partial(self._step, visit, columns.kind)
            between = columns.first, columns.end
            state = carried("k", size, step, state, blocks, between)
        return state

    def _step(
        self,
        visit: Callable[[Any, Column], Any],
        kind: Kind | None,
        state: Any,
        column: Index,
        blocks: tuple[Operands, Operands],
    ) -> Any:
        key_start = self.place.key_start + jnp.asarray(column, jnp.int32) * self.plan.keys
        return visit(state, Column(self.place._replace(key_start=key_start), *blocks, kind))


def each_chunk(
    plan: Plan,
    body: Callable[[Chunk], Results],
    arrays: Arrays,
    moving: Arrays | None = None,
    results: Results | None = None,
) -> Results:
    """body(chunk) for all rows of blocks and all heads, stacked.

    Args:
      plan: the blocks.
      body: gives the results of one block of heads.
      arrays: of the call.
      moving: their tangents, of those that have one.
      results: known results, for the chunks.

    """
    cut = (operands.cut(x, plan, late=not moving) for x in (arrays, moving or {}))
    known = None if results is None else Results(*[Blocked(x, "bq") for x in results])

    def of_sequence(b: Index, blocked: Any) -> Any:
        of_row = functools.partial(_row, plan, body, _index(b))
        if moving and plan.window is not None:
            # With the cut: otherwise the keys of every row, cut out and transposed, would be kept.
            of_row = _recomputed(of_row)
        if plan.together == 1:
            return over("q", plan.rows, of_row, blocked)

        def of_group(i: Index, blocked: Any) -> Any:
            def of_its_row(r: Index, blocked: Any) -> Results:
                return of_row(_index(i) * plan.together + r, blocked)

            return over("r", plan.together, of_its_row, blocked)

        groups = over("q", plan.rows // plan.together, of_group, blocked)
        return jax.tree.map(lambda x: x.reshape(plan.rows, *x.shape[2:]), groups)

    return over("b", plan.call.shape[0], of_sequence, (*cut, known))


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep nothing of it for the backward pass: it is computed again there."""
    return jax.checkpoint(function, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]


def _index(i: Index) -> Array:
    return jnp.asarray(i, jnp.int32)


def _row(
    plan: Plan,
    body: Callable[[Chunk], Results],
    sequence: Array,
    row: Index,
    blocked: tuple[Operands, Operands, Results | None],
) -> Results:
    query_start = _index(row) * plan.queries
    key_start = _index(plan.key_start(query_start))
    arrays, moving, known = blocked
    arrays, moving = (operands.of_row(x, query_start, key_start, plan) for x in (arrays, moving))
    if known is not None:
        output = operands.by_head(known.output.array, plan)
        rest = (known.shift.array, known.log_total.array)
        known = Results(*[Blocked(x, "h") for x in (output, *rest)])

    def of_chunk(c: Index, blocked: Any) -> Results:
        arrays, moving, known = blocked
        results = None if known is None else Results(*[x.array for x in known])
        place = Place(sequence, _index(c), query_start, key_start)
        return body(Chunk(plan, place, arrays, moving, results))

    results = over("h", plan.chunks, of_chunk, (arrays, moving, known))
    return results._replace(output=operands.by_query(results.output, plan))
