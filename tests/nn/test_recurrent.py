"""Recurrent layers: the formulas, packed rows, padding, and decoding step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.nn.recurrent import Cell, RecurrentDecoder, RecurrentEncoder

E, H, C = 5, 6, 6
SOURCES, TARGETS = (4, 3), (3, 5)
VARIANTS = {
    "Bahdanau": {"rule": "additive"},
    "Luong, dot": {"rule": "dot", "attend": "after", "input_feeding": True},
    "Luong, general": {"rule": "general", "attend": "after", "cell": "lstm"},
    "Luong, concat": {"rule": "concat", "attend": "after", "cell": "lstm", "num_layers": 2},
    "heads": {"rule": "learned:1, gaussian(width=2):1", "num_heads": 2, "input_feeding": True},
    "distance": {"rule": "gaussian(width=1)", "num_layers": 2},
    "none": {"rule": None},
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_cell_is_its_formula(kind):
    cell = Cell(E, H, kind, rngs=nnx.Rngs(0))
    cell.bias[...] = normal(H, seed=7)
    x, h, c = (np.asarray(normal(2, n, seed=n)) for n in (E, H, H))
    weights, bias = np.asarray(cell.input.kernel[...]), np.asarray(cell.input.bias[...])
    u, b = np.asarray(cell.recurrent[...]), np.asarray(cell.bias[...])
    parts = np.split(x @ weights + bias, u.shape[1] // H, -1)
    products = np.split(h @ u, u.shape[1] // H, -1)
    state = (h,) if kind == "gru" else (h, c)
    found = cell.step(cell.input(jnp.asarray(x)), tuple(map(jnp.asarray, state)))
    if kind == "gru":
        r, z = (sigmoid(parts[i] + products[i]) for i in (0, 1))
        new = np.tanh(parts[2] + r * (products[2] + b))
        expected = ((1 - z) * new + z * h,)
    else:
        i, f, g, o = (p + q for p, q in zip(parts, products, strict=True))
        memory = sigmoid(f + 1 + b) * c + sigmoid(i) * np.tanh(g)
        expected = (sigmoid(o) * np.tanh(memory), memory)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def models(name, seed=0):
    options = VARIANTS[name]
    shared = {k: v for k, v in options.items() if k in ("cell", "num_layers")}
    encoder = RecurrentEncoder(E, C // 2, rngs=nnx.Rngs(seed), **shared)
    return encoder, RecurrentDecoder(E, H, C, rngs=nnx.Rngs(seed + 1), **options)


def packed(lengths, seed, behind=2):
    """Sequences side by side, then padding: values, segments and positions."""
    parts = [normal(1, n, E, seed=seed + n) for n in lengths]
    x = jnp.concatenate([*parts, 9 * normal(1, behind, E, seed=99)], 1)
    segment = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, behind])[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, behind)])[None]
    return parts, x, jnp.asarray(segment), jnp.asarray(positions)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_row_holds_what_each_gives_alone_and_steps_give_the_same(name):
    encoder, decoder = models(name)
    sources, x, source_segment, source_positions = packed(SOURCES, 0)
    targets, y, segment, positions = packed(TARGETS, 50)
    encoded = encoder(x, segment=source_segment)
    whole = decoder(
        y,
        encoded,
        segment=segment,
        positions=positions,
        context_positions=0.5 * source_positions,
    )
    step = jax.jit(decoder.step)
    start = 0
    for source, target in zip(sources, targets, strict=True):
        scaled = 0.5 * jnp.arange(source.shape[1])[None]
        alone = decoder(target, encoder(source), context_positions=scaled)
        stop = start + target.shape[1]
        np.testing.assert_allclose(whole[:, start:stop], alone, atol=2e-6)
        start = stop
        # by steps, with padding behind the source
        padded = jnp.pad(source, ((0, 0), (0, 3), (0, 0)), constant_values=7)
        length = jnp.asarray([source.shape[1]])
        scaled = 0.5 * jnp.arange(padded.shape[1])[None]
        cache = decoder.init_cache(encoder(padded, length=length), scaled)
        assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(cache))
        for t in range(target.shape[1]):
            one, cache = step(target[:, t], cache)
            np.testing.assert_allclose(one, alone[:, t], atol=2e-6)


def test_the_summary_is_the_last_state_of_either_direction():
    encoder, _ = models("none")
    _, x, segment, _ = packed(SOURCES, 0)
    encoded = encoder(x, segment=segment)
    asked = jnp.asarray([[2, 1, 0]])
    states = np.asarray(encoded.states[0])
    half = C // 2
    expected = [
        np.concatenate([states[6, :half], states[4, half:]]),
        np.concatenate([states[3, :half], states[0, half:]]),
        np.zeros(C),
    ]
    np.testing.assert_allclose(encoded.summary(asked)[0], expected, atol=1e-6)


def test_without_attention_only_the_summary_is_seen():
    """With it, a state in the middle is seen too."""
    changed = {}
    for name in ("none", "Bahdanau"):
        encoder, decoder = models(name)
        encoded = encoder(normal(1, 5, E))
        other = encoded._replace(states=encoded.states.at[:, 2].add(1.0))
        y = normal(1, 3, E, seed=3)
        changed[name] = float(abs(decoder(y, encoded) - decoder(y, other)).max())
    assert changed["none"] == 0
    assert changed["Bahdanau"] > 1e-3


def test_gradients_reach_every_parameter_of_the_initial_values_by_path():
    encoder, decoder = models("Bahdanau")
    graph, params = nnx.split((encoder, decoder))

    @jax.jit
    @jax.grad
    def gradient(params):
        encoder, decoder = nnx.merge(graph, params)
        return jnp.square(decoder(normal(2, 4, E), encoder(normal(2, 5, E, seed=1)))).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        name = jax.tree_util.keystr(path)
        # a constant added to all scores cancels
        expected = "key" not in name or "bias" not in name
        assert np.isfinite(leaf).all(), name
        assert bool(abs(np.asarray(leaf)).max() > 1e-9) or not expected, name
    again = models("Bahdanau")
    for one, other in zip(
        jax.tree.leaves(params), jax.tree.leaves(nnx.split(again)[1]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_dropout_needs_a_key():
    decoder = RecurrentDecoder(E, H, C, dropout_rate=0.5, rngs=nnx.Rngs(0))
    encoder = RecurrentEncoder(E, C // 2, dropout_rate=0.5, rngs=nnx.Rngs(1))
    x = normal(1, 4, E)
    plain = decoder(x, encoder(x))
    np.testing.assert_array_equal(plain, decoder(x, encoder(x)))
    key = jax.random.key(0)
    dropped = decoder(x, encoder(x, dropout_key=key), dropout_key=key)
    assert (np.asarray(dropped) == 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "rnn"}, "cell must be 'gru' or 'lstm', got 'rnn'"),
        ({"attend": "during"}, "attend must be 'before' or 'after'"),
        ({"rule": "dot", "hidden": 8}, "'dot' splits the input itself"),
        ({"rule": "general", "hidden": 8}, "'general' splits the context itself"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentDecoder(E, **{"hidden": H, "context_features": C, **options}, rngs=nnx.Rngs(0))
