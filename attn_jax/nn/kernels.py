"""Proximity kernels of a rule: from names and numbers, some of them trainable, to `Proximity`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from attn_jax import ops
from attn_jax.ops.proximity import log_weights
from attn_jax.rules import Factor, Product

_CLASSES = {
    "gaussian": ops.Gaussian,
    "exponential": ops.Exponential,
    "window": ops.Window,
    "triangular": ops.Triangular,
    "epanechnikov": ops.Epanechnikov,
    "powerlaw": ops.PowerLaw,
}
_MAIN = {
    "gaussian": "width",
    "exponential": "length",
    "triangular": "radius",
    "epanechnikov": "radius",
    "powerlaw": "exponent",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum(ops.Proximity):
    """The sum of log-weights: the product of kernels."""

    kernels: tuple[ops.Proximity, ...]

    def log_weight(self, r: Num[Array, "#b 1 T S"]) -> Float[Array, "#b #N T S"]:
        """Sum over the kernels of log w(r), each -inf beyond its own reach."""
        total = log_weights(self.kernels[0], r)
        for kernel in self.kernels[1:]:
            total = total + log_weights(kernel, r)
        return total


@dataclasses.dataclass(frozen=True)
class Steps:
    """Buckets of `step` positions each around zero: clip(round(r / step) + (size - 1) // 2)."""

    size: int
    step: float

    def __call__(self, r: Num[Array, "..."]) -> Int[Array, "..."]:
        """The bucket of every relative position."""
        if self.step != 1 or jnp.issubdtype(r.dtype, jnp.floating):
            r = jnp.round(r / self.step).astype(jnp.int32)
        return jnp.clip(r + (self.size - 1) // 2, 0, self.size - 1)


class Kernel(nnx.Module):
    """One kernel of a rule for a number of heads; holds what is trainable of it.

    Args:
      factor: a kernel by name, with its parameters.
      num_heads: of the head group.

    """

    def __init__(self, factor: Factor, num_heads: int):
        self.factor = factor
        self.num_heads = num_heads
        if factor.name in ("table", "t5"):
            size = factor["size"] if factor.name == "table" else factor["buckets"]
            self.log_weights = nnx.Param(jnp.zeros((num_heads, size)))
        elif factor.trainable:
            start = np.broadcast_to(np.float32(factor[_MAIN[factor.name]]), (num_heads,))
            setattr(self, "log_" + _MAIN[factor.name], nnx.Param(jnp.log(jnp.asarray(start))))

    def __call__(self) -> ops.Proximity:
        """The kernel with its present parameters."""
        factor = self.factor
        reach = factor["reach"]
        if factor.name == "alibi":
            return dataclasses.replace(ops.alibi(self.num_heads), reach=reach)
        if factor.name == "table":
            bucket = Steps(factor["size"], factor["step"])
            return ops.Table(self.log_weights[...], bucket=bucket, reach=reach)
        if factor.name == "t5":
            bucket = ops.t5_bucket(
                factor["buckets"], factor["max_distance"], factor["bidirectional"]
            )
            return ops.Table(self.log_weights[...], bucket=bucket, reach=reach)
        return _CLASSES[factor.name](**self._parameters())

    def _parameters(self) -> dict[str, Any]:
        """The constructor's arguments: numbers of the rule, and exp of what is trained."""
        given = {key: value for key, value in self.factor.parameters.items() if key != "trainable"}
        arrays = {k: np.float32(v) if isinstance(v, tuple) else v for k, v in given.items()}
        if self.factor.trainable:
            main = _MAIN[self.factor.name]
            arrays[main] = jnp.exp(getattr(self, "log_" + main)[...])
        return arrays


def combine(kernels: list[ops.Proximity]) -> ops.Proximity | None:
    """One kernel for all factors of a product; None where there is none."""
    if len(kernels) < 2:
        return kernels[0] if kernels else None
    return Sum(tuple(kernels))


def fixed_kernel(product: Product, num_heads: int) -> ops.Proximity | None:
    """The kernel of a product without trainable parameters, for use outside of modules.

    Raises:
      ValueError: a factor is trainable.

    """
    trainable = [str(factor) for factor in product.kernels if factor.trainable]
    if trainable:
        raise ValueError(
            f"{', '.join(trainable)} has parameters to train, which a plain function has no place "
            "for: use attn_jax.nn.MultiHeadAttention"
        )
    return combine([Kernel(factor, num_heads)() for factor in product.kernels])


def known_radius(product: Product) -> float | None:
    """The distance beyond which a product has no weight at all, where its numbers say so."""
    if product.sees_itself_only:
        return 0.0
    radii = [_radius(factor) for factor in product.kernels]
    return min((radius for radius in radii if radius is not None), default=None)


def _radius(factor: Factor) -> float | None:
    limits = [factor.parameters.get("reach")]
    if factor.name in ("window", "triangular", "epanechnikov") and not factor.trainable:
        limits.append(max(np.atleast_1d(factor["radius"])))
    known = [float(limit) for limit in limits if limit is not None]
    return math.floor(min(known)) if known else None
