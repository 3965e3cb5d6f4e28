r"""Forward pass over the blocks, and its derivative rule.

With logits z, shift c (the largest logit of a row), l = log sum_j exp(z_ij - c_i) and weights
p_ij = exp(z_ij - c_i - l_i), the tangents of output and log-normaliser are

.. math::
  \dot y_i = \sum_j p_{ij} (\dot z_{ij} v_j + \dot v_j) - y_i \dot l_i, \quad
  \dot l_i = \sum_j p_{ij} \dot z_{ij}

They are computed block by block in ordinary operations, linear in the tangents, each block under
`jax.checkpoint`. So JAX's own transposition makes the backward pass of FlashAttention of it (Dao
et al. 2022), without anything of size T S; and as the rule is made of functions that have rules,
derivatives of any order and mode follow.

Letters: B batch, T queries, N query heads, D value width; a block has h key/value heads of g query
heads each, t queries, m = g t rows of logits, s keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from attn_jax.ops.blockwise import operands, tile
from attn_jax.ops.blockwise.loops import Chunk, Results, each_chunk
from attn_jax.ops.blockwise.operands import Arrays
from attn_jax.ops.blockwise.partition import Plan
from attn_jax.ops.blockwise.program import Block, Logits, Pairs, Program
from attn_jax.ops.blockwise.tile import Place
from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize

Row = Float[Array, "h m 1"]
Mixed = Float[Array, "h m D"]


def attend(plan: Plan, arrays: Arrays) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """Output and log-normaliser (which means nothing for normalisers that have none)."""
    program, closed = Program.of(plan, arrays)
    core = jax.custom_jvp(functools.partial(_forward, program))
    core.defjvp(functools.partial(_derivative, core, program), symbolic_zeros=True)
    output, shift, log_total = core(arrays | closed)

    def whole(rows: Array) -> Array:
        batch, _, queries, _ = plan.call.shape
        return rows.reshape(batch, -1, *rows.shape[3:])[:, :queries]

    by_query = jax.vmap(jax.vmap(functools.partial(operands.by_query, plan=plan)))
    return whole(output), whole(by_query(shift + log_total))[..., 0]


def _forward(program: Program, arrays: Arrays) -> Results:
    chunk = _softmax_chunk if _is_softmax(program) else _pointwise_chunk
    return each_chunk(program.plan, functools.partial(chunk, program), arrays)


def _is_softmax(program: Program) -> bool:
    return program.plan.call.normalizer in WITH_LOG_NORMALIZER


def _softmax_chunk(program: Program, chunk: Chunk) -> Results:
    """Sums over exp(logit - shift), where the shift grows from block to block."""
    zero, mixed = _zeros(chunk)
    one_more = program.plan.call.normalizer == "softmax_one"
    # The implicit logit of zero is there from the start.
    state = (zero, zero + 1, mixed) if one_more else (zero - jnp.inf, zero, mixed)

    def visit(state: Any, place: Place, block: Block, moving: Block) -> Any:
        del moving

        def add(state: tuple[Row, Row, Mixed], pairs: Pairs | None) -> tuple[Row, Row, Mixed]:
            peak, total, mixed = state
            logits = program.logits(block, place, pairs)
            higher = jnp.maximum(peak, logits.max(-1, keepdims=True))
            shift = _finite(higher)
            weights, rescale = jnp.exp(logits - shift), jnp.exp(peak - shift)
            total = total * rescale + weights.sum(-1, keepdims=True)
            added = _mix(program, weights, block["value"], block, place)
            return higher, total, mixed * rescale.astype(mixed.dtype) + added

        return program.visit(place, block, add, state)

    peak, total, mixed = chunk.each_column(visit, state)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    log_total = jnp.where(empty, -jnp.inf, jnp.log(total))
    return Results(mixed / total.astype(mixed.dtype), _finite(peak), log_total)


def _finite(peak: Row) -> Row:
    """0 for a row without an allowed key."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def _pointwise_chunk(program: Program, chunk: Chunk) -> Results:
    """Sums of weights that each follow from their own logit."""
    zero, mixed = _zeros(chunk)

    def visit(mixed: Mixed, place: Place, block: Block, moving: Block) -> Mixed:
        del moving

        def add(mixed: Mixed, pairs: Pairs | None) -> Mixed:
            weights = _weights_of(program, program.logits(block, place, pairs))
            return mixed + _mix(program, weights, block["value"], block, place)

        return program.visit(place, block, add, mixed)

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
    value: Float[Array, "h _ _"],
    block: Block,
    place: Place,
) -> Mixed:
    """Mix values (or their tangents) in the values' dtype, accumulated in float32 or wider."""
    weights = program.dropped(weights, block, place).astype(value.dtype)
    value = tile.cleaned(value, program.plan, like=block["value"])
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    form = f"hts,h{program.plan.key_axes}->htd"
    return jnp.einsum(form, weights, value, preferred_element_type=dtype)


def _derivative(
    core: Callable[[Arrays], Results],
    program: Program,
    primals: tuple[Arrays],
    tangents: tuple[dict[str, Any]],
) -> tuple[Results, Results]:
    """Results and their tangents; tangents that are zero cost nothing."""
    (arrays,), (dots,) = primals, tangents
    results = core(arrays)
    moving = {
        name: dot
        for name, dot in dots.items()
        if not isinstance(dot, SymbolicZero) and dot.dtype != jax.dtypes.float0
    }
    chunk = _softmax_tangents if _is_softmax(program) else _pointwise_tangents
    body = functools.partial(chunk, program)
    return results, each_chunk(program.plan, body, arrays, moving, results)


def _softmax_tangents(program: Program, chunk: Chunk) -> Results:
    """Sums over exp(logit - shift) times the tangents, divided by the total in the end."""
    assert chunk.results is not None
    output, shift, log_total = chunk.results

    @_recomputed
    def visit(state: Any, place: Place, block: Block, moving: Block) -> Any:
        def add(state: tuple[Row, Mixed], pairs: Pairs | None) -> tuple[Row, Mixed]:
            total, mixed = state
            logits, moved = _moved_logits(program, block, moving, place, pairs)
            weights = jnp.exp(logits - shift)
            if moved is not None:
                moved = weights * moved
                total += moved.sum(-1, keepdims=True)
                mixed += _mix(program, moved, block["value"], block, place)
            if "value" in moving:
                mixed += _mix(program, weights, moving["value"], block, place)
            return total, mixed

        return program.visit(place, block, add, state)

    total, mixed = chunk.each_column(visit, _zeros(chunk))
    empty = log_total == -jnp.inf
    share = jnp.where(empty, 0, jnp.exp(-jnp.where(empty, 0, log_total)))
    total, mixed = total * share, mixed * share.astype(mixed.dtype)
    return Results(mixed - output * total.astype(mixed.dtype), jnp.zeros_like(total), total)


def _pointwise_tangents(program: Program, chunk: Chunk) -> Results:
    """Sums over the tangents of weights that each follow from their own logit."""
    zero, mixed = _zeros(chunk)
    weights_of = functools.partial(_weights_of, program)

    @_recomputed
    def visit(mixed: Mixed, place: Place, block: Block, moving: Block) -> Mixed:
        def add(mixed: Mixed, pairs: Pairs | None) -> Mixed:
            logits, moved = _moved_logits(program, block, moving, place, pairs)
            if moved is not None:
                _, moved = jax.jvp(weights_of, (logits,), (moved,))
                mixed += _mix(program, moved, block["value"], block, place)
            if "value" in moving:
                mixed += _mix(program, weights_of(logits), moving["value"], block, place)
            return mixed

        return program.visit(place, block, add, mixed)

    return Results(chunk.each_column(visit, mixed), zero, zero)


def _moved_logits(
    program: Program, block: Block, moving: Block, place: Place, pairs: Pairs | None
) -> tuple[Logits, Logits | None]:
    """Logits and their tangent; None if it is zero."""
    moving = {name: dot for name, dot in moving.items() if name != "value"}
    if not moving:
        return program.logits(block, place, pairs), None

    def logits(moved: Block) -> Logits:
        return program.logits(block | moved, place, pairs)

    return jax.jvp(logits, ({name: block[name] for name in moving},), (moving,))


def _recomputed(visit: Callable[..., Any]) -> Callable[..., Any]:
    """Keep nothing of a block for the backward pass: it is computed again there."""
    return jax.checkpoint(visit, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
