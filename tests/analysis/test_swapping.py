"""Heads replaced by kernels: by their own nothing changes, by others what should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import Causal
from attn_jax.analysis import (
    Fit,
    Head,
    Replacement,
    all_heads,
    choose,
    greedy_order,
    record,
    shuffled,
    swapping,
)
from attn_jax.nn import Encoder, MultiHeadAttention, RecurrentEncoderDecoder

PATHS = ("layers/0/attention", "layers/1/attention")
LENGTH = 9


def fit(width, offset=0.0, first=0.0):
    return Fit("gaussian", width, offset, first, None, np.nan, np.nan)


def model_of(rule):
    return Encoder(2, 8, 2, rule=rule, rngs=nnx.Rngs(0))


@functools.cache
def x():
    with jax.ensure_compile_time_eval():  # the first call may be in a function that is traced
        return jax.random.normal(jax.random.key(0), (2, LENGTH, 8))


@pytest.mark.slow
def test_heads_replaced_by_their_own_kernels_change_nothing():
    model = model_of("gaussian(width=(1, 2), offset=(-1, 1))")
    own = Replacement.of([fit(1.0, -1.0), fit(2.0, 1.0)])
    with swapping(model, dict.fromkeys(PATHS, own)):
        swapped = model(x())
    np.testing.assert_allclose(swapped, model(x()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, Causal()], ids=["all", "causal"])
def test_each_head_does_as_it_is_told(mask):
    """Beside a head that stays: the mean, nothing, and half of it the first token."""
    attention = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    attention.output.kernel[...] = jnp.eye(8)
    _, found = record(attention, x(), mask=mask)
    one = found[""]
    value = attention.value(x()).reshape(2, LENGTH, 2, 4)
    first = np.zeros((LENGTH, LENGTH))
    first[:, 0] = 1
    mean = np.asarray(one.allowed / one.allowed.sum(-1, keepdims=True))
    weights = {
        "uniform": (Replacement.uniform(2), mean),
        "zero": (Replacement.zero(2), 0 * mean),
        "first": (Replacement.of([fit(1e4, first=0.5)] * 2), (mean + first) / 2),
    }
    for replacement, expected in weights.values():
        both = np.stack([one.weights[:, 0], np.broadcast_to(expected, one.weights.shape)[:, 1]], 1)
        with swapping(attention, {"": replacement.only([1])}):
            output = attention(x(), mask=mask)
        mixed = np.einsum("bnts,bsnd->btnd", both, value).reshape(2, LENGTH, 8)
        np.testing.assert_allclose(output, mixed, atol=1e-5)


def test_choices():
    replacements = dict.fromkeys(PATHS, Replacement.uniform(2))
    assert all_heads(replacements) == [Head(path, i) for path in PATHS for i in (0, 1)]
    chosen = choose(replacements, [Head(PATHS[1], 0)])
    assert [one.swapped.tolist() for one in chosen.values()] == [[0, 0], [1, 0]]


@pytest.mark.slow
def test_one_compiled_program_serves_every_choice():
    model = model_of("learned")
    graph, state = nnx.split(model)
    traces = []

    @jax.jit
    def output(state, replacements):
        traces.append(1)
        merged = nnx.merge(graph, state)
        with swapping(merged, replacements):
            return merged(x())

    replacements = {path: Replacement.of([fit(1.0), fit(2.0, first=0.5)]) for path in PATHS}
    found = [
        output(state, choose(replacements, heads))
        for heads in ([], [Head(PATHS[0], 0)], all_heads(replacements))
    ]
    assert len(traces) == 1
    np.testing.assert_allclose(found[0], model(x()), atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 1e-3


def test_greedy_order_takes_the_cheapest_head_first():
    """What is lost is the sum of the heads' costs, and of a pair that is dear together."""
    heads = [Head("a", 0), Head("a", 1), Head("b", 0)]
    cost = dict(zip(heads, (3.0, 1.0, 2.0), strict=True))

    def score(chosen):
        dear = 10.0 if {heads[1], heads[2]} <= set(chosen) and len(chosen) == 2 else 0.0
        return 100.0 - sum(cost[head] for head in chosen) - dear

    said = []
    steps = greedy_order(score, heads, lambda *step: said.append(step))
    assert steps == said == [(heads[1], 99.0), (heads[0], 96.0), (heads[2], 94.0)]


def test_shuffled_fits_keep_the_set_and_leave_none_in_place():
    fits = {path: [fit(1.0 + i + 2 * j) for i in range(2)] for j, path in enumerate(PATHS)}
    mixed = shuffled(fits, np.random.default_rng(0))
    flat, other = ([one.scale for some in f.values() for one in some] for f in (fits, mixed))
    assert sorted(flat) == sorted(other)
    assert all(a != b for a, b in zip(flat, other, strict=True))


@pytest.mark.slow
def test_what_cannot_be_swapped_is_refused():
    with (
        pytest.raises(ValueError, match="the model has no attention layer/0: its paths are layers"),
        swapping(model_of("learned"), {"layer/0": Replacement.zero(2)}),
    ):
        pass
    recurrent = RecurrentEncoderDecoder(8, 8, rngs=nnx.Rngs(0))
    given = {"decoder/attention": Replacement.zero(1)}
    with pytest.raises(ValueError, match="can be seen, not replaced"), swapping(recurrent, given):
        recurrent(x(), x())
