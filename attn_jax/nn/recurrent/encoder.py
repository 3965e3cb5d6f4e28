"""The recurrent encoder: the states of a source, forward and backward.

Letters: B batch, S source and T target positions, E features in, H hidden, C context features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from attn_jax.nn.initialization import named
from attn_jax.nn.recurrent.cells import Cell, State, check_layers
from attn_jax.nn.recurrent.segments import first_of_segment, segments, without_padding
from attn_jax.nn.transformer import dropout


class Encoded(NamedTuple):
    """What a decoder attends to.

    Attributes:
      states: of every source position, forward and backward.
      segment: of every source position; 0 is padding.

    """

    states: Float[Array, "B S C"]
    segment: Int[Array, "B S"]

    def summary(self, segment: Int[Array, "B T"]) -> Float[Array, "B T C"]:
        """For each target position the last states of its segment's source: all that is known.

        Forward at the segment's last position, backward at its first.
        """
        half = self.states.shape[-1] // 2
        before = jnp.pad(self.segment, ((0, 0), (1, 0)))[:, :-1]
        behind = jnp.pad(self.segment, ((0, 0), (0, 1)))[:, 1:]
        same = segment[:, :, None] == self.segment[:, None]
        picks = [
            same & (self.segment != other)[:, None] & (segment > 0)[:, :, None]
            for other in (behind, before)
        ]
        sides = self.states[..., :half], self.states[..., half:]
        return jnp.concatenate(
            [
                jnp.einsum("bts,bsc->btc", pick.astype(side.dtype), side)
                for pick, side in zip(picks, sides, strict=True)
            ],
            -1,
        )


class RecurrentEncoder(nnx.Module):
    """Layers of two recurrent passes each, one in either direction, their states joined.

    Args:
      features: E.
      hidden: H of either direction; the states have C = 2 H features.
      num_layers: L; every layer reads the states of the one below.
      cell: "gru" or "lstm".
      dropout_rate: on the input of every layer.
      rngs: the source of initial values.

    Raises:
      ValueError: there is no such cell, or no layer.

    References: Schuster and Paliwal 1997; Bahdanau et al. 2015, section 3.2.

    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        num_layers: int = 1,
        cell: str = "gru",
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_layers(num_layers)
        self.dropout_rate = dropout_rate
        widths = [features] + [2 * hidden] * (num_layers - 1)
        self.layers = nnx.List(
            [
                nnx.List(
                    [
                        Cell(width, hidden, cell, rngs=named(named(rngs, index), direction))
                        for direction in ("forward", "backward")
                    ]
                )
                for index, width in enumerate(widths)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "B S E"],
        *,
        segment: Int[Array, "B S"] | None = None,
        length: Int[Array, "B"] | None = None,
        dropout_key: Any = None,
    ) -> Encoded:
        """The states of every position.

        Args:
          x: [B, S, E].
          segment: [B, S]; None: one segment of `length`.
          length: [B], positions before the padding; None: all.
          dropout_key: a key turns dropout on.

        Raises:
          ValueError: both segment and length are given.

        """
        if segment is not None and length is not None:
            raise ValueError(
                "padding is where the segment is 0, or behind the length: give segment or length, "
                "got both"
            )
        if segment is None:
            segment = segments(x.shape[0], x.shape[1], length)
        x = without_padding(x, segment)
        for index, (forward, backward) in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            x = dropout(x, self.dropout_rate, key)
            ahead = _run(forward, x, segment)
            behind = jnp.flip(_run(backward, jnp.flip(x, 1), jnp.flip(segment, 1)), 1)
            x = jnp.concatenate([ahead, behind], -1)
        return Encoded(x, segment)

    def flops(self, length: int) -> int:
        """Of one example."""
        return sum(cell.flops(length) for layer in self.layers for cell in layer)


def _run(cell: Cell, x: Float[Array, "B S E"], segment: Int[Array, "B S"]) -> Float[Array, "B S H"]:
    """The states of all positions, from zeros at every segment's first."""

    def step(state: State, inputs: Any) -> tuple[State, Array]:
        projected, first, inside = inputs
        # padding may move the state: what follows it begins anew
        state = cell.step(projected, tuple(jnp.where(first, 0, part) for part in state))
        return state, jnp.where(inside, state[0], 0)

    inputs = x, first_of_segment(segment)[..., None], (segment > 0)[..., None]
    x, first, inside = (jnp.moveaxis(part, 1, 0) for part in inputs)
    states = lax.scan(step, cell.initial(x.shape[1], x.dtype), (cell.input(x), first, inside))[1]
    return jnp.moveaxis(states, 0, 1)
