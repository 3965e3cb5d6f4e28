"""The best outputs of a sequence that a search of limited width finds.

Letters: B sequences, V vocabulary, L tokens of an output, K beams, R = B K hypotheses,
C candidates.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num, Shaped

from attn_jax.decoding.steps import (
    Step,
    check_state,
    checked_count,
    checked_dtype,
    limits_of,
    log_probabilities,
)


class Beams(NamedTuple):
    """The outputs found for every sequence, best first.

    Attributes:
      tokens: an output, then `end` if it is finished, then `pad`.
      lengths: how many tokens come before the end symbol.
      log_probability: of the output and, if it is finished, its end symbol.
      score: log_probability over `length_penalty`; what outputs are sorted by.
      finished: whether the end symbol was written. False: the limit came first.

    Where fewer than K outputs are possible, the last ones are empty: all `pad`, length 0, not
    finished, log-probability and score -inf.

    """

    tokens: Int[Array, "B K L"]
    lengths: Int[Array, "B K"]
    log_probability: Float[Array, "B K"]
    score: Float[Array, "B K"]
    finished: Bool[Array, "B K"]


def length_penalty(
    length: Num[ArrayLike, "*B"], alpha: float | Float[Array, ""]
) -> Float[Array, "*B"]:
    r"""What a log-probability is divided by.

    .. math:: lp(Y) = \left( \frac{5 + |Y|}{6} \right)^\alpha

    Args:
      length: the number of tokens |Y|, the end symbol counted.
      alpha: 0 leaves log-probabilities as they are, above favours long outputs, below short ones.

    References: Wu et al. 2016, "Google's Neural Machine Translation System", equation 14.

    """
    return ((5 + jnp.asarray(length)) / 6) ** alpha


def beam_search(
    step: Step,
    state: Any,
    start: Int[ArrayLike, "B"],
    *,
    end: int,
    max_length: int,
    beam_size: int,
    max_lengths: Int[ArrayLike, "B"] | None = None,
    alpha: float | Float[Array, ""] = 0.0,
    pad: int | None = None,
) -> Beams:
    r"""The K outputs of highest score among those that a search with K beams comes across.

    .. math::
      \text{score}(Y) = \frac{\log P(Y)}{lp(Y)}, \quad
      lp(Y) = \left( \frac{5 + |Y|}{6} \right)^\alpha

    |Y| counts all tokens written, the end symbol among them. At every step the K open hypotheses
    are extended by every token. Of the K likeliest extensions, those that are complete are kept if
    they are among the K best outputs by score so far; the K likeliest of the others are open next.

    *Complete* is a hypothesis with an end symbol, and one that the limit cuts: what a model writes
    within a limit is one or the other, and the probabilities of all such outputs sum to one. So a
    cut output is ranked by its score like any other, with `finished` False.

    *When it stops*: as soon as no open hypothesis can still overtake the worst of the K outputs
    kept. One of t tokens can reach log P / lp at best, with lp at t + 1 tokens or at the limit,
    whichever is more: log P only falls, and lp is monotone. The result is that of a search that
    never stops early.

    With K = 1 and alpha <= 0 this is `greedy`. With alpha > 0 it goes on behind an early end, as
    long as a longer output may score higher.

    A logit of -inf forbids a token. A hypothesis whose logits are no distribution (one is NaN or
    +inf, or all are -inf) is dropped, and others take its place.

    Args:
      step: the model, see `greedy`; it is called with B K sequences, those of row b being
        b K, ..., b K + K - 1. What all beams of a sequence share need not be in the state: step may
        close over it and repeat it `tokens.shape[0] // B` times.
      state: before the first step, of B sequences; every leaf has the batch as its first axis.
      start: [B], the tokens of the first step; not part of the output.
      end: the end symbol, a token of the vocabulary.
      max_length: L, the greatest number of tokens written, the end symbol among them.
      beam_size: K.
      max_lengths: [B], the same for each sequence; values outside [0, L] count as the nearest in
        it. None: L for all.
      alpha: exponent of the length penalty; 0.6 in Vaswani et al. 2017.
      pad: what follows the end; None: `end`.

    Returns:
      `Beams`: tokens [B, K, L] in int32, lengths [B, K], log_probability and score [B, K] in
      float32 (float64 for float64 logits), finished [B, K].

    Raises:
      ValueError: beam_size or max_length is below 1; alpha is not finite; `end` is outside the
        vocabulary; the logits are not floating [B, V]; a leaf of the state has no batch axis.

    References: Wu et al. 2016, "Google's Neural Machine Translation System", section 7.

    """
    max_length = checked_count("max_length", max_length)
    beam_size = checked_count("beam_size", beam_size)
    if isinstance(alpha, int | float) and not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite; got {alpha!r}. 0 is no length penalty.")
    start = jnp.asarray(start, jnp.int32)
    limits = limits_of(max_lengths, max_length, start.shape[0])
    check_state(state, len(start))
    rows, state = _repeated((start, state), beam_size)
    dtype = checked_dtype(step, state, rows, end)

    def extend(search: _Search) -> _Search:
        logits, state = step(search.last.reshape(-1), search.state)
        found = _extensions(search, logits, limits, end)
        kept = _best(search.kept, _outputs(found, search.index + 1, end, alpha), beam_size)
        opened = _still_open(found, kept, search.index + 1, limits, alpha, beam_size)
        return _Search(
            search.index + 1,
            _reordered(state, opened.beam),
            jnp.where(opened.log_probability > -jnp.inf, opened.last, end),
            opened.tokens,
            opened.log_probability,
            kept,
        )

    blank = end if pad is None else pad
    search = _initial(state, rows, limits, beam_size, max_length, blank, dtype)
    search = lax.while_loop(lambda s: (s.log_probability > -jnp.inf).any(), extend, search)
    return _cleared(search.kept, blank)


class _Search(NamedTuple):
    """What there is between two steps. A log-probability of -inf means that there is nothing."""

    index: Int[Array, ""]
    state: Any
    last: Int[Array, "B K"]
    tokens: Int[Array, "B K L"]
    log_probability: Float[Array, "B K"]
    kept: Beams


class _Extensions(NamedTuple):
    """Hypotheses after one more token, likeliest first."""

    beam: Int[Array, "B C"]
    last: Int[Array, "B C"]
    tokens: Int[Array, "B C L"]
    log_probability: Float[Array, "B C"]
    complete: Bool[Array, "B C"]


def _initial(
    state: Any,
    rows: Int[Array, "R"],
    limits: Int[Array, "B"],
    beam_size: int,
    max_length: int,
    blank: int,
    dtype: Any,
) -> _Search:
    """One open hypothesis a sequence, which is an output already if its limit is 0."""
    batch = limits.shape[0]
    tokens = jnp.full((batch, beam_size, max_length), blank, jnp.int32)
    first = (jnp.arange(beam_size) == 0)[None]
    none, nothing = jnp.asarray(-jnp.inf, dtype), jnp.asarray(0, dtype)
    shut = (limits < 1)[:, None]
    written = jnp.where(first & shut, nothing, none)
    kept = Beams(
        tokens,
        jnp.zeros((batch, beam_size), jnp.int32),
        written,
        written,
        jnp.zeros((batch, beam_size), bool),
    )
    opened = jnp.where(first & ~shut, nothing, none)
    return _Search(jnp.int32(0), state, rows.reshape(batch, beam_size), tokens, opened, kept)


def _extensions(
    search: _Search, logits: Float[Array, "R V"], limits: Int[Array, "B"], end: int
) -> _Extensions:
    """The 2 K likeliest: at most K of them end, so that K or more can go on."""
    batch, beam_size = search.last.shape
    # The order within a hypothesis is that of its logits: sums of log-probabilities may round to
    # the same number, and a stable sort keeps the order then.
    count = min(2 * beam_size, logits.shape[-1])
    ranked = lax.top_k(logits, count)[1]
    each = jnp.take_along_axis(log_probabilities(logits), ranked, -1)
    total = search.log_probability[..., None] + each.reshape(batch, beam_size, count)
    total, place = lax.top_k(total.reshape(batch, -1), min(2, count) * beam_size)
    last = _chosen(ranked.reshape(batch, -1), place)
    beam = place // count
    tokens = _chosen(search.tokens, beam).at[:, :, search.index].set(last)
    complete = (last == end) | (search.index + 1 >= limits)[:, None]
    return _Extensions(beam, last, tokens, total, complete)


def _outputs(
    found: _Extensions, written: Int[Array, ""], end: int, alpha: float | Float[Array, ""]
) -> Beams:
    """The extensions as outputs, those that are not complete with a score of -inf."""
    ended = found.last == end
    score = found.log_probability / length_penalty(written, alpha)
    return Beams(
        found.tokens,
        written - ended,
        found.log_probability,
        jnp.where(found.complete, score, -jnp.inf).astype(found.log_probability.dtype),
        ended,
    )


def _best(kept: Beams, new: Beams, beam_size: int) -> Beams:
    """The K best of what was kept and of the K likeliest extensions; of equals the older ones."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:, :beam_size]], 1), kept, new)
    _, place = lax.top_k(both.score, beam_size)
    return jax.tree.map(lambda leaf: _chosen(leaf, place), both)


def _still_open(
    found: _Extensions,
    kept: Beams,
    written: Int[Array, ""],
    limits: Int[Array, "B"],
    alpha: float | Float[Array, ""],
    beam_size: int,
) -> _Extensions:
    """The K likeliest that can go on; none where none of them can overtake what is kept."""
    likelihood = jnp.where(found.complete, -jnp.inf, found.log_probability)
    likelihood, place = lax.top_k(likelihood, beam_size)
    opened = jax.tree.map(lambda leaf: _chosen(leaf, place), found)
    nearest, farthest = (length_penalty(n, alpha) for n in (written + 1, limits))
    reachable = jnp.maximum(likelihood[:, 0] / nearest, likelihood[:, 0] / farthest)
    over = kept.score[:, -1] >= reachable
    return opened._replace(log_probability=jnp.where(over[:, None], -jnp.inf, likelihood))


def _cleared(kept: Beams, blank: int) -> Beams:
    """With nothing in the places that no output took."""
    taken = kept.score > -jnp.inf
    return Beams(
        jnp.where(taken[..., None], kept.tokens, blank),
        jnp.where(taken, kept.lengths, 0),
        jnp.where(taken, kept.log_probability, -jnp.inf),
        kept.score,
        kept.finished & taken,
    )


def _chosen(leaf: Shaped[Array, "B C ..."], place: Int[Array, "B K"]) -> Shaped[Array, "B K ..."]:
    """leaf[b, place[b, k]]."""
    return jax.vmap(lambda row, at: row[at])(leaf, place)


def _repeated(tree: Any, count: int) -> Any:
    """Every row `count` times in a row."""

    def repeat(leaf: Any) -> Any:
        return jnp.asarray(leaf)[jnp.repeat(jnp.arange(len(leaf)), count)]

    return jax.tree.map(repeat, tree)


def _reordered(state: Any, beam: Int[Array, "B K"]) -> Any:
    batch, beam_size = beam.shape
    rows = (beam + beam_size * jnp.arange(batch)[:, None]).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows], state)
