"""Pairs of sentences: reading, clear errors, splits that no sentence crosses, near neighbours."""

import gzip
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.options import UserError
from experiments.tasks import pairs
from experiments.tasks.pairs import Neighbours, Reading, components, key, load, read

READING = Reading("de", "en", ("en", "de"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


def lines(count, first=0):
    return "".join(f"English {i}.\tDeutsch {i}.\n" for i in range(first, first + count))


def test_lines_with_tabs_come_back_in_order(tmp_path):
    path = tmp_path / "all.txt.gz"
    path.write_bytes(gzip.compress(lines(2500).encode()))
    split = load(str(path), READING)
    found = sorted(
        pair for one in split.values() for pair in zip(one.source, one.target, strict=True)
    )
    assert found == sorted((f"Deutsch {i}.", f"English {i}.") for i in range(2500))
    trained = [int(s.split()[1][:-1]) for s in split["train"].source]
    assert trained == sorted(trained)
    assert [len(split[name]) / 2500 for name in ("validation", "test")] == pytest.approx(
        [0.01, 0.02], abs=0.01
    )


def test_files_of_splits_and_parallel_files(tmp_path):
    for split, count in (("train", 5), ("validation", 2), ("test", 1)):
        (tmp_path / f"{split}.de").write_text("".join(f"{split} {i}\n" for i in range(count)))
        (tmp_path / f"{split}.en").write_text("".join(f"{i}\n" for i in range(count)))
    split = load(str(tmp_path), READING)
    assert {name: len(one) for name, one in split.items()} == {
        "train": 5,
        "validation": 2,
        "test": 1,
    }
    assert list(split["validation"].source) == ["validation 0", "validation 1"]
    assert list(split["validation"].target) == ["0", "1"]


class MyTranslate(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stands for a set that TFDS knows: prepared, so that it is found by its name alone."""

    VERSION = tfds.core.Version("1.0.0")
    name = "my_translate"
    url_infos = {}  # noqa: RUF012

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"de": text, "en": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "validation", "test")}

    def _generate_examples(self, name):
        for i in range(3):
            yield i, {"de": f"{name} {i}", "en": f"{i}"}


def test_a_set_of_tfds_by_name(tmp_path):
    builder = MyTranslate(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    split = load("my_translate", READING)
    assert sorted(split["test"].source) == ["test 0", "test 1", "test 2"]
    with pytest.raises(UserError, match="no language 'fr', it has: "):
        load("my_translate", Reading("fr", "en", ("fr", "en")))


BAD = {
    "no tab": (
        b"a\tb\nonly one\n",
        r"bad\.tsv, line 2: a line has 2 columns.*--config.task.columns",
    ),
    "not UTF-8": (b"a\tb\n\xff\tx\n", r"bad\.tsv, line 2: not UTF-8 at byte 0"),
    "empty": (b"", r"bad\.tsv is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_with_line_and_remedy(kind, tmp_path):
    content, message = BAD[kind]
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(str(path), READING)


def test_more_bad_input(tmp_path):
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(gzip.compress(lines(1000).encode())[:-20])
    with pytest.raises(UserError, match=r"cut\.tsv\.gz, after line \d+: no whole gzip file"):
        load(str(cut), READING)
    (tmp_path / "train.de").write_text("a\nb\n")
    with pytest.raises(UserError, match="no counterpart"):
        load(str(tmp_path), READING)
    (tmp_path / "train.en").write_text("a\n")
    with pytest.raises(UserError, match=r"train\.de has 2 and .*train\.en has 1"):
        load(str(tmp_path), READING)
    with pytest.raises(UserError, match="must differ"):
        Reading("de", "de", ("de", "en"))
    with pytest.raises(UserError, match=r"task\.columns must name .* without 'fr'"):
        Reading("fr", "en", ("en", "de"))
    with pytest.raises(UserError, match="no file, folder or data set"):
        load("/no/such.tsv", READING)


def test_a_column_may_be_passed_over(tmp_path):
    path = tmp_path / "three.tsv"
    path.write_text("Hi.\tHallo.\tCC-BY\n")
    found = list(read((path,), Reading("de", "en", ("en", "de", ""))))
    assert found == [("Hallo.", "Hi.")]


def test_pairs_that_share_a_sentence_are_one_group():
    source = ["Hallo!", "hallo", "Guten Tag", "Tag", "Nein"]
    target = ["Hi", "Hello", "Hello", "Day", "No"]
    group = components(source, target)
    assert group[0] == group[1] == group[2]
    assert len(set(group[2:].tolist())) == 3


def test_no_sentence_crosses_a_split():
    rng = np.random.default_rng(0)
    source = [f"quelle {i}" for i in rng.integers(0, 4000, 6000)]
    target = [f"target {i}" for i in rng.integers(0, 40_000, 6000)]
    splits = pairs._split({"pairs": (source, target)})
    keys = {
        name: {key(text) for text in (*one.source, *one.target)} for name, one in splits.items()
    }
    for a, b in itertools.combinations(keys.values(), 2):
        assert not a & b
    assert sum(map(len, splits.values())) == 6000


def _distance(a, b):
    """Levenshtein's, of words."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_neighbours_are_those_within_one_word():
    rng = np.random.default_rng(1)
    draw = lambda: " ".join(rng.choice(list("abc"), rng.integers(1, 6)))  # noqa: E731
    train = [draw() for _ in range(12)]
    near = Neighbours(train)
    found = []
    for _ in range(400):
        one = draw()
        truth = any(_distance(one.split(), other.split()) <= 1 for other in train)
        found.append(truth)
        assert (one in near) == truth, one
    assert 0.1 < np.mean(found) < 0.9
