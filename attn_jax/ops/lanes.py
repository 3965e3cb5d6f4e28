"""Branching on a property of data that stays a branch under vmap."""

import jax
from jaxtyping import Array, Bool


@jax.custom_batching.custom_vmap
def any_in_all_lanes(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether any flag is set, in any lane of a vmap.

    The answer is the same for all lanes: so a `lax.cond` on it runs one branch, where a predicate
    of each lane's own would make vmap run both and select.
    """
    return flags.any()


@any_in_all_lanes.def_vmap
def _any_over_lanes(size, batched, flags):
    del size, batched
    return any_in_all_lanes(flags), False


@jax.custom_batching.custom_vmap
def each_in_any_lane(flags: Bool[Array, "n"]) -> Bool[Array, "n"]:
    """Which flags are set in some lane of a vmap: the same answer for all lanes."""
    return flags


@each_in_any_lane.def_vmap
def _each_over_lanes(size, batched, flags):
    del size, batched
    return each_in_any_lane(flags.any(0)), False
