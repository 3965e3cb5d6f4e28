"""Packing: sequences of different lengths side by side in rows of one length.

An item has a sequence on each side: words alone, or a source and a target, which share a row.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.tasks.base import Batch
from experiments.tasks.synthetic import BATCHES, stream


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Sequences of ids end to end.

    Attributes:
      fields: of every token, by name.
      length: tokens of each sequence.

    """

    fields: Mapping[str, np.ndarray]
    length: Int[np.ndarray, " sequences"]

    @functools.cached_property
    def start(self) -> Int[np.ndarray, " sequences"]:
        """The first token of each sequence."""
        return np.cumsum(self.length) - self.length


Packed = tuple[
    Int[np.ndarray, " packed"], Int[np.ndarray, " packed"], Int[np.ndarray, "packed sides"], int
]


def pack(
    lengths: Int[np.ndarray, "items sides"],
    row: tuple[int, ...],
    rows: int | None = None,
    open_rows: int | None = None,
) -> tuple[
    Int[np.ndarray, " packed"], Int[np.ndarray, " packed"], Int[np.ndarray, "packed s"], int
]:
    """Places items by first fit: each into the first row that has room on every side.

    Args:
      lengths: of the items, at most `row` each.
      row: positions of a row on each side.
      rows: how many rows there are; packing ends at the first item that fits into none, so that
        long ones are not passed over. None: as many as it takes.
      open_rows: only so many of the last rows are looked at, and items come in the order given.
        None: all rows, and with `rows` None long items first.

    Returns:
      For each packed item its index, its row and its starts in the row; the number of rows.

    Raises:
      ValueError: an item is longer than a row.

    """
    if (lengths > row).any():
        longest = tuple(lengths.max(0).tolist())
        raise ValueError(f"a row of {row} positions cannot hold an item of {longest}")
    in_order = rows is not None or open_rows is not None
    order = np.arange(len(lengths)) if in_order else np.argsort(-lengths.sum(1), kind="stable")
    used = np.zeros((rows or len(lengths), len(row)), int)
    count, lines, starts = rows or 0, [], []
    for length in lengths[order]:
        first = 0 if open_rows is None else max(0, count - open_rows)
        fits = (used[first:count] + length <= row).all(1)
        line = first + int(fits.argmax()) if fits.any() else count
        if line == count:
            if rows is not None:
                break
            count += 1
        lines.append(line)
        starts.append(used[line].copy())
        used[line] += length
    places = np.array(starts, int).reshape(-1, len(row))
    return order[: len(lines)], np.array(lines, int), places, count


@dataclasses.dataclass(frozen=True)
class Plan:
    """Places for items in rows.

    Attributes:
      item: of each place.
      row: of each place.
      start: the first position of each place, on each side.
      rows: how many rows there are.
      positions: of a row, on each side.

    """

    item: Int[np.ndarray, " places"]
    row: Int[np.ndarray, " places"]
    start: Int[np.ndarray, "places sides"]
    rows: int
    positions: tuple[int, ...]

    @classmethod
    def of(
        cls,
        lengths: Int[np.ndarray, "items sides"],
        positions: tuple[int, ...],
        open_rows: int | None = None,
    ) -> "Plan":
        """Every item that fits, see `pack`; places in order of rows."""
        fits = np.flatnonzero((lengths <= positions).all(1))
        which, row, start, rows = pack(lengths[fits], positions, open_rows=open_rows)
        order = np.lexsort((start[:, 0], row))
        return cls(fits[which][order], row[order], start[order], rows, positions)

    def shuffled(self, lengths: Int[np.ndarray, "items sides"], generator: Any) -> "Plan":
        """Another order of rows, and items of the same lengths exchanged among their places.

        The lengths in a row stay, so every epoch has the same number of rows: a batch is known by
        its index, and the packing, which takes a second, is done once.
        """
        item = self.item.copy()
        sides = lengths[item].T
        by_length = np.lexsort(sides)
        mixed = np.lexsort((generator.random(len(item)), *sides))
        item[by_length] = item[mixed]
        row = generator.permutation(self.rows)[self.row]
        order = np.lexsort((self.start[:, 0], row))
        return Plan(item[order], row[order], self.start[order], self.rows, self.positions)

    def fill(self, sides: Mapping[str, Encoded], rows: Int[np.ndarray, " B"]) -> Batch:
        """The arrays of some rows, in ascending order: fields, segments, positions, weights.

        The names of segments and positions begin with that of their side; weights are 1 where the
        last side has a token.
        """
        batch: dict[str, np.ndarray] = {}
        segment = np.zeros(0)
        for side, (name, encoded) in enumerate(sides.items()):
            prefix = f"{name}_" if name else ""
            place, offset, source = self._tokens(encoded, rows)
            where = np.searchsorted(rows, self.row[place]), self.start[place, side] + offset
            values = {field: values[source] for field, values in encoded.fields.items()}
            values |= {
                f"{prefix}segment": place - place.min(initial=0) + 1,
                f"{prefix}position": offset,
            }
            shape = len(rows), self.positions[side]
            for field, of_tokens in values.items():
                batch[field] = np.zeros((*shape, *of_tokens.shape[1:]), np.int32)
                batch[field][where] = of_tokens
            segment = batch[f"{prefix}segment"]
        return {**batch, "weight": (segment > 0).astype(np.float32)}

    def _tokens(
        self, encoded: Encoded, rows: Int[np.ndarray, " B"]
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Of each token in some rows: its place, its offset there, its index in `encoded`."""
        places = np.flatnonzero(np.isin(self.row, rows))
        length = encoded.length[self.item[places]]
        place = np.repeat(places, length)
        offset = np.arange(len(place)) - np.repeat(np.cumsum(length) - length, length)
        return place, offset, encoded.start[self.item[place]] + offset

    def tokens(self, encoded: Encoded) -> Int[np.ndarray, " N"]:
        """The index in `encoded` of each token, in the order of rows and positions."""
        return self._tokens(encoded, np.arange(self.rows))[2]

    def padding(self, sides: Mapping[str, Encoded]) -> float:
        """The share of positions, of all sides, that hold no token."""
        held = sum(int(one.length[self.item].sum()) for one in sides.values())
        return 1 - held / (self.rows * sum(self.positions))


class Epochs:
    """Training batches by index: rows of one epoch after another, each in its own order.

    Args:
      sides: the items.
      plan: their places.
      batch_size: rows in a batch.
      names: of the stream of random numbers: the task and the seed.

    """

    def __init__(
        self,
        sides: Mapping[str, Encoded],
        plan: Plan,
        batch_size: int,
        names: tuple[str | int, ...],
    ):
        self._sides, self._plan, self._size, self._names = sides, plan, batch_size, names
        self._lengths = np.stack([one.length for one in sides.values()], 1)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Batch:
        wanted = int(index) * self._size + np.arange(self._size)
        epochs, rows = np.divmod(wanted, self._plan.rows)
        parts = [
            self._epoch(int(epoch)).fill(self._sides, rows[epochs == epoch])
            for epoch in np.unique(epochs)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _shuffled(self, epoch: int) -> Plan:
        return self._plan.shuffled(self._lengths, stream(*self._names, epoch))
