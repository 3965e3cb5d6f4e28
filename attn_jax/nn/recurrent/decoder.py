"""The recurrent decoder, which looks at the source at every step.

Letters: B batch, S source and T target positions, E features in, H hidden, C context features,
F features out, G = 3 H (GRU) or 4 H (LSTM), N heads, P all parts of all states.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from attn_jax.nn import watching
from attn_jax.nn.attention import MultiHeadAttention, Projected
from attn_jax.nn.initialization import named
from attn_jax.nn.recurrent.cells import Cell, State, check_layers
from attn_jax.nn.recurrent.encoder import Encoded
from attn_jax.nn.recurrent.segments import (
    first_of_segment,
    positions_in_segment,
    segments,
    without_padding,
)
from attn_jax.nn.transformer import dropout

ATTENDS = ("before", "after")


class Source(NamedTuple):
    """What every step looks at; the batch comes first in every leaf.

    Attributes:
      projected: the attention's keys and values; None without attention.
      segment: of every source position.
      positions: likewise, as rules of distance see them.

    """

    projected: Projected | None
    segment: Int[Array, "B S"]
    positions: Num[Array, "B S"]


class Step(NamedTuple):
    """What one step is told.

    Attributes:
      x: the input.
      entry: its part in the first cell, W x + b.
      summary: of the source.
      segment: of the target's position.
      position: of the target, as rules of distance see it.
      dropout_key: of the layers above the first; None: no dropout.

    """

    x: Float[Array, "B E"]
    entry: Float[Array, "B G"]
    summary: Float[Array, "B C"]
    segment: Int[Array, "B"]
    position: Num[Array, "B"]
    dropout_key: Any = None


Carry = dict[str, Any]
"""states: of every cell; fed [B, F]: the last output, where it is an input."""


class RecurrentDecoder(nnx.Module):
    r"""Recurrent layers that look at the source at every step.

    "before" (Bahdanau), with the context c by the previous state as an input of the cell:

    .. math::
      c_t = a(h_{t-1}), \quad h_t = f([x_t; c_t], h_{t-1}), \quad y_t = \tanh(W [h_t; c_t; x_t])

    "after" (Luong), with y the attentional vector:

    .. math::
      h_t = f(x_t, h_{t-1}), \quad c_t = a(h_t), \quad y_t = \tanh(W [h_t; c_t])

    With `input_feeding` the last y is one more input of f, zero at first. a is
    `MultiHeadAttention` over the source under any rule, f the layers of cells, h the state of the
    top one. Without a rule c is the source's summary at every step (Cho et al. 2014). The first
    state of every cell is tanh(W summary + b).

    Args:
      features: E.
      hidden: H.
      context_features: C of the encoder's states.
      num_layers: L; the top layer's state asks.
      cell: "gru" or "lstm".
      rule: of attention, by name; None: no attention. Luong's are "dot", "general", "concat".
      num_heads: N.
      attend: "before" or "after".
      input_feeding: whether y is an input of the next step.
      out_features: F; None: E.
      dropout_rate: on x, y and the input of every layer above the first; never from step to step.
      rngs: the source of initial values.

    Raises:
      ValueError: an option or the rule does not fit.

    References: Bahdanau et al. 2015, appendix A.2.2 (tanh in the place of maxout, and a first state
      that sees both directions); Luong et al. 2015, sections 3.1 and 3.3.

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
        check_layers(num_layers)
        if attend not in ATTENDS:
            raise ValueError(f"attend must be 'before' or 'after' a step, got {attend!r}")
        self.before, self.input_feeding = attend == "before", input_feeding
        self.context_features = context_features
        self.dropout_rate, self.out_features = dropout_rate, out_features or features
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
        positions: Num[Array, "#B T"] | None = None,
        context_positions: Num[Array, "#B S"] | None = None,
        dropout_key: Any = None,
    ) -> Float[Array, "B T F"]:
        """The outputs for a target that is known.

        Args:
          x: [B, T, E], embeddings of the tokens before each.
          encoded: the source.
          segment: [B, T], that of the source has the same number; None: 1 for all.
          positions: [1 or B, T], which rules of distance see; None: 0, 1, 2, ... in every segment.
          context_positions: [1 or B, S] of the source, likewise: times the length ratio of target
            and source, both are aligned.
          dropout_key: a key turns dropout on.

        Raises:
          ValueError: the source has another width than the decoder was built for, or the rule is
            `self`.

        """
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        source = self._source(encoded, context_positions)
        steps, starts, rest = self._steps(x, encoded, segment, positions, keys[0])
        asking, read = self._scan(steps, starts, source, rest)
        if watching.is_watched() and self.attention is not None:
            watching.show_afterwards(self._seen(asking, steps, source))
        y = read[0] if self.input_feeding else self._output(read, steps.x)
        return dropout(jnp.moveaxis(y, 0, 1), self.dropout_rate, keys[1])

    def weights(
        self,
        x: Float[Array, "B T E"],
        encoded: Encoded,
        *,
        segment: Int[Array, "B T"] | None = None,
        positions: Num[Array, "#B T"] | None = None,
        context_positions: Num[Array, "#B S"] | None = None,
    ) -> Float[Array, "B N T S"]:
        """The weight of every source position at every step of a call with the same arguments.

        Raises:
          ValueError: as a call, and if there is no attention.

        """
        if self.attention is None:
            raise ValueError("without attention there are no weights, got rule=None: give a rule")
        source = self._source(encoded, context_positions)
        steps, starts, rest = self._steps(x, encoded, segment, positions, None)
        asking = self._scan(steps, starts, source, rest)[0]
        return self._all_weights(asking, steps, source)

    def _all_weights(
        self, asking: Float[Array, "T B H"], steps: Step, source: Source
    ) -> Float[Array, "B N T S"]:
        # step by step, as in a call: additive scores of all steps at once are [B, T, S, H]
        weights = lax.map(
            lambda step: self._weights(step[0], step[1], step[2], source),
            (asking, steps.segment, steps.position),
        )
        return jnp.moveaxis(weights, 0, 2)

    def _seen(self, asking: Float[Array, "T B H"], steps: Step, source: Source) -> watching.Seen:
        """All steps, for those who watch."""
        assert self.attention is not None
        assert source.projected is not None
        segment, position = (jnp.moveaxis(x, 0, 1) for x in (steps.segment, steps.position))
        same = source.segment[:, None] == segment[:, :, None]
        return watching.Seen(
            self.attention,
            jnp.moveaxis(asking, 0, 1),
            source.projected,
            functools.partial(self._all_weights, asking, steps, source),
            (same & (segment > 0)[:, :, None])[:, None],
            position,
            source.positions,
            position,
        )

    def _steps(
        self,
        x: Float[Array, "B T E"],
        encoded: Encoded,
        segment: Int[Array, "B T"] | None,
        positions: Num[Array, "#B T"] | None,
        dropout_key: Any,
    ) -> tuple[Step, tuple[Bool[Array, "T B"], Float[Array, "T B P"]], Float[Array, "rest G"]]:
        """What each step is told, where it begins anew and how; axes are [T, B, ...]."""
        batch, length = x.shape[:2]
        # without segments all steps have the one summary of the row
        owner = jnp.ones((batch, 1), jnp.int32) if segment is None else segment
        if segment is None:
            segment = segments(batch, length, None)
        if positions is None:
            positions = positions_in_segment(segment)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = without_padding(dropout(x, self.dropout_rate, keys[0]), segment)
        summary = encoded.summary(owner)
        first, start = first_of_segment(segment), jnp.tanh(self.first(summary))
        x, summary, segment, positions, first, start = (
            _steps_first(part, batch, length)
            for part in (x, summary, segment, positions, first, start)
        )
        entry, rest = self.cells[0].entry(x)
        layers = None if keys[1] is None else jax.random.split(keys[1], length)
        return Step(x, entry, summary, segment, positions, layers), (first, start), rest

    def _scan(
        self,
        steps: Step,
        starts: tuple[Bool[Array, "T B"], Float[Array, "T B P"]],
        source: Source,
        rest: Float[Array, "rest G"],
    ) -> tuple[Float[Array, "T B H"], tuple[Array, ...]]:
        """Of all steps the states that asked, and what the outputs are made of, or are if fed."""

        def step(carry: Carry, inputs: Any) -> tuple[Carry, tuple[Array, tuple[Array, ...]]]:
            told, (first, start) = inputs
            return self._step(self._begun(carry, start, first), told, source, rest)

        nothing = self._nothing(steps.x.shape[1], steps.x.dtype)
        with watching.unwatched():
            return lax.scan(step, nothing, (steps, starts))[1]

    def init_cache(
        self, encoded: Encoded, context_positions: Num[Array, "#B S"] | None = None
    ) -> dict[str, Any]:
        """The state before the first step, for one segment a row; batch first in every leaf.

        Args:
          encoded: the source.
          context_positions: as of a call.

        Raises:
          ValueError: as a call.

        """
        batch = len(encoded.states)
        summary = encoded.summary(jnp.ones((batch, 1), jnp.int32))[:, 0]
        nothing = self._nothing(batch, encoded.states.dtype)
        start = jnp.tanh(self.first(summary))
        return {
            "carry": self._begun(nothing, start, jnp.ones(batch, bool)),
            "source": self._source(encoded, context_positions),
            "summary": summary,
            "position": jnp.zeros(batch, jnp.int32),
        }

    def step(
        self, x: Float[Array, "B E"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B F"], dict[str, Any]]:
        """The next output, and the cache with it.

        Args:
          x: [B, E].
          cache: from `init_cache`, or from the step before.

        """
        entry, rest = self.cells[0].entry(x)
        segment = jnp.ones(len(x), jnp.int32)
        told = Step(x, entry, cache["summary"], segment, cache["position"])
        carry, (_, read) = self._step(cache["carry"], told, cache["source"], rest)
        y = read[0] if self.input_feeding else self._output(read, x)
        return y, {**cache, "carry": carry, "position": cache["position"] + 1}

    def _nothing(self, batch: int, dtype: Any) -> Carry:
        states = tuple(cell.initial(batch, dtype) for cell in self.cells)
        fed = {"fed": jnp.zeros((batch, self.out_features), dtype)} if self.input_feeding else {}
        return {"states": states, **fed}

    def _begun(self, carry: Carry, start: Float[Array, "B P"], first: Bool[Array, "B"]) -> Carry:
        """The state before a step: that of the start where a segment begins."""
        parts = len(jax.tree.leaves(carry["states"]))
        states = jax.tree.unflatten(
            jax.tree.structure(carry["states"]), jnp.split(start, parts, -1)
        )
        fed = {"fed": jnp.zeros_like(carry["fed"])} if self.input_feeding else {}
        where = first[:, None]
        return jax.tree.map(
            lambda new, old: jnp.where(where, new, old), {"states": states, **fed}, carry
        )

    def _source(self, encoded: Encoded, context_positions: Any) -> Source:
        """What every step looks at, projected once."""
        width = encoded.states.shape[-1]
        if width != self.context_features:
            raise ValueError(
                f"the source must have the width context_features={self.context_features} that the "
                f"decoder was built for (twice an encoder's hidden), got {width}"
            )
        if context_positions is None:
            context_positions = positions_in_segment(encoded.segment)
        positions = jnp.broadcast_to(context_positions, encoded.segment.shape)
        projected = None
        if self.attention is not None:
            projected = self.attention.project(encoded.states, positions)
        return Source(projected, encoded.segment, positions)

    def _step(
        self, carry: Carry, told: Step, source: Source, rest: Float[Array, "rest G"]
    ) -> tuple[Carry, tuple[Float[Array, "B H"], tuple[Array, ...]]]:
        """The state after a step, the state that asked, and what the output is made of, or is."""
        asking = carry["states"][-1][0]
        context = self._context(asking, told, source) if self.before else None
        states = self._cells(carry, told, context, rest)
        hidden = states[-1][0]
        if context is None:
            asking, context = hidden, self._context(hidden, told, source)
        read = (hidden, context)
        if not self.input_feeding:
            return {"states": states}, (asking, read)
        fed = self._output(read, told.x)
        return {"states": states, "fed": fed}, (asking, (fed,))

    def _cells(
        self,
        carry: Carry,
        told: Step,
        context: Float[Array, "B C"] | None,
        rest: Float[Array, "rest G"],
    ) -> tuple[State, ...]:
        """The new state of every layer; `rest` is of the first one's W, for all inputs but x."""
        projected = told.entry
        more = [] if context is None else [context]
        more += [carry["fed"]] if self.input_feeding else []
        if more:
            projected = projected + jnp.concatenate(more, -1) @ rest
        states = [self.cells[0].step(projected, carry["states"][0])]
        for layer, cell in enumerate(self.cells[1:], 1):
            key = told.dropout_key
            key = None if key is None else jax.random.fold_in(key, layer)
            below = dropout(states[-1][0], self.dropout_rate, key)
            states.append(cell.step(cell.input(below), carry["states"][layer]))
        return tuple(states)

    def _output(
        self, read: tuple[Float[Array, "*B _"], ...], x: Float[Array, "*B E"]
    ) -> Float[Array, "*B F"]:
        """The output y of [h; c], and of x where attention came before."""
        parts = [*read, x] if self.before else read
        return jnp.tanh(self.output(jnp.concatenate(parts, -1)))

    def _context(
        self, hidden: Float[Array, "B H"], told: Step, source: Source
    ) -> Float[Array, "B C"]:
        """What the state finds in the source."""
        if self.attention is None:
            return told.summary
        attention = self.attention

        def attend(hidden: Array, segment: Array, position: Array, source: Source) -> Array:
            where = _where(segment, position, source)
            return attention(hidden[:, None], source.projected, **where)[:, 0]

        # Kept for the backward pass, scores and hidden layers of all steps are [T, B, S, H].
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        attend = jax.checkpoint(attend, prevent_cse=False, policy=keep)
        return attend(hidden, told.segment, told.position, source)

    def _weights(
        self,
        hidden: Float[Array, "B H"],
        segment: Int[Array, "B"],
        position: Num[Array, "B"],
        source: Source,
    ) -> Float[Array, "B N S"]:
        assert self.attention is not None
        where = _where(segment, position, source)
        return self.attention.weights(hidden[:, None], source.projected, **where)[:, :, 0]

    def flops(self, length: int, context_length: int) -> int:
        """Of one example: first state, cells, attention with its projections once, output."""
        total = sum(cell.flops(length) for cell in self.cells)
        total += 2 * self.context_features * self.first.out_features
        total += 2 * length * self.output.in_features * self.out_features
        return total + (self.attention.flops(length, context_length) if self.attention else 0)


def _steps_first(x: Shaped[Array, "..."], batch: int, length: int) -> Shaped[Array, "T B ..."]:
    """[T, B, ...] of [B or 1, T or 1, ...]."""
    steps = jnp.moveaxis(x, 1, 0)
    return jnp.broadcast_to(steps, (length, batch, *steps.shape[2:]))


def _where(segment: Int[Array, "B"], position: Num[Array, "B"], source: Source) -> dict[str, Any]:
    """Which keys a step may see, and where it and they are."""
    same = (source.segment == segment[:, None]) & (segment > 0)[:, None]
    return {
        "mask": same[:, None, None],
        "query_positions": position[:, None],
        "key_positions": source.positions,
    }
