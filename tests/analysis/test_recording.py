"""Weights of models are those of `attention_weights`, for every rule, at every place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import Causal, Lengths, Segments
from attn_jax.analysis import attentions, record
from attn_jax.nn import (
    Encoder,
    EncoderDecoder,
    MultiHeadAttention,
    Plane,
    RecurrentEncoderDecoder,
)
from attn_jax.nn.watching import watching

RULES = (
    "learned",
    "raw",
    "additive",
    "self",
    "uniform",
    "gaussian(width=2, offset=-1)",
    "learned * exponential(length=3)",
    "mix(learned, table)",
    "dot:1, gaussian(offset=1):1, learned(key_width=3):2",
)
MASK = Lengths(key=np.asarray([7, 4]))


def inputs(seed=0, length=7, features=8):
    return jax.random.normal(jax.random.key(seed), (2, length, features))


class Outer(nnx.Module):
    """A model of a user's own around an attention."""

    def __init__(self, rule, **options):
        self.inner = MultiHeadAttention(4, 8, rule=rule, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, **arguments):
        return 2 * self.inner(x, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "dense", "blockwise"])
@pytest.mark.parametrize("rule", RULES)
def test_weights_give_the_output(rule, implementation):
    """The values mixed by what is recorded, through the output projection, are the output."""
    model, x = Outer(rule, implementation=implementation), inputs()
    output, found = record(model, x, mask=MASK)
    weights = found["inner"].weights
    value = model.inner.value(x).reshape(2, 7, 4, 2)
    mixed = jnp.einsum("bnts,bsnd->btnd", weights, value).reshape(2, 7, 8)
    np.testing.assert_allclose(output, 2 * model.inner.output(mixed), atol=1e-5)
    np.testing.assert_array_equal(output, model(x, mask=MASK))
    np.testing.assert_array_equal(weights, model.inner.weights(x, mask=MASK))
    assert found["inner"].allowed[1, :, :, 4:].sum() == 0
    assert found["inner"].allowed[1, :, :, :4].all()


@pytest.mark.slow
def test_inside_of_jit():
    model, x = Outer("learned"), inputs()
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, x: record(nnx.merge(graph, state), x)[1])
    np.testing.assert_allclose(
        compiled(state, x)["inner"].weights, record(model, x)[1]["inner"].weights, atol=1e-6
    )


@pytest.mark.slow
def test_paths_layers_and_slots():
    model = EncoderDecoder(2, 8, 4, cross_rule="gaussian", rngs=nnx.Rngs(0))
    slots = (
        "encoder/layers/{}/attention",
        "decoder/layers/{}/attention",
        "decoder/layers/{}/cross",
    )
    assert set(attentions(model)) == {slot.format(i) for slot in slots for i in (0, 1)}
    x, y = inputs(0, 5), inputs(1, 7)
    _, found = record(model, x, y, only="decoder/*")
    assert list(found) == list(attentions(model, "decoder/*"))
    assert found["decoder/layers/1/cross"].weights.shape == (2, 4, 7, 5)
    own = found["decoder/layers/0/attention"]
    assert not own.allowed[0, 0][np.triu_indices(7, 1)].any()
    np.testing.assert_array_equal(own.relative[0, 2], np.arange(7) - 2)
    with pytest.raises(ValueError, match="only='layers' fits no attention of the model: decoder"):
        record(model, x, y, only="layers")


@pytest.mark.slow
def test_packed_rows_and_a_plane():
    segment = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]] * 2)
    model = Encoder(1, 8, 4, rule="gaussian", rngs=nnx.Rngs(0))
    _, found = record(model, inputs(), mask=Segments(segment) & Causal())
    allowed = found["layers/0/attention"].allowed[0, 0]
    np.testing.assert_array_equal(allowed[4], [0, 0, 0, 1, 1, 0, 0])
    image = Encoder(1, 8, 4, rule="gaussian", distance=Plane(3), rngs=nnx.Rngs(0))
    r = record(image, inputs(length=6))[1]["layers/0/attention"].relative[0]
    np.testing.assert_allclose(r[0], [0, 1, 2, 1, 2**0.5, 5**0.5], atol=1e-6)


@pytest.mark.slow
def test_a_recurrent_decoder_shows_all_its_steps():
    model = RecurrentEncoderDecoder(8, 8, rule="additive", rngs=nnx.Rngs(0))
    x, y = inputs(0, 5), inputs(1, 7)
    lengths = jnp.asarray([5, 3])
    output, found = record(model, x, y, source_length=lengths)
    np.testing.assert_array_equal(output, model(x, y, source_length=lengths))
    (one,) = found.values()
    encoded = model.encoder(x, length=lengths)
    np.testing.assert_array_equal(one.weights, model.decoder.weights(y, encoded))
    np.testing.assert_allclose(one.weights.sum(-1), 1, atol=1e-6)
    assert not one.allowed[1, 0, :, 3:].any()
    np.testing.assert_array_equal(one.relative[0, 2], np.arange(5) - 2)


def test_what_cannot_be_seen_is_refused():
    model, x = Outer("learned"), inputs()
    with pytest.raises(ValueError, match="got a cache: leave it out"), watching(lambda *_: None):
        model.inner(x, cache=model.inner.init_cache(2, 9))
    with pytest.raises(ValueError, match="inner was called more than once"):
        record(_Twice())
    with (
        pytest.raises(ValueError, match=r"what the heads give, of shape \(2, 7, 4, 2\)"),
        watching(lambda seen, mixed: mixed[:1]),
    ):
        model(x)


class _Twice(nnx.Module):
    def __init__(self):
        self.inner = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))

    def __call__(self):
        return self.inner(self.inner(inputs()))
