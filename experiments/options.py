"""Options with a meaning: the leaves of every config, and what `--help_config` prints."""

import dataclasses
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
