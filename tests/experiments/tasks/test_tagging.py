import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.config import Reader, arm_config
from experiments.options import UserError
from experiments.tasks import conllu
from experiments.tasks.packing import Encoded, Epochs, Plan, pack
from experiments.tasks.tagging import Tagging, selects, split_train, within
from experiments.tasks.words import SUBWORDS, Features, Vocabulary

TAGS = {"the": "DET", "dog": "NOUN", "runs": "VERB", "fast": "ADV", "Anna": "PROPN"}


def conllu_text(*sentences: str) -> str:
    """Sentences in which each word depends on the first, which is the root."""
    blocks = []
    for sentence in sentences:
        rows = []
        for i, word in enumerate(sentence.split(), 1):
            head, relation = ("0", "root") if i == 1 else ("1", "dep")
            tag = TAGS.get(word, "X")
            rows.append("\t".join([str(i), word, "_", tag, "_", "_", head, relation, "_", "_"]))
        blocks.append("\n".join([f"# text = {sentence}", *rows]))
    return "\n\n".join(blocks) + "\n\n"


def random_sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    words = [*TAGS, *(f"w{i}ed" for i in range(50))]
    return [" ".join(generator.choice(words, generator.integers(1, 20))) for _ in range(count)]


@pytest.fixture
def treebank(tmp_path, monkeypatch):
    """A folder of 400 sentences to train and 40 to test, five of them copies."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    folder = tmp_path / "treebank"
    folder.mkdir()
    train = random_sentences(400, seed=0)
    test = ["the dog wugged fast", *random_sentences(34, seed=1), *train[:5]]
    (folder / "toy-train.conllu").write_text(conllu_text(*train))
    (folder / "toy-test.conllu").write_text(conllu_text(*test))
    return folder


def task(**options) -> Tagging:
    config = arm_config("tagging", **{f"task__{key}": value for key, value in options.items()})
    return Tagging(Reader(config).task)


@pytest.fixture(scope="module")
def english(data_folder, tmp_path_factory):
    """UD English EWT, prepared anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        return task(path=str(data_folder / "ud_english_ewt"))


BROKEN = {
    "ten fields": lambda line: line.rsplit("\t", 1)[0],
    "17 universal tags": lambda line: line.replace("NOUN", "NN"),
    "number of another word": lambda line: line.replace("\t1\tdep", "\t9\tdep"),
    "without gaps": lambda line: line.replace("2\tdog", "3\tdog"),
    "'head'": lambda line: line.replace("\t1\tdep", "\tone\tdep"),
    "names a relation": lambda line: line.replace("\tdep\t", "\t_\t"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_line_is_named_with_file_number_rule_and_text(treebank, rule):
    path = treebank / "toy-train.conllu"
    lines = conllu_text("the dog runs").splitlines()
    lines[2] = BROKEN[rule](lines[2])
    path.write_text(conllu_text("Anna runs") + "\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        task(path=str(treebank))
    message = str(caught.value)
    assert f"{path}, line 7: " in message
    assert rule in message
    assert repr(lines[2]) in message


def test_a_missing_folder_or_file_says_the_rule_and_the_remedy(treebank):
    with pytest.raises(UserError, match=r"must be a folder, got '/nowhere'.*--config.task.path"):
        task(path="/nowhere")
    (treebank / "toy-test.conllu").unlink()
    with pytest.raises(UserError, match=r"one file \*test.conllu .* got 0 .*\$ATTN_JAX_DATA"):
        task(path=str(treebank))


def test_a_failed_download_says_the_remedy(monkeypatch):
    def fail(*arguments, **keywords):
        raise ConnectionError("no network")

    monkeypatch.delenv("ATTN_JAX_DATA", raising=False)
    monkeypatch.setattr(conllu.tfds, "builder", fail)
    with pytest.raises(UserError, match=r"no network.*--config.task.path"):
        conllu.load("")


def test_contractions_and_empty_nodes_are_no_words(tmp_path):
    path = tmp_path / "a.conllu"
    text = conllu_text("the dog").replace("2\tdog", "1.1\twas" + "\t_" * 8 + "\n2\tdog")
    path.write_text(text.replace("1\tthe", "1-2\tthedog" + "\t_" * 8 + "\n1\tthe", 1))
    (sentence,) = conllu.read(path)
    assert (sentence.words, sentence.head) == (("the", "dog"), (0, 1))
    assert sentence.empty_nodes == 1


def test_sentences_come_back_from_tfds_as_they_were_read(treebank):
    loaded = conllu.load(str(treebank))
    for split, path in zip(conllu.SPLITS, conllu.find(treebank), strict=True):
        assert list(loaded[split]) == list(conllu.read(path))


def test_tfds_own_features_read_as_sentences():
    one = {
        "tokens": ["dont", "do", "nt", "was"],
        "upos": [2, 0, 1, 0],
        "head": ["None", "0", "1", "None"],
        "deprel": ["_", "root", "advmod", "None"],
    }
    sentence = conllu._from_tfds(one, ["VERB", "PART", "_"].__getitem__)
    expected = conllu.Sentence(("do", "nt"), ("VERB", "PART"), (0, 1), ("root", "advmod"), 1)
    assert sentence == expected


def test_copies_never_cross_and_one_of_twenty_selects(treebank):
    sentences = conllu.load(str(treebank))["train"]
    copies = [dataclasses.replace(one, deprel=("dep",) * len(one.words)) for one in sentences]
    splits = split_train([*sentences, *copies])
    keys = {name: {one.key for one in side} for name, side in splits.items()}
    assert not keys["train"] & keys["validation"]
    many = [dataclasses.replace(sentences[0], words=(str(i),)) for i in range(4000)]
    assert 0.04 < sum(map(selects, many)) / 4000 < 0.06


def test_a_share_of_the_sentences_trains_and_all_that_select_still_do(treebank):
    whole, half, quarter = (task(path=str(treebank), share=share) for share in (1.0, 0.5, 0.25))
    lengths = [one._corpus.facts["sentences"] for one in (quarter, half, whole)]
    assert lengths[0]["train"] < lengths[1]["train"] < lengths[2]["train"]
    for name in ("validation", "test"):
        assert len({length[name] for length in lengths}) == 1
    official = conllu.load(str(treebank))["train"]
    small, large = ({s.key for s in official if within(s, share)} for share in (0.25, 0.5))
    assert small < large


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_is_above_zero_and_at_most_the_whole(treebank, share):
    with pytest.raises(UserError, match=r"task\.share must be above 0 and at most 1"):
        task(path=str(treebank), share=share)


def test_features_come_from_train_alone(treebank):
    corpus = task(path=str(treebank), word_count=1, affix_count=1)._corpus
    train = split_train(conllu.load(str(treebank))["train"])["train"]
    assert corpus.vocabulary == Vocabulary.of(train, Features(1, 1))
    fields = corpus.vocabulary.encode(["wugged"])
    assert fields["word"][0] == 0
    assert "-gged" not in corpus.vocabulary.affixes
    assert corpus.vocabulary.affixes["-ed"] in fields["affixes"][0]


def test_subwords_of_train_are_a_bag_of_their_own(treebank):
    one = task(path=str(treebank), vocabulary=280)
    batch = next(iter(one.train(0)))
    assert batch["subwords"].shape == (*batch["word"].shape, SUBWORDS)
    subwords = one._corpus.vocabulary.subwords
    assert one.artefacts == {"tokenizer.json": subwords.to_json()}
    long = "abcdefghijklmnop"
    (bag,) = one._corpus.vocabulary.encode([long])["subwords"]
    assert long.startswith(subwords.decode(bag))
    assert one._corpus.vocabulary.cut([long, "dog"]) == 1
    again = task(path=str(treebank), vocabulary=280)
    assert again.describe()["data_sha256"] == one.describe()["data_sha256"]
    with pytest.raises(UserError, match="leave one of them out"):
        task(path=str(treebank), vocabulary=280, tokenizer="bert-base-cased")


class MyTreebank(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stands for a treebank that TFDS knows: prepared, so that it is found by its name alone."""

    VERSION = tfds.core.Version("1.0.0")
    name = "my_treebank"
    url_infos = {}  # noqa: RUF012

    def _info(self):
        text = tfds.features.Sequence(tfds.features.Text())
        tags = tfds.features.Sequence(tfds.features.ClassLabel(names=["NOUN", "VERB"]))
        features = {"tokens": text, "upos": tags, "head": text, "deprel": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "test")}

    def _generate_examples(self, name):
        for i in range(80):
            yield (
                i,
                {
                    "tokens": [f"{name}{i}", "runs"],
                    "upos": ["NOUN", "VERB"],
                    "head": ["2", "0"],
                    "deprel": ["nsubj", "root"],
                },
            )


def test_a_treebank_of_tfds_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    builder = MyTreebank(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    loaded = conllu.load("my_treebank")
    assert {len(loaded[split]) for split in conllu.SPLITS} == {80}
    assert loaded["test"][0].upos == ("NOUN", "VERB")


def test_a_batch_holds_whole_sentences_apart(treebank):
    one = task(path=str(treebank), row=24, batch_size=4)
    batch = next(iter(one.train(0)))
    length = {}
    for row, segment, position in zip(*map(np.ravel, _columns(batch)), strict=True):
        if segment:
            assert position == length.get((row, segment), 0)
            length[row, segment] = position + 1
    assert sorted(length.values())[-1] <= 24
    np.testing.assert_array_equal(batch["weight"], batch["segment"] > 0)
    assert not batch["word"][batch["segment"] == 0].any()


def _columns(batch):
    rows = np.broadcast_to(np.arange(4)[:, None], batch["segment"].shape)
    return rows, batch["segment"], batch["position"]


def test_an_epoch_holds_every_sentence_once_in_an_order_of_its_own():
    generator = np.random.default_rng(0)
    length = generator.integers(1, 12, 300)
    ids = np.arange(length.sum(), dtype=np.int32)
    encoded = Encoded({"word": ids}, length)
    plan = Plan.of(length[:, None], (16,))
    epochs = Epochs({"": encoded}, plan, plan.rows, ("tagging", "train", 0))
    seen = [epochs[i]["word"][epochs[i]["weight"] > 0] for i in range(3)]
    for words in seen:
        np.testing.assert_array_equal(np.sort(words), ids)
    assert not (seen[0] == seen[1]).all()
    assert plan.rows == pack(length[:, None], (16,))[3]


def test_training_resumes_where_it_stopped_and_follows_its_seed(treebank):
    one = task(path=str(treebank), row=24, batch_size=7)
    iterator = iter(one.train(1))
    for _ in range(30):
        next(iterator)
    state = iterator.get_state()
    ahead = [next(iterator) for _ in range(20)]
    resumed = iter(task(path=str(treebank), row=24, batch_size=7).train(1))
    resumed.set_state(state)
    for expected, got in zip(ahead, itertools.islice(resumed, 20), strict=True):
        for name in expected:
            np.testing.assert_array_equal(expected[name], got[name])
    other = next(iter(one.train(2)))
    assert (other["word"] != next(iter(one.train(1)))["word"]).any()


def test_items_follow_the_scores(treebank):
    one = task(path=str(treebank))
    items, (baseline,) = one.items("test"), one.baselines()
    weights = np.concatenate([batch["weight"].ravel() for batch in one.evaluation("test")])
    sentences = conllu.load(str(treebank))["test"]
    assert weights.sum() == len(items.cluster) == len(baseline.scores)
    assert np.isnan(items.distance).sum() == len(sentences)
    copied = np.unique(items.cluster[items.group == 1])
    assert {sentences[i].key for i in copied} >= {one.key for one in sentences[-5:]}
    targets = np.concatenate([batch["target"].ravel() for batch in one.evaluation("test")])
    names = np.array(one._corpus.classes)[targets[weights > 0]]
    for index, sentence in enumerate(sentences):
        assert tuple(names[items.cluster == index]) == sentence.upos


def test_a_row_too_short_for_the_test_split_and_an_unknown_target_stop_the_run(treebank):
    with pytest.raises(UserError, match=r"longest test sentence, \d+ words, got 4"):
        task(path=str(treebank), row=4)
    with pytest.raises(UserError, match=r"upos or deprel, got 'xpos'"):
        task(path=str(treebank), target="xpos")


def test_the_baseline_of_english_is_known(english):
    (baseline,) = english.baselines()
    assert baseline.scores.mean() == pytest.approx(0.862, abs=5e-4)
    assert len(baseline.scores) == 25_094


def test_padding_is_little_and_what_is_dropped_is_counted(english):
    facts = english.describe()
    assert facts["padding"] < 0.15
    batches = itertools.islice(english.train(0), 40)
    assert np.mean([batch["weight"].mean() for batch in batches]) > 0.85
    assert facts["dropped"]["train sentences of more than 96 words"] == 6
    assert facts["test_sentences_copied_from_train"] == 94
