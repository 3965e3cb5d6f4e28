"""JAX functions as contenders: compiled once, timed as jit runs them, memory from the compiler."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.case import Contender, Memory, Prepared


def contender(
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    expected: Callable[[], Sequence[np.ndarray]] | None,
    *,
    stride: int = 1,
) -> Contender:
    """A contender that runs a JAX function under jit; every argument is traced."""
    return Contender(name, lambda: prepare(function, arguments), expected, stride)


def only_compiled(name: str, function: Callable[..., Any], shapes: Sequence[Any]) -> Contender:
    """A contender that states its memory and never runs, for `jax.ShapeDtypeStruct`s."""

    def compile_only() -> Prepared:
        memory = memory_of(jax.jit(function).lower(*shapes).compile())
        return Prepared(lambda _: 0.0, list, memory)

    return Contender(name, compile_only, run=False)


def prepare(function: Callable[..., Any], arguments: Sequence[Any]) -> Prepared:
    """Compiles a function for the arguments, which are put on the device once."""
    jitted = jax.jit(function)
    placed = jax.tree.map(jnp.asarray, tuple(arguments))
    memory = memory_of(jitted.lower(*placed).compile())
    # On an accelerator calls are queued, so that their launch is not what is timed; on a CPU
    # queued calls would run side by side.
    one_by_one = jax.default_backend() == "cpu"

    def seconds(calls: int) -> float:
        results = None
        start = time.perf_counter()
        for _ in range(calls):
            results = jitted(*placed)
            if one_by_one:
                jax.block_until_ready(results)
        jax.block_until_ready(results)
        return time.perf_counter() - start

    def outputs() -> list[np.ndarray]:
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jitted(*placed))]

    return Prepared(seconds, outputs, memory)


def memory_of(compiled: Any) -> Memory:
    """The bytes that the compiler states for a compiled function."""
    stated = compiled.memory_analysis()
    total = (
        stated.argument_size_in_bytes
        + stated.output_size_in_bytes
        + stated.temp_size_in_bytes
        - stated.alias_size_in_bytes
    )
    return Memory(int(stated.temp_size_in_bytes), int(total))
