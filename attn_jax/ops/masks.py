"""Masks as data: which keys a query may attend to (True = attend).

Python numbers in a mask are static: they belong to its structure, and are known while a program is
traced. Arrays are data: leaves of the pytree, changed without tracing again. Masks combine with
each other and with boolean arrays by `&` and `|`, in either order.

Letters: B batch, b batch or 1, T queries, S keys, N heads.
"""

# ruff: noqa: D102 (the base class documents what subclasses override)

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from attn_jax.ops.positions import Either, Grid

Allowed = Bool[Either, "#B #N #T #S"]


class Mask:
    """Base class of masks; a subclass says what is `allowed` on a grid of query-key pairs."""

    # NumPy must leave `array & mask` and `array | mask` to the reflected methods below.
    __array_ufunc__ = None

    def __init_subclass__(cls):
        jax.tree_util.register_pytree_with_keys(cls, _flatten, _unflattener(cls))

    def allowed(self, grid: Grid) -> Allowed:
        """Whether the query may attend to the key; NumPy where that is known while tracing."""
        raise NotImplementedError(f"{type(self).__name__} must override allowed(grid).")

    def band(self) -> tuple[float, float]:
        """(before, after): no key is allowed outside -before <= r <= after; inf if not known."""
        return math.inf, math.inf

    def check(self, batch: int, queries: int, keys: int) -> None:
        """Raise ValueError for data whose shape or dtype doesn't fit the call."""
        del batch, queries, keys

    def __and__(self, other: Any) -> "Mask":
        return Both(self, as_mask(other))

    def __rand__(self, other: Any) -> "Mask":
        return Both(as_mask(other), self)

    def __or__(self, other: Any) -> "Mask":
        return OneOf(self, as_mask(other))

    def __ror__(self, other: Any) -> "Mask":
        return OneOf(as_mask(other), self)


def _is_static(value: Any) -> bool:
    return value is None or isinstance(value, numbers.Number | np.generic)


def _flatten(mask: Mask):
    fields = [(f.name, getattr(mask, f.name)) for f in dataclasses.fields(mask)]  # pyright: ignore[reportArgumentType]
    data = [(name, value) for name, value in fields if not _is_static(value)]
    known = tuple((name, value) for name, value in fields if _is_static(value))
    names = tuple(name for name, _ in data)
    return [(jax.tree_util.GetAttrKey(n), v) for n, v in data], (names, known)


def _unflattener(cls: type):
    def unflatten(structure: Any, data: Any) -> Mask:
        names, known = structure
        mask = object.__new__(cls)
        for name, value in (*known, *zip(names, data, strict=True)):
            object.__setattr__(mask, name, value)
        return mask

    return unflatten


def as_mask(mask: Any) -> Mask:
    """A `Mask` as it is, a boolean array as one.

    Raises:
      ValueError: for anything else.

    """
    if isinstance(mask, Mask):
        return mask
    array = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if array.dtype != bool:
        raise ValueError(
            f"A mask must be boolean (True = attend) or an attn_jax Mask; got {array.dtype} of "
            f"shape {array.shape}. For weights that are added to the logits use bias=."
        )
    return Array(array)


@dataclasses.dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Keys at or before the query's position: r <= 0."""

    def allowed(self, grid: Grid) -> Allowed:
        return grid.relative <= 0

    def band(self) -> tuple[float, float]:
        return math.inf, 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Local(Mask):
    """Keys with -before <= r <= after, both ends included.

    Args:
      before: how far before the query, not negative; a number, or an array [] or [B] of data.
      after: how far after it, likewise.

    """

    before: Any
    after: Any

    def allowed(self, grid: Grid) -> Allowed:
        r = grid.relative
        return (r >= -_per_batch(self.before)) & (r <= _per_batch(self.after))

    def band(self) -> tuple[float, float]:
        return tuple(float(x) if _is_static(x) else math.inf for x in (self.before, self.after))  # pyright: ignore[reportReturnType]

    def check(self, batch: int, queries: int, keys: int) -> None:
        del queries, keys
        for name in ("before", "after"):
            side = getattr(self, name)
            _check_per_batch(f"Local's {name}", side, batch)
            if not isinstance(side, jax.Array) and np.any(np.asarray(side) < 0):
                raise ValueError(f"Local's {name} must be 0 or more; got {side!r}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Keys whose position is below `length`, for every query: `Causal() | Prefix(n)` is prefix LM.

    Args:
      length: a number, or an array [] or [B] of data.

    """

    length: Any

    def allowed(self, grid: Grid) -> Allowed:
        return grid.key_positions[:, None, None, :] < _per_batch(self.length)

    def check(self, batch: int, queries: int, keys: int) -> None:
        del queries, keys
        _check_per_batch("Prefix's length", self.length, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """Queries with index below `query` and keys with index below `key`, one length a sequence.

    Args:
      query: [B] (or a scalar for all); None does not limit the queries.
      key: [B] (or a scalar for all); None does not limit the keys.

    """

    query: Any = None
    key: Any = None

    def allowed(self, grid: Grid) -> Allowed:
        allowed = np.ones((1, 1, 1, 1), bool)
        if self.query is not None:
            allowed = allowed & (grid.query_index.reshape(1, 1, -1, 1) < _per_batch(self.query))
        if self.key is not None:
            allowed = allowed & (grid.key_index.reshape(1, 1, 1, -1) < _per_batch(self.key))
        return allowed

    def check(self, batch: int, queries: int, keys: int) -> None:
        del queries, keys
        for name in ("query", "key"):
            if (lengths := getattr(self, name)) is not None:
                _check_per_batch(f"Lengths' {name}", lengths, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Queries and keys that carry the same integer.

    Args:
      query: [B, T] (or [T] for all sequences).
      key: [B, S] (or [S]); None takes the queries' own, for self-attention.

    """

    query: Any
    key: Any = None

    def pair(self) -> tuple[Shaped[Either, "#B T"], Shaped[Either, "#B S"]]:
        """The queries' and the keys' numbers, each [1 or B, length]."""
        query = _two_axes(self.query)
        return query, query if self.key is None else _two_axes(self.key)

    def allowed(self, grid: Grid) -> Allowed:
        query, key = self.pair()
        query, key = grid.rows(query, 1), grid.columns(key, 1)
        return query[:, None, :, None] == key[:, None, None, :]

    def check(self, batch: int, queries: int, keys: int) -> None:
        for name, array, length in zip(("query", "key"), self.pair(), (queries, keys), strict=True):
            if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] != length:
                raise ValueError(
                    f"Segments' {name} must be [{batch}, {length}] or [{length}]; got shape "
                    f"{tuple(array.shape)}. For other keys than queries give Segments(query, key)."
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Array(Mask):
    """A boolean array, each axis full or 1.

    Args:
      array: [B, N, T, S].

    """

    array: Any

    def allowed(self, grid: Grid) -> Allowed:
        return grid.columns(grid.rows(self.array, 2), 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Both(Mask):
    """What two masks allow."""

    first: Mask
    second: Mask

    def allowed(self, grid: Grid) -> Allowed:
        return self.first.allowed(grid) & self.second.allowed(grid)

    def band(self) -> tuple[float, float]:
        (b1, a1), (b2, a2) = self.first.band(), self.second.band()
        return min(b1, b2), min(a1, a2)

    def check(self, batch: int, queries: int, keys: int) -> None:
        self.first.check(batch, queries, keys)
        self.second.check(batch, queries, keys)


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf(Mask):
    """What at least one of two masks allows."""

    first: Mask
    second: Mask

    def allowed(self, grid: Grid) -> Allowed:
        return self.first.allowed(grid) | self.second.allowed(grid)

    def band(self) -> tuple[float, float]:
        (b1, a1), (b2, a2) = self.first.band(), self.second.band()
        return max(b1, b2), max(a1, a2)

    def check(self, batch: int, queries: int, keys: int) -> None:
        self.first.check(batch, queries, keys)
        self.second.check(batch, queries, keys)


def _per_batch(value: Any) -> Any:
    """A number as it is; [B] as [B, 1, 1, 1]."""
    if _is_static(value):
        return value
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    return value if value.ndim == 0 else value.reshape(-1, 1, 1, 1)


def _two_axes(value: Any) -> Either:
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    return value[None] if value.ndim == 1 else value


def _check_per_batch(name: str, value: Any, batch: int) -> None:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"{name} must be a number or [{batch}], one a sequence; got shape {array.shape}."
        )
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise ValueError(f"{name} must be a number; got {array.dtype}.")
