"""Recurrent encoder and decoder, with attention from every step of the one to all of the other.

Sequences may stand side by side in a row: a segment is a number above 0 that its positions share,
0 is padding. The state begins anew with every segment, and padding touches nothing.

Letters: B batch, S source and T target positions, E features in, H hidden, C context features,
F features out, G = 3 H (GRU) or 4 H (LSTM), N heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from attn_jax.nn.attention import MultiHeadAttention, Projected
from attn_jax.nn.initialization import named
from attn_jax.nn.transformer import dropout

CELLS = ("gru", "lstm")
ATTENDS = ("before", "after")
State = tuple[Float[Array, "B H"], ...]
"""h of a GRU; h and c of an LSTM."""


class Cell(nnx.Module):
    r"""A step of a recurrent layer; the product with its input is taken for all steps at once.

    GRU, with x' = W x + b:

    .. math::
      r = \sigma(x'_r + U_r h), \quad z = \sigma(x'_z + U_z h), \quad
      n = \tanh(x'_n + r \odot (U_n h + b_n)), \quad h' = (1 - z) \odot n + z \odot h

    LSTM, with a forget bias of one at first:

    .. math::
      c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \quad h' = \sigma(o) \odot \tanh(c')

    Args:
      in_features: E.
      hidden: H.
      kind: "gru" or "lstm".
      rngs: the source of initial values.

    Raises:
      ValueError: there is no such cell.

    References: Cho et al. 2014 (the form of Chung et al. 2014, with the reset behind the product);
      Hochreiter and Schmidhuber 1997; Gers et al. 2000.

    """

    def __init__(self, in_features: int, hidden: int, kind: str, *, rngs: nnx.Rngs):
        if kind not in CELLS:
            raise ValueError(f"cell must be 'gru' or 'lstm', got {kind!r}")
        self.hidden, self.kind = hidden, kind
        width = (3 if kind == "gru" else 4) * hidden
        orthogonal = nnx.initializers.orthogonal()
        self.input = nnx.Linear(in_features, width, rngs=named(rngs, "input"))
        key = named(rngs, "recurrent")
        blocks = [
            orthogonal(named(key, gate).params(), (hidden, hidden))
            for gate in range(width // hidden)
        ]
        self.recurrent = nnx.Param(jnp.concatenate(blocks, 1))
        self.bias = nnx.Param(jnp.zeros(hidden))

    def initial(self, batch: int, dtype: Any = jnp.float32) -> State:
        """The state of zeros."""
        zeros = jnp.zeros((batch, self.hidden), dtype)
        return (zeros,) if self.kind == "gru" else (zeros, zeros)

    def step(self, projected: Float[Array, "B G"], state: State) -> State:
        """The state after an input W x + b."""
        product = state[0] @ self.recurrent[...]
        bias = self.bias[...][None]
        if self.kind == "gru":
            parts, products = jnp.split(projected, 3, -1), jnp.split(product, 3, -1)
            reset, update = (jax.nn.sigmoid(parts[i] + products[i]) for i in (0, 1))
            new = jnp.tanh(parts[2] + reset * (products[2] + bias))
            return ((1 - update) * new + update * state[0],)
        entry, forget, cell, out = jnp.split(projected + product, 4, -1)
        memory = jax.nn.sigmoid(forget + 1 + bias) * state[1]
        memory = memory + jax.nn.sigmoid(entry) * jnp.tanh(cell)
        return jax.nn.sigmoid(out) * jnp.tanh(memory), memory

    def flops(self, length: int) -> int:
        """Two products a step: 2 T G (E + H)."""
        width = self.recurrent.shape[1]
        return 2 * length * width * (self.input.in_features + self.hidden)


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

        """
        if segment is None:
            segment = segments(x.shape[0], x.shape[1], length)
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


def segments(batch: int, positions: int, length: Int[Array, "B"] | None) -> Int[Array, "B S"]:
    """One segment a row, with padding behind its length."""
    if length is None:
        return jnp.ones((batch, positions), jnp.int32)
    return (jnp.arange(positions)[None] < length[:, None]).astype(jnp.int32)


def _run(cell: Cell, x: Float[Array, "B S E"], segment: Int[Array, "B S"]) -> Float[Array, "B S H"]:
    """The states of all positions, from zeros at every segment's first."""

    def step(state: State, inputs: Any) -> tuple[State, Array]:
        projected, first, inside = inputs
        begun = tuple(jnp.where(first, 0, part) for part in state)
        new = cell.step(projected, begun)
        state = tuple(jnp.where(inside, a, b) for a, b in zip(new, begun, strict=True))
        return state, jnp.where(inside, state[0], 0)

    inputs = cell.input(x), first_of_segment(segment)[..., None], (segment > 0)[..., None]
    steps = tuple(jnp.moveaxis(part, 1, 0) for part in inputs)
    states = lax.scan(step, cell.initial(len(x), x.dtype), steps)[1]
    return jnp.moveaxis(states, 0, 1)


def first_of_segment(segment: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Where a segment differs from that before it."""
    return segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]


class RecurrentDecoder(nnx.Module):
    r"""Recurrent layers that look at the source at every step.

    "before" (Bahdanau), with the context c by the previous state as an input of the cell:

    .. math::
      c_t = a(h_{t-1}), \quad h_t = f([x_t; c_t], h_{t-1}), \quad y_t = \tanh(W [h_t; c_t; x_t])

    "after" (Luong), with the attentional vector y as an input of the next step if it is fed:

    .. math::
      h_t = f([x_t; y_{t-1}], h_{t-1}), \quad c_t = a(h_t), \quad y_t = \tanh(W [h_t; c_t])

    a is `MultiHeadAttention` over the source under any rule. Without a rule c is the source's
    summary at every step (Cho et al. 2014). The first state is tanh(W summary).

    Args:
      features: E.
      hidden: H.
      context_features: C of the encoder's states.
      num_layers: L; the top layer's state asks.
      cell: "gru" or "lstm".
      rule: of attention, by name; None: no attention.
      num_heads: N.
      attend: "before" or "after".
      input_feeding: whether y is an input of the next step.
      out_features: F; None: E.
      dropout_rate: on inputs and outputs.
      rngs: the source of initial values.

    Raises:
      ValueError: an option or the rule does not fit.

    References: Bahdanau et al. 2015; Luong et al. 2015.

    """

    def __init__(
        self,
        features: int,
        hidden: int,
        context_features: int,
        *,
        num_layers: int = 1,
        cell: str = "gru",
        rule: str | None = "additive",
        num_heads: int = 1,
        attend: str = "before",
        input_feeding: bool = False,
        out_features: int | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if attend not in ATTENDS:
            raise ValueError(f"attend must be 'before' or 'after' a step, got {attend!r}")
        self.before, self.input_feeding = attend == "before", input_feeding
        self.hidden, self.dropout_rate = hidden, dropout_rate
        self.out_features = out_features or features
        attention = None
        if rule is not None:
            attention = MultiHeadAttention(
                num_heads,
                hidden,
                rule=rule,
                context_features=context_features,
                out_features=context_features,
                rngs=named(rngs, "attention"),
            )
        self.attention = attention
        width = features + self.before * context_features + input_feeding * self.out_features
        widths = [width] + [hidden] * (num_layers - 1)
        self.cells = nnx.List(
            [
                Cell(w, hidden, cell, rngs=named(named(rngs, "cells"), index))
                for index, w in enumerate(widths)
            ]
        )
        parts = len(self.cells) * (1 if cell == "gru" else 2)
        self.first = nnx.Linear(context_features, parts * hidden, rngs=named(rngs, "first"))
        read = hidden + context_features + self.before * features
        self.output = nnx.Linear(read, self.out_features, rngs=named(rngs, "output"))

    def __call__(
        self,
        x: Float[Array, "B T E"],
        encoded: Encoded,
        *,
        segment: Int[Array, "B T"] | None = None,
        positions: Num[Array, "B T"] | None = None,
        context_positions: Num[Array, "#B S"] | None = None,
        dropout_key: Any = None,
    ) -> Float[Array, "B T F"]:
        """The outputs for a target that is known.

        Args:
          x: [B, T, E], embeddings of the tokens before each.
          encoded: the source.
          segment: [B, T], that of the source has the same number; None: one for all.
          positions: [B, T], which rules of distance see; None: 0, 1, 2, ...
          context_positions: [1 or B, S] of the source, likewise.
          dropout_key: a key turns dropout on.

        """
        batch, length = x.shape[:2]
        if segment is None:
            segment = segments(batch, length, None)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        cache = self._cache(encoded, context_positions)
        summary = encoded.summary(segment)
        inputs = (
            dropout(x, self.dropout_rate, keys[0]),
            summary,
            segment,
            first_of_segment(segment),
            positions,
        )
        steps = tuple(jnp.moveaxis(part, 1, 0) for part in inputs)

        def step(carry: Any, inputs: Any) -> tuple[Any, Array]:
            x, summary, segment, first, position = inputs
            begun = self._begun(carry, summary, first)
            carry = self._step(x, begun, cache, summary, segment, position)
            return carry, carry["fed"]

        carry = self._nothing(batch, x.dtype)
        y = jnp.moveaxis(lax.scan(step, carry, steps)[1], 0, 1)
        return dropout(y, self.dropout_rate, keys[1])

    def init_cache(
        self, encoded: Encoded, context_positions: Num[Array, "#B S"] | None = None
    ) -> dict[str, Any]:
        """The state before the first step, for one segment a row; batch first in every leaf."""
        batch = len(encoded.states)
        ones = jnp.ones((batch, 1), jnp.int32)
        summary = encoded.summary(ones)[:, 0]
        carry = self._nothing(batch, encoded.states.dtype)
        return {
            "carry": self._begun(carry, summary, jnp.ones(batch, bool)),
            "source": self._cache(encoded, context_positions),
            "summary": summary,
            "position": jnp.zeros(batch, jnp.int32),
        }

    def step(
        self, x: Float[Array, "B E"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B F"], dict[str, Any]]:
        """The next output, and the cache with it."""
        segment = jnp.ones(len(x), jnp.int32)
        carry = self._step(
            x, cache["carry"], cache["source"], cache["summary"], segment, cache["position"]
        )
        return carry["fed"], {**cache, "carry": carry, "position": cache["position"] + 1}

    def _nothing(self, batch: int, dtype: Any) -> dict[str, Any]:
        return {
            "states": tuple(cell.initial(batch, dtype) for cell in self.cells),
            "fed": jnp.zeros((batch, self.out_features), dtype),
        }

    def _begun(
        self, carry: dict[str, Any], summary: Float[Array, "B C"], first: Bool[Array, "B"]
    ) -> dict[str, Any]:
        """The state before a step: that of the summary where a segment begins."""
        leaves, structure = jax.tree.flatten(carry["states"])
        start = jnp.split(jnp.tanh(self.first(summary)), len(leaves), -1)
        where = first[:, None]
        states = [jnp.where(where, new, old) for new, old in zip(start, leaves, strict=True)]
        fed = jnp.where(where, 0, carry["fed"])
        return {"states": jax.tree.unflatten(structure, states), "fed": fed}

    def _cache(self, encoded: Encoded, context_positions: Any) -> dict[str, Any]:
        """What every step looks at, projected once."""
        batch, length = encoded.segment.shape
        if context_positions is None:
            context_positions = jnp.arange(length)[None]
        positions = jnp.broadcast_to(context_positions, (batch, length))
        projected = None
        if self.attention is not None:
            projected = self.attention.project(encoded.states, positions)
        return {"projected": projected, "segment": encoded.segment, "positions": positions}

    def _step(
        self,
        x: Float[Array, "B E"],
        carry: dict[str, Any],
        source: dict[str, Any],
        summary: Float[Array, "B C"],
        segment: Int[Array, "B"],
        position: Num[Array, "B"],
    ) -> dict[str, Any]:
        def context(hidden: Float[Array, "B H"]) -> Float[Array, "B C"]:
            return self._attend(hidden, source, summary, segment, position)

        states = carry["states"]
        seen = context(states[-1][0]) if self.before else None
        inputs = [x, *([seen] if self.before else []), *([carry["fed"]] * self.input_feeding)]
        below = jnp.concatenate(inputs, -1)
        new = []
        for cell, state in zip(self.cells, states, strict=True):
            new.append(cell.step(cell.input(below), state))
            below = new[-1][0]
        read = [below, context(below) if seen is None else seen, *([x] if self.before else [])]
        return {"states": tuple(new), "fed": jnp.tanh(self.output(jnp.concatenate(read, -1)))}

    def _attend(
        self,
        hidden: Float[Array, "B H"],
        source: dict[str, Any],
        summary: Float[Array, "B C"],
        segment: Int[Array, "B"],
        position: Num[Array, "B"],
    ) -> Float[Array, "B C"]:
        if self.attention is None:
            return summary
        projected: Projected = source["projected"]
        return self.attention(
            hidden[:, None],
            projected,
            mask=(source["segment"] == segment[:, None])[:, None, None],
            query_positions=position[:, None],
            key_positions=source["positions"],
        )[:, 0]

    def flops(self, length: int, context_length: int) -> int:
        """Of one example: cells, attention with its projections once, output."""
        total = sum(cell.flops(length) for cell in self.cells)
        total += 2 * length * self.output.in_features * self.out_features
        return total + (self.attention.flops(length, context_length) if self.attention else 0)
