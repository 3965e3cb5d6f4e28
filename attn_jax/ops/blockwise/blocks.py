"""Arrays cut into blocks, and loops over the blocks.

A loop hands each of its steps the blocks that belong to it as scanned inputs. What JAX's own
transposition of the loop makes of them is then a stack of cotangents, written once; slices taken
inside a step would be added up over an array of full length in each step.
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
      axes: what the first axes count, some of "bqhk" in this order: sequences, blocks of
        queries, of heads and of keys.
      overlap: how many neighbouring blocks along the last of these axes a step gets, joined along
        the axis behind it; the axis is longer than the loop by one less.

    """

    array: Any
    axes: str = dataclasses.field(default="", metadata={"static": True})
    overlap: int = dataclasses.field(default=1, metadata={"static": True})


def _is_blocked(x: Any) -> bool:
    return isinstance(x, Blocked)


def _split(axis: str, size: int, operands: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays with this axis in front, and how to put one block of each in their place."""
    leaves, structure = jax.tree.flatten(operands, is_leaf=_is_blocked)
    mine = [leaf.axes[:1] == axis for leaf in leaves]

    def joined(blocks: list[Any]) -> Any:
        rest = iter(blocks)
        return structure.unflatten(
            _inner(leaf, next(rest)) if cut else leaf
            for leaf, cut in zip(leaves, mine, strict=True)
        )

    shifted = [_shifted(leaf, size) for leaf, cut in zip(leaves, mine, strict=True) if cut]
    return shifted, joined


def _shifted(blocked: Blocked, size: int) -> list[Array]:
    """What a loop of `size` steps scans over: the array, or copies shifted by one block each."""
    if len(blocked.axes) > 1 or blocked.overlap == 1:
        return [blocked.array]
    return [blocked.array[m : m + size] for m in range(blocked.overlap)]


def _inner(blocked: Blocked, parts: list[Array]) -> Blocked:
    """What one step gets."""
    if len(parts) == 1:
        return Blocked(parts[0], blocked.axes[1:], blocked.overlap)
    return Blocked(jnp.concatenate(parts, 0))


def over(axis: str, size: int, body: Callable[[Index, Any], Any], operands: Any) -> Any:
    """The results of body(index, operands of that block), stacked."""
    arrays, joined = _split(axis, size, operands)
    if size == 1:
        result = body(0, joined(jax.tree.map(lambda array: array[0], arrays)))
        return jax.tree.map(lambda x: x[None], result)
    return lax.map(lambda step: body(step[0], joined(step[1])), (jnp.arange(size), arrays))


def carried(
    axis: str, size: int, body: Callable[[Any, Index, Any], Any], state: Any, operands: Any
) -> Any:
    """The state after body(state, index, operands of that block) for every block in turn."""
    arrays, joined = _split(axis, size, operands)
    if size == 1:
        return body(state, 0, joined(jax.tree.map(lambda array: array[0], arrays)))

    def step(state: Any, block: Any) -> tuple[Any, None]:
        return body(state, block[0], joined(block[1])), None

    return lax.scan(step, state, (jnp.arange(size), arrays))[0]
