"""CoNLL-U treebanks: local files, or a download by TFDS, as sentences of words."""

import dataclasses
import functools
import gzip
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from conllu.exceptions import ParseException
from conllu.parser import DEFAULT_FIELDS, parse_line

from experiments.options import UserError
from experiments.tasks import builders
from experiments.tasks.builders import first_line, texts

SPLITS = ("train", "test")
"""The splits that are read. The official "dev" is left for a later look."""

FOLDER = "ud_english_ewt"
DOWNLOAD = "universal_dependencies/en_ewt"
_TAGS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
UPOS = frozenset(_TAGS.split())
_FEATURES = ("tokens", "upos", "head", "deprel")
_REMEDY = (
    "name it by --config.task.path=FOLDER, or a treebank of TFDS such as "
    f"universal_dependencies/de_gsd, or as $ATTN_JAX_DATA/{FOLDER}"
)


@dataclasses.dataclass(frozen=True)
class Sentence:
    """The syntactic words of a sentence: contractions are split, empty nodes left out.

    Attributes:
      words: as written.
      upos: universal part-of-speech tags.
      head: the number, from 1, of the word each word depends on; 0 for the root.
      deprel: the relation to the head.
      empty_nodes: how many words the annotators added and this leaves out.

    """

    words: tuple[str, ...]
    upos: tuple[str, ...]
    head: tuple[int, ...]
    deprel: tuple[str, ...]
    empty_nodes: int

    @property
    def key(self) -> str:
        """Equal for copies of a sentence."""
        return " ".join(self.words)


def load(path: str) -> Mapping[str, Sequence[Sentence]]:
    """The sentences of the official "train" and "test".

    Args:
      path: a folder with one *-train.conllu and one *-test.conllu, either may end in .gz; or a
        treebank of TFDS by name. Empty: the folder in $ATTN_JAX_DATA or, where that is unset, UD
        English EWT by TFDS's download.

    Raises:
      UserError: no such folder or files, a line that is no CoNLL-U, or the download failed.

    """
    data = builders.data_folder()
    if not path and not data:
        return _downloaded(DOWNLOAD, f"task.path is empty and $ATTN_JAX_DATA unset; {_REMEDY}")
    if path and not pathlib.Path(path).exists() and builders.is_set_name(path):
        return _downloaded(path, _REMEDY)
    files = find(pathlib.Path(path) if path else pathlib.Path(str(data)) / FOLDER)
    return _prepared(files, builders.local_folder(files))


def find(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The file of each of `SPLITS`.

    Raises:
      UserError: the folder or a file is missing, or a split has several.

    """
    if not folder.is_dir():
        raise UserError(f"the treebank must be a folder, got {str(folder)!r}: {_REMEDY}")
    found = {
        split: sorted([*folder.glob(f"*{split}.conllu"), *folder.glob(f"*{split}.conllu.gz")])
        for split in SPLITS
    }
    for split, paths in found.items():
        if len(paths) != 1:
            raise UserError(
                f"the treebank must hold one file *{split}.conllu or *{split}.conllu.gz, got "
                f"{len(paths)} in {str(folder)!r}: {_REMEDY}"
            )
    return tuple(found[split][0] for split in SPLITS)


class LocalTreebank(builders.LocalBuilder, skip_registration=True):
    """TFDS's view of local CoNLL-U files."""

    name = "local_treebank"

    def __init__(self, files: Sequence[pathlib.Path], **keywords: Any):
        self._files = files
        super().__init__(**keywords)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            # TFDS shuffles what it writes; the index restores the order of the file.
            "index": np.int64,
            "words": tfds.features.Sequence(text),
            "upos": tfds.features.Sequence(text),
            "head": tfds.features.Sequence(np.int64),
            "deprel": tfds.features.Sequence(text),
            "empty_nodes": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        del dl_manager
        return {
            split: self._generate_examples(file)
            for split, file in zip(SPLITS, self._files, strict=True)
        }

    def _generate_examples(self, file: pathlib.Path) -> Any:
        for index, sentence in enumerate(read(file)):
            yield index, {"index": index, **vars(sentence)}


@functools.lru_cache(maxsize=2)
def _prepared(
    files: tuple[pathlib.Path, ...], folder: pathlib.Path
) -> Mapping[str, Sequence[Sentence]]:
    builder: Any = LocalTreebank(files, data_dir=folder)
    builders.prepare_local(builder)
    return {split: _read_back(builder.as_data_source(split)) for split in SPLITS}


def _read_back(source: Any) -> Sequence[Sentence]:
    examples = sorted((source[i] for i in range(len(source))), key=lambda one: int(one["index"]))
    return tuple(
        Sentence(
            words=texts(one["words"]),
            upos=texts(one["upos"]),
            head=tuple(int(head) for head in one["head"]),
            deprel=texts(one["deprel"]),
            empty_nodes=int(one["empty_nodes"]),
        )
        for one in examples
    )


def read(path: pathlib.Path) -> Iterator[Sentence]:
    """The sentences of one file.

    Raises:
      UserError: a line is no CoNLL-U; names the file, the line and the rule.

    """
    opened = gzip.open if path.suffix == ".gz" else open
    block: list[tuple[int, str]] = []
    with opened(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    block.append((number, line.rstrip("\r\n")))
                elif block:
                    yield from _sentence(path, block)
                    block = []
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path} must be UTF-8 text or its gzip, got: {error}") from error
    if block:
        yield from _sentence(path, block)


def _sentence(path: pathlib.Path, block: list[tuple[int, str]]) -> Iterator[Sentence]:
    """The sentence of a block of lines; none where all lines are comments."""
    rows = [(n, _row(path, n, line), line) for n, line in block if not line.startswith("#")]
    words = [(n, row, line) for n, row, line in rows if isinstance(row["id"], int)]
    for place, (number, row, line) in enumerate(words, 1):
        rule = _broken_rule(row, place, len(words))
        if rule:
            raise _broken(path, number, rule, line)
    if words:
        yield Sentence(
            words=tuple(row["form"] for _, row, _ in words),
            upos=tuple(row["upos"] for _, row, _ in words),
            head=tuple(row["head"] for _, row, _ in words),
            deprel=tuple(row["deprel"] for _, row, _ in words),
            empty_nodes=sum(
                isinstance(row["id"], tuple) and "." in row["id"] for _, row, _ in rows
            ),
        )


def _row(path: pathlib.Path, number: int, line: str) -> Mapping[str, Any]:
    """The ten fields of a line, by the package `conllu`, which accepts fewer."""
    if line.count("\t") != len(DEFAULT_FIELDS) - 1:
        raise _broken(path, number, "a line has ten fields separated by tabs", line)
    try:
        return parse_line(line, DEFAULT_FIELDS)
    except ParseException as error:
        raise _broken(path, number, first_line(error), line) from error


def _broken_rule(row: Mapping[str, Any], place: int, words: int) -> str | None:
    """What the package does not check: the rule that a word breaks, if any."""
    if row["id"] != place:
        return f"words are numbered from 1 without gaps, here {place}"
    if row["upos"] not in UPOS:
        return "UPOS is one of the 17 universal tags"
    if row["head"] is None or not 0 <= row["head"] <= words or row["head"] == place:
        return f"HEAD is 0 or the number of another word, at most {words}"
    if row["deprel"] in ("", "_"):
        return "DEPREL names a relation"
    return None


def _broken(path: pathlib.Path, number: int, rule: str, line: str) -> UserError:
    return UserError(f"{path}, line {number}: {rule}, got {line[:80]!r}")


@functools.lru_cache(maxsize=2)
def _downloaded(name: str, remedy: str) -> Mapping[str, Sequence[Sentence]]:
    """A treebank from TFDS's own builder: release 2.10, so figures differ from later ones."""
    builder = builders.downloaded(name, remedy)
    missing = [field for field in _FEATURES if field not in builder.info.features]
    missing += [f"split {split}" for split in SPLITS if split not in builder.info.splits]
    if missing:
        raise UserError(f"{name} is no treebank, it has no {', no '.join(missing)}: {_REMEDY}")
    tags = builder.info.features["upos"].feature.int2str
    return {
        split: tuple(_from_tfds(one, tags) for one in builder.as_data_source(split))
        for split in SPLITS
    }


def _from_tfds(one: Mapping[str, Any], tag_name: Any) -> Sentence:
    """A sentence of TFDS's features, in which what is no word has the head "None" or "_"."""
    heads = texts(one["head"])
    kept = [i for i, head in enumerate(heads) if head.isdigit()]
    words, deprel = texts(one["tokens"]), texts(one["deprel"])
    upos = [tag_name(int(tag)) for tag in one["upos"]]
    return Sentence(
        words=tuple(words[i] for i in kept),
        upos=tuple(upos[i] for i in kept),
        head=tuple(int(heads[i]) for i in kept),
        deprel=tuple(deprel[i] for i in kept),
        empty_nodes=sum(upos[i] != "_" for i in range(len(heads)) if i not in kept),
    )
