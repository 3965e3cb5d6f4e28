"""Seeing what every attention of a model does, and changing it, without changing the model's code.

def watcher(seen, mixed):
    print(seen.module.num_heads, seen.weights().shape)

with watching(watcher):
    model(x)
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from attn_jax import ops
from attn_jax.nn.distances import Placed
from attn_jax.ops.positions import Grid, everywhere

if TYPE_CHECKING:
    from attn_jax.nn.attention import MultiHeadAttention, Projected


@dataclasses.dataclass(frozen=True)
class Seen:
    """One call of a `MultiHeadAttention` on whole sequences.

    Attributes:
      module: which was called.
      x: [B, T, E], what queries are made of.
      projected: keys and values.
      weights: () -> [B, N, T, S], the weight of every key, before dropout.
      mask: of the call, see `attn_jax.attention`.
      query_positions: as `attn_jax.attention` takes them.
      key_positions: likewise.
      rotary_positions: [1 or B, T], by which queries are rotated where the module does so.

    """

    module: "MultiHeadAttention"
    x: Float[Array, "B T E"]
    projected: "Projected"
    weights: Callable[[], Float[Array, "B N T S"]]
    mask: Any
    query_positions: Any
    key_positions: Any
    rotary_positions: Num[Array, "#B T"]

    @property
    def value(self) -> Float[Array, "B S N D"]:
        """What the weights mix."""
        return self.projected.value

    def allowed(self) -> Bool[Array, "B N T S"]:
        """Which keys the mask lets each query see."""
        one = jnp.ones((*self.value.shape[:3], 1))
        weights = ops.attention_weights(None, None, one, mask=self.mask, **self._positions)
        # behind a barrier: folding what follows from a mask that is known would take XLA a minute
        return lax.optimization_barrier(weights) > 0

    def relative(self) -> Num[Array | np.ndarray, "#B T S"]:
        """r: key less query position, or what kernels see in its place, see `nn.Distance`."""
        distance, r = self.module.distance, self.grid.relative[:, 0]
        return r if distance is None else distance.between(r)

    @property
    def grid(self) -> Grid:
        """Where queries and keys are."""
        return everywhere(
            self.x.shape[1], self.value.shape[1], self.query_positions, self.key_positions
        )

    def mix(self, proximity: ops.Proximity | None, **arguments: Any) -> Float[Array, "B T N D"]:
        """The call's values mixed by a kernel alone, under its mask and at its positions.

        Args:
          proximity: of all heads, or of each; None: the mean.
          **arguments: others of `attn_jax.attention`.

        """
        if proximity is not None and self.module.distance is not None:
            proximity = Placed(proximity, self.module.distance)
        output: Any = ops.attention(
            None,
            None,
            self.value,
            proximity=proximity,
            mask=self.mask,
            **self._positions,
            **arguments,
        )
        return output

    @property
    def _positions(self) -> dict[str, Any]:
        return {"query_positions": self.query_positions, "key_positions": self.key_positions}


Watcher = Callable[[Seen, Float[Array, "B T N D"] | None], Float[Array, "B T N D"] | None]
"""Takes a call and what its heads give, before the output projection; returns what stands in for
it, or None to leave it. A recurrent decoder shows all its steps at once when they are done: what
its heads gave is None then, and can't be changed."""

_WATCHERS: contextvars.ContextVar[tuple[Watcher, ...]] = contextvars.ContextVar(
    "watchers", default=()
)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Every attention of the modules of `attn_jax.nn` that is called inside shows itself.

    A function that `jax.jit` compiled before has no attention to show: call the model itself, or
    enter inside of the function that is compiled.
    """
    token = _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """What is called inside shows nothing."""
    token = _WATCHERS.set(())
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def is_watched() -> bool:
    """Whether anyone is watching."""
    return bool(_WATCHERS.get())


def show(seen: Seen, mixed: Float[Array, "B T N D"]) -> Float[Array, "B T N D"]:
    """What the watchers make of a call, one after the other.

    Raises:
      ValueError: a watcher changes the shape.

    """
    for watcher in _WATCHERS.get():
        changed = watcher(seen, mixed)
        if changed is None:
            continue
        if changed.shape != mixed.shape:
            raise ValueError(
                f"a watcher must return None or what the heads give, of shape {mixed.shape}, got "
                f"{changed.shape}"
            )
        mixed = changed.astype(mixed.dtype)
    return mixed


def show_afterwards(seen: Seen) -> None:
    """Shows a call that is over.

    Raises:
      ValueError: a watcher wants to change it.

    """
    for watcher in _WATCHERS.get():
        if watcher(seen, None) is not None:
            raise ValueError("attention inside of a recurrent decoder can be seen, not changed")
