"""Check 20: what Hypothesis draws, in any combination, and shrinks where it fails."""

from collections.abc import Iterator, Mapping
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
SHRINKS = 20


def _strategy(content: bool) -> Any:
    """Sizes and words for a call; the simplest first, as Hypothesis shrinks towards it."""
    from hypothesis import strategies as st

    length = st.sampled_from((1, 2, 3, 5, 8, 130))
    mask = st.tuples(st.sampled_from(tuple(_MASKS)), st.integers(0, 3))
    kernel = st.tuples(
        st.sampled_from(tuple(_KERNELS)), st.sampled_from((2.0, 0.5, 7.0)), st.booleans()
    )
    return st.fixed_dictionaries(
        {
            "batch": st.sampled_from((1, 2)),
            "queries": length,
            "keys": length,
            "key_heads": st.sampled_from((1, 2)),
            "group": st.sampled_from((1, 2)) if content else st.just(1),
            "width": st.sampled_from((1, 4)),
            "kernel": st.none() | kernel,
            "masks": st.lists(mask, max_size=2),
            "offset": st.sampled_from((None, 1, -1, "bottom right")),
            "bias": st.sampled_from((None, 0, 1, 2)) if content else st.none(),
        }
    )


def _example(trial: Trial, content: bool, drawn: Mapping[str, Any]) -> Example:
    """The call that the words stand for."""
    s = Sizes(
        batch=drawn["batch"],
        queries=drawn["queries"] if content else drawn["keys"],
        keys=drawn["keys"],
        heads=drawn["key_heads"] * drawn["group"],
        key_heads=drawn["key_heads"],
        key_width=drawn["width"],
        value_width=drawn["width"],
    )
    rule: dict[str, Any] = {}
    if drawn["kernel"] is not None:
        name, number, traced = drawn["kernel"]
        rule["proximity"] = _KERNELS[name](jnp.asarray(number) if traced else number)
    for name, number in drawn["masks"]:
        mask = _MASKS[name](s, number)
        rule["mask"] = mask if "mask" not in rule else rule["mask"] & mask
    if drawn["offset"] is not None:
        bottom_right = drawn["offset"] == "bottom right"
        rule["query_positions"] = s.keys - s.queries if bottom_right else drawn["offset"]
    if drawn["bias"] is not None:
        rule["bias"] = trial.normal(_bias_shapes(s)[drawn["bias"]])
    return trial.example(s, content=content, **rule)


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
        sum(np.indices((1, s.heads, s.queries, s.keys)) * np.reshape([1, 3, 7, 5], (4, 1, 1, 1, 1)))
        % 10
        > n
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


def _holds(trial: Trial, example: Example) -> None:
    bias = ("bias",) if "bias" in example.arguments else ()
    trial.holds(example, (*present(example), *bias))


def _drawn(trial: Trial, sizes: Sizes, content: bool) -> None:
    del sizes
    need(trial.examples > 0, "no examples were asked for")
    try:
        import hypothesis
    except ImportError as error:
        raise NotSupported("Hypothesis is not installed: it is the extra `testing`") from error
    memory = _Memory()

    def holds(drawn: Mapping[str, Any]) -> None:
        example = _example(trial, content, drawn)
        memory.replay(example, lambda: _holds(trial, example))

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
