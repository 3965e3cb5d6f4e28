"""Runs of positions with one label laid so far apart on a longer line that none reaches another.

As primitives of JAX, each the other's transpose: no two positions share a place, so that both ways
rows are read where JAX would add up what it scatters.

Letters: A sequences, P positions, Q places of the longer line, W channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int, Shaped

from attn_jax.ops.toeplitz.bilinear import in_lanes
from attn_jax.ops.varying import varying_as


class Places(NamedTuple):
    """Where positions lie on a longer line.

    Attributes:
      place: of every position.
      position: at every place, -1 where there is none.

    """

    place: Int[Array, "A P"]
    position: Int[Array, "A Q"]


def gap_between(labels: Shaped[Array, "A P"], longer: int) -> Int[Array, ""]:
    """The widest gap between runs that a line so much longer has room for; 0 if labels come back.

    Then keys of other runs carry a run's label too. It is certain that none comes back where labels
    rise, and fall at most once, to one below the first, as the label of padding does.
    """
    before, after = labels[:, :-1], labels[:, 1:]
    changes, rises, falls = (
        x.sum(1, dtype=jnp.int32) for x in (after != before, after > before, after < before)
    )
    once = (falls == 0) | ((falls == 1) & (labels[:, -1] < labels[:, 0]))
    # NaN neither rises nor falls.
    once &= rises + falls == changes
    return jnp.where(once, longer // jnp.maximum(changes, 1), 0).min()


def places(labels: Shaped[Array, "A P"], gap: Int[Array, ""], longer: int) -> Places:
    """With a gap before every run but the first, for which there must be room."""
    sequences, length = labels.shape
    changes = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))
    index = jnp.arange(length, dtype=jnp.int32)[None]
    place = index + gap * jnp.cumsum(changes, 1, dtype=jnp.int32)
    position = jnp.full((sequences, length + longer), -1, jnp.int32)
    rows = jnp.arange(sequences)[:, None]
    position = position.at[rows, place].set(index, mode="promise_in_bounds", unique_indices=True)
    return Places(place, position)


def spread(x: Float[Array, "A P W"], places: Places) -> Float[Array, "A Q W"]:
    """Every position at its place, zeros elsewhere."""
    return _bind(_spread_p, x, places)


def collected(x: Float[Array, "A Q W"], places: Places) -> Float[Array, "A P W"]:
    """What is at every position's place."""
    return _bind(_collected_p, x, places)


def _bind(primitive: Primitive, x: Array, places: Places) -> Array:
    # Inside `shard_map` all operands must vary over the axes over which one does.
    operands = x, *places
    for other in operands:
        operands = tuple(varying_as(z, other) for z in operands)
    return primitive.bind(*operands)


def _taken(x: Array, index: Array) -> Array:
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)


def _spread(x: Array, _: Array, position: Array) -> Array:
    there = _taken(x, jnp.maximum(position, 0))
    return jnp.where(position[..., None] >= 0, there, 0)


def _collected(x: Array, place: Array, _: Array) -> Array:
    return _taken(x, place)


def _transposed(primitive: Primitive, cotangent, _, place, position):
    y = _bind(primitive, ad.instantiate_zeros(cotangent), Places(place, position))
    return [y, None, None]


def _batched(primitive: Primitive, arguments, axes):
    """A mapped axis joins the sequences."""
    moved = in_lanes(arguments, axes)
    y = primitive.bind(*(z.reshape(-1, *z.shape[2:]) for z in moved))
    return y.reshape(len(moved[0]), -1, *y.shape[1:]), 0


def _linear(name: str, function: Any, length_of: int) -> Primitive:
    """In its first operand; the result is as long as another operand."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function))
    primitive.def_abstract_eval(
        lambda x, *places: x.update(
            shape=(x.shape[0], places[length_of].shape[1], x.shape[2]), weak_type=False
        )
    )

    def jvp(primals, tangents):
        y = primitive.bind(*primals)
        if type(tangents[0]) is ad.Zero:
            return y, ad.Zero(jax.typeof(y).to_tangent_aval())
        return y, primitive.bind(tangents[0], *primals[1:])

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = lambda *given: _batched(primitive, *given)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


_spread_p = _linear("attn_jax_spread_runs", _spread, 1)
_collected_p = _linear("attn_jax_collected_runs", _collected, 0)
ad.primitive_transposes[_spread_p] = lambda *given: _transposed(_collected_p, *given)
ad.primitive_transposes[_collected_p] = lambda *given: _transposed(_spread_p, *given)
