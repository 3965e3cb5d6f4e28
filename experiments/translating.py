"""Sentences through a model that translates: batches of like lengths, beam search, text again."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from attn_jax.decoding import Beams, beam_search, greedy
from experiments.options import UserError
from experiments.tasks.subwords import END, START, Subwords

_MULTIPLE = 8
"""Sources are padded to a multiple of so many tokens: each length is compiled once."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How outputs are looked for.

    Attributes:
      beam: hypotheses kept; 1 is greedy decoding.
      alpha: exponent of the length penalty.
      extra: most tokens of an output beyond those of its source.

    """

    beam: int = 4
    alpha: float = 0.6
    extra: int = 50

    def __post_init__(self):
        if self.beam < 1 or self.extra < 1:
            raise UserError(
                f"beam and extra must be 1 or more, got beam={self.beam}, extra={self.extra}"
            )


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One translation of a sentence.

    Attributes:
      text: the words.
      tokens: their ids.
      log_probability: of the tokens and their end.
      score: log_probability over the length penalty.
      finished: False where the limit of the length cut it.

    """

    text: str
    tokens: Sequence[int]
    log_probability: float
    score: float
    finished: bool


def translate(
    model: Any,
    subwords: Subwords,
    sources: Sequence[str],
    search: Search,
    *,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Hypothesis]:
    """The best translation of each source, in their order; see `n_best`."""
    found = n_best(model, subwords, sources, search, batch_size=batch_size, progress=progress)
    return [one[0] for one in found]


def n_best(
    model: Any,
    subwords: Subwords,
    sources: Sequence[str],
    search: Search,
    *,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[list[Hypothesis]]:
    """All hypotheses that the search keeps for each source, best first.

    Sources of like lengths share a batch; what a sentence becomes does not depend on the others.

    Args:
      model: a translator.
      subwords: of the model.
      sources: sentences; an empty one has the empty translation.
      search: how.
      batch_size: sentences at a time.
      progress: called with a word, the sentences done and their number.

    """
    graph, params = nnx.split(model)
    found: list[list[Hypothesis]] = [
        [Hypothesis("", (), 0.0, 0.0, True)] if not source.strip() else [] for source in sources
    ]
    waiting = [i for i, source in enumerate(sources) if source.strip()]
    encoded = subwords.encode([sources[i] for i in waiting])
    for chosen in _batches([len(one) + 1 for one in encoded], batch_size):
        ids, length = _padded([encoded[i] for i in chosen], batch_size)
        beams = _decoded(graph, params, ids, length, search, ids.shape[1] + search.extra)
        for row, index in enumerate(chosen):
            found[waiting[index]] = _hypotheses(beams, row, subwords)
        if progress is not None:
            progress("translated", sum(map(bool, found)), len(found))
    return found


def _batches(lengths: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Indices of sentences, the shortest first; one padded length a batch."""
    padded = [-(-length // _MULTIPLE) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (padded[i], lengths[i], i))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == size or padded[index] != padded[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(
    sentences: Sequence[Int[np.ndarray, " tokens"]], rows: int
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
    """Ids with their END and their number; rows behind the last sentence hold END alone."""
    length = np.array([len(one) + 1 for one in sentences] + [1] * (rows - len(sentences)))
    ids = np.zeros((rows, -(-int(length.max()) // _MULTIPLE) * _MULTIPLE), np.int32)
    for row, one in enumerate(sentences):
        ids[row, : len(one)] = one
    ids[np.arange(rows), length - 1] = END
    return ids, length.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("graph", "search", "steps"))
def _decoded(
    graph: Any, params: Any, ids: Array, length: Array, search: Search, steps: int
) -> Beams:
    return decoded(nnx.merge(graph, params), ids, length, search, steps)


def decoded(
    model: Any, ids: Int[Array, "B S"], length: Int[Array, "B"], search: Search, steps: int
) -> Beams:
    """The outputs of a translator for sources as ids, each with its END.

    Args:
      model: a translator.
      ids: of the sources, padded.
      length: of each source, END counted.
      search: how.
      steps: most tokens of any output.

    """
    state = model.start(ids, length, steps)
    start = jnp.full(len(ids), START, jnp.int32)
    limits = {"end": END, "max_length": steps, "max_lengths": length + search.extra}
    if search.beam == 1:
        one = greedy(model.step, state, start, **limits)
        arrays = one.tokens, one.lengths, one.log_probability, one.log_probability, one.finished
        return Beams(*(x[:, None] for x in arrays))
    return beam_search(
        model.step, state, start, beam_size=search.beam, alpha=search.alpha, **limits
    )


def _hypotheses(beams: Beams, row: int, subwords: Subwords) -> list[Hypothesis]:
    """Those of one sentence that exist."""
    tokens, lengths, log_probability, score, finished = (np.asarray(x)[row] for x in beams)
    return [
        Hypothesis(
            text=subwords.decode(tokens[k, : lengths[k]]),
            tokens=tuple(int(t) for t in tokens[k, : lengths[k]]),
            log_probability=float(log_probability[k]),
            score=float(score[k]),
            finished=bool(finished[k]),
        )
        for k in range(len(score))
        if np.isfinite(score[k]) or k == 0
    ]
