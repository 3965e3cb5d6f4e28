"""Attention functions of other libraries as subjects; each is imported when it is asked for."""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from attn_jax.testing.dense import DenseCall, dense_call, from_dense
from attn_jax.testing.subject import Subject

# What a peer gives a query without keys. None documents it as meant; it is the value that their
# masks, a large negative number in place of -inf, have by construction.
_MEAN = "it gives such a query the mean of all values, as its masks are large negative numbers"
_DIFFERS = dict.fromkeys(("no keys: zero", "no keys: no gradient", "no keys: no tangent"), _MEAN)
_AS_BIAS = "kernels and positions are given as a dense bias and mask"
_AS_ZEROS = "attention without content is given zero queries"


class Absent(Exception):
    """A peer that is not installed: its name and why it could not be imported."""


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _jax_nn() -> Subject:
    return from_dense(
        lambda query, key, value, bias=None, mask=None, **rest: jax.nn.dot_product_attention(
            query,
            _like(query, key),
            _one_width(key, value),
            bias,
            mask,
            implementation="xla",
            **rest,
        ),
        "jax.nn",
        ("causal", "window", "lengths", "residual"),
        version=_version("jax"),
        differs=_DIFFERS,
        notes=("implementation='xla'", _AS_BIAS, _AS_ZEROS),
    )


def _like(query: Any, key: Any) -> Any:
    if query.dtype != key.dtype:
        raise NotImplementedError("query, key and value must have one dtype")
    return key


def _one_width(key: Any, value: Any) -> Any:
    """jax.nn documents that value has key's shape."""
    if value.shape != key.shape or value.dtype != key.dtype:
        raise NotImplementedError("value must have key's shape and dtype")
    return value


def _linen() -> Subject:
    from flax import linen

    def attention(query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None) -> Any:
        if query.shape[2] != key.shape[2]:
            raise NotImplementedError("it has no shared heads")
        return linen.dot_product_attention(query, _like(query, key), value, bias, mask)

    return from_dense(
        attention,
        "flax.linen",
        version=_version("flax"),
        differs=_DIFFERS,
        notes=("masks are dense", _AS_BIAS, _AS_ZEROS),
    )


def _nnx() -> Subject:
    from flax import nnx

    def attention(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        is_causal: bool = False,
    ) -> Any:
        return nnx.dot_product_attention(
            query, _like(query, key), _one_width(key, value), bias, mask, is_causal=is_causal
        )

    return from_dense(
        attention,
        "flax.nnx",
        ("causal",),
        version=_version("flax"),
        differs=_DIFFERS,
        notes=("calls jax.nn", _AS_BIAS, _AS_ZEROS),
    )


def _tokamax(implementation: Any) -> Callable[[], Subject]:
    def subject() -> Subject:
        import tokamax  # pyright: ignore[reportMissingImports]

        def attention(query: Any, key: Any, value: Any, **rest: Any) -> Any:
            if not isinstance(rest.get("scale", 1.0), int | float):
                raise NotImplementedError("its scale is a Python number")
            return tokamax.dot_product_attention(
                query, _like(query, key), value, implementation=implementation, **rest
            )

        return from_dense(
            attention,
            f"tokamax {implementation}",
            ("causal", "window", "lengths"),
            version=_version("tokamax"),
            differs=_DIFFERS,
            notes=(f"implementation={implementation!r}", _AS_BIAS, _AS_ZEROS),
        )

    return subject


def _torch() -> Subject:
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(array: Any) -> Any:
        """Through float32 or wider: NumPy's bfloat16 is unknown to torch."""
        array = np.asarray(array)
        if array.dtype == bool:
            return torch.from_numpy(array.copy())
        dtype = getattr(torch, array.dtype.name)
        wide = array.astype(np.promote_types(array.dtype, np.float32), copy=True)
        return torch.from_numpy(wide).to(dtype)

    def back(result: Any, dtype: Any) -> np.ndarray:
        wide = torch.float64 if result.dtype == torch.float64 else torch.float32
        return result.detach().to(wide).numpy().astype(dtype)

    def forward(call: DenseCall, arrays: Mapping[str, Any]) -> Any:
        query, key, value = (arrays[n].transpose(1, 2) for n in ("query", "key", "value"))
        mask = None if call.mask is None else tensor(call.mask)
        bias = arrays.get("bias")
        shape = (query.shape[2], key.shape[2])
        added = mask
        if bias is not None:
            bias = bias.to(query.dtype).expand(*bias.shape[:2], *shape)
            added = bias if mask is None else bias.masked_fill(~mask, -float("inf"))
        elif mask is not None:
            added = mask.expand(*mask.shape[:2], *shape)
        causal = call.causal
        if causal and added is not None:
            lower = torch.ones(shape, dtype=torch.bool).tril()
            added = (
                added & lower
                if added.dtype == torch.bool
                else added.masked_fill(~lower, -float("inf"))
            )
            causal = False
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=added,
            is_causal=causal,
            scale=None if call.scale is None else float(call.scale),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed.transpose(1, 2)

    def lowered(query: Any, key: Any, value: Any, arguments: Mapping[str, Any]) -> Any:
        call = dense_call(query, key, value, native=("causal",), **arguments)
        if call.return_log_normalizer:
            raise NotImplementedError("it returns no log-normaliser")
        if np.ndim(call.scale):
            raise NotImplementedError("its scale is a number")
        if len({call.query.dtype, call.key.dtype, call.value.dtype}) > 1:
            raise NotImplementedError("query, key and value must have one dtype")
        names = ("query", "key", "value", "bias")
        given = {name: getattr(call, name) for name in names}
        return call, {name: tensor(x) for name, x in given.items() if x is not None}

    def attention(query: Any, key: Any, value: Any, **arguments: Any) -> np.ndarray:
        call, arrays = lowered(query, key, value, arguments)
        return back(forward(call, arrays), value.dtype)

    def pull(
        query: Any, key: Any, value: Any, cotangent: Any, **arguments: Any
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        call, arrays = lowered(query, key, value, arguments)
        for array in arrays.values():
            array.requires_grad_()
        output = forward(call, arrays)
        gradients = torch.autograd.grad(
            output, list(arrays.values()), tensor(cotangent), allow_unused=True
        )
        named = {
            name: np.zeros(array.shape) if gradient is None else back(gradient, value.dtype)
            for (name, array), gradient in zip(arrays.items(), gradients, strict=True)
        }
        bias = arguments.get("bias")
        if bias is not None:  # a kernel that was added to it may have made it larger
            axes = tuple(axis for axis, length in enumerate(np.shape(bias)) if length == 1)
            named["bias"] = named["bias"].sum(axes, keepdims=True)
        return back(output, value.dtype), named

    return Subject(
        "torch SDPA",
        attention,
        version=_version("torch"),
        traceable=False,
        pull=pull,
        notes=("eager, through NumPy; gradients by torch.autograd", _AS_BIAS, _AS_ZEROS),
    )


_PEERS: Mapping[str, Callable[[], Subject]] = {
    "jax.nn": _jax_nn,
    "flax.linen": _linen,
    "flax.nnx": _nnx,
    "tokamax.xla": _tokamax("xla"),
    "tokamax.xla_chunked": _tokamax("xla_chunked"),
    "torch": _torch,
}


def names() -> tuple[str, ...]:
    """Names that `get` knows, whether installed or not."""
    return tuple(_PEERS)


def get(name: str) -> Subject:
    """The subject called `name`.

    Raises:
      Absent: its package can't be imported; says why.
      ValueError: there is no such peer.

    """
    if name not in _PEERS:
        raise ValueError(f"A peer must be one of {', '.join(_PEERS)}; got {name!r}.")
    try:
        return _PEERS[name]()
    except ImportError as error:
        raise Absent(f"{name} is left out: {error}") from error
