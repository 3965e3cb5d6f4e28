"""The weights of every attention of a model, as it is called."""

import dataclasses
import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from attn_jax.nn.attention import MultiHeadAttention
from attn_jax.nn.watching import Seen, watching


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """What one attention of a model did in one call.

    Attributes:
      weights: w, of every key for every query and head, without dropout. Rows sum to one over the
        allowed keys where the normaliser is softmax.
      allowed: keys that the mask lets a query see.
      relative: r, key less query position, or what kernels see in its place, see `nn.Distance`.

    """

    weights: Float[Array, "B N T S"]
    allowed: Bool[Array, "B N T S"]
    relative: Num[Array, "#B T S"]


def attentions(model: nnx.Module, only: str = "*") -> dict[str, MultiHeadAttention]:
    """The attentions of a model by path, such as "encoder/layers/0/attention".

    Args:
      model: any module, of `attn_jax.nn` or of your own.
      only: a pattern of paths: "decoder/*", "*/cross", "*/layers/1/*".

    Raises:
      ValueError: no attention's path fits the pattern.

    """
    found = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MultiHeadAttention)
    }
    found = dict(sorted(found.items(), key=lambda item: _natural(item[0])))
    chosen = {path: found[path] for path in found if fnmatch.fnmatchcase(path, only)}
    if not chosen:
        there = ", ".join(found) or "there is none"
        raise ValueError(f"only={only!r} fits no attention of the model: {there}")
    return chosen


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split("/")]


def record(
    model: nnx.Module, *arguments: Any, only: str = "*", **keywords: Any
) -> tuple[Any, dict[str, Attention]]:
    """Calls a model and keeps the weights of its attentions.

    Works on models of any shape whose attention is `nn.MultiHeadAttention`, without a change of
    their code, inside of `jax.jit` too. For Flax's own modules see `nn.attention_fn`, which sows
    weights as Flax does.

    Args:
      model: any module.
      *arguments: of the call.
      only: a pattern of paths, see `attentions`.
      **keywords: of the call.

    Returns:
      What the model gives, and each attention's `Attention` by path.

    Raises:
      ValueError: no path fits the pattern, or an attention was called more than once.

    """
    output, found = watch(model, *arguments, only=only, **keywords)
    return output, {
        path: Attention(seen.weights(), seen.allowed(), jnp.asarray(seen.relative()))
        for path, seen in found.items()
    }


def watch(
    model: nnx.Module, *arguments: Any, only: str = "*", **keywords: Any
) -> tuple[Any, dict[str, Seen]]:
    """Calls a model and keeps what its attentions were called with, by path; see `record`."""
    paths = {id(module): path for path, module in attentions(model, only).items()}
    found: dict[str, Seen] = {}

    def watcher(seen: Seen, mixed: Any) -> None:
        del mixed
        path = paths.get(id(seen.module))
        if path is None:
            return
        if path in found:
            raise ValueError(f"{path} was called more than once: record one call at a time")
        found[path] = seen

    with watching(watcher):
        output = model(*arguments, **keywords)  # pyright: ignore[reportCallIssue]
    return output, {path: found[path] for path in paths.values() if path in found}
