"""The functions of one block that a plan needs, with all that they close over made explicit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jaxtyping import Array, Bool, Float

from attn_jax.ops.blockwise import tile
from attn_jax.ops.blockwise.loops import Chunk, Column, Results, each_chunk
from attn_jax.ops.blockwise.operands import Arrays, taken
from attn_jax.ops.blockwise.partition import Kind, Plan
from attn_jax.ops.blockwise.tile import Place

Pairs = Bool[Array, "1 #n t s"]
Logits = Float[Array, "h m s"]
# The arrays of one block; shapes where they are examples.
Block = dict[str, Any]


class Program(NamedTuple):
    """A plan with its functions of one block.

    What they close over is hoisted into the arrays of the call: a derivative rule may not close
    over what is differentiated or batched around it.

    Attributes:
      plan: the blocks.
      pairs: which pairs are allowed, of (block, place); None: all of every block.
      masked: logits, of (block, place, pairs).
      full: logits where all pairs are allowed, of (block, place).
      keep: which weights dropout keeps, of (block, place); None: all.
      by_minimum: whether pairs are hidden by a minimum with -inf, which may leave them NaN, instead
        of a choice. XLA:CPU's library takes it into one call with products, peak and sum.

    """

    plan: Plan
    pairs: Callable[[Block, Place], Pairs | None]
    masked: Callable[[Block, Place, Pairs], Logits]
    full: Callable[[Block, Place], Logits]
    keep: Callable[[Block, Place], Bool[Array, "h m s"] | None]
    by_minimum: bool = False

    @classmethod
    def of(cls, plan: Plan, arrays: Arrays) -> tuple["Program", Arrays]:
        """The program, and what its functions close over."""
        place = Place(*[jnp.zeros((), jnp.int32)] * 4)
        block = _example(plan, arrays)
        names = tuple(block)
        closed: Arrays = {}

        def hoisted(name: str, function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
            explicit, constants = _hoisted(function, *examples)
            inside = [f"{name}.{i}" for i in range(len(constants))]
            closed.update(zip(inside, constants, strict=True))
            return lambda block, *rest: explicit([block[n] for n in inside], *rest)

        def logits(block: Block, place: Place, pairs: Pairs | None = None) -> Logits:
            return tile.logits(block, pairs, place, plan)

        pairs = hoisted("pairs", lambda place: tile.allowed(place, plan), place)
        some = jax.eval_shape(lambda: tile.allowed(place, plan))
        masked = hoisted("masked", logits, block, place, some)
        full = hoisted("full", logits, block, place)
        keep = hoisted("keep", lambda place: tile.keep(place, plan), place)

        def own(block: Block) -> Block:
            return {name: block[name] for name in names}

        program = cls(
            plan,
            pairs,
            lambda block, place, pairs: masked(block, own(block), place, pairs),
            lambda block, place: full(block, own(block), place),
            keep,
        )
        return program, closed

    def logits(self, block: Block, place: Place, pairs: Pairs | None) -> Logits:
        """Logits where these pairs (None: all) are allowed."""
        if pairs is None:
            return self.full(block, place)
        if not self.by_minimum:
            return self.masked(block, place, pairs)
        logits = self.full(block, place)
        limits = jnp.where(pairs, jnp.inf, -jnp.inf).astype(logits.dtype)
        shape = (1, -1, self.plan.queries, self.plan.keys)
        return jnp.minimum(logits.reshape(shape), limits).reshape(logits.shape)

    def dropped(self, weights: Logits, block: Block, place: Place) -> Logits:
        """The weights after dropout."""
        keep = self.keep(block, place)
        if keep is None:
            return weights
        return jnp.where(keep, weights / (1 - self.plan.call.dropout_rate), 0)

    def visit(
        self, column: Column, add: Callable[[Any, Block, Pairs | None], Any], state: Any
    ) -> Any:
        """The state after add(state, block, pairs), as far as the mask lets a block take part."""
        plan, place = self.plan, column.place

        def added(state: Any, pairs: Pairs | None) -> Any:
            return add(state, taken(column.operands), pairs)

        if column.kind is Kind.FULL:
            return added(state, None)
        closed = {name: x.block for name, x in column.operands.items() if "." in name}
        pairs = self.pairs(closed, place)
        alone = plan.window is not None or plan.rows == plan.columns == 1
        if column.kind is Kind.PARTIAL or alone or pairs is None:
            return added(state, pairs)
        branches = {
            Kind.EMPTY: lambda state: state,
            Kind.PARTIAL: lambda state: added(state, pairs),
            Kind.FULL: lambda state: added(state, None),
        }
        return lax.switch(tile.kind(place, plan, pairs), [branches[k] for k in Kind], state)


def _hoisted(
    function: Callable[..., Any], *examples: Any
) -> tuple[Callable[..., Any], list[Array]]:
    """A function of all arrays that it closes over and of its arguments, and these arrays."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*examples)
    structure = jax.tree.structure(shape)

    def explicit(constants: list[Array], *arguments: Any) -> Any:
        flat = jax.tree.leaves(arguments)
        return structure.unflatten(eval_jaxpr(closed.jaxpr, constants, *flat))

    return explicit, [c if isinstance(c, jax.Array) else jnp.asarray(c) for c in closed.consts]


def _example(plan: Plan, arrays: Arrays) -> Block:
    """The shapes of what the logits of one block are made of."""
    found: list[Block] = []

    def of_chunk(chunk: Chunk) -> Results:
        chunk.each_column(lambda _, column: found.append(taken(column.operands)), None)
        zero = jnp.zeros((plan.heads, plan.group * plan.queries, 1))
        return Results(zero, zero, zero)

    jax.eval_shape(lambda: each_chunk(plan, of_chunk, arrays))
    return {name: jax.typeof(x) for name, x in found[0].items() if name != "value"}
