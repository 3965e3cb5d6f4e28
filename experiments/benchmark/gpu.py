"""The suite `gpu`: attention with content in bfloat16, [batch, length, heads, width]."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import Causal, attention
from experiments.benchmark import exact, peers
from experiments.benchmark.case import Case, Contender, Target
from experiments.benchmark.compiled import contender
from experiments.benchmark.derivatives import gradient
from experiments.benchmark.inputs import HALF, normal, normals, shape_text

OURS, XLA, CUDNN = "attn_jax", "jax.nn xla", "jax.nn cudnn"
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One shape: [batch, length, heads, width], a causal mask, a bias that all sequences share."""

    batch: int
    length: int
    heads: int
    width: int
    causal: bool = False
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of query, key and value."""
        return self.batch, self.length, self.heads, self.width

    @property
    def name(self) -> str:
        """In words."""
        words = ["causal" if self.causal else "full", *["dense bias"] * self.bias]
        return f"{self.batch}x{self.length}, {self.heads} heads, width {self.width}, " + ", ".join(
            words
        )

    @property
    def flops(self) -> float:
        """Of the two matrix products of a forward pass, half of them under a causal mask."""
        pairs = self.batch * self.heads * self.length**2 * (0.5 if self.causal else 1)
        return 4 * pairs * self.width


SETTINGS = (
    Setting(2, 8192, 16, 128),
    Setting(2, 8192, 16, 128, causal=True),
    Setting(1, 16384, 8, 256),
    Setting(128, 4096, 4, 32, bias=True),
)


def cases(settings: tuple[Setting, ...] = SETTINGS) -> list[Case]:
    """Forward, and forward and backward, of every setting."""
    return [make(setting) for setting in settings for make in (_forward, _forward_and_backward)]


def _inputs(setting: Setting) -> list[np.ndarray]:
    """Query, key, value and, where the setting has one, the bias [1, N, T, S], in bfloat16."""
    arrays = normals(3, setting.shape)
    if setting.bias:
        arrays.append(normal((1, setting.heads, setting.length, setting.length), 3))
    return [array.astype(jnp.bfloat16) for array in arrays]


def _exact(setting: Setting) -> Function:
    allowed = (lambda i, j: j <= i) if setting.causal else None

    def attend(query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        one = None if bias is None else bias[0]
        return exact.attention(query, key, value, allowed=allowed, bias=one)

    return attend


def _functions(setting: Setting) -> dict[str, Function]:
    """All contenders as functions of query, key, value and perhaps bias."""
    mask = Causal() if setting.causal else None

    def by_jax_nn(implementation: Any) -> Function:
        attend = peers.jax_nn(is_causal=setting.causal, implementation=implementation)
        return lambda query, key, value, bias=None: attend(query, key, value, bias=bias)

    def ours(query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        return attention(query, key, value, bias=bias, mask=mask)

    return {OURS: ours, CUDNN: by_jax_nn("cudnn"), XLA: by_jax_nn("xla")}


_TARGETS = (
    Target("time", CUDNN, OURS),
    Target("time", XLA, OURS),
    Target("temporary memory", XLA, OURS),
)


def _forward(setting: Setting) -> Case:
    def contenders() -> list[Contender]:
        inputs = _inputs(setting)
        right = exact.answer(_exact(setting), *inputs)
        functions = _functions(setting).items()
        return [contender(name, function, inputs, right) for name, function in functions]

    return Case(
        f"forward: {setting.name}",
        shape_text(setting.shape, "bfloat16"),
        contenders,
        _TARGETS,
        HALF,
        flops=setting.flops,
    )


def _forward_and_backward(setting: Setting) -> Case:
    """The bias is not differentiated. A backward pass has five matrix products, a forward two."""

    def contenders() -> list[Contender]:
        cotangent = normal(setting.shape, 4).astype(jnp.bfloat16)
        query, key, value, *bias = _inputs(setting)

        def derived(function: Function) -> Function:
            def of(cotangent: jax.Array, q: Any, k: Any, v: Any, *bias: Any) -> Any:
                return gradient(lambda *x: function(*x, *bias))(cotangent, q, k, v)

            return of

        arguments = [cotangent, query, key, value, *bias]
        right = exact.answer(derived(_exact(setting)), *arguments)
        functions = _functions(setting).items()
        return [contender(name, derived(f), arguments, right) for name, f in functions]

    return Case(
        f"forward and backward: {setting.name}",
        shape_text(setting.shape, "bfloat16"),
        contenders,
        _TARGETS,
        HALF,
        flops=3.5 * setting.flops,
    )
