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

from attn_jax.ops.toeplitz.rowwise import times

Parameters = dict[str, Float[Array, "n"]]


def _unchanged(x: Array, _: Any) -> Array:
    return x


def by_parameters(
    total: Callable[[Array, Array], Array],
    weights: Callable[[Parameters, Any], Array],
    x: Float[Array, "B P k W"],
    parameters: Parameters,
    fixed: Any = None,
    before: Callable[[Array, Any], Array] = _unchanged,
    after: Callable[[Array, Any], Array] = _unchanged,
) -> Float[Array, "B P k W"]:
    """The sum of x with the weights that the parameters give.

    Each moves the weights of its head in one direction: its derivative is one sum more, where that
    of the weights would be one for every tap.

    Args:
      total: of x and weights, linear in both.
      weights: of the parameters and of what is fixed, in the form that `total` takes.
      x: the values.
      parameters: each head's weights depend on its own entries alone.
      fixed: other arrays that the functions need, without derivatives. None may close over a traced
        array: the derivative's rule outlives the trace.
      before: what is done to x first, of it and what is fixed; linear, and each head apart.
      after: what is done to the sum last, likewise.

    """

    @jax.custom_jvp
    def function(x: Array, parameters: Parameters, fixed: Any) -> Array:
        return after(total(before(x, fixed), weights(parameters, fixed)), fixed)

    def derivative(primals, tangents):
        """A parameter's change scales x before the sum.

        So in the transpose what undoes `after` serves all derivatives, and x is summed in none.
        """
        x, parameters, fixed = primals
        moved, moving, _ = tangents
        parts = []
        if not isinstance(moved, SymbolicZero):
            parts.append(total(before(moved, fixed), weights(parameters, fixed)))
        for name, tangent in moving.items():
            if not isinstance(tangent, SymbolicZero):
                direction = _direction(weights, parameters, fixed, name)
                parts.append(total(before(_by_head(x, tangent), fixed), direction))
        return function(x, parameters, fixed), after(functools.reduce(jnp.add, parts), fixed)

    function.defjvp(derivative, symbolic_zeros=True)
    return function(x, parameters, fixed)


def _by_head(x: Float[Array, "B P k W"], factors: Float[Array, "n"]) -> Float[Array, "B P k W"]:
    """Each head by its factor."""
    flat = x.reshape(*x.shape[:2], -1)
    rows = jnp.broadcast_to(factors.reshape(1, 1, -1, 1), (*x.shape[:2], len(factors), 1))
    return times(flat, rows).reshape(x.shape)


def _direction(
    weights: Callable[[Parameters, Any], Array], parameters: Parameters, fixed: Any, name: str
) -> Array:
    """The weights' derivative in one parameter."""
    unit = {k: jnp.full_like(z, k == name) for k, z in parameters.items()}
    there, direction = jax.jvp(lambda p: weights(p, fixed), (parameters,), (unit,))
    # A weight that has vanished, times a slope that has overflowed: it vanishes faster.
    return jnp.where((there == 0) & jnp.isnan(direction), 0, direction)
