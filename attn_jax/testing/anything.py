"""Check 20: what Hypothesis draws, in any combination, and shrinks where it fails."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from attn_jax.ops import proximity
from attn_jax.ops.masks import Causal, Lengths, Local, Prefix
from attn_jax.testing.check import Case, case, check, need
from attn_jax.testing.example import Example, Sizes
from attn_jax.testing.subject import NotSupported
from attn_jax.testing.trial import Trial, present

# After the first failure, how many more examples may be tried to find a smaller one.
SHRINKS = 40


def _strategy(content: bool) -> Any:
    """Sizes and arguments of a call; the simplest first, as Hypothesis shrinks towards it."""
    from hypothesis import strategies as st

    length = st.sampled_from((1, 2, 3, 5, 8, 130))
    key_heads = st.sampled_from((1, 2))

    @st.composite
    def sizes(draw: Any) -> Sizes:
        shared = draw(key_heads)
        group = draw(st.sampled_from((1, 2))) if content else 1
        keys = draw(length)
        return Sizes(
            batch=draw(st.sampled_from((1, 2))),
            queries=draw(length) if content else keys,
            keys=keys,
            heads=shared * group,
            key_heads=shared,
            key_width=draw(st.sampled_from((1, 4))),
            value_width=draw(st.sampled_from((1, 3))),
        )

    @st.composite
    def call(draw: Any) -> tuple[Sizes, dict[str, Any]]:
        s = draw(sizes())
        rule: dict[str, Any] = {}
        kernel = draw(st.sampled_from((None, *_KERNELS)))
        if kernel is not None:
            number = draw(st.sampled_from((2.0, 0.5, 7.0)))
            traced = draw(st.booleans())
            rule["proximity"] = _KERNELS[kernel](jnp.asarray(number) if traced else number)
        masks = draw(st.lists(st.sampled_from(tuple(_MASKS)), max_size=2, unique=True))
        for name in masks:
            mask = _MASKS[name](s, draw(st.integers(0, 3)))
            rule["mask"] = mask if "mask" not in rule else rule["mask"] & mask
        offset = draw(st.sampled_from((None, 1, -1, s.keys - s.queries)))
        if offset is not None:
            rule["query_positions"] = offset
        if content and draw(st.booleans()):
            rule["bias"] = draw(st.sampled_from(_bias_shapes(s)))
        return s, rule

    return call()


_KERNELS = {
    "gaussian": lambda x: proximity.Gaussian(x, reach=9),
    "exponential": lambda x: proximity.Exponential(x),
    "window": lambda x: proximity.Window(x),
    "power law": lambda x: proximity.PowerLaw(x),
}
_MASKS = {
    "causal": lambda s, n: Causal(),
    "local": lambda s, n: Local(n, 1),
    "lengths": lambda s, n: Lengths(key=np.arange(n + 1, n + 1 + s.batch, dtype=np.int32)),
    "prefix": lambda s, n: Prefix(jnp.asarray(n + 1)),
    "keys": lambda s, n: np.arange(s.keys).reshape(1, 1, 1, -1) % 4 != n,
    "pairs": lambda s, n: jnp.asarray(
        np.random.default_rng(n).random((1, s.heads, s.queries, s.keys)) < 0.7
    ),
}


def _bias_shapes(s: Sizes) -> tuple[tuple[int, int, int, int], ...]:
    return (1, 1, 1, s.keys), (s.batch, 1, s.queries, 1), (1, s.heads, s.queries, s.keys)


class _Memory:
    """Outcomes by example. After `SHRINKS` new ones past a failure, unknown ones count as right.

    Every example has one outcome for good, as Hypothesis wants it, and shrinking ends.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, AssertionError | None] = {}
        self.ran = self.left = 0
        self.reason = ""

    def replay(self, example: Example, run: Any) -> None:
        name = str(example)
        if name not in self.outcomes:
            failed = any(self.outcomes.values())
            if failed and self.left <= 0:
                return
            self.left = self.left - 1 if failed else SHRINKS
            self.outcomes[name] = self._outcome(run)
        error = self.outcomes[name]
        if error is not None:
            raise error

    def _outcome(self, run: Any) -> AssertionError | None:
        try:
            run()
        except NotSupported as error:
            self.reason = str(error)
            return None
        except AssertionError as error:
            return error
        self.ran += 1
        return None


def _holds_where_seen(trial: Trial, example: Example) -> None:
    """Output and gradients; queries without keys, whose meaning is check 1's, are left out."""
    reference = trial.reference(example)
    seen = np.swapaxes(reference.allowed.any(-1), 1, 2)[..., None]
    bias = ("bias",) if "bias" in example.arguments else ()
    wrt = (*present(example), *bias)
    cotangent = (trial.normal(example.output_shape) * seen).astype(trial.dtype)
    output, gradients = trial.puller(example, wrt)(cotangent)
    got = np.where(seen, trial.checked(output, example), reference.output.value)
    trial.close("output", got, reference.output, example)
    trial.gradients_close(gradients, reference.pull(cotangent, wrt), example)


def _drawn(trial: Trial, sizes: Sizes, content: bool) -> None:
    del sizes
    need(trial.examples > 0, "no examples were asked for")
    try:
        import hypothesis
    except ImportError as error:
        raise NotSupported("Hypothesis is not installed: it is the extra `testing`") from error
    memory = _Memory()

    def holds(call: tuple[Sizes, dict[str, Any]]) -> None:
        drawn, rule = call
        if "bias" in rule:
            rule = {**rule, "bias": trial.normal(rule["bias"])}
        example = trial.example(drawn, content=content, **rule)
        memory.replay(example, lambda: _holds_where_seen(trial, example))

    settings = hypothesis.settings(
        max_examples=trial.examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
        print_blob=False,
        report_multiple_bugs=False,
    )
    settings(hypothesis.given(_strategy(content))(holds))()
    need(memory.ran > 0, memory.reason)


@check(20, "any combination", "What Hypothesis draws: shapes, kernels, masks, positions, biases.")
def _anything() -> Iterator[Case]:
    for content, name in ((True, "content"), (False, "without content")):
        yield case(name, _drawn, content)
