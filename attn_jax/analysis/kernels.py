"""Kernels as heads are described by them: shifted, one a head, with a part for the first token."""

# ruff: noqa: D102 (the base class documents what subclasses override)

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from attn_jax import ops
from attn_jax.kernels import EvenBuckets
from attn_jax.ops.proximity import log_weights

FAMILIES = {
    "gaussian": ("width", ops.Gaussian),
    "exponential": ("length", ops.Exponential),
    "powerlaw": ("exponent", ops.PowerLaw),
    "triangular": ("radius", ops.Triangular),
    "epanechnikov": ("radius", ops.Epanechnikov),
    "window": ("radius", ops.Window),
}
"""The families by name: their parameter and their kernel. A free table stands beside them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Shifted(ops.Proximity):
    """log w(r - offset): a kernel whose peak lies at the offset."""

    kernel: ops.Proximity
    offset: Any

    def log_weight(self, r: Num[Array | np.ndarray, "#b 1 T S"]) -> Float[Array, "#b #N T S"]:
        return log_weights(self.kernel, r - ops.per_head(self.offset))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PerHead(ops.Proximity):
    """A kernel of its own for every head."""

    kernels: tuple[ops.Proximity, ...]

    def log_weight(self, r: Num[Array | np.ndarray, "#b 1 T S"]) -> Float[Array, "#b #N T S"]:
        shape = (r.shape[0], 1, *r.shape[2:])
        each = [jnp.broadcast_to(log_weights(kernel, r), shape) for kernel in self.kernels]
        return jnp.concatenate(each, 1)


def of_family(family: str, scale: Any, offset: Any) -> ops.Proximity:
    """A kernel by its family's name, its parameter and the place of its peak."""
    return Shifted(FAMILIES[family][1](scale), offset)


def table(log_weights: Float[Array | np.ndarray, "L"], step: float = 1.0) -> ops.Table:
    """A free log-weight for every `step` of relative position, clipped at its ends."""
    bucket: Any = EvenBuckets(len(log_weights), step)
    return ops.Table(jnp.asarray(log_weights), bucket=bucket)
