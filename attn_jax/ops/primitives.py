"""Linear and bilinear functions as primitives of JAX, each of which says what its transposes are.

JAX transposes what a function is made of, step by step. On a CPU that loses the form that made it
fast: a slice becomes a padded array, a product of blocks comes out turned round and is copied. A
primitive names its transposes; where these are such primitives again, so are all derivatives.

XLA:CPU also fuses a sum with what reads it, and where that is a sum of slices computes it again for
each of them. Such a sum can be kept apart: in a call that is not inlined.

Letters: A sequences; a: A or 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, ArrayLike

from attn_jax.ops.varying import varying_as

Shape = tuple[int, ...]
# Calls a function of arrays.
Run = Callable[..., Array]


def linear(
    name: str,
    function: Callable[..., Array],
    shape: Callable[..., Shape],
    transpose: Callable[..., Array],
    apart: bool = False,
) -> Callable[..., Array]:
    """A primitive of x [A, ...], linear in it, and arrays [a, ...] of whole numbers.

    Further arguments are static, by name.

    Args:
      name: of the primitive.
      function: of x and the numbers; `run(part, *arrays)` calls a part that may be kept apart.
      shape: of the result, from those of x and of the numbers.
      transpose: from the cotangent, the numbers and the shape of x.
      apart: whether to store that part's result on a CPU.

    """
    primitive = Primitive(name)
    bound = _defined(primitive, function, shape, lambda **_: apart)

    def jvp(primals, tangents, **how):
        y = bound(*primals, **how)
        if type(tangents[0]) is ad.Zero:
            return y, ad.Zero(jax.typeof(y).to_tangent_aval())
        return y, bound(tangents[0], *primals[1:], **how)

    def transposed(cotangent, x, *numbers, **how):
        y = transpose(ad.instantiate_zeros(cotangent), *numbers, shape=x.aval.shape, **how)
        return [y] + [None] * len(numbers)

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transposed
    return bound


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

    ad.defbilinear(primitive, transposed_in_x, transposed_in_weights)
    return _defined(primitive, function, shape, apart)


def _defined(
    primitive: Primitive,
    function: Callable[..., Array],
    shape: Callable[..., Shape],
    apart: Callable[..., bool],
) -> Callable[..., Array]:
    """Give it values and lanes, but no derivative."""

    def called(*operands: Array, **how: Any) -> Array:
        # Inside `shard_map` all operands must vary over the axes over which one does.
        for other in operands:
            operands = tuple(varying_as(z, other) for z in operands)
        return primitive.bind(*operands, **how)

    def abstract(x, *others, **how):
        shapes = (z.shape for z in (x, *others))
        return x.update(shape=shape(*shapes, **how), weak_type=False)

    def anywhere(*operands, **how):
        return function(*operands, run=inlined, **how)

    def on_cpu(*operands, **how):
        return function(*operands, run=kept_apart if apart(**how) else inlined, **how)

    primitive.def_impl(
        lambda *operands, **how: jax.jit(anywhere, static_argnames=how)(*operands, **how)
    )
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = functools.partial(_batched, called)
    mlir.register_lowering(primitive, mlir.lower_fun(anywhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    return called


def _batched(
    called: Callable[..., Array],
    operands: Sequence[ArrayLike],
    axes: Sequence[int | None],
    **how: Any,
) -> tuple[Array, int]:
    """A mapped axis joins the sequences. Constants come as NumPy's."""
    arrays = [jnp.asarray(z) for z in operands]
    lanes = next(z.shape[a] for z, a in zip(arrays, axes, strict=True) if a is not None)
    x, *others = (
        z[None] if a is None else jnp.moveaxis(z, a, 0) for z, a in zip(arrays, axes, strict=True)
    )
    x = jnp.broadcast_to(x, (lanes, *x.shape[1:]))
    sequences = x.shape[1]
    joined = [x.reshape(lanes * sequences, *x.shape[2:])]
    for z, axis in zip(others, axes[1:], strict=True):
        if axis is None and z.shape[1] == 1:
            joined.append(z[0])
        else:
            whole = jnp.broadcast_to(z, (lanes, sequences, *z.shape[2:]))
            joined.append(whole.reshape(lanes * sequences, *z.shape[2:]))
    y = called(*joined, **how)
    return y.reshape(lanes, sequences, *y.shape[1:]), 0


def inlined(function: Callable[..., Array], *arrays: Array) -> Array:
    """A `Run` that leaves all to the compiler."""
    return function(*arrays)


def kept_apart(function: Callable[..., Array], *arrays: Array) -> Array:
    """A `Run` that stores the arrays and the result.

    Axes of one stay outside: XLA may choose other layouts of them inside, and copy.
    """
    shapes = []

    def squeezed(*given: Array) -> Array:
        whole = (z.reshape(x.shape) for z, x in zip(given, arrays, strict=True))
        with set_xla_metadata(inlineable="true"):  # calls inside would inherit what is said below
            y = function(*whole)
        shapes.append(y.shape)
        return y.squeeze()

    with set_xla_metadata(inlineable="false"):
        y = jax.jit(squeezed)(*(x.squeeze() for x in arrays))
    return y.reshape(shapes[0])
