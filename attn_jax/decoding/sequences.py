"""One output a sequence: the loop that writes it, greedy decoding, and the score of a given one.

Letters: B sequences, V vocabulary, L tokens of an output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from attn_jax.decoding.steps import (
    Step,
    check_state,
    checked_count,
    checked_dtype,
    limits_of,
    log_probability_of,
)

Choice = Callable[[Float[Array, "B V"], Int[Array, ""]], Int[Array, "B"]]
"""(logits, index of the step) -> tokens."""


class Decoded(NamedTuple):
    """One output for every sequence.

    Attributes:
      tokens: the output, then `end` if it is finished, then `pad`.
      lengths: how many tokens come before the end symbol.
      log_probability: of the output and, if it is finished, its end symbol, under the model as it
        is: neither tempered nor truncated. -inf where the model was left without a next token.
      finished: whether the end symbol was written. False: the limit came first, or no token was
        possible.

    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, "B"]
    log_probability: Float[Array, "B"]
    finished: Bool[Array, "B"]


def greedy(
    step: Step,
    state: Any,
    start: Int[ArrayLike, "B"],
    *,
    end: int,
    max_length: int,
    max_lengths: Int[ArrayLike, "B"] | None = None,
    pad: int | None = None,
) -> Decoded:
    r"""The likeliest token at every step.

    .. math:: y_t = \arg\max_v \log P(v \mid y_{<t})

    Of tokens that are alike the first is taken. `step` is called `max_length` times at most, so a
    cache of so many positions is enough. A logit of -inf forbids a token. Logits that are no
    distribution (one is NaN or +inf, or all are -inf) end the sequence where it is: unfinished,
    with log-probability -inf. No other sequence is touched.

    Args:
      step: the model, `step(tokens, state) -> (logits, state)` with tokens [B] and floating logits
        [B, V].
      state: before the first step; every leaf has the batch as its first axis.
      start: [B], the tokens of the first step; not part of the output.
      end: the end symbol, a token of the vocabulary.
      max_length: L, the greatest number of tokens written, the end symbol among them.
      max_lengths: [B], the same for each sequence; values outside [0, L] count as the nearest in
        it. None: L for all.
      pad: what follows the end; None: `end`.

    Returns:
      `Decoded`: tokens [B, L] in int32, lengths [B], log_probability [B] in float32 (float64 for
      float64 logits), finished [B].

    Raises:
      ValueError: max_length is below 1; `end` is outside the vocabulary; the logits are not
        floating [B, V]; a leaf of the state has no batch axis.

    """
    return written(
        step,
        state,
        start,
        lambda logits, _: likeliest(logits),
        end=end,
        max_length=max_length,
        max_lengths=max_lengths,
        pad=pad,
    )


def score(
    step: Step,
    state: Any,
    start: Int[ArrayLike, "B"],
    tokens: Int[ArrayLike, "B L"],
    lengths: Int[ArrayLike, "B"],
    *,
    end: int,
    finished: Bool[ArrayLike, "B"] | None = None,
) -> Float[Array, "B"]:
    r"""The log-probability of outputs that are given, told to the model token by token.

    .. math:: \log P(y) = \sum_t \log P(y_t \mid y_{<t})

    The sum runs over the first `lengths` tokens, and over the end symbol of a finished output. So
    `score(..., d.tokens, d.lengths, end=end, finished=d.finished)` repeats `d.log_probability`.
    `step` is called once for each token and end symbol of the longest output.

    Args:
      step: see `greedy`.
      state: see `greedy`.
      start: see `greedy`.
      tokens: [B, L]; what comes after the first `lengths` is not looked at.
      lengths: [B], tokens before the end symbol; values outside [0, L] count as the nearest in it.
      end: the end symbol.
      finished: [B], whether the end symbol follows; None: it does.

    Returns:
      [B] in float32, or float64 for float64 logits. -inf for an output with a forbidden token, a
      token outside the vocabulary, or logits that are no distribution.

    Raises:
      ValueError: see `greedy`.

    """
    start, tokens = jnp.asarray(start, jnp.int32), jnp.asarray(tokens, jnp.int32)
    check_state(state, len(start))
    dtype = checked_dtype(step, state, start, end)
    batch, longest = tokens.shape
    lengths = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, longest)
    steps = lengths + (1 if finished is None else jnp.asarray(finished, jnp.int32))
    given = jnp.arange(longest + 1)[None] < lengths[:, None]
    targets = jnp.where(given, jnp.pad(tokens, ((0, 0), (0, 1))), end)

    def add(carry: Any) -> Any:
        index, last, state, total = carry
        logits, state = step(last, state)
        target = targets[:, index]
        more = jnp.where(index < steps, log_probability_of(target, logits), 0)
        return index + 1, target, state, total + more

    initial = (jnp.int32(0), start, state, jnp.zeros(batch, dtype))
    return lax.while_loop(lambda carry: carry[0] < steps.max(initial=0), add, initial)[-1]


class _Progress(NamedTuple):
    """What there is between two steps."""

    index: Int[Array, ""]
    state: Any
    last: Int[Array, "B"]
    open: Bool[Array, "B"]
    decoded: Decoded


def written(
    step: Step,
    state: Any,
    start: Any,
    choose: Choice,
    *,
    end: int,
    max_length: int,
    max_lengths: Any,
    pad: int | None,
) -> Decoded:
    """Writes the token that `choose` names until every sequence is done."""
    max_length = checked_count("max_length", max_length)
    start = jnp.asarray(start, jnp.int32)
    batch = start.shape[0]
    check_state(state, batch)
    dtype = checked_dtype(step, state, start, end)
    limits = limits_of(max_lengths, max_length, batch)

    def write(now: _Progress) -> _Progress:
        logits, state = step(now.last, now.state)
        token = choose(logits, now.index)
        likelihood = jnp.where(now.open, log_probability_of(token, logits), 0)
        possible = now.open & (likelihood > -jnp.inf)
        decoded = _appended(now.decoded, now.index, token, likelihood, possible, end)
        going_on = possible & ~decoded.finished & (now.index + 1 < limits)
        # a sequence that is done still takes part in the steps of the others: it is fed a token
        # that any model knows
        last = jnp.where(going_on, token, end)
        return _Progress(now.index + 1, state, last, going_on, decoded)

    empty = Decoded(
        jnp.full((batch, max_length), end if pad is None else pad, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, dtype),
        jnp.zeros(batch, bool),
    )
    initial = _Progress(jnp.int32(0), state, start, limits > 0, empty)
    return lax.while_loop(lambda now: now.open.any(), write, initial).decoded


def _appended(
    decoded: Decoded,
    index: Int[Array, ""],
    token: Int[Array, "B"],
    likelihood: Float[Array, "B"],
    possible: Bool[Array, "B"],
    end: int,
) -> Decoded:
    """With one more token in the sequences that are open and can go on."""
    ended = possible & (token == end)
    return Decoded(
        decoded.tokens.at[:, index].set(jnp.where(possible, token, decoded.tokens[:, index])),
        decoded.lengths + (possible & ~ended),
        decoded.log_probability + likelihood,
        decoded.finished | ended,
    )


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The token with the greatest logit; the first of equals."""
    return logits.argmax(-1).astype(jnp.int32)
