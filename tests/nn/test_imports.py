"""Attention layers of Flax NNX, Flax Linen and torch as modules with the same outputs."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import attn_jax
from attn_jax.nn import attention_fn
from attn_jax.nn.interop import import_attention
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

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KEYS, CONTEXT = 9, 5
WIDTHS = {"qkv_features": 16, "out_features": 3}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip(
        "torch", reason="torch is not installed: pip install '.[peers]' to compare with it"
    )


def nnx_layer(**options):
    options = {"decode": False, "keep_rngs": False} | options
    return randomised(lambda: nnx.MultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options))


def linen_layer(context_features=FEATURES, **options):
    """The module and random variables."""
    module = linen.MultiHeadDotProductAttention(HEADS, **options)
    arrays = inputs(), inputs(features=context_features)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arrays)
    rng = np.random.default_rng(0)
    return module, jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes
    )


def torch_layer(torch, **options):
    """Biases of a fresh layer are zero and would hide errors."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(FEATURES, HEADS, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def state_of(layer):
    return {name: x.numpy() for name, x in layer.state_dict().items()}


def run_torch(torch, layer, x, context=None, value=None, **masks):
    """Of batches first, whatever the layer says."""
    arrays = [x, x if context is None else context]
    arrays.append(arrays[-1] if value is None else value)
    tensors = [torch.from_numpy(np.array(a)) for a in arrays]
    if not layer.batch_first:
        tensors = [t.transpose(0, 1) for t in tensors]
    masks = {name: torch.from_numpy(np.array(m)) for name, m in masks.items()}
    with torch.no_grad():
        output, _ = layer(*tensors, need_weights=False, **masks)
    return (output if layer.batch_first else output.transpose(0, 1)).numpy()


@functools.cache
def context(features=FEATURES):
    return inputs(1, length=KEYS, features=features)


def mask(queries=LENGTH, keys=KEYS, heads=1):
    """Every query may attend to the first key, so that no row is empty."""
    allowed = np.random.default_rng(2).random((BATCH, heads, queries, keys)) < 0.6
    return allowed | (np.arange(keys) == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False, "num_kv_heads": 2}, {"in_kv_features": CONTEXT, **WIDTHS}],
    ids=str,
)
def test_nnx(options):
    layer, x = nnx_layer(**options), inputs()
    other = context(layer.in_kv_features)
    ours = import_attention(layer)
    expected = run(layer, x, other, mask=mask(heads=HEADS))
    np.testing.assert_allclose(run(ours, x, other, mask=mask(heads=HEADS)), expected, **CLOSE)
    if layer.in_kv_features == FEATURES:
        np.testing.assert_allclose(run(ours, x), run(layer, x), **CLOSE)


@pytest.mark.parametrize(
    ("options", "context_features"),
    [({}, FEATURES), ({"use_bias": False}, FEATURES), (WIDTHS, CONTEXT)],
    ids=str,
)
def test_linen(options, context_features):
    module, variables = linen_layer(context_features, **options)
    apply = jax.jit(module.apply)
    x, other = inputs(), context(context_features)
    ours = import_attention(variables["params"], num_heads=HEADS)
    expected = apply(variables, x, other, mask=mask())
    np.testing.assert_allclose(run(ours, x, other, mask=mask()), expected, **CLOSE)
    if context_features == FEATURES:
        np.testing.assert_allclose(run(ours, x), apply(variables, x), **CLOSE)


def test_linen_parameters_in_boxes_and_under_their_collection():
    module, variables = linen_layer()
    boxed = jax.tree.map(lambda x: linen.Partitioned(x, (None,) * x.ndim), variables)
    expected = jax.jit(module.apply)(variables, inputs())
    np.testing.assert_allclose(run(import_attention(boxed), inputs()), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "batch_first": True},
        {"kdim": CONTEXT, "vdim": CONTEXT},
        {"kdim": CONTEXT, "vdim": CONTEXT, "bias": False},
        {"add_zero_attn": True},
    ],
    ids=str,
)
def test_torch(torch, options):
    layer, x = torch_layer(torch, **options), inputs()
    allowed, seen = mask()[0, 0], np.arange(KEYS) < np.array([[KEYS], [4]])
    zero = "softmax_one" if layer.add_zero_attn else "softmax"
    given = import_attention(layer.state_dict(), num_heads=HEADS, normalizer=zero)
    for ours in (import_attention(layer), given):
        other = context(layer.kdim)
        masks = {"attn_mask": ~allowed, "key_padding_mask": ~seen}
        expected = run_torch(torch, layer, x, other, **masks)
        both = allowed & seen[:, None, None]
        np.testing.assert_allclose(run(ours, x, other, mask=both), expected, **CLOSE)
        if layer.kdim == FEATURES:
            np.testing.assert_allclose(run(ours, x), run_torch(torch, layer, x), **CLOSE)


def test_torch_keys_and_values_of_different_inputs_by_the_remedy(torch):
    layer, x = torch_layer(torch, kdim=CONTEXT, vdim=3), inputs()
    with pytest.raises(ValueError, match="widths 5 and 3: concatenate both into one context"):
        import_attention(layer)
    state = state_of(layer)
    state["k_proj_weight"] = np.pad(state["k_proj_weight"], ((0, 0), (0, 3)))
    state["v_proj_weight"] = np.pad(state["v_proj_weight"], ((0, 0), (CONTEXT, 0)))
    key, value = context(CONTEXT), context(3)
    ours = import_attention(state, num_heads=HEADS)
    actual = run(ours, x, jnp.concatenate([key, value], -1))
    np.testing.assert_allclose(actual, run_torch(torch, layer, x, key, value), **CLOSE)


def test_dtype_is_kept(torch):
    layer = torch_layer(torch).to(torch.bfloat16)
    for source in (nnx_layer(param_dtype=jnp.bfloat16), layer):
        ours = import_attention(source)
        assert {x.dtype.name for x in jax.tree.leaves(nnx.state(ours))} == {"bfloat16"}
    np.testing.assert_array_equal(
        ours.output.kernel[...].astype(jnp.float32), layer.out_proj.weight.T.float().detach()
    )


def test_what_is_imported_is_a_copy(torch):
    layer = torch_layer(torch)
    for source in (layer, layer.state_dict(), state := state_of(layer)):
        ours = import_attention(source, num_heads=HEADS)
        before = np.array(ours.output.bias[...])
        with torch.no_grad():
            layer.out_proj.bias.add_(1)
        if source is state:
            state["out_proj.bias"] += 1
        np.testing.assert_array_equal(ours.output.bias[...], before)


def test_arrays_of_a_state_dict_need_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    ours = import_attention(numpy_state(), num_heads=2)
    assert run(ours, jnp.ones((1, 3, 4))).shape == (1, 3, 4)


def numpy_state():
    shapes = {"in_proj_weight": (12, 4), "in_proj_bias": (12,)}
    shapes |= {"out_proj.weight": (4, 4), "out_proj.bias": (4,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("rule", "kernel"),
    [
        ("learned * gaussian(width=2, trainable=True)", attn_jax.Gaussian(2.0)),
        ("mix(learned * window(radius=2), learned * window(radius=2))", attn_jax.Window(2.0)),
    ],
)
def test_a_kernel_on_pretrained_weights(rule, kernel):
    layer, x = nnx_layer(), inputs()
    ours = import_attention(layer, rule=rule)
    r = np.arange(LENGTH) - np.arange(LENGTH)[:, None]
    bias = kernel.log_weight(r[None, None])
    layer.attention_fn = functools.partial(nnx.dot_product_attention, bias=bias)
    np.testing.assert_allclose(run(ours, x), run(layer, x), **CLOSE)


def test_a_layer_that_already_follows_a_rule():
    rule = "learned:1, learned * gaussian(width=(1, 2, 3)):3"
    layer = nnx_layer(attention_fn=attention_fn(rule))
    with pytest.raises(ValueError, match=r"function that is not Flax's own.*name the rule"):
        import_attention(layer)
    ours = import_attention(layer, rule=rule)
    np.testing.assert_allclose(run(ours, inputs()), run(layer, inputs()), **CLOSE)


def test_gradients_are_those_of_the_layer():
    layer, x, other = nnx_layer(), inputs(), context()
    ours = import_attention(layer)

    def gradients(module):
        graph, state = nnx.split(module)
        loss = lambda state, x: jnp.square(nnx.merge(graph, state)(x, other)).sum()  # noqa: E731
        by_state, by_input = jax.jit(jax.grad(loss, (0, 1)))(state, x)
        return nnx.to_pure_dict(by_state), by_input

    (mine, to_x), (theirs, to_their_x) = gradients(ours), gradients(layer)
    branch = mine["groups"][0]["branches"][0]
    mine = {"query": branch["query"], "key": branch["key"]} | mine
    for name, same in (("query",) * 2, ("key",) * 2, ("value",) * 2, ("output", "out")):
        for parameter, expected in theirs[same].items():
            actual = mine[name][parameter].reshape(expected.shape)
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(to_x, to_their_x, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_import_itself():
    module, variables = linen_layer()
    loss = lambda call: jnp.square(call(inputs())).sum()  # noqa: E731
    ours, expected = (
        jax.jit(jax.grad(function))(variables)
        for function in (
            lambda variables: loss(import_attention(variables)),
            lambda variables: loss(lambda x: module.apply(variables, x)),
        )
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected
    )


def test_options_are_carried_over_or_given(torch):
    dropping = nnx.MultiHeadAttention(HEADS, FEATURES, dropout_rate=0.25, rngs=nnx.Rngs(0))
    dropping.init_cache((BATCH, LENGTH, FEATURES))
    ours = import_attention(dropping)
    assert (ours.attention_dropout_rate, ours.normalizer) == (0.25, "softmax")
    assert import_attention(torch_layer(torch, dropout=0.5)).attention_dropout_rate == 0.5
    assert import_attention(torch_layer(torch, add_zero_attn=True)).normalizer == "softmax_one"
    given = {"attention_dropout_rate": 0.0, "normalizer": "sigmoid", "implementation": "dense"}
    ours = import_attention(dropping, **given)
    assert {name: getattr(ours, name) for name in given} == given


def changed(parts, **given):
    return {name: x for name, x in (parts | given).items() if x is not None}


def test_layers_that_do_not_read():
    _, variables = linen_layer()
    params = variables["params"]
    unknown = r"import_attention reads an nnx\.MultiHeadAttention.*, got "
    for layer, got in (
        (attention_module("learned"), "a MultiHeadAttention: pass that part"),
        (linen.MultiHeadDotProductAttention(HEADS), "a MultiHeadDotProductAttention"),
        ({}, "nothing"),
        ({"params": {"encoder": params}}, "encoder: pass that part"),
        ({f"layer{i}": params for i in range(9)}, r"layer0, .*layer7, \.\.\.: "),
        ({f"self_attn.{name}": x for name, x in numpy_state().items()}, r"self_attn\.in_proj_w"),
        (types.SimpleNamespace(state_dict=lambda: {"weight": np.ones(3)}), "weight: pass"),
    ):
        with pytest.raises(ValueError, match=unknown + got):
            import_attention(layer)
    with pytest.raises(ValueError, match="trained with normalize_qk=False"):
        import_attention(nnx_layer(normalize_qk=True))
    with pytest.raises(ValueError, match="trained with normalize_qk=False"):
        import_attention(linen_layer(normalize_qk=True)[1])
    adapted = nnx_layer()
    adapted.query = nnx.LoRA(FEATURES, 2, FEATURES, base_module=adapted.query, rngs=nnx.Rngs(0))
    for layer, got in (
        (changed(params, out=None), "key/bias, key/kernel"),
        (changed(params, gate=jnp.ones(4)), ".*gate.*: merge or leave out"),
        (adapted, r".*query/base_module/kernel, .*, \.\.\."),
    ):
        with pytest.raises(
            ValueError, match=f"a kernel and maybe a bias for each of .*, got .*{got}"
        ):
            import_attention(layer)


def test_parameters_of_flax_that_do_not_fit():
    _, variables = linen_layer()
    params = variables["params"]
    with pytest.raises(ValueError, match=r"kernels of one layer .* x\[i\], params\)"):
        import_attention(jax.tree.map(lambda x: jnp.stack([x, x]), params))
    wide = changed(params["value"], kernel=jnp.ones((CONTEXT, HEADS, 2)))
    with pytest.raises(ValueError, match="widths 8 and 5: concatenate both into one context"):
        import_attention(changed(params, value=wide))
    for name, shape in (("out", (2, 4, 8)), ("value", (8, 2, 2)), ("key", (8, 4, 1))):
        part = changed(params[name], kernel=jnp.ones(shape))
        with pytest.raises(ValueError, match="kernels must fit each other as query"):
            import_attention(changed(params, **{name: part}))
    for bias in (None, jnp.ones((2, 2))):
        with pytest.raises(ValueError, match=r"all projections have a bias, .* give zeros"):
            import_attention(changed(params, key=changed(params["key"], bias=bias)))
    with pytest.raises(ValueError, match="the layer has 4 heads, got num_heads=2: leave it out"):
        import_attention(params, num_heads=2)
    with pytest.raises(ValueError, match="weights are floating, got int8"):
        import_attention(jax.tree.map(lambda x: x.astype(jnp.int8), params))


def test_states_of_torch_that_do_not_fit(torch):
    layer, state = torch_layer(torch), numpy_state()
    with pytest.raises(ValueError, match="does not say how many heads it has: pass num_heads"):
        import_attention(layer.state_dict())
    for heads in (3, 0):
        with pytest.raises(ValueError, match="num_heads must divide the width of all heads, 4"):
            import_attention(state, num_heads=heads)
    with pytest.raises(ValueError, match="the layer has 4 heads, got num_heads=2"):
        import_attention(layer, num_heads=2)
    with pytest.raises(ValueError, match=r"got bias_k and bias_v: .*add_bias_kv=False"):
        import_attention(torch_layer(torch, add_bias_kv=True))
    with pytest.raises(ValueError, match=r"import_attention reads .*, got linear1\.weight"):
        import_attention({"linear1.weight": state["out_proj.weight"]})
    for wrong in ({"in_proj_weight": None}, {"norm.weight": np.ones(4)}):
        with pytest.raises(ValueError, match="a state_dict of attention has in_proj_weight"):
            import_attention(changed(state, **wrong), num_heads=2)
    for name, shape in (("in_proj_weight", (8, 4)), ("in_proj_bias", (4,)), ("out_proj.bias", ())):
        with pytest.raises(ValueError, match=r"in_proj_weight \[3 W, E\] or .*, got "):
            import_attention(changed(state, **{name: np.ones(shape, np.float32)}), num_heads=2)


def test_rules_without_learned_content():
    state = numpy_state()
    for rule, got in (
        ("gaussian", "gaussian"),
        ("learned:1, uniform:1", "uniform"),
        ("mix(learned, raw)", "raw"),
        ("additive", "additive"),
    ):
        with pytest.raises(ValueError, match=f"'learned' as its content, got '{got}'.*multiply"):
            import_attention(state, num_heads=2, rule=rule)
    import_attention(state, num_heads=2, rule="learned(key_width=2)")
    with pytest.raises(ValueError, match=r"width 2, got key_width=3 .*leave it out"):
        import_attention(state, num_heads=2, rule="learned(key_width=3)")
    with pytest.raises(ValueError, match="did you mean 'learned'"):
        import_attention(state, num_heads=2, rule="lerned")
