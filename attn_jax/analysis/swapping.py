"""Heads replaced by kernels without retraining: what is lost of the score.

Letters: B batch, T queries, S keys, N heads, D value width.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn_jax.analysis.fitting import Fit
from attn_jax.analysis.kernels import PerHead
from attn_jax.analysis.recording import attentions
from attn_jax.nn.watching import Seen, watching
from attn_jax.ops import Proximity


class Head(NamedTuple):
    """A head of a model: the path of its attention, see `attentions`, and its number."""

    path: str
    index: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replacement:
    """What stands in for heads of one attention.

    Attributes:
      kernel: of every head, or one for all; None: the mean over the allowed keys.
      first: a, the part of the first token a head; the kernel has the rest.
      swapped: 1 for a head that is replaced, 0 for one that stays; data, so that one compiled
        program serves every choice.
      silent: 1 for a replaced head that gives zero.

    """

    kernel: Proximity | None
    first: Float[Array, "N"]
    swapped: Float[Array, "N"]
    silent: Float[Array, "N"]

    @classmethod
    def of(cls, fits: Sequence[Fit]) -> "Replacement":
        """All heads by the kernels fitted to them."""
        first = jnp.asarray([fit.first for fit in fits], jnp.float32)
        none = jnp.zeros(len(fits))
        return cls(PerHead(tuple(fit.kernel for fit in fits)), first, none + 1, none)

    @classmethod
    def uniform(cls, heads: int) -> "Replacement":
        """All heads by the mean over the keys that they may see."""
        none = jnp.zeros(heads)
        return cls(None, none, none + 1, none)

    @classmethod
    def zero(cls, heads: int) -> "Replacement":
        """All heads by nothing."""
        none = jnp.zeros(heads)
        return cls(None, none, none + 1, none + 1)

    def only(self, heads: Iterable[int]) -> "Replacement":
        """The same for these heads; the others stay."""
        chosen = np.isin(np.arange(len(self.swapped)), list(heads))
        return dataclasses.replace(self, swapped=jnp.asarray(chosen, jnp.float32))

    def __call__(
        self, seen: Seen, mixed: Float[Array, "B T N D"] | None
    ) -> Float[Array, "B T N D"] | None:
        """What the attention's heads give when those that are swapped are replaced.

        It is a watcher, see `nn.watching`.
        """
        if mixed is None:
            raise ValueError("heads of a recurrent decoder can be seen, not replaced")
        part, swapped, silent = (
            x.reshape(1, 1, -1, 1) for x in (self.first, self.swapped, self.silent)
        )
        by_kernel = seen.mix(self.kernel, implementation="dense")
        other = (1 - silent) * ((1 - part) * by_kernel + part * _first_values(seen))
        return jnp.where(swapped > 0, other, mixed)


def _first_values(seen: Seen) -> Float[Array, "B T N D"]:
    """The value at the first key that each query may see; zero where it sees none."""
    allowed = seen.allowed()
    index = jnp.argmax(allowed, -1)[..., None]
    value = jnp.take_along_axis(jnp.moveaxis(seen.value, 1, 2), index, 2)
    return jnp.moveaxis(jnp.where(allowed.any(-1, keepdims=True), value, 0), 1, 2)


@contextlib.contextmanager
def swapping(model: nnx.Module, replacements: Mapping[str, Replacement]) -> Iterator[None]:
    """Calls of the model inside have heads replaced.

    Args:
      model: any module whose attention is `nn.MultiHeadAttention`.
      replacements: by path, see `attentions`.

    Raises:
      ValueError: a path is none of the model's.

    """
    modules = attentions(model)
    unknown = sorted(set(replacements) - set(modules))
    if unknown:
        raise ValueError(
            f"the model has no attention {', '.join(unknown)}: its paths are {', '.join(modules)}"
        )
    by_id = {id(modules[path]): one for path, one in replacements.items()}

    def watcher(seen: Seen, mixed: Any) -> Any:
        replacement = by_id.get(id(seen.module))
        return None if replacement is None else replacement(seen, mixed)

    with watching(watcher):
        yield


def choose(
    replacements: Mapping[str, Replacement], heads: Iterable[Head]
) -> dict[str, Replacement]:
    """The replacements of these heads alone."""
    heads = list(heads)
    return {
        path: one.only(head.index for head in heads if head.path == path)
        for path, one in replacements.items()
    }


def all_heads(replacements: Mapping[str, Replacement]) -> list[Head]:
    """Every head that the replacements know."""
    return [
        Head(path, index) for path, one in replacements.items() for index in range(len(one.swapped))
    ]


def shuffled(fits: Mapping[str, Sequence[Fit]], rng: np.random.Generator) -> dict[str, list[Fit]]:
    """The fits given to other heads, none to its own where there are two heads or more.

    A control that keeps the set of kernels.
    """
    heads = [(path, index) for path, some in fits.items() for index in range(len(some))]
    order = rng.permutation(len(heads))
    given = {heads[a]: heads[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return {
        path: [fits[given[path, i][0]][given[path, i][1]] for i in range(len(some))]
        for path, some in fits.items()
    }


def greedy_order(
    score: Callable[[Sequence[Head]], float],
    heads: Sequence[Head],
    on_choice: Callable[[Head, float], None] = lambda head, value: None,
) -> list[tuple[Head, float]]:
    """Heads in the order in which their replacement costs least, and the score after each.

    At every step the head is replaced without which the score is largest, with those before it
    replaced already.

    Args:
      score: of the model with these heads replaced; larger is better.
      heads: all that are to be replaced, one after the other.
      on_choice: is told of every step.

    """
    left, chosen, steps = list(heads), [], []
    while left:
        values = [score([*chosen, head]) for head in left]
        best = int(np.argmax(values))
        chosen.append(left.pop(best))
        steps.append((chosen[-1], values[best]))
        on_choice(*steps[-1])
    return steps
