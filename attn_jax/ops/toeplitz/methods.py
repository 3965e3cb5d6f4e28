"""Which method a content-free call takes, by its kernel and how far its masks reach.

Known parameters decide while tracing. Others decide as the program runs, among a few methods that
are all compiled: a changed width compiles nothing.

The derivative is that of a quotient, N / D: (dN - y dD) / D needs no N, so that a backward pass
computes none again. Its sums are chosen among the methods likewise, by a choice whose transpose is
one again (`linear`), or the residuals would be those of all of them.

Letters: B batch, P positions, n N heads or 1, k heads of W channels with sums of their own.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from attn_jax.ops import masks, proximity
from attn_jax.ops.call import Call
from attn_jax.ops.lanes import each_in_any_lane
from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER
from attn_jax.ops.toeplitz import boxes, exponential, fourier, gaussian, taps
from attn_jax.ops.toeplitz.line import Line, mask_parts
from attn_jax.ops.toeplitz.linear import linear_switch
from attn_jax.ops.toeplitz.rows import Rows, Sums, Trust, divided
from attn_jax.ops.toeplitz.rowwise import by_row, times

# Shifted slices: the compiler's time grows with their number. The most reach as far as the widest
# Gaussian needs that is too narrow for the finest grid, in float32 and in float64.
_TAPS = (17, 49)
_MORE_TAPS = {jnp.dtype(jnp.float32): (), jnp.dtype(jnp.float64): (101,)}
# Windows up to this far are summed by blocks with little padding.
_NEAR_BOX = 256
# Steps of the Gaussian's grid. Each serves widths up to the next one's least, and is compiled where
# the width is data.
_STEPS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# The finest, whose sum over the grid is the longest, has a shorter one for widths up to this share.
_NARROW = 0.7
# Runs of one label are laid apart on a line that is longer by a sixth. Narrow kernels need less,
# and to them a longer line is most of what labels cost.
_ROOM, _LITTLE_ROOM = 6, 32
# A grid of so few points is taken whole, for widths without end.
_FEW_POINTS = 256

SLICES = "shifted slices"
STATES = "states of an exponential"
BOXES = "blocked sums of a window"
GRID = "a Gaussian by way of a grid"
FOURIER = "fast Fourier transforms"


class Method(NamedTuple):
    """One way to compute a call.

    Attributes:
      name: for people.
      sums: of the values and of ones.
      trust: how far they are to be trusted.
      fits: whether the parameters are such that it may; a Python bool where they are known.

    """

    name: str
    sums: Callable[[Line], Sums]
    trust: Callable[[Line], Trust]
    fits: Any

    def rows(self, line: Line) -> Rows:
        """Attention."""
        return divided(line, self.sums(line), self.trust(line))


def choices(call: Call, line: Line) -> list[Method]:
    """Methods in order of preference, down to the first that surely fits."""
    methods = [m for m in _all(call, line) if m.fits is not False]
    sure = next(i for i, m in enumerate(methods) if m.fits is True)
    return methods[: sure + 1]


def is_sure(call: Call, line: Line) -> bool:
    """Whether it is known while tracing that no row's sums are too small to be trusted.

    So it is for windows, and where no mask can hide a query's own key, which has the peak. For
    transforms a row must hold a share of all weights too: half of a symmetric kernel's lie on
    either side of the query.
    """
    kernel = call.proximity
    if line.labels is not None:
        return False
    if kernel is None or type(kernel) is proximity.Window:
        return True
    by_transforms = any(m.name == FOURIER for m in choices(call, line))
    symmetric = proximity.is_built_in(kernel) and not _is_lopsided(kernel)
    sides = line.before, line.after
    own_key = line.length == line.queries == line.keys and _leaves_own_keys(call.mask)
    own_key &= all(x is None or (isinstance(x, int) and x >= 0) for x in sides)
    return symmetric and own_key and (not by_transforms or sides[0] == sides[1])


def _is_lopsided(kernel: proximity.Proximity) -> bool:
    """Whether the peak may lie beside the query."""
    if isinstance(kernel, proximity.Gaussian):
        return _all_of(_numbers(kernel.offset) == 0) is not True
    return isinstance(kernel, proximity.Table)


def _leaves_own_keys(mask: masks.Mask | None) -> bool:
    """Whether lengths are known to leave as many keys as queries."""
    parts = mask_parts(mask) or ()
    return all(m.query is m.key for m in parts if isinstance(m, masks.Lengths))


def rows(call: Call, line: Line) -> Rows:
    """Attention by the first method that fits."""
    methods = choices(call, line)
    unfit = jnp.stack([~jnp.asarray(m.fits) for m in methods])
    index = jnp.argmin(each_in_any_lane(unfit)) if len(methods) > 1 else jnp.zeros((), jnp.int32)

    @jax.custom_jvp
    def chosen(index: Int[Array, ""], line: Line) -> Rows:
        return lax.switch(index, [m.rows for m in methods], line)

    chosen.defjvp(functools.partial(_derivative, methods, chosen), symbolic_zeros=True)
    return chosen(index, line)


class _Fixed(NamedTuple):
    """What a change is not linear in; `mixed` as of `Rows`, with one axis for all channels."""

    line: Line
    mixed: Float[Array, "B P kW"]
    total: Float[Array, "B P #n 1"]
    weak: Bool[Array, "B P #n 1"]


def _derivative(methods: list[Method], chosen, primals, tangents) -> tuple[Rows, Rows]:
    """Of what has no tangent none is computed."""
    index, line = primals
    given = jax.tree.structure(line.smooth).flatten_up_to(tangents[1].smooth)
    moving = [i for i, t in enumerate(given) if not isinstance(t, SymbolicZero)]
    output = chosen(index, line)
    mixed, total = jnp.zeros_like(output.mixed), jnp.zeros_like(output.total)
    if moving:
        flat = output.mixed.reshape(*output.mixed.shape[:2], -1)
        fixed = _Fixed(line, flat, output.total, output.weak)
        branches = [functools.partial(_change, m.sums, moving) for m in methods]
        mixed, total = linear_switch(index, branches, fixed, [given[i] for i in moving])
    zeros = SymbolicZero(jax.typeof(output.weak).to_tangent_aval())
    shift = jnp.zeros_like(output.shift)
    tangent = Rows(mixed.reshape(output.mixed.shape), total, shift, zeros)  # pyright: ignore[reportArgumentType]
    return output, tangent


def _change(
    sums: Callable[[Line], Sums], moving: list[int], fixed: _Fixed, moved: list[Array]
) -> tuple[Float[Array, "B P kW"], Float[Array, "B P #n 1"]]:
    """The quotient's rule: the change of its value and that of its denominator.

    Divided here, where the transpose of it all is one loop with what comes next.
    """
    line = fixed.line
    leaves, structure = jax.tree.flatten(line.smooth)

    def of_moving(some: list[Array]) -> Sums:
        whole = dict(enumerate(leaves)) | dict(zip(moving, some, strict=True))
        smooth = jax.tree.unflatten(structure, whole.values())
        return sums(dataclasses.replace(line, smooth=smooth))

    mixed, total = jax.jvp(of_moving, ([leaves[i] for i in moving],), (moved,))[1]
    mixed = mixed.reshape(fixed.mixed.shape)
    unfit = fixed.weak | line.empty(line.radius)
    if line.normalizer not in WITH_LOG_NORMALIZER:
        return by_row(_zeroed, mixed, unfit), jnp.zeros_like(fixed.total)
    # Some methods count the keys of all sequences at once.
    total = jnp.broadcast_to(total, fixed.total.shape)
    total = jnp.where(unfit, 0, total)
    mixed = by_row(_zeroed, by_row(operator.truediv, mixed, fixed.total), unfit)
    return mixed + times(fixed.mixed, -total / fixed.total), total


def _zeroed(x: Array, rows: Array) -> Array:
    return jnp.where(rows, 0, x)


def _all(call: Call, line: Line) -> list[Method]:
    kernel = call.proximity
    if type(kernel) is proximity.Exponential and _is_scannable(line):
        return [Method(STATES, exponential.sums, exponential.trust, True)]
    methods = _short(call, line)
    if kernel is None or type(kernel) is proximity.Window:
        # Many slices are slower than blocks, but mind labels.
        slices = methods[:1] if line.labels is None else methods
        return [*slices, *_boxes(line)]
    if type(kernel) is proximity.Gaussian and _is_unlimited(line):
        # Many slices are slower than the finest grid.
        methods[1:1] = _grids(line, kernel)
    return [*methods, Method(FOURIER, fourier.sums, fourier.trust, True)]


def _short(call: Call, line: Line) -> list[Method]:
    """Shifted slices, where weights end or become negligible within a short reach."""
    exact, negligible = _ends(call, line)
    one_sided = any(isinstance(x, int) and x == 0 for x in (line.before, line.after))
    methods = []
    is_gaussian = type(call.proximity) is proximity.Gaussian
    for count in (*_TAPS, *_MORE_TAPS[line.dtype]) if is_gaussian else _TAPS:
        reach = min(count - 1 if one_sided else count // 2, line.length - 1)
        ends = _any(_all_of(end <= reach) for end in exact)
        share = None if ends is True or not negligible else gaussian.SHARE
        fits = _any([ends, *(_all_of(end <= reach) for end in negligible)])
        methods.append(_method(SLICES, taps, fits, reach=reach, share=share))
    return methods


def _method(name: str, module: Any, fits: Any, **arguments: Any) -> Method:
    sums, trust = (functools.partial(f, **arguments) for f in (module.sums, module.trust))
    return Method(name, sums, trust, fits)


def _ends(call: Call, line: Line) -> tuple[list[Any], list[Any]]:
    """Distances beyond which there is no weight, and such beyond which it is negligible."""
    kernel = call.proximity
    exact: list[Any] = [line.length - 1]
    if line.before is not None and line.after is not None:
        both = (line.before, line.after)
        known = not any(isinstance(x, jax.Array) for x in both)
        exact.append(max(both) if known else jnp.maximum(*both))
    if isinstance(kernel, proximity.Window | proximity.Triangular | proximity.Epanechnikov):
        exact += [_numbers(kernel.radius)] if proximity.is_built_in(kernel) else []
    if type(kernel) is proximity.Gaussian and call.normalizer != "linear":
        reach = gaussian.deviations(call.dtype) * _numbers(kernel.width)
        return exact, [reach + abs(_numbers(kernel.offset))]
    return exact, []


def _boxes(line: Line) -> list[Method]:
    """Blocked sums: windows that end near, and any."""
    ends = [x for x in boxes.limits(line) if x is not None]
    methods = []
    for farthest in sorted({min(_NEAR_BOX, line.length), line.length}):
        fits = farthest == line.length or _every(_all_of(abs(x) <= farthest) for x in ends)
        sums = functools.partial(boxes.sums, farthest=farthest)
        methods.append(Method(BOXES, sums, boxes.trust, fits))
    return methods


def _grids(line: Line, kernel: proximity.Gaussian) -> list[Method]:
    """By way of a grid, of every step until so few points are left that all pairs are taken."""
    dtype = line.dtype
    width, offset = _numbers(kernel.width), _numbers(kernel.offset)
    methods = []
    for step in _STEPS:
        wide = _all_of(width >= gaussian.finest(step, dtype))
        if line.length <= _FEW_POINTS * step:
            return [*methods, _grid(wide, step, None, line.length // _ROOM)]
        for share, longer, does in _forms(line, step):
            widest = share * gaussian.finest(2 * step, dtype)
            reach = gaussian.reach_on_grid(widest, step, dtype)
            near = _all_of(gaussian.needed_on_grid(width, offset, step, dtype) <= reach)
            methods.append(_grid(_every([wide, near, does]), step, reach, longer))
    return methods


def _forms(line: Line, step: int) -> list[tuple[float, int, Any]]:
    """Forms of a step, by preference: share of its widths, further places, and whether they do.

    Where runs of labels do not fit on the line, they are computed exactly: the last always does.
    """
    longer, little = line.length // _ROOM, line.length // _LITTLE_ROOM
    if step != _STEPS[0]:
        return [(1, longer, True)]
    first = [] if line.labels is None else [(_NARROW, little, gaussian.has_room(line, little))]
    return [*first, (_NARROW, longer, True), (1, longer, True)]


def _grid(fits: Any, step: int, reach: int | None, longer: int) -> Method:
    sums = functools.partial(gaussian.sums, step=step, reach=reach, longer=longer)
    return Method(GRID, sums, functools.partial(gaussian.trust, longer=longer), fits)


def _is_unlimited(line: Line) -> bool:
    return line.before is None and line.after is None and line.normalizer in _EXPONENTIATED


_EXPONENTIATED = ("softmax", "softmax_one", "none")


def _is_scannable(line: Line) -> bool:
    """Whether the masks set no limit, or one at the query, and labels are of the same positions."""
    limits = [x for x in (line.before, line.after) if x is not None]
    at_query = not limits or (len(limits) == 1 and isinstance(limits[0], int) and limits[0] == 0)
    own = line.labels is None or (line.own_labels and line.length == line.keys)
    return at_query and own and line.normalizer in _EXPONENTIATED


def _numbers(parameter: Any) -> Any:
    """A parameter for comparisons: NumPy's where it is known while tracing."""
    if isinstance(parameter, jax.Array):
        return lax.stop_gradient(parameter)
    return np.asarray(parameter, float)


def _all_of(holds: Any) -> Any:
    return holds.all() if isinstance(holds, jax.Array) else bool(np.all(holds))


def _every(flags: Iterable[Any]) -> Any:
    known, data = _parted(flags)
    if not all(known):
        return False
    return functools.reduce(lambda x, y: x & y, data) if data else True


def _any(flags: Iterable[Any]) -> Any:
    known, data = _parted(flags)
    if any(known):
        return True
    return functools.reduce(lambda x, y: x | y, data) if data else False


def _parted(flags: Iterable[Any]) -> tuple[list[bool], list[Array]]:
    """Flags that are known while tracing, and the others."""
    flags = list(flags)
    known = [x for x in flags if isinstance(x, bool)]
    return known, [x for x in flags if not isinstance(x, bool)]
