"""The attention functions under test."""

import dataclasses
import inspect
import unittest
from collections.abc import Callable, Mapping
from typing import Any

import attn_jax


class NotSupported(unittest.SkipTest):
    """What a subject says that it can't do: neither right nor wrong. pytest shows it as skipped."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """An attention function and what the kit must know of it.

    Attributes:
      name: as it stands in tables.
      function: called as function(query, key, value, **arguments) with those keyword arguments of
        `attn_jax.attention` that a case needs. One that it has no parameter for, and a
        NotImplementedError, count as not supported. `from_dense` turns a function of dense biases
        and masks into one.
      version: of the package it comes from.
      traceable: whether it is made of JAX operations, so that jit, vmap and derivatives apply.
      pull: for one that is not: pull(query, key, value, cotangent, **arguments) gives the output
        and a mapping with the gradients of "query", "key", "value", and "bias" if given.
      differs: checks by name in which another convention was chosen on purpose, and which.
      notes: how the kit calls it, for the table.
      ours: whether it promises what only attn_jax does: mixed dtypes, our bits of dropout.

    """

    name: str
    function: Callable[..., Any]
    version: str = ""
    traceable: bool = True
    pull: Callable[..., tuple[Any, Mapping[str, Any]]] | None = None
    differs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ours: bool = False

    def __call__(self, query: Any, key: Any, value: Any, **arguments: Any) -> Any:
        """Call the function.

        Raises:
          NotSupported: it has no parameter for an argument, or raises NotImplementedError.

        """
        unknown = self._unknown(arguments)
        if unknown:
            raise NotSupported(f"it takes no {unknown[0]}")
        try:
            return self.function(query, key, value, **arguments)
        except NotImplementedError as error:
            raise NotSupported(str(error)) from error

    def _unknown(self, arguments: Mapping[str, Any]) -> list[str]:
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # a compiled function may not tell
            return []
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return []
        return [name for name in arguments if name not in parameters]


def ours(implementation: str | None = None) -> Subject:
    """`attn_jax.attention` by one of `attn_jax.implementations()`; None: as it dispatches."""

    def function(query: Any, key: Any, value: Any, **arguments: Any) -> Any:
        return attn_jax.attention(query, key, value, implementation=implementation, **arguments)

    return Subject(implementation or "attn_jax", function, ours=True)


def as_subject(function: Subject | Callable[..., Any]) -> Subject:
    """A subject as it is; any other function as one of its own name."""
    if isinstance(function, Subject):
        return function
    return Subject(getattr(function, "__name__", type(function).__name__), function)
