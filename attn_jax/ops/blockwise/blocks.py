"""Arrays cut into blocks, and loops over the blocks.

A loop hands each of its steps the blocks that belong to it as scanned inputs: what JAX's own
transposition of the loop makes of them is a stack of cotangents, written once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

Index = int | Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocked:
    """An array whose first axes count blocks.

    Attributes:
      array: the blocks.
      axes: what axes of it count, some of "bqrhk" in this order: sequences, groups of rows of
        blocks, rows of a group, blocks of heads and of keys. They are the first, and each step of
        a loop over one takes its part, unless blocks are taken late.
      late: where all these axes are, if a block is taken from the array only where it is used.
      index: of a block that is taken late, along the axes that are gone.
      order: in which a block's own axes are wanted; () as they are.

    """

    array: Any
    axes: str = dataclasses.field(default="", metadata={"static": True})
    late: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    index: tuple[Any, ...] = ()
    order: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def at(self, index: Index, part: Any) -> "Blocked":
        """Where the next axis has this index, with that part of the array."""
        if not self.late:
            return dataclasses.replace(self, array=part, axes=self.axes[1:])
        place = (*self.index, jnp.asarray(index, jnp.int32))
        return dataclasses.replace(self, axes=self.axes[1:], index=place)

    @property
    def block(self) -> Array:
        """One block, where no axis is left."""
        block = self.array
        if self.late:
            start = [jnp.zeros((), jnp.int32)] * block.ndim
            for axis, index in zip(self.late, self.index, strict=True):
                start[axis] = index
            sizes = [1 if axis in self.late else size for axis, size in enumerate(block.shape)]
            block = lax.dynamic_slice(block, start, sizes).squeeze(self.late)
        return block.transpose(self.order) if self.order else block


def _is_blocked(x: Any) -> bool:
    return isinstance(x, Blocked)


def _split(axis: str, operands: Any) -> tuple[list[Array], Callable[[Index, list[Array]], Any]]:
    """The arrays with this axis in front, and how to put one block of each in their place."""
    leaves, structure = jax.tree.flatten(operands, is_leaf=_is_blocked)
    mine = [leaf.axes[:1] == axis for leaf in leaves]

    def joined(index: Index, blocks: list[Array]) -> Any:
        rest = iter(blocks)

        def inner(leaf: Blocked) -> Blocked:
            return leaf.at(index, None if leaf.late else next(rest))

        return structure.unflatten(
            inner(leaf) if cut else leaf for leaf, cut in zip(leaves, mine, strict=True)
        )

    scanned = [x.array for x, cut in zip(leaves, mine, strict=True) if cut and not x.late]
    return scanned, joined


def over(axis: str, size: int, body: Callable[[Index, Any], Any], operands: Any) -> Any:
    """The results of body(index, operands of that block), stacked; of rows "r" all at once."""
    arrays, joined = _split(axis, operands)
    if size == 1:
        result = body(0, joined(0, jax.tree.map(lambda array: array[0], arrays)))
        return jax.tree.map(lambda x: x[None], result)
    if axis == "r":
        return jax.vmap(lambda i, arrays: body(i, joined(i, arrays)))(jnp.arange(size), arrays)
    return lax.map(lambda step: body(step[0], joined(*step)), (jnp.arange(size), arrays))


def carried(
    axis: str,
    size: int,
    body: Callable[[Any, Index, Any], Any],
    state: Any,
    operands: Any,
    between: tuple[Index, Index] | None = None,
) -> Any:
    """The state after body(state, index, operands of that block) for blocks in turn.

    Args:
      axis: of the blocks.
      size: how many there are.
      body: of one block.
      state: the first.
      operands: of all blocks.
      between: the index of the first to be visited, and the one behind the last, in a loop that
        can't be transposed. None visits all, in one that can. A single block is always visited.

    """
    arrays, joined = _split(axis, operands)
    if size == 1:
        return body(state, 0, joined(0, jax.tree.map(lambda array: array[0], arrays)))

    def counted(index: Index, state: Any) -> Any:
        parts = [lax.dynamic_index_in_dim(x, index, keepdims=False) for x in arrays]
        return body(state, index, joined(index, parts))

    def step(state: Any, block: Any) -> tuple[Any, None]:
        return body(state, block[0], joined(*block)), None

    if between is not None:
        return lax.fori_loop(*between, counted, state)
    return lax.scan(step, state, (jnp.arange(size), arrays))[0]
