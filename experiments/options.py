"""Options with a meaning: the leaves of every config, and what `--help_config` prints."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """A default value and what it means.

    Attributes:
      default: the value used unless a config or a flag overrides it; its type is the key's type.
      meaning: one line for `--help_config`, with units and admissible values.

    """

    default: Any
    meaning: str


class UserError(Exception):
    """Bad input from outside: one sentence with the rule, what was got and the remedy."""


TRANSFORMER_OPTIONS: Mapping[str, Option] = {
    "num_layers": Option(2, "blocks of attention and feed-forward"),
    "features": Option(64, "width of the residual stream"),
    "num_heads": Option(4, "attention heads; divides `features`"),
    "mlp_features": Option(0, "width of the feed-forward layer; 0: four times `features`"),
    "norm": Option("pre", "layer norm before (pre) or after (post) each residual branch"),
    "activation": Option("gelu", "of the feed-forward layer: gelu or relu"),
    "dropout_rate": Option(0.0, "dropout on embeddings and residual branches"),
    "position_encoding": Option("sinusoidal", "none, sinusoidal, learned or rotary"),
}
