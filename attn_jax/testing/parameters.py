"""Checks 8, 17, 18 and 19: biases and learned kernels, normalisers, scores, dropout."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.ops import proximity
from attn_jax.ops.masks import Causal, Lengths
from attn_jax.ops.normalizers import NORMALIZERS
from attn_jax.testing.check import FULL, Case, case, check, need
from attn_jax.testing.example import Sizes
from attn_jax.testing.reference import Bounded
from attn_jax.testing.trial import Failure, Trial

# The reference differentiates kernels and scores by central differences in float64.
DIFFERENCE = 1e-8


# Bias and scale


def _bias(trial: Trial, sizes: Sizes, full: tuple[bool, ...], arguments: Mapping[str, Any]) -> None:
    lengths = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    shape = tuple(n if along else 1 for n, along in zip(lengths, full, strict=True))
    bias = trial.normal(shape)
    example = trial.example(sizes, bias=bias, **arguments)
    trial.holds(example, ("query", "key", "value", "bias"))


@check(8, "bias", "A bias broadcasts along any axes, and its gradient is summed along them.")
def _biases() -> Iterator[Case]:
    axes = "BNTS"
    for full in ("", "B", "N", "T", "S", "BS", "NTS", "BNTS"):
        along = tuple(axis in full for axis in axes)
        name = ", ".join(a if a in full else "1" for a in axes)
        yield case(f"[{name}]", _bias, along, {})
        if full in ("", "B", "N", "T"):  # where the gradient of a softmax is zero
            yield case(f"[{name}], sigmoid", _bias, along, {"normalizer": "sigmoid"})


def _scale(trial: Trial, sizes: Sizes, per_head: bool) -> None:
    scale = np.linspace(-0.5, 1.0, sizes.heads) if per_head else np.asarray(0.7)
    example = trial.example(sizes, scale=scale.astype(trial.wide))
    trial.holds(example, ("query", "scale"))


@check(8, "scale", "The scale may be a traced number or one a head, and has a gradient.")
def _scales() -> Iterator[Case]:
    yield case("a number", _scale, False)
    yield case("one a head", _scale, True)


# Learned kernels

Kernel = Callable[[int], proximity.Proximity]


def _spread(low: float, high: float) -> Callable[[int], np.ndarray]:
    return lambda heads: np.linspace(low, high, heads)


# Away from kinks: no radius is a whole number, where a difference of log-weights has no limit.
LEARNED: Mapping[str, Kernel] = {
    "gaussian": lambda n: proximity.Gaussian(_spread(0.7, 3.0)(n), _spread(-1.0, 0.3)(n), 5),
    "exponential": lambda n: proximity.Exponential(_spread(0.7, 3.0)(n), 5),
    "triangular": lambda n: proximity.Triangular(_spread(1.5, 4.5)(n), 4),
    "epanechnikov": lambda n: proximity.Epanechnikov(_spread(1.5, 4.5)(n), 4),
    "power law": lambda n: proximity.PowerLaw(_spread(0.5, 1.5)(n), 6),
    "table": lambda n: proximity.Table(np.asarray([0.3, 1.0, -0.5, 0.2, 0.9]), reach=5),
    "table per head": lambda n: proximity.Table(
        np.linspace(-1, 1, 5 * n).reshape(n, 5) ** 2, reach=5
    ),
    "t5": lambda n: proximity.Table(np.arange(8.0) / 7, proximity.t5_bucket(8, 16), 6),
    "alibi": proximity.alibi,
    "gaussian without a reach": lambda n: proximity.Gaussian(2.0, -1.0),
    "power law without a reach": lambda n: proximity.PowerLaw(_spread(0.5, 1.5)(n)),
}


def _in_dtype(trial: Trial, kernel: proximity.Proximity) -> proximity.Proximity:
    """Parameters as the trial's numbers, in which their derivative is asked for."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, trial.wide), kernel)


def _learned(trial: Trial, sizes: Sizes, kernel: Kernel, content: bool, mask: Any) -> None:
    heads = sizes.heads if content else sizes.key_heads
    own = _in_dtype(trial, kernel(heads))
    arguments: dict[str, Any] = (
        {"proximity": own} if mask is None else {"proximity": own, "mask": mask}
    )
    example = trial.example(sizes, content=content, **arguments)
    wrt = ("proximity", "query", "value") if content else ("proximity", "value")
    trial.holds(example, wrt, DIFFERENCE)


@check(
    8,
    "learned kernels",
    "Widths, lengths, slopes, radii, exponents and tables have exact gradients.",
)
def _kernels() -> Iterator[Case]:
    for name, kernel in LEARNED.items():
        yield case(name, _learned, kernel, False, None, queries=9)
    for name in ("gaussian", "table per head", "alibi"):
        yield case(f"{name} with content", _learned, LEARNED[name], True, Causal())
    yield case(
        "gaussian and lengths",
        _learned,
        LEARNED["gaussian"],
        False,
        Lengths(key=5),
        queries=9,
    )


# Normalisers


def _normalizer(trial: Trial, sizes: Sizes, name: str, content: bool) -> None:
    rule: dict[str, Any] = {"proximity": proximity.Gaussian(2.0, reach=4), "mask": Causal()}
    if content:
        rule = {"mask": np.tri(sizes.queries, sizes.keys, -1, dtype=bool)[None, None]}
    example = trial.example(sizes, content=content, normalizer=name, **rule)
    trial.holds(example, empty=name != "softmax")


@check(17, "normalisers", "softmax, softmax_one, sigmoid, none, linear, sparsemax and entmax15.")
def _normalizers() -> Iterator[Case]:
    for name in NORMALIZERS:
        yield case(name, _normalizer, name, True)
        if name not in ("softmax", "sparsemax", "entmax15"):
            yield case(f"{name} without content", _normalizer, name, False, queries=9)


# Scores


def _soft_cap(logits: Any, query_index: Any, key_index: Any, head: Any) -> Any:
    """Depends on every index; runs on NumPy and JAX arrays."""
    xp = logits.__array_namespace__()
    later = xp.where(key_index > query_index, head + 1.0, 0.0)
    return 2 * xp.tanh(logits / 2) + later.astype(logits.dtype)


def _score(trial: Trial, sizes: Sizes) -> None:
    trial.holds(trial.example(sizes, score=_soft_cap, mask=Causal() | Lengths(key=4)), None, 1e-8)


def _closure(trial: Trial, sizes: Sizes) -> None:
    """A score that adds table[head, |i - j|] is a learned table, gradient included."""
    trial.transformable()
    table = np.linspace(-1, 1, sizes.heads * 20).reshape(sizes.heads, 20).astype(trial.wide)

    def added(table: Any) -> Any:
        def from_table(logits: Any, query_index: Any, key_index: Any, head: Any) -> Any:
            return logits + table[head, abs(key_index - query_index) % 20].astype(logits.dtype)

        return from_table

    example = trial.example(sizes)
    cotangent = trial.normal(example.output_shape)
    arrays = trial.arrays(example, ("query", "key", "value"))

    @trial.compiled
    def pull(table: Any, arrays: Any, cotangent: Any) -> Any:
        output, transpose = jax.vjp(
            lambda table: trial.apply(example.changed(**arrays, score=added(table))), table
        )
        return output, transpose(cotangent)[0]

    output, gradient = pull(jnp.asarray(table), arrays, cotangent)
    index = abs(np.arange(sizes.keys) - np.arange(sizes.queries)[:, None]) % 20
    reference = trial.reference(example.changed(bias=table[None][:, :, index]))
    trial.close("output", output, reference.output, example)
    bias = reference.pull(cotangent, ("bias",))["bias"]
    pairs = np.eye(20)[index]
    expected = Bounded(*(np.einsum("nts,tsl->nl", part[0], pairs) for part in bias))
    trial.close("gradient of what score closes over", gradient, expected, example)


@check(18, "score", "Any function of logits and indices, also of arrays it closes over.")
def _scores() -> Iterator[Case]:
    yield case("of every index", _score)
    yield case("gradient of a table it closes over", _closure)


# Dropout


def _dropout(trial: Trial, sizes: Sizes) -> None:
    need(trial.subject.ours, "its random bits are its own")
    rule = {"dropout_rate": 0.5, "dropout_key": jax.random.key(7)}
    trial.holds(trial.example(sizes, mask=Causal(), query_positions=100, **rule))


def _share(trial: Trial, sizes: Sizes) -> None:
    """Uniform weights of values of one: their sums are the shares kept, times 1 / (1 - rate)."""
    need(trial.subject.ours, "its random bits are its own")
    rule = {"dropout_rate": 0.25, "dropout_key": jax.random.key(7)}
    example = trial.example(sizes, **rule)
    ones = example.changed(query=np.zeros_like(example.query), value=np.ones_like(example.value))
    share = float(trial.output(ones)[..., 0].mean())
    deviation = (0.25 / (0.75 * sizes.batch * sizes.heads * sizes.queries * sizes.keys)) ** 0.5
    if abs(share - 1) > 5 * deviation + trial.precision.value:
        raise Failure("mean of ones under dropout", expected=1, got=share, example=ones)


@check(
    19,
    "dropout",
    "Which weights are kept depends on key and indices alone: equal everywhere.",
    FULL,
)
def _dropouts() -> Iterator[Case]:
    yield case("130 keys", _dropout, queries=3, keys=130)
    yield case("share kept", _share, queries=3, keys=130, least=Sizes(1, 3, 130, 1, 1, 1, 1))
