"""A choice among linear functions as a primitive of JAX, whose transpose is such a choice again.

JAX splits a `switch` under a derivative into what is known and what is linear, and hands everything
that a branch may need from one to the other: residuals of all branches, copied. The transpose here
takes what is fixed as it is and computes again what its branch needs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Int

from attn_jax.ops.varying import varying_as

_linear_switch_p = Primitive("attn_jax_linear_switch")
_linear_switch_p.multiple_results = True


def linear_switch(
    index: Int[Array, ""],
    functions: Sequence[Callable[[Any, Any], Any]],
    fixed: Any,
    moved: Any,
) -> Any:
    """functions[index](fixed, moved), each linear in the leaves of `moved`.

    Args:
      index: which one.
      functions: of pytrees to a pytree; they may close over no traced array.
      fixed: what they are not linear in.
      moved: what they are linear in.

    """
    traced = [jax.make_jaxpr(f, return_shape=True)(fixed, moved) for f in functions]
    jaxprs, shapes = zip(*traced, strict=True)
    if any(j.out_avals != jaxprs[0].out_avals for j in jaxprs):
        jaxprs = tuple(
            jax.make_jaxpr(functools.partial(_varying_as_all, f, shapes))(fixed, moved)
            for f in functions
        )
    leaves, count = jax.tree.leaves((fixed, moved)), len(jax.tree.leaves(fixed))
    y = _linear_switch_p.bind(index, *leaves, jaxprs=jaxprs, count=count)
    return jax.tree.unflatten(jax.tree.structure(shapes[0]), y)


def _varying_as_all(function: Callable[[Any, Any], Any], shapes: Any, fixed: Any, moved: Any):
    """As the function, varying over the axes of `shard_map` over which any of them does."""
    y = function(fixed, moved)
    for shape in shapes:
        y = jax.tree.map(varying_as, y, shape)
    return y


def _called(index: Array, *leaves: Array, jaxprs: tuple[ClosedJaxpr, ...], count: int):
    del count
    return lax.switch(index, [jaxpr_as_fun(j) for j in jaxprs], *leaves)


def _jvp(primals, tangents, *, jaxprs: tuple[ClosedJaxpr, ...], count: int):
    """Linear in what moves; what is fixed is differentiated as JAX would."""
    index, *leaves = primals
    fixed, moved = leaves[:count], leaves[count:]
    _, *given = tangents
    y = _linear_switch_p.bind(*primals, jaxprs=jaxprs, count=count)
    parts = []
    if any(type(t) is not ad.Zero for t in given[count:]):
        moving = [ad.instantiate_zeros(t) for t in given[count:]]
        parts.append(_linear_switch_p.bind(index, *fixed, *moving, jaxprs=jaxprs, count=count))
    changing = [i for i, t in enumerate(given[:count]) if type(t) is not ad.Zero]
    if changing:

        def of_fixed(some: Sequence[Array]) -> Sequence[Array]:
            whole = list(fixed)
            for i, leaf in zip(changing, some, strict=True):
                whole[i] = leaf
            branches = [jax.checkpoint(jaxpr_as_fun(j)) for j in jaxprs]
            return lax.switch(index, branches, *whole, *moved)

        some = [[z[i] for i in changing] for z in (fixed, given)]
        parts.append(jax.jvp(of_fixed, some[:1], some[1:])[1])
    return y, [functools.reduce(jnp.add, z) for z in zip(*parts, strict=True)]


def _transposed(cotangents, index, *leaves, jaxprs: tuple[ClosedJaxpr, ...], count: int):
    fixed, moved = leaves[:count], [z.aval for z in leaves[count:]]
    cotangents = [ad.instantiate_zeros(z) for z in cotangents]

    def turned(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
        def function(fixed: Sequence[Array], cotangents: Sequence[Array]) -> Sequence[Array]:
            def of_moved(*moved: Array) -> Sequence[Array]:
                return jaxpr_as_fun(jaxpr)(*fixed, *moved)

            return jax.linear_transpose(of_moved, *moved)(cotangents)

        return jax.make_jaxpr(function)(fixed, cotangents)

    jaxprs = tuple(turned(j) for j in jaxprs)
    y = _linear_switch_p.bind(index, *fixed, *cotangents, jaxprs=jaxprs, count=count)
    return [None] * (1 + count) + list(y)


def _batched(arguments, axes, *, jaxprs: tuple[ClosedJaxpr, ...], count: int):
    """Lanes that choose alike choose by one such choice again; others take all and select."""
    index, *leaves = arguments
    if axes[0] is not None:
        y = jax.vmap(functools.partial(_called, jaxprs=jaxprs, count=count), axes)(*arguments)
        return y, [0] * len(y)
    jaxprs = tuple(jax.make_jaxpr(jax.vmap(jaxpr_as_fun(j), axes[1:]))(*leaves) for j in jaxprs)
    y = _linear_switch_p.bind(index, *leaves, jaxprs=jaxprs, count=count)
    return y, [0] * len(y)


def _at_once(index: Any, *leaves: Any, jaxprs: tuple[ClosedJaxpr, ...], count: int):
    """Outside of `jit` the index is known; a compiled choice would be of this call alone."""
    del count
    return jaxpr_as_fun(jaxprs[int(jnp.clip(index, 0, len(jaxprs) - 1))])(*leaves)


def _abstract(*_, jaxprs: tuple[ClosedJaxpr, ...], count: int):
    del count
    return jaxprs[0].out_avals


_linear_switch_p.def_impl(_at_once)
_linear_switch_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_switch_p] = _jvp
ad.primitive_transposes[_linear_switch_p] = _transposed
batching.primitive_batchers[_linear_switch_p] = _batched
mlir.register_lowering(_linear_switch_p, mlir.lower_fun(_called, multiple_results=True))
