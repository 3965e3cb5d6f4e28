"""Attention layers of other libraries as ours: Flax NNX, Flax Linen and torch."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from jaxtyping import Array, Float

from attn_jax.nn.attention import MultiHeadAttention
from attn_jax.rules import Product, parse

Params = dict[str, dict[str, Array]]
"""Flax's layout: query [E, N, H], key and value [C, K, H], out [N, H, F]; each kernel and bias."""

_LAYERS = ("query", "key", "value", "out")
_TORCH_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Source(NamedTuple):
    """What a layer of another library is made of."""

    params: Params
    dropout_rate: float = 0.0
    normalizer: str = "softmax"


def import_attention(
    layer: Any,
    *,
    num_heads: int | None = None,
    rule: str | None = None,
    attention_dropout_rate: float | None = None,
    normalizer: str | None = None,
    implementation: str | None = None,
) -> MultiHeadAttention:
    """A trained attention layer of another library, as a module with the same outputs.

    | layer | its weights |
    | --- | --- |
    | `flax.nnx.MultiHeadAttention` | the module |
    | `flax.linen.MultiHeadAttention`, `MultiHeadDotProductAttention` | `variables["params"]` |
    | `torch.nn.MultiheadAttention` | the module, or its `state_dict()` of tensors or arrays |

        import_attention(layer)
        import_attention(variables["params"]["encoder"]["attention"])
        import_attention(torch_layer.state_dict(), num_heads=8)
        import_attention(layer, rule="learned * gaussian(width=4, trainable=True)")

    The last one multiplies a kernel onto pretrained weights. The weights are copied and keep their
    dtype. `module(x, context, mask=...)` then gives what the layer gives, for batches first and
    for one context of keys and values. Masks are true where a query may attend, so those of torch
    are inverted: `mask=~attn_mask`. Only a query that may attend to nothing differs: zero mixed
    values, where Flax has the mean of all and torch has NaN.

    Grouped key/value heads of Flax (num_kv_heads) become a copy for every query head; training
    then moves each on its own. `decode` has no counterpart: every module has `init_cache`.

    Args:
      layer: as above.
      num_heads: N, which a state_dict of torch does not say; of other layers it is only checked.
      rule: by name, see `attn_jax.rules`; every head looks at `learned` content. None: "learned".
      attention_dropout_rate: None: that of the layer, 0 where only weights are given. Weights are
        dropped while the call has a dropout_key.
      normalizer: see `attn_jax.attention`. None: "softmax", and "softmax_one" for a torch layer
        with add_zero_attn, which is the same; a state_dict does not say whether it has it.
      implementation: see `attn_jax.attention`.

    Returns:
      The module, with in_features, context_features, qkv_features, out_features and use_bias as
      the weights have them.

    Raises:
      ValueError: `layer` is none of these; it has parameters without a counterpart here
        (normalize_qk, add_bias_kv, adapters) or an attention_fn of its own while no rule is given;
        keys and values of different widths (kdim and vdim, inputs_k and inputs_v), as one context
        is read here; shapes that do not fit each other; num_heads missing or wrong; a rule that
        does not read, or heads of it without `learned`.

    """
    source = _read(layer, num_heads, rule)
    params, rule = source.params, "learned" if rule is None else rule
    _check_shapes(params)
    in_features, heads, head_width = params["query"]["kernel"].shape
    if num_heads not in (None, heads):
        raise ValueError(f"the layer has {heads} heads, got num_heads={num_heads!r}: leave it out")
    for group in parse(rule, heads):
        for product in group.products:
            _check_learned(product, head_width, rule)
    if attention_dropout_rate is None:
        attention_dropout_rate = source.dropout_rate
    module = MultiHeadAttention(
        heads,
        in_features,
        rule=rule,
        context_features=params["key"]["kernel"].shape[0],
        qkv_features=heads * head_width,
        out_features=params["out"]["kernel"].shape[2],
        use_bias="bias" in params["query"],
        attention_dropout_rate=attention_dropout_rate,
        normalizer=source.normalizer if normalizer is None else normalizer,
        implementation=implementation,
        rngs=nnx.Rngs(0),  # of values that are all replaced: kernels of a rule start without any
    )
    _fill(module, params)
    return module


def _read(layer: Any, num_heads: int | None, rule: str | None) -> _Source:
    if isinstance(layer, nnx.MultiHeadAttention):
        return _from_nnx(layer, rule)
    if callable(getattr(layer, "state_dict", None)):
        return _from_torch(layer, num_heads)
    if isinstance(layer, Mapping):
        layer = layer.get("params", layer)
        if "query" in layer:
            return _Source(_from_flax(meta.unbox(layer)))
        if "out_proj.weight" in layer:
            return _Source(_from_state(layer, num_heads))
    raise _unreadable(layer)


def _unreadable(layer: Any) -> ValueError:
    got = _some(layer) if isinstance(layer, Mapping) else f"a {type(layer).__qualname__}"
    return ValueError(
        "import_attention reads an nnx.MultiHeadAttention, the parameters of a flax.linen one "
        "(query, key, value, out), a torch.nn.MultiheadAttention or its state_dict "
        f"(in_proj_weight, out_proj.weight, ...), got {got}: pass that part of a model which is "
        "one attention layer, its names without a prefix"
    )


def _some(names: Iterable[Any]) -> str:
    """The names, or the first of them: a model has thousands."""
    names = [str(name) for name in names]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"


def _from_nnx(layer: nnx.MultiHeadAttention, rule: str | None) -> _Source:
    if rule is None and layer.attention_fn is not nnx.dot_product_attention:
        raise ValueError(
            f"the layer attends by a function that is not Flax's own, got {layer.attention_fn!r}: "
            "name the rule that it follows, rule='learned' where it is products alone"
        )
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    return _Source(_from_flax(params), float(layer.dropout_rate))


def _from_flax(params: Mapping[Any, Any]) -> Params:
    if {"query_ln", "key_ln"} & set(params):
        raise ValueError(
            "queries and keys are not normalised here, got query_ln and key_ln: import a layer "
            "that was trained with normalize_qk=False"
        )
    if set(params) != set(_LAYERS) or not all(map(_is_linear, params.values())):
        leaves = jax.tree.leaves_with_path(params)
        found = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
        raise ValueError(
            "the parameters of an attention layer are a kernel and maybe a bias for each of query, "
            f"key, value and out, got {_some(found)}: merge or leave out what goes beyond them"
        )
    return {name: {key: _array(x) for key, x in params[name].items()} for name in _LAYERS}


def _is_linear(part: Any) -> bool:
    return isinstance(part, Mapping) and {"kernel"} <= set(part) <= {"kernel", "bias"}


def _from_torch(layer: Any, num_heads: int | None) -> _Source:
    state = layer.state_dict()
    if "out_proj.weight" not in state:
        raise _unreadable(state)
    return _Source(
        _from_state(state, getattr(layer, "num_heads", num_heads)),
        float(getattr(layer, "dropout", 0.0)),
        "softmax_one" if getattr(layer, "add_zero_attn", False) else "softmax",
    )


def _from_state(state: Mapping[str, Any], num_heads: int | None) -> Params:
    """In Flax's layout: torch multiplies from the left, and has heads side by side."""
    state = {name: x for name, x in state.items() if x is not None}
    _check_names(state)
    state = {name: _array(x) for name, x in state.items()}
    _check_state(state)
    if "in_proj_weight" in state:
        weights = jnp.split(state["in_proj_weight"], 3)
    else:
        weights = [state[name] for name in _TORCH_WEIGHTS]
    biases = jnp.split(state["in_proj_bias"], 3) if "in_proj_bias" in state else (None,) * 3
    heads = _heads_and_width(weights[0].shape[0], num_heads)
    params = {
        name: _layer(weight.T.reshape(-1, *heads), None if bias is None else bias.reshape(heads))
        for name, weight, bias in zip(_LAYERS, weights, biases, strict=False)
    }
    kernel = state["out_proj.weight"].T.reshape(*heads, -1)
    return params | {"out": _layer(kernel, state.get("out_proj.bias"))}


def _layer(kernel: Array, bias: Array | None) -> dict[str, Array]:
    return {"kernel": kernel} | ({} if bias is None else {"bias": bias})


def _heads_and_width(width: int, num_heads: int | None) -> tuple[int, int]:
    if num_heads is None:
        raise ValueError("a state_dict does not say how many heads it has: pass num_heads")
    if not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"num_heads must divide the width of all heads, {width}, got {num_heads!r}: pass the "
            "num_heads that the layer was built with"
        )
    return num_heads, width // num_heads


def _check_names(state: Mapping[str, Any]) -> None:
    if "bias_k" in state or "bias_v" in state:
        raise ValueError(
            "no rule here has a key and value that belong to no position, got bias_k and bias_v: "
            "import a layer that was built with add_bias_kv=False, or concatenate them to the "
            "projected keys and values and call attn_jax.attention"
        )
    weights = {"in_proj_weight"} & set(state) or set(_TORCH_WEIGHTS)
    needed = weights | {"out_proj.weight"}
    if not needed <= set(state) <= needed | {"in_proj_bias", "out_proj.bias"}:
        raise ValueError(
            "a state_dict of attention has in_proj_weight (or q_, k_ and v_proj_weight) and "
            f"out_proj.weight, maybe in_proj_bias and out_proj.bias, got {_some(state)}: pass the "
            "entries of one torch.nn.MultiheadAttention"
        )


def _check_state(state: Mapping[str, Array]) -> None:
    shapes = {name: x.shape for name, x in state.items()}
    width = shapes["out_proj.weight"][-1:]
    rows = {name: (3 if name.startswith("in_") else 1) for name in shapes if "." not in name}
    ranks_fit = all(len(shape) == 1 + name.endswith("weight") for name, shape in shapes.items())
    if not ranks_fit or any(shapes[name][0] != n * width[0] for name, n in rows.items()):
        raise ValueError(
            "the shapes of a state_dict are in_proj_weight [3 W, E] or q_proj_weight [W, E], k_ "
            "and v_proj_weight [W, C], in_proj_bias [3 W] and out_proj.weight [F, W], got "
            f"{shapes}: pass the entries of one layer as torch saves them"
        )


def _array(x: Any) -> Float[Array, "..."]:
    """A copy, also of a tensor of torch, which is not imported for it."""
    dtype = str(getattr(x, "dtype", "float32")).removeprefix("torch.")
    if "float" not in dtype:
        raise ValueError(f"weights are floating, got {dtype}: pass them as before quantisation")
    if hasattr(x, "detach"):
        # through float64, because torch's own conversion does not know bfloat16
        x = x.detach().cpu().double().numpy().astype(jnp.dtype(dtype))
    # a copy, because an array of NumPy could share its memory with whoever trains the original
    return jnp.array(x)


def _check_shapes(params: Params) -> None:
    shapes = {name: params[name]["kernel"].shape for name in _LAYERS}
    if any(len(shape) != 3 for shape in shapes.values()):
        raise ValueError(
            "kernels of one layer are query [E, N, H], key and value [C, K, H] and out [N, H, F], "
            f"got {shapes}: of stacked layers pass one, jax.tree.map(lambda x: x[i], params)"
        )
    if shapes["key"][0] != shapes["value"][0]:
        raise ValueError(
            "keys and values are projected from one context here, got contexts of widths "
            f"{shapes['key'][0]} and {shapes['value'][0]}: concatenate both into one context and "
            "give either kernel zeros for the features that it does not read"
        )
    heads, width = shapes["query"][1:]
    fits = shapes["key"] == shapes["value"] and shapes["key"][2] == width
    if not fits or shapes["out"][:2] != (heads, width) or heads % shapes["key"][1]:
        raise ValueError(
            "kernels must fit each other as query [E, N, H], key and value [C, K, H] with N a "
            f"multiple of K, and out [N, H, F], got {shapes}: pass the weights of one layer"
        )
    _check_biases(params)


def _check_biases(params: Params) -> None:
    expected = {name: params[name]["kernel"].shape[1:] for name in _LAYERS}
    expected["out"] = params["out"]["kernel"].shape[2:]
    got = {name: params[name]["bias"].shape for name in _LAYERS if "bias" in params[name]}
    if got and got != expected:
        raise ValueError(
            f"all projections have a bias, {expected}, or none has one, got {got}: give zeros to "
            "those without"
        )


def _check_learned(product: Product, head_width: int, rule: str) -> None:
    content = product.content
    if content is None or content.name != "learned":
        raise ValueError(
            "imported queries and keys belong to heads whose rule has 'learned' as its content, "
            f"got {str(product)!r} in {rule!r}: multiply, as in 'learned * gaussian(width=4)'; to "
            "leave queries and keys behind, import by 'learned' and take its value and output"
        )
    if content["key_width"] not in (None, head_width):
        raise ValueError(
            f"imported queries and keys have width {head_width}, got "
            f"key_width={content['key_width']} in {rule!r}: leave it out"
        )


def _fill(module: MultiHeadAttention, params: Params) -> None:
    """Replaces the module's projections, each group of heads with its part."""
    query, out = params["query"], params["out"]
    key, value = (_for_every_query_head(params[name], query) for name in ("key", "value"))
    for group in module.groups:
        own = slice(group.first_head, group.first_head + group.num_heads)
        for branch in group.branches:
            _replace(branch.query, {name: x[..., own, :] for name, x in query.items()})
            _replace(branch.key, {name: x[..., own, :] for name, x in key.items()})
    _replace(module.value, value)
    _replace(module.output, out)


def _for_every_query_head(layer: dict[str, Array], query: dict[str, Array]) -> dict[str, Array]:
    """Kernel [C, K, H] and bias [K, H] repeated to N heads: query head n reads n // (N / K)."""
    repeats = query["kernel"].shape[1] // layer["kernel"].shape[1]
    if repeats == 1:
        return layer
    return {name: jnp.repeat(x, repeats, axis=-2) for name, x in layer.items()}


def _replace(linear: nnx.Linear, arrays: dict[str, Array]) -> None:
    for name, x in arrays.items():
        # a new parameter, because the old one would cast to its own dtype
        setattr(linear, name, nnx.Param(x.reshape(getattr(linear, name).shape)))
