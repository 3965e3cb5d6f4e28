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

Letters: B batch, D value width; a block has h key/value heads of g query heads each, n = h g,
t queries, m = g t rows of logits, s keys; C blocks of heads, I of queries.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from attn_jax.ops.blockwise import operands as operands_
from attn_jax.ops.blockwise import tile
from attn_jax.ops.blockwise.blocks import Blocked, Index, carried, over
from attn_jax.ops.blockwise.operands import Operands
from attn_jax.ops.blockwise.partition import Plan
from attn_jax.ops.blockwise.tile import Place
from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize

Row = Float[Array, "h m 1"]
Mixed = Float[Array, "h m D"]
Pairs = Bool[Array, "1 #n t s"]
# The operands of one block.
Block = dict[str, Any]


class Results(NamedTuple):
    """What the blocks of a row give.

    Attributes:
      output: the mixed values.
      shift: the largest logit, 0 if there is none. Its derivative counts as zero: that of the
        log-normaliser, shift + log_total, is all in log_total, and the sum of both is exact.
      log_total: logarithm of the sum of exp(logit - shift).

    """

    output: Any
    shift: Any
    log_total: Any


def attend(plan: Plan, operands: Operands) -> Results:
    """The results of all rows, [B, C, I, h, m, D or 1]."""
    program, closed = Program.of(plan, operands)
    core = jax.custom_jvp(functools.partial(_forward, program))
    core.defjvp(functools.partial(_derivative, core, program), symbolic_zeros=True)
    return core({**operands, **closed})


class Program(NamedTuple):
    """A plan with its functions of one block.

    What they close over is hoisted into the operands: a derivative rule may not close over what is
    differentiated or batched around it.

    Attributes:
      plan: the blocks.
      pairs: which pairs are allowed, of (block, place); None: all of every block.
      masked: logits, of (block, place, pairs).
      full: logits where all pairs are allowed, of (block, place).
      keep: what dropout keeps, of (block, place).

    """

    plan: Plan
    pairs: Callable[..., Pairs | None]
    masked: Callable[..., Float[Array, "h m s"]]
    full: Callable[..., Float[Array, "h m s"]]
    keep: Callable[..., Bool[Array, "h m s"]]

    @classmethod
    def of(cls, plan: Plan, operands: Operands) -> tuple["Program", Operands]:
        """The program, and what its functions close over."""
        place = Place(*[jnp.zeros((), jnp.int32)] * 4)
        block = _first_block(operands, plan)
        closed: Operands = {}

        def hoisted(name: str, function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
            explicit, arrays = tile.hoisted(function, *examples)
            names = [f"{name}.{i}" for i in range(len(arrays))]
            closed.update({n: Blocked(array) for n, array in zip(names, arrays, strict=True)})
            return lambda block, *rest: explicit([block[n] for n in names], *rest)

        pairs = hoisted("pairs", lambda place: tile.allowed(place, plan), place)
        example = jax.eval_shape(lambda: tile.allowed(place, plan))

        def logits(block: Block, place: Place, pairs: Pairs | None = None) -> Array:
            return tile.logits(block, pairs, place, plan)

        return cls(
            plan=plan,
            pairs=pairs,
            masked=_of_block(hoisted("masked", logits, block, place, example), block),
            full=_of_block(hoisted("full", logits, block, place), block),
            keep=hoisted("keep", lambda place: tile.keep(place, plan), place)
            if plan.call.dropout_rate
            else _keep_all,
        ), closed


def _of_block(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """Hand on just those operands that the function was traced with."""
    names = tuple(names)
    return lambda block, *rest: function(block, {n: block[n] for n in names}, *rest)


def _keep_all(block: Block, place: Place) -> None:
    del block, place


def _first_block(operands: Operands, plan: Plan) -> Block:
    """The operands of logits in the first block, for their shapes."""
    found: list[Block] = []

    def of_row(place: Place, operands: Operands) -> Array:
        del place
        row = operands_.row(operands, 0, plan)
        carried("k", plan.columns, lambda s, j, block: found.append(_arrays(block)), None, row)
        return jnp.zeros(())

    jax.eval_shape(lambda: _over_rows(plan, of_row, operands))
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in found[0].items()
        if name != "value"
    }


def _over_rows(plan: Plan, body: Callable[[Place, Any], Any], operands: Any) -> Any:
    """body(place of the row's first block, operands of the row) for all rows, stacked."""

    def index(i: Index) -> Array:
        return jnp.asarray(i, jnp.int32)

    def of_chunk(b: Index, c: Index, operands: Any) -> Any:
        def of_row(i: Index, operands: Any) -> Any:
            return body(Place(index(b), index(c), index(i), index(0)), operands)

        return over("q", plan.rows, of_row, operands)

    def of_sequence(b: Index, operands: Any) -> Any:
        return over("h", plan.chunks, functools.partial(of_chunk, b), operands)

    return over("b", plan.call.shape[0], of_sequence, operands)


def _visit(
    program: Program,
    place: Place,
    block: Block,
    contribute: Callable[[Any, Pairs | None], Any],
    state: Any,
) -> Any:
    """The state after a block has contributed to it, as far as the mask lets it."""
    plan, pairs = program.plan, program.pairs(block, place)
    if pairs is None or plan.window is not None or plan.rows == plan.columns == 1:
        return contribute(state, pairs)
    branches = {
        tile.Kind.EMPTY: lambda state: state,
        tile.Kind.PARTIAL: lambda state: contribute(state, pairs),
        tile.Kind.FULL: lambda state: contribute(state, None),
    }
    kind = tile.kind(place, plan, pairs)
    return lax.switch(kind, [branches[k] for k in tile.Kind], state)


def _arrays(operands: Operands) -> Block:
    return {name: blocked.array for name, blocked in operands.items()}


def _logits(program: Program, block: Block, place: Place, pairs: Pairs | None) -> Array:
    if pairs is None:
        return program.full(block, place)
    return program.masked(block, place, pairs)


def _dropped(program: Program, weights: Array, block: Block, place: Place) -> Array:
    keep = program.keep(block, place)
    if keep is None:
        return weights
    return jnp.where(keep, weights / (1 - program.plan.call.dropout_rate), 0)


def _product(weights: Float[Array, "h m s"], value: Float[Array, "h D s"]) -> Mixed:
    """Mix the values in the values' dtype, accumulated in float32 or wider."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    weights = weights.astype(value.dtype)
    return jnp.einsum("hts,hds->htd", weights, value, preferred_element_type=dtype)


def _forward(program: Program, operands: Operands) -> Results:
    one_pass = _softmax_row if _is_softmax(program) else _pointwise_row

    def of_row(place: Place, operands: Operands) -> Results:
        operands = operands_.row(operands, place.row, program.plan)
        return one_pass(program, place, operands)

    return _over_rows(program.plan, of_row, operands)


def _is_softmax(program: Program) -> bool:
    return program.plan.call.normalizer in WITH_LOG_NORMALIZER


def _zeros(program: Program, operands: Any) -> tuple[Row, Mixed]:
    """Of a row: one number and one value a query.

    Made from the operands, so that under shard_map the sums vary over the same axes throughout.
    """
    plan = program.plan
    leaves = [x for x in jax.tree.leaves(operands) if jnp.issubdtype(x.dtype, jnp.floating)]
    zero = sum(jnp.where(False, x[(0,) * x.ndim], 0).astype(plan.call.dtype) for x in leaves)
    value = (operands if isinstance(operands, dict) else operands[0])["value"].array
    shape = (plan.heads, plan.group * plan.queries)
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    row = jnp.zeros((*shape, 1), plan.call.dtype) + zero
    return row, jnp.zeros((*shape, value.shape[-2]), dtype) + zero.astype(dtype)


def _softmax_row(program: Program, place: Place, operands: Operands) -> Results:
    """Sums over exp(logit - shift), where the shift grows from block to block."""
    zero, mixed = _zeros(program, operands)
    one_more = program.plan.call.normalizer == "softmax_one"
    # The implicit logit of zero is there from the start.
    state = (zero, zero + 1, mixed) if one_more else (zero - jnp.inf, zero, mixed)

    def step(state: Any, column: Index, operands: Operands) -> Any:
        at, block = place._replace(column=jnp.asarray(column, jnp.int32)), _arrays(operands)

        def contribute(state: tuple[Row, Row, Mixed], pairs: Pairs | None) -> Any:
            peak, total, mixed = state
            logits = _logits(program, block, at, pairs)
            higher = jnp.maximum(peak, logits.max(-1, keepdims=True))
            shift = _finite(higher)
            weights = jnp.exp(logits - shift)
            rescale = jnp.exp(peak - shift)
            total = total * rescale + weights.sum(-1, keepdims=True)
            added = _product(_dropped(program, weights, block, at), block["value"])
            return higher, total, mixed * rescale.astype(mixed.dtype) + added

        return _visit(program, at, block, contribute, state)

    peak, total, mixed = carried("k", program.plan.columns, step, state, operands)
    empty = total == 0
    output = mixed / jnp.where(empty, 1, total).astype(mixed.dtype)
    log_total = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)))
    return Results(output, _finite(peak), log_total)


def _finite(peak: Row) -> Row:
    """0 for a row without an allowed key."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def _pointwise_row(program: Program, place: Place, operands: Operands) -> Results:
    """Sums of weights that each follow from their own logit."""
    zero, mixed = _zeros(program, operands)
    normalizer = program.plan.call.normalizer

    def step(mixed: Mixed, column: Index, operands: Operands) -> Mixed:
        at, block = place._replace(column=jnp.asarray(column, jnp.int32)), _arrays(operands)

        def contribute(mixed: Mixed, pairs: Pairs | None) -> Mixed:
            weights = normalize(normalizer, _logits(program, block, at, pairs)).weights
            return mixed + _product(_dropped(program, weights, block, at), block["value"])

        return _visit(program, at, block, contribute, mixed)

    return Results(carried("k", program.plan.columns, step, mixed, operands), zero, zero)


def _derivative(
    core: Callable[[Operands], Results],
    program: Program,
    primals: tuple[Operands],
    tangents: tuple[Operands],
) -> tuple[Results, Results]:
    """Results and their tangents; tangents that are zero cost nothing."""
    (operands,), (dots,) = primals, tangents
    results = core(operands)
    saved = Results(*[Blocked(x, "bhq") for x in results])
    moving = {
        name: dot
        for name, dot in dots.items()
        if not isinstance(dot.array, SymbolicZero) and dot.array.dtype != jax.dtypes.float0
    }
    tangent_row = _softmax_tangent_row if _is_softmax(program) else _pointwise_tangent_row

    def of_row(place: Place, rows: tuple[Operands, Operands, Results]) -> Results:
        operands, moving, saved = rows
        operands, moving = (operands_.row(x, place.row, program.plan) for x in (operands, moving))
        results = Results(*[blocked.array for blocked in saved])
        return tangent_row(program, place, operands, moving, results)

    return results, _over_rows(program.plan, of_row, (operands, moving, saved))


def _moved_logits(
    program: Program, block: Block, moving: Block, place: Place, pairs: Pairs | None
) -> tuple[Array, Array | None]:
    """Logits and their tangent; None if it is zero."""
    moving = {name: dot for name, dot in moving.items() if name != "value"}
    if not moving:
        return _logits(program, block, place, pairs), None

    def logits(moved: Block) -> Array:
        return _logits(program, block | moved, place, pairs)

    return jax.jvp(logits, ({name: block[name] for name in moving},), (moving,))


def _softmax_tangent_row(
    program: Program, place: Place, operands: Operands, moving: Operands, results: Results
) -> Results:
    """Sums over exp(logit - shift) times the tangents, divided by the total in the end."""
    zero, mixed = _zeros(program, (operands, moving))

    @_recomputed
    def step(state: tuple[Row, Mixed], column: Index, rows: tuple[Operands, Operands]) -> Any:
        at = place._replace(column=jnp.asarray(column, jnp.int32))
        block, dots = map(_arrays, rows)

        def contribute(state: tuple[Row, Mixed], pairs: Pairs | None) -> tuple[Row, Mixed]:
            total, mixed = state
            logits, moved = _moved_logits(program, block, dots, at, pairs)
            weights = jnp.exp(logits - results.shift)
            if moved is not None:
                moved = weights * moved
                total += moved.sum(-1, keepdims=True)
                mixed += _product(_dropped(program, moved, block, at), block["value"])
            if "value" in dots:
                mixed += _product(_dropped(program, weights, block, at), dots["value"])
            return total, mixed

        return _visit(program, at, block, contribute, state)

    columns = program.plan.columns
    total, mixed = carried("k", columns, step, (zero, mixed), (operands, moving))
    empty = results.log_total == -jnp.inf
    share = jnp.where(empty, 0, jnp.exp(-jnp.where(empty, 0, results.log_total)))
    total, mixed = total * share, mixed * share.astype(mixed.dtype)
    output = mixed - results.output * total.astype(mixed.dtype)
    return Results(output, jnp.zeros_like(total), total)


def _pointwise_tangent_row(
    program: Program, place: Place, operands: Operands, moving: Operands, results: Results
) -> Results:
    """Sums over the tangents of weights that each follow from their own logit."""
    del results
    zero, mixed = _zeros(program, (operands, moving))

    @_recomputed
    def step(mixed: Mixed, column: Index, rows: tuple[Operands, Operands]) -> Mixed:
        at = place._replace(column=jnp.asarray(column, jnp.int32))
        block, dots = map(_arrays, rows)

        def weights_of(logits: Array) -> Array:
            return normalize(program.plan.call.normalizer, logits).weights

        def contribute(mixed: Mixed, pairs: Pairs | None) -> Mixed:
            logits, moved = _moved_logits(program, block, dots, at, pairs)
            if moved is not None:
                _, moved = jax.jvp(weights_of, (logits,), (moved,))
                mixed += _product(_dropped(program, moved, block, at), block["value"])
            if "value" in dots:
                weights = _dropped(program, weights_of(logits), block, at)
                mixed += _product(weights, dots["value"])
            return mixed

        return _visit(program, at, block, contribute, mixed)

    mixed = carried("k", program.plan.columns, step, mixed, (operands, moving))
    return Results(mixed, zero, zero)


def _recomputed(step: Callable[..., Any]) -> Callable[..., Any]:
    """Keep nothing of a block for the backward pass: it is computed again there."""
    return jax.checkpoint(step, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
