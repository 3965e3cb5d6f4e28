"""Where queries and keys are: positions for kernels and masks, indices for data.

Shape letters: b batch (1 unless positions are batched), T queries, S keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num, Shaped

# Up to this many entries a [T, S] table of positions is made by NumPy and so becomes a constant
# of the program; above it XLA computes it from [T] and [S], which keeps the program small.
_LARGEST_CONSTANT = 1 << 20

# A NumPy array is known while tracing, a JAX array is not.
Either = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Grid:
    """A rectangle of query-key pairs.

    Kernels and masks see it through `relative` and the positions; data masks (lengths, segments,
    arrays) through the indices, which count from the start of the whole arrays.

    Attributes:
      query_positions: positions of the rectangle's queries.
      key_positions: positions of its keys.
      query_index: indices of its queries.
      key_index: indices of its keys.

    """

    query_positions: Num[Either, "#b T"]
    key_positions: Num[Either, "#b S"]
    query_index: Int[Either, "T"]
    key_index: Int[Either, "S"]

    @property
    def relative(self) -> Num[Either, "#b 1 T S"]:
        """Key position minus query position, in the positions' dtype."""
        query, key = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
        if query.size * key.size > _LARGEST_CONSTANT:
            query, key = jnp.asarray(query), jnp.asarray(key)
        return key - query

    def sequences(self, data: Shaped[Either, "..."]) -> Shaped[Either, "..."]:
        """The entries of `data` for this rectangle's sequences, along its first axis."""
        return data

    def heads(self, data: Shaped[Either, "..."], axis: int) -> Shaped[Either, "..."]:
        """The entries of `data` for this rectangle's heads along `axis` (kept if of length 1)."""
        del axis
        return data

    def rows(self, data: Shaped[Either, "..."], axis: int) -> Shaped[Either, "..."]:
        """The entries of `data` at this rectangle's queries along `axis` (kept if of length 1)."""
        return _take(data, self.query_index, axis)

    def columns(self, data: Shaped[Either, "..."], axis: int) -> Shaped[Either, "..."]:
        """The entries of `data` at this rectangle's keys along `axis` (kept if of length 1)."""
        return _take(data, self.key_index, axis)


def _take(data: Either, index: Either, axis: int) -> Either:
    if data.shape[axis] == 1:
        return data
    whole = isinstance(index, np.ndarray) and np.array_equal(index, np.arange(data.shape[axis]))
    return data if whole else jnp.take(data, index, axis=axis)


def resolve(positions: Any, length: int, name: str) -> Num[Either, "#b length"]:
    """Positions as an array [1 or B, length], a NumPy one where they are known while tracing.

    Args:
      positions: None (0, 1, ...), a scalar offset o (o, o + 1, ...), [length] or [B, length].
      length: how many there must be.
      name: the argument's name, for errors.

    Raises:
      ValueError: for another shape or a dtype that is neither integer nor floating.

    """
    if not isinstance(positions, jax.Array):
        positions = np.asarray(0 if positions is None else positions)
    positions = _widened(positions, name)
    if positions.ndim == 0:
        array = np if isinstance(positions, np.ndarray) else jnp
        positions = positions + array.arange(length).astype(positions.dtype)
    if positions.ndim not in (1, 2) or positions.shape[-1] != length:
        raise ValueError(
            f"{name} must be None, a scalar offset, [{length}] or [B, {length}]; "
            f"got shape {tuple(positions.shape)}."
        )
    return positions[None] if positions.ndim == 1 else positions


def _widened(positions: Either, name: str) -> Either:
    """Integers as signed ones of 32 bits or more, so that no difference wraps around."""
    if jnp.issubdtype(positions.dtype, jnp.floating):
        return positions
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integer or floating; got {positions.dtype}. "
            "Cast them, or leave them None for 0, 1, 2, ..."
        )
    if isinstance(positions, np.ndarray):
        return positions.astype(np.int64)
    return positions.astype(jnp.promote_types(positions.dtype, jnp.int32))


def regular_offset(query: Num[Either, "#b T"], key: Num[Either, "#b S"]) -> int | None:
    """O such that key j and query i are j - i + o apart for all i and j, or None if not provable.

    Only positions known while tracing and one step apart can prove it.
    """
    for positions in (query, key):
        if not isinstance(positions, np.ndarray) or len(positions) != 1:
            return None
        if not np.all(np.diff(positions[0]) == 1):
            return None
    if not query.size or not key.size:
        return 0
    offset = key[0, 0].item() - query[0, 0].item()  # exact for integers of any size
    return int(offset) if offset == int(offset) else None


def everywhere(queries: int, keys: int, query_positions: Any, key_positions: Any) -> Grid:
    """The grid of all pairs, from the positions as `attention` takes them."""
    return Grid(
        resolve(query_positions, queries, "query_positions"),
        resolve(key_positions, keys, "key_positions"),
        np.arange(queries),
        np.arange(keys),
    )
