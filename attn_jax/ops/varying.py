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
    """By the type: as `vma`, and from jax 0.10 on within another attribute."""
    kind = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    manual = getattr(kind, "mat", None) or getattr(kind, "manual_axis_type", None)
    return (getattr(kind, "vma", None) or frozenset()) if manual is None else manual.varying
