"""Renormalised smoothing of a series as others do it: the peers of attention by distance alone.

Every function takes value [1, N, C] (channels last, as it comes) and the kernel's parameter, and
divides by the kernel's mass inside the series, so that all answer the same question. Those that
need a reach know it beforehand; the parameter itself is traced.

Letters: N length, C channels, R reach.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from experiments.benchmark.case import Contender, Prepared
from experiments.benchmark.peers import load_torch, module, prepared_eager, prepared_torch

TRUNCATION = 5
"""Widths at which peers cut a Gaussian: it leaves out 6e-7 of the mass."""

Value = Float[Array, "1 N C"]
Parameter = Float[Array, ""]


def gaussian_taps(width: Parameter, reach: int) -> Float[Array, "taps"]:
    """Weights at r = 0..R."""
    return jnp.exp(-jnp.square(jnp.arange(reach + 1) / width) / 2)


def mass_inside(taps: Float[Array, "taps"], length: int) -> Float[Array, "1 N 1"]:
    """The mass of a symmetric kernel that falls on the series, at each place of it."""
    reach = len(taps) - 1
    mass = jnp.cumsum(taps)
    before = jnp.minimum(jnp.arange(length), reach)
    return (mass[before] + mass[before[::-1]] - taps[0]).reshape(1, -1, 1)


def fft(reach: int) -> Callable[[Value, Parameter], Value]:
    """A Gaussian by real FFT of a 5-smooth length that no weight wraps around."""

    def smooth(value: Value, width: Parameter) -> Value:
        length = value.shape[1]
        padded = smooth_length(length + reach)
        taps = gaussian_taps(width, reach)
        circular = jnp.zeros(padded).at[: reach + 1].set(taps)
        circular = circular.at[padded - reach :].set(taps[:0:-1])
        product = jnp.fft.rfft(value, padded, axis=1) * jnp.fft.rfft(circular).reshape(1, -1, 1)
        mixed = jnp.fft.irfft(product, padded, axis=1)[:, :length]
        return mixed / mass_inside(taps, length)

    return smooth


def smooth_length(least: int) -> int:
    """The smallest number from `least` on whose prime factors are 2, 3 and 5."""
    number = least
    while True:
        rest = number
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return number
        number += 1


def depthwise(reach: int) -> Callable[[Value, Parameter], Value]:
    """A Gaussian by XLA's convolution with one group a channel."""

    def smooth(value: Value, width: Parameter) -> Value:
        taps = gaussian_taps(width, reach)
        both = jnp.concatenate([taps[:0:-1], taps]).reshape(-1, 1, 1)
        mixed = lax.conv_general_dilated(
            value,
            jnp.broadcast_to(both, (len(both), 1, value.shape[2])),
            (1,),
            [(reach, reach)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=value.shape[2],
        )
        return mixed / mass_inside(taps, value.shape[1])

    return smooth


def associative_scan(value: Value, length: Parameter) -> Value:
    """An exponential by `lax.associative_scan` in both directions."""
    decay = jnp.broadcast_to(jnp.exp(-1 / length), (1, value.shape[1], 1))

    def combine(first: Any, second: Any) -> Any:
        return first[0] * second[0], first[1] * second[0] + second[1]

    def one_way(reverse: bool) -> Value:
        return lax.associative_scan(combine, (decay, value), axis=1, reverse=reverse)[1]

    mixed = one_way(False) + one_way(True) - value
    return mixed / _exponential_mass(length, value.shape[1])


def two_scans(value: Value, length: Parameter) -> Value:
    """An exponential by `lax.scan` in both directions."""
    decay = jnp.exp(-1 / length)

    def step(state: Array, row: Array) -> tuple[Array, Array]:
        state = decay * state + row
        return state, state

    rows = value[0]
    forward = lax.scan(step, jnp.zeros_like(rows[0]), rows)[1]
    backward = lax.scan(step, jnp.zeros_like(rows[0]), rows, reverse=True)[1]
    return (forward + backward - rows)[None] / _exponential_mass(length, value.shape[1])


def _exponential_mass(length: Parameter, rows: int) -> Float[Array, "1 N 1"]:
    """The sum of exp(-|r| / length) over a series, in closed form; expm1 keeps long lengths."""
    places = jnp.arange(rows)
    one_side = jnp.expm1(-(places + 1) / length) / jnp.expm1(-1 / length)
    return (one_side + one_side[::-1] - 1).reshape(1, -1, 1)


def prefix_sums(value: Value, radius: Parameter) -> Value:
    """A window by one cumulative sum of the whole series: short, and noisy where the mean is not 0.

    The differences of sums that grow with the series keep few digits.
    """
    length = value.shape[1]
    sums = jnp.pad(jnp.cumsum(value, axis=1), ((0, 0), (1, 0), (0, 0)))
    places = jnp.arange(length)
    reach = radius.astype(jnp.int32)
    last = jnp.minimum(places + reach + 1, length)
    first = jnp.maximum(places - reach, 0)
    mixed = jnp.take(sums, last, axis=1) - jnp.take(sums, first, axis=1)
    return mixed / (last - first).reshape(1, -1, 1).astype(value.dtype)


def scipy_gaussian(
    value: np.ndarray, width: float, expected: Callable[[], Sequence[np.ndarray]]
) -> Contender:
    """`scipy.ndimage.gaussian_filter1d` of the series and of ones, which give the mass."""

    def prepare() -> Prepared:
        ndimage = module("scipy.ndimage")
        ones = np.ones((1, value.shape[1], 1), value.dtype)

        def filtered(array: np.ndarray) -> np.ndarray:
            return ndimage.gaussian_filter1d(
                array, width, axis=1, mode="constant", truncate=TRUNCATION
            )

        return prepared_eager(lambda: filtered(value) / filtered(ones), np.asarray)

    return Contender("scipy.ndimage", prepare, expected)


def torch_fft(
    value: np.ndarray,
    width: float,
    expected: Callable[[], Sequence[np.ndarray]],
    *,
    channels_first: bool = False,
) -> Contender:
    """A Gaussian by torch.fft; channels first is the layout that suits it and not the caller."""
    reach = round(TRUNCATION * width)
    length = value.shape[1]
    padded = smooth_length(length + reach)
    axis = 2 if channels_first else 1

    def prepare() -> Prepared:
        torch = load_torch()
        tensor = torch.from_numpy(value)
        tensor = tensor.transpose(1, 2).contiguous() if channels_first else tensor

        def run() -> Any:
            taps, mass = _torch_taps(torch, width, reach, length)
            circular = torch.zeros(padded)
            circular[: reach + 1] = taps
            circular[padded - reach :] = taps[1:].flip(0)
            kernel = torch.fft.rfft(circular)
            kernel = kernel if channels_first else kernel[:, None]
            product = torch.fft.rfft(tensor, padded, dim=axis) * kernel
            mixed = torch.fft.irfft(product, padded, dim=axis).narrow(axis, 0, length)
            return mixed / (mass if channels_first else mass[:, None])

        return prepared_torch(lambda: run().transpose(1, 2) if channels_first else run())

    name = "torch FFT, channels first" if channels_first else "torch FFT"
    return Contender(name, prepare, expected)


def torch_depthwise(
    value: np.ndarray, width: float, expected: Callable[[], Sequence[np.ndarray]]
) -> Contender:
    """A Gaussian by torch's conv1d with one group a channel."""
    reach = round(TRUNCATION * width)
    channels = value.shape[2]

    def prepare() -> Prepared:
        torch = load_torch()
        tensor = torch.from_numpy(value)

        def run() -> Any:
            taps, mass = _torch_taps(torch, width, reach, value.shape[1])
            both = torch.cat([taps[1:].flip(0), taps]).expand(channels, 1, -1)
            convolve = torch.nn.functional.conv1d
            mixed = convolve(tensor.transpose(1, 2), both, padding=reach, groups=channels)
            return mixed.transpose(1, 2) / mass[:, None]

        return prepared_torch(run)

    return Contender("torch depthwise convolution", prepare, expected)


def _torch_taps(torch: Any, width: float, reach: int, length: int) -> tuple[Any, Any]:
    """Weights at r = 0..R, and the mass inside the series at each place of it."""
    taps = torch.exp(-torch.square(torch.arange(reach + 1) / width) / 2)
    before = torch.arange(length).clamp(max=reach)
    mass = taps.cumsum(0)
    return taps, mass[before] + mass[before.flip(0)] - taps[0]
