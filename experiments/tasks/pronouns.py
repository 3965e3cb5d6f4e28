"""pronouns: "the dog Tommy and the doctor Anna ... Mary says [MASK] is a good dog": he, she or it?

The predicate names a noun, the noun stands beside a name, the name has a class. A model has to
find the one mention, between 4 and 64 words back, that matches; the nearest name belongs to a
witness of any class. Sentences are packed into rows and kept apart by segments.

Three or four entities and not two: with two, the classes that occur would give the answer away in
every second sentence. All three classes occur in each, whatever the label.
"""

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
from experiments.tasks import sentences as english
from experiments.tasks.base import Baseline, Batch, Items, Metric, Task
from experiments.tasks.packing import pack
from experiments.tasks.sentences import CLASSES, VOCABULARY, Sentences, Writer
from experiments.tasks.synthetic import endless, fingerprint, in_batches, stream

NEAREST = 4


class Pronouns(Task):
    """The pronoun of the entity that a predicate names; distance is from its name to [MASK]."""

    name = "pronouns"
    options = types.MappingProxyType(
        {
            "entities": Option((3, 4), "fewest and most entities in a sentence, 3 or more"),
            "train_distance": Option(32, "longest distance in training, in words; the least is 4"),
            "test_distance": Option(64, "longest distance in the test split"),
            "row": Option(96, "words in a row of packed sentences"),
            "batch_size": Option(10, "rows in a training batch"),
            "test_items": Option(4000, "sentences of the test split"),
            "validation_items": Option(1000, "sentences of the validation split"),
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
        self._splits = {split: self._sentences(split) for split in self.count}
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
                f"task.row must hold the longest sentence, {needed} words, got {self.row}: raise "
                "it or lower task.test_distance"
            )

    def train(self, seed: int) -> grain.IterDataset:
        """Rows packed from sentences of distances up to `train_distance`."""
        return endless(self._batch, "pronouns", "train", seed)

    def _batch(self, generator: np.random.Generator) -> Batch:
        enough = self.batch_size * self.row // 16
        distance = log_uniform(generator.random(enough), self.most["train"])
        sentences = self._write(generator, distance)
        return pack_rows(sentences, self.row, self.batch_size)[0]

    def evaluation(self, split: str) -> Sequence[Batch]:
        """Packed rows of a split, 64 at a time."""
        return in_batches(self._packed[split][0], 64)

    def _sentences(self, split: str) -> Sentences:
        generator = stream("pronouns", split)
        count = self.count[split]
        steps = (np.arange(count) + generator.random(count)) / count
        distance = generator.permutation(log_uniform(steps, self.most[split]))
        return Writer(split, self.most[split], self.entities)(generator, distance)

    def _pack_split(self, split: str) -> tuple[Batch, Int[np.ndarray, " items"]]:
        return pack_rows(self._splits[split], self.row, None)

    def items(self, split: str) -> Items:
        """One item and one cluster a sentence."""
        order = self._packed[split][1]
        distance = self._splits[split].distance[order]
        seen, most = self.most["train"], self.most["test"]
        return Items(
            cluster=order,
            distance=distance.astype(np.float64),
            group=(distance > seen).astype(int),
            groups=(f"distances of training, {NEAREST} to {seen}", f"longer, to {most}"),
            distance_edges=_edges(most),
            distance_name="words from the antecedent's name to [MASK]",
        )

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A bidirectional classifier of every position, read at [MASK]."""
        return TokenClassifier(
            vocabularies={"token": len(VOCABULARY), "before": len(VOCABULARY)},
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


def log_uniform(quantile: Float64[np.ndarray, " rows"], most: int) -> Int[np.ndarray, " rows"]:
    """Whole distances 4..most whose logarithm is uniform, by their quantile in [0, 1)."""
    return np.floor(NEAREST * ((most + 1) / NEAREST) ** quantile).astype(int)


def _edges(most: int) -> Sequence[float]:
    """4, 8, 16, 33, 65: octaves, the bounds moved to keep 32 and 64 below them."""
    octaves = [NEAREST * 2**i for i in range(1 + int(np.log2(most / NEAREST)))]
    return [edge + (edge >= 32) for edge in octaves if edge < most] + [most + 1]


def pack_rows(
    sentences: Sentences, row: int, rows: int | None
) -> tuple[Batch, Int[np.ndarray, " items"]]:
    """Sentences side by side in rows: token, segment, position, target and weight.

    Returns:
      The arrays, each [rows, row], and the sentences packed, in the order of their [MASK]s.

    """
    which, line, start, rows = pack(sentences.length, row, rows)
    source, offset = np.nonzero(
        np.arange(sentences.tokens.shape[1]) < sentences.length[which, None]
    )
    where = line[source], start[source] + offset
    names = ("token", "before", "segment", "position", "target")
    batch: dict[str, np.ndarray] = {name: np.zeros((rows, row), np.int32) for name in names}
    batch["weight"] = np.zeros((rows, row), np.float32)
    batch["token"][where] = sentences.tokens[which[source], offset]
    batch["segment"][where] = source + 1
    batch["position"][where] = offset
    batch["before"][:, 1:] = np.where(batch["position"][:, 1:] > 0, batch["token"][:, :-1], 0)
    asked = line, start + sentences.mask_at[which]
    batch["target"][asked] = sentences.label[which]
    batch["weight"][asked] = 1
    return batch, which[np.lexsort(asked[::-1])]


def nearest_name(sentences: Sentences) -> Int[np.ndarray, " rows"]:
    """The class of the last name before [MASK]."""
    return _last(english.class_of(sentences.tokens), sentences)


def nearest_entity(sentences: Sentences) -> Int[np.ndarray, " rows"]:
    """The class of the last name before [MASK] that stands beside a noun."""
    classes = english.class_of(sentences.tokens)
    after_noun = np.roll(english.is_noun(sentences.tokens), 1, axis=1)
    return _last(np.where(after_noun, classes, -1), sentences)


def _last(classes: Int[np.ndarray, "rows words"], sentences: Sentences) -> Int[np.ndarray, " rows"]:
    place = np.arange(classes.shape[1])
    before = (classes >= 0) & (place < sentences.mask_at[:, None])
    index = np.where(before, place, -1).max(1)
    return classes[np.arange(len(index)), index]


def bag_of_words(train: Sentences, test: Sentences) -> Int[np.ndarray, " rows"]:
    """Naive Bayes on counts of words, smoothed by one."""
    counts = _counts(train)
    per_class = np.stack([counts[train.label == c].sum(0) + 1.0 for c in range(len(CLASSES))])
    log_likelihood = np.log(per_class / per_class.sum(1, keepdims=True))
    log_prior = np.log(np.bincount(train.label, minlength=len(CLASSES)) + 1.0)
    return (_counts(test) @ log_likelihood.T + log_prior).argmax(1)


def _counts(sentences: Sentences) -> Float64[np.ndarray, "rows vocabulary"]:
    rows, size = len(sentences.label), len(VOCABULARY)
    index = np.arange(rows)[:, None] * size + sentences.tokens
    counts = np.bincount(index.ravel(), minlength=rows * size).reshape(rows, size)
    counts[:, english.PADDING] = 0
    return counts.astype(np.float64)
