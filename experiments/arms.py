"""The arms of a comparison: named rules, spelt out for a task's number of heads.

`gaussian` as an arm is not the rule `gaussian()` but the strongest fair form of it: several
widths and both sides over the heads, trainable. A causal task has no right side.
"""

import difflib
from collections.abc import Callable, Mapping

from attn_jax.rules import parse
from experiments.options import UserError


def _cycle(values: tuple[int, ...], heads: int) -> str:
    cycled = [values[index % len(values)] for index in range(heads)]
    return "(" + ", ".join(map(str, cycled)) + ",)" if heads == 1 else repr(tuple(cycled))


def _gaussian(heads: int, causal: bool, cross: bool) -> str:
    offsets = (0,) if cross else (0, -1) if causal else (-1, 1)
    widths, sides = _cycle((1, 2, 4, 8), heads), _cycle(offsets, heads)
    return f"gaussian(width={widths}, offset={sides}, trainable=True)"


def _exponential(heads: int, causal: bool, cross: bool) -> str:
    del causal, cross
    return f"exponential(length={_cycle((1, 2, 4, 8), heads)}, trainable=True)"


def _table(heads: int, causal: bool, cross: bool) -> str:
    """A free log-weight for each distance of the task: cross-attention is over real numbers."""
    del heads
    if cross:
        return "table(size=257, step=0.25)"
    return f"table(size={257 if causal else 129})"


def _as_is(rule: str) -> Callable[[int, bool, bool], str]:
    return lambda heads, causal, cross: rule


ARMS: Mapping[str, Callable[[int, bool, bool], str]] = {
    "self": _as_is("self"),
    "uniform": _as_is("uniform"),
    "gaussian": _gaussian,
    "exponential": _exponential,
    "table": _table,
    "raw": _as_is("raw"),
    "learned": _as_is("learned"),
    "learned * gaussian": lambda *where: f"learned * {_gaussian(*where)}",
    "learned * table": lambda *where: f"learned * {_table(*where)}",
    "mix(learned, gaussian)": lambda *where: f"mix(learned, {_gaussian(*where)})",
}
MAIN_ARMS = ("self", "uniform", "gaussian", "table", "raw", "learned", "learned * gaussian")


def arm_rule(label: str, *, num_heads: int, causal: bool, cross: bool) -> str:
    """The rule behind an arm's label.

    Args:
      label: a name of `ARMS`, or a rule, which stands for itself.
      num_heads: heads of the task's model; widths 1, 2, 4, 8 go round them.
      causal: the task sees the past only.
      cross: the attention is from one set of positions to another.

    Raises:
      UserError: there is no such arm, names the nearest; or a rule that does not read as one.

    """
    if label in ARMS:
        return ARMS[label](num_heads, causal, cross)
    try:
        parse(label, num_heads)
    except ValueError as error:
        if not label.replace("_", "").isalnum():
            raise UserError(f"there is no arm {label!r}, and as a rule: {error}") from error
        near = difflib.get_close_matches(label, ARMS, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no arm {label!r}: did you mean {near!r}?") from error
    return label


CONTENT_SETTINGS = tuple(
    f"model.position_encoding={name}" for name in ("none", "sinusoidal", "rotary")
)
POSITION_SETTINGS = tuple(
    f"model.position_encoding={name}" for name in ("none", "sinusoidal", "learned")
)


def arm_trials(label: str, *, num_heads: int, causal: bool, cross: bool) -> tuple[str, ...]:
    """Three settings of an arm's own, so that no arm is a straw man and all have equal trials.

    A kernel with a width tries the widths 1, 2 and 4 (trainable from there), content tries no
    positions, sinusoids and rotation, and what has neither tries position encodings, of which
    real numbers have no learned one.
    """
    rule = arm_rule(label, num_heads=num_heads, causal=causal, cross=cross)
    if label in ("gaussian", "exponential"):
        widths = _cycle((1, 2, 4, 8), num_heads)
        return tuple(
            f"rule={rule.replace(widths, _cycle((width,), num_heads))}" for width in (1, 2, 4)
        )
    products = [product for group in parse(rule, num_heads) for product in group.products]
    content = any(product.content is not None for product in products)
    return CONTENT_SETTINGS if content or cross else POSITION_SETTINGS
