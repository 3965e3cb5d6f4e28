"""The suite `proximity`: attention by distance alone in float32; kernel parameters are traced."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import Exponential, Gaussian, Lengths, Segments, Window, attention
from experiments.benchmark import exact, filters
from experiments.benchmark.case import Case, Contender, Target
from experiments.benchmark.compiled import contender
from experiments.benchmark.derivatives import gradient
from experiments.benchmark.inputs import DERIVATIVE, FORWARD, normal, normals, shape_text

OURS = "attn_jax"
CHANNELS = 256
WIDTHS = (4, 32)
RADIUS = 64
MEAN = 100
HEADS, HEAD_WIDTH = 8, 64
LogWeight = Callable[[Any], Callable[[Any], Any]]


def cases(length: int = 8192) -> list[Case]:
    """The cases at a length of series; the targets are for the default."""
    return [
        *(_gaussian(length, width) for width in WIDTHS),
        _exponential(length),
        _window(length),
        *(_masks(length, width) for width in WIDTHS),
        *(_backward(length, width) for width in WIDTHS),
        _against_content(length // 2),
        _growth(length // 2, 8 * length),
    ]


def _gaussian_weight(width: Any) -> Callable[[Any], Any]:
    return lambda r: -jnp.square(r / width) / 2


def _exponential_weight(length: Any) -> Callable[[Any], Any]:
    return lambda r: -abs(r) / length


def _window_weight(radius: Any) -> Callable[[Any], Any]:
    return lambda r: jnp.where(abs(r) <= radius, 0.0, -jnp.inf)


def _smoothed(kernel: Any) -> Callable[..., jax.Array]:
    """Our smoothing of [1, N, C] as one head, by a kernel with one parameter."""

    def smooth(value: jax.Array, parameter: jax.Array, mask: Any = None) -> jax.Array:
        one_head = value[:, :, None]
        mixed: Any = attention(None, None, one_head, proximity=kernel(parameter), mask=mask)
        return mixed.reshape(value.shape)

    return smooth


def _exactly_smoothed(log_weight: LogWeight, allowed: Any = None) -> Callable[..., jax.Array]:
    def smooth(value: jax.Array, parameter: jax.Array) -> jax.Array:
        weight = log_weight(parameter)
        one_head = value[:, :, None]
        return exact.attention(None, None, one_head, log_weight=weight, allowed=allowed)[:, :, 0]

    return smooth


def _series(length: int) -> np.ndarray:
    return normal((1, length, CHANNELS), 0)


def _series_text(length: int) -> str:
    return shape_text((1, length, CHANNELS))


def _gaussian(length: int, width: int) -> Case:
    short = width == WIDTHS[0]

    def contenders() -> list[Contender]:
        value, parameter = _series(length), np.float32(width)
        right = exact.answer(_exactly_smoothed(_gaussian_weight), value, parameter)
        reach = filters.TRUNCATION * width
        arguments = [value, parameter]
        made = [
            contender(OURS, _smoothed(Gaussian), arguments, right),
            contender("jnp FFT", filters.fft(reach), arguments, right),
            filters.torch_fft(value, width, right),
            filters.torch_fft(value, width, right, channels_first=True),
            filters.scipy_gaussian(value, width, right),
        ]
        if short:
            convolution = filters.depthwise(reach)
            made.append(contender("depthwise convolution", convolution, arguments, right))
            made.append(filters.torch_depthwise(value, width, right))
        return made

    over_scipy, over_torch = (7.0, 2.5) if short else (13.0, 1.3)
    targets = [
        Target("time", "scipy.ndimage", OURS, at_least=over_scipy, goal="6"),
        Target("time", "torch FFT", OURS, at_least=over_torch, goal="6"),
        Target("time", "torch FFT, channels first", OURS),
        Target("relative error", OURS, at_most=1e-6, goal="6"),
    ]
    if short:
        targets += [
            Target("time", "jnp FFT", OURS, at_least=2.5, goal="6"),
            Target("time", "depthwise convolution", OURS, at_least=20, goal="6"),
            Target("time", "torch depthwise convolution", OURS),
        ]
    else:
        targets.append(Target("time", "jnp FFT", OURS))
    return Case(f"Gaussian, width {width}", _series_text(length), contenders, targets, FORWARD)


def _exponential(length: int) -> Case:
    decay = 32

    def contenders() -> list[Contender]:
        arguments = [_series(length), np.float32(decay)]
        right = exact.answer(_exactly_smoothed(_exponential_weight), *arguments)
        return [
            contender(OURS, _smoothed(Exponential), arguments, right),
            contender("associative_scan", filters.associative_scan, arguments, right),
            contender("two lax.scan", filters.two_scans, arguments, right),
        ]

    targets = (
        Target("time", "associative_scan", OURS, at_least=1.4, goal="6"),
        Target("time", "two lax.scan", OURS),
    )
    name = f"exponential, length {decay}"
    return Case(name, _series_text(length), contenders, targets, FORWARD)


def _window(length: int) -> Case:
    def contenders() -> list[Contender]:
        arguments = [MEAN + _series(length), np.float32(RADIUS)]
        right = exact.answer(_exactly_smoothed(_window_weight), *arguments)
        return [
            contender(OURS, _smoothed(Window), arguments, right),
            contender("prefix sums", filters.prefix_sums, arguments, right),
        ]

    targets = (
        Target("time", "prefix sums", OURS, at_least=1.5, goal="6"),
        Target("relative error", OURS, at_most=1e-6, goal="6"),
    )
    # A cumulative sum of 8192 numbers near 100 ends at 8e5, where float32 has steps of 0.06: over
    # 129 keys one step is 5e-6 of the mean, and there are several. That is noise, not an error.
    name = f"window, radius {RADIUS}"
    inputs = f"{_series_text(length)}, mean {MEAN}"
    return Case(name, inputs, contenders, targets, 10 * FORWARD)


def _masks(length: int, width: int) -> Case:
    """Masks are traced arguments: a padded batch, and sequences packed into one row."""
    plain, padded, packed = "no mask", "Lengths", "Segments"
    shown = length - length // 16

    def contenders() -> list[Contender]:
        value, parameter = _series(length), np.float32(width)
        lengths = np.asarray([shown], np.int32)
        segments = (np.arange(length, dtype=np.int32) * 5 // length)[None]
        smooth = _smoothed(Gaussian)

        def by_lengths(value: Any, parameter: Any, lengths: Any) -> Any:
            return smooth(value, parameter, Lengths(query=lengths, key=lengths))

        def by_segments(value: Any, parameter: Any, segments: Any) -> Any:
            return smooth(value, parameter, Segments(segments))

        def right(allowed: Any, *more: Any) -> Any:
            def true(value: Any, parameter: Any, *more: Any) -> Any:
                bound = None if allowed is None else lambda i, j: allowed(i, j, *more)
                return _exactly_smoothed(_gaussian_weight, bound)(value, parameter)

            return exact.answer(true, value, parameter, *more)

        def inside(i: Any, j: Any, lengths: Any) -> Any:
            return (i < lengths[0]) & (j < lengths[0])

        def same(i: Any, j: Any, segments: Any) -> Any:
            return segments[0][i] == segments[0][j]

        return [
            contender(plain, smooth, [value, parameter], right(None)),
            contender(padded, by_lengths, [value, parameter, lengths], right(inside, lengths)),
            contender(packed, by_segments, [value, parameter, segments], right(same, segments)),
        ]

    targets = [Target("time", name, plain, at_most=1.2, goal="7") for name in (padded, packed)]
    inputs = f"{_series_text(length)}, {shown} places shown, or 5 segments"
    return Case(f"masks, width {width}", inputs, contenders, targets, FORWARD)


def _backward(length: int, width: int) -> Case:
    forward, both_ways = "forward", "forward and backward"

    def contenders() -> list[Contender]:
        arguments = [_series(length), np.float32(width)]
        cotangent = normal((1, length, CHANNELS), 1)
        smooth, true = _smoothed(Gaussian), _exactly_smoothed(_gaussian_weight)
        right = exact.answer(gradient(true), cotangent, *arguments)
        return [
            contender(forward, smooth, arguments, exact.answer(true, *arguments)),
            contender(both_ways, gradient(smooth), [cotangent, *arguments], right),
        ]

    targets = (Target("time", both_ways, forward, at_most=3.2, goal="7"),)
    inputs = f"{_series_text(length)}, derivative in value and width"
    return Case(f"backward, width {width}", inputs, contenders, targets, DERIVATIVE)


def _by_heads(value: jax.Array, width: jax.Array) -> Any:
    return attention(None, None, value, proximity=Gaussian(width))


def _exactly_by_heads(value: jax.Array, width: jax.Array, stride: int = 1) -> jax.Array:
    weight = _gaussian_weight(width)
    return exact.attention(None, None, value, log_weight=weight, stride=stride)


def _against_content(length: int) -> Case:
    shape = (1, length, HEADS, HEAD_WIDTH)
    learned = "learned"
    names = {width: f"Gaussian, width {width}" for width in WIDTHS}

    def contenders() -> list[Contender]:
        inputs = normals(3, shape)
        made = [contender(learned, attention, inputs, exact.answer(exact.attention, *inputs))]
        for width, name in names.items():
            arguments = [inputs[2], np.float32(width)]
            right = exact.answer(_exactly_by_heads, *arguments)
            made.append(contender(name, _by_heads, arguments, right))
        return made

    targets = [Target("time", learned, name, at_least=40, goal="8") for name in names.values()]
    return Case("distance against content", shape_text(shape), contenders, targets, FORWARD)


def _growth(short: int, long: int) -> Case:
    """Sixteen times the length; of the long one every 512th row is checked."""
    names = {length: f"length {length}" for length in (short, long)}
    width, stride = WIDTHS[1], 512

    def one(length: int) -> Contender:
        arguments = [normal((1, length, HEADS, HEAD_WIDTH), 0), np.float32(width)]
        step = min(stride, length)
        right = exact.answer(lambda v, w: _exactly_by_heads(v, w, step), *arguments)
        return contender(names[length], _by_heads, arguments, right, stride=step)

    targets = (
        Target("time", names[long], names[short], at_most=20, goal="8"),
        Target("memory", names[long], at_most=1.5e9, goal="8"),
    )
    inputs = f"Gaussian, width {width}; {HEADS} heads, width {HEAD_WIDTH}, float32"
    return Case("sixteen times the length", inputs, lambda: [*map(one, names)], targets, FORWARD)
