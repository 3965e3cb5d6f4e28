"""Decoding against enumeration, a plain beam search without early stopping, and real models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.decoding import (
    beam_search,
    greedy,
    length_penalty,
    recomputing,
    sample,
    score,
)
from attn_jax.nn import Decoder
from tests.nn.models import FEATURES, HEADS, inputs, randomised

END, PAD = 0, 9
# one shape for most tests, so that they share compiled programs
BATCH, LENGTH, VOCABULARY = 12, 8, 5
ALPHAS = (0.0, 0.6, 1.0, -0.5)
METHODS = {
    "greedy": (greedy, {}),
    "sample": (sample, {"temperature": 1.3, "top_p": 0.9}),
    "beam_search": (beam_search, {"beam_size": 3, "alpha": np.float32(0.6)}),
}


def random_table(seed, batch=BATCH, length=LENGTH, vocabulary=VOCABULARY):
    """Logits of the next token by sequence, position, last token but one and last token."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, vocabulary, vocabulary, vocabulary)
    return (1.5 * rng.normal(size=shape)).astype(np.float32)


def table_step(tokens, state):
    def look_up(table, position, before, last):
        return table[position, before, last]

    logits = jax.vmap(look_up)(state["table"], state["position"], state["before"], tokens)
    return logits, state | {"position": state["position"] + 1, "before": tokens}


def table_state(table):
    zeros = jnp.zeros(len(table), jnp.int32)
    return {"table": jnp.asarray(table), "position": zeros, "before": zeros}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run(method, table, start, data, options):
    state = table_state(table)
    return method(table_step, state, start, end=END, pad=PAD, **data, **dict(options))


def run(method, table, *, max_length=LENGTH, max_lengths=None, **arguments):
    """What `method` decodes, in NumPy; numbers and names are static, arrays are data."""
    start = np.ones(len(table), np.int32)
    data = {name: x for name, x in arguments.items() if hasattr(x, "shape")}
    options = {name: x for name, x in arguments.items() if name not in data}
    data["max_lengths"] = np.full(len(table), max_length) if max_lengths is None else max_lengths
    static = tuple(sorted((options | {"max_length": max_length}).items()))
    return jax.tree.map(np.asarray, _run(method, table, start, data, static))


def decode(name, table, *, keys=None, **arguments):
    """What a method decodes under the options that the tests of all methods share."""
    method, options = METHODS[name]
    if method is sample:
        options = options | {"key": row_keys(len(table)) if keys is None else keys}
    return run(method, table, **options, **arguments)


def rows(result, which):
    """Some rows of a result."""
    return jax.tree.map(lambda leaf: leaf[which], result)


def row_keys(batch):
    return jax.random.split(jax.random.key(7), batch)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits)


def next_log_probability(table, tokens):
    """Of every token after the tokens written; the start symbol is 1, and 0 comes before it."""
    before, last = (0, 1, *tokens)[-2:]
    return log_softmax(table[len(tokens), before, last])


def every_output(table, limit, tokens=(), total=0.0):
    """(tokens, log-probability) of all possible outputs of one sequence."""
    if len(tokens) == limit:
        yield tokens, total
        return
    for token, likelihood in enumerate(next_log_probability(table, tokens)):
        more = (*tokens, token), total + likelihood
        if token == END and likelihood > -np.inf:
            yield more
        elif likelihood > -np.inf:
            yield from every_output(table, limit, *more)


def penalised(tokens, total, alpha):
    return total / ((5 + len(tokens)) / 6) ** alpha


def plain_beam_search(table, limit, beam_size, alpha):
    """The outputs of a search that runs to the limit, and after how many steps it might stop."""
    opened, kept, needed = [((), 0.0)], [], None
    for written in range(1, limit + 1):
        extended = [
            ((*tokens, token), total + likelihood)
            for tokens, total in opened
            for token, likelihood in enumerate(next_log_probability(table, tokens))
            if likelihood > -np.inf
        ]
        extended.sort(key=lambda output: -output[1])
        complete = [output[0][-1] == END or written == limit for output in extended]
        kept += [output for output, c in zip(extended[:beam_size], complete, strict=False) if c]
        kept = sorted(kept, key=lambda output: -penalised(*output, alpha))[:beam_size]
        opened = [output for output, c in zip(extended, complete, strict=True) if not c]
        opened = opened[:beam_size]
        worst = penalised(*kept[-1], alpha) if len(kept) == beam_size else -np.inf
        lengths = range(written + 1, limit + 1)
        reachable = [penalised(range(n), total, alpha) for _, total in opened for n in lengths]
        if needed is None and not any(r > worst for r in reachable):
            needed = written
    return kept, needed


def check_beams(beams, row, expected, alpha):
    """Whether a row of the result is a list of (tokens, log-probability), best first."""
    for rank, (tokens, total) in enumerate(expected):
        finished = bool(tokens) and tokens[-1] == END
        padded = np.full(beams.tokens.shape[-1], PAD)
        padded[: len(tokens)] = tokens
        np.testing.assert_array_equal(beams.tokens[row, rank], padded)
        assert beams.finished[row, rank] == finished
        assert beams.lengths[row, rank] == len(tokens) - finished
        np.testing.assert_allclose(beams.log_probability[row, rank], total, rtol=1e-5, atol=1e-6)
        expected_score = penalised(tokens, total, alpha)
        np.testing.assert_allclose(beams.score[row, rank], expected_score, rtol=1e-5, atol=1e-6)
    rest = jax.tree.map(lambda leaf: leaf[row, len(expected) :], beams)
    assert np.all(rest.tokens == PAD)
    assert not np.any(rest.lengths)
    assert not np.any(rest.finished)
    assert np.all(rest.score == -np.inf)
    assert np.all(rest.log_probability == -np.inf)


def check_equal(actual, expected):
    """Tokens alike, log-probabilities up to rounding."""
    for x, y in zip(actual, expected, strict=True):
        compare = np.testing.assert_array_equal
        if np.issubdtype(x.dtype, np.floating):
            compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
        compare(x, y)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_wide_beam_finds_every_output(alpha):
    table = random_table(0, batch=3, length=4, vocabulary=3)
    table[0, 0, 0, 1, 2] = table[0, 2, :, :, END] = -np.inf
    table[1, :, :, :, END] += 4
    limits = np.array([4, 4, 3])
    beams = run(
        beam_search, table, max_length=4, max_lengths=limits, beam_size=32, alpha=np.float32(alpha)
    )
    for row, limit in enumerate(limits):
        outputs = sorted(every_output(table[row], limit), key=lambda o: -penalised(*o, alpha))
        assert len(outputs) < 32
        np.testing.assert_allclose(
            np.logaddexp.reduce([total for _, total in outputs]), 0, atol=1e-9
        )
        check_beams(beams, row, outputs, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_narrow_beam_is_a_search_that_never_stops_early(beam_size, alpha):
    table = random_table(1)
    beams = run(beam_search, table, beam_size=beam_size, alpha=np.float32(alpha))
    for row in range(BATCH):
        expected, _ = plain_beam_search(table[row], LENGTH, beam_size, alpha)
        check_beams(beams, row, expected, alpha)


@jax.jit
def _counted_steps(table, alpha):
    """How often a search calls its step."""

    def step(tokens, state):
        jax.debug.callback(_STEPS.append, state["position"][0])
        return table_step(tokens, state)

    start = jnp.ones(len(table), jnp.int32)
    options = {"max_length": 8, "beam_size": 2, "alpha": alpha}
    return beam_search(step, table_state(table), start, end=END, **options).lengths


_STEPS = []


def counted_steps(table, alpha):
    _STEPS.clear()
    jax.block_until_ready(_counted_steps(table, np.float32(alpha)))
    jax.effects_barrier()
    return len(_STEPS)


def test_the_search_stops_as_soon_as_nothing_can_be_overtaken():
    table = random_table(2, batch=10, length=8, vocabulary=4)
    table[..., END] += 1
    steps = {alpha: [counted_steps(row[None], alpha) for row in table] for alpha in ALPHAS}
    for alpha in ALPHAS:
        assert steps[alpha] == [plain_beam_search(row, 8, 2, alpha)[1] for row in table]
    assert min(steps[0.0]) < 8
    assert steps[1.0] != steps[0.0] != steps[-0.5]


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_one_beam_is_greedy(alpha):
    table = random_table(3)
    expected = run(greedy, table)
    assert 0 < expected.finished.sum() < BATCH
    beams = run(beam_search, table, beam_size=1, alpha=np.float32(alpha))
    beam = rows(beams, (slice(None), 0))
    check_equal((beam.tokens, beam.lengths, beam.finished), expected[:2] + expected[3:])
    np.testing.assert_allclose(beam.log_probability, expected.log_probability, rtol=1e-5)


def test_logits_closer_than_log_probabilities_can_be_are_told_apart():
    table = np.zeros_like(random_table(0))
    table[..., END], table[..., 3] = -np.inf, 1e-12
    beams = run(beam_search, table, beam_size=1, alpha=np.float32(0))
    np.testing.assert_array_equal(run(greedy, table).tokens, 3)
    np.testing.assert_array_equal(beams.tokens, 3)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_sampling_without_chance_is_greedy(options):
    table = random_table(3)
    check_equal(run(sample, table, key=jax.random.key(0), **options), run(greedy, table))


def test_greedy_takes_the_likeliest_token():
    table = random_table(4)
    decoded = run(greedy, table)
    for row in range(BATCH):
        tokens = ()
        while len(tokens) < LENGTH and tokens[-1:] != (END,):
            tokens += (int(next_log_probability(table[row], tokens).argmax()),)
        padded = [*tokens, *[PAD] * (LENGTH - len(tokens))]
        np.testing.assert_array_equal(decoded.tokens[row], padded)
        assert decoded.finished[row] == (tokens[-1] == END)
        assert decoded.lengths[row] == len(tokens) - (tokens[-1] == END)


LOGITS = np.array([0.5, -1.0, 2.0, 1.0, -np.inf, 0.0], np.float32)


def truncated_distribution(temperature=1.0, top_k=6, top_p=1.0):
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k:]] = 0
    p /= p.sum()
    enough = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    p[order[enough:]] = 0
    return p / p.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
    ],
    ids=str,
)
def test_frequencies_of_samples(options):
    draws = 20_000

    def step(tokens, state):
        return jnp.broadcast_to(LOGITS[None], (draws, 6)), state

    start = jnp.zeros(draws, jnp.int32)
    write = jax.jit(lambda key: sample(step, (), start, key=key, end=4, max_length=2, **options))
    first, second = np.asarray(write(jax.random.key(0)).tokens).T
    p = truncated_distribution(**options)
    joint = np.bincount(6 * first + second, minlength=36).reshape(6, 6) / draws
    # five standard errors: one cell in two million fails by chance
    for actual, expected in ((joint.sum(0), p), (joint.sum(1), p), (joint, np.outer(p, p))):
        assert np.all(np.abs(actual - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws))


@pytest.mark.slow
def test_samples_follow_their_keys():
    table = random_table(5)
    one = functools.partial(run, sample, table, temperature=1.3, top_p=0.9)
    first = one(key=jax.random.key(3))
    assert np.any(first.tokens != one(key=jax.random.key(4)).tokens)
    folded = jnp.stack([jax.random.fold_in(jax.random.key(3), row) for row in range(BATCH)])
    check_equal(one(key=folded), first)
    raw = jax.random.PRNGKey(3)
    fewer = run(sample, table[:4], key=raw, temperature=1.3, top_p=0.9)
    check_equal(fewer, rows(first, slice(4)))


@pytest.mark.parametrize("name", METHODS)
def test_the_rest_of_the_batch_changes_nothing(name):
    table, keys = random_table(6), row_keys(BATCH)
    limits = np.array([8, 3, 8, 5, 1, 8, 8, 7, 8, 2, 8, 8])
    whole = decode(name, table, max_lengths=limits, keys=keys)
    order = np.random.default_rng(0).permutation(BATCH)
    moved = decode(name, table[order], max_lengths=limits[order], keys=keys[order])
    check_equal(moved, rows(whole, order))
    others, other_limits, same = table.copy(), limits.copy(), np.array([0, 3, 6, 7, 8])
    others[1], others[2], others[4, ..., END], others[5] = np.nan, -np.inf, 9, -others[5]
    other_limits[9:] = [8, 0, 2]
    mixed = decode(name, others, max_lengths=other_limits, keys=keys)
    check_equal(rows(mixed, same), rows(whole, same))


@pytest.mark.parametrize("name", METHODS)
def test_room_behind_the_limit_changes_nothing(name):
    table = random_table(7)
    table[:3, ..., END] -= 9
    short = decode(name, table, max_length=5)
    long = decode(name, table, max_lengths=np.full(BATCH, 5))
    assert not np.all(short.finished)
    assert np.all(long.tokens[..., 5:] == PAD)
    check_equal(long._replace(tokens=long.tokens[..., :5]), short)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_a_limit_cuts_what_would_be_written(name):
    table = random_table(8)
    whole = decode(name, table)
    limits = np.array([-3, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 100])
    cut = decode(name, table, max_lengths=limits)
    within = np.arange(LENGTH)[None] < limits[:, None]
    np.testing.assert_array_equal(cut.tokens, np.where(within, whole.tokens, PAD))
    np.testing.assert_array_equal(cut.finished, whole.finished & (whole.lengths < limits))
    np.testing.assert_array_equal(cut.lengths, np.minimum(whole.lengths, limits.clip(0)))
    assert 0 < cut.finished.sum() < whole.finished.sum()
    np.testing.assert_array_equal(cut.log_probability[:2], 0)


def test_limits_of_a_beam_search():
    table = random_table(8)
    limits = np.array([1, 2, 3, 4, 5, 6, 7, 8, 1, 100, 0, -1])
    beams = decode("beam_search", table, max_lengths=limits)
    for row, limit in enumerate(limits[:-2].clip(max=LENGTH)):
        check_beams(beams, row, plain_beam_search(table[row], limit, 3, 0.6)[0], 0.6)
    for row in (10, 11):
        check_beams(beams, row, [((), 0.0)], 0.6)


@jax.jit
def scores(table, tokens, lengths, finished):
    start = jnp.ones(len(table), jnp.int32)
    state = table_state(table)
    return score(table_step, state, start, tokens, lengths, end=END, finished=finished)


def test_scores_of_given_outputs():
    table = random_table(9)[0]
    table[1, 1, 2, 3] = -np.inf
    outputs = list(every_output(table, 3))
    tables = np.broadcast_to(table, (BATCH, *table.shape))
    for at in range(0, len(outputs) - BATCH, BATCH):
        chosen, expected = zip(*outputs[at : at + BATCH], strict=True)
        finished = np.array([tokens[-1] == END for tokens in chosen])
        lengths = np.array([len(tokens) for tokens in chosen]) - finished
        tokens = np.array([[*tokens, *[PAD] * LENGTH][:LENGTH] for tokens in chosen])
        actual = scores(tables, tokens, lengths, finished)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    as_ended = scores(tables, tokens, lengths, None)
    np.testing.assert_allclose(as_ended, scores(tables, tokens, lengths, np.ones(BATCH, bool)))
    full = scores(tables, np.ones((BATCH, LENGTH), int), np.full(BATCH, LENGTH), None)
    assert np.all(np.isfinite(full))


def test_impossible_outputs_have_probability_zero():
    table = random_table(9)
    table[0, 1, 1, 2, 1] = -np.inf
    table[1, 1], table[2, 1], table[3, 1, ..., 3] = -np.inf, np.nan, np.inf
    tokens = np.full((BATCH, LENGTH), 1)
    tokens[:, 0], tokens[4, 1], tokens[5, 0] = 2, VOCABULARY, -1
    uncut = np.zeros(BATCH, bool)
    impossible = np.arange(BATCH) < 6
    for length, expected in ((2, impossible), (1, np.arange(BATCH) == 5)):
        actual = scores(table, tokens, np.full(BATCH, length), uncut)
        np.testing.assert_array_equal(actual == -np.inf, expected)
        assert np.all(np.isfinite(actual) | expected)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_scores_repeat_log_probabilities(name):
    table = random_table(10)
    decoded = decode(name, table)
    actual = scores(table, decoded.tokens, decoded.lengths, decoded.finished)
    np.testing.assert_allclose(actual, decoded.log_probability, rtol=1e-5)


def test_scores_repeat_those_of_beams():
    table = random_table(10)
    beams = decode("beam_search", table)
    for rank in range(3):
        beam = rows(beams, (slice(None), rank))
        actual = scores(table, beam.tokens, beam.lengths, beam.finished)
        np.testing.assert_allclose(actual, beam.log_probability, rtol=1e-5)
        penalty = length_penalty(beam.lengths + beam.finished, 0.6)
        np.testing.assert_allclose(beam.score, beam.log_probability / penalty, rtol=1e-5)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_logits_that_are_no_distribution_end_a_sequence_unfinished(name):
    table = random_table(11)
    table[..., END] = -np.inf
    whole = decode(name, table)
    broken = table.copy()
    broken[0, 3], broken[1, 3, ..., 2], broken[2, 3, ..., 2] = -np.inf, np.nan, np.inf
    decoded = decode(name, broken)
    np.testing.assert_array_equal(decoded.lengths, [3, 3, 3, *[LENGTH] * (BATCH - 3)])
    np.testing.assert_array_equal(decoded.tokens[:3, :3], whole.tokens[:3, :3])
    np.testing.assert_array_equal(decoded.tokens[:3, 3:], PAD)
    np.testing.assert_array_equal(decoded.log_probability[:3], -np.inf)
    assert not np.any(decoded.finished)
    check_equal(rows(decoded, slice(3, None)), rows(whole, slice(3, None)))


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_a_beam_search_drops_hypotheses_without_a_distribution(value):
    table = random_table(12, batch=3, length=4, vocabulary=3)
    table[0, 0, 0, 1] = [-1, 3, 0]
    broken = table.copy()
    broken[0, 1, 1, 1], broken[1, 1:] = value, value
    broken[1, 0, 0, 1, END] = -np.inf
    beams = run(beam_search, broken, max_length=4, beam_size=32, alpha=np.float32(0))
    rest = [output for output in every_output(table[0], 4) if output[0][0] != 1]
    check_beams(beams, 0, sorted(rest, key=lambda output: -output[1]), 0.0)
    check_beams(beams, 1, [], 0.0)


def test_a_search_is_compiled_once():
    traces, results = [], []

    def step(tokens, state):
        traces.append(tokens.shape)
        return table_step(tokens, state)

    @jax.jit
    def search(table, start, limits, alpha, key):
        state, options = table_state(table), {"end": END, "max_length": 4, "max_lengths": limits}
        drawn = sample(step, state, start, key=key, **options)
        return drawn, beam_search(step, state, start, beam_size=2, alpha=alpha, **options)

    for seed in range(3):
        table, start = random_table(seed, 2, 4, 3), np.full(2, seed)
        data = (np.array([4, seed]), np.float32(seed - 1), jax.random.key(seed))
        results.append(search(table, start, *data)[1].score[0])
        count = len(traces) if seed == 0 else count
    assert len(traces) == count
    assert not np.allclose(results[0], results[1])


def test_dtypes():
    def dtypes(dtype):
        def results(table, start, key):
            options = {"end": END, "max_length": 4}
            state = table_state(table)
            return (
                greedy(table_step, state, start, **options),
                sample(table_step, state, start, key=key, top_k=2, top_p=0.5, **options),
                beam_search(table_step, state, start, beam_size=2, alpha=0.6, **options),
                score(table_step, state, start, start[:, None], start, end=END),
            )

        table = jax.ShapeDtypeStruct((2, 4, 3, 3, 3), dtype)
        shapes = jax.eval_shape(
            results, table, jax.ShapeDtypeStruct((2,), jnp.int32), jax.random.key(0)
        )
        leaves = jax.tree.leaves(shapes)
        assert {x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.integer)} == {
            jnp.dtype("int32")
        }
        return {x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}

    assert dtypes(jnp.bfloat16) == dtypes(jnp.float32) == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        assert dtypes(jnp.float64) == {jnp.dtype("float64")}
        assert dtypes(jnp.float16) == {jnp.dtype("float32")}


def test_length_penalty():
    np.testing.assert_allclose(length_penalty(np.array([1, 7, 13]), 0.5), [1, 2**0.5, 3**0.5])
    assert length_penalty(20, 0) == 1


def test_recomputing_is_the_step_itself():
    def logits_of(tokens, position, table):
        before = jnp.pad(tokens, ((0, 0), (1, 0)))
        look_up = lambda table, row, old, t: table[t, old[t], row[t]]  # noqa: E731
        return jax.vmap(look_up)(table, tokens, before, position)

    @jax.jit
    def recomputed(table, start):
        step, state = recomputing(logits_of, BATCH, LENGTH, table)
        options = {"end": END, "max_length": LENGTH, "beam_size": 3, "pad": PAD}
        return beam_search(step, state, start, alpha=0.6, **options)

    table = random_table(13)
    actual = recomputed(table, np.ones(BATCH, np.int32))
    check_equal(actual, decode("beam_search", table))


class Writer(nnx.Module):
    """A decoder with tied embeddings."""

    def __init__(self, rule, rngs):
        self.embedding = nnx.Embed(11, FEATURES, rngs=rngs)
        self.decoder = Decoder(1, FEATURES, HEADS, rule=rule, mlp_features=12, rngs=rngs)

    def logits(self, y):
        """Tied to the embeddings, and with an end symbol that waits a while."""
        return self.embedding.attend(y) - 4 * (jnp.arange(11) == END)[None]

    def cached_step(self, context):
        """A step that repeats the context for all beams of a sequence."""

        def step(tokens, cache):
            repeated = jnp.repeat(context, len(tokens) // len(context), axis=0)
            y, cache = self.decoder(self.embedding(tokens[:, None]), repeated, cache=cache)
            return self.logits(y[:, 0]), cache

        return step

    def logits_of(self, tokens, position, context):
        y = self.decoder(self.embedding(tokens), context)
        return self.logits(jnp.take_along_axis(y, position[:, None, None], 1)[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def cached_and_uncached(graph, parameters, context, start, limits):
    writer, length = nnx.merge(graph, parameters), 7
    options = {"end": END, "max_length": length, "max_lengths": limits, "beam_size": 3}
    cache = writer.decoder.init_cache(len(start), length)
    step, state = recomputing(writer.logits_of, len(start), length, context)
    return (
        beam_search(writer.cached_step(context), cache, start, alpha=0.6, **options),
        beam_search(step, state, start, alpha=0.6, **options),
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["learned", "gaussian(offset=-1)", "exponential"])
def test_cached_decoding_is_uncached_decoding(rule):
    parts = nnx.split(randomised(lambda: Writer(rule, nnx.Rngs(0))))
    start, limits = np.array([1, 2, 3]), np.array([7, 7, 4])
    context = inputs(1, length=5, batch=3)
    cached, uncached = cached_and_uncached(*parts, context, start, limits)
    assert len(np.unique(uncached.tokens)) > 3
    assert np.median(uncached.lengths) > 2
    for actual, expected in zip(cached, uncached, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def wrong(method=greedy, *, start=(1, 1), state=None, step=table_step, **options):
    state = table_state(random_table(0, 2, 3, 4)) if state is None else state
    options = {"end": END, "max_length": 3} | options
    return method(step, state, jnp.array(start), **options)


def test_misuse_is_a_value_error():
    beams = functools.partial(wrong, beam_search)
    draws = functools.partial(wrong, sample, key=jax.random.key(0))
    with pytest.raises(ValueError, match="beam_size must be 1 or more; got 0"):
        beams(beam_size=0)
    with pytest.raises(ValueError, match="alpha must be finite; got nan"):
        beams(beam_size=2, alpha=float("nan"))
    for method in (wrong, functools.partial(beams, beam_size=2), draws):
        with pytest.raises(ValueError, match="max_length must be 1 or more; got 0"):
            method(max_length=0)
        with pytest.raises(ValueError, match=r"end must be one of the 4 tokens .*; got 4"):
            method(end=4)
        with pytest.raises(ValueError, match=r"integer in \[0, 4\); got -1"):
            method(end=-1)
        with pytest.raises(ValueError, match=r"batch, 2, as its first axis; got shape \(3,\)"):
            method(state={"index": jnp.zeros(3)})
        with pytest.raises(ValueError, match=r"got shape \(\) at state\['index'\]"):
            method(state={"index": 0})
        with pytest.raises(ValueError, match=r"floating logits \[B, V\] with B = .* int32"):
            method(step=lambda tokens, state: (tokens, state))
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be 0"):
            draws(temperature=temperature)
    with pytest.raises(ValueError, match="top_k must be 1 or more; got 0"):
        draws(top_k=0)
    for top_p in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]; got"):
            draws(top_p=top_p)
    with pytest.raises(ValueError, match=r"key must be a jax.random.key, .*; got 5"):
        wrong(sample, key=5)
    with pytest.raises(ValueError, match=r"one key or 2, one for each sequence; got shape \(3,\)"):
        wrong(sample, key=row_keys(3))
    with pytest.raises(ValueError, match="max_length must be 1 or more; got -1"):
        recomputing(lambda tokens, position: tokens, 2, -1)
    given = {"tokens": jnp.ones((2, 3), jnp.int32), "lengths": jnp.ones(2, jnp.int32)}
    with pytest.raises(ValueError, match="end must be one of the 4 tokens"):
        score(table_step, table_state(random_table(0, 2, 3, 4)), given["lengths"], end=7, **given)
