"""text: no duplicate crosses the splits, every byte is scored once, n-grams sum to one."""

import numpy as np
import pytest

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
    with pytest.raises(UserError, match=r"must be a folder of \*\.txt"):
        read_texts(str(tmp_path / "nowhere"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8 at byte 0"):
        read_texts(str(tmp_path))
