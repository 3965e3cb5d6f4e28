"""Initial values that depend on the seed and on a parameter's path, and on nothing else."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

_NOT_DECAYED = (
    "bias",
    "scale",
    "log_width",
    "log_length",
    "log_radius",
    "log_exponent",
    "log_weights",
    "gate",
)


def named(rngs: nnx.Rngs, name: str | int) -> nnx.Rngs:
    """The source of initial values of the child `name`.

    The key is fold_in(key of the parent, crc32(name)); how often the parent was used does not
    count. So a module's initial values follow from the seed and its path: leaving a module out,
    or building it later, moves nobody else's.
    """
    key = jax.random.fold_in(rngs.params.key[...], zlib.crc32(str(name).encode()))
    return nnx.Rngs(params=key)


def no_weight_decay(path: Sequence[Any], value: Any) -> bool:
    """Whether a parameter is left out of weight decay.

    Biases, scales of norms, logarithms of kernel widths, tables of log-weights and gates are:
    zero is no neutral value for them. Everything of fewer than two axes is left out too.

    Args:
      path: the parameter's key path, as `jax.tree_util.tree_map_with_path` gives it.
      value: the parameter.

    """
    names = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    return value.ndim < 2 or any(name in _NOT_DECAYED for name in names)
