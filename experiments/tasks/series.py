"""Real series for `smoothing`: windows of which contiguous gaps are held out, never single points.

Neighbouring points of a real series are nearly equal: a model that is asked for single points
learns to copy the neighbour. So what is asked for lies in gaps.
"""

import csv
import gzip
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from experiments.options import UserError
from experiments.tasks import builders
from experiments.tasks.curves import ASKED, OBSERVED, Curves

FOLDERS = ("co2_daily", "nab")
WINDOW = OBSERVED + ASKED
GAPS = (8, 8, 16)
"""Lengths of the held-out gaps of a window; together they are the times asked for."""
_SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}

Series = Float64[np.ndarray, " points"]


def find(folder: str, path: str) -> Sequence[pathlib.Path]:
    """The files of a folder of series.

    Raises:
      UserError: there is no such folder, or nothing in it.

    """
    data = builders.data_folder()
    root = pathlib.Path(path or (pathlib.Path(data) / folder if data else ""))
    if not (path or data) or not root.is_dir():
        raise UserError(
            f"task.series={folder} needs a folder of *.csv.gz files, got {str(root)!r}: set "
            "task.path or the environment variable ATTN_JAX_DATA"
        )
    files = sorted(root.rglob("*.csv.gz"))
    if not files:
        raise UserError(f"{root} holds no *.csv.gz file")
    return files


def read(path: pathlib.Path) -> Series:
    """The column "value" of a file, in the order of time.

    Raises:
      UserError: a line has no such column or no number in it; names file and line.

    """
    values = []
    with gzip.open(path, "rt", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            try:
                values.append(float(row["value"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}, line {rows.line_num}: a line needs a number in the column "
                    f"'value', got {row}"
                ) from error
    return np.array(values)


def fingerprint(files: Sequence[pathlib.Path]) -> str:
    """SHA-256 over all files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def part(series: Series, split: str) -> Series:
    """The stretch of time of a split: training is earliest, testing latest."""
    first, last = (round(share * len(series)) for share in _SHARES[split])
    return series[first:last]


def windows(generator: np.random.Generator, series: Sequence[Series], count: int | None) -> Curves:
    """Windows with gaps: `count` at random places, or all that do not overlap.

    Each is scaled by the mean and standard deviation of what is observed of it, one that does not
    vary is left out.
    """
    long_enough = [index for index, s in enumerate(series) if len(s) >= WINDOW]
    if count is None:
        places = [(i, s) for i in long_enough for s in range(0, len(series[i]) - WINDOW, WINDOW)]
    else:
        which = generator.choice(long_enough, 2 * count)
        places = [(i, generator.integers(len(series[i]) - WINDOW + 1)) for i in which]
    cut = np.stack([series[i][s : s + WINDOW] for i, s in places])
    hidden = np.stack([_gaps(generator) for _ in places])
    observed, truth = cut[~hidden].reshape(-1, OBSERVED), cut[hidden].reshape(-1, ASKED)
    varies = np.flatnonzero(observed.std(1) > 0)[:count]
    observed, truth, hidden = observed[varies], truth[varies], hidden[varies]
    mean, scale = observed.mean(1, keepdims=True), observed.std(1, keepdims=True)
    spacing = WINDOW / OBSERVED
    whole = np.concatenate([observed, truth], axis=1).std(1, keepdims=True)
    return Curves(
        times=np.nonzero(~hidden)[1].reshape(-1, OBSERVED) / spacing,
        values=(observed - mean) / scale,
        asked=np.nonzero(hidden)[1].reshape(-1, ASKED) / spacing,
        truth=(truth - mean) / scale,
        unit=scale / whole,
        family=np.zeros(len(varies), int),
        floor=np.full(truth.shape, np.nan),
    )


def _gaps(generator: np.random.Generator) -> np.ndarray:
    """Which points of a window are hidden: the gaps in random order, one point or more apart."""
    lengths = generator.permutation(GAPS)
    free = OBSERVED - len(lengths) + 1
    before = np.sort(generator.choice(free, len(lengths), replace=False))
    before = before + np.arange(len(lengths))
    hidden = np.zeros(WINDOW, bool)
    for index, length in enumerate(lengths):
        start = before[index] + lengths[:index].sum()
        hidden[start : start + length] = True
    return hidden
