"""Proximity kernels of a rule: from names and numbers, some of them trainable, to `Proximity`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from attn_jax import ops
from attn_jax.kernels import KERNELS
from attn_jax.ops.proximity import exact_reach, log_weights
from attn_jax.rules import Factor, Product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum(ops.Proximity):
    """The sum of log-weights: the product of kernels."""

    kernels: tuple[ops.Proximity, ...]

    @property
    def reach(self) -> float | None:
        """The smallest distance beyond which one of the kernels has no weight, where known."""
        least = min(map(exact_reach, self.kernels))
        return least if math.isfinite(least) else None

    def log_weight(self, r: Num[Array | np.ndarray, "#b 1 T S"]) -> Float[Array, "#b #N T S"]:
        """Sum over the kernels of log w(r), each -inf beyond its own reach."""
        total = log_weights(self.kernels[0], r)
        for kernel in self.kernels[1:]:
            total = total + log_weights(kernel, r)
        return total


class Kernel(nnx.Module):
    """One kernel of a rule for a number of heads; holds what is trainable of it.

    Args:
      factor: a kernel by name, with its parameters.
      num_heads: of the head group.

    """

    def __init__(self, factor: Factor, num_heads: int):
        self.factor = factor
        self.num_heads = num_heads
        rule = KERNELS[factor.name]
        if rule.free is not None:
            self.log_weights = nnx.Param(jnp.zeros((num_heads, rule.free(factor.parameters))))
        if factor.parameters.get("trainable"):
            start = np.broadcast_to(np.asarray(factor[str(rule.trained)], np.float32), num_heads)
            setattr(self, f"log_{rule.trained}", nnx.Param(jnp.log(jnp.asarray(start))))

    def __call__(self) -> ops.Proximity:
        """The kernel with its present parameters: numbers of the rule, and what is trained."""
        rule, given = KERNELS[self.factor.name], self.factor.parameters
        trainable = given.pop("trainable", False)
        arrays: dict[str, Any] = {
            key: np.asarray(value, np.float32) if isinstance(value, tuple) else value
            for key, value in given.items()
        }
        if trainable:
            arrays[str(rule.trained)] = jnp.exp(getattr(self, f"log_{rule.trained}")[...])
        if rule.free is not None:
            arrays["log_weights"] = self.log_weights[...]
        return rule.build(self.num_heads, **arrays)


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
    known = [radius for radius in radii if math.isfinite(radius)]
    return min(known, default=None)


def _radius(factor: Factor) -> float:
    """Of a kernel whose parameters are fixed, as it says; of others only their reach."""
    reach = factor["reach"]
    stated = math.inf if reach is None else float(reach)
    if factor.trainable:
        return math.floor(stated) if math.isfinite(stated) else stated
    radius = min(stated, exact_reach(Kernel(factor, 1)()))
    return math.floor(radius) if math.isfinite(radius) else radius
