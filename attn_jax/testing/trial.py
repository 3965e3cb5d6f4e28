"""A subject in one dtype: calls it, differentiates it, and compares with the reference."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.testing.example import Example, Sizes, draw
from attn_jax.testing.reference import FACTOR, Bounded, Precision, Reference
from attn_jax.testing.subject import NotSupported, Subject

CONTENT = ("query", "key", "value")

# Compiles several times faster. Not with xla_backend_optimization_level=0, which is faster still:
# programs compiled so gave NaN where all others, and those of any other level, gave right results.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


class Failure(AssertionError):
    """A result that is wrong.

    Attributes:
      what: which result, for instance "gradient of key".
      expected: what it must be, at one place.
      got: what it was there.
      allowed: the largest error that rounding explains there.
      place: index of the place, or None.
      example: the call that shows it.
      size: how many numbers the call was given.

    """

    def __init__(
        self,
        what: str,
        *,
        expected: Any,
        got: Any,
        example: Example | None = None,
        allowed: float = 0.0,
        place: tuple[int, ...] | None = None,
        wrong: str = "",
    ):
        at = "" if not place else f" at {list(place)}"
        error = f" (allowed error {allowed:.2g})" if allowed else ""
        call = "" if example is None else f"\n  {example}"
        super().__init__(f"{what}{at}: expected {expected}, got {got}{error}{wrong}{call}")
        self.what, self.expected, self.got, self.allowed = what, expected, got, allowed
        self.place, self.example = place, None if example is None else str(example)
        self.size = 0 if example is None else example.size


class Trial:
    """A subject in one dtype.

    Attributes:
      subject: the attention function.
      dtype: of query, key and value.
      examples: how many Hypothesis draws for a case that it draws for.
      optimize: whether XLA optimises what it compiles for a CPU, as it does for users.
      precision: relative errors of one rounding in this dtype.

    """

    def __init__(self, subject: Subject, dtype: str, *, examples: int = 20, optimize: bool = True):
        self.subject, self.examples, self.optimize = subject, examples, optimize
        self.dtype = jnp.dtype(dtype)
        logits = jnp.promote_types(self.dtype, jnp.float32)
        self.precision = Precision(float(jnp.finfo(self.dtype).eps), float(jnp.finfo(logits).eps))

    @property
    def wide(self) -> np.dtype:
        """The dtype of logits, log-normalisers and kernels' parameters."""
        return np.dtype(jnp.promote_types(self.dtype, jnp.float32))

    def example(
        self, sizes: Sizes, seed: int = 0, *, content: bool = True, **arguments: Any
    ) -> Example:
        """An example of random numbers of this dtype."""
        return draw(sizes, self.dtype, seed, content=content, **arguments)

    def normal(self, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
        """Standard normal numbers of this dtype, for tangents, cotangents and biases."""
        return np.random.default_rng(seed).normal(size=shape).astype(self.dtype)

    def reference(self, example: Example, least: float = 0.0) -> Reference:
        """What the example must give; `least` is the smallest relative error to allow for.

        It is for references that are finite differences themselves.
        """
        return Reference(example, Precision(*(max(eps, least) for eps in self.precision)))

    # Calls

    def apply(self, example: Example) -> Any:
        """The subject's result, within a trace or not."""
        return self.subject(example.query, example.key, example.value, **example.arguments)

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """jit, where the subject is made of JAX operations."""
        if not self.subject.traceable:
            return function
        quick = not self.optimize and jax.default_backend() == "cpu"
        return jax.jit(function, compiler_options=_QUICK if quick else None, **options)

    def transformable(self) -> None:
        """Raise NotSupported unless JAX's transformations apply."""
        if not self.subject.traceable:
            raise NotSupported("it is not a JAX function")

    def run(self, example: Example) -> Any:
        """The compiled result: output, or output and log-normaliser."""
        arrays = self.arrays(example, present(example))
        return self.compiled(lambda arrays: self.apply(example.changed(**arrays)))(arrays)

    def output(self, example: Example) -> np.ndarray:
        """The output in float64, its shape and dtype checked."""
        return self.checked(self.run(example), example)

    def checked(self, output: Any, example: Example) -> np.ndarray:
        """An output in float64, after a look at its shape and dtype."""
        if tuple(output.shape) != example.output_shape:
            raise Failure(
                "shape of the output",
                expected=list(example.output_shape),
                got=list(output.shape),
                example=example,
            )
        if output.dtype != example.value.dtype:
            raise Failure(
                "dtype of the output",
                expected=example.value.dtype,
                got=output.dtype,
                example=example,
            )
        return np.asarray(output, np.float64)

    def arrays(self, example: Example, names: tuple[str, ...]) -> dict[str, Any]:
        """Arguments by name as JAX arrays: data, which the compiled program does not know."""
        given = {**{n: getattr(example, n) for n in CONTENT}, **example.arguments}

        def array(x: Any) -> jax.Array:
            return jnp.asarray(x) if hasattr(x, "dtype") else jnp.asarray(x, self.wide)

        return {name: jax.tree.map(array, given[name]) for name in names}

    def puller(
        self, example: Example, wrt: tuple[str, ...]
    ) -> Callable[[Any], tuple[Any, Mapping[str, Any]]]:
        """The function from a cotangent to the output and the gradients."""
        if self.subject.pull is not None:
            return lambda cotangent: self._pull_by_subject(example, wrt, cotangent)
        self.transformable()
        moving = self.arrays(example, wrt)
        still = self.arrays(example, tuple(n for n in present(example) if n not in wrt))

        @self.compiled
        def pull(moving: Any, still: Any, cotangent: Any) -> Any:
            output, transpose = jax.vjp(
                lambda moving: self.apply(example.changed(**moving, **still)), moving
            )
            return output, transpose(cotangent)[0]

        return lambda cotangent: pull(moving, still, cotangent)

    def _pull_by_subject(
        self, example: Example, wrt: tuple[str, ...], cotangent: Any
    ) -> tuple[Any, Mapping[str, Any]]:
        assert self.subject.pull is not None
        if not set(wrt) <= {*CONTENT, "bias"}:
            raise NotSupported(f"the kit can't get the gradient of {wrt[-1]} from it")
        try:
            output, gradients = self.subject.pull(
                example.query,
                example.key,
                example.value,
                np.asarray(cotangent),
                **example.arguments,
            )
        except NotImplementedError as error:
            raise NotSupported(str(error)) from error
        return output, {name: gradients[name] for name in wrt}

    def pusher(self, example: Example, names: tuple[str, ...]) -> Callable[[Any], tuple[Any, Any]]:
        """The function from tangents, a mapping by name, to the output and its tangent."""
        self.transformable()
        moving = self.arrays(example, names)

        @self.compiled
        def push(moving: Any, tangents: Any) -> Any:
            return jax.jvp(
                lambda moving: self.apply(example.changed(**moving)), (moving,), (tangents,)
            )

        return lambda tangents: push(moving, {n: jnp.asarray(t) for n, t in tangents.items()})

    # Comparisons

    def output_holds(self, example: Example, least: float = 0.0, *, empty: bool = False) -> None:
        """The output is the reference's; `empty` asks so of queries without keys, too."""
        reference = self.reference(example, least)
        self.output_close("output", self.output(example), reference, example, empty=empty)

    def output_close(
        self,
        what: str,
        output: Any,
        reference: Reference,
        example: Example,
        *,
        empty: bool = False,
    ) -> None:
        """An output is the reference's, at queries with keys or, with `empty`, at all."""
        got = np.asarray(output, np.float64)
        if not empty and got.shape == reference.output.value.shape:
            got = np.where(reference.seen, got, reference.output.value)
        self.close(what, got, reference.output, example)

    def cotangent(self, reference: Reference, *, empty: bool = False) -> np.ndarray:
        """Random cotangents of the output; zero at queries without keys unless `empty`."""
        cotangent = self.normal(reference.output.value.shape)
        return cotangent if empty else np.where(reference.seen, cotangent, 0).astype(self.dtype)

    def holds(
        self,
        example: Example,
        wrt: tuple[str, ...] | None = None,
        least: float = 0.0,
        *,
        empty: bool = False,
    ) -> None:
        """Output and gradients are the reference's. A wrong output is told before a missing vjp."""
        wrt = present(example) if wrt is None else wrt
        reference = self.reference(example, least)
        cotangent = self.cotangent(reference, empty=empty)
        try:
            output, gradients = self.puller(example, wrt)(cotangent)
        except NotSupported:
            self.output_holds(example, least, empty=empty)
            raise
        output = self.checked(output, example)
        self.output_close("output", output, reference, example, empty=empty)
        self.gradients_close(gradients, reference.pull(cotangent, wrt), example)

    def gradients_close(
        self, gradients: Mapping[str, Any], expected: Mapping[str, Any], example: Example
    ) -> None:
        """Gradients by name are the reference's."""
        for name, bounded in expected.items():
            if isinstance(bounded, list):
                for leaf, one in zip(jax.tree.leaves(gradients[name]), bounded, strict=True):
                    self.close(f"gradient of {name}", leaf, one, example)
            else:
                self.close(f"gradient of {name}", gradients[name], bounded, example)

    def close(self, what: str, got: Any, expected: Bounded, example: Example | None = None) -> None:
        """A result differs from the reference by no more than rounding explains."""
        got = np.asarray(got, np.float64)
        if got.shape != expected.value.shape:
            raise Failure(
                f"shape of the {what}",
                expected=list(expected.value.shape),
                got=list(got.shape),
                example=example,
            )
        smallest = float(jnp.finfo(self.dtype).smallest_normal)
        allowed = FACTOR * expected.error + np.where(expected.error > 0, smallest, 0)
        with np.errstate(invalid="ignore"):
            right = (got == expected.value) | (abs(got - expected.value) <= allowed)
        if right.all():
            return
        with np.errstate(invalid="ignore", divide="ignore"):
            excess = np.nan_to_num(abs(got - expected.value), nan=np.inf) / (allowed + smallest)
        place = np.unravel_index(np.argmax(np.where(right, -1, excess)), got.shape)
        raise Failure(
            what,
            expected=f"{expected.value[place]:.6g}",
            got=f"{got[place]:.6g}",
            allowed=float(allowed[place]),
            place=tuple(map(int, place)),
            wrong=f"; {(~right).sum()} of {right.size} wrong",
            example=example,
        )

    def alike(
        self,
        what: str,
        got: Any,
        expected: Any,
        example: Example | None = None,
        roundings: float = FACTOR,
    ) -> None:
        """Two results of the subject agree up to some roundings of the largest number in them."""
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            other = np.asarray(other, np.float64)
            finite = np.where(np.isfinite(other), abs(other), 0)
            error = self.precision.value * finite.max(initial=0.0) * roundings / FACTOR
            self.close(what, one, Bounded(other, np.full(other.shape, error)), example)


def present(example: Example) -> tuple[str, ...]:
    """Which of query, key and value an example has."""
    return tuple(name for name in CONTENT if getattr(example, name) is not None)
