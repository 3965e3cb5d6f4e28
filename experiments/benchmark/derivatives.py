"""What is asked of a function beside its value, the same for every JAX contender."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """(cotangent, *arguments) -> the gradient of sum(cotangent * function) in every argument."""

    def differentiated(cotangent: jax.Array, *arguments: Any) -> Any:
        def loss(*inner: Any) -> jax.Array:
            return jnp.sum(function(*inner) * cotangent)

        return jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)

    return differentiated


def tangent(function: Callable[..., Any]) -> Callable[..., Any]:
    """(arguments, directions) -> value and directional derivative (Jacobian-vector product)."""

    def differentiated(arguments: Any, directions: Any) -> Any:
        return jax.jvp(function, arguments, directions)

    return differentiated


def hessian_vector(function: Callable[..., Any]) -> Callable[..., Any]:
    """(cotangent, arguments, directions) -> derivative of `gradient` in those directions."""

    def differentiated(cotangent: jax.Array, arguments: Any, directions: Any) -> Any:
        def first(*inner: Any) -> Any:
            return gradient(function)(cotangent, *inner)

        return jax.jvp(first, arguments, directions)[1]

    return differentiated
