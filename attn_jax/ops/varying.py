"""Over which axes of `shard_map` an array varies: operands and branches must agree in it."""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array


def varying_as(array: Array, other: Any) -> Array:
    """The array, varying over the axes over which another, or a shape of one, does too."""
    missing = _axes(other) - _axes(array)
    return lax.pcast(array, tuple(missing), to="varying") if missing else array


def _axes(array: Any) -> frozenset[str]:
    """By the type; jax 0.10 moved the axes of an array's type from `vma` into `mat`."""
    if isinstance(array, jax.ShapeDtypeStruct):
        kind = getattr(array, "manual_axis_type", None)
        return getattr(array, "vma", None) or frozenset() if kind is None else kind.varying
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma
