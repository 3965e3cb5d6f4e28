"""Proximity kernels: the log-weight of a key as a function of its distance from the query.

Letters: r = key position - query position, of shape [b, 1, T, S]; N heads. A kernel is a pytree
whose leaves are its parameters: numbers that serve all heads, or one-dimensional arrays with one
entry a head. Constructors store what they are given; `attn_jax.attention` validates it.

A parameter that is a Python or NumPy number is known while a program is traced; a `jax.Array`
never is. From known parameters follows the kernel's reach, the largest |r| that matters, which
banded implementations need.
"""

# ruff: noqa: D102 (the base class documents what subclasses override)

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped
from numpy.typing import NDArray

# A number, or an array-like of one number a head.
Parameter = Any
Relative = Num[Array | np.ndarray, "#b 1 T S"]
LogWeight = Float[Array, "#b #N T S"]


class Proximity:
    """Base class of proximity kernels: override `log_weight`, and `reach` where there is one.

    A subclass that is to pass through jit or grad is registered as a pytree, for example by
    `jax.tree_util.register_dataclass`.

    Attributes:
      reach: |r| beyond which the weight is zero, or None. It is part of the rule: `attention`
        sets the log-weight to -inf beyond it in every implementation.
      positive: names of the parameters that must be positive.
      compact: whether the weight is zero, not just small, beyond the support.

    """

    reach: Any = None
    positive: ClassVar[tuple[str, ...]] = ()
    compact: ClassVar[bool] = False

    def log_weight(self, r: Relative) -> LogWeight:
        """Log-weight of keys at relative positions r; -inf for keys that get no weight."""
        raise NotImplementedError(f"{type(self).__name__} must override log_weight(r).")

    def support(self, tolerance: float) -> float | None:
        """The |r| beyond which weights are below exp(-tolerance) times the peak, where known."""
        del tolerance
        return None


# Of a field that belongs to a kernel's structure instead of being a leaf of its pytree.
_STRUCTURE = {"static": True}


def per_head(parameter: Parameter) -> Shaped[Array, ""] | Shaped[Array, "1 N 1 1"]:
    """A parameter in a shape that broadcasts with r: a scalar stays, [N] becomes [1, N, 1, 1]."""
    parameter = jnp.asarray(parameter)
    return parameter if parameter.ndim == 0 else parameter.reshape(1, -1, 1, 1)


def log_weights(kernel: Proximity, r: Relative) -> LogWeight:
    """The kernel's log-weights, -inf beyond its stated reach."""
    weights = jnp.asarray(kernel.log_weight(r))
    if kernel.reach is None:
        return weights
    return jnp.where(abs(r) <= kernel.reach, weights, -jnp.inf)


def check(kernel: Proximity) -> None:
    """Raise ValueError for parameters that have the wrong shape, dtype, sign or are not finite.

    Values are checked where they are known while tracing, shapes and dtypes always.
    """
    name = type(kernel).__name__
    reach = kernel.reach
    if reach is not None and not (isinstance(reach, int | float | np.number) and reach >= 0):
        raise ValueError(
            f"{name}'s reach must be a number >= 0 known before tracing, or None; got {reach!r}."
        )
    if not is_built_in(kernel):
        return
    for field in dataclasses.fields(kernel):  # pyright: ignore[reportArgumentType]
        if not field.metadata.get("static"):
            _check_parameter(name, field.name, getattr(kernel, field.name), kernel.positive)


def _check_parameter(name: str, field: str, value: Parameter, positive: tuple[str, ...]) -> None:
    try:
        array = jnp.asarray(value)
    except TypeError as error:
        raise ValueError(f"{name}'s {field} must be a number or [N]; got {value!r}.") from error
    ranks = (1, 2) if field == "log_weights" else (0, 1)
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, jnp.number) or not array.size:
        allowed = "[L] or [N, L]" if field == "log_weights" else "a number or [N], one a head"
        raise ValueError(
            f"{name}'s {field} must be {allowed}; got {array.dtype} of shape {array.shape}."
        )
    known = _known(value)
    if known is None or field == "log_weights":
        return
    lowest = {"radius": 0.0}.get(field, -math.inf)
    if not np.all(np.isfinite(known)) or np.any(known < lowest):
        raise ValueError(f"{name}'s {field} must be finite and >= {lowest}; got {value}.")
    if field in positive and np.any(known <= 0):
        raise ValueError(f"{name}'s {field} must be positive; got {value}.")


def heads(kernel: Proximity) -> int | None:
    """How many heads the kernel has parameters for; None if they serve any number.

    Raises:
      ValueError: its log-weights have not the shape of r, up to the axis of heads.

    """
    pairs = jax.ShapeDtypeStruct((1, 1, 2, 3), jnp.int32)
    try:
        shape = jax.eval_shape(kernel.log_weight, pairs).shape
    except (TypeError, IndexError, ValueError) as error:
        raise ValueError(_wrong_shape(kernel, str(error).partition(chr(10))[0])) from error
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != (2, 3):
        raise ValueError(_wrong_shape(kernel, f"{list(shape)} for r of [1, 1, 2, 3]"))
    return None if shape[1] == 1 else shape[1]


def _wrong_shape(kernel: Proximity, got: str) -> str:
    return (
        f"{type(kernel).__name__}.log_weight must take r [b, 1, T, S] to [b, 1 or N, T, S]; got "
        f"{got}. A parameter with one entry a head enters as per_head(parameter)."
    )


def exact_reach(kernel: Proximity) -> float:
    """The |r| beyond which the weight is zero, as far as that is known; else infinity."""
    reach = math.inf if kernel.reach is None else float(kernel.reach)
    support = known_support(kernel, 0.0) if kernel.compact else None
    return reach if support is None else min(reach, support)


def known_support(kernel: Proximity, tolerance: float) -> float | None:
    """The kernel's support, unless it is inherited beside a log-weight of the kernel's own."""
    rule, support = (
        next(c for c in type(kernel).__mro__ if name in vars(c))
        for name in ("log_weight", "support")
    )
    return kernel.support(tolerance) if rule is support else None


def is_built_in(kernel: Proximity) -> bool:
    """Whether the kernel is one of this module, whose leaves are all it depends on."""
    return type(kernel) in _BUILT_IN


def is_known(kernel: Proximity) -> bool:
    """Whether all parameters are known while tracing."""
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kernel))


def _known(*parameters: Parameter) -> NDArray[np.float64] | None:
    """Known parameters, broadcast together; None if one of them is not known."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(parameters)):
        return None
    return np.stack(np.broadcast_arrays(*(np.asarray(p, np.float64) for p in parameters)))


def _floating(r: Relative) -> Float[Array, "#b 1 T S"]:
    """Relative positions in float32 or wider: float64 where JAX has it enabled."""
    r = jnp.asarray(r)
    dtype = jnp.result_type(float)
    return r.astype(jnp.promote_types(r.dtype, jnp.float32) if _is_floating(r) else dtype)


def _is_floating(r: Any) -> bool:
    return jnp.issubdtype(r.dtype, jnp.floating)


def _log_inside(weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(weight) where it is positive, else -inf; the gradient is never NaN."""
    inside = weight > 0
    return jnp.where(inside, jnp.log(jnp.where(inside, weight, 1)), -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian(Proximity):
    """-((r - offset) / width)^2 / 2: the weight exp(.) has peak 1 at r = offset.

    Args:
      width: standard deviation in positions, positive; scalar or [N].
      offset: where the peak is (-1: the key before the query); scalar or [N].
      reach: |r| beyond which the weight is zero.

    References: You, Sun, Iyyer, "Hard-Coded Gaussian Attention", ACL 2020.

    """

    width: Parameter
    offset: Parameter = 0.0
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)
    positive: ClassVar[tuple[str, ...]] = ("width",)

    def log_weight(self, r: Relative) -> LogWeight:
        return -jnp.square((_floating(r) - per_head(self.offset)) / per_head(self.width)) / 2

    def support(self, tolerance: float) -> float | None:
        known = _known(self.width, self.offset)
        if known is None:
            return None
        width, offset = known
        return float(np.max(abs(offset) + width * math.sqrt(2 * tolerance)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Exponential(Proximity):
    """-|r| / length.

    Args:
      length: e-folding distance in positions, positive; scalar or [N].
      reach: |r| beyond which the weight is zero.

    """

    length: Parameter
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)
    positive: ClassVar[tuple[str, ...]] = ("length",)

    def log_weight(self, r: Relative) -> LogWeight:
        return -abs(_floating(r)) / per_head(self.length)

    def support(self, tolerance: float) -> float | None:
        known = _known(self.length)
        return None if known is None else float(tolerance * np.max(known))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Window(Proximity):
    """0 where |r| <= radius, else -inf: the plain mean of the keys around the query.

    Args:
      radius: largest distance that counts, not negative; scalar or [N].
      reach: |r| beyond which the weight is zero.

    """

    radius: Parameter
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)
    compact: ClassVar[bool] = True

    def log_weight(self, r: Relative) -> LogWeight:
        return jnp.where(abs(_floating(r)) <= per_head(self.radius), 0.0, -jnp.inf)

    def support(self, tolerance: float) -> float | None:
        del tolerance
        return _largest(self.radius)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Triangular(Proximity):
    """log(1 - |r| / radius) where |r| < radius, else -inf.

    Args:
      radius: distance at which the weight reaches zero, positive; scalar or [N].
      reach: |r| beyond which the weight is zero.

    """

    radius: Parameter
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)
    positive: ClassVar[tuple[str, ...]] = ("radius",)
    compact: ClassVar[bool] = True

    def log_weight(self, r: Relative) -> LogWeight:
        return _log_inside(1 - abs(_floating(r)) / per_head(self.radius))

    def support(self, tolerance: float) -> float | None:
        del tolerance
        return _largest(self.radius)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Epanechnikov(Proximity):
    """log(1 - (r / radius)^2) where |r| < radius, else -inf.

    Args:
      radius: distance at which the weight reaches zero, positive; scalar or [N].
      reach: |r| beyond which the weight is zero.

    References: Epanechnikov, Theory of Probability and its Applications 14 (1969).

    """

    radius: Parameter
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)
    positive: ClassVar[tuple[str, ...]] = ("radius",)
    compact: ClassVar[bool] = True

    def log_weight(self, r: Relative) -> LogWeight:
        return _log_inside(1 - jnp.square(_floating(r) / per_head(self.radius)))

    def support(self, tolerance: float) -> float | None:
        del tolerance
        return _largest(self.radius)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PowerLaw(Proximity):
    """-exponent * log(1 + |r|): weight (1 + |r|)^-exponent; exponent 1 is 1 / (1 + distance).

    Args:
      exponent: scalar or [N].
      reach: |r| beyond which the weight is zero.

    """

    exponent: Parameter
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)

    def log_weight(self, r: Relative) -> LogWeight:
        return -per_head(self.exponent) * jnp.log1p(abs(_floating(r)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Table(Proximity):
    """log_weights[bucket(r)]: one free number for every bucket of distances.

    Args:
      log_weights: [L] for all heads or [N, L] with one row a head.
      bucket: maps r to integers 0..L-1; by default clip(r + (L - 1) // 2, 0, L - 1).
      reach: |r| beyond which the weight is zero.

    Raises:
      ValueError: when used, if the bucket of r is not an integer (floating positions).

    References: Shaw, Uszkoreit, Vaswani 2018; Raffel et al. 2020 (`t5_bucket`).

    """

    log_weights: Parameter
    bucket: Callable[[Relative], Int[Array, "#b 1 T S"]] | None = dataclasses.field(
        default=None, metadata=_STRUCTURE
    )
    reach: Any = dataclasses.field(default=None, metadata=_STRUCTURE)

    def log_weight(self, r: Relative) -> LogWeight:
        table = jnp.atleast_2d(jnp.asarray(self.log_weights))
        size = table.shape[-1]
        r = jnp.asarray(r)
        middle = (size - 1) // 2
        index = jnp.clip(r + middle, 0, size - 1) if self.bucket is None else self.bucket(r)
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                f"A Table's bucket must be an integer; got {index.dtype} from positions of dtype "
                f"{r.dtype}. Give integer positions, or a bucket that rounds."
            )
        return jnp.moveaxis(table.T[index[:, 0]], -1, 1)


def _largest(parameter: Parameter) -> float | None:
    known = _known(parameter)
    return None if known is None else float(np.max(known))


_BUILT_IN = (Gaussian, Exponential, Window, Triangular, Epanechnikov, PowerLaw, Table)


def alibi(num_heads: int) -> Exponential:
    """The linear distance penalty of ALiBi, as an `Exponential` of one length a head.

    Log-weight of head n is -|r| * slope_n; for N = num_heads a power of two,
    slope_n = 2^(-8 n / N), n = 1..N. Otherwise the slopes of the power of two below, followed by
    every second slope of the power of two above.

    Raises:
      ValueError: if num_heads is not a positive integer.

    References: Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022.

    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"alibi needs a positive integer of heads; got {num_heads!r}.")
    below = 2 ** int(math.log2(num_heads))
    slopes = _geometric_slopes(below)
    rest = _geometric_slopes(2 * below)[::2][: num_heads - below]
    return Exponential(1.0 / np.concatenate([slopes, rest]).astype(np.float32))


def _geometric_slopes(count: int) -> NDArray[np.float64]:
    return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)


def t5_bucket(
    num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Callable[[Relative], Int[Array, "#b 1 T S"]]:
    """T5's buckets of distances, for `Table(log_weights, bucket=t5_bucket(...))`.

    Half of the buckets of a direction hold one distance each; the others grow logarithmically up
    to max_distance, beyond which all share the last. Bidirectional: keys after the query use the
    second half of the buckets; otherwise they share bucket 0.

    Args:
      num_buckets: L, the size of the table; even if bidirectional.
      max_distance: the distance from which on the last bucket is used.
      bidirectional: whether keys after the query are told apart.

    Raises:
      ValueError: if a direction has fewer than two buckets, num_buckets is odd when bidirectional,
        or max_distance does not exceed the distances that have a bucket each.

    References: Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020.

    """
    return _T5Bucket(num_buckets, max_distance, bidirectional)


@dataclasses.dataclass(frozen=True)
class _T5Bucket:
    """A callable that compares equal for equal settings, so that jit need not trace again."""

    num_buckets: int
    max_distance: int
    bidirectional: bool

    def __post_init__(self):
        if self._exact < 1 or (self.bidirectional and self.num_buckets % 2):
            raise ValueError(
                "t5_bucket needs two buckets or more a direction, and an even number when "
                f"bidirectional; got num_buckets={self.num_buckets}."
            )
        if self.max_distance <= self._exact:
            raise ValueError(
                f"t5_bucket's max_distance must exceed the {self._exact} distances that have a "
                f"bucket each; got {self.max_distance}."
            )

    @property
    def _size(self) -> int:
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _exact(self) -> int:
        return self._size // 2

    def __call__(self, r: Relative) -> Int[Array, "#b 1 T S"]:
        distance = abs(r) if self.bidirectional else jnp.maximum(-r, 0)
        ratio = jnp.maximum(distance, 1).astype(jnp.float32) / self._exact
        growth = (self._size - self._exact) / math.log(self.max_distance / self._exact)
        far = self._exact + (jnp.log(ratio) * growth).astype(jnp.int32)
        near = distance.astype(jnp.int32)
        bucket = jnp.where(distance < self._exact, near, jnp.minimum(far, self._size - 1))
        return bucket + jnp.where(r > 0, self._size, 0) if self.bidirectional else bucket
