"""pronouns: "the dog Tommy and the doctor Anna ... Mary says the dog [MASK] is good": he, she, it?

A question names a noun, the noun stands beside a name, the name has a class. A model has to find
the one mention, between 6 and 64 words back, that matches; the nearest name belongs to a witness
of any class. Stories are packed into rows and kept apart by segments; a model sees each word
together with the one before it, so that a name carries its noun and [MASK] what is asked.

Without that help, or with the noun behind [MASK], binding takes one more step of attention, and no
rule of content finds both steps in 2,000 steps of training: each ends at the nearest entity.

Three or four entities and not two: with two, the classes that occur would give the answer away in
every second story. All three classes occur in each, whatever the label.
"""

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64, Int

from experiments.models import TokenClassifier, cross_entropy
from experiments.options import Option, UserError
from experiments.tasks import stories as english
from experiments.tasks.base import Baseline, Batch, Items, Metric, Reading, Task
from experiments.tasks.packing import pack
from experiments.tasks.stories import CLASSES, NEAREST, VOCABULARY, Stories, Writer
from experiments.tasks.synthetic import endless, fingerprint, in_batches, stream


class Pronouns(Task):
    """The pronoun of the entity that a question names; distance is from its name to [MASK]."""

    name = "pronouns"
    options = types.MappingProxyType(
        {
            "entities": Option((3, 4), "fewest and most entities in a story, 3 or more"),
            "train_distance": Option(32, f"longest in training, in words; the least is {NEAREST}"),
            "test_distance": Option(64, "longest distance in the test split"),
            "row": Option(96, "words in a row of packed stories"),
            "batch_size": Option(10, "rows in a training batch", 1),
            "test_items": Option(
                4000, "stories of the test split, each with one scored question", 1
            ),
            "validation_items": Option(1000, "stories of the validation split", 1),
        }
    )
    metric = Metric("accuracy", "%", higher_is_better=True, margin=0.005, chance=1 / len(CLASSES))

    def __init__(self, options: Any):
        self.entities = tuple(options.entities)
        self.most = {"train": options.train_distance, "test": options.test_distance}
        self.most["validation"] = options.train_distance
        self.row, self.batch_size = options.row, options.batch_size
        self.count = {"test": options.test_items, "validation": options.validation_items}
        self._check()
        self._write = Writer("train", self.most["train"], self.entities)
        self._splits = {split: self._stories(split) for split in self.count}
        self._packed = {split: self._pack_split(split) for split in self.count}

    def _check(self) -> None:
        if len(self.entities) != 2 or not 3 <= self.entities[0] <= self.entities[1] <= 8:
            raise UserError(
                f"task.entities must be the fewest and the most, 3 <= fewest <= most <= 8, got "
                f"{self.entities}"
            )
        if not NEAREST < self.most["train"] <= self.most["test"]:
            raise UserError(
                f"distances must have {NEAREST} < task.train_distance <= task.test_distance, got "
                f"{self.most['train']} and {self.most['test']}"
            )
        needed = english.longest(self.most["test"], self.entities)
        if self.row < needed:
            raise UserError(
                f"task.row must hold the longest story, {needed} words, got {self.row}: raise "
                "it or lower task.test_distance"
            )

    def train(self, seed: int) -> grain.IterDataset:
        """Rows packed from stories of distances up to `train_distance`, more short than long.

        Short stories ask more per word, and what a rule of distance can learn it learns there:
        with as many long ones it stays at chance for thousands of steps.
        """
        return endless(self._batch, "pronouns", "train", seed)

    def _batch(self, generator: np.random.Generator) -> Batch:
        enough = self.batch_size * self.row // 16
        distance = log_uniform(generator.random(enough) ** 2, self.most["train"])
        stories = self._write(generator, distance)
        return pack_rows(stories, self.row, self.batch_size, last_only=False)[0]

    def evaluation(self, split: str) -> Sequence[Batch]:
        """Packed rows of a split, 64 at a time."""
        return in_batches(self._packed[split][0], 64)

    def _stories(self, split: str) -> Stories:
        generator = stream("pronouns", split)
        count = self.count[split]
        steps = (np.arange(count) + generator.random(count)) / count
        distance = generator.permutation(log_uniform(steps, self.most[split]))
        return Writer(split, self.most[split], self.entities)(generator, distance)

    def _pack_split(self, split: str) -> tuple[Batch, Int[np.ndarray, " items"]]:
        return pack_rows(self._splits[split], self.row, None, last_only=True)

    def items(self, split: str) -> Items:
        """One item and one cluster a story."""
        order = self._packed[split][1]
        distance = self._splits[split].distance[order]
        seen, most = self.most["train"], self.most["test"]
        return Items(
            cluster=order,
            distance=distance.astype(np.float64),
            group=(distance > seen).astype(int),
            groups=(f"distances of training, {NEAREST} to {seen}", f"longer, to {most}"),
            distance_edges=_edges(seen, most),
            distance_name="words from the antecedent's name to [MASK]",
            beyond=distance > seen,
        )

    def reading(self, text: str | None) -> Reading:
        """A story, in words of the task's own; by default the first of the test split."""
        if text is None:
            stories = self._splits["test"]
            tokens = stories.tokens[0, : stories.length[0]].tolist()
        else:
            tokens = _tokens(text)
        if not 1 < len(tokens) <= self.row:
            raise UserError(f"--text must have 2 to {self.row} words, got {len(tokens)}")
        count, before = len(tokens), [english.PADDING, *tokens[:-1]]
        fields = {
            "token": np.array([tokens, before], np.int32).T,
            "target": np.zeros(count, np.int32),
            "weight": np.zeros(count, np.float32),
            "segment": np.ones(count, np.int32),
            "position": np.arange(count, dtype=np.int32),
        }
        words = [VOCABULARY[token] for token in tokens]
        return Reading({name: array[None] for name, array in fields.items()}, words, words)

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A bidirectional classifier of every position, read at [MASK]."""
        return TokenClassifier(
            vocabularies={"token": len(VOCABULARY)},
            num_classes=len(CLASSES),
            rule=rule,
            options=model,
            max_length=self.row,
            rngs=rngs,
        )

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """Cross-entropy at [MASK]."""
        return cross_entropy(outputs, batch["target"], batch["weight"], label_smoothing)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """1 where the most likely pronoun is the right one."""
        right = jnp.argmax(outputs, -1) == batch["target"]
        return right.astype(jnp.float32).ravel(), jnp.asarray(batch["weight"]).ravel()

    def baselines(self) -> Sequence[Baseline]:
        """Shortcuts that need no binding, and the nearest entity, which pays at short distance."""
        order = self._packed["test"][1]
        test = self._splits["test"]
        training = self._write(
            stream("pronouns", "baselines"),
            log_uniform(stream("pronouns", "distances").random(20_000), self.most["train"]),
        )
        guesses = {
            "majority": np.full(len(order), np.bincount(training.label).argmax()),
            "nearest name": nearest_name(test),
            "bag of words": bag_of_words(training, test),
            "nearest entity": nearest_entity(test),
        }
        return [
            Baseline(name, (guess == test.label)[order].astype(np.float64))
            for name, guess in guesses.items()
        ]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        batch = self._batch(stream("pronouns", "train", 0, 0))
        return {
            "data_sha256": fingerprint(*(packed for packed, _ in self._packed.values())),
            "padding": float((batch["segment"] == 0).mean()),
            "dropped": {},
        }


def _tokens(text: str) -> list[int]:
    """Ids of words.

    Raises:
      UserError: a word is none of the task's.

    """
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    words = re.findall(r"\[MASK\]|[\w']+|[^\w\s]", text)
    unknown = [word for word in words if word not in ids]
    if unknown:
        near = difflib.get_close_matches(unknown[0], VOCABULARY, 3) or sorted(VOCABULARY)[:3]
        raise UserError(
            f"pronouns knows {len(VOCABULARY)} words, {unknown[0]!r} is none of them: try one like "
            f"{', '.join(near)}, or leave out --text for a story of the test split"
        )
    return [ids[word] for word in words]


def log_uniform(quantile: Float64[np.ndarray, " rows"], most: int) -> Int[np.ndarray, " rows"]:
    """Whole distances 4..most whose logarithm is uniform, by their quantile in [0, 1)."""
    return np.floor(NEAREST * ((most + 1) / NEAREST) ** quantile).astype(int)


def _edges(seen: int, most: int) -> Sequence[int]:
    """Three buckets of distances that training has, even in their logarithm, and one beyond."""
    inside = np.geomspace(NEAREST, seen + 1, 4).round().astype(int).tolist()
    return [*inside, most + 1] if most > seen else inside


def pack_rows(
    stories: Stories, row: int, rows: int | None, *, last_only: bool
) -> tuple[Batch, Int[np.ndarray, " items"]]:
    """Stories side by side in rows: token (with the one before), segment, position, target.

    Args:
      stories: to be packed.
      row: words in a row.
      rows: how many rows; None: as many as it takes.
      last_only: only the last [MASK] of a story has weight; otherwise all with an answer.

    Returns:
      The arrays, each [rows, row, ...], and the stories packed, in the order of their last
      [MASK]s.

    """
    which, line, starts, rows = pack(stories.length[:, None], (row,), rows)
    start = starts[:, 0]
    source, offset = np.nonzero(np.arange(stories.tokens.shape[1]) < stories.length[which, None])
    story, where = which[source], (line[source], start[source] + offset)
    answer = stories.answers[story, offset]
    scored = (answer >= 0) & ((not last_only) | (offset == stories.mask_at[story]))
    before = np.where(offset > 0, stories.tokens[story, offset - 1], english.PADDING)
    values = {
        "token": np.stack([stories.tokens[story, offset], before], axis=1),
        "segment": source + 1,
        "position": offset,
        "target": np.maximum(answer, 0),
    }
    batch: dict[str, np.ndarray] = {"weight": np.zeros((rows, row), np.float32)}
    batch["weight"][where] = scored
    for name, of_words in values.items():
        batch[name] = np.zeros((rows, row, *of_words.shape[1:]), np.int32)
        batch[name][where] = of_words
    return batch, which[np.lexsort((start + stories.mask_at[which], line))]


def nearest_name(stories: Stories) -> Int[np.ndarray, " rows"]:
    """The class of the last name before [MASK]."""
    return _last(english.class_of(stories.tokens), stories)


def nearest_entity(stories: Stories) -> Int[np.ndarray, " rows"]:
    """The class of the last name before [MASK] that stands beside a noun."""
    classes = english.class_of(stories.tokens)
    after_noun = np.roll(english.is_noun(stories.tokens), 1, axis=1)
    return _last(np.where(after_noun, classes, -1), stories)


def _last(classes: Int[np.ndarray, "rows words"], stories: Stories) -> Int[np.ndarray, " rows"]:
    place = np.arange(classes.shape[1])
    before = (classes >= 0) & (place < stories.mask_at[:, None])
    index = np.where(before, place, -1).max(1)
    return classes[np.arange(len(index)), index]


def bag_of_words(train: Stories, test: Stories) -> Int[np.ndarray, " rows"]:
    """Naive Bayes on counts of words, smoothed by one."""
    counts = _counts(train)
    per_class = np.stack([counts[train.label == c].sum(0) + 1.0 for c in range(len(CLASSES))])
    log_likelihood = np.log(per_class / per_class.sum(1, keepdims=True))
    log_prior = np.log(np.bincount(train.label, minlength=len(CLASSES)) + 1.0)
    return (_counts(test) @ log_likelihood.T + log_prior).argmax(1)


def _counts(stories: Stories) -> Float64[np.ndarray, "rows vocabulary"]:
    rows, size = len(stories.label), len(VOCABULARY)
    index = np.arange(rows)[:, None] * size + stories.tokens
    counts = np.bincount(index.ravel(), minlength=rows * size).reshape(rows, size)
    counts[:, english.PADDING] = 0
    return counts.astype(np.float64)
