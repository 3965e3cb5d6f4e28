"""Subwords are reversible to the byte, stored whole, and ask for no more than the text holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.options import UserError
from experiments.tasks.subwords import LEAST, Subwords

TEXTS = ["the dog and the cat", "der Hund und die Katze", "the doggerel of the dogs"] * 3


@pytest.fixture(scope="module")
def subwords():
    return Subwords.trained(TEXTS, LEAST + 20, "the text")


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(subwords, text):
    (ids,) = subwords.encode([text])
    assert subwords.decode(ids) == text
    assert (ids > 2).all()


def test_names_of_special_ids_are_plain_text(subwords):
    (ids,) = subwords.encode(["</s> <pad><s>"])
    assert len(ids) > 3
    assert subwords.decode([1, *ids, 2, 0]) == "</s> <pad><s>"


def test_what_is_stored_is_the_same_tokeniser(subwords, tmp_path):
    (tmp_path / "tokenizer.json").write_text(subwords.to_json())
    for again in (Subwords.from_json(subwords.to_json()), Subwords.named(str(tmp_path))):
        assert again.size == subwords.size == LEAST + 20
        assert again.encode(TEXTS)[2].tolist() == subwords.encode(TEXTS)[2].tolist()


def test_a_vocabulary_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"the text holds \d+ subwords .* at most that, got 5000"):
        Subwords.trained(TEXTS, 5000, "the text")
    with pytest.raises(UserError, match=f"at least {LEAST}, got 100"):
        Subwords.trained(TEXTS, 100, "the text")


def test_a_tokeniser_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"task\.tokenizer must be"):
        Subwords.named(str(tmp_path))
