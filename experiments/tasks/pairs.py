"""Sentences in two languages: local files, or a translation set of TFDS by name.

Local files are tab-separated lines, or parallel files with the same number of lines. Where a set
comes without splits, they are made by the hash of a pair's connected group: pairs that share a
sentence, up to case and punctuation, belong together, so that no sentence crosses a split.
"""

import dataclasses
import functools
import gzip
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from experiments.options import UserError
from experiments.tasks import builders

SPLITS = ("train", "validation", "test")
VALIDATES, TESTS = 10, 20
"""Groups in a thousand."""
TATOEBA = "tatoeba_deu_eng/deu.txt.gz"
_REMEDY = (
    "name data by --config.task.data=FILE, FOLDER or a set of TFDS such as "
    f"wmt16_translate/de-en, or put it as $ATTN_JAX_DATA/{TATOEBA}"
)
_WORD = re.compile(r"\w+")
# Pairs of one record: the cost of a record is the same for one and for many.
_TOGETHER = 1000
_ALL = "pairs"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sentences of a split and their translations.

    Attributes:
      source: as they came.
      target: of each source.
      group: a number that pairs of one connected group share.

    """

    source: Sequence[str]
    target: Sequence[str]
    group: Int[np.ndarray, " pairs"]

    def __len__(self) -> int:
        return len(self.source)

    def chosen(self, index: Int[np.ndarray, " some"]) -> "Pairs":
        """Some of the pairs."""
        which: list[int] = index.tolist()
        source = [self.source[i] for i in which]
        return Pairs(source, [self.target[i] for i in which], self.group[index])


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are to be read.

    Attributes:
      source: the language translated from.
      target: the language translated into.
      columns: the languages of the columns of tab-separated lines; "" for one to pass over.

    """

    source: str
    target: str
    columns: tuple[str, ...]

    def __post_init__(self):
        if self.source == self.target:
            raise UserError(f"task.source and task.target must differ, got {self.source!r} twice")
        missing = [x for x in (self.source, self.target) if x not in self.columns]
        if missing:
            raise UserError(
                f"task.columns must name the source and the target, got {self.columns} without "
                f"{missing[0]!r}"
            )


def load(data: str, reading: Reading) -> Mapping[str, Pairs]:
    """The pairs of "train", "validation" and "test".

    Args:
      data: a file of tab-separated lines (.gz or not); a folder of such files by split
        (train.tsv) or of parallel files (train.de, train.en); a translation set of TFDS by name;
        "": Tatoeba German-English in $ATTN_JAX_DATA.
      reading: languages and columns.

    Raises:
      UserError: no such data; a line that can't be read, with file, line and remedy.

    """
    found, builder = _builder(data, reading)
    if builder is not None:
        return _split(_from_tfds(builder, reading))
    files = tuple((split, paths) for split, paths in found.items())
    return _split(_prepared(files, reading))


def _builder(data: str, reading: Reading) -> tuple[Mapping[str, Any], Any]:
    """Files by split of local data, or a builder of TFDS."""
    folder = builders.data_folder()
    if not data and folder is None:
        raise UserError(f"task.data is empty and $ATTN_JAX_DATA unset: {_REMEDY}")
    path = pathlib.Path(data) if data else pathlib.Path(str(folder)) / TATOEBA
    if path.is_file():
        return {_ALL: (path,)}, None
    if path.is_dir():
        return find(path, reading), None
    if data and builders.is_set_name(data):
        return {}, builders.downloaded(data, _REMEDY)
    raise UserError(f"there is no file, folder or data set {str(path)!r}: {_REMEDY}")


def find(folder: pathlib.Path, reading: Reading) -> Mapping[str, tuple[pathlib.Path, ...]]:
    """The files of a folder by split: one of lines with tabs, or one for each language.

    Raises:
      UserError: there are none, or they are incomplete.

    """
    found: dict[str, tuple[pathlib.Path, ...]] = {}
    for split in (_ALL, *SPLITS):
        for suffixes in ((".tsv",), (f".{reading.source}", f".{reading.target}")):
            paths = [_file(folder, split + suffix) for suffix in suffixes]
            there = [path for path in paths if path is not None]
            if len(there) == len(suffixes):
                found[split] = tuple(there)
            elif there:
                raise UserError(f"{there[0]} has no counterpart: both languages need a file")
    if not found or (_ALL not in found and "train" not in found):
        raise UserError(
            f"{str(folder)!r} must hold train.tsv (and validation.tsv, test.tsv) or "
            f"train.{reading.source} and train.{reading.target}, or pairs.tsv to be split here; "
            "each may end in .gz"
        )
    if _ALL in found and len(found) > 1:
        raise UserError(f"{str(folder)!r} holds both pairs.* and files of splits: remove one kind")
    return found


def _file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


class LocalPairs(builders.LocalBuilder, skip_registration=True):
    """TFDS's view of local files of pairs."""

    name = "local_pairs"

    def __init__(
        self,
        files: Sequence[tuple[str, tuple[pathlib.Path, ...]]],
        reading: Reading,
        **keywords: Any,
    ):
        self._files, self._reading = files, reading
        super().__init__(**keywords)

    def _info(self) -> tfds.core.DatasetInfo:
        sentences = tfds.features.Sequence(tfds.features.Text())
        # TFDS shuffles what it writes; the index restores the order of the file.
        features = {"index": np.int64, "source": sentences, "target": sentences}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        del dl_manager
        return {split: self._generate_examples(paths) for split, paths in self._files}

    def _generate_examples(self, paths: tuple[pathlib.Path, ...]) -> Any:
        pairs = list(read(paths, self._reading))
        for index, first in enumerate(range(0, len(pairs), _TOGETHER)):
            source, target = zip(*pairs[first : first + _TOGETHER], strict=True)
            yield index, {"index": index, "source": list(source), "target": list(target)}


def read(paths: tuple[pathlib.Path, ...], reading: Reading) -> Iterator[tuple[str, str]]:
    """The pairs of one file of lines with tabs, or of two parallel files.

    Raises:
      UserError: a line that can't be read, a file without lines, or numbers of lines that differ.

    """
    if len(paths) == 1:
        yield from _tabbed(paths[0], reading)
        return
    sides = [[line for _, line in _lines(path)] for path in paths]
    if len(sides[0]) != len(sides[1]):
        counts = " and ".join(f"{p} has {len(s)}" for p, s in zip(paths, sides, strict=True))
        raise UserError(f"parallel files must have the same number of lines, got: {counts}")
    yield from zip(*sides, strict=True)


def _tabbed(path: pathlib.Path, reading: Reading) -> Iterator[tuple[str, str]]:
    columns = reading.columns
    first, second = columns.index(reading.source), columns.index(reading.target)
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {number}: a line has {len(columns)} columns separated by tabs "
                f"({', '.join(c or 'ignored' for c in columns)}), got {len(fields)} in "
                f"{line[:60]!r}: mend the line or say what the columns are by --config.task.columns"
            )
        yield fields[first], fields[second]


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8 at byte {error.start} of the line: convert the file"
        ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}, after line {number}: no whole gzip file ({error})") from error
    if not number:
        raise UserError(f"{path} is empty: it must hold a line for each pair of sentences")


@functools.lru_cache(maxsize=2)
def _prepared(
    files: tuple[tuple[str, tuple[pathlib.Path, ...]], ...], reading: Reading
) -> Mapping[str, tuple[Sequence[str], Sequence[str]]]:
    every = [path for _, paths in files for path in paths]
    builder: Any = LocalPairs(files, reading, data_dir=builders.local_folder(every, reading))
    builders.prepare_local(builder)
    return {split: _read_back(builder.as_data_source(split)) for split, _ in files}


def _read_back(source: Any) -> tuple[Sequence[str], Sequence[str]]:
    records = sorted((source[i] for i in range(len(source))), key=lambda one: int(one["index"]))
    first, second = (
        [text for one in records for text in builders.texts(one[side])]
        for side in ("source", "target")
    )
    return first, second


def _from_tfds(builder: Any, reading: Reading) -> Mapping[str, tuple[Sequence[str], Sequence[str]]]:
    missing = [x for x in (reading.source, reading.target) if x not in builder.info.features]
    if missing:
        known = ", ".join(builder.info.features)
        raise UserError(
            f"{builder.name} has no language {missing[0]!r}, it has: {known}; set task.source and "
            "task.target"
        )
    found = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split)
        sides = [[], []]
        for index in range(len(source)):
            one = source[index]
            for side, language in zip(sides, (reading.source, reading.target), strict=True):
                side.extend(builders.texts([one[language]]))
        found[_ALL if len(builder.info.splits) == 1 else split] = tuple(sides)
    return found


def _split(sides: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> Mapping[str, Pairs]:
    """The three splits; those that are missing are taken from the training pairs."""
    pairs = {name: Pairs(*texts, components(*texts)) for name, texts in sides.items()}
    made = {name: pairs[name] for name in SPLITS if name in pairs}
    if "test" not in made or "validation" not in made:
        rest = pairs[_ALL] if _ALL in pairs else pairs["train"]
        by_hash = _by_hash(rest)
        made = {name: rest.chosen(np.flatnonzero(by_hash == name)) for name in SPLITS} | {
            name: made[name] for name in made if name != "train"
        }
    for name, one in made.items():
        if not len(one):
            raise UserError(f"the {name} split holds no pair: give more data, or a file {name}.tsv")
    return made


@functools.lru_cache(maxsize=1 << 20)
def key(sentence: str) -> str:
    """Equal for sentences that differ in case, punctuation and blanks only."""
    return " ".join(_WORD.findall(sentence.casefold()))


def components(source: Sequence[str], target: Sequence[str]) -> Int[np.ndarray, " pairs"]:
    """The connected group of each pair: of pairs that share the key of a sentence."""
    ids: dict[tuple[int, str], int] = {}
    rows, columns = (
        np.array([ids.setdefault((side, key(text)), len(ids)) for text in texts])
        for side, texts in enumerate((source, target))
    )
    ones = np.ones(len(rows), np.int8)
    graph = coo_array((ones, (rows, columns)), shape=(len(ids), len(ids)))
    return connected_components(graph, directed=False)[1][rows]


def _by_hash(pairs: Pairs) -> np.ndarray:
    """The split of each pair, by the hash of its group's first key; the largest group trains."""
    names: dict[int, str] = {}
    for group, text in zip(pairs.group.tolist(), pairs.source, strict=True):
        name = key(text)
        names[group] = min(names.get(group, name), name)
    largest = int(np.bincount(pairs.group).argmax())
    split = {group: _share(name) for group, name in names.items()} | {largest: "train"}
    return np.array([split[group] for group in pairs.group.tolist()])


def _share(name: str) -> str:
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000
    if place < TESTS:
        return "test"
    return "validation" if place < TESTS + VALIDATES else "train"


class Neighbours:
    """Whether a sentence has one within one word of it: one changed, added or left out."""

    def __init__(self, sentences: Sequence[str]):
        known = {tuple(key(sentence).split()) for sentence in sentences}
        self._whole = {" ".join(words) for words in known}
        self._changed = {form for words in known for form in _without(words, "*")}
        self._shorter = {form for words in known for form in _without(words)}

    def __contains__(self, sentence: str) -> bool:
        words = tuple(key(sentence).split())
        whole = " ".join(words)
        return (
            whole in self._whole
            or whole in self._shorter
            or not self._whole.isdisjoint(_without(words))
            or not self._changed.isdisjoint(_without(words, "*"))
        )


def _without(words: tuple[str, ...], *instead: str) -> Iterator[str]:
    """The sentence without each of its words, or with something instead."""
    for i in range(len(words)):
        yield " ".join((*words[:i], *instead, *words[i + 1 :]))
