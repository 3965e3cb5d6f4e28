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
      axes: what the first axes count, some of "bqrhk" in this order: sequences, groups of rows of
        blocks, rows of a group, blocks of heads and of keys.
      index: where along the axes before these the block is, if it is not taken yet.
      late: whether a block is taken from the array where the last of its axes is gone, instead of
        a part of it at each.

    """

    array: Any
    axes: str = dataclasses.field(default="", metadata={"static": True})
    index: tuple[Any, ...] = ()
    late: bool = dataclasses.field(default=False, metadata={"static": True})

    def at(self, index: Index) -> "Blocked":
        """Where the next axis has this index, of one whose blocks are taken late."""
        place, axes = (*self.index, jnp.asarray(index, jnp.int32)), self.axes[1:]
        if axes:
            return dataclasses.replace(self, axes=axes, index=place)
        rest = self.array.shape[len(place) :]
        start = (*place, *[jnp.zeros((), jnp.int32)] * len(rest))
        block = lax.dynamic_slice(self.array, start, (*[1] * len(place), *rest))
        return Blocked(block.reshape(rest))


def _is_blocked(x: Any) -> bool:
    return isinstance(x, Blocked)


def _split(axis: str, operands: Any) -> tuple[list[Array], Callable[[Index, list[Array]], Any]]:
    """The arrays with this axis in front, and how to put one block of each in their place."""
    leaves, structure = jax.tree.flatten(operands, is_leaf=_is_blocked)
    mine = [leaf.axes[:1] == axis for leaf in leaves]

    def joined(index: Index, blocks: list[Array]) -> Any:
        rest = iter(blocks)

        def inner(leaf: Blocked) -> Blocked:
            return leaf.at(index) if leaf.late else Blocked(next(rest), leaf.axes[1:])

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
    axis: str, size: int, body: Callable[[Any, Index, Any], Any], state: Any, operands: Any
) -> Any:
    """The state after body(state, index, operands of that block) for every block in turn."""
    arrays, joined = _split(axis, operands)
    if size == 1:
        return body(state, 0, joined(0, jax.tree.map(lambda array: array[0], arrays)))

    def step(state: Any, block: Any) -> tuple[Any, None]:
        return body(state, block[0], joined(*block)), None

    return lax.scan(step, state, (jnp.arange(size), arrays))[0]
