"""Bilinear sums as primitives of JAX, each of which says what its transposes are.

JAX transposes what a sum is made of, step by step. On a CPU that loses the form that made it fast:
a slice becomes a padded array, a product of blocks comes out turned round and is copied. A
primitive names its transposed sums; where these are such sums again, so are all derivatives.

XLA:CPU also fuses a sum with what reads it, and where that is a sum of slices computes it again for
each of them. Such a sum can be kept apart: in a call that is not inlined.

Letters: A sequences; a: A or 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, ArrayLike, Shaped

from attn_jax.ops.varying import varying_as

Shape = tuple[int, ...]
# Calls a function of arrays.
Run = Callable[..., Array]


def bilinear(
    name: str,
    function: Callable[..., Array],
    shape: Callable[..., Shape],
    in_x: Callable[..., Array],
    in_weights: Callable[..., Array],
    apart: Callable[..., bool] = lambda **_: False,
) -> Callable[..., Array]:
    """A primitive of x [A, ...] and weights [a, ...]; further arguments are static, by name.

    Args:
      name: of the primitive.
      function: of x and weights; `run(part, *arrays)` calls a part of it that may be kept apart.
      shape: of the result, from those of x and of the weights.
      in_x: the transpose, from the cotangent, the weights and the shape of x.
      in_weights: the transpose, from the cotangent, x and the shape of the weights.
      apart: whether to store that part's result on a CPU, from the static arguments.

    """
    primitive = Primitive(name)

    def transposed_in_x(cotangent, x, weights, **how):
        return in_x(jnp.asarray(cotangent), jnp.asarray(weights), x.aval.shape, **how)

    def transposed_in_weights(cotangent, x, weights, **how):
        return in_weights(jnp.asarray(cotangent), jnp.asarray(x), weights.aval.shape, **how)

    def abstract(x, weights, **how):
        return x.update(shape=shape(x.shape, weights.shape, **how), weak_type=False)

    def called(x: Shaped[Array, "A ..."], weights: Shaped[Array, "a ..."], **how: Any) -> Array:
        # Inside `shard_map` both operands must vary over the axes over which one does.
        x, weights = varying_as(x, weights), varying_as(weights, x)
        return primitive.bind(x, weights, **how)

    def batched(arguments, axes, **how):
        """A mapped axis joins the sequences."""
        x, weights = in_lanes(arguments, axes)
        lanes = len(x)
        x = x.reshape(-1, *x.shape[2:])
        if axes[1] is None and weights.shape[1] == 1:
            weights = weights[0]
        else:
            weights = jnp.broadcast_to(weights, (lanes, len(x) // lanes, *weights.shape[2:]))
            weights = weights.reshape(-1, *weights.shape[2:])
        y = called(x, weights, **how)
        return y.reshape(lanes, -1, *y.shape[1:]), 0

    def anywhere(x, weights, **how):
        return function(x, weights, run=_inlined, **how)

    def on_cpu(x, weights, **how):
        return function(x, weights, run=_kept_apart if apart(**how) else _inlined, **how)

    primitive.def_impl(
        lambda x, weights, **how: jax.jit(anywhere, static_argnames=how)(x, weights, **how)
    )
    primitive.def_abstract_eval(abstract)
    ad.defbilinear(primitive, transposed_in_x, transposed_in_weights)
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(anywhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return called


def in_lanes(arguments: Sequence[ArrayLike], axes: Sequence[int | None]) -> list[Array]:
    """With the mapped axis in front, also of what is not mapped; constants come as NumPy's."""
    pairs = list(zip(map(jnp.asarray, arguments), axes, strict=True))
    lanes = next(z.shape[a] for z, a in pairs if a is not None)
    return [
        jnp.broadcast_to(z[None], (lanes, *z.shape)) if a is None else jnp.moveaxis(z, a, 0)
        for z, a in pairs
    ]


def _inlined(function: Callable[..., Array], *arrays: Array) -> Array:
    return function(*arrays)


def _kept_apart(function: Callable[..., Array], *arrays: Array) -> Array:
    """Axes of one stay outside: XLA may choose other layouts of them inside, and copy."""
    shapes = []

    def squeezed(*given: Array) -> Array:
        whole = (z.reshape(x.shape) for z, x in zip(given, arrays, strict=True))
        y = function(*whole)
        shapes.append(y.shape)
        return y.squeeze()

    with set_xla_metadata(inlineable="false"):
        y = jax.jit(squeezed)(*(x.squeeze() for x in arrays))
    return y.reshape(shapes[0])
