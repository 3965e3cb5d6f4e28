"""Models as step functions, the probabilities they give, and the checks all decoding shares.

Letters: B sequences, V vocabulary, L tokens of an output.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

Step = Callable[[Int[Array, "B"], Any], tuple[Float[Array, "B V"], Any]]
"""(last tokens, state) -> (logits of the next tokens, state).

The state is a pytree of arrays that have the batch in front, and keeps its shapes. The logits of a
sequence may depend on its own part of tokens and state only.
"""


def recomputing(
    logits_of: Callable[..., Float[Array, "B V"]], batch: int, max_length: int, *context: Any
) -> tuple[Step, Any]:
    """A step function without a cache: every step computes its logits from all tokens so far.

    Slow, and plainly right: what a model that keeps a cache is to be compared with.

    Args:
      logits_of: `logits_of(tokens, position, *context) -> logits` with tokens [B, L] that begin
        with the start symbol and position [B]: the logits of the token after tokens[:, position].
        Later tokens are zero and mean nothing; a causal model does not look at them.
      batch: B.
      max_length: L, the number of steps there is room for; that of the decoding it is for.
      *context: more arguments, pytrees of arrays [B, ...], reordered with the sequences.

    Returns:
      The step function, and its state before the first step.

    Raises:
      ValueError: max_length is below 1.

    """
    max_length = checked_count("max_length", max_length)

    def step(last: Int[Array, "B"], state: Any) -> tuple[Float[Array, "B V"], Any]:
        tokens, position, context = state
        here = jnp.arange(max_length)[None] == position[:, None]
        tokens = jnp.where(here, last[:, None], tokens)
        return logits_of(tokens, position, *context), (tokens, position + 1, context)

    return step, (jnp.zeros((batch, max_length), jnp.int32), jnp.zeros(batch, jnp.int32), context)


def log_probabilities(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Log-softmax in float32 or better; -inf throughout for logits that are no distribution.

    They are none if one is NaN or +inf, or all are -inf.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    defined = jnp.isfinite(logits.max(-1, keepdims=True))
    return jnp.where(defined, jax.nn.log_softmax(jnp.where(defined, logits, 0)), -jnp.inf)


def log_probability_of(tokens: Int[Array, "B"], logits: Float[Array, "B V"]) -> Float[Array, "B"]:
    """That of one token a sequence; -inf for a token outside the vocabulary."""
    chosen = jnp.arange(logits.shape[-1])[None] == tokens[:, None]
    return jnp.where(chosen, log_probabilities(logits), -jnp.inf).max(-1)


def limits_of(
    max_lengths: Int[ArrayLike, "B"] | None, max_length: int, batch: int
) -> Int[Array, "B"]:
    """How many tokens each sequence may have."""
    if max_lengths is None:
        return jnp.full(batch, max_length, jnp.int32)
    return jnp.clip(jnp.asarray(max_lengths, jnp.int32), 0, max_length)


def checked_count(name: str, value: Any) -> int:
    """A number of things that a shape depends on.

    Raises:
      ValueError: it is below 1, or no integer known while tracing.

    """
    try:
        count = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a Python integer; got {value!r}.") from error
    if count < 1:
        raise ValueError(f"{name} must be 1 or more; got {count}.")
    return count


def check_state(state: Any, batch: int) -> None:
    """Whether sequences can be reordered.

    Raises:
      ValueError: a leaf of the state has no batch axis in front.

    """
    for path, leaf in jax.tree.leaves_with_path(state):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"every leaf of the state must have the batch, {batch}, as its first axis; got "
                f"shape {jnp.shape(leaf)} at state{jax.tree_util.keystr(path)}. Repeat it for "
                "every sequence, or let step close over it."
            )


def checked_dtype(step: Step, state: Any, start: Int[Array, "B"], end: Any) -> Any:
    """The dtype of log-probabilities, once the logits are known to fit.

    Raises:
      ValueError: the logits are not floating [B, V]; the end symbol is none of the V tokens.

    """
    logits = jax.eval_shape(step, start, state)[0]
    floating = jnp.issubdtype(logits.dtype, jnp.floating)
    if len(logits.shape) != 2 or logits.shape[0] != len(start) or not floating:
        raise ValueError(
            f"step must return floating logits [B, V] with B = {len(start)}; got {logits.dtype} of "
            f"shape {logits.shape}."
        )
    if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < logits.shape[1]:
        raise ValueError(
            f"end must be one of the {logits.shape[1]} tokens that step gives logits of, a Python "
            f"integer in [0, {logits.shape[1]}); got {end!r}."
        )
    return jnp.promote_types(logits.dtype, jnp.float32)
