"""Which method a content-free call takes, by its kernel and how far its masks reach.

Known parameters decide while tracing. Others decide as the program runs, among a few methods that
are all compiled: a changed width compiles nothing. Each is under `jax.checkpoint`, or the
residuals would be those of all of them.

Letters: N heads, P positions.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attn_jax.ops import proximity
from attn_jax.ops.lanes import each_in_any_lane
from attn_jax.ops.toeplitz import boxes, exponential, fourier, gaussian, taps
from attn_jax.ops.toeplitz.line import Limit, Line
from attn_jax.ops.toeplitz.rows import Rows

# Shifted slices: the compiler's time grows with their number.
_TAPS = (17, 49)
# Steps of the Gaussian's grid that are done as shifted slices.
_SLICED_STEPS = (2, 3)
# Windows up to this far are summed by blocks with little padding.
_NEAR_BOX = 256
# The coarsest grid leaves a line so many blocks; wider Gaussians take Fourier transforms.
_BLOCKS = 4
_EXPONENTIATED = ("softmax", "softmax_one", "none")
FOURIER = "fast Fourier transforms"


class Method(NamedTuple):
    """One way to compute a call.

    Attributes:
      name: for people.
      rows: does it.
      fits: whether the parameters are such that it may; a Python bool where they are known.

    """

    name: str
    rows: Callable[[], Rows]
    fits: Any


def choices(line: Line) -> list[Method]:
    """Methods in order of preference, down to the first that surely fits."""
    methods = _all(line)
    sure = next(i for i, m in enumerate(methods) if isinstance(m.fits, bool) and m.fits)
    return [m for m in methods[: sure + 1] if not (isinstance(m.fits, bool) and not m.fits)]


def run(line: Line) -> Rows:
    """The rows by the first method that fits."""
    methods = choices(line)
    if len(methods) == 1:
        return methods[0].rows()
    unfit = each_in_any_lane(jnp.stack([~jnp.asarray(m.fits) for m in methods]))
    branches = [jax.checkpoint(lambda m=m: _of_one_shape(line, m.rows())) for m in methods]
    return lax.switch(jnp.argmin(unfit), branches)


def _of_one_shape(line: Line, rows: Rows) -> Rows:
    batch, heads = line.call.shape[0], len(rows.shift)
    total, weak = (jnp.broadcast_to(x, (batch, line.length, heads, 1)) for x in (rows.total, rows.weak))
    return rows._replace(total=total, weak=weak)


def _all(line: Line) -> list[Method]:
    kernel = line.call.proximity
    if type(kernel) is proximity.Exponential and _is_scannable(line):
        return [Method("states of an exponential", lambda: exponential.rows(line), True)]
    methods = _short(line)
    if kernel is None or type(kernel) is proximity.Window:
        methods += _boxes(line)
    elif type(kernel) is proximity.Gaussian and _is_unlimited(line):
        methods += _gaussian(line, kernel)
    last = Method(FOURIER, lambda: _labelled(line, fourier.rows(line)), True)
    return [*methods, last]


def _short(line: Line) -> list[Method]:
    """Shifted slices, where weights end or become negligible within a short reach."""
    exact, negligible = _ends(line)
    one_sided = any(isinstance(x, int) and x == 0 for x in (line.before, line.after))
    methods = []
    for count in _TAPS:
        reach = min(count - 1 if one_sided else count // 2, line.length - 1)
        ends = _any(_all_of(end <= reach) for end in exact)
        share = None if ends is True or not negligible else gaussian.SHARE
        fits = _any([ends, *(_all_of(end <= reach) for end in negligible)])
        rows = lambda r=reach, s=share: taps.rows(line, r, s)  # noqa: E731
        methods.append(Method("shifted slices", rows, fits))
    return methods


def _ends(line: Line) -> tuple[list[Any], list[Any]]:
    """Distances beyond which there is no weight, and such beyond which it is negligible."""
    kernel, call = line.call.proximity, line.call
    exact: list[Any] = [line.length - 1]
    if line.before is not None and line.after is not None:
        both = (line.before, line.after)
        known = not any(isinstance(x, jax.Array) for x in both)
        exact.append(max(both) if known else jnp.maximum(*both))
    if type(kernel) in (proximity.Window, proximity.Triangular, proximity.Epanechnikov):
        exact.append(_numbers(kernel.radius))  # pyright: ignore[reportOptionalMemberAccess]
    if type(kernel) is proximity.Gaussian and call.normalizer != "linear":
        reach = gaussian.deviations(call.dtype) * _numbers(kernel.width)
        return exact, [reach + abs(_numbers(kernel.offset))]
    return exact, []


def _boxes(line: Line) -> list[Method]:
    """Blocked sums: any window with one end or none, and those that span a block or more."""
    radius = boxes.radius_of(line)
    before, after = boxes.nearer(line.before, radius), boxes.nearer(line.after, radius)
    limits = [x for x in (before, after) if x is not None]
    wide = _all_of(before + after + 1 >= boxes.BLOCK) if len(limits) == 2 else True
    methods = []
    for farthest in (_NEAR_BOX, line.length):
        near = [_all_of(abs(x) <= farthest) for x in limits]
        rows = lambda f=farthest: _labelled(line, boxes.rows(line, f), radius)  # noqa: E731
        methods.append(Method("blocked sums", rows, _every([wide, *near])))
    return methods


def _gaussian(line: Line, kernel: proximity.Gaussian) -> list[Method]:
    """Two sums by way of a coarse grid, of every step that the line has room for."""
    dtype = line.call.dtype
    width, offset = _numbers(kernel.width), _numbers(kernel.offset)
    array = jnp if isinstance(width, jax.Array) or isinstance(offset, jax.Array) else np
    needed = array.max(gaussian.deviations(dtype) / math.sqrt(2) * width + abs(offset))
    steps = [*_SLICED_STEPS, 4]
    while 2 * _BLOCKS * gaussian.STEPS * steps[-1] <= line.length:
        steps.append(2 * steps[-1])
    methods = []
    for step, coarser in zip(steps, [*steps[1:], 2 * steps[-1]], strict=True):
        # One step more than the widest needs leaves room for a peak beside the query.
        reach = gaussian.reach_on_grid(step, gaussian.finest(coarser, dtype), dtype) + step
        fits = _every([_all_of(width >= gaussian.finest(step, dtype)), _all_of(needed <= reach)])
        method = gaussian.rows_by_slices if step in _SLICED_STEPS else gaussian.rows_by_blocks
        rows = lambda m=method, s=step, r=reach: _labelled(  # noqa: E731
            line, m(line, s, r), _negligible_radius(line, width, offset)
        )
        methods.append(Method(f"two-stage Gaussian on a grid of step {step}", rows, fits))
    return methods


def _negligible_radius(line: Line, width: Any, offset: Any) -> Limit:
    if line.labels is None:
        return None
    reach = gaussian.deviations(line.call.dtype) * width + abs(offset)
    return jnp.ceil(jnp.minimum(reach, line.length)).astype(jnp.int32).reshape(-1)


def _labelled(line: Line, rows: Rows, radius: Limit = None) -> Rows:
    """Rows near a key with another label, which the sums took in, are not to be trusted."""
    return rows if line.labels is None else rows._replace(weak=rows.weak | line.crossed(radius))


def _is_unlimited(line: Line) -> bool:
    normalizer = line.call.normalizer
    return line.before is None and line.after is None and normalizer in _EXPONENTIATED


def _is_scannable(line: Line) -> bool:
    """Whether the masks set no limit, or one at the query, and labels are of the same positions."""
    limits = [x for x in (line.before, line.after) if x is not None]
    at_query = not limits or (len(limits) == 1 and isinstance(limits[0], int) and limits[0] == 0)
    own = line.labels is None or (line.labels[0] is line.labels[1] and line.length == line.call.shape[3])
    return at_query and own and line.call.normalizer in _EXPONENTIATED


def _numbers(parameter: Any) -> Any:
    """A parameter for comparisons: NumPy's where it is known while tracing."""
    if isinstance(parameter, jax.Array):
        return lax.stop_gradient(parameter)
    return np.asarray(parameter, float)


def _all_of(holds: Any) -> Any:
    return holds.all() if isinstance(holds, jax.Array) else bool(np.all(holds))


def _every(flags: Iterable[Any]) -> Any:
    return functools.reduce(lambda x, y: y if x is True else x if y is True else x & y, flags, True)


def _any(flags: Iterable[Any]) -> Any:
    return functools.reduce(lambda x, y: True if x is True or y is True else x | y, flags)
