"""Packing: sequences of different lengths side by side in rows of one length."""

import numpy as np
from jaxtyping import Int


def pack(
    lengths: Int[np.ndarray, " sequences"], row: int, rows: int | None = None
) -> tuple[Int[np.ndarray, " packed"], Int[np.ndarray, " packed"], Int[np.ndarray, " packed"], int]:
    """Places sequences by first fit: each into the first row that has room.

    Args:
      lengths: of the sequences, at most `row` each.
      row: positions in a row.
      rows: how many rows there are; packing ends at the first sequence that fits into none, so
        that long ones are not passed over. None: as many as it takes, long sequences first.

    Returns:
      For each packed sequence its index, its row and its start in the row; the number of rows.

    Raises:
      ValueError: a sequence is longer than a row.

    """
    if len(lengths) and lengths.max() > row:
        raise ValueError(f"a row of {row} positions cannot hold a sequence of {lengths.max()}")
    order = np.argsort(-lengths, kind="stable") if rows is None else np.arange(len(lengths))
    used: list[int] = [0] * (rows or 0)
    lines: list[int] = []
    starts: list[int] = []
    for length in lengths[order].tolist():
        line = next((i for i, full in enumerate(used) if full + length <= row), len(used))
        if line == len(used):
            if rows is not None:
                break
            used.append(0)
        lines.append(line)
        starts.append(used[line])
        used[line] += length
    return order[: len(lines)], np.array(lines, int), np.array(starts, int), len(used)
