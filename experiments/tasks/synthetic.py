"""Generated data: random streams with names, endless training batches by index, fingerprints."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from experiments.tasks.base import Batch

BATCHES = 2**31 - 1
"""Length of an endless data set: more batches than any run takes."""


def stream(*names: str | int) -> np.random.Generator:
    """The random generator of a place in the data, such as ("recall", "train", seed, batch).

    Equal names give the same numbers; different ones give independent streams (texts enter as
    their CRC-32, together with their length in names).
    """
    words = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names]
    return np.random.default_rng([len(words), *words])


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches by index: batch i is made from the stream (*names, i).

    Attributes:
      make: a batch from a generator.
      names: of the stream: the task and the seed.

    """

    make: Callable[[np.random.Generator], Batch]
    names: tuple[str | int, ...]

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Batch:
        return self.make(stream(*self.names, int(index)))


def endless(make: Callable[[np.random.Generator], Batch], *names: str | int) -> grain.IterDataset:
    """Batches without end, resumed by their index alone.

    Made in the calling thread, one when asked for: the arrays are small, and threads that read
    ahead would compete with the training step for the same cores.
    """
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(Batches(make, names)).to_iter_dataset(in_this_thread)


def in_batches(arrays: Mapping[str, np.ndarray], size: int) -> Sequence[Batch]:
    """Rows cut into batches of `size`; zeros, so also weights of zero, fill up the last one."""
    rows = len(next(iter(arrays.values())))
    missing = -rows % size
    full = {
        name: np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
        for name, array in arrays.items()
    }
    starts = range(0, rows, size)
    return [{name: array[i : i + size] for name, array in full.items()} for i in starts]


def fingerprint(*splits: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for arrays in splits:
        for name in sorted(arrays):
            digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
            digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
