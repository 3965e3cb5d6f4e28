"""Kernels of fixed patterns that studies compare with learned attention.

A module of kernels as one of a user's own: arms that name one have it in their `imports`.

`normal` is the density of a normal distribution, which sums to nearly one by itself: with
`normalizer="none"` it is the unmasked weight of You, Sun and Iyyer (2020), who do not renormalise
where a mask takes keys away. The others stand for the fixed heads of Raganato et al. (2020):
`before` and `after` for a larger context on one side, `start` and `end` for a sentence's ends.
Theirs grow with the cube of a key's place in the sentence; these grow exponentially, because a
rule of distance sees no places, and an exponential of distance falls from the sentence's end alike
for every query once it is renormalised.
"""

# ruff: noqa: D102 (the base class documents what subclasses override)

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from attn_jax.kernels import Parameter, register_kernel
from attn_jax.ops import Gaussian, Proximity, per_head

Relative = Num[Array, "#b 1 T S"]
LogWeight = Float[Array, "#b #N T S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Normal(Proximity):
    """-((r - offset) / width)^2 / 2 - log(width sqrt(2 pi)): weights that sum to about one."""

    width: Any
    offset: Any
    positive: ClassVar[tuple[str, ...]] = ("width",)

    def log_weight(self, r: Relative) -> LogWeight:
        scale = jnp.log(per_head(self.width)) + math.log(2 * math.pi) / 2
        return Gaussian(self.width, self.offset).log_weight(r) - scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slope(Proximity):
    """side * r / length: weights grow towards one end of a sentence, by e in `length` keys.

    Where `beyond` is known, keys on that side at |r| >= beyond alone count, and the slope is
    turned round: the nearest of them weigh most.
    """

    length: Any
    side: int = dataclasses.field(metadata={"static": True})
    beyond: int | None = dataclasses.field(default=None, metadata={"static": True})
    reach: Any = dataclasses.field(default=None, metadata={"static": True})
    positive: ClassVar[tuple[str, ...]] = ("length",)

    def log_weight(self, r: Relative) -> LogWeight:
        slope = self.side * r / per_head(self.length)
        if self.beyond is None:
            return slope
        return jnp.where(self.side * r >= self.beyond, -slope, -jnp.inf)


_LENGTH = {"length": Parameter(3, "keys in which the weight changes by a factor e", per_head=True)}
_WIDTH = {
    "width": Parameter(1, "standard deviation in positions", per_head=True),
    "offset": Parameter(0, "relative position of the peak", "any", per_head=True),
}


def _slope(side: int, beyond: int | None = None) -> Any:
    def build(num_heads: int, *, length: Any, reach: Any) -> Slope:
        del num_heads
        return Slope(length, side, beyond, reach)

    return build


register_kernel("normal", Normal, _WIDTH, meaning="density of a normal distribution")
register_kernel("before", _slope(-1, 2), _LENGTH, meaning="exp(r / length) where r <= -2, else 0")
register_kernel("after", _slope(1, 2), _LENGTH, meaning="exp(-r / length) where r >= 2, else 0")
register_kernel("start", _slope(-1), _LENGTH, meaning="exp(-r / length): a sentence's first words")
register_kernel("end", _slope(1), _LENGTH, meaning="exp(r / length): a sentence's last words")
