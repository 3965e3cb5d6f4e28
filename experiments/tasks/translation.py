"""translation: sentences of one language in another, scored by sacreBLEU after decoding.

Training rows hold several pairs side by side, each in a segment of its own. Models are chosen by
the probability of validation references; the test split is decoded.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int

from experiments import translators
from experiments.options import Option, UserError
from experiments.tasks import pairs
from experiments.tasks.base import Baseline, Batch, Items, Metric, Task
from experiments.tasks.bleu import counts
from experiments.tasks.packing import Encoded, Epochs, Plan
from experiments.tasks.pairs import Neighbours, Pairs, Reading
from experiments.tasks.subwords import END, START, Subwords
from experiments.tasks.synthetic import fingerprint, in_batches, stream
from experiments.translating import Search, translate

GROUPS = ("a train source within one word", "no train source within one word")
_OPEN_ROWS = 64


class Translation(Task):
    """BLEU of the decoded test split; distance is the length of the source in words."""

    name = "translation"
    model_options = types.MappingProxyType(dict(translators.OPTIONS))
    options = types.MappingProxyType(
        {
            "data": Option(
                "",
                "file of tab-separated lines, folder of such or of parallel files, or a set of "
                f"TFDS by name; empty: $ATTN_JAX_DATA/{pairs.TATOEBA}",
            ),
            "source": Option("de", "language translated from"),
            "target": Option("en", "language translated into"),
            "columns": Option(("en", "de"), "languages of tab-separated columns, '' is ignored"),
            "tokenizer": Option("", "file, folder or name of a tokeniser; empty: train one"),
            "vocabulary": Option(4096, "subwords of source and target together, where trained"),
            "concat": Option(1, "so many pairs of one split joined are an item", 1),
            "row": Option(64, "positions of a training row on each side; longer pairs are dropped"),
            "batch_size": Option(48, "rows in a training batch", 1),
            "beam": Option(4, "hypotheses kept when the test split is decoded; 1 is greedy", 1),
            "alpha": Option(0.6, "exponent of the length penalty (Wu et al. 2016)"),
            "extra": Option(50, "most tokens of a translation beyond those of its source", 1),
        }
    )
    metric = Metric("BLEU", "", higher_is_better=True, margin=0.5, statistic="bleu")
    selects = Metric("validation nats per token", "", higher_is_better=False, margin=0.02)

    def __init__(self, options: Any):
        self.row, self.batch_size = options.row, options.batch_size
        self.search = Search(options.beam, options.alpha, options.extra)
        reading = Reading(options.source, options.target, tuple(options.columns))
        self._corpus = _corpus(
            options.data,
            reading,
            options.tokenizer,
            0 if options.tokenizer else options.vocabulary,
            options.concat,
            options.row,
        )

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """Pairs of sentences, always."""
        return True

    @property
    def subwords(self) -> Subwords:
        """Text to ids and back."""
        return self._corpus.subwords

    @property
    def artefacts(self) -> Mapping[str, str]:
        """The tokeniser and what the data say of the model: weights mean nothing without."""
        facts = json.dumps(self._facts_of_model) + "\n"
        return {"tokenizer.json": self.subwords.to_json(), "translator.json": facts}

    @property
    def _facts_of_model(self) -> Mapping[str, Any]:
        return {"ratio": self._corpus.ratio, "max_length": self.row + self.search.extra}

    def sentences(self, split: str) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """The distinct sources of "validation" or "test", and all translations of each."""
        items = self._corpus.items[split]
        return items.source, items.references

    def train(self, seed: int) -> grain.IterDataset:
        """All training pairs in an order of the seed, then all in another, without end."""
        names = ("translation", "train", seed)
        batches = Epochs(self._corpus.train, self._corpus.plan, self.batch_size, names)
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return grain.MapDataset.source(batches).to_iter_dataset(in_this_thread)

    def evaluation(self, split: str) -> Sequence[Batch]:
        """Packed rows of a split, with all its references."""
        sides = self._corpus.sides[split]
        plan = Plan.of(_lengths(sides), (self.row, self.row), _OPEN_ROWS)
        return in_batches(plan.fill(sides, np.arange(plan.rows)), self.batch_size)

    def items(self, split: str) -> Items:
        """One item a distinct source; a connected group of sentences is a cluster."""
        items = self._corpus.items[split]
        words = np.array([len(text.split()) for text in items.source], float)
        return Items(
            cluster=items.group,
            distance=words,
            group=self._corpus.far[split].astype(int),
            groups=GROUPS,
            distance_edges=(1.0, 5.0, 8.0, 12.0, 20.0, np.inf),
            distance_name="words of the source",
        )

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A translator of either kind."""
        return translators.build(self.subwords.size, rule, model, **self._facts_of_model, rngs=rngs)

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """Cross-entropy of target tokens."""
        nats = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["target"])
        if label_smoothing:
            uniform = jax.nn.logsumexp(outputs, -1) - outputs.mean(-1)
            nats = (1 - label_smoothing) * nats + label_smoothing * uniform
        return (nats * batch["weight"]).sum() / jnp.maximum(batch["weight"].sum(), 1)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """Nats of every target token, told those before it."""
        nats = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["target"])
        return nats.ravel(), jnp.asarray(batch["weight"]).ravel()

    def present(self, batch: Batch, path: str) -> Bool[np.ndarray, "B T"]:
        """What a pair fills of a packed row, on the side that looks."""
        return np.asarray(batch[f"{translators.sides(path)[0]}_segment"]) > 0

    def key_tokens(self, batch: Batch, path: str) -> Int[np.ndarray, "B S"]:
        """Of the side that is seen."""
        field = {"source": "source", "target": "target_in"}[translators.sides(path)[1]]
        return np.asarray(batch[field])

    def decoded_scores(self, model: Any, split: str) -> Float64[np.ndarray, "items 10"]:
        """BLEU's counts of the decoded sources of a split."""
        items = self._corpus.items[split]
        found = translate(model, self.subwords, items.source, self.search)
        return counts([one.text for one in found], items.references)

    def baselines(self) -> Sequence[Baseline]:
        """The source as its own translation: names and numbers alone agree."""
        items = self._corpus.items["test"]
        return [Baseline("the source itself", counts(items.source, items.references))]

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        return self._corpus.facts


@dataclasses.dataclass(frozen=True)
class Sources:
    """The distinct sources of a split, with all their translations.

    Attributes:
      source: in the order of their first appearance.
      references: of each.
      group: the connected group of each.

    """

    source: Sequence[str]
    references: Sequence[Sequence[str]]
    group: Int[np.ndarray, " items"]

    @classmethod
    def of(cls, split: Pairs) -> "Sources":
        """One entry a source."""
        references: dict[str, list[str]] = {}
        group: dict[str, int] = {}
        for source, target, one in zip(split.source, split.target, split.group, strict=True):
            references.setdefault(source, []).append(target)
            group.setdefault(source, int(one))
        return cls(list(references), list(references.values()), np.array(list(group.values())))

    def joined(self, count: int) -> "Sources":
        """Runs of `count` sources; reference k joins the k-th of each, or its last."""
        runs = [range(i, i + count) for i in range(0, len(self.source) - count + 1, count)]
        references = [
            [
                " ".join(self.references[i][min(k, len(self.references[i]) - 1)] for i in run)
                for k in range(max(len(self.references[i]) for i in run))
            ]
            for run in runs
        ]
        source = [" ".join(self.source[i] for i in run) for run in runs]
        return Sources(source, references, self.group[[run[0] for run in runs]])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything of a translation set that neither a seed nor an arm changes."""

    subwords: Subwords
    plan: Plan
    sides: Mapping[str, Mapping[str, Encoded]]
    items: Mapping[str, Sources]
    far: Mapping[str, np.ndarray]
    ratio: float
    facts: Mapping[str, Any]

    @property
    def train(self) -> Mapping[str, Encoded]:
        """The training pairs."""
        return self.sides["train"]


@functools.lru_cache(maxsize=2)
def _corpus(
    data: str, reading: Reading, tokenizer: str, vocabulary: int, concat: int, row: int
) -> Corpus:
    """Reads, splits, encodes and packs, once for all programs of a process.

    Raises:
      UserError: see `pairs.load` and `Subwords`.

    """
    whole = pairs.load(data, reading)
    splits = {name: _without_empty(one) for name, one in whole.items()}
    train = splits["train"]
    empty = {name: len(whole[name]) - len(splits[name]) for name in splits}
    if tokenizer:
        subwords = Subwords.named(tokenizer)
    else:
        texts = [*train.source, *train.target]
        subwords = Subwords.trained(texts, vocabulary, "the training text")
    near = Neighbours(train.source)
    sources = {name: Sources.of(splits[name]) for name in ("validation", "test")}
    items = {name: one.joined(concat) for name, one in sources.items()}
    far = {name: _far(near, one, concat) for name, one in sources.items()}
    sides = {
        name: encode(_concatenated(one, concat), subwords, name == "train")
        for name, one in splits.items()
    }
    plan = Plan.of(_lengths(sides["train"]), (row, row), _OPEN_ROWS)
    if not plan.rows:
        raise UserError(f"task.row={row} holds no training pair: make it longer")
    length = {side: sides["train"][side].length for side in ("source", "target")}
    ratio = float(np.median(length["target"] / length["source"]))
    dropped = {
        f"{name} pairs of more than {row} tokens on a side": int(
            (_lengths(sides[name]) > row).any(1).sum()
        )
        for name in ("train", "validation")
    } | {f"{name} pairs with an empty side": count for name, count in empty.items() if count}
    fields = ({**one["source"].fields, **one["target"].fields} for one in sides.values())
    facts = {
        "data_sha256": fingerprint(*fields),
        "padding": plan.padding(sides["train"]),
        "dropped": dropped,
        "pairs": {name: len(one) for name, one in splits.items()},
        "test_sources": len(items["test"].source),
        "test_sources_without_neighbour": int(far["test"].sum()),
        "length_ratio": ratio,
        "vocabulary": subwords.size,
        "rows_per_epoch": plan.rows,
    }
    return Corpus(subwords, plan, sides, items, far, ratio, facts)


def _without_empty(split: Pairs) -> Pairs:
    """The pairs of which both sides have text."""
    full = [bool(s.strip() and t.strip()) for s, t in zip(split.source, split.target, strict=True)]
    return split if all(full) else split.chosen(np.flatnonzero(full))


def _far(near: Neighbours, sources: Sources, count: int) -> np.ndarray:
    """Whether no part of an item has a training source within one word."""
    alone = np.array([source not in near for source in sources.source])
    whole = len(alone) // count * count
    return np.asarray(alone[:whole].reshape(-1, count).all(1))


def _concatenated(split: Pairs, count: int) -> Pairs:
    """Runs of pairs joined, in an order that mixes lengths and is always the same."""
    if count == 1:
        return split
    order = stream("translation", "concat").permutation(len(split))
    runs = order[: len(order) // count * count].reshape(-1, count)
    source, target = (
        [" ".join(side[i] for i in run) for run in runs.tolist()]
        for side in (split.source, split.target)
    )
    return Pairs(source, target, split.group[runs[:, 0]])


def encode(split: Pairs, subwords: Subwords, shuffle: bool = False) -> Mapping[str, Encoded]:
    """Ids of both sides; the source ends with END, the target too, and its input begins with START.

    Args:
      split: the pairs.
      subwords: text to ids.
      shuffle: mix lengths, which files are often sorted by: packing fills rows better.

    """
    if shuffle:
        split = split.chosen(stream("translation", "order").permutation(len(split)))
    source, target = (subwords.encode(side) for side in (split.source, split.target))
    ends = [np.array([END], np.int32)]
    begins = [np.array([START], np.int32)]
    length = {
        "source": np.array([len(one) + 1 for one in source]),
        "target": np.array([len(one) + 1 for one in target]),
    }
    return {
        "source": Encoded(
            {"source": np.concatenate([x for one in source for x in (one, *ends)])},
            length["source"],
        ),
        "target": Encoded(
            {
                "target_in": np.concatenate([x for one in target for x in (*begins, one)]),
                "target": np.concatenate([x for one in target for x in (one, *ends)]),
            },
            length["target"],
        ),
    }


def _lengths(sides: Mapping[str, Encoded]) -> Int[np.ndarray, "pairs 2"]:
    return np.stack([one.length for one in sides.values()], 1)
