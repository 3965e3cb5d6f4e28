"""Encoder, decoder and encoder-decoder: norms, position encodings, caches, dropout."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.nn import Decoder, Encoder, EncoderDecoder, dropout, rotate, sinusoidal
from attn_jax.nn.transformer import Residual
from tests.nn.models import FEATURES, HEADS, LENGTH, inputs, parameters, randomised, run

ENCODINGS = ("none", "sinusoidal", "learned", "rotary")
NORMS = ("pre", "post")
STACKS = (("pre", "none"), ("post", "sinusoidal"), ("pre", "learned"), ("post", "rotary"))


def build(stack, norm="pre", encoding="sinusoidal", layers=1, **options):
    return randomised(
        lambda: stack(
            layers,
            FEATURES,
            HEADS,
            norm=norm,
            position_encoding=encoding,
            max_length=LENGTH if encoding == "learned" else None,
            mlp_features=12,
            rngs=nnx.Rngs(0),
            **options,
        )
    )


@pytest.mark.slow
def test_an_encoder_decoder_is_its_parts():
    model = build(EncoderDecoder, rule="learned:2, gaussian:2")
    source, target = inputs(0, length=5), inputs(1, length=4)
    parts = run(model.decoder, target, run(model.encoder, source))
    np.testing.assert_allclose(run(model, source, target), parts, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "encoding"), STACKS)
def test_an_encoder_decoder_sees_the_source_and_no_later_target(norm, encoding):
    model = build(EncoderDecoder, norm, encoding, rule="learned:2, gaussian:2")
    source, target = inputs(0, length=5), inputs(1, length=4)
    output = run(model, source, target)
    assert output.shape == target.shape
    later_changed = run(model, source, target.at[:, 2:].multiply(-1))
    np.testing.assert_allclose(later_changed[:, :2], output[:, :2], rtol=2e-5, atol=2e-5)
    assert not np.allclose(later_changed[:, 2:], output[:, 2:], atol=1e-3)
    assert not np.allclose(run(model, source.at[:, 0].multiply(-1), target), output, atol=1e-3)


def cached(model, x, *rest):
    """The outputs of a pass over x in a chunk of four and then one by one."""
    cache, outputs = model.init_cache(len(x), LENGTH + 1), []
    for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
        output, cache = run(model, part, *rest, cache=cache)
        outputs.append(output)
    return jnp.concatenate(outputs, 1)


@pytest.mark.parametrize(("norm", "encoding"), STACKS)
def test_a_cached_decoder_is_the_full_computation(norm, encoding):
    model = build(Decoder, norm, encoding, rule="window", cross_rule="learned:2, gaussian:2")
    x, context = inputs(0), inputs(1, length=5)
    actual, expected = cached(model, x, context), run(model, x, context)
    np.testing.assert_allclose(actual, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.slow
def test_a_cached_encoder_is_the_full_computation():
    model = build(Encoder, layers=2, encoding="learned", rule=["learned", "exponential"])
    x = inputs()
    expected = run(model, x, mask=attn_jax.Causal())
    np.testing.assert_allclose(cached(model, x), expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_encodings_tell_positions_apart(encoding):
    model, x = build(Encoder, encoding=encoding, rule="learned"), inputs()
    reversed_alike = np.allclose(run(model, x[:, ::-1])[:, ::-1], run(model, x), atol=1e-4)
    assert reversed_alike == (encoding == "none")


def test_a_kernel_tells_positions_apart_without_encodings():
    model, x = build(Encoder, encoding="none", rule="gaussian(offset=1)"), inputs()
    assert not np.allclose(run(model, x[:, ::-1])[:, ::-1], run(model, x), atol=1e-3)


def test_packed_sequences_are_encoded_each_from_zero():
    model, x = build(Encoder, encoding="learned", rule="learned * gaussian"), inputs()
    segments = np.array([[0, 0, 0, 1, 1, 1]] * len(x))
    packed = run(
        model, x, mask=attn_jax.Segments(segments), encoding_positions=np.arange(LENGTH) % 3
    )
    alone = jnp.concatenate([run(model, x[:, :3]), run(model, x[:, 3:])], 1)
    np.testing.assert_allclose(packed, alone, rtol=2e-5, atol=2e-5)


def test_positions_shift_kernels_and_encodings():
    model, x = build(Encoder, rule="learned:2, gaussian:2"), inputs()
    shifted = run(model, x, positions=np.arange(LENGTH) + 10)
    np.testing.assert_allclose(run(model, x, positions=10), shifted, rtol=2e-5, atol=2e-5)
    assert not np.allclose(shifted, run(model, x), atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_residual_connections(norm):
    residual, x = Residual(FEATURES, norm, 0.0, rngs=nnx.Rngs(0)), inputs()

    def normal(y):
        return (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)

    expected = x + 2 * normal(x) if norm == "pre" else normal(x + 2 * x)
    actual = residual(x, lambda y: 2 * y, None)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_pre_norm_has_a_last_norm_and_post_norm_has_none():
    assert any("last_norm" in path for path in parameters(build(Encoder, "pre")))
    assert not any("last_norm" in path for path in parameters(build(Encoder, "post")))


def test_rules_per_layer_and_slot():
    model = build(
        EncoderDecoder,
        layers=2,
        rule=["learned", "gaussian"],
        decoder_rule="uniform",
        cross_rule=["gaussian", "learned"],
    )
    names = {path.rsplit("/groups", 1)[0] for path in parameters(model) if "/query/" in path}
    assert names == {"encoder/layers/0/attention", "decoder/layers/1/cross"}


def test_sinusoids():
    encoding = sinusoidal(jnp.arange(5), 6)
    for position, k in itertools.product(range(5), range(3)):
        angle = position * 10_000.0 ** (-k / 3)
        np.testing.assert_allclose(encoding[position, k], np.sin(angle), atol=1e-6)
        np.testing.assert_allclose(encoding[position, 3 + k], np.cos(angle), atol=1e-6)
    assert sinusoidal(jnp.arange(5), 7).shape == (5, 7)


def test_rotation_keeps_lengths_and_sees_distances():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 5))
    at = [rotate(x, jnp.array([[p]])) for p in (0, 3, 10, 13)]
    np.testing.assert_array_equal(at[0], x)
    np.testing.assert_allclose(jnp.linalg.norm(at[3]), jnp.linalg.norm(x), rtol=1e-5)
    near, far = (jnp.sum(at[i][..., 0, :] * at[j][..., 1, :]) for i, j in ((0, 1), (2, 3)))
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)


def test_dropout_zeroes_and_scales():
    x = jnp.ones(10_000)
    dropped = dropout(x, 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    # five standard errors of a mean of 10000
    assert abs(float((dropped == 0).mean()) - 0.25) < 5 * (0.25 * 0.75 / 10_000) ** 0.5
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.slow
def test_dropout_of_a_stack_repeats():
    options = {"dropout_rate": 0.2, "attention_dropout_rate": 0.2, "rule": "learned:2, gaussian:2"}
    model, plain = build(EncoderDecoder, **options), build(EncoderDecoder, rule=options["rule"])
    x = inputs()
    first, again, other = (run(model, x, x, dropout_key=jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(run(model, x, x), run(plain, x, x))


def test_misuse_is_a_value_error():
    x = inputs()
    with pytest.raises(ValueError, match="position_encoding must be one of none, sinusoidal"):
        build(Encoder, encoding="sine")
    with pytest.raises(ValueError, match="needs max_length"):
        Encoder(1, FEATURES, HEADS, position_encoding="learned", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="learned positions end at 6, got 7"):
        build(Encoder, encoding="learned")(inputs(length=7))
    with pytest.raises(ValueError, match="norm must be 'pre' or 'post', got 'sandwich'"):
        build(Encoder, norm="sandwich")
    with pytest.raises(ValueError, match="activation must be one of gelu, relu, got 'tanh'"):
        build(Encoder, activation="tanh")
    with pytest.raises(ValueError, match="an Encoder has no cross-attention"):
        build(Encoder, cross_rule="learned")
    with pytest.raises(ValueError, match="rule must be one rule or 2, one a layer, got 3"):
        build(Encoder, layers=2, rule=["learned"] * 3)
    model = build(Encoder)
    with pytest.raises(ValueError, match="positions follow from the cache"):
        model(x, positions=3, cache=model.init_cache(len(x), LENGTH))
