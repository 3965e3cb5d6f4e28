"""Sums whose weights a few parameters give, with the derivative that suits these.

Letters: B batch, P positions, n heads with weights of their own, W channels; k: a multiple of n.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from attn_jax.ops.toeplitz.rows import of_rows


def by_parameters(
    total: Callable[[Array, Array], Array],
    weights: Callable[[dict[str, Array]], Float[Array, "b R #P n"]],
    x: Float[Array, "B P k W"],
    parameters: dict[str, Float[Array, "n"]],
) -> Float[Array, "B P k W"]:
    """The sum of x with the weights that the parameters give.

    Each moves the weights of its head in one direction: its derivative is one sum more, where that
    of the weights would be one for every tap.
    """

    @jax.custom_jvp
    def function(x: Array, parameters: dict[str, Array]) -> Array:
        return total(x, weights(parameters))

    def derivative(primals, tangents):
        x, parameters = primals
        moved, moving = tangents
        parts = []
        if not isinstance(moved, SymbolicZero):
            parts.append(total(moved, weights(parameters)))
        for name, tangent in moving.items():
            if not isinstance(tangent, SymbolicZero):
                unit = {k: jnp.full_like(z, k == name) for k, z in parameters.items()}
                direction = jax.jvp(weights, (parameters,), (unit,))[1]
                by_row = jnp.broadcast_to(
                    tangent.reshape(1, 1, -1, 1), (1, x.shape[1], len(tangent), 1)
                )
                parts.append(of_rows(total(x, direction), by_row))
        return function(x, parameters), functools.reduce(jnp.add, parts)

    function.defjvp(derivative, symbolic_zeros=True)
    return function(x, parameters)
