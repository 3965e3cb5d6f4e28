"""Baselines of `text`: n-grams of bytes, interpolated by the method of Witten and Bell."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, UInt8

LONGEST = 7
"""A gram of 7 bytes fits an int64; longer ones do not."""

Grams = Int[np.ndarray, " bytes"]


class WittenBell:
    """P(w | h) = (c(h w) + t(h) P(w | h')) / (c(h) + t(h)), with P(w) = 1/256 below one byte.

    c counts, t(h) is the number of different bytes seen after h, h' is h without its first byte.

    Args:
      documents: bytes to count; no gram reaches across documents.
      order: n, the length of the longest gram.

    Raises:
      ValueError: the order is not in 1..7.

    References: Witten and Bell 1991; Chen and Goodman 1998, section 2.6.

    """

    def __init__(self, documents: Sequence[UInt8[np.ndarray, " bytes"]], order: int):
        if not 1 <= order <= LONGEST:
            raise ValueError(f"the order of an n-gram must be 1 to {LONGEST}, got {order}")
        self.order = order
        self._tables = [_count(documents, length) for length in range(1, order + 1)]

    def probability(self, document: UInt8[np.ndarray, " bytes"]) -> Float64[np.ndarray, " bytes"]:
        """Of every byte, given those before it in the document, `order` - 1 of them at most."""
        probability = np.full(len(document), 1 / 256)
        for length, table in enumerate(self._tables, start=1):
            place = np.arange(length - 1, len(document))
            if not len(place):
                break
            grams = _grams(document, length)
            count, total, types = _look_up(table, grams)
            known = total + types > 0
            longer = (count + types * probability[place]) / np.where(known, total + types, 1)
            probability[place] = np.where(known, longer, probability[place])
        return probability


def _grams(document: UInt8[np.ndarray, " bytes"], length: int) -> Grams:
    """Every run of `length` bytes as one number, the first byte highest."""
    number = np.zeros(max(len(document) - length + 1, 0), np.int64)
    for offset in range(length):
        number = number * 256 + document[offset : offset + len(number)]
    return number


def _count(
    documents: Sequence[UInt8[np.ndarray, " bytes"]], length: int
) -> tuple[Grams, Grams, Grams, Grams, Grams]:
    """Grams and their counts; histories, and how much and how many different follow each."""
    grams = np.concatenate([_grams(document, length) for document in documents])
    unique, counts = np.unique(grams, return_counts=True)
    histories, first = np.unique(unique // 256, return_index=True)
    totals = np.add.reduceat(counts, first)
    types = np.diff(np.append(first, len(unique)))
    return unique, counts, histories, totals, types


def _look_up(
    table: tuple[Grams, Grams, Grams, Grams, Grams], grams: Grams
) -> tuple[Grams, Grams, Grams]:
    """c(h w), c(h) and t(h) of every gram h w; zeros where it was never seen."""
    unique, counts, histories, totals, types = table
    place, seen = _find(unique, grams)
    before, known = _find(histories, grams // 256)
    return (
        np.where(seen, counts[place], 0),
        np.where(known, totals[before], 0),
        np.where(known, types[before], 0),
    )


def _find(ordered: Grams, wanted: Grams) -> tuple[Grams, np.ndarray]:
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return place, ordered[place] == wanted
