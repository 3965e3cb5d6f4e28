"""MultiHeadAttention: what it computes, for every rule, with caches, contexts and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.nn import MultiHeadAttention, attention_fn, rotate
from attn_jax.rules import parse
from tests.nn.models import (
    BATCH,
    EVERY_RULE,
    FEATURES,
    HEADS,
    LENGTH,
    attention_module,
    dense,
    inputs,
    parameters,
    run,
)
from tests.ops import reference

CACHE = LENGTH + 2  # some entries stay empty


def split_heads(x):
    return x.reshape(*x.shape[:2], HEADS, -1)


def gaussian_log_weight(n, r):
    return -(((r + 1) / (n + 1)) ** 2) / 2


@pytest.mark.parametrize("content", [True, False])
def test_cross_attention_is_the_formula(content):
    rule = "gaussian(width=(1, 2, 3, 4), offset=-1)"
    module = attention_module(
        f"learned * {rule}" if content else rule, context_features=5, out_features=3
    )
    x, context = inputs(1), inputs(2, length=9, features=5)
    mask = np.arange(9) < np.array([[9], [4]])
    query = key = None
    if content:
        branch = module.groups[0].branches[0]
        query, key = split_heads(dense(branch.query, x)), split_heads(dense(branch.key, context))
    mixed, _ = reference.attention(
        query,
        key,
        split_heads(dense(module.value, context)),
        log_weight=gaussian_log_weight,
        allowed=np.broadcast_to(mask[:, None, None], (BATCH, HEADS, LENGTH, 9)),
        heads=HEADS,
        queries=LENGTH,
    )
    expected = dense(module.output, jnp.asarray(mixed.reshape(BATCH, LENGTH, -1), np.float32))
    actual = run(module, x, context, mask=mask[:, None, None])
    assert actual.shape == (BATCH, LENGTH, 3)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_additive_attention_is_the_formula():
    module = attention_module("additive(key_width=3)")
    x, branch = inputs(), module.groups[0].branches[0]
    query, key = split_heads(dense(branch.query, x)), split_heads(dense(branch.key, x))
    logits = (np.tanh(query[:, :, None] + key[:, None]) * branch.score[...][None, None, None]).sum(
        -1
    )
    weights = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    mixed = np.einsum("btsn,bsnd->btnd", weights, split_heads(dense(module.value, x)))
    expected = dense(module.output, jnp.asarray(mixed.reshape(x.shape)))
    np.testing.assert_allclose(run(module, x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", ["dot", "general"])
def test_luongs_products_are_not_scaled(name, rotary):
    module = attention_module(f"{name} * gaussian(width=4)", rotary=rotary)
    x, context, (branch,) = inputs(), inputs(1, length=9), module.groups[0].branches
    query, key = x, context
    if name == "general":
        query = jnp.einsum("bti,io->bto", x, branch.query.kernel[...])
        assert {path.split("/branches/0/")[-1] for path in parameters(module.groups)} == {
            "query/kernel"
        }
    query, key = (split_heads(part) for part in (query, key))
    if rotary:
        query, key = (rotate(part, jnp.arange(part.shape[1])[None]) for part in (query, key))
    distance = np.arange(9) - np.arange(LENGTH)[:, None]
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) - (distance[None, None] / 4) ** 2 / 2
    mixed = jnp.einsum(
        "bnts,bsnd->btnd", jax.nn.softmax(logits), split_heads(dense(module.value, context))
    )
    expected = dense(module.output, mixed.reshape(x.shape))
    np.testing.assert_allclose(run(module, x, context), expected, rtol=2e-5, atol=2e-5)


def test_concat_is_additive_by_its_other_name():
    concat, additive = (attention_module(f"{name}(key_width=3)") for name in ("concat", "additive"))
    assert parameters(concat).keys() == parameters(additive).keys()
    np.testing.assert_array_equal(run(concat, inputs()), run(additive, inputs()))


def test_luongs_scores_count_the_projections_they_have():
    def flops(rule):
        return attention_module(rule).flops(LENGTH, 9)

    of_inputs = {"query": 2 * LENGTH * FEATURES**2, "key": 2 * 9 * FEATURES**2}
    assert flops("dot") == flops("raw") == flops("learned") - sum(of_inputs.values())
    assert flops("general") == flops("learned") - of_inputs["key"]
    assert flops("concat") == flops("additive")


@pytest.mark.parametrize("name", ["dot", "general", "concat"])
def test_luongs_scores_are_not_for_projected_queries_and_keys(name):
    with pytest.raises(ValueError, match=r"use attn_jax\.nn\.MultiHeadAttention"):
        attention_fn(name)


def test_raw_attention_compares_the_normalised_input():
    module = attention_module("raw")
    x = inputs()
    normal = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    mixed = attn_jax.attention(
        split_heads(normal), split_heads(normal), split_heads(dense(module.value, x))
    )
    expected = dense(module.output, mixed.reshape(x.shape))
    np.testing.assert_allclose(run(module, x), expected, rtol=2e-5, atol=2e-5)


def test_a_mix_is_gated_per_head():
    module = attention_module("mix(learned, gaussian(width=2))", out_features=FEATURES)
    x, group = inputs(), module.groups[0]
    value = split_heads(dense(module.value, x))
    branch = group.branches[0]
    query, key = split_heads(dense(branch.query, x)), split_heads(dense(branch.key, x))
    first = attn_jax.attention(query, key, value)
    second = attn_jax.attention(None, None, value, proximity=attn_jax.Gaussian(2.0))
    gate = jax.nn.sigmoid(group.gate[...]).reshape(1, 1, HEADS, 1)
    expected = dense(module.output, (gate * first + (1 - gate) * second).reshape(x.shape))
    np.testing.assert_allclose(run(module, x), expected, rtol=2e-5, atol=2e-5)


def test_every_group_follows_its_own_rule():
    rule = "gaussian(offset=-1):1, learned * window(radius=2):2, self:1"
    module = attention_module(rule)
    x = inputs()
    value = split_heads(dense(module.value, x))
    branch = module.groups[1].branches[0]
    query, key = (p(x).reshape(BATCH, LENGTH, 2, -1) for p in (branch.query, branch.key))
    heads = [
        attn_jax.attention(None, None, value[:, :, :1], proximity=attn_jax.Gaussian(1.0, -1.0)),
        attn_jax.attention(query, key, value[:, :, 1:3], proximity=attn_jax.Window(2)),
        value[:, :, 3:],
    ]
    expected = dense(module.output, jnp.concatenate(heads, 2).reshape(x.shape))
    np.testing.assert_allclose(run(module, x), expected, rtol=2e-5, atol=2e-5)
    assert [g.num_heads for g in module.groups] == [g.num_heads for g in parse(rule, HEADS)]


def decode(module, x, chunks):
    """The outputs of a cached pass over x in chunks of the given lengths."""
    cache, outputs = module.init_cache(len(x), CACHE), []
    for part in np.split(x, np.cumsum(chunks)[:-1], axis=1):
        output, cache = run(module, part, cache=cache)
        outputs.append(output)
    assert np.array_equal(cache["index"], [sum(chunks)] * len(x))
    return jnp.concatenate(outputs, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "rotary"),
    [(rule, False) for rule in EVERY_RULE]
    + [("raw:2, learned:2", True), ("learned(key_width=3):1, mix(dot, concat):1, general:2", True)],
)
def test_cached_decoding_is_the_full_computation(rule, rotary):
    module, x = attention_module(rule, rotary=rotary), inputs()
    one_by_one, in_chunks = (decode(module, x, chunks) for chunks in ((1,) * LENGTH, (1, 4, 1)))
    full = run(module, x, mask=attn_jax.Causal())
    np.testing.assert_allclose(one_by_one, full, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(in_chunks, full, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_caches_reorder_by_a_gather():
    module = attention_module("mix(learned, gaussian):2, learned:2")
    x, beams = inputs(), jnp.array([1, 1])
    _, cache = run(module, x[:, :3], cache=module.init_cache(BATCH, LENGTH))
    chosen = jax.tree.map(lambda leaf: leaf[beams], cache)
    output, _ = run(module, x[:, 3:4], cache=chosen)
    whole = jnp.concatenate([x[beams, :3], x[:, 3:4]], 1)
    expected = run(module, whole, mask=attn_jax.Causal())[:, 3:]
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)


def test_a_mask_counts_on_top_of_the_cache():
    module, x = attention_module("learned"), inputs()
    first_hidden = (np.arange(LENGTH) > 0).reshape(1, 1, 1, -1)
    full = run(module, x, mask=attn_jax.Causal() & first_hidden)
    output, _ = run(module, x, mask=first_hidden, cache=module.init_cache(BATCH, LENGTH))
    np.testing.assert_allclose(output, full, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", ["gaussian(width=2)", "uniform"])
def test_positions_reach_the_kernel(rule):
    module, x = attention_module(rule), inputs()
    np.testing.assert_allclose(
        run(module, x, query_positions=7), run(module, x), rtol=2e-5, atol=2e-5
    )
    spread = run(module, x, query_positions=3 * np.arange(LENGTH))
    assert np.allclose(spread, run(module, x), atol=1e-4) == ("gaussian" not in rule)
    part = run(module, x[:, 2:4], x, query_positions=2)
    np.testing.assert_allclose(part, run(module, x)[:, 2:4], rtol=2e-5, atol=2e-5)


def test_rotary_products_depend_on_the_distance():
    module, x = attention_module("learned", rotary=True), inputs()
    np.testing.assert_allclose(
        run(module, x, query_positions=5), run(module, x), rtol=2e-4, atol=2e-4
    )
    assert not np.allclose(
        run(module, x, query_positions=2 * np.arange(LENGTH)), run(module, x), atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gaussian:2, learned:2", "mix(uniform, raw)"])
def test_dropout_is_off_without_a_key_and_repeats_with_one(rule):
    module, x = attention_module(rule, attention_dropout_rate=0.5), inputs()
    without = run(attention_module(rule), x)
    first, again, other = (run(module, x, dropout_key=jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(run(module, x), without)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, without)


@pytest.mark.slow
def test_dropout_keeps_the_mean():
    module, x = (
        attention_module("gaussian:2, learned:2", attention_dropout_rate=0.3),
        inputs(length=4),
    )
    keys = jax.random.split(jax.random.key(0), 100)
    outputs = jax.jit(jax.vmap(lambda key: module(x, dropout_key=key)))(keys)
    error = outputs.std(0) / np.sqrt(len(keys))
    # 64 comparisons: five standard errors have a chance below 1e-4
    assert np.all(np.abs(outputs.mean(0) - run(module, x)) < 5 * error + 1e-5)


TRAINABLE = {
    "gaussian(width=2, trainable=True)": "log_width",
    "exponential(length=2, trainable=True)": "log_length",
    "triangular(radius=3.5, trainable=True)": "log_radius",
    "epanechnikov(radius=3.5, trainable=True)": "log_radius",
    "powerlaw(trainable=True)": "log_exponent",
    "table(size=5)": "log_weights",
    "t5(buckets=4, max_distance=8)": "log_weights",
    "mix(learned, gaussian)": "gate",
    "additive": "score",
    "concat": "score",
}


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "name"), TRAINABLE.items())
def test_what_is_trainable_gets_the_gradient(rule, name):
    module = MultiHeadAttention(HEADS, FEATURES, rule=rule, rngs=nnx.Rngs(0))
    x, target = inputs(0), inputs(1)
    graph, state = nnx.split(module)
    loss = jax.jit(
        jax.value_and_grad(lambda state: jnp.sum((nnx.merge(graph, state)(x) - target) ** 2))
    )
    leaves = jax.tree.leaves_with_path(loss(state)[1])
    (slot,) = [i for i, (path, _) in enumerate(leaves) if name in jax.tree_util.keystr(path)]
    slope = leaves[slot][1]
    assert slope.shape[0] == HEADS
    assert np.all(np.abs(slope).reshape(HEADS, -1).sum(1) > 1e-4), "a head without gradient"

    def moved(step):
        values, structure = jax.tree.flatten(state)
        values[slot] = values[slot] + step * slope / jnp.linalg.norm(slope)
        return loss(jax.tree.unflatten(structure, values))[0]

    # central differences in float32: truncation 1e-4, rounding of a loss near 100 about 1e-5 / h
    difference = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose(difference, jnp.linalg.norm(slope), rtol=2e-2, atol=3e-3)


def test_a_width_starts_at_its_value():
    module = MultiHeadAttention(
        HEADS, FEATURES, rule="gaussian(width=(1, 3), trainable=True)", rngs=nnx.Rngs(0)
    )
    (width,) = [x for path, x in parameters(module).items() if "log_width" in path]
    np.testing.assert_allclose(np.exp(width), [1, 3, 1, 3], rtol=1e-6)


def build(rule="learned", num_heads=HEADS, **options):
    return MultiHeadAttention(num_heads, FEATURES, rule=rule, rngs=nnx.Rngs(0), **options)


def test_misuse_is_a_value_error():
    x = inputs()
    with pytest.raises(ValueError, match="multiple of num_heads=3, got 8"):
        build(num_heads=3)
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        build("gausian")
    with pytest.raises(ValueError, match="'raw' splits the input"):
        build("raw", context_features=4)
    with pytest.raises(ValueError, match="'raw' splits the input"):
        build("gaussian:2, raw:2", qkv_features=16)
    with pytest.raises(ValueError, match=r"'dot' splits the input itself .* got 8, 4 and 8"):
        build("dot", context_features=4)
    with pytest.raises(ValueError, match=r"'general' splits the context itself .* got 4 and 8"):
        build("general:2, gaussian:2", context_features=4)
    with pytest.raises(ValueError, match="'self' has no meaning in cross-attention"):
        build("mix(learned, self)")(x, inputs(1))
    with pytest.raises(ValueError, match="leave out the context"):
        build()(x, x, cache=build().init_cache(BATCH, LENGTH))
    with pytest.raises(ValueError, match="positions follow from the cache"):
        build()(x, query_positions=3, cache=build().init_cache(BATCH, LENGTH))
    with pytest.raises(ValueError, match="normalizer"):
        build(normalizer="softmix")(x)
