"""Attention of others as contenders. Each is imported when it is prepared, and may be absent.

torch runs eagerly, on as many threads as the process may use cores, in its own layout
[B, N, T, H]; its tensors are made once.
"""

import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmark import compiled
from experiments.benchmark.case import Absent, Contender, Prepared
from experiments.benchmark.machine import cores
from experiments.benchmark.measure import first_line

Expected = Callable[[], Sequence[np.ndarray]]


def module(name: str) -> Any:
    """An optional module.

    Raises:
      Absent: it is not installed, or does not import.

    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise Absent(f"{package} does not import: {first_line(error)}") from error
        raise Absent(f"{package} is not installed: pip install '.[peers]'") from error
    except Exception as error:  # a package of another version may fail in any way
        raise Absent(f"{package} does not import: {first_line(error)}") from error


def load_torch() -> Any:
    """torch, set to the cores that the process may use."""
    torch = module("torch")
    torch.set_num_threads(len(cores()))
    return torch


def prepared_torch(function: Callable[[], Any]) -> Prepared:
    """A function without arguments that returns a tensor or several, ready to run on a CPU."""
    return prepared_eager(function, lambda tensor: tensor.detach().numpy())


def prepared_eager(function: Callable[[], Any], to_numpy: Callable[[Any], np.ndarray]) -> Prepared:
    """A function without arguments that has run when it returns its result or a list of them."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - start

    def outputs() -> list[np.ndarray]:
        results = function()
        several = results if isinstance(results, tuple | list) else (results,)
        return [to_numpy(result).astype(np.float64) for result in several]

    return Prepared(seconds, outputs)


def jax_nn(**options: Any) -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention` with options, as a function of query, key and value."""
    return functools.partial(jax.nn.dot_product_attention, **options)


def tokamax(
    name: str,
    derive: Callable[[Callable[..., Any]], Callable[..., Any]],
    arguments: Sequence[Any],
    expected: Expected,
    **options: Any,
) -> Contender:
    """`tokamax.dot_product_attention` with options, or what `derive` makes of it."""

    def prepare() -> Prepared:
        attend = functools.partial(module("tokamax").dot_product_attention, **options)
        return compiled.prepare(derive(attend), arguments)

    return Contender(name, prepare, expected)


def torch_forward(
    inputs: Sequence[np.ndarray], expected: Expected, *, is_causal: bool = False
) -> Contender:
    """The scaled_dot_product_attention of torch, without gradients."""

    def prepare() -> Prepared:
        torch = load_torch()
        query, key, value = (_heads_first(torch, array) for array in inputs)
        attend = torch.nn.functional.scaled_dot_product_attention

        def run() -> Any:
            with torch.no_grad():
                return attend(query, key, value, is_causal=is_causal)

        return prepared_torch(lambda: run().transpose(1, 2))

    return Contender("torch SDPA", prepare, expected)


def torch_gradient(
    cotangent: np.ndarray,
    inputs: Sequence[np.ndarray],
    expected: Expected,
    *,
    is_causal: bool = False,
) -> Contender:
    """Forward and backward pass of scaled_dot_product_attention by torch.autograd.grad."""

    def prepare() -> Prepared:
        torch = load_torch()
        seed = _heads_first(torch, cotangent)
        leaves = tuple(_heads_first(torch, array).requires_grad_() for array in inputs)
        attend = torch.nn.functional.scaled_dot_product_attention

        def run() -> Any:
            gradients = torch.autograd.grad(attend(*leaves, is_causal=is_causal), leaves, seed)
            return [gradient.transpose(1, 2) for gradient in gradients]

        return prepared_torch(run)

    return Contender("torch SDPA", prepare, expected)


def flex_attention(
    inputs: Sequence[np.ndarray], expected: Expected, *, before: int, after: int
) -> Contender:
    """FlexAttention of a window by torch.compile, forward only: on a CPU it has no backward."""

    def prepare() -> Prepared:
        torch = load_torch()
        flex = module("torch.nn.attention.flex_attention")
        query, key, value = (_heads_first(torch, array) for array in inputs)

        def in_window(batch: Any, head: Any, i: Any, j: Any) -> Any:
            del batch, head
            return (i - j <= before) & (j - i <= after)

        queries, keys = query.shape[2], key.shape[2]
        blocks = flex.create_block_mask(in_window, None, None, queries, keys, device="cpu")
        attend = torch.compile(flex.flex_attention)

        def run() -> Any:
            with torch.no_grad():
                return attend(query, key, value, block_mask=blocks)

        try:
            run()
        except Exception as error:  # torch.compile needs a C++ compiler that works
            raise Absent(f"torch.compile fails here: {first_line(error)}") from error
        return prepared_torch(lambda: run().transpose(1, 2))

    return Contender("torch FlexAttention", prepare, expected)


def _heads_first(torch: Any, array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array.swapaxes(1, 2)))
