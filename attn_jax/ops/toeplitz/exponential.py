"""Exponentials of any length by chunks: dense within, a state of one row a channel between.

What a chunk hands to the next is its own last row, and the states of all chunks are again an
exponential sum: of last rows, a chunk apart. So the same function does it, for ever fewer rows.
Every weight is the exponential of a distance: nothing overflows for lengths near zero (the
identity) or far above S (the mean). Causally, one state is all that decoding keeps.

Letters: B batch, P positions, N heads, K value heads, W channels, C positions a chunk, I chunks,
L new positions; h: N, or 1 where all heads share a length; M: W, or K W then; k: K or N.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attn_jax.ops.primitives import bilinear
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.rows import ANYWHERE, LEAST, Sums, Trust, summed
from attn_jax.ops.toeplitz.shifted import padded

_CHUNK = 32

Run = Int[Array, "#b P"] | None


class State(NamedTuple):
    """What a causal exponential keeps of all positions so far.

    Attributes:
      total: sum of the values, each times exp(-distance to the last position / length).
      weight: sum of these weights.

    """

    total: Float[Array, "B N D"]
    weight: Float[Array, "B N"]


def empty_state(batch: int, heads: int, width: int, dtype: jnp.dtype = jnp.float32) -> State:
    """The state before any position."""
    return State(jnp.zeros((batch, heads, width), dtype), jnp.zeros((batch, heads), dtype))


def advance(
    state: State, value: Float[Array, "B L N D"], length: Float[Array, ""] | Float[Array, "N"]
) -> tuple[Float[Array, "B L N D"], State]:
    r"""Decode L more positions with time and memory that do not grow with those before.

    .. math:: y_i = \sum_{j \le i} e^{-(i - j) / l} v_j / \sum_{j \le i} e^{-(i - j) / l}

    Args:
      state: after all positions before, or `empty_state`.
      value: of the new positions.
      length: of the exponential, as in `Exponential`.

    Returns:
      The outputs that `attention(None, None, value, proximity=Exponential(length),
      mask=Causal())` gives at these positions, in value's dtype, and the state after them.

    """
    if value.shape[1] == 0:
        return value, state
    dtype = state.total.dtype
    length = jnp.asarray(length, dtype).reshape(-1)
    new = value.astype(dtype)
    decay = _decay(np.arange(1, value.shape[1] + 1), length).reshape(1, -1, value.shape[1], 1)
    decay = jnp.swapaxes(decay, 1, 2)
    total = _behind(new, length) + decay * state.total[:, None]
    weight = _behind(jnp.ones_like(new[..., :1]), length) + decay * state.weight[:, None, :, None]
    output = (total / weight).astype(value.dtype)
    return output, State(total[:, -1], weight[:, -1, :, 0])


def sums(line: Line) -> Sums:
    """Where the masks set no limit but that of a causal mask, or of its mirror image."""
    length = line.smooth.parameters["length"]
    runs = None if line.runs is None else line.runs.run

    def function(x: Float[Array, "#b P k W"]) -> Float[Array, "#b P k W"]:
        if runs is not None:
            x = jnp.broadcast_to(x, (len(runs), *x.shape[1:]))
        if line.after is not None:
            return _behind(x, length, runs)
        if line.before is not None:
            turned = None if runs is None else jnp.flip(runs, 1)
            return jnp.flip(_behind(jnp.flip(x, 1), length, turned), 1)
        return _around(x, length, runs)

    return summed(line, function, len(length))


def trust(line: Line) -> Trust:
    """How far `sums` are to be trusted: not at all where a label is in two runs."""
    zeros = jnp.zeros_like(line.smooth.parameters["length"])
    floor = zeros + LEAST
    if line.runs is not None:
        floor = jnp.where(_none_comes_back(line).all(), floor, jnp.inf)
    return Trust(zeros, floor, reach=ANYWHERE)


def _none_comes_back(line: Line) -> Bool[Array, "B"]:
    """Whether no label has two runs."""
    assert line.labels is not None
    assert line.runs is not None
    labels = jnp.sort(line.labels[1], axis=1)
    changes = (labels[:, 1:] != labels[:, :-1]).sum(1, dtype=jnp.int32)
    return line.runs.run[:, -1] == changes


def _around(x: Float[Array, "#b P K W"], length: Float[Array, "n"], runs: Run) -> Array:
    """y[p] = sum of exp(-|p - q| / length) x[q] over all q of p's run."""
    chunks, runs = _chunks(x, length, runs)
    y = within = _within(chunks, length, 1, runs, causal=False)
    if chunks.shape[1] > 1:
        y = y + _handed_on(within[:, :, :, -1], length, 1, runs)
        y = y + _handed_on(within[:, :, :, 0], length, 1, runs, back=True)
    return _joined(y, x)


def _behind(
    x: Float[Array, "#b P K W"], length: Float[Array, "n"], runs: Run = None, step: int = 1
) -> Array:
    """y[p] = sum of exp(-(p - q) step / length) x[q] over the q <= p of p's run."""
    chunks, runs = _chunks(x, length, runs)
    y = within = _within(chunks, length, step, runs, causal=True)
    if chunks.shape[1] > 1:
        y = y + _handed_on(within[:, :, :, -1], length, step, runs)
    return _joined(y, x)


def _chunks(
    x: Float[Array, "#b P K W"], length: Float[Array, "n"], runs: Run
) -> tuple[Float[Array, "b I h C M"], Int[Array, "b I C"] | None]:
    batch, positions, heads, channels = x.shape
    size = min(_CHUNK, positions)
    count = -(-positions // size)
    x = padded(x, 1, 0, count * size - positions)
    if runs is not None:
        # Positions behind the last are of its run: they hold zeros.
        runs = jnp.pad(runs, ((0, 0), (0, count * size - positions)), mode="edge")
        runs = runs.reshape(-1, count, size)
    if len(length) == 1:
        return x.reshape(batch, count, 1, size, heads * channels), runs
    return jnp.swapaxes(x.reshape(batch, count, size, heads, channels), 2, 3), runs


def _joined(chunks: Float[Array, "b I h C M"], x: Float[Array, "b P K W"]) -> Array:
    batch, positions, heads, channels = x.shape
    if chunks.shape[2] > 1:
        chunks = jnp.swapaxes(chunks, 2, 3)
    return chunks.reshape(batch, -1, heads, channels)[:, :positions]


def _within(
    chunks: Float[Array, "b I h C M"],
    length: Float[Array, "n"],
    step: int,
    runs: Int[Array, "b I C"] | None,
    causal: bool,
) -> Float[Array, "b I h C M"]:
    """The sums over a position's own chunk, by one matrix for all chunks.

    It is repeated for every chunk: XLA then needs no transposed copy of the chunks.
    """
    place = np.arange(chunks.shape[3])
    distance = place[:, None] - place[None, :]
    matrix = _decay(step * abs(distance), length)
    if causal:
        matrix = matrix * (distance >= 0)[None]
    matrix = jnp.broadcast_to(matrix, (*chunks.shape[:2], *matrix.shape))
    if runs is not None:
        matrix = matrix * (runs[..., None] == runs[..., None, :])[:, :, None]
    return jnp.einsum("bihcd,bihdw->bihcw", matrix, chunks)


def _handed_on(
    rows: Float[Array, "b I h M"],
    length: Float[Array, "n"],
    step: int,
    runs: Int[Array, "b I C"] | None,
    back: bool = False,
) -> Float[Array, "b I h C M"]:
    """What the chunks before a position's own add to it, or with `back` those after it.

    Of each chunk the row next to the position's is given, the last or the first.
    """
    order, edge = (slice(None, None, -1), 0) if back else (slice(None), -1)
    edges = None if runs is None else runs[:, order, edge]
    state = padded(_behind(rows[:, order], length, edges, step * _CHUNK), 1, 1, -1)[:, order]
    decay = _decay(step * np.arange(1, _CHUNK + 1)[order], length)
    added = decayed(state, decay[None])
    if runs is None or edges is None:
        return added
    same = runs == padded(edges, 1, 1, -1)[:, order, None]
    return jnp.where(same[:, :, None, :, None], added, 0)


def _outer(state: Array, decay: Array, **_: Any) -> Array:
    """Products of two vectors, which XLA computes while it adds them up."""
    return state[:, :, :, None] * decay[:, None, :, :, None]


def _in_state(cotangent: Array, decay: Array, shape: tuple[int, ...]) -> Array:
    """By a row of a matrix for every chunk: XLA:CPU takes ten times as long to add up rows."""
    rows = jnp.broadcast_to(decay[:, None, :, None], (*shape[:3], 1, decay.shape[2]))
    return (rows @ cotangent)[..., 0, :]


def _in_decay(cotangent: Array, state: Array, shape: tuple[int, ...]) -> Array:
    sums = (cotangent @ state[..., None])[..., 0].sum(1)
    return sums if shape[0] > 1 else sums.sum(0, keepdims=True)


# Of a state [b, I, h, M] and its decay [a, h, C] within a chunk, a: b or 1.
decayed = bilinear(
    "attn_jax_decayed_state",
    _outer,
    lambda state, decay: (*state[:3], decay[2], state[3]),
    _in_state,
    _in_decay,
)


def _decay(distance: Int[np.ndarray, "..."], length: Float[Array, "n"]) -> Float[Array, "n ..."]:
    length = length.reshape(-1, *[1] * distance.ndim)
    return jnp.exp(-jnp.asarray(distance, length.dtype)[None] / length)
