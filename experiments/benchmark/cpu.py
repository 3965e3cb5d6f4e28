"""The suite `cpu`: attention with content in float32, [batch, length, heads, width]."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import Causal, Exponential, Gaussian, Local, Table, alibi, attention
from experiments.benchmark import exact, peers
from experiments.benchmark.case import Case, Contender, Target
from experiments.benchmark.compiled import contender, only_compiled
from experiments.benchmark.derivatives import gradient, hessian_vector, tangent
from experiments.benchmark.inputs import DERIVATIVE, FORWARD, normal, normals, shape_text

OURS = "attn_jax"
HEADS, WIDTH = 8, 64
WINDOW = 64
SMALL_SHAPES = ((2, 64, 4, 32), (8, 128, 8, 64), (1, 256, 8, 64))


def cases(length: int = 4096) -> list[Case]:
    """The cases at a length of sequence; the targets are for the default."""
    shape = (1, length, HEADS, WIDTH)
    return [
        *(_forward(shape, causal) for causal in (False, True)),
        *(_forward_and_backward(shape, causal) for causal in (False, True)),
        _window(shape),
        _learnable_kernels(shape),
        *(_small(small) for small in SMALL_SHAPES),
        _tangents(shape),
        _hessian(length // 4, 4 * length),
    ]


def _causal(i: Any, j: Any) -> Any:
    return j <= i


def _in_window(i: Any, j: Any) -> Any:
    return abs(i - j) <= WINDOW


def _forward(shape: Sequence[int], causal: bool) -> Case:
    def contenders() -> list[Contender]:
        inputs = normals(3, shape)
        allowed, mask = (_causal, Causal()) if causal else (None, None)
        right = exact.answer(lambda *x: exact.attention(*x, allowed=allowed), *inputs)
        return [
            contender(OURS, lambda *x: attention(*x, mask=mask), inputs, right),
            contender("jax.nn", peers.jax_nn(is_causal=causal), inputs, right),
            peers.tokamax(
                "tokamax xla_chunked",
                lambda attend: attend,
                inputs,
                right,
                is_causal=causal,
                implementation="xla_chunked",
            ),
            peers.torch_forward(inputs, right, is_causal=causal),
        ]

    over_jax, over_torch = (5.0, 0.75) if causal else (2.2, 0.95)
    targets = (
        Target("time", "jax.nn", OURS, at_least=over_jax, goal="1"),
        Target("time", "torch SDPA", OURS, at_least=over_torch, goal="1"),
        Target("temporary memory", "jax.nn", OURS, at_least=20, goal="1"),
        Target("time", "tokamax xla_chunked", OURS),
    )
    name = f"forward, {'causal' if causal else 'full'}"
    return Case(name, shape_text(shape), contenders, targets, FORWARD)


def _forward_and_backward(shape: Sequence[int], causal: bool) -> Case:
    def contenders() -> list[Contender]:
        cotangent, *inputs = normals(4, shape)
        allowed, mask = (_causal, Causal()) if causal else (None, None)
        right = exact.answer(
            gradient(lambda *x: exact.attention(*x, allowed=allowed)), cotangent, *inputs
        )
        arguments = [cotangent, *inputs]
        return [
            contender(OURS, gradient(lambda *x: attention(*x, mask=mask)), arguments, right),
            contender("jax.nn", gradient(peers.jax_nn(is_causal=causal)), arguments, right),
            peers.tokamax(
                "tokamax xla_chunked",
                gradient,
                arguments,
                right,
                is_causal=causal,
                implementation="xla_chunked",
            ),
            peers.torch_gradient(cotangent, inputs, right, is_causal=causal),
        ]

    over_jax, over_torch = (3.0, 0.7) if causal else (1.3, 0.8)
    targets = (
        Target("time", "jax.nn", OURS, at_least=over_jax, goal="2"),
        Target("time", "torch SDPA", OURS, at_least=over_torch, goal="2"),
        Target("temporary memory", "jax.nn", OURS, at_least=15, goal="2"),
        Target("time", "tokamax xla_chunked", OURS),
    )
    name = f"forward and backward, {'causal' if causal else 'full'}"
    return Case(name, shape_text(shape), contenders, targets, DERIVATIVE)


def _window(shape: Sequence[int]) -> Case:
    both_ways = f"{OURS}, forward and backward"

    def contenders() -> list[Contender]:
        cotangent, *inputs = normals(4, shape)

        def true(*x: Any) -> Any:
            return exact.attention(*x, allowed=_in_window)

        def ours(*x: Any) -> Any:
            return attention(*x, mask=Local(WINDOW, WINDOW))

        right = exact.answer(true, *inputs)
        right_gradient = exact.answer(gradient(true), cotangent, *inputs)
        theirs = peers.jax_nn(local_window_size=(WINDOW, WINDOW))
        return [
            contender(OURS, ours, inputs, right),
            contender(both_ways, gradient(ours), [cotangent, *inputs], right_gradient),
            contender("jax.nn", theirs, inputs, right),
            peers.flex_attention(inputs, right, before=WINDOW, after=WINDOW),
        ]

    targets = (
        Target("time", "jax.nn", OURS, at_least=20, goal="3"),
        Target("time", "torch FlexAttention", OURS, at_least=1.8, goal="3"),
        Target("time", both_ways, OURS, at_most=5, goal="3"),
    )
    name = f"window of {WINDOW} before and after"
    inputs = f"{shape_text(shape)}; 5 times forward is a backward pass of 4 times forward"
    return Case(name, inputs, contenders, targets, DERIVATIVE)


def _learnable_kernels(shape: Sequence[int]) -> Case:
    """Kernels whose parameters, one or more a head, are differentiated beside query, key, value.

    Some heads reach over the whole sequence, so that no cut-off makes them cheap.
    """
    plain = "no bias"
    table_size = 2 * WINDOW + 1
    per_head = (-1, 1, 1)
    kernels = {
        "Gaussian width": (
            Gaussian,
            lambda width: lambda r: -jnp.square(r / width.reshape(per_head)) / 2,
            shape[1] * 2.0 ** -np.arange(HEADS, dtype=np.float32),
        ),
        "ALiBi length": (
            Exponential,
            lambda length: lambda r: -abs(r) / length.reshape(per_head),
            np.asarray(alibi(HEADS).length),
        ),
        "Table": (
            Table,
            lambda table: lambda r: table[:, jnp.clip(r[0].astype(int) + WINDOW, 0, 2 * WINDOW)],
            normal((HEADS, table_size), 9),
        ),
    }

    def contenders() -> list[Contender]:
        cotangent, *inputs = normals(4, shape)
        arguments = [cotangent, *inputs]
        right = exact.answer(gradient(exact.attention), *arguments)
        made = [contender(plain, gradient(attention), arguments, right)]
        for name, (kernel, log_weight, parameter) in kernels.items():

            def ours(q: Any, k: Any, v: Any, parameter: Any, kernel: Any = kernel) -> Any:
                return attention(q, k, v, proximity=kernel(parameter))

            def true(q: Any, k: Any, v: Any, parameter: Any, log_weight: Any = log_weight) -> Any:
                return exact.attention(q, k, v, log_weight=log_weight(parameter))

            right = exact.answer(gradient(true), *arguments, parameter)
            made.append(contender(name, gradient(ours), [*arguments, parameter], right))
        return made

    targets = []
    for name in kernels:
        targets.append(Target("time", name, plain, at_most=1.25, goal="4"))
        targets.append(Target("temporary memory", name, plain, at_most=1.3, goal="4"))
    inputs = f"{shape_text(shape)}, forward and backward, derivative in the kernel too"
    return Case("learnable kernels", inputs, contenders, targets, DERIVATIVE)


def _small(shape: Sequence[int]) -> Case:
    def contenders() -> list[Contender]:
        inputs = normals(3, shape)
        right = exact.answer(exact.attention, *inputs)
        return [
            contender(OURS, attention, inputs, right),
            contender("jax.nn", peers.jax_nn(), inputs, right),
        ]

    targets = (Target("time", "jax.nn", OURS, at_least=0.95, goal="5"),)
    name = f"small {shape_text(shape).removesuffix(' float32')}"
    return Case(name, shape_text(shape), contenders, targets, FORWARD, rounds_factor=5)


def _tangents(shape: Sequence[int]) -> Case:
    forward, in_all, in_query = "forward", "jvp in query, key, value", "jvp in query"

    def in_query_alone(function: Any) -> Any:
        def differentiated(inputs: Any, directions: Any) -> Any:
            query, key, value = inputs
            return jax.jvp(lambda q: function(q, key, value), (query,), (directions[0],))

        return differentiated

    def contenders() -> list[Contender]:
        inputs, directions = tuple(normals(3, shape)), tuple(normals(3, shape, 3))
        made = [contender(forward, attention, inputs, exact.answer(exact.attention, *inputs))]
        for name, derive in ((in_all, tangent), (in_query, in_query_alone)):
            right = exact.answer(derive(exact.attention), inputs, directions)
            made.append(contender(name, derive(attention), [inputs, directions], right))
        return made

    targets = (
        Target("time", in_all, forward, at_most=4, goal="9"),
        Target("time", in_query, forward, at_most=3, goal="9"),
    )
    return Case("jvp", shape_text(shape), contenders, targets, DERIVATIVE)


def _hessian(short: int, long: int) -> Case:
    """The memory of a Hessian-vector product at a length that is compiled and not run.

    The same function is run and checked at a short length.
    """
    derived = hessian_vector(attention)

    def contenders() -> list[Contender]:
        shape = (1, short, HEADS, WIDTH)
        cotangent, *arrays = normals(7, shape)
        arguments = [cotangent, tuple(arrays[:3]), tuple(arrays[3:])]
        one = jax.ShapeDtypeStruct((1, long, HEADS, WIDTH), jnp.float32)
        right = exact.answer(hessian_vector(exact.attention), *arguments)
        return [
            contender(f"length {short}", derived, arguments, right),
            only_compiled(f"length {long}", derived, [one, (one,) * 3, (one,) * 3]),
        ]

    targets = (Target("temporary memory", f"length {long}", at_most=1e9, goal="9"),)
    inputs = f"{HEADS} heads, width {WIDTH}, float32"
    return Case("Hessian-vector product", inputs, contenders, targets, DERIVATIVE)
