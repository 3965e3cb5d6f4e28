"""Sums whose weights a few parameters give, with the derivative that suits these.

Letters: B batch, P positions, n heads with weights of their own, W channels; k: a multiple of n.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from attn_jax.ops.toeplitz.rows import of_rows

Parameters = dict[str, Float[Array, "n"]]


def by_parameters(
    total: Callable[[Array, Array], Array],
    weights: Callable[[Parameters, Any], Array],
    x: Float[Array, "B P k W"],
    parameters: Parameters,
    fixed: Any = None,
) -> Float[Array, "B P k W"]:
    """The sum of x with the weights that the parameters give.

    Each moves the weights of its head in one direction: its derivative is one sum more, where that
    of the weights would be one for every tap.

    Args:
      total: of x and weights, linear in both.
      weights: of the parameters and of what is fixed, in the form that `total` takes.
      x: the values.
      parameters: each head's weights depend on its own entries alone.
      fixed: other arrays that the weights need, without derivatives. Neither function may close
        over a traced array: the derivative's rule outlives the trace.

    """

    @jax.custom_jvp
    def function(x: Array, parameters: Parameters, fixed: Any) -> Array:
        return total(x, weights(parameters, fixed))

    def derivative(primals, tangents):
        x, parameters, fixed = primals
        moved, moving, _ = tangents
        parts = []
        if not isinstance(moved, SymbolicZero):
            parts.append(total(moved, weights(parameters, fixed)))
        for name, tangent in moving.items():
            if not isinstance(tangent, SymbolicZero):
                direction = _direction(weights, parameters, fixed, name)
                by_row = jnp.broadcast_to(
                    tangent.reshape(1, 1, -1, 1), (1, x.shape[1], len(tangent), 1)
                )
                parts.append(of_rows(total(x, direction), by_row))
        return function(x, parameters, fixed), functools.reduce(jnp.add, parts)

    function.defjvp(derivative, symbolic_zeros=True)
    return function(x, parameters, fixed)


def _direction(
    weights: Callable[[Parameters, Any], Array], parameters: Parameters, fixed: Any, name: str
) -> Array:
    """The weights' derivative in one parameter."""
    unit = {k: jnp.full_like(z, k == name) for k, z in parameters.items()}
    there, direction = jax.jvp(lambda p: weights(p, fixed), (parameters,), (unit,))
    # A weight that has vanished, times a slope that has overflowed: it vanishes faster.
    return jnp.where((there == 0) & jnp.isnan(direction), 0, direction)
