"""What attention does with one text: models and rules side by side, and their numbers."""

import dataclasses
import functools
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from attn_jax.analysis import HeadSteps, Reweighing, Steps, steps
from attn_jax.nn import MultiHeadAttention, sinusoidal
from attn_jax.viz import Shown
from experiments.examples import Words, has_attention, recorded
from experiments.options import UserError
from experiments.tasks.subwords import END, START
from experiments.translating import translate
from experiments.translators import sides
from experiments.workdirs import Translator, load_model

VALUES = 3
"""So many entries of every value are printed."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A model or a rule, and what it did with the text.

    Attributes:
      name: as it stands in tables and pictures.
      shown: weights of all its attentions, by path.
      take: the steps of the attention at a path.

    """

    name: str
    shown: Mapping[str, Shown]
    take: Callable[[str], Steps]


def side_of_run(name: str, workdir: pathlib.Path, text: str | None, seed: int) -> Side:
    """A trained run of any task but translation.

    Raises:
      UserError: there is no such run, or its task can't read the text.

    """
    task, model = load_model(workdir, seed)
    reading = task.reading(text)
    if reading is None:
        raise UserError(f"{task.name} has no example in words to explain")
    return _side(name, model, reading.batch, lambda path: (reading.queries, reading.keys))


def side_of_translator(name: str, workdir: pathlib.Path, text: str, seed: int) -> tuple[Side, str]:
    """A trained translator as it writes its own translation of the text, and that translation."""
    translator = Translator.load(workdir, seed)
    (found,) = translate(
        translator.model, translator.subwords, [text], translator.search(), batch_size=1
    )
    (source,) = translator.subwords.encode([text])
    ids = {
        "source": [*source.tolist(), END],
        "target_in": [START, *found.tokens],
        "target": [*found.tokens, END],
    }
    batch = {key: np.asarray([row], np.int32) for key, row in ids.items()}
    for side in ("source", "target"):
        batch[f"{side}_segment"] = np.ones_like(batch[side])
        batch[f"{side}_position"] = np.arange(batch[side].shape[1], dtype=np.int32)[None]
    pieces = {key: translator.subwords.pieces(row) for key, row in ids.items()}

    def words(path: str) -> tuple[Sequence[str], Sequence[str]]:
        queries, keys = sides(path)
        if queries == keys == "target":
            return pieces["target_in"], pieces["target_in"]
        # a row of attention to the source is where a word is written, and is named by it
        return pieces[queries], pieces[keys]

    return _side(name, translator.model, batch, words), found.text


def side_of_rule(rule: str, text: str, *, num_heads: int, features: int) -> Side:
    """One attention under a rule, untrained, over a vector for each word and its position.

    Equal words have equal vectors, drawn from the words themselves.

    Raises:
      UserError: the rule does not read, or there are not two words.

    """
    words = text.split()
    if len(words) < 2:
        raise UserError(f"--text must have two words or more, got {text!r}")
    vectors = [_vector(word, features) for word in words]
    x = jnp.asarray(vectors)[None] + sinusoidal(jnp.arange(len(words)), features)[None]
    try:
        module = MultiHeadAttention(num_heads, features, rule=rule, rngs=nnx.Rngs(0))
    except ValueError as error:
        raise UserError(str(error)) from error
    return _side(rule, module, x, lambda path: (words, words))


def _vector(word: str, features: int) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(word.lower().encode()))
    return generator.normal(size=features).astype(np.float32)


def _side(name: str, model: Any, given: Any, words: Words) -> Side:
    if not has_attention(model):
        raise UserError(f"{name} has no attention to explain")
    shown = recorded(model, given, words)
    take = functools.cache(lambda path: steps(model, given, only=path or "*")[path])
    return Side(name, shown, take)


# Numbers


def table(sides: Sequence[Side], path: str, head: int, query: int) -> Table:
    """A row for each key, with the columns of every side beside each other, and their sums."""
    columns = [list(_columns(side.take(path).heads[head], query)) for side in sides]
    keys = sides[0].shown[path].keys
    built = Table(show_edge=False, pad_edge=False, show_footer=True, collapse_padding=True)
    built.add_column("\nkey", footer="sum")
    for side, own in zip(sides, columns, strict=True):
        for index, (name, _, total) in enumerate(own):
            label = side.name if index == 0 else ""
            built.add_column(
                f"{label}\n{name}", total, justify="right", no_wrap=True, overflow="fold"
            )
    for row, key in enumerate(keys):
        built.add_row(f"{row} {key}", *(own[1][row] for some in columns for own in some))
    return built


def _columns(head: HeadSteps, query: int) -> Iterator[tuple[str, Sequence[str], str]]:
    """Name, an entry for each key, and what stands below."""
    for number, rule in enumerate(head.rules, 1):
        yield from _of_rule(rule, query, f" {number}" if len(head.rules) > 1 else "")
    if head.gate is not None:
        named = f"{head.gate:.4f} weight 1 + {1 - head.gate:.4f} weight 2"
        yield named, _numbers(head.weights[query]), f"{head.weights[query].sum():.4f}"
    for entry in range(min(VALUES, head.value.shape[1])):
        total = f"{head.context[query, entry]:.4f}"
        yield f"value {entry}", _numbers(head.value[:, entry]), total


def _of_rule(rule: Reweighing, query: int, of: str) -> Iterator[tuple[str, Sequence[str], str]]:
    *terms, (name, logit) = rule.terms(query)
    for term, values in terms:
        yield f"{term}{of}", _numbers(values), ""
    yield f"{name}{of}", _numbers(np.where(rule.allowed[query], logit, np.nan)), ""
    yield f"weight{of}", _numbers(rule.weights[query]), f"{rule.weights[query].sum():.4f}"


def _numbers(values: np.ndarray) -> list[str]:
    """With four digits; NaN is a key that is masked."""
    return ["masked" if math.isnan(value) else f"{value + 0.0:.4f}" for value in values]


def summary(side: Side, path: str, head: int, query: int) -> str:
    """The context vector, the heads joined and the output, as far as a line goes."""
    taken = side.take(path)
    return "\n".join(
        f"  {name}: {_vector_text(vector)}"
        for name, vector in (
            (f"context of head {head} = sum of weight x value", taken.heads[head].context[query]),
            (f"{len(taken.heads)} heads joined", taken.joined[query]),
            ("output = W joined + b", taken.output[query]),
        )
    )


def _vector_text(vector: np.ndarray, most: int = 8) -> str:
    shown = " ".join(f"{value:.4f}" for value in vector[:most])
    return f"[{shown}{' ...' if len(vector) > most else ''}] ({len(vector)})"


def place(words: Sequence[str], asked: str) -> int:
    """The index of a query by its word, the last one of several, or by its number.

    Raises:
      UserError: there is none.

    """
    if not asked:
        return len(words) - 1
    found = [i for i, word in enumerate(words) if word.strip().lower() == asked.strip().lower()]
    if found:
        return found[-1]
    if asked.isdigit() and int(asked) < len(words):
        return int(asked)
    raise UserError(
        f"--query must be a word of the text or its index, 0 to {len(words) - 1}, got {asked!r}: "
        f"{' '.join(words)}"
    )
