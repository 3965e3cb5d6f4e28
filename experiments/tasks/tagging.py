"""tagging: the part of speech (or the dependency relation) of every word of English web text.

Most words have one tag whatever stands beside them; the rest need a neighbour, and relations need
a word further away. Every arm sees the same features: the lowercased word and a bag of prefixes,
suffixes and its shape, all known from the training sentences alone.
"""

import dataclasses
import functools
import hashlib
import re
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.models import TokenClassifier, cross_entropy
from experiments.options import Option, UserError
from experiments.tasks import conllu
from experiments.tasks.base import Baseline, Batch, Items, Metric, Task
from experiments.tasks.conllu import Sentence
from experiments.tasks.packing import pack
from experiments.tasks.synthetic import BATCHES, fingerprint, in_batches, stream

SELECTS = 20
"""One sentence of so many of the official training data selects models and does not train."""

EVALUATION_ROWS = 32
GROUPS = ("sentence not in train", "copy of a train sentence")


class Tagging(Task):
    """The tag of every word; distance is from a word to the word it depends on."""

    name = "tagging"
    options = types.MappingProxyType(
        {
            "path": Option(
                "",
                "folder of *-train.conllu and *-test.conllu, or their .gz; empty: "
                "$ATTN_JAX_DATA/ud_english_ewt or, where that is unset, a download by TFDS",
            ),
            "target": Option("upos", "what is predicted: upos or deprel"),
            "row": Option(96, "words in a row of packed sentences; longer ones do not train"),
            "batch_size": Option(12, "rows in a training batch"),
            "word_count": Option(2, "rarer words of train are unknown words"),
            "affix_count": Option(5, "affixes and shapes of fewer distinct words are left out"),
        }
    )

    def __init__(self, options: Any):
        self.target, self.row, self.batch_size = options.target, options.row, options.batch_size
        if self.target not in ("upos", "deprel"):
            raise UserError(f"task.target must be upos or deprel, got {self.target!r}")
        if self.row < 1 or self.batch_size < 1:
            raise UserError(
                f"task.row and task.batch_size must be 1 or more, got {self.row} and "
                f"{self.batch_size}"
            )
        least = options.word_count, options.affix_count
        self._corpus = _corpus(options.path, self.target, self.row, *least)
        chance = 1 / len(self._corpus.classes)
        self.metric = Metric("accuracy", "%", higher_is_better=True, margin=0.005, chance=chance)

    def train(self, seed: int) -> grain.IterDataset:
        """All training sentences in an order of the seed, then all in another, without end."""
        batches = Epochs(self._corpus.train, self._corpus.plan, self.batch_size, seed)
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return grain.MapDataset.source(batches).to_iter_dataset(in_this_thread)

    def evaluation(self, split: str) -> Sequence[Batch]:
        """Packed rows of a split."""
        return self._corpus.evaluation[split].batches

    def items(self, split: str) -> Items:
        """One item a word, one cluster a sentence; a root has no distance."""
        evaluated = self._corpus.evaluation[split]
        distance = evaluated.distance.astype(np.float64)
        return Items(
            cluster=evaluated.sentence,
            distance=np.where(distance > 0, distance, np.nan),
            group=evaluated.copied.astype(int),
            groups=GROUPS,
            distance_edges=(1, 2, 3, 5, 9, 17, max(33, int(distance.max()) + 1)),
            distance_name="words from a word to its head",
        )

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A bidirectional classifier of every position."""
        return TokenClassifier(
            vocabularies=self._corpus.vocabulary.sizes,
            num_classes=len(self._corpus.classes),
            rule=rule,
            options=model,
            max_length=self.row,
            rngs=rngs,
        )

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """Cross-entropy over words."""
        return cross_entropy(outputs, batch["target"], batch["weight"], label_smoothing)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """1 where the most likely tag is the right one."""
        right = jnp.argmax(outputs, -1) == batch["target"]
        return right.astype(jnp.float32).ravel(), jnp.asarray(batch["weight"]).ravel()

    def baselines(self) -> Sequence[Baseline]:
        """The commonest tag of each word in train; of all words, for words not in train."""
        scores = self._corpus.most_frequent_tag
        return [Baseline("most frequent tag of the word", scores.astype(np.float64))]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        return self._corpus.facts


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of words and affixes; 0 is an unknown word and, in a bag of affixes, nothing.

    Attributes:
      words: lowercased.
      affixes: what `affixes` names.

    """

    words: Mapping[str, int]
    affixes: Mapping[str, int]

    @classmethod
    def of(
        cls, sentences: Iterable[Sentence], word_count: int, affix_count: int
    ) -> "Vocabulary":
        """What occurs often enough: words by tokens, affixes by distinct written words."""
        counts = Counter(word for sentence in sentences for word in sentence.words)
        words: Counter[str] = Counter()
        for word, count in counts.items():
            words[word.lower()] += count
        parts = Counter(part for word in counts for part in affixes(word))
        return cls(_ids(words, word_count), _ids(parts, affix_count))

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of each field of ids of a batch, 0 included."""
        return {"word": len(self.words) + 1, "affixes": len(self.affixes) + 1}

    def encode(self, words: Iterable[str]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, "N k"]]:
        """Ids of words and bags of ids of their affixes."""
        affix_ids = functools.cache(
            lambda word: [self.affixes.get(part, 0) for part in affixes(word)]
        )
        pairs = [(self.words.get(word.lower(), 0), affix_ids(word)) for word in words]
        ids, bags = zip(*pairs, strict=True)
        return np.array(ids, np.int32), np.array(bags, np.int32)


def _ids(counts: Counter[str], least: int) -> Mapping[str, int]:
    kept = sorted(name for name, count in counts.items() if count >= least)
    return {name: index for index, name in enumerate(kept, 1)}


def affixes(word: str) -> list[str]:
    """Three prefixes, five suffixes and two shapes of a word, each by a name of its kind."""
    lower = word.lower()
    prefixes = [f"{lower[:n]}-" for n in (1, 2, 3)]
    suffixes = [f"-{lower[-n:]}" for n in (1, 2, 3, 4, 5)]
    outline = re.sub(r"[^\W\d_]", "x", re.sub(r"[A-Z]", "X", re.sub(r"\d", "9", word)))
    return [*prefixes, *suffixes, f"={outline}", "~" + re.sub(r"(.)\1+", r"\1+", outline)]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The words of sentences end to end, as ids.

    Attributes:
      fields: "word", "affixes" and "target", by word.
      start: the first word of each sentence.
      length: words of each sentence.

    """

    fields: Mapping[str, np.ndarray]
    start: Int[np.ndarray, " sentences"]
    length: Int[np.ndarray, " sentences"]

    @classmethod
    def of(
        cls, sentences: Sequence[Sentence], vocabulary: Vocabulary, tags: Sequence[Sequence[int]]
    ) -> "Encoded":
        """Sentences with the class of each of their words."""
        words, bags = vocabulary.encode(word for one in sentences for word in one.words)
        length = np.array([len(one.words) for one in sentences])
        target = np.array([tag for one in tags for tag in one], np.int32)
        fields = {"word": words, "affixes": bags, "target": target}
        return cls(fields, np.cumsum(length) - length, length)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Places for sentences in rows.

    Attributes:
      sentence: of each place.
      row: of each place.
      start: the first position of each place.
      rows: how many rows there are.
      positions: in a row.

    """

    sentence: Int[np.ndarray, " places"]
    row: Int[np.ndarray, " places"]
    start: Int[np.ndarray, " places"]
    rows: int
    positions: int

    @classmethod
    def of(cls, length: Int[np.ndarray, " sentences"], positions: int) -> "Plan":
        """Every sentence that fits, by first fit, the longest first; places in order of rows."""
        fits = np.flatnonzero(length <= positions)
        which, row, start, rows = pack(length[fits], positions)
        order = np.lexsort((start, row))
        return cls(fits[which][order], row[order], start[order], rows, positions)

    def shuffled(self, length: Int[np.ndarray, " sentences"], generator: Any) -> "Plan":
        """Another order of rows, and sentences of one length exchanged among their places.

        The lengths in a row stay, so every epoch has the same number of rows: a batch is known by
        its index, and the packing, which takes a second, is done once.
        """
        sentence = self.sentence.copy()
        by_length = np.argsort(length[sentence], kind="stable")
        mixed = np.lexsort((generator.random(len(sentence)), length[sentence]))
        sentence[by_length] = sentence[mixed]
        row = generator.permutation(self.rows)[self.row]
        order = np.lexsort((self.start, row))
        return Plan(sentence[order], row[order], self.start[order], self.rows, self.positions)

    def fill(self, encoded: Encoded, rows: Int[np.ndarray, " B"]) -> Batch:
        """The arrays of some rows, in ascending order: fields, segments, positions, weights."""
        first, last = np.searchsorted(self.row, rows), np.searchsorted(self.row, rows, "right")
        places = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        line = np.searchsorted(rows, self.row[places])
        length = encoded.length[self.sentence[places]]
        of_word = np.repeat(np.arange(len(places)), length)
        offset = np.arange(len(of_word)) - np.repeat(np.cumsum(length) - length, length)
        where = line[of_word], self.start[places][of_word] + offset
        source = encoded.start[self.sentence[places]][of_word] + offset
        shape = len(rows), self.positions
        batch = {
            name: np.zeros((*shape, *values.shape[1:]), np.int32)
            for name, values in encoded.fields.items()
        }
        for name, values in encoded.fields.items():
            batch[name][where] = values[source]
        added = {"segment": of_word + 1, "position": offset}
        for name, values in added.items():
            batch[name] = np.zeros(shape, np.int32)
            batch[name][where] = values
        batch["weight"] = (batch["segment"] > 0).astype(np.float32)
        return batch


class Epochs:
    """Training batches by index: rows of one epoch after another, each in its own order."""

    def __init__(self, train: Encoded, plan: Plan, batch_size: int, seed: int):
        self._train, self._plan, self._size, self._seed = train, plan, batch_size, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Batch:
        wanted = int(index) * self._size + np.arange(self._size)
        epochs, rows = np.divmod(wanted, self._plan.rows)
        parts = [
            self._epoch(int(epoch)).fill(self._train, rows[epochs == epoch])
            for epoch in np.unique(epochs)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _shuffled(self, epoch: int) -> Plan:
        generator = stream("tagging", "train", self._seed, epoch)
        return self._plan.shuffled(self._train.length, generator)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A packed split for scores: its batches and, word by word in their order, what is known.

    Attributes:
      batches: of equal shapes.
      sentence: the index of each word's sentence.
      distance: from each word to its head; 0 for roots.
      copied: whether the word's sentence also stands in the official training data.
      order: each word's index in the split, end to end.

    """

    batches: Sequence[Batch]
    sentence: Int[np.ndarray, " words"]
    distance: Int[np.ndarray, " words"]
    copied: np.ndarray
    order: Int[np.ndarray, " words"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything of a treebank that no seed and no arm changes."""

    vocabulary: Vocabulary
    classes: Sequence[str]
    train: Encoded
    plan: Plan
    evaluation: Mapping[str, Evaluated]
    most_frequent_tag: np.ndarray
    facts: Mapping[str, Any]


def selects(sentence: Sentence) -> bool:
    """Whether a training sentence is held out to select models: by its words, so copies agree."""
    return hashlib.sha256(sentence.key.encode()).digest()[0] % SELECTS == 0


@functools.lru_cache(maxsize=2)
def _corpus(path: str, target: str, row: int, word_count: int, affix_count: int) -> Corpus:
    """Reads, splits, encodes and packs once for all programs of a process.

    Raises:
      UserError: see `conllu.load`; or a sentence to be scored does not fit into a row.

    """
    official = conllu.load(path)
    train, validation = split_train(official["train"])
    splits = {"validation": validation, "test": official["test"]}
    _check_lengths(splits, row)
    vocabulary = Vocabulary.of(train, word_count, affix_count)
    classes = sorted({tag for one in train for tag in getattr(one, target)})
    encoded = {
        name: Encoded.of(sentences, vocabulary, _classes(sentences, target, classes))
        for name, sentences in {"train": train, **splits}.items()
    }
    seen = {one.key for one in train}
    return Corpus(
        vocabulary=vocabulary,
        classes=classes,
        train=encoded["train"],
        plan=Plan.of(encoded["train"].length, row),
        evaluation={
            name: _evaluated(sentences, encoded[name], seen, row)
            for name, sentences in splits.items()
        },
        most_frequent_tag=None,
        facts={},
    )
