"""recall: the database analogy. Slots of a key and a value, then queries by key.

A row holds `slots` slots, then `queries` queries, with fillers scattered among them. With
`binding=joint` a slot is one position, the sum of a key's and a value's embedding; with
`binding=adjacent` it is two, the key and then the value, so that one layer has to bind them
before another looks them up. A query is a key's embedding and a mark; the answer, the value
stored with that key, is never fed back. Rows have one length: nothing is padding.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiments.models import TokenClassifier, cross_entropy
from experiments.options import Option, UserError
from experiments.tasks.base import Baseline, Batch, Items, Metric, Reading, Task
from experiments.tasks.synthetic import endless, fingerprint, in_batches, stream

NOTHING = 0
BINDINGS = ("joint", "adjacent")
_FIELDS = {
    **dict.fromkeys(("key", "value", "mark", "target"), np.int32),
    **dict.fromkeys(("weight", "distance"), np.float32),
}


class Recall(Task):
    """Look a value up by its key among fillers; distance is query position - slot position."""

    name = "recall"
    options = types.MappingProxyType(
        {
            "binding": Option("joint", "a slot is one position (joint) or two (adjacent)"),
            "slots": Option(8, "slots in a row", 1),
            "queries": Option(8, "queries in a row, at most as many as slots", 1),
            "num_keys": Option(64, "number of different keys", 1),
            "num_values": Option(64, "number of different values", 1),
            "fillers": Option(24, "positions without meaning in a row", 0),
            "batch_size": Option(32, "rows in a training batch", 1),
            "test_items": Option(4000, "rows of the test split", 1),
            "validation_items": Option(1000, "rows of the validation split", 1),
        }
    )

    metric = Metric("accuracy", "%", higher_is_better=True, margin=0.005)

    def __init__(self, options: Any):
        """Reads the options; raises UserError where they do not fit together."""
        self.binding, self.slots, self.queries = options.binding, options.slots, options.queries
        self.keys, self.values, self.fillers = options.num_keys, options.num_values, options.fillers
        self.batch_size = options.batch_size
        self.rows = {"test": options.test_items, "validation": options.validation_items}
        if self.binding not in BINDINGS:
            raise UserError(f"task.binding must be joint or adjacent, got {self.binding!r}")
        if not 1 <= self.queries <= self.slots <= min(self.keys, self.values):
            raise UserError(
                "recall needs 1 <= queries <= slots <= num_keys and num_values, got "
                f"{self.queries}, {self.slots}, {self.keys} and {self.values}"
            )
        self.metric = dataclasses.replace(self.metric, chance=1 / self.slots)
        self.length = self._slot_width * self.slots + self.queries + self.fillers

    @property
    def _slot_width(self) -> int:
        return 1 if self.binding == "joint" else 2

    def train(self, seed: int) -> grain.IterDataset:
        """Endless batches; batch i of a seed is always the same."""
        return endless(self._batch, "recall", "train", seed)

    def _batch(self, generator: np.random.Generator) -> Batch:
        return self.make(generator, self.batch_size)

    def evaluation(self, split: str) -> Sequence[Batch]:
        """All rows of a split, 500 at a time."""
        return in_batches(self._rows(split), 500)

    def _rows(self, split: str) -> Batch:
        return self.make(stream("recall", split), self.rows[split])

    def items(self, split: str) -> Items:
        """One item a query; the queries of a row are one cluster."""
        rows = self._rows(split)
        row, column = np.nonzero(rows["weight"])
        edges = np.unique(np.round(np.geomspace(1, self.length, 6)).astype(int))
        return Items(
            cluster=row,
            distance=rows["distance"][row, column].astype(np.float64),
            group=np.zeros(len(row), int),
            groups=("all",),
            distance_edges=tuple(edges.tolist()),
            distance_name="query position - slot position",
        )

    def make(self, generator: np.random.Generator, rows: int) -> Batch:
        """Rows with fields key, value, mark, target, weight and distance, each [rows, length]."""
        keys = _distinct(generator, rows, self.keys, self.slots) + 1
        values = _distinct(generator, rows, self.values, self.slots) + 1
        asked = _distinct(generator, rows, self.slots, self.queries)
        pieces = self.slots + self.queries
        gaps = np.sort(_distinct(generator, rows, pieces + self.fillers, pieces), axis=1)
        widths = np.r_[np.full(self.slots, self._slot_width), np.ones(self.queries, int)]
        start = gaps + (np.cumsum(widths) - widths - np.arange(pieces))
        slot, query = start[:, : self.slots], start[:, self.slots :]
        batch = {name: np.zeros((rows, self.length), dtype) for name, dtype in _FIELDS.items()}
        answer_at = slot + (self._slot_width - 1)
        _put(batch["key"], slot, keys)
        _put(batch["value"], answer_at, values)
        _put(batch["key"], query, np.take_along_axis(keys, asked, 1))
        _put(batch["mark"], query, 1)
        _put(batch["target"], query, np.take_along_axis(values, asked, 1) - 1)
        _put(batch["weight"], query, 1)
        _put(batch["distance"], query, query - np.take_along_axis(answer_at, asked, 1))
        return batch

    def reading(self, text: str | None) -> Reading:
        """The first test row: slots as key=value, queries as key?, a dot for a filler."""
        if text is not None:
            raise UserError("recall has no words to read: leave out --text")
        row = {name: array[:1] for name, array in self._rows("test").items()}
        words = [
            _word(*triple)
            for triple in zip(row["key"][0], row["value"][0], row["mark"][0], strict=True)
        ]
        return Reading(row, words, words)

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A classifier of values at every position."""
        return TokenClassifier(
            vocabularies={"key": self.keys + 1, "value": self.values + 1, "mark": 2},
            num_classes=self.values,
            rule=rule,
            options=model,
            max_length=self.length,
            rngs=rngs,
        )

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """Cross-entropy of the value at the queries."""
        return cross_entropy(outputs, batch["target"], batch["weight"], label_smoothing)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """1 where the most likely value is the right one."""
        right = jnp.argmax(outputs, -1) == batch["target"]
        return right.astype(jnp.float32).ravel(), jnp.asarray(batch["weight"]).ravel()

    def baselines(self) -> Sequence[Baseline]:
        """Guessing any value, and the value stored last; guessing a stored one is the chance."""
        rows = self._rows("test")
        row, column = np.nonzero(rows["weight"])
        stored = np.where(rows["value"] > 0, np.arange(self.length), -1).argmax(1)
        last = rows["value"][np.arange(len(stored)), stored] - 1
        right = last[row] == rows["target"][row, column]
        return (
            Baseline("any value (1 / values)", np.full(len(row), 1 / self.values)),
            Baseline("the value stored last", right.astype(np.float64)),
        )

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        digest = fingerprint(self._rows("validation"), self._rows("test"))
        return {"data_sha256": digest, "padding": 0.0, "dropped": {}}


def _word(key: int, value: int, mark: int) -> str:
    if mark:
        return f"k{key}?"
    named = (f"{letter}{number}" for letter, number in (("k", key), ("v", value)) if number)
    return "=".join(named) or "."


def _distinct(generator: np.random.Generator, rows: int, total: int, count: int) -> np.ndarray:
    """`count` different numbers below `total` in random order, in every row."""
    return np.argsort(generator.random((rows, total)), axis=1)[:, :count]


def _put(array: np.ndarray, columns: np.ndarray, values: Any) -> None:
    np.put_along_axis(array, columns, values, axis=1)
