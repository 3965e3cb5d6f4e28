r"""Forward pass over the blocks, and its derivative rule.

With logits z, shift c (the largest logit of a row), l = log sum_j exp(z_ij - c_i) and weights
p_ij = exp(z_ij - c_i - l_i), the tangents of output and log-normaliser are

.. math::
  \dot y_i = \sum_j p_{ij} (\dot z_{ij} v_j + \dot v_j) - y_i \dot l_i, \quad
  \dot l_i = \sum_j p_{ij} \dot z_{ij}

Where a row is one block, c and l are computed again with the weights, and nothing of the forward
pass is kept.

They are computed block by block in ordinary operations, linear in the tangents, and nothing of a
block is kept (`loops`). So JAX's own transposition makes the backward pass of FlashAttention of it
(Dao et al. 2022), without anything of size T S; and as the rule is made of functions that have
rules, derivatives of any order and mode follow.

Letters: B batch, T queries, N query heads, D value width; a block has h key/value heads of g query
heads each, t queries, m = g t rows of logits, s keys.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from attn_jax.ops.blockwise import operands, tile
from attn_jax.ops.blockwise.blocks import Blocked
from attn_jax.ops.blockwise.loops import Chunk, Column, Results, each_chunk
from attn_jax.ops.blockwise.operands import Arrays
from attn_jax.ops.blockwise.partition import Plan
from attn_jax.ops.blockwise.program import Block, Logits, Pairs, Program
from attn_jax.ops.blockwise.tile import Place
from attn_jax.ops.lanes import any_in_all_lanes
from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, finite_peak, normalize, positive
from attn_jax.ops.varying import varying_as

Row = Float[Array, "h m 1"]
Mixed = Float[Array, "h m D"]


def attend(plan: Plan, arrays: Arrays) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """Output and log-normaliser (which means nothing for normalisers that have none)."""
    program, arrays = _closed(plan, arrays)
    output, shift, log_total = _core(program)(arrays)
    by_query = jax.vmap(jax.vmap(functools.partial(operands.by_query, plan=plan)))
    return _whole(output, plan), _whole(by_query(shift + log_total), plan)[..., 0]


def attend_quickly(plan: Plan, arrays: Arrays) -> Float[Array, "B T N D"]:
    """The output, with what a mask hides hidden in a quicker way, unless it turns out wrong.

    Only NaN passes a minimum with -inf: the sum of products that overflow, of keys that the mask
    hides, say. Its weight is NaN, and so is its row, in all columns: then all is computed again.
    """
    program, arrays = _closed(plan, arrays)
    core = _core(program)

    @jax.custom_jvp
    def quick(arrays: Arrays) -> Array:
        output = _forward(program._replace(by_minimum=True), arrays).output
        wrong = any_in_all_lanes(jnp.isnan(output[..., 0]))
        return lax.cond(wrong, lambda: core(arrays).output, lambda: output)

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return quick(*primals), _tangents(program, primals[0], tangents[0], None).output

    quick.defjvp(derivative, symbolic_zeros=True)
    return _whole(quick(arrays), plan)


def _closed(plan: Plan, arrays: Arrays) -> tuple[Program, Arrays]:
    program, closed = Program.of(plan, arrays)
    return program, arrays | closed


def _core(program: Program) -> Callable[[Arrays], Results]:
    core = jax.custom_jvp(functools.partial(_forward, program))
    core.defjvp(functools.partial(_derivative, core, program), symbolic_zeros=True)
    return core


def _whole(rows: Float[Array, "B I t *rest"], plan: Plan) -> Float[Array, "B T *rest"]:
    batch, _, queries, _ = plan.call.shape
    return rows.reshape(batch, -1, *rows.shape[3:])[:, :queries]


def _forward(program: Program, arrays: Arrays) -> Results:
    sums = _softmax_chunk if _is_softmax(program) else _pointwise_chunk
    return each_chunk(program.plan, lambda c: sums(program, _with_ready_queries(c)), arrays)


def _with_ready_queries(chunk: Chunk) -> Chunk:
    """Cleaned and scaled once, not for every block of keys."""
    arrays = {n: x.block for n, x in chunk.operands.items() if n in ("query", "scale")}
    ready = tile.scaled(tile.finite(arrays, chunk.plan, "query"), chunk.plan)
    return chunk._replace(operands=chunk.operands | {n: Blocked(x) for n, x in ready.items()})


def _is_softmax(program: Program) -> bool:
    return program.plan.call.normalizer in WITH_LOG_NORMALIZER


def _softmax_chunk(program: Program, chunk: Chunk) -> Results:
    """Sums over exp(logit - shift), where the shift grows from block to block.

    The logit 0 of softmax_one, of a value of zero, is there before the first.
    """
    zero, mixed = _zeros(chunk)
    has_zero_logit = program.plan.call.normalizer == "softmax_one"
    alone = chunk.plan.columns == 1 and not has_zero_logit

    def visit(state: Any, column: Column) -> Any:
        def add(state: Any, block: Block, pairs: Pairs | None) -> tuple[Row, Row, Mixed]:
            before, total, mixed = state
            block = tile.finite(block, program.plan, "key", "value")
            logits = program.logits(block, column.place, pairs)
            peak = finite_peak(logits)
            peak = peak if alone else jnp.maximum(before, peak)
            weights = jnp.exp(logits - peak)
            more = weights.sum(-1, keepdims=True)
            added = _mix(program, weights, block["value"], block, column.place)
            if alone:
                return varying_as(peak, before), varying_as(more, total), added
            rescale = jnp.exp(before - peak)
            return peak, total * rescale + more, mixed * rescale.astype(mixed.dtype) + added

        return program.visit(column, add, state)

    lowest = zero + jnp.finfo(zero.dtype).min
    first = (zero, zero + 1, mixed) if has_zero_logit else (lowest, zero, mixed)
    peak, total, mixed = chunk.each_column(visit, first)
    divisor = positive(total)
    log_total = jnp.where(total == 0, -jnp.inf, jnp.log(divisor))
    return Results(mixed / divisor.astype(mixed.dtype), peak, log_total)


def _pointwise_chunk(program: Program, chunk: Chunk) -> Results:
    """Sums of weights that each follow from their own logit."""
    zero, mixed = _zeros(chunk)

    def visit(mixed: Mixed, column: Column) -> Mixed:
        def add(mixed: Mixed, block: Block, pairs: Pairs | None) -> Mixed:
            block = tile.finite(block, program.plan, "key", "value")
            weights = _weights_of(program, program.logits(block, column.place, pairs))
            return mixed + _mix(program, weights, block["value"], block, column.place)

        return program.visit(column, add, mixed)

    return Results(chunk.each_column(visit, mixed), zero, zero)


def _weights_of(program: Program, logits: Logits) -> Logits:
    return normalize(program.plan.call.normalizer, logits).weights


def _zeros(chunk: Chunk) -> tuple[Row, Mixed]:
    """Of each row of logits one number and one value.

    Made from the operands, so that under shard_map the sums vary over the same axes throughout.
    """
    plan = chunk.plan
    leaves = jax.tree.leaves((chunk.operands, chunk.moving))
    zero = jnp.zeros((), plan.call.dtype)
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            zero += jnp.where(False, leaf[(0,) * leaf.ndim], 0).astype(zero.dtype)
    value = chunk.operands["value"].array
    shape = (plan.heads, plan.group * plan.queries)
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    width = chunk.plan.call.value.shape[3]
    mixed = jnp.zeros((*shape, width), dtype) + zero.astype(dtype)
    return jnp.zeros((*shape, 1), plan.call.dtype) + zero, mixed


def _mix(
    program: Program,
    weights: Logits,
    value: Float[Array, "h s D"],
    block: Block,
    place: Place,
) -> Mixed:
    """Mix values (or their tangents) in the values' dtype, accumulated in float32 or wider."""
    weights = program.dropped(weights, block, place).astype(value.dtype)
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    return jnp.einsum("hts,hsd->htd", weights, value, preferred_element_type=dtype)


def _derivative(
    core: Callable[[Arrays], Results],
    program: Program,
    primals: tuple[Arrays],
    tangents: tuple[dict[str, Any]],
) -> tuple[Results, Results]:
    """Results and their tangents, for `jax.custom_jvp`.

    Under shard_map the sums of a row vary as all operands do, also with what they do not depend on.
    """
    results = core(*primals)
    moved = _tangents(program, primals[0], tangents[0], results)
    return results, Results(*map(varying_as, moved, results))


def _tangents(
    program: Program, arrays: Arrays, dots: dict[str, Any], results: Results | None
) -> Results:
    """Tangents of the results; those of the arrays that are zero cost nothing.

    Args:
      program: of the call.
      arrays: of the call.
      dots: their tangents.
      results: of the call; None if all rows are one block, which needs none.

    """
    moving = {
        name: dot
        for name, dot in dots.items()
        if not isinstance(dot, SymbolicZero) and dot.dtype != jax.dtypes.float0
    }
    # Here and not block by block, of each of which the backward pass would keep a cleaned copy.
    finite = functools.partial(_finite, program.plan)
    primals = {name: arrays[name] for name in moving}
    arrays, moving = finite(arrays), jax.jvp(finite, (primals,), (moving,))[1]
    # Row by row: the transpose of slices of several rows at once would be a scatter.
    plan = dataclasses.replace(program.plan, together=1)
    if not _is_softmax(program):
        chunk = _pointwise_tangents
    elif plan.columns == 1:
        chunk, results = _row_tangents, None
    else:
        chunk = _softmax_tangents
    return each_chunk(plan, functools.partial(chunk, program), arrays, moving, results)


def _finite(plan: Plan, arrays: Arrays) -> Arrays:
    return tile.finite(arrays, plan, "query", "key", "value")


def _softmax_tangents(program: Program, chunk: Chunk) -> Results:
    """Sums over exp(logit - shift) times the tangents, divided by the total in the end."""
    assert chunk.results is not None
    output, shift, log_total = chunk.results

    def visit(state: Any, column: Column) -> Any:
        def add(state: tuple[Row, Mixed], block: Block, pairs: Pairs | None) -> tuple[Row, Mixed]:
            total, mixed = state
            logits, moved = _moved_logits(program, column, block, pairs)
            weights = jnp.exp(logits - shift)
            if moved is not None:
                moved = weights * moved
                total += moved.sum(-1, keepdims=True)
                mixed += _mix(program, moved, block["value"], block, column.place)
            if "value" in column.moving:
                mixed += _mix(program, weights, column.moving["value"].block, block, column.place)
            return total, mixed

        return program.visit(column, add, state)

    total, mixed = chunk.each_column(visit, _zeros(chunk))
    empty = log_total == -jnp.inf
    share = jnp.where(empty, 0, jnp.exp(-jnp.where(empty, 0, log_total)))
    total, mixed = total * share, mixed * share.astype(mixed.dtype)
    return Results(mixed - output * total.astype(mixed.dtype), jnp.zeros_like(total), total)


def _row_tangents(program: Program, chunk: Chunk) -> Results:
    """Of rows that are one block each: what divides them is computed again with the weights."""
    zero, mixed = _zeros(chunk)

    def visit(state: Any, column: Column) -> Any:
        def add(state: tuple[Row, Mixed], block: Block, pairs: Pairs | None) -> tuple[Row, Mixed]:
            total, mixed = state
            logits, moved = _moved_logits(program, column, block, pairs)
            weights, divisor, _ = normalize(program.plan.call.normalizer, logits)
            assert divisor is not None
            share = 1 / divisor
            if moved is not None:
                total = share * (weights * moved).sum(-1, keepdims=True)
                mixed += _mix(
                    program, weights * (moved - total), block["value"], block, column.place
                )
            if "value" in column.moving:
                mixed += _mix(program, weights, column.moving["value"].block, block, column.place)
            return total, mixed * share.astype(mixed.dtype)

        return program.visit(column, add, state)

    total, mixed = chunk.each_column(visit, (zero, mixed))
    return Results(mixed, jnp.zeros_like(total), total)


def _pointwise_tangents(program: Program, chunk: Chunk) -> Results:
    """Sums over the tangents of weights that each follow from their own logit."""
    zero, mixed = _zeros(chunk)
    weights_of = functools.partial(_weights_of, program)

    def visit(mixed: Mixed, column: Column) -> Mixed:
        def add(mixed: Mixed, block: Block, pairs: Pairs | None) -> Mixed:
            logits, moved = _moved_logits(program, column, block, pairs)
            if moved is not None:
                _, moved = jax.jvp(weights_of, (logits,), (moved,))
                mixed += _mix(program, moved, block["value"], block, column.place)
            if "value" in column.moving:
                mixed += _mix(
                    program, weights_of(logits), column.moving["value"].block, block, column.place
                )
            return mixed

        return program.visit(column, add, mixed)

    return Results(chunk.each_column(visit, mixed), zero, zero)


def _moved_logits(
    program: Program, column: Column, block: Block, pairs: Pairs | None
) -> tuple[Logits, Logits | None]:
    """Logits and their tangent; None if it is zero."""
    moving = {name: dot.block for name, dot in column.moving.items() if name != "value"}

    def logits(moved: Block) -> Logits:
        scaled = tile.scaled(block | moved, program.plan)
        return program.logits(scaled, column.place, pairs)

    if not moving:
        return logits({}), None
    return jax.jvp(logits, ({name: block[name] for name in moving},), (moving,))
