"""text: the next byte of real English, the documentation that comes with every Python.

A model sees windows of a document and predicts every byte from those before it, or every subword;
the score is in bits per byte either way. Rules of distance see the neighbourhood; content can copy
what followed the last time the same bytes stood here. So the distance of a token is the number of
bytes since the four before it last occurred.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int

from experiments.models import TokenClassifier, cross_entropy, target_log_probability
from experiments.options import Option, UserError
from experiments.tasks.base import Baseline, Batch, Items, Metric, Reading, Task
from experiments.tasks.corpus import Bytes, Corpus, read_texts
from experiments.tasks.ngrams import WittenBell
from experiments.tasks.subwords import START, Subwords
from experiments.tasks.synthetic import endless, in_batches

BYTES = 256
"""Byte values; the next id is the input before the first byte of a document."""
CONTEXT = 4
ORDERS = {1: "unigram", 2: "bigram", 3: "trigram", 5: "5-gram"}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A document as a model sees it.

    Attributes:
      ids: of its bytes or subwords.
      size: bytes of each.

    """

    ids: Int[np.ndarray, " tokens"]
    size: Int[np.ndarray, " tokens"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def starts(self) -> Int[np.ndarray, " tokens"]:
        """The index of each token's first byte."""
        return np.cumsum(self.size) - self.size


class Text(Task):
    """Bits per byte; distance is in bytes since the preceding four last occurred."""

    name = "text"
    causal = True
    options = types.MappingProxyType(
        {
            "path": Option(
                "",
                "folder of *.txt, or a set of TFDS by name such as tiny_shakespeare; '' is the "
                "documentation that Python ships",
            ),
            "tokenizer": Option("", "file, folder or name of a tokeniser over bytes; '': none"),
            "vocabulary": Option(0, "subwords to train on the training text; 0: bytes", 0),
            "row": Option(128, "tokens in a window; what is scored has half of it before it"),
            "batch_size": Option(16, "windows in a training batch", 1),
            "validation_windows": Option(100, "windows that select; 0 is all", 0),
        }
    )
    metric = Metric("bits per byte", "", higher_is_better=False, margin=0.02)

    def __init__(self, options: Any):
        self.row, self.batch_size = options.row, options.batch_size
        if self.row < 2 or self.row % 2:
            raise UserError(f"task.row must be even and at least 2, got {self.row}")
        self.corpus = Corpus(read_texts(options.path))
        texts = (document.tobytes().decode() for document in self.corpus.documents["train"])
        self.subwords = Subwords.asked_for(options.tokenizer, options.vocabulary, texts)
        self._documents = {
            split: _tokens(documents, self.subwords)
            for split, documents in self.corpus.documents.items()
        }
        self._windows = {"validation": options.validation_windows, "test": 0}
        self._long = [d for d in self._documents["train"] if len(d) >= self.row]
        for split, documents in {**self._documents, "train": self._long}.items():
            if not documents:
                raise UserError(
                    f"the {split} split has no document of {self.row} tokens: give task.path more "
                    "text or make task.row shorter"
                )
        self._first = np.cumsum([0] + [len(d) - self.row + 1 for d in self._long])

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """A folder or set of texts in place of Python's documentation."""
        return bool(options.path)

    @property
    def artefacts(self) -> Mapping[str, str]:
        """The tokeniser, if there is one."""
        return {} if self.subwords is None else {"tokenizer.json": self.subwords.to_json()}

    def train(self, seed: int) -> grain.IterDataset:
        """Windows at places drawn anew for every batch."""
        return endless(self._batch, "text", "train", seed)

    @property
    def _start(self) -> int:
        """The input before the first token of a document."""
        return BYTES if self.subwords is None else START

    @functools.cached_property
    def _bytes_per_token(self) -> float:
        documents = self._documents["train"]
        return sum(int(d.size.sum()) for d in documents) / sum(map(len, documents))

    def _batch(self, generator: np.random.Generator) -> Batch:
        place = generator.integers(0, self._first[-1], self.batch_size)
        which = np.searchsorted(self._first, place, side="right") - 1
        starts = place - self._first[which]
        rows = [self._window(self._long[i], s) for i, s in zip(which, starts, strict=True)]
        return _stack(rows)

    def _window(self, document: Tokens, start: int) -> Batch:
        """Targets from `start`, and as inputs the token before each; padded behind the end."""
        target = document.ids[start : start + self.row]
        before = document.ids[start - 1] if start else self._start
        length = len(target)
        fields = {name: np.zeros(self.row, np.int32) for name in ("token", "target")}
        fields["token"][:length] = np.concatenate([[before], target[:-1]])
        fields["target"][:length] = target
        weight = np.zeros(self.row, np.float32)
        weight[:length] = 1
        return {**fields, "weight": weight}

    def _scored_window(self, document: Tokens, start: int) -> Batch:
        """A window of which the tokens that no window before scored weigh their bytes."""
        window = self._window(document, start)
        size = document.size[start : start + self.row]
        window["weight"][: len(size)] = size
        window["weight"][: self._scored_from(start)] = 0
        return window

    def evaluation(self, split: str) -> Sequence[Batch]:
        """Overlapping windows: after a document's first, the second half of each is scored."""
        rows = [
            self._scored_window(self._documents[split][index], start)
            for index, start in self._places(split)
        ]
        return in_batches(_stack(rows), 32)

    def _scored_from(self, start: int) -> int:
        return self.row // 2 if start else 0

    def _places(self, split: str) -> Sequence[tuple[int, int]]:
        """Document and start of every window of a split, evenly thinned if so many are not used."""
        half = self.row // 2
        places = [
            (index, start)
            for index, document in enumerate(self._documents[split])
            for start in range(0, max(len(document) - half, 1), half)
        ]
        most = self._windows[split] or len(places)
        kept = np.linspace(0, len(places) - 1, min(most, len(places))).astype(int)
        return [places[i] for i in kept]

    def _scored(self, split: str, values: Sequence[np.ndarray]) -> np.ndarray:
        """Of values for all tokens of all documents, those that are scored, in batch order."""
        return np.concatenate(
            [
                values[index][start + self._scored_from(start) : start + self.row]
                for index, start in self._places(split)
            ]
        )

    def reading(self, text: str | None) -> Reading:
        """A word is what the model has read when it predicts the next: the token before."""
        if text is None:
            document = self._documents["test"][0]
        else:
            (document,) = _tokens([np.frombuffer(text.encode(), np.uint8)], self.subwords)
        if text is not None and not 1 < len(document) <= self.row:
            raise UserError(
                f"--text must have 2 to {self.row} tokens, the window of this model, got "
                f"{len(document)}"
            )
        length = min(len(document), self.row)
        window = {name: x[None, :length] for name, x in self._window(document, 0).items()}
        words = ["start", *self._words(document.ids[: length - 1])]
        return Reading(window, words, words)

    def present(self, batch: Batch, path: str) -> Bool[np.ndarray, "B T"]:
        """Up to the last token that is scored: what is behind it lies behind the document."""
        del path
        scored = np.asarray(batch["weight"]) > 0
        return np.flip(np.logical_or.accumulate(np.flip(scored, 1), 1), 1)

    def _words(self, ids: Int[np.ndarray, " tokens"]) -> list[str]:
        if self.subwords is not None:
            return self.subwords.pieces(ids.tolist())
        return ["\u2423" if i == 32 else repr(bytes([i]))[2:-1] for i in ids]

    def items(self, split: str) -> Items:
        """One item a token; a component of the corpus is a cluster."""
        documents, component = self._documents[split], self.corpus.component[split]
        cluster = [np.full(len(d), c) for d, c in zip(documents, component, strict=True)]
        since = [
            since_last(document)[tokens.starts]
            for document, tokens in zip(self.corpus.documents[split], documents, strict=True)
        ]
        distance = self._scored(split, since)
        reach = round(self.row * self._bytes_per_token)
        return Items(
            cluster=self._scored(split, cluster),
            distance=distance,
            group=np.zeros(len(distance), int),
            groups=("all",),
            distance_edges=sorted({1.0, 8.0, 32.0, reach / 2, reach, 8.0 * reach, np.inf}),
            distance_name=f"bytes since the preceding {CONTEXT} bytes last occurred",
        )

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A causal model of tokens."""
        classes = BYTES if self.subwords is None else self.subwords.size
        return TokenClassifier(
            vocabularies={"token": max(classes, self._start + 1)},
            num_classes=classes,
            rule=rule,
            options=model,
            causal=True,
            max_length=self.row,
            rngs=rngs,
        )

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """Cross-entropy in nats per token."""
        return cross_entropy(outputs, batch["target"], batch["weight"], label_smoothing)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """Bits per byte of every token, which weighs its bytes."""
        likely = target_log_probability(jax.nn.log_softmax(outputs), batch["target"])
        size = jnp.asarray(batch["weight"]).ravel()
        return -likely.ravel() / jnp.log(2.0) / jnp.maximum(size, 1), size

    def baselines(self) -> Sequence[Baseline]:
        """N-grams of bytes with all of a document before them."""
        train, test = self.corpus.documents["train"], self.corpus.documents["test"]
        found = []
        for order, name in ORDERS.items():
            model = WittenBell(train, order)
            bits = [
                np.add.reduceat(-np.log2(model.probability(document)), tokens.starts) / tokens.size
                for document, tokens in zip(test, self._documents["test"], strict=True)
            ]
            found.append(Baseline(name, self._scored("test", bits)))
        return found

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report; figures of two versions of Python are of two data sets."""
        short = sum(int(d.size.sum()) for d in self._documents["train"] if len(d) < self.row)
        return {
            "data_sha256": self.corpus.sha256,
            "padding": 0.0,
            "dropped": {**self.corpus.dropped, "bytes of documents below a window": short},
            "bytes": {s: sum(map(len, d)) for s, d in self.corpus.documents.items()},
            "bytes_per_token": self._bytes_per_token,
            "python": ".".join(map(str, sys.version_info[:3])),
        }


def _tokens(documents: Sequence[Bytes], subwords: Subwords | None) -> Sequence[Tokens]:
    """Documents as tokens.

    Raises:
      UserError: a tokeniser does not give every byte back.

    """
    if subwords is None:
        return [Tokens(d.astype(np.int32), np.ones(len(d), np.int32)) for d in documents]
    sizes = subwords.byte_sizes()
    ids = subwords.encode([document.tobytes().decode() for document in documents])
    tokens = [Tokens(one, sizes[one]) for one in ids]
    for document, one in zip(documents, tokens, strict=True):
        if one.size.sum() != len(document) or not one.size.all():
            raise UserError(
                "bits per byte need a tokeniser that splits text into its bytes, got one whose "
                f"tokens have {one.size.sum()} bytes for a text of {len(document)}: leave "
                "task.tokenizer empty and set task.vocabulary to train one"
            )
    return tokens


def since_last(document: Bytes) -> Float64[np.ndarray, " bytes"]:
    """Bytes since the four before each last occurred in the document; NaN where they never did."""
    last: dict[bytes, int] = {}
    text = document.tobytes()
    distance = np.full(len(text), np.nan)
    for place in range(CONTEXT, len(text)):
        before = text[place - CONTEXT : place]
        if before in last:
            distance[place] = place - last[before]
        last[before] = place
    return distance


def _stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
