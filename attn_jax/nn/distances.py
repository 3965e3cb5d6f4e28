"""Distances of kernels that are no differences of indices, such as that of pixels in an image."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from attn_jax import ops
from attn_jax.ops.proximity import log_weights


class Distance:
    """How far apart the indices of a sequence are, for the kernels of `MultiHeadAttention`.

    An index i has a place p(i), a number, and the kernel sees d(p(key) - p(query)) in place of
    r = key - query: kernels stay functions of one number, so every rule and every implementation
    takes any distance. Places rise with the index, so that `Causal` means the same. A subclass is
    hashable and compares by value, like a frozen dataclass.
    """

    def places(self, index: Num[Array | np.ndarray, "..."]) -> Num[Array | np.ndarray, "..."]:
        """p: the place of every index."""
        raise NotImplementedError(f"{type(self).__name__} must override places(index).")

    def between(self, difference: Num[Array | np.ndarray, "..."]) -> Num[Any, "..."]:
        """d: what kernels see of two places, from the key's less the query's."""
        raise NotImplementedError(f"{type(self).__name__} must override between(difference).")


@dataclasses.dataclass(frozen=True)
class Plane(Distance):
    """Euclidean distance of the pixels of an image that is read row by row.

    Index i lies in row i // C and column i % C. Its place, (2 C - 1) row + column, is one number
    from whose differences both coordinates follow: a difference of columns is below C. A kernel
    sees +sqrt(rows^2 + columns^2) for keys read after the query and the negative for those before,
    so that offsets and tables tell before from after as along a sequence.

    Args:
      columns: C, pixels in a row.

    Raises:
      ValueError: C is no positive integer; positions are no integers.

    """

    columns: int

    def __post_init__(self):
        if not isinstance(self.columns, int) or self.columns < 1:
            raise ValueError(f"columns must be a positive integer, got {self.columns!r}")

    @property
    def _stride(self) -> int:
        return 2 * self.columns - 1

    def places(self, index: Num[Array | np.ndarray, "..."]) -> Int[Array | np.ndarray, "..."]:
        """(2 C - 1) row + column."""
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"positions in a plane must be indices of pixels, got {index.dtype}")
        return index // self.columns * self._stride + index % self.columns

    def between(
        self, difference: Int[Array | np.ndarray, "..."]
    ) -> Float[Array | np.ndarray, "..."]:
        """The signed Euclidean distance."""
        rows = (difference + self.columns - 1) // self._stride
        columns = difference - rows * self._stride
        array: Any = np if isinstance(difference, np.ndarray) else jnp
        distance = array.sqrt(array.asarray(rows**2 + columns**2, jnp.result_type(float)))
        return array.sign(difference).astype(distance.dtype) * distance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Placed(ops.Proximity):
    """A kernel that sees a distance: log w(d(r)), r a difference of places."""

    kernel: ops.Proximity
    distance: Distance = dataclasses.field(metadata={"static": True})

    def log_weight(self, r: Num[Array | np.ndarray, "#b 1 T S"]) -> Float[Array, "#b #N T S"]:
        """The kernel's log-weight, -inf beyond its reach, which is a distance as well."""
        return log_weights(self.kernel, self.distance.between(r))


def lying(distance: Distance, positions: Any, length: int) -> Num[Array | np.ndarray, "*b T"]:
    """The places of positions as `attention` takes them; known ones stay known."""
    if positions is None or jnp.ndim(positions) == 0:
        positions = (0 if positions is None else positions) + np.arange(length)
    known = not isinstance(positions, jax.Array)
    return distance.places(np.asarray(positions) if known else positions)
