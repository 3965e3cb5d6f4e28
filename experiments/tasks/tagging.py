"""tagging: the part of speech (or the dependency relation) of every word of English web text.

Most words have one tag whatever stands beside them; the rest need a neighbour, and relations need
a word further away. Every arm sees the same features: the lowercased word, a bag of prefixes,
suffixes and its shape and, if asked for, a bag of its subwords, all known from the training
sentences alone.
"""

import dataclasses
import functools
import hashlib
import re
import types
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64, Int

from experiments.models import TokenClassifier, cross_entropy
from experiments.options import Option, UserError
from experiments.tasks import conllu
from experiments.tasks.base import Baseline, Batch, Items, Metric, Reading, Task
from experiments.tasks.conllu import Sentence
from experiments.tasks.packing import Encoded, Epochs, Plan
from experiments.tasks.synthetic import fingerprint, in_batches
from experiments.tasks.words import SUBWORDS, Features, Vocabulary

SELECTS = 20
"""One sentence of so many of the official training data selects models and does not train."""

EVALUATION_ROWS = 32
SENTENCE = "Tommy can be annoying but he is a good dog"
"""What is read where no text is given; it stands in no treebank."""
GROUPS = ("sentence not in train", "copy of a train sentence")


class Tagging(Task):
    """The tag of every word; distance is from a word to the word it depends on."""

    name = "tagging"
    options = types.MappingProxyType(
        {
            "path": Option(
                "",
                "folder of *-train.conllu and *-test.conllu, or their .gz, or a treebank of TFDS "
                "by name; empty: $ATTN_JAX_DATA/ud_english_ewt or, where that is unset, a download",
            ),
            "target": Option("upos", "what is predicted: upos or deprel"),
            "share": Option(
                1.0, "of the training sentences, by hash: smaller shares are in larger"
            ),
            "row": Option(96, "words in a row; longer sentences neither train nor select"),
            "batch_size": Option(12, "rows in a training batch", 1),
            "word_count": Option(2, "rarer words of train are unknown words", 1),
            "affix_count": Option(5, "affixes and shapes of fewer distinct words are left out", 1),
            "tokenizer": Option("", "file, folder or name of a tokeniser of words; '': none"),
            "vocabulary": Option(0, "subwords to train on the training words; 0: none", 0),
        }
    )

    metric = Metric("accuracy", "%", higher_is_better=True, margin=0.005)

    def __init__(self, options: Any):
        self.target, self.row, self.batch_size = options.target, options.row, options.batch_size
        if self.target not in ("upos", "deprel"):
            raise UserError(f"task.target must be upos or deprel, got {self.target!r}")
        if self.row < 1 or self.batch_size < 1:
            raise UserError(
                f"task.row and task.batch_size must be 1 or more, got {self.row} and "
                f"{self.batch_size}"
            )
        if not 0 < options.share <= 1:
            raise UserError(
                f"task.share must be above 0 and at most 1, the whole, got {options.share}"
            )
        features = Features(
            options.word_count, options.affix_count, options.tokenizer, options.vocabulary
        )
        self._corpus = _corpus(options.path, self.target, options.share, self.row, features)
        self.metric = dataclasses.replace(self.metric, chance=1 / len(self._corpus.classes))

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """A treebank, always."""
        return True

    @property
    def artefacts(self) -> Mapping[str, str]:
        """The tokeniser, if there is one."""
        subwords = self._corpus.vocabulary.subwords
        return {} if subwords is None else {"tokenizer.json": subwords.to_json()}

    def train(self, seed: int) -> grain.IterDataset:
        """All training sentences in an order of the seed, then all in another, without end."""
        names = ("tagging", "train", seed)
        batches = Epochs({"": self._corpus.train}, self._corpus.plan, self.batch_size, names)
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return grain.MapDataset.source(batches).to_iter_dataset(in_this_thread)

    def evaluation(self, split: str) -> Sequence[Batch]:
        """Packed rows of a split."""
        return self._corpus.evaluation[split].batches

    def items(self, split: str) -> Items:
        """One item a word, one cluster a sentence; a root has no distance."""
        evaluated = self._corpus.evaluation[split]
        return Items(
            cluster=evaluated.sentence,
            distance=evaluated.distance,
            group=evaluated.copied,
            groups=GROUPS,
            distance_edges=(1, 2, 3, 5, 9, 17, self.row),
            distance_name="words from a word to its head",
        )

    def reading(self, text: str | None) -> Reading:
        """Words and punctuation marks of a text; by default the lecture's sentence."""
        words = re.findall(r"[\w']+|[^\w\s]", SENTENCE if text is None else text)
        words = words[: self.row] if text is None else words
        if text is not None and not 1 < len(words) <= self.row:
            raise UserError(f"--text must have 2 to {self.row} words, got {len(words)}")
        count = len(words)
        fields = {
            **self._corpus.vocabulary.encode(words),
            "target": np.zeros(count, np.int32),
            "weight": np.zeros(count, np.float32),
            "segment": np.ones(count, np.int32),
            "position": np.arange(count, dtype=np.int32),
        }
        return Reading({name: array[None] for name, array in fields.items()}, words, words)

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
        """The commonest tag of each word in the official training data."""
        return [Baseline("most frequent tag of the word", self._corpus.most_frequent_tag)]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        return self._corpus.facts


def encode(
    sentences: Sequence[Sentence], vocabulary: Vocabulary, target: Int[np.ndarray, " words"]
) -> Encoded:
    """Sentences with the class of each of their words."""
    fields = vocabulary.encode(words_of(sentences))
    length = np.array([len(one.words) for one in sentences])
    return Encoded({**fields, "target": target}, length)


def words_of(sentences: Iterable[Sentence]) -> list[str]:
    """All words in their order."""
    return [word for one in sentences for word in one.words]


def plan_of(encoded: Encoded, positions: int) -> Plan:
    """Places in rows for the sentences that fit."""
    return Plan.of(encoded.length[:, None], (positions,))


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A packed split to be scored: its batches and, word by word in their order, what is known.

    Attributes:
      batches: of equal shapes.
      sentence: the index of each word's sentence.
      distance: from each word to its head, NaN for roots.
      copied: 1 where the word's sentence also stands in the training data, else 0.
      order: the index of each word in the split.

    """

    batches: Sequence[Batch]
    sentence: Int[np.ndarray, " words"]
    distance: Float64[np.ndarray, " words"]
    copied: Int[np.ndarray, " words"]
    order: Int[np.ndarray, " words"]

    @classmethod
    def of(
        cls, sentences: Sequence[Sentence], encoded: Encoded, seen: Set[str], positions: int
    ) -> "Evaluated":
        """The sentences of a split that fit; `seen` holds the keys of training sentences."""
        plan = plan_of(encoded, positions)
        order = plan.tokens(encoded)
        sentence = np.repeat(np.arange(len(sentences)), encoded.length)
        copied = np.array([one.key in seen for one in sentences], int)[sentence]
        distance = np.array([d for one in sentences for d in head_distances(one)])
        batches = in_batches(plan.fill({"": encoded}, np.arange(plan.rows)), EVALUATION_ROWS)
        return cls(batches, sentence[order], distance[order], copied[order], order)


def head_distances(sentence: Sentence) -> list[float]:
    """Words from each word to the word it depends on; NaN for a root."""
    return [abs(head - place) if head else np.nan for place, head in enumerate(sentence.head, 1)]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything of a treebank that neither a seed nor an arm changes."""

    vocabulary: Vocabulary
    classes: Sequence[str]
    train: Encoded
    plan: Plan
    evaluation: Mapping[str, Evaluated]
    most_frequent_tag: Float64[np.ndarray, " words"]
    facts: Mapping[str, Any]


@functools.lru_cache(maxsize=2)
def _corpus(path: str, target: str, share: float, row: int, features: Features) -> Corpus:
    """Reads, splits, encodes and packs, once for all programs of a process.

    Raises:
      UserError: see `conllu.load`; or a test sentence does not fit into a row.

    """
    official = conllu.load(path)
    known = [one for one in official["train"] if selects(one) or within(one, share)]
    splits = split_train(known) | {"test": official["test"]}
    _check(splits, row)
    vocabulary = Vocabulary.of(splits["train"], features)
    classes = sorted({tag for one in splits["train"] for tag in getattr(one, target)})
    encoded = {
        name: encode(sentences, vocabulary, tag_ids(sentences, target, classes))
        for name, sentences in splits.items()
    }
    # The validation split has chosen models, so its sentences are as known as those of train.
    seen = {"validation": splits["train"], "test": known}
    evaluation = {
        name: Evaluated.of(splits[name], encoded[name], {one.key for one in sentences}, row)
        for name, sentences in seen.items()
    }
    plan = plan_of(encoded["train"], row)
    # It has nothing to select, so it counts what selects models as well.
    guessed = most_frequent_tag(known, splits["test"], target)
    return Corpus(
        vocabulary,
        classes,
        encoded["train"],
        plan,
        evaluation,
        guessed[evaluation["test"].order],
        {
            "share_of_train": share,
            "dropped": _dropped(splits, encoded, vocabulary, row),
            **_facts(encoded, plan, evaluation["test"]),
        },
    )


def split_train(sentences: Sequence[Sentence]) -> dict[str, Sequence[Sentence]]:
    """The official training data as "train" and "validation"; copies are on one side."""
    return {
        "train": [one for one in sentences if not selects(one)],
        "validation": [one for one in sentences if selects(one)],
    }


def selects(sentence: Sentence) -> bool:
    """Whether a training sentence selects models: by a hash of its words."""
    return _hash(sentence, 0) % SELECTS == 0


def within(sentence: Sentence, share: float) -> bool:
    """Whether a training sentence is in a share: by another part of the same hash."""
    return _hash(sentence, 1) < share * 2**64


def _hash(sentence: Sentence, part: int) -> int:
    digest = hashlib.sha256(sentence.key.encode()).digest()
    return int.from_bytes(digest[8 * part : 8 * part + 8], "big")


def _check(splits: Mapping[str, Sequence[Sentence]], row: int) -> None:
    for name, sentences in splits.items():
        if not sentences:
            raise UserError(
                f"the treebank must hold sentences for {name}, got none (validation is one of "
                f"{SELECTS} sentences of *-train.conllu, by hash)"
            )
    longest = max(len(one.words) for one in splits["test"])
    if row < longest:
        raise UserError(f"task.row must hold the longest test sentence, {longest} words, got {row}")


def tag_ids(
    sentences: Sequence[Sentence], target: str, classes: Sequence[str]
) -> Int[np.ndarray, " words"]:
    """The class of each word; -1, which no model predicts, where train has no such tag."""
    ids = {name: index for index, name in enumerate(classes)}
    return np.array([ids.get(t, -1) for one in sentences for t in getattr(one, target)], np.int32)


def most_frequent_tag(
    train: Sequence[Sentence], test: Sequence[Sentence], target: str
) -> Float64[np.ndarray, " words"]:
    """1 where a word, as written, has its commonest tag of train, other words the commonest of all.

    Of several equally common tags, the one met first.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in train:
        for word, tag in zip(one.words, getattr(one, target), strict=True):
            counts[word][tag] += 1
    commonest = {word: count.most_common(1)[0][0] for word, count in counts.items()}
    overall = sum(counts.values(), Counter()).most_common(1)[0][0]
    return np.array(
        [
            float(commonest.get(word, overall) == tag)
            for one in test
            for word, tag in zip(one.words, getattr(one, target), strict=True)
        ]
    )


def _dropped(
    splits: Mapping[str, Sequence[Sentence]],
    encoded: Mapping[str, Encoded],
    vocabulary: Vocabulary,
    row: int,
) -> Mapping[str, int]:
    """What is left out, by reason."""
    long = {
        f"{name} sentences of more than {row} words": int((encoded[name].length > row).sum())
        for name in ("train", "validation")
    }
    cut = sum(vocabulary.cut(words_of(side)) for side in splits.values())
    return {
        **long,
        "empty nodes": sum(one.empty_nodes for side in splits.values() for one in side),
        **({f"words seen by their first {SUBWORDS} subwords": cut} if cut else {}),
    }


def _facts(encoded: Mapping[str, Encoded], plan: Plan, test: Evaluated) -> Mapping[str, Any]:
    """What the report says of the data."""
    return {
        "data_sha256": fingerprint(*(encoded[name].fields for name in sorted(encoded))),
        "padding": plan.padding({"": encoded["train"]}),
        "words": {name: int(one.length.sum()) for name, one in encoded.items()},
        "sentences": {name: len(one.length) for name, one in encoded.items()},
        "test_sentences_copied_from_train": len(np.unique(test.sentence[test.copied == 1])),
        "unknown_words_in_test": float((encoded["test"].fields["word"] == 0).mean()),
        "rows_per_epoch": plan.rows,
    }
