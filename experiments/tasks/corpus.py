"""The documents of `text`: paragraphs once each, split so that no duplicate crosses a split.

Documentation repeats itself: two topics that share a paragraph belong together, and a connected
component of such topics goes into one split as a whole, by the hash of its name. The largest
component trains.
"""

import collections
import gzip
import hashlib
import importlib
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from experiments.options import UserError
from experiments.tasks import builders

SHORTEST = 60
"""Bytes of the shortest paragraph that counts."""
_REMEDY = (
    "name a folder of *.txt or *.txt.gz by --config.task.path=FOLDER or a set of TFDS with one "
    "text an example, or leave it empty for Python's documentation"
)
_CHAPTER = 4096
_BLANK = re.compile(r"\n[ \t]*\n")

Bytes = UInt8[np.ndarray, " bytes"]


class Corpus:
    """Documents by split.

    Attributes:
      documents: for each split, the texts as bytes, paragraphs joined by blank lines.
      component: for each split, the component of every document.
      dropped: bytes left out, by reason.
      sha256: of all texts as they came.

    """

    def __init__(self, texts: Mapping[str, str]):
        joined = "\0".join(f"{name}\0{texts[name]}" for name in sorted(texts))
        self.sha256 = hashlib.sha256(joined.encode()).hexdigest()
        paragraphs, self.dropped = _unique_paragraphs(texts)
        component = _components(paragraphs)
        split_of = _splits(component, paragraphs)
        splits = ("train", "validation", "test")
        self.documents: dict[str, list[Bytes]] = {split: [] for split in splits}
        self.component: dict[str, list[int]] = {split: [] for split in splits}
        order = {name: index for index, name in enumerate(sorted(set(component.values())))}
        for name, document in _documents(paragraphs).items():
            split = split_of[component[name]]
            self.documents[split].append(document)
            self.component[split].append(order[component[name]])


def read_texts(path: str) -> Mapping[str, str]:
    """Texts by name: a folder's files or a set of TFDS, in chapters, or Python's documentation.

    Args:
      path: a folder of *.txt and *.txt.gz, or the name of a set with one text an example, of which
        all splits are taken; empty: the documentation.

    Raises:
      UserError: there is no such folder or set, it holds no text, or one is not UTF-8.

    """
    if not path:
        return importlib.import_module("pydoc_data.topics").topics
    root = pathlib.Path(path)
    if root.is_dir():
        return _from_folder(root)
    if builders.is_set_name(path):
        return _from_tfds(path)
    raise UserError(f"there is no folder or data set {path!r}: {_REMEDY}")


def _from_tfds(name: str) -> Mapping[str, str]:
    builder = builders.downloaded(name, _REMEDY)
    features = builder.info.features
    fields = [key for key, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if len(fields) != 1:
        raise UserError(
            f"a set must have one text an example, got {', '.join(fields) or 'none'} in {name}: "
            f"{_REMEDY}"
        )
    texts: dict[str, str] = {}
    for split in sorted(builder.info.splits):
        source = builder.as_data_source(split)
        found = builders.texts(source[index][fields[0]] for index in range(len(source)))
        for index, text in enumerate(sorted(found)):
            texts |= _named_chapters(f"{split}-{index:07d}", text)
    return texts


def _from_folder(root: pathlib.Path) -> Mapping[str, str]:
    files = sorted([*root.rglob("*.txt"), *root.rglob("*.txt.gz")])
    if not files:
        raise UserError(f"{root} holds no *.txt and no *.txt.gz file")
    texts: dict[str, str] = {}
    for file in files:
        try:
            text = _bytes(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 at byte {error.start}: convert it") from error
        texts |= _named_chapters(str(file.relative_to(root)), text)
    return texts


def _named_chapters(name: str, text: str) -> dict[str, str]:
    return {f"{name}#{index:06d}": chapter for index, chapter in enumerate(_chapters(text))}


def _bytes(file: pathlib.Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def _chapters(text: str) -> Sequence[str]:
    """Runs of whole paragraphs of about 4096 characters."""
    chapters: list[list[str]] = [[]]
    length = 0
    for paragraph in _BLANK.split(text):
        if length >= _CHAPTER:
            chapters.append([])
            length = 0
        chapters[-1].append(paragraph)
        length += len(paragraph)
    return ["\n\n".join(chapter) for chapter in chapters]


def _unique_paragraphs(
    texts: Mapping[str, str],
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, int]]:
    """Each different paragraph with the documents it stands in, first one first.

    Paragraphs that differ in blanks only are one.
    """
    found: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    short = repeated = 0
    for name in sorted(texts):
        for paragraph in _BLANK.split(texts[name]):
            size = len(paragraph.encode())
            if size < SHORTEST:
                short += size
                continue
            places = found[" ".join(paragraph.split())]
            repeated += size if places else 0
            places.append((name, paragraph))
    reasons = (f"bytes of paragraphs below {SHORTEST} bytes", "bytes of repeated paragraphs")
    return dict(found), dict(zip(reasons, (short, repeated), strict=True))


def _components(paragraphs: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, str]:
    """The name of every document's component: the first of the names in it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for places in paragraphs.values():
        for name, _ in places:
            first, second = sorted((root(places[0][0]), root(name)))
            parent[second] = first
    return {name: root(name) for name in parent}


def _splits(
    component: Mapping[str, str], paragraphs: Mapping[str, Sequence[tuple[str, str]]]
) -> dict[str, str]:
    """A fifth of the components validates and a fifth tests, by hash; the largest trains."""
    size: collections.Counter[str] = collections.Counter()
    for places in paragraphs.values():
        size[component[places[0][0]]] += len(places[0][1])
    largest = size.most_common(1)[0][0]
    splits = {}
    for name in size:
        share = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
        by_hash = "validation" if share < 20 else "test" if share < 40 else "train"
        splits[name] = "train" if name == largest else by_hash
    return splits


def _documents(paragraphs: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, Bytes]:
    """Each paragraph in the first document that has it."""
    pieces: dict[str, list[str]] = collections.defaultdict(list)
    for places in paragraphs.values():
        name, paragraph = places[0]
        pieces[name].append(paragraph)
    return {
        name: np.frombuffer("\n\n".join(pieces[name]).encode(), np.uint8) for name in sorted(pieces)
    }
