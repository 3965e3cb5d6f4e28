"""What one case hands to an attention function, and how a reader is told of it.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H key width, D value width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attn_jax.ops import proximity


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of the axes of query [B, T, N, H], key [B, S, K, H] and value [B, S, K, D].

    By default no heads are shared and widths are equal, as every attention function can.
    """

    batch: int = 2
    queries: int = 6
    keys: int = 9
    heads: int = 2
    key_heads: int = 2
    key_width: int = 8
    value_width: int = 8

    @property
    def total(self) -> int:
        """How large: the sum of all lengths, by which examples are compared."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Example:
    """The arguments of one call of an attention function.

    Attributes:
      query: [B, T, N, H], a NumPy array; None together with key for attention without content.
        Within a program that is being traced, JAX arrays take the place of all three.
      key: [B, S, K, H].
      value: [B, S, K, D].
      arguments: keyword arguments as `attn_jax.attention` takes them.

    """

    query: Any
    key: Any
    value: Any
    arguments: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, N, T, S)."""
        batch, keys, key_heads, _ = self.value.shape
        if self.query is not None:
            return batch, self.query.shape[2], self.query.shape[1], keys
        kernel = self.arguments.get("proximity")
        heads = None if kernel is None else proximity.heads(kernel)
        placed: Any = self.arguments.get("query_positions")
        queries = keys if np.ndim(placed) == 0 else np.shape(placed)[-1]
        return batch, heads or key_heads, queries, keys

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(B, T, N, D)."""
        batch, heads, queries, _ = self.shape
        return batch, queries, heads, self.value.shape[3]

    @property
    def size(self) -> int:
        """How many numbers it holds, by which examples are compared."""
        arrays = (self.query, self.key, self.value)
        return sum(0 if array is None else array.size for array in arrays)

    def changed(self, **changes: Any) -> "Example":
        """The example with other arrays or arguments."""
        fields = {name: changes.pop(name) for name in ("query", "key", "value") if name in changes}
        return dataclasses.replace(self, **fields, arguments={**self.arguments, **changes})

    def __str__(self) -> str:
        arrays = [
            f"{name} {'None' if array is None else shape_text(array)}"
            for name, array in (("query", self.query), ("key", self.key), ("value", self.value))
        ]
        rest = [f"{name}={text(value)}" for name, value in self.arguments.items()]
        return f"attention({', '.join(arrays + rest)})"


def draw(
    sizes: Sizes, dtype: Any, seed: int = 0, *, content: bool = True, **arguments: Any
) -> Example:
    """An example of standard normal numbers, rounded to the dtype."""
    rng = np.random.default_rng(seed)
    s = sizes
    query = rng.normal(size=(s.batch, s.queries, s.heads, s.key_width)).astype(dtype)
    key = rng.normal(size=(s.batch, s.keys, s.key_heads, s.key_width)).astype(dtype)
    value = rng.normal(size=(s.batch, s.keys, s.key_heads, s.value_width)).astype(dtype)
    return Example(query if content else None, key if content else None, value, arguments)


def shape_text(array: Any) -> str:
    """Dtype and shape, for instance float32[2, 9, 2, 5]."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def text(value: Any) -> str:
    """A short text of an argument; arrays of more than twelve numbers by their shape."""
    if isinstance(value, np.ndarray | jax.Array):
        if value.size > 12 or jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            return shape_text(value)
        return f"{'jnp' if isinstance(value, jax.Array) else 'np'}{np.asarray(value).tolist()}"
    if dataclasses.is_dataclass(value):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        inner = ", ".join(f"{name}={text(v)}" for name, v in fields if v is not None)
        return f"{type(value).__name__}({inner})"
    return getattr(value, "__name__", None) or repr(value)
