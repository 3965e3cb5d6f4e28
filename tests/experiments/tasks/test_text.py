"""text: no duplicate crosses the splits, every byte is scored once, n-grams sum to one."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.options import UserError
from experiments.tasks.corpus import Corpus, read_texts
from experiments.tasks.ngrams import WittenBell
from experiments.tasks.text import since_last
from tests.experiments.tasks.variants import make


@pytest.fixture(scope="module")
def task():
    return make("text")


def as_bytes(text):
    return np.frombuffer(text.encode(), np.uint8)


def test_no_paragraph_is_in_two_splits(task):
    seen = {
        split: {p for d in documents for p in d.tobytes().split(b"\n\n")}
        for split, documents in task.corpus.documents.items()
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert not set(task.corpus.component["train"]) & set(task.corpus.component["test"])


def test_documents_that_share_a_paragraph_stay_together():
    shared = "shared paragraph " * 5
    texts = {f"t{i}": f"{f'own text of number {i} ' * 5}\n\n{shared}" for i in range(6)}
    corpus = Corpus(texts | {"other": "something else entirely " * 4})
    sizes = sorted(len(documents) for documents in corpus.documents.values())
    assert 6 in sizes or 7 in sizes
    assert corpus.dropped["bytes of repeated paragraphs"] == 5 * len(shared)


def test_every_test_byte_is_scored_once(task):
    batches = task.evaluation("test")
    targets = np.concatenate([b["target"][b["weight"] > 0] for b in batches])
    expected = np.concatenate(task.corpus.documents["test"])
    np.testing.assert_array_equal(targets, expected)


def test_inputs_are_the_bytes_before_the_targets(task):
    for batch in (next(iter(task.train(0))), task.evaluation("test")[0]):
        kept = batch["weight"][:, 1:] * batch["weight"][:, :-1] > 0
        np.testing.assert_array_equal(batch["token"][:, 1:][kept], batch["target"][:, :-1][kept])


def test_probabilities_of_all_bytes_sum_to_one():
    model = WittenBell([as_bytes("abracadabra"), as_bytes("abba")], 3)
    for history in ("ab", "zz", "ra", ""):
        total = sum(model.probability(as_bytes(history + chr(byte)))[-1] for byte in range(128))
        # the other 128 bytes were never seen: each has what is left to an unseen byte
        unseen = model.probability(np.append(as_bytes(history), np.uint8(200)))[-1]
        assert total + 128 * unseen == pytest.approx(1.0, rel=1e-9)


def test_a_bigram_by_hand():
    model = WittenBell([as_bytes("abab")], 2)
    unigram = (2 + 2 / 256) / (4 + 2)
    # after "a" came "b" twice and nothing else: c = 2, total = 2, types = 1
    assert model.probability(as_bytes("ab"))[1] == pytest.approx((2 + unigram) / (2 + 1))
    assert model.probability(as_bytes("ab"))[0] == pytest.approx(unigram)


def test_longer_grams_are_better(task):
    bits = [baseline.scores.mean() for baseline in task.baselines()]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == pytest.approx(4.7, abs=0.2)


def test_distance_since_the_preceding_four_bytes():
    distance = since_last(as_bytes("abcdXabcdY"))
    assert distance[9] == 5
    assert np.isnan(distance[:9]).all()


def test_folders_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph number {i} " * 8 for i in range(400)))
    task = make("text", path=str(tmp_path), row=64)
    assert all(task.corpus.documents.values())
    with pytest.raises(UserError, match="there is no folder or data set"):
        read_texts(str(tmp_path / "nowhere"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8 at byte 0"):
        read_texts(str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    """Texts of their own paragraphs, with letters of two bytes."""
    for index in range(12):
        words = [f"wörd{(7 * index + i) % 41} of {index}" for i in range(60)]
        (tmp_path / f"{index}.txt").write_text(" ".join(words))
    return tmp_path


def test_subwords_are_scored_in_bits_per_byte(folder):
    whole, pieces = (make("text", path=str(folder), row=16, vocabulary=v) for v in (0, 300))
    bits, sizes = [], []
    for one in (whole, pieces):
        weights = [batch["weight"] for batch in one.evaluation("test")]
        sizes.append(sum(weight.sum() for weight in weights))
        kept = np.concatenate([weight[weight > 0] for weight in weights])
        assert len(kept) == len(one.items("test").distance)
        bits.append([np.average(b.scores, weights=kept) for b in one.baselines()])
    expected = sum(map(len, whole.corpus.documents["test"]))
    assert sizes == [expected, expected]
    np.testing.assert_allclose(*bits, rtol=1e-12)
    assert pieces.describe()["bytes_per_token"] > 2
    batch = next(iter(pieces.train(0)))
    assert set(np.unique(batch["weight"])) == {1}
    text = pieces.subwords.decode(batch["target"][0])
    assert text.encode() in b"".join(d.tobytes() for d in pieces.corpus.documents["train"]) or (
        "\N{REPLACEMENT CHARACTER}" in text
    )


def test_a_vocabulary_and_a_tokeniser_are_one_too_many(folder):
    with pytest.raises(UserError, match="leave one of them out"):
        make("text", path=str(folder), tokenizer="gpt2", vocabulary=300)


class MyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stands for a set that TFDS knows: prepared, so that it is found by its name alone."""

    VERSION = tfds.core.Version("1.0.0")
    name = "my_texts"
    url_infos = {}  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "stars": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "test")}

    def _generate_examples(self, name):
        for i in range(4):
            yield i, {"text": f"a text of {name}, the number {i}", "stars": i}


def test_a_set_of_tfds_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    MyTexts(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    texts = read_texts("my_texts")
    assert len(texts) == 8
    assert texts["test-0000001#000000"] == "a text of test, the number 1"
    with pytest.raises(UserError, match=r"there is no folder or data set '/no/where'.*task\.path"):
        read_texts("/no/where")
