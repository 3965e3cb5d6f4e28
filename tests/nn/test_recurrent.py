"""Recurrent layers: the formulas, packed rows, padding, and decoding step by step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from attn_jax.nn import RecurrentDecoder, RecurrentEncoder, RecurrentEncoderDecoder
from attn_jax.nn.recurrent import Cell, Encoded
from tests.nn.models import parameters, randomised

E, H = 5, 6
SOURCES, TARGETS = (4, 3), (3, 5)
VARIANTS = {
    "Bahdanau": {},
    "Luong, dot": {"rule": "dot", "attend": "after", "input_feeding": True},
    "Luong, general": {"rule": "general * gaussian(width=4)", "attend": "after", "cell": "lstm"},
    "Luong, concat": {
        "rule": "concat",
        "attend": "after",
        "cell": "lstm",
        "num_layers": 2,
        "input_feeding": True,
        "out_features": 4,
    },
    "heads": {
        "rule": "mix(learned, uniform):1, gaussian(width=2):1",
        "num_heads": 2,
        "input_feeding": True,
    },
    "distance": {"rule": "gaussian", "num_layers": 2},
    "none": {"rule": None},
    "none, after": {"rule": None, "attend": "after", "cell": "lstm"},
}
COUNTED_FROM_ZERO = ("distance", "Luong, general")
"""Variants that are not told their positions."""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def model(name, **options):
    options = VARIANTS[name] | options
    return randomised(lambda: RecurrentEncoderDecoder(E, H, rngs=nnx.Rngs(0), **options))


def source_of(length, features=H):
    """A source without its encoder."""
    return Encoded(normal(1, length, features), jnp.ones((1, length), jnp.int32))


def compiled(function, module):
    """function(module, ...), compiled, with the module's parameters as an argument."""
    graph, state = nnx.split(module)
    return functools.partial(
        jax.jit(lambda state, *arguments: function(nnx.merge(graph, state), *arguments)), state
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_cell_is_its_formula(kind):
    cell = randomised(lambda: Cell(E, H, kind, rngs=nnx.Rngs(0)))
    x, h, c = (np.asarray(normal(2, n, seed=n)) for n in (E, H, H))
    u = np.asarray(cell.recurrent[...])
    weights, bias = np.asarray(cell.input.kernel[...]), np.asarray(cell.input.bias[...])
    parts = np.split(x @ weights + bias, u.shape[1] // H, -1)
    products = np.split(h @ u, u.shape[1] // H, -1)
    if kind == "gru":
        r, z = (sigmoid(parts[i] + products[i]) for i in (0, 1))
        new = np.tanh(parts[2] + r * (products[2] + np.asarray(cell.bias[...])))
        expected = ((1 - z) * new + z * h,)
    else:
        i, f, g, o = (p + q for p, q in zip(parts, products, strict=True))
        memory = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        expected = (sigmoid(o) * np.tanh(memory), memory)
    state = tuple(map(jnp.asarray, (h, c)[: len(expected)]))
    # the input may come in parts, as the decoder's does
    x = jnp.asarray(x)
    known, rest = cell.entry(x[:, :2])
    for entry in (cell.input(x), known + x[:, 2:] @ rest):
        for one, other in zip(cell.step(entry, state), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def rows(lengths, seed):
    """Sequences side by side, and each in a row of its own; NaN in all padding.

    Returns:
      For both: values and segments.

    """
    parts = [normal(n, E, seed=seed + n) for n in lengths]
    gap = jnp.full((1, E), jnp.nan)
    packed = jnp.concatenate([parts[0], gap, parts[1], gap, gap])[None]
    segment = np.repeat([1, 0, 2, 0], [lengths[0], 1, lengths[1], 2])[None]
    longest = max(lengths) + 1
    pad = lambda part: jnp.pad(part, ((0, longest - len(part)), (0, 0)), constant_values=jnp.nan)  # noqa: E731
    alone = jnp.stack([pad(part) for part in parts])
    inside = np.arange(longest) < np.asarray(lengths)[:, None]
    return (packed, jnp.asarray(segment)), (alone, jnp.asarray(inside.astype(np.int32)))


def told(name, length):
    """Positions of sequences that begin at the row's first; None lets the decoder count."""
    return None if name in COUNTED_FROM_ZERO else 0.5 * jnp.arange(length)[None]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_rows_are_separate_sequences_and_steps_are_the_whole(name):
    (x, x_segment), (sources, source_segment) = rows(SOURCES, 0)
    (y, y_segment), (targets, target_segment) = rows(TARGETS, 50)
    packed_positions = None
    if name not in COUNTED_FROM_ZERO:
        counted = np.concatenate([0.5 * np.arange(n + 1) for n in SOURCES] + [[0.0]])
        packed_positions = jnp.asarray(counted, jnp.float32)[None]

    def everything(model):
        packed = model(
            x,
            y,
            source_segment=x_segment,
            target_segment=y_segment,
            context_positions=packed_positions,
        )
        positions = told(name, sources.shape[1])
        alone = model(
            sources,
            targets,
            source_length=source_segment.sum(1),
            target_segment=target_segment,
            context_positions=positions,
        )
        cache = model.decoder.init_cache(
            model.encoder(sources, segment=source_segment), context_positions=positions
        )
        assert {leaf.shape[0] for leaf in jax.tree.leaves(cache)} == {len(sources)}

        def step(cache, x):
            y, cache = model.decoder.step(x, cache)
            return cache, y

        steps = lax.scan(step, cache, jnp.moveaxis(targets, 1, 0))[1]
        return packed, alone, jnp.moveaxis(steps, 0, 1)

    packed, alone, steps = compiled(everything, model(name))()
    first = 0
    for row, length in enumerate(TARGETS):
        np.testing.assert_allclose(
            packed[0, first : first + length], alone[row, :length], atol=2e-6
        )
        np.testing.assert_allclose(steps[row, :length], alone[row, :length], atol=2e-6)
        first += length + 1
    assert alone.shape[-1] == VARIANTS[name].get("out_features", E)


def unrolled(model, source, target):
    """The equations of a GRU's encoder and decoder, one sequence, one position after the other."""
    (forward, backward), *_ = model.encoder.layers
    states, length = [], len(source)
    for cell, steps in ((forward, range(length)), (backward, reversed(range(length)))):
        state, found = cell.initial(1), {}
        for s in steps:
            state = cell.step(cell.input(source[s][None]), state)
            found[s] = state[0]
        states.append([found[s] for s in range(length)])
    summary = jnp.concatenate([states[0][-1], states[1][0]], -1)
    source = jnp.concatenate([jnp.concatenate(side) for side in states], -1)
    decoder = model.decoder
    attention, cell = decoder.attention, decoder.cells[0]
    branch = attention.groups[0].branches[0]
    outputs, weights = [], []

    def look(hidden):
        if decoder.before:  # Bahdanau's score
            hidden_layer = jnp.tanh(branch.query(hidden) + branch.key(source))
            scores = hidden_layer @ branch.score[...][0]
        else:  # Luong's dot
            scores = source @ hidden[0]
        weights.append(jax.nn.softmax(scores))
        return attention.output(weights[-1][None] @ attention.value(source))

    hidden, output = jnp.tanh(decoder.first(summary)), jnp.zeros((1, decoder.out_features))
    for x in target[:, None]:
        if decoder.before:
            context = look(hidden)
            (hidden,) = cell.step(cell.input(jnp.concatenate([x, context], -1)), (hidden,))
            read = [hidden, context, x]
        else:
            (hidden,) = cell.step(cell.input(jnp.concatenate([x, output], -1)), (hidden,))
            read = [hidden, look(hidden)]
        output = jnp.tanh(decoder.output(jnp.concatenate(read, -1)))
        outputs.append(output[0])
    return jnp.stack(outputs), jnp.stack(weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bahdanau", pytest.param("Luong, dot", marks=pytest.mark.slow)])
def test_outputs_weights_and_gradients_are_those_of_the_unrolled_loop(name):
    source, target = normal(3, E), normal(2, E, seed=1)
    padded = jnp.concatenate([source, jnp.full((2, E), jnp.nan)])[None]
    segment = jnp.asarray([[1, 1, 1, 0, 0]])

    def value_and_slopes(function):
        def loss(state, graph):
            outputs, weights = function(nnx.merge(graph, state))
            return jnp.square(outputs).sum() + jnp.square(weights).sum(), (outputs, weights)

        graph, state = nnx.split(model(name))
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        return run(state, graph)

    def library(model):
        encoded = model.encoder(padded, segment=segment)
        outputs = model.decoder(target[None], encoded)[0]
        return outputs, model.decoder.weights(target[None], encoded)[0, 0]

    found, slopes = value_and_slopes(library)
    expected, expected_slopes = value_and_slopes(lambda model: unrolled(model, source, target))
    np.testing.assert_allclose(found[1][0], expected[1][0], atol=1e-6)
    np.testing.assert_allclose(found[1][1][:, :3], expected[1][1], atol=1e-6)
    np.testing.assert_array_equal(found[1][1][:, 3:], 0)
    leaves = jax.tree.leaves_with_path(slopes)
    for (path, slope), other in zip(leaves, jax.tree.leaves(expected_slopes), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(slope, other, rtol=1e-4, atol=1e-5, err_msg=where)
        assert np.abs(slope).max() > 1e-5, where


@pytest.mark.slow
def test_weights_of_heads_are_those_of_the_rule_within_the_segment():
    model = randomised(
        lambda: RecurrentEncoderDecoder(
            E,
            H,
            rule="gaussian(width=2):1, mix(uniform, gaussian):1",
            num_heads=2,
            rngs=nnx.Rngs(0),
        )
    )
    (x, x_segment), (y, y_segment) = rows(SOURCES, 0)[0], rows(TARGETS, 50)[0]

    def weigh(model):
        encoded = model.encoder(x, segment=x_segment)
        return model.decoder.weights(y, encoded, segment=y_segment)

    found = compiled(weigh, model)()[0]
    gate = sigmoid(np.asarray(model.decoder.attention.groups[1].gate[...]))
    starts = {1: (0, 0), 2: (TARGETS[0] + 1, SOURCES[0] + 1)}
    r = np.zeros((len(y_segment[0]), len(x_segment[0])))
    same = np.zeros_like(r, bool)
    for t, s in np.ndindex(*r.shape):
        segment = int(y_segment[0, t])
        if segment and segment == int(x_segment[0, s]):
            first_target, first_source = starts[segment]
            same[t, s], r[t, s] = True, (s - first_source) - (t - first_target)
    by_width = []
    for width in (2, 1, np.inf):
        weights = np.where(same, np.exp(-((r / width) ** 2) / 2), 0)
        by_width.append(weights / np.maximum(weights.sum(1, keepdims=True), 1e-9))
    np.testing.assert_allclose(found[0], by_width[0], atol=1e-6)
    np.testing.assert_allclose(found[1], gate * by_width[2] + (1 - gate) * by_width[1], atol=1e-6)


def largest(jaxpr):
    """Numbers of entries of all arrays in a program, by shape."""
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", str(jaxpr))}
    return max(shapes, key=np.prod)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["additive", "general"])
def test_no_step_keeps_what_it_compared_for_the_backward_pass(rule):
    """At most the states of all steps are kept, or one step's hidden layer."""
    batch, targets, sources, hidden = 3, 17, 19, 24
    model = randomised(lambda: RecurrentEncoderDecoder(E, hidden, rule=rule, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graph, state)
        return model(normal(batch, sources, E), normal(batch, targets, E)).sum()

    shape = largest(jax.make_jaxpr(jax.grad(loss))(state))
    assert np.prod(shape) < batch * targets * sources * hidden / 4, shape


def test_beams_reorder_by_a_gather():
    module = model("Luong, concat", rule="learned")
    source, target = normal(2, 4, E), normal(2, 2, E, seed=1)
    beams = jnp.asarray([1, 1])

    def decode(model):
        cache = model.decoder.init_cache(model.encoder(source))
        _, cache = model.decoder.step(target[:, 0], cache)
        kept = jax.tree.map(lambda leaf: leaf[beams], cache)
        reordered, _ = model.decoder.step(target[beams, 1], kept)
        return reordered, model.decoder.step(target[:, 1], cache)[0]

    reordered, whole = compiled(decode, module)()
    np.testing.assert_allclose(reordered, whole[beams], atol=1e-6)


def test_the_summary_is_the_last_state_of_either_direction():
    encoder = model("none").encoder
    x, segment = rows(SOURCES, 0)[0]
    asked = jnp.asarray([[2, 1, 0]])

    def encode(encoder):
        encoded = encoder(x, segment=segment)
        return encoded.states[0], encoded.summary(asked)[0]

    states, found = (np.asarray(part) for part in compiled(encode, encoder)())
    half = H // 2
    expected = [
        np.concatenate([states[7, :half], states[5, half:]]),
        np.concatenate([states[3, :half], states[0, half:]]),
        np.zeros(H),
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(states[segment[0] == 0], 0)


@pytest.mark.parametrize("name", ["none", "Bahdanau"])
def test_only_attention_sees_states_within(name):
    encoded, y = source_of(5), normal(1, 3, E, seed=3)
    changed = encoded._replace(states=encoded.states.at[:, 2].add(1.0))
    decode = compiled(lambda decoder, encoded: decoder(y, encoded), model(name).decoder)
    difference = np.abs(decode(encoded) - decode(changed)).max()
    assert (difference > 1e-3) == (name != "none")


@pytest.mark.slow
def test_initial_values_follow_from_seed_and_path():
    def build(seed=0, rule="additive"):
        return parameters(RecurrentDecoder(E, H, H, cell="lstm", rule=rule, rngs=nnx.Rngs(seed)))

    attention, none, other = build(), build(rule=None), build(seed=1, rule=None)
    assert set(none) < set(attention)
    for path, value in none.items():
        np.testing.assert_array_equal(value, attention[path])
        assert bool((value == other[path]).all()) == path.endswith("bias"), path
    # an LSTM forgets little at first
    bias = none["cells/0/input/bias"].reshape(4, H)
    np.testing.assert_array_equal(bias, np.array([[0.0], [1], [0], [0]]) + np.zeros((4, H)))


@pytest.mark.slow
def test_dropout_is_off_without_a_key_and_repeats_with_one():
    module = model("none", dropout_rate=0.5)
    x = normal(1, 4, E)
    run = compiled(lambda model, key: model(x, x, dropout_key=key), module)
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    without = np.asarray(compiled(lambda model: model(x, x), module)())
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first == 0).any()
    # what is kept is doubled, and its inputs had dropout too
    assert not np.allclose(first[first != 0], 2 * without[first != 0])
    assert (without != 0).all()


def test_an_upper_layer_has_dropout_of_its_own_at_every_step():
    options = {"num_layers": 2, "rule": None, "dropout_rate": 0.5}
    decoder = randomised(lambda: RecurrentDecoder(E, H, H, rngs=nnx.Rngs(0), **options))
    for cell in decoder.cells:  # what a state was does not matter
        cell.recurrent[...] = jnp.zeros_like(cell.recurrent[...])
        cell.input.bias[...] = cell.input.bias[...].at[H : 2 * H].set(-50)
    encoded, x = source_of(3), jnp.zeros((1, 6, E))

    def hidden(decoder, key=None):
        steps = decoder._steps(x, encoded, None, None, key)
        read = decoder._scan(*steps[:2], decoder._source(encoded, None), steps[2])[1]
        return read[0][:, 0]

    np.testing.assert_allclose(np.diff(compiled(hidden, decoder)(), axis=0), 0, atol=1e-6)
    dropped = compiled(hidden, decoder)(jax.random.key(0))
    assert len(np.unique(np.round(dropped, 4), axis=0)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"rule": "general", "attend": "after", "cell": "lstm"}])
def test_flops_are_those_of_the_program_of_one_step(options):
    """XLA counts a loop's body once, and elementwise operations beside products."""
    width, length = 96, 16
    model = RecurrentEncoderDecoder(width, width, rngs=nnx.Rngs(0), **options)
    source, target = (jnp.zeros((1, n, width)) for n in (length, 1))
    encoded = jax.eval_shape(model.encoder, source)
    graph, state = nnx.split(model.decoder)
    decode = jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))
    count = decode.lower(state, target, encoded).compile().cost_analysis()["flops"]
    formula = model.decoder.flops(1, length)
    assert formula <= count <= 1.06 * formula
    cells = [cell for layer in model.encoder.layers for cell in layer]
    expected = sum(2 * length * cell.recurrent.shape[1] * (width + width // 2) for cell in cells)
    assert model.flops(length, 1) == expected + formula


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "rnn"}, "cell must be 'gru' or 'lstm', got 'rnn'"),
        ({"attend": "during"}, "attend must be 'before' or 'after'"),
        ({"num_layers": 0}, "num_layers must be 1 or more, got 0"),
        ({"rule": "dot", "hidden": 8}, "'dot' splits the input itself"),
        ({"rule": "general", "hidden": 8}, "'general' splits the context itself"),
        ({"rule": "aditive"}, "did you mean 'additive'"),
        ({"num_heads": 4}, "multiple of num_heads=4, got 6"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentDecoder(E, **{"hidden": H, "context_features": H, **options}, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_calls_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="hidden must be even"):
        RecurrentEncoderDecoder(E, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_layers must be 1 or more, got 0"):
        RecurrentEncoder(E, H, num_layers=0, rngs=nnx.Rngs(0))
    module, x, encoded = model("none"), normal(1, 3, E), source_of(3)
    with pytest.raises(ValueError, match="give segment or length, got both"):
        module.encoder(x, segment=jnp.ones((1, 3), int), length=jnp.asarray([2]))
    with pytest.raises(ValueError, match="no weights, got rule=None: give a rule"):
        module.decoder.weights(x, encoded)
    with pytest.raises(ValueError, match="context_features=6 that the decoder was built for"):
        module.decoder(x, source_of(3, H + 2))
    with pytest.raises(ValueError, match="'self' has no meaning in cross-attention"):
        model("none", rule="self").decoder(x, encoded)
