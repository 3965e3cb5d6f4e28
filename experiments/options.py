"""Options with a meaning: the leaves of every config, and what `--help_config` prints."""

import dataclasses
from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Bad input from outside: one sentence with the rule, what was got and the remedy."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A default value and what it means.

    Attributes:
      default: the value used unless a config or a flag overrides it; its type is the key's type.
      meaning: one line for `--help_config`, with units and admissible values.
      least: the smallest admissible number (of each entry of a tuple), or None.
      below: what a number must be below, or None.

    """

    default: Any
    meaning: str
    least: float | None = None
    below: float | None = None

    def check(self, key: str, value: Any) -> None:
        """Raises UserError for a number outside of the range."""
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            small = self.least is not None and not number >= self.least
            large = self.below is not None and not number < self.below
            if small or large:
                low = "" if self.least is None else f" at least {self.least:g}"
                high = "" if self.below is None else f" below {self.below:g}"
                both = " and" if low and high else ""
                raise UserError(f"{key} must be{low}{both}{high}, got {value!r}")


TRANSFORMER_OPTIONS: Mapping[str, Option] = {
    "num_layers": Option(2, "blocks of attention and feed-forward", 1),
    "features": Option(64, "width of the residual stream", 1),
    "num_heads": Option(4, "attention heads; divides `features`", 1),
    "mlp_features": Option(0, "width of the feed-forward layer; 0: four times `features`", 0),
    "norm": Option("pre", "layer norm before (pre) or after (post) each residual branch"),
    "activation": Option("gelu", "of the feed-forward layer: gelu or relu"),
    "dropout_rate": Option(0.0, "dropout on embeddings and residual branches", 0, 1),
    "position_encoding": Option("sinusoidal", "none, sinusoidal, learned or rotary"),
}
