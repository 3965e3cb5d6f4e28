"""Outputs at random.

Letters: B sequences, V vocabulary, L tokens of an output, C candidates of a token.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Key

from attn_jax.decoding.sequences import Decoded, likeliest, written
from attn_jax.decoding.steps import Step, checked_count


def sample(
    step: Step,
    state: Any,
    start: Int[ArrayLike, "B"],
    *,
    key: Any,
    end: int,
    max_length: int,
    max_lengths: Int[ArrayLike, "B"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    pad: int | None = None,
) -> Decoded:
    r"""A token at random at every step, by the model's tempered and truncated probabilities.

    .. math:: P'(v) \propto P(v \mid y_{<t})^{1 / \text{temperature}} \; [v \in S]

    S holds the `top_k` likeliest tokens, and of these, renormalised, the fewest of the likeliest
    that have `top_p` of the probability together (the nucleus; never empty). Of tokens that are
    alike the first ones are taken.

    What is drawn for a sequence depends on its key and the number of the step, and on nothing else
    in the batch. `greedy` says how often `step` is called, and what becomes of logits that are -inf
    or no distribution.

    Args:
      step: see `greedy`.
      state: see `greedy`.
      start: see `greedy`.
      key: a `jax.random.key`, folded with the index of each row; or [B] keys, one a sequence, used
        as they are, which go with the sequence when the batch is reordered. Raw keys do too.
      end: see `greedy`.
      max_length: see `greedy`.
      max_lengths: see `greedy`.
      temperature: below 1 sharpens, above 1 flattens; 0 is `greedy`. A Python number.
      top_k: from 1 up; more than the vocabulary, or None, keeps all.
      top_p: in (0, 1]; 1 or None keeps all.
      pad: see `greedy`.

    Returns:
      `Decoded`; log_probability is that of the model as it is, which `score` gives too.

    Raises:
      ValueError: see `greedy`; also for a temperature that is negative or not finite, a top_k below
        1, a top_p outside (0, 1], and what is neither a random key nor [B] of them.

    References:
      Fan, Lewis, Dauphin 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et al.
      2020, "The Curious Case of Neural Text Degeneration" (nucleus).

    """
    keys = _row_keys(key, jnp.shape(start)[0])
    _check_temperature(temperature)
    top_k = None if top_k is None else checked_count("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p!r}. None keeps all tokens.")

    def choose(logits: Float[Array, "B V"], index: Int[Array, ""]) -> Int[Array, "B"]:
        if temperature == 0:
            return likeliest(logits)
        candidates, tempered = _truncated(logits, temperature, top_k, top_p)
        of_step = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return _picked(candidates, jax.vmap(jax.random.categorical)(of_step, tempered))

    return written(
        step,
        state,
        start,
        choose,
        end=end,
        max_length=max_length,
        max_lengths=max_lengths,
        pad=pad,
    )


def _truncated(
    logits: Float[Array, "B V"], temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Int[Array, "B C"] | None, Float[Array, "B C"]]:
    """The tokens to draw from, None for all in their order, and their logits."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    candidates = None
    if top_p == 1:
        # the sum of all may round to 1 before the last token
        top_p = None
    if top_k is not None or top_p is not None:
        vocabulary = logits.shape[-1]
        logits, candidates = lax.top_k(logits, min(top_k or vocabulary, vocabulary))
    # the peak is taken away first: a small temperature must not make infinities
    temperature = max(temperature, float(jnp.finfo(logits.dtype).tiny))
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if top_p is not None:
        probability = jax.nn.softmax(logits)
        before = jnp.cumsum(probability, -1) - probability
        kept = (before < top_p).at[:, 0].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    return candidates, logits


def _picked(candidates: Int[Array, "B C"] | None, place: Int[Array, "B"]) -> Int[Array, "B"]:
    if candidates is not None:
        place = jnp.take_along_axis(candidates, place[:, None], -1)[:, 0]
    return place.astype(jnp.int32)


def _row_keys(key: Any, batch: int) -> Key[Array, "B"]:
    dtype = getattr(key, "dtype", np.dtype(object))
    if dtype == np.uint32:
        key = jax.random.wrap_key_data(key)
    elif not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be a jax.random.key, or one for each sequence; got {key!r}.")
    if key.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(
            f"key must be one key or {batch}, one for each sequence; got shape {key.shape}. "
            f"jax.random.split(key, {batch}) makes so many."
        )
    return key


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be 0 (greedy) or more, and finite; got {temperature!r}."
        )
