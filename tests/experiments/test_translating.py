"""Translation end to end on a toy language: packed training, cached decoding, n-best lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.analysis import explain_by_position
from attn_jax.decoding import greedy, recomputing
from experiments.analysing import rows_of
from experiments.arm import make_program
from experiments.config import arm_config
from experiments.tasks.subwords import END, START
from experiments.translating import Search, n_best, translate

WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]
ENGLISH = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
ROW = 24
RULES = {
    "learned": {"rule": "learned"},
    "positions alone": {
        "rule": "gaussian(offset=(-1, 1))",
        "model__decoder_rule": "gaussian(offset=(-1, 0))",
        "model__cross_rule": "gaussian(width=1); learned:1, gaussian:1",
    },
    "rotary": {"rule": "learned", "model__position_encoding": "rotary"},
    "recurrent": {
        "rule": "additive",
        "model__kind": "recurrent",
        "model__hidden": 16,
        "model__num_layers": 1,
    },
}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    lines = set()
    while len(lines) < 900:
        ids = rng.integers(0, 8, rng.integers(1, 7))
        lines.add(f"{' '.join(ENGLISH[i] for i in ids)}\t{' '.join(WORDS[i] for i in ids)}")
    path = tmp_path_factory.mktemp("pairs") / "numbers.tsv"
    path.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="module")
def _own_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


def program(path, **overrides):
    config = arm_config(
        "translation",
        **{
            "task__data": str(path),
            "task__vocabulary": 280,
            "task__row": ROW,
            "task__batch_size": 4,
            "task__extra": 8,
            "model__features": 32,
            "model__num_heads": 2,
            "model__num_layers": 2,
            **overrides,
        },
    )
    return make_program(config)[0]


def model_of(one, seed=0):
    return nnx.merge(one.graph, one.init(np.int32(seed), np.float32(0)).params)


def alone(task, source, target):
    """A batch of one pair, at the beginning of a row that is empty behind it."""
    source, target = (task.subwords.encode([text])[0] for text in (source, target))
    ids = [*source, END], [START, *target], [*target, END]
    fields = {}
    for name, row in zip(("source", "target_in", "target"), ids, strict=True):
        behind = (0, ROW - len(row))
        fields[name] = np.pad(np.asarray(row, np.int32), behind)[None]
        side = name.split("_")[0]
        fields[f"{side}_segment"] = np.pad(np.ones(len(row), np.int32), behind)[None]
        fields[f"{side}_position"] = np.arange(ROW, dtype=np.int32)[None]
    return fields


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_packed_rows_and_steps_give_the_logits_of_a_pair_alone(name, pairs_file):
    one = program(pairs_file, **RULES[name])
    task, model = one.task, model_of(one)
    batch = dict(next(iter(task.train(0))))
    # compiled once for all pairs, whatever their lengths
    call, step = nnx.jit(lambda model, batch: model(batch)), nnx.jit(type(model).step)
    begin = nnx.jit(type(model).start, static_argnums=3)
    packed = call(model, batch)
    for segment in set(batch["target_segment"][0].tolist()) - {0}:
        row = {
            name: batch[name][0][batch[f"{name.split('_')[0]}_segment"][0] == segment]
            for name in ("source", "target", "target_in")
        }
        texts = (task.subwords.decode(row[side]) for side in ("source", "target"))
        expected = call(model, alone(task, *texts))[0, : len(row["target"])]
        np.testing.assert_allclose(
            packed[0][batch["target_segment"][0] == segment], expected, atol=2e-5
        )
        length = jnp.asarray([len(row["source"])])
        ids = jnp.asarray(np.pad(row["source"], (0, ROW - len(row["source"]))))[None]
        state = begin(model, ids, length, ROW)
        for position, token in enumerate(row["target_in"]):
            logits, state = step(model, jnp.asarray([token]), state)
            np.testing.assert_allclose(logits[0], expected[position], atol=2e-5)


@pytest.mark.parametrize(
    ("path", "queries", "keys"),
    [
        ("model/encoder/layers/0/attention", "source", "source"),
        ("model/decoder/layers/0/attention", "target", "target_in"),
        ("model/decoder/layers/0/cross", "target", "source"),
    ],
)
def test_an_attention_of_a_translator_has_its_own_sides(path, queries, keys, pairs_file):
    task = program(pairs_file).task
    batch = dict(next(iter(task.train(0))))
    np.testing.assert_array_equal(task.present(batch, path), batch[f"{queries}_segment"] > 0)
    np.testing.assert_array_equal(task.key_tokens(batch, path), batch[keys])


@pytest.mark.slow
def test_cross_attention_by_distance_is_explained_by_it(pairs_file):
    """Queries and aligned keys lie apart by real numbers, not by whole positions."""
    one = program(pairs_file, model__cross_rule="gaussian", model__num_layers=1, model__num_heads=1)
    fitted_on, held_out = (
        rows_of(one.task, model_of(one), split, 2, 100)["model/decoder/layers/0/cross"]
        for split in ("validation", "test")
    )
    for head in explain_by_position(fitted_on, held_out):
        assert head.plain.share > 0.99
        assert head.plain.scale == pytest.approx(1, rel=0.02)


@pytest.mark.slow
def test_a_translator_learns_and_decodes_the_same_in_any_company(pairs_file):
    one = program(pairs_file, model__cross_rule="gaussian(width=0.5)", model__num_layers=1)
    task = one.task
    batches = iter(task.train(0))
    lane = one.init(np.int32(0), np.float32(1e-2))
    step = jax.jit(one.step)
    for index in range(100):
        lane, _ = step(lane, dict(next(batches)), np.int32(index), np.float32(100))
    model = one.model(lane.params)
    sources = ["zwei drei", "", "eins acht acht vier", "sieben", "fünf sechs sechs eins zwei vier"]
    truth = [" ".join(ENGLISH[WORDS.index(w)] for w in s.split()) for s in sources]
    search = Search(beam=3, extra=8)
    found = translate(model, task.subwords, sources, search, batch_size=2)
    right = [f.text == t for f, t in zip(found, truth, strict=True)]
    assert any(right)
    again = translate(model, task.subwords, sources[::-1], search, batch_size=5)[::-1]
    assert [f.tokens for f in again] == [f.tokens for f in found]
    every = n_best(model, task.subwords, sources, search, batch_size=2)
    for lists, best in zip(every, found, strict=True):
        assert lists[0].tokens == best.tokens
        assert [h.score for h in lists] == sorted((h.score for h in lists), reverse=True)
    scores = task.decoded_scores(model, "test")
    assert scores.shape == (len(task.items("test").cluster), 10)
    assert task.metric.mean(scores, np.ones(len(scores))) > 30
    _cached_is_uncached(model, task, sources[0])


def _cached_is_uncached(model, task, source):
    """Greedy decoding with the cache and by the whole prefix anew, token for token."""
    (ids,) = task.subwords.encode([source])
    ids = jnp.asarray([[*ids, END]])
    length = jnp.asarray([ids.shape[1]])

    def logits_of(tokens, position, source):
        fields = {
            "source": source,
            "source_segment": jnp.ones_like(source),
            "source_position": jnp.arange(source.shape[1])[None],
            "target_in": tokens,
            "target_segment": jnp.ones_like(tokens),
            "target_position": jnp.arange(tokens.shape[1])[None],
        }
        return jnp.take_along_axis(model(fields), position[:, None, None], 1)[:, 0]

    start = jnp.asarray([START])
    step, state = recomputing(logits_of, 1, 10, ids)
    uncached = greedy(step, state, start, end=END, max_length=10)
    cached = greedy(model.step, model.start(ids, length, 10), start, end=END, max_length=10)
    np.testing.assert_array_equal(cached.tokens, uncached.tokens)
    np.testing.assert_allclose(cached.log_probability, uncached.log_probability, atol=1e-4)
