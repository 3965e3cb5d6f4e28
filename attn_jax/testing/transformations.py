"""Checks 10 and 12: JAX's transformations, repeats, and what must not be traced again."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from attn_jax.ops.masks import Causal, Lengths, Local
from attn_jax.ops.proximity import Exponential, Gaussian
from attn_jax.testing.check import FULL, Case, case, check
from attn_jax.testing.example import Example, Sizes
from attn_jax.testing.reference import Bounded
from attn_jax.testing.trial import CONTENT, Failure, Trial, present

LANES = 3
WITHOUT_CONTENT = {"queries": 9}


def _rule(trial: Trial, sizes: Sizes, seed: int = 0, content: bool = True) -> Example:
    return trial.example(
        sizes, seed, content=content, mask=Causal(), proximity=Gaussian(2.0, reach=4)
    )


def _function(trial: Trial, example: Example, names: tuple[str, ...]) -> Callable[..., Any]:
    """The subject as a function of the arrays named, in that order."""
    return lambda *arrays: trial.apply(example.changed(**dict(zip(names, arrays, strict=True))))


def _arrays(trial: Trial, example: Example) -> list[Any]:
    return list(trial.arrays(example, present(example)).values())


# jit, and functions made of the subject


def _eager(trial: Trial, sizes: Sizes, content: bool) -> None:
    trial.transformable()
    example = _rule(trial, sizes, content=content)
    output = _function(trial, example, present(example))(*_arrays(trial, example))
    trial.close("output without jit", output, trial.reference(example).output, example)


def _with_gradient(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., None]:
    """A body for a wrapped function that must have the plain one's output and gradients."""

    def body(trial: Trial, sizes: Sizes, content: bool) -> None:
        trial.transformable()
        example = _rule(trial, sizes, content=content)
        names = present(example)
        cotangent = trial.normal(example.output_shape)

        @trial.compiled
        def pull(arrays: Any, cotangent: Any) -> Any:
            function = wrap(_function(trial, example, names))
            output, transpose = jax.vjp(function, *arrays)
            return output, transpose(cotangent)

        output, gradients = pull(_arrays(trial, example), cotangent)
        reference = trial.reference(example)
        trial.close("output", output, reference.output, example)
        named = dict(zip(names, gradients, strict=True))
        trial.gradients_close(named, reference.pull(cotangent, names), example)

    return body


def _on_a_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """shard_map over the batch, on a mesh of one device."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("batch",))

    def sharded(*arrays: Any) -> Any:
        spec = PartitionSpec("batch")
        specs = (spec,) * len(arrays)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spec)(*arrays)

    return sharded


def _scanned(trial: Trial, sizes: Sizes) -> None:
    """Three layers that mix a sequence with itself, against the same layers in a Python loop."""
    trial.transformable()
    example = _rule(trial, sizes)
    scales = jnp.asarray([0.5, 1.0, 2.0], trial.dtype)

    def layer(x: Any, scale: Any) -> tuple[Any, None]:
        mixed = trial.apply(example.changed(query=scale * x, key=x, value=x))
        return x + mixed, None

    def scanned(x: Any, scales: Any) -> Any:
        return jax.lax.scan(layer, x, scales)[0].sum()

    def unrolled(x: Any, scales: Any) -> Any:
        for n in range(3):
            x, _ = layer(x, scales[n])
        return x.sum()

    x = jnp.asarray(example.value)
    got = trial.compiled(jax.grad(scanned, (0, 1)))(x, scales)
    expected = trial.compiled(jax.grad(unrolled, (0, 1)))(x, scales)
    # three layers and their sums of some tens of terms
    trial.alike("gradient of a scan over layers", got, expected, example, roundings=64)


def _exported(trial: Trial, sizes: Sizes, content: bool) -> None:
    trial.transformable()
    example = _rule(trial, sizes, content=content)
    function = trial.compiled(_function(trial, example, present(example)))
    arrays = _arrays(trial, example)
    exported = jax.export.export(function)(*arrays)  # pyright: ignore[reportArgumentType]
    output = exported.call(*arrays)
    trial.close("output of the exported program", output, trial.reference(example).output, example)


def _donated(trial: Trial, sizes: Sizes) -> None:
    """The query, of the output's shape, is donated to it."""
    trial.transformable()
    example = _rule(trial, sizes)
    function = trial.compiled(_function(trial, example, CONTENT), donate_argnums=0)
    output = function(*_arrays(trial, example))
    trial.close("output with a donated query", output, trial.reference(example).output, example)


@check(10, "jit, grad, remat", "The same with and without jit, under remat, shard_map and export.")
def _programs() -> Iterator[Case]:
    wrapped = {"grad of remat": jax.checkpoint, "grad of shard_map": _on_a_mesh}
    for content, suffix in ((True, ""), (False, ", no content")):
        sizes = {} if content else WITHOUT_CONTENT
        yield case(f"without jit{suffix}", _eager, content, **sizes)
        yield case(f"export{suffix}", _exported, content, **sizes)
        for name, wrap in wrapped.items():
            yield case(f"{name}{suffix}", _with_gradient(wrap), content, **sizes)
    yield case("donated query", _donated, queries=9)


@check(10, "scan", "Layers in a scan have the gradients of the same layers in a loop.", FULL)
def _scans() -> Iterator[Case]:
    yield case("three layers", _scanned, queries=9)


# vmap


def _stacked(trial: Trial, sizes: Sizes, content: bool = True) -> tuple[list[Example], list[Any]]:
    examples = [_rule(trial, sizes, seed, content) for seed in range(LANES)]
    lanes = zip(*(_arrays(trial, example) for example in examples), strict=True)
    return examples, [jnp.stack(arrays) for arrays in lanes]


def _lane(examples: list[Example], lane: int, names: tuple[str, ...]) -> Example:
    """The example of a lane that has its own arrays of these names, and the first one's others."""
    return examples[0].changed(**{name: getattr(examples[lane], name) for name in names})


def _vmapped(trial: Trial, sizes: Sizes, mapped: tuple[str, ...], content: bool = True) -> None:
    trial.transformable()
    examples, stacked = _stacked(trial, sizes, content)
    names = present(examples[0])
    axes = [0 if name in mapped else None for name in names]
    arrays = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]
    got = trial.compiled(jax.vmap(_function(trial, examples[0], names), axes))(*arrays)
    for lane in range(LANES):
        own = _lane(examples, lane, mapped)
        trial.close(f"lane {lane}", got[lane], trial.reference(own).output, own)


def _other_axes(trial: Trial, sizes: Sizes) -> None:
    trial.transformable()
    examples, (query, key, value) = _stacked(trial, sizes)
    moved = jnp.moveaxis(query, 0, 2), jnp.moveaxis(key, 0, -1), jnp.moveaxis(value, 0, 1)
    function = _function(trial, examples[0], CONTENT)
    got = trial.compiled(jax.vmap(function, (2, -1, 1), out_axes=1))(*moved)
    for lane in range(LANES):
        expected = trial.reference(examples[lane]).output
        trial.close(f"lane {lane}", got[:, lane], expected, examples[lane])


def _of_grad(trial: Trial, sizes: Sizes, content: bool, shared: bool) -> None:
    """Vmap of grad; with `shared`, the key is the same in all lanes."""
    trial.transformable()
    examples, stacked = _stacked(trial, sizes, content)
    names = present(examples[0])
    cotangents = trial.normal((LANES, *examples[0].output_shape))
    axes = [None if shared and name == "key" else 0 for name in names]
    arrays = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]

    def pull(cotangent: Any, *arrays: Any) -> Any:
        return jax.vjp(_function(trial, examples[0], names), *arrays)[1](cotangent)

    got = trial.compiled(jax.vmap(pull, (0, *axes)))(jnp.asarray(cotangents), *arrays)
    for lane in range(LANES):
        own = _lane(examples, lane, tuple(n for n, a in zip(names, axes, strict=True) if a == 0))
        expected = trial.reference(own).pull(cotangents[lane], names)
        named = {name: g[lane] for name, g in zip(names, got, strict=True)}
        trial.gradients_close(named, expected, own)


def _bias_lanes(trial: Trial, sizes: Sizes, shared: bool) -> None:
    """Gradients of a bias of each lane, or of one bias that all lanes share."""
    trial.transformable()
    examples, stacked = _stacked(trial, sizes)
    biases = trial.normal((LANES, 1, sizes.heads, 1, sizes.keys))
    cotangent = trial.normal(examples[0].output_shape)

    def pull(bias: Any, *arrays: Any) -> Any:
        def function(bias: Any) -> Any:
            example = examples[0].changed(**dict(zip(CONTENT, arrays, strict=True)), bias=bias)
            return trial.apply(example)

        return jax.vjp(function, bias)[1](jnp.asarray(cotangent))[0]

    given = jnp.asarray(biases[0] if shared else biases)
    got = trial.compiled(jax.vmap(pull, (None if shared else 0, 0, 0, 0)))(given, *stacked)
    for lane in range(LANES):
        own = examples[lane].changed(bias=biases[0 if shared else lane])
        expected = trial.reference(own).pull(cotangent, ("bias",))
        trial.gradients_close({"bias": got[lane]}, expected, own)


def _rule_lanes(trial: Trial, sizes: Sizes, content: bool) -> None:
    """Widths, lengths and offsets of each lane; one lane has no key for its first sequence."""
    trial.transformable()
    widths = jnp.asarray([1.0, 3.0], trial.wide)
    several = jnp.asarray([[sizes.keys] * sizes.batch, [0, *[5] * (sizes.batch - 1)]])
    offsets = jnp.asarray([0, 3])
    example = trial.example(sizes, content=content)

    def rule(width: Any, lengths: Any, offset: Any) -> Example:
        positions = {"query_positions": offset} if content else {}
        kernel = Gaussian(width, reach=None if content else 6)
        return example.changed(proximity=kernel, mask=Lengths(key=lengths), **positions)

    got = trial.compiled(jax.vmap(lambda *data: trial.apply(rule(*data))))(widths, several, offsets)
    for lane in range(2):
        own = rule(widths[lane], several[lane], offsets[lane])
        trial.output_close(f"lane {lane}", got[lane], trial.reference(own), own)


@check(10, "vmap", "Over any of the arguments, along any axis, gives each lane's own result.")
def _lanes() -> Iterator[Case]:
    for count in (1, 2, 3):
        for mapped in itertools.combinations(CONTENT, count):
            yield case(", ".join(mapped), _vmapped, mapped)
    yield case("inner and last axes", _other_axes)
    yield case("widths, lengths, offsets", _rule_lanes, True)
    yield case("value without content", _vmapped, ("value",), False, **WITHOUT_CONTENT)
    yield case("widths and lengths without content", _rule_lanes, False, **WITHOUT_CONTENT)


@check(10, "vmap of grad", "Gradients of each lane, also of what lanes share.")
def _gradient_lanes() -> Iterator[Case]:
    yield case("all", _of_grad, True, False)
    yield case("shared key", _of_grad, True, True)
    yield case("bias of each lane", _bias_lanes, False)
    yield case("shared bias", _bias_lanes, True)
    yield case("value without content", _of_grad, False, False, **WITHOUT_CONTENT)


# Repeats


def _repeated(trial: Trial, sizes: Sizes, content: bool) -> None:
    example = _rule(trial, sizes, content=content)
    pull = trial.puller(example, present(example))
    cotangent = trial.normal(example.output_shape)
    first, again = pull(cotangent), pull(cotangent)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        trial.close("repeated run", other, Bounded(one, np.zeros(one.shape)), example)


@check(12, "repeats", "Repeated runs are bit-identical, gradients included.")
def _repeats() -> Iterator[Case]:
    yield case("content", _repeated, True, queries=130, keys=130, batch=1)
    yield case("without content", _repeated, False, queries=130, keys=130, batch=1)


# Traces

CHANGES: Mapping[str, Callable[[Any], Mapping[str, Any]]] = {
    "width": lambda x: {"proximity": Gaussian(x)},
    "offset of a kernel": lambda x: {"proximity": Gaussian(2.0, x)},
    "length of a kernel": lambda x: {"proximity": Exponential(x, reach=6)},
    "key lengths": lambda x: {"mask": Lengths(key=x)},
    "window": lambda x: {"mask": Local(x, 0)},
    "query positions": lambda x: {"mask": Causal(), "query_positions": x},
    "scale": lambda x: {"scale": x},
}


def _traced_once(
    trial: Trial, sizes: Sizes, change: Callable[[Any], Mapping[str, Any]], content: bool
) -> None:
    trial.transformable()
    example, count = trial.example(sizes, content=content), 0

    def counted(number: Any) -> Any:
        nonlocal count
        count += 1
        return trial.apply(example.changed(**change(number)))

    compiled = trial.compiled(counted)
    for number in (jnp.asarray(1.0), jnp.asarray(4.0)):
        own = example.changed(**change(number))
        trial.output_close("output", compiled(number), trial.reference(own), own)
    if count != 1:
        raise Failure("traces for two numbers", expected=1, got=count, example=example)


@check(12, "no new trace", "Changed widths, lengths, offsets and masks' numbers compile nothing.")
def _traces() -> Iterator[Case]:
    for name, change in CHANGES.items():
        yield case(name, _traced_once, change, True)
    for name in ("width", "offset of a kernel", "length of a kernel", "key lengths"):
        rule = CHANGES[name]
        if name == "key lengths":
            rule = _smooth_lengths
        yield case(f"{name}, no content", _traced_once, rule, False, **WITHOUT_CONTENT)


def _smooth_lengths(length: Any) -> Mapping[str, Any]:
    return {"proximity": Gaussian(2.0, reach=4), "mask": Lengths(key=length)}
