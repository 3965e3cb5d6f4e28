"""Rules as `attention_fn` of Flax's own modules, nnx and linen."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import attn_jax
from attn_jax.nn import attention_fn
from tests.nn.models import (
    BATCH,
    FEATURES,
    HEADS,
    LENGTH,
    attention_module,
    inputs,
    randomised,
    run,
)
from tests.ops.arrays import qkv

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def nnx_module(function, **options):
    options = {"decode": False, "keep_rngs": False} | options
    return randomised(
        lambda: nnx.MultiHeadAttention(
            HEADS, FEATURES, attention_fn=function, rngs=nnx.Rngs(0), **options
        )
    )


def linen_module(function, **options):
    return linen.MultiHeadAttention(HEADS, attention_fn=function, **options)


def linen_variables(**options):
    """Random parameters, and an empty cache where the module decodes."""
    module = linen_module(attention_fn("learned"), **options)
    shapes = dict(jax.eval_shape(module.init, jax.random.key(0), inputs()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes["params"]
    )
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.get("cache", {}))
    return {"params": params, "cache": cache}


def apply(module, *arguments, **options):
    return jax.jit(lambda xs, kw: module.apply(linen_variables(), *xs, **kw))(arguments, options)


def attend(function, *arrays, **options):
    """The function, or the one of a rule, as one compiled program."""
    function = attention_fn(function) if isinstance(function, str) else function
    return jax.jit(lambda xs, kw: function(*xs, **kw))(arrays, options)


def causal(length=LENGTH):
    """Flax's masks are float32."""
    return linen.make_causal_mask(jnp.ones((BATCH, length)))


def heads(seed=0, **sizes):
    return qkv(seed, **{"key_heads": HEADS, "heads": HEADS, **sizes})


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_learned_is_flax_own_attention(masked):
    x, mask = inputs(), causal() if masked else None
    own, ours = nnx_module(nnx.dot_product_attention), nnx_module(attention_fn("learned"))
    np.testing.assert_allclose(run(ours, x, mask=mask), run(own, x, mask=mask), **CLOSE)
    own, ours = linen_module(linen.dot_product_attention), linen_module(attention_fn("learned"))
    np.testing.assert_allclose(apply(ours, x, mask=mask), apply(own, x, mask=mask), **CLOSE)


def test_cross_attention_grouped_heads_and_causality_of_nnx():
    x, context = inputs(), inputs(1, length=9)
    own, ours = (
        nnx_module(function, num_kv_heads=2)
        for function in (nnx.dot_product_attention, attention_fn("learned:1, learned:3"))
    )
    np.testing.assert_allclose(run(ours, x, context), run(own, x, context), **CLOSE)
    actual, expected = (
        jax.jit(lambda x, module=module: module(x, is_causal=True))(x) for module in (ours, own)
    )
    np.testing.assert_allclose(actual, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "mask_dtype"), [((), bool), ((2, 3), np.float32)])
def test_any_batch_axes_bias_and_mask(batch, mask_dtype):
    query, key, value = (x[0] for x in heads())
    query, key, value = (jnp.broadcast_to(x, (*batch, *x.shape)) for x in (query, key, value))
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.normal(size=(*batch, HEADS, 6, 9)), jnp.float32)
    mask = jnp.asarray(rng.random((*(1 for _ in batch), 1, 6, 9)) < 0.7, mask_dtype)
    for rule in ("learned", "learned:3, learned:1"):
        actual, expected = (
            attend(function, query, key, value, bias=bias, mask=mask)
            for function in (rule, linen.dot_product_attention)
        )
        np.testing.assert_allclose(actual, expected, **CLOSE)


@pytest.mark.slow
def test_masks_and_biases_per_head_reach_their_group():
    query, key, value = heads()
    rng = np.random.default_rng(1)
    mask = rng.random((1, HEADS, 6, 9)) < 0.7
    actual = attend("gaussian(width=3):1, learned:3", query, key, value, mask=mask)
    options = {"proximity": attn_jax.Gaussian(3.0), "query_positions": np.arange(6)}
    first = attn_jax.attention(None, None, value[:, :, :1], mask=mask[:, :1], **options)
    rest = attn_jax.attention(*(x[:, :, 1:] for x in (query, key, value)), mask=mask[:, 1:])
    np.testing.assert_allclose(actual, jnp.concatenate([first, rest], 2), **CLOSE)


def test_a_query_that_sees_nothing_gives_zero():
    query, key, value = heads()
    mask = np.ones((1, 1, 6, 1), bool)
    mask[:, :, 2] = False
    output = attend("learned", query, key, value, mask=mask)
    assert np.all(output[:, 2] == 0)
    assert np.all(np.abs(output[:, 3]).sum(-1) > 0)


def test_dtype_is_that_of_the_result():
    query, key, value = heads()
    function = attention_fn("gaussian:2, learned:2")
    output = jax.eval_shape(lambda *xs: function(*xs, dtype=jnp.bfloat16), query, key, value)
    assert output.dtype == jnp.bfloat16
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    exact = attend(linen.dot_product_attention, *(x.astype(jnp.float32) for x in half))
    ours = attention_fn("learned")(*half, force_fp32_for_softmax=True)
    # bfloat16 has 8 bits: inputs are exact here, the result is rounded once, weights once
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        "gaussian(width=(1, 2, 3, 4), offset=-1)",
        "uniform",
        "self",
        "gaussian(offset=1):2, learned * window(radius=2):2",
    ],
)
def test_the_modules_here_and_flax_agree(rule):
    flax, x = nnx_module(attention_fn(rule)), inputs()
    ours = attention_module(rule)
    layers = [(ours.value, flax.value, slice(None)), (ours.output, flax.out, slice(None))]
    first = 0
    for group in ours.groups:
        own = slice(first, first + group.num_heads)
        first += group.num_heads
        branch = group.branches[0]
        if branch.product.content is not None:
            layers += [(branch.query, flax.query, own), (branch.key, flax.key, own)]
    for mine, theirs, own in layers:
        kernel, bias = theirs.kernel[...], theirs.bias[...]
        if theirs is not flax.out:
            kernel, bias = kernel[:, own], bias[own]
        mine.kernel[...] = kernel.reshape(mine.kernel.shape)
        mine.bias[...] = bias.reshape(mine.bias.shape)
    np.testing.assert_allclose(run(flax, x), run(ours, x), **CLOSE)
    np.testing.assert_allclose(
        run(flax, x, mask=causal()), run(ours, x, mask=attn_jax.Causal()), **CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["learned", "gaussian(offset=-1):2, learned:2", "self"])
def test_linen_decodes_step_by_step(rule):
    x = inputs()
    full = apply(linen_module(attention_fn(rule)), x, mask=causal())
    module = linen_module(attention_fn(rule, decode=True), decode=True)
    variables = linen_variables(decode=True)
    step = jax.jit(lambda variables, part: module.apply(variables, part, mutable=["cache"]))
    for i in range(LENGTH):
        output, changed = step(variables, x[:, i : i + 1])
        variables = variables | changed
        np.testing.assert_allclose(output[:, 0], full[:, i], **CLOSE)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx_decodes_step_by_step(is_causal):
    rule, x = "gaussian(offset=-1):2, learned:2", inputs()
    full = run(nnx_module(attention_fn(rule)), x, mask=causal())
    module = nnx_module(attention_fn(rule, decode=True), decode=True)
    module.init_cache(x.shape)
    step = nnx.jit(lambda module, part: module(part, is_causal=is_causal))
    for i in range(LENGTH):
        output = step(module, x[:, i : i + 1])
        np.testing.assert_allclose(output[:, 0], full[:, i], **CLOSE)


@pytest.mark.slow
def test_one_query_needs_to_know_whether_it_decodes():
    query, key, value = heads(queries=1)
    allowed = np.arange(9).reshape(1, 1, 1, 9) <= 4
    for rule, options in (("gaussian", {}), ("learned", {"is_causal": True}), ("self", {})):
        with pytest.raises(ValueError, match=r"say attention_fn\(..., decode=True\)"):
            attention_fn(rule)(query, key, value, mask=allowed, **options)
    with pytest.raises(ValueError, match="position by the mask"):
        attention_fn("gaussian", decode=True)(query, key, value)
    for decode, position in ((True, 4), (False, 0)):
        function = attention_fn("gaussian", decode=decode)
        output = attend(function, query, key, value, mask=allowed)
        expected = attn_jax.attention(
            None,
            None,
            value,
            proximity=attn_jax.Gaussian(1.0),
            mask=allowed,
            query_positions=np.array([position]),
        )
        np.testing.assert_allclose(output, expected, **CLOSE)
    attend("learned", query, key, value, mask=allowed)


def test_positions_given_by_flax():
    query, key, value = heads(queries=9)
    rule, spread = "gaussian:2, learned:2", 2 * jnp.arange(9)
    actual = attend(rule, query, key, value, input_positions=spread)
    # half as far apart and half as wide
    expected = attend("gaussian(width=0.5):2, learned:2", query, key, value)
    np.testing.assert_allclose(actual, expected, **CLOSE)
    batched = jnp.broadcast_to(spread, (len(value), 9))
    actual = attend(rule, query, key, value, input_positions=batched)
    np.testing.assert_allclose(actual, expected, **CLOSE)
    with pytest.raises(ValueError, match="positions are those of queries and keys alike"):
        attend(rule, query[:, :6], key, value, input_positions=jnp.arange(6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_dropout_repeats_and_is_off_where_flax_says_so(kind):
    options = {"dropout_rate": 0.5, "broadcast_dropout": False}
    function, x = attention_fn("gaussian:2, learned:2"), inputs()
    if kind == "nnx":
        module, plain = nnx_module(function, deterministic=True, **options), nnx_module(function)
        call = lambda key: module(x, rngs=nnx.Rngs(dropout=key), deterministic=False)  # noqa: E731
        off, without = run(module, x), run(plain, x)
    else:
        module, plain = linen_module(function, **options), linen_module(function)
        variables = linen_variables()
        call = lambda key: module.apply(  # noqa: E731
            variables, x, dropout_rng=key, deterministic=False
        )
        off = jax.jit(lambda x: module.apply(variables, x, deterministic=True))(x)
        without = apply(plain, x)
    np.testing.assert_allclose(off, without, **CLOSE)
    call = jax.jit(call)
    first, again, other = (call(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, without)


@pytest.mark.slow
def test_weights_are_dropped_one_by_one():
    weight = jnp.ones((1, 64, 1, 1))
    options = {"dropout_rate": 0.25, "broadcast_dropout": False}
    function = attention_fn("self")
    key = jax.random.key(0)
    output = function(weight, weight, weight, dropout_rng=key, **options).ravel()
    np.testing.assert_allclose(np.unique(output), [0, 4 / 3], rtol=1e-6)
    # five standard errors of a mean of 64
    assert abs(float((output == 0).mean()) - 0.25) < 5 * (0.25 * 0.75 / 64) ** 0.5


def test_every_keyword_of_flax_is_a_named_parameter():
    ours = set(inspect.signature(attention_fn("learned")).parameters)
    not_passed = {"promote_dtype", "einsum_dot_general"}
    for function in (nnx.dot_product_attention, linen.dot_product_attention):
        assert set(inspect.signature(function).parameters) - not_passed <= ours
    passed = set()

    def spy(query, key, value, **options):
        passed.update(options)
        return value

    nnx_module(spy)(inputs())
    assert passed <= ours


def test_equal_arguments_give_the_same_function():
    assert attention_fn("gaussian") is attention_fn("gaussian")
    assert attention_fn("gaussian") is not attention_fn("gaussian", decode=True)


@pytest.mark.parametrize(
    "rule",
    [
        "raw",
        "additive",
        "mix(learned, gaussian)",
        "gaussian(trainable=True)",
        "table",
        "t5",
        "learned(key_width=3)",
        "learned:2, learned * table:2",
        "gaussian(width=(1, 2)):2, raw:2",
    ],
)
def test_rules_with_parameters_belong_to_the_module_here(rule):
    with pytest.raises(ValueError, match=r"use attn_jax\.nn\.MultiHeadAttention"):
        attention_fn(rule)


def sown(module, x):
    """What a module of NNX sows in a call."""
    _, found = nnx.capture(module, nnx.Intermediate)(x, sow_weights=True)
    return found["attention_weights"].get_value()[0]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["learned", "learned * gaussian(width=2)", "self:1, uniform:3"])
def test_weights_are_sown_as_flax_sows_its_own(rule):
    """They mix the values to what the module gives; those of "learned" are Flax's."""
    x, module = inputs(), nnx_module(attention_fn(rule))
    weights = sown(module, x)
    mixed = jnp.einsum("bnts,bsnd->btnd", weights, module.value(x))
    np.testing.assert_allclose(module.out(mixed), module(x), atol=1e-5)
    _, found = linen_module(attention_fn(rule)).apply(
        linen_variables(), x, sow_weights=True, mutable="intermediates"
    )
    (in_linen,) = found["intermediates"]["attention_weights"]
    assert in_linen.shape == weights.shape
    if rule == "learned":
        flax = nnx_module(nnx.dot_product_attention)
        np.testing.assert_allclose(weights, sown(flax, x), atol=1e-6)


def test_misuse_is_a_value_error():
    query, key, value = heads()
    function, x = attention_fn("gaussian"), inputs()
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        attention_fn("gausian")
    with pytest.raises(ValueError, match="sum to 4, got"):
        attention_fn("gaussian:2, learned:1")(query, key, value)
    with pytest.raises(ValueError, match="'self' has no meaning in cross-attention"):
        attention_fn("self")(query, key, value)
    with pytest.raises(ValueError, match="query heads must be a multiple"):
        function(query, key[:, :, :3], value[:, :, :3])
    with pytest.raises(ValueError, match="at most 4 axes"):
        function(query, key, value, mask=jnp.ones((1, 1, 1, 6, 9)))
    with pytest.raises(ValueError, match="cannot honour precision"):
        nnx_module(function, precision="highest")(x)
    with pytest.raises(ValueError, match="cannot honour qk_attn_weights_einsum"):
        function(query, key, value, qk_attn_weights_einsum=jnp.einsum)
    with pytest.raises(ValueError, match="set broadcast_dropout=False"):
        nnx_module(function, dropout_rate=0.5, deterministic=False)(x, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dropout needs dropout_rng"):
        function(query, key, value, dropout_rate=0.5, broadcast_dropout=False)
