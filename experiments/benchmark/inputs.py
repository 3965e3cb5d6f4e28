"""Inputs of benchmarks: standard normal numbers that depend on the seed and the shape only."""

from collections.abc import Sequence

import numpy as np

FORWARD = 1e-5
"""Tolerance of float32 values relative to the largest: eps is 1.2e-7, and logits of size 5, sums of
64 products and of thousands of weights each round a few times. What computes something else is off
by 1e-2 or more."""

DERIVATIVE = 1e-4
"""Tolerance of float32 derivatives: sums over all queries of terms that cancel."""

HALF = 3e-2
"""Tolerance of bfloat16: eps is 7.8e-3, and inputs, weights and results are rounded to it."""


def normal(shape: Sequence[int], seed: int) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(tuple(shape), np.float32)


def normals(count: int, shape: Sequence[int], first_seed: int = 0) -> list[np.ndarray]:
    """Several such arrays, all different."""
    return [normal(shape, first_seed + index) for index in range(count)]


def shape_text(shape: Sequence[int], dtype: str = "float32") -> str:
    """A shape as tables show it."""
    return f"({', '.join(map(str, shape))}) {dtype}"
