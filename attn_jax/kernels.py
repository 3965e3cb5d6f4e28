"""Kernels that a rule may name: their parameters, what they mean and how they are built.

A kernel of your own joins them from a file of your own:

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Cauchy(Proximity):
        scale: Any

        def log_weight(self, r):
            return -jnp.log1p(jnp.square(r / per_head(self.scale)))

    register_kernel(
        "cauchy",
        Cauchy,
        {"scale": Parameter(1.0, "distance at which the weight is a half", per_head=True)},
        meaning="1 / (1 + (r / scale)^2)",
        trained="scale",
    )

From then on "learned * cauchy(scale=3)" is a rule wherever rules are read.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from attn_jax import ops

Value = float | int | bool | None | tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a rule.

    Attributes:
      default: a parameter that is None by default may be None.
      meaning: one line, for help texts.
      kind: "positive", "at least 0" or "any" (finite) number, "count" (positive integer) or "flag".
      per_head: whether a tuple gives each head its own value.

    """

    default: Value
    meaning: str
    kind: Literal["positive", "at least 0", "any", "count", "flag"] = "positive"
    per_head: bool = False


@dataclasses.dataclass(frozen=True)
class KernelRule:
    """A kernel by name.

    Attributes:
      parameters: by name, as they stand in a rule.
      meaning: one line, for help texts.
      build: num_heads and the parameters (numbers, or arrays with one entry a head) to a kernel.
      trained: the parameter that `trainable=True` learns, as its logarithm; None: there is none.
      free: from the parameters, the number of free log-weights a head that `build` also receives,
        as `log_weights` [num_heads, free], zero at first; None: it has none.

    """

    parameters: Mapping[str, Parameter]
    meaning: str
    build: Callable[..., ops.Proximity]
    trained: str | None = None
    free: Callable[[Mapping[str, Any]], int] | None = None


_REACH = Parameter(None, "distance beyond which the weight is zero; part of the rule", "at least 0")
_TRAINABLE = Parameter(False, "learn the parameter, from the value given, as its logarithm", "flag")
_KERNELS: dict[str, KernelRule] = {}
KERNELS: Mapping[str, KernelRule] = types.MappingProxyType(_KERNELS)
"""Every kernel that a rule may name."""


def register_kernel(
    name: str,
    build: type[ops.Proximity] | Callable[..., ops.Proximity],
    parameters: Mapping[str, Parameter],
    *,
    meaning: str,
    trained: str | None = None,
    free: Callable[[Mapping[str, Any]], int] | None = None,
) -> None:
    """Lets rules name a kernel.

    Args:
      name: as it stands in rules, a Python identifier.
      build: a subclass of `Proximity`, whose constructor takes the parameters by name, or a
        function of `num_heads` and the parameters.
      parameters: by name. `reach` is added to all and `trainable` to those with `trained`.
      meaning: one line, for help texts.
      trained: see `KernelRule`.
      free: see `KernelRule`.

    Raises:
      ValueError: the name is no identifier or taken, `trained` is no parameter, or the parameters
        are not those that `build` takes.

    """
    if not name.isidentifier() or name in RESERVED or name in _KERNELS:
        raise ValueError(f"a kernel's name must be an identifier that is not taken, got {name!r}")
    if trained is not None and trained not in parameters:
        raise ValueError(f"trained={trained!r} must be one of {', '.join(parameters)}")
    _check_taken(name, build, [*parameters, *(["log_weights"] if free else [])])
    more = {"trainable": _TRAINABLE} if trained else {}
    make = _by_class(build) if isinstance(build, type) else build
    everything = {**parameters, **more, "reach": _REACH}
    _KERNELS[name] = KernelRule(everything, meaning, make, trained, free)


RESERVED = (
    *("learned", "raw", "additive", "dot", "general", "concat"),
    *("self", "uniform", "mix"),
)
"""Names of rules that are no kernels."""


def _check_taken(name: str, build: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Raises ValueError for parameters that are not those of a kernel's class or function."""
    own, more = ((), {}) if isinstance(build, type) else ((1,), {"reach": None})
    try:
        inspect.signature(build).bind(*own, **dict.fromkeys(parameters), **more)
    except TypeError as error:
        declared = ", ".join(parameters) or "none"
        raise ValueError(
            f"the parameters of the kernel {name!r} must be those that {build.__name__} takes, got "
            f"{declared}: {error}"
        ) from error


def _by_class(kernel: type[ops.Proximity]) -> Callable[..., ops.Proximity]:
    has_reach = "reach" in inspect.signature(kernel).parameters

    def build(num_heads: int, *, reach: Any, **parameters: Any) -> ops.Proximity:
        del num_heads
        if has_reach:
            parameters["reach"] = reach
            return kernel(**parameters)
        return kernel(**parameters) if reach is None else _Within(kernel(**parameters), reach)

    return build


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Within(ops.Proximity):
    """A kernel whose class has no reach, with one."""

    kernel: ops.Proximity
    reach: Any = dataclasses.field(metadata={"static": True})

    def log_weight(self, r: Num[Array | np.ndarray, "#b 1 T S"]) -> Float[Array, "#b #N T S"]:
        """The kernel's own; `reach` cuts it off."""
        return self.kernel.log_weight(r)


@dataclasses.dataclass(frozen=True)
class EvenBuckets:
    """Buckets of `step` positions each around zero: clip(round(r / step) + (size - 1) // 2)."""

    size: int
    step: float

    def __call__(self, r: Num[Array, "..."]) -> Int[Array, "..."]:
        """The bucket of every relative position."""
        if self.step != 1 or jnp.issubdtype(r.dtype, jnp.floating):
            r = jnp.round(r / self.step).astype(jnp.int32)
        return jnp.clip(r + (self.size - 1) // 2, 0, self.size - 1)


def _table(num_heads: int, *, log_weights: Any, size: int, step: float, reach: Any) -> ops.Table:
    del num_heads
    bucket: Any = EvenBuckets(size, step)
    return ops.Table(log_weights, bucket=bucket, reach=reach)


def _t5(num_heads: int, *, log_weights: Any, reach: Any, **buckets: Any) -> ops.Table:
    del num_heads
    bucket = ops.t5_bucket(buckets["buckets"], buckets["max_distance"], buckets["bidirectional"])
    return ops.Table(log_weights, bucket=bucket, reach=reach)


def _alibi(num_heads: int, *, reach: Any) -> ops.Proximity:
    return dataclasses.replace(ops.alibi(num_heads), reach=reach)


register_kernel(
    "gaussian",
    ops.Gaussian,
    {
        "width": Parameter(1, "standard deviation in positions", per_head=True),
        "offset": Parameter(
            0, "relative position of the peak; -1 is the key before the query", "any", True
        ),
    },
    meaning="exp(-((r - offset) / width)^2 / 2)",
    trained="width",
)
register_kernel(
    "exponential",
    ops.Exponential,
    {"length": Parameter(1, "e-folding distance in positions", per_head=True)},
    meaning="exp(-|r| / length)",
    trained="length",
)
register_kernel(
    "window",
    ops.Window,
    {"radius": Parameter(1, "largest distance that counts", "at least 0", True)},
    meaning="1 within the radius",
)
_ZERO_AT = Parameter(2, "distance at which the weight reaches zero", per_head=True)
register_kernel(
    "triangular",
    ops.Triangular,
    {"radius": _ZERO_AT},
    meaning="1 - |r| / radius",
    trained="radius",
)
register_kernel(
    "epanechnikov",
    ops.Epanechnikov,
    {"radius": _ZERO_AT},
    meaning="1 - (r / radius)^2",
    trained="radius",
)
register_kernel(
    "powerlaw",
    ops.PowerLaw,
    {"exponent": Parameter(1, "of 1 + distance", "at least 0", True)},
    meaning="(1 + |r|)^-exponent",
    trained="exponent",
)
register_kernel(
    "table",
    _table,
    {
        "size": Parameter(65, "free log-weights a head, for relative positions around 0", "count"),
        "step": Parameter(1, "width of one entry in positions"),
    },
    meaning="a trainable log-weight for each relative position, clipped at its ends",
    free=lambda parameters: parameters["size"],
)
register_kernel("alibi", _alibi, {}, meaning="exp(-slope |r|), the slopes of ALiBi")
register_kernel(
    "t5",
    _t5,
    {
        "buckets": Parameter(32, "free log-weights a head", "count"),
        "max_distance": Parameter(128, "distance from which on all share the last bucket", "count"),
        "bidirectional": Parameter(True, "tell keys before and after the query apart", "flag"),
    },
    meaning="a trainable log-weight for each bucket of distances",
    free=lambda parameters: parameters["buckets"],
)
